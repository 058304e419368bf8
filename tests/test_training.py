"""Inside a training run: optimisers, activation checkpointing, DistributedDataParallel and FSDP."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyrx


class Model(nn.Module):
    """A body and the fused head; the loss is the output."""

    def __init__(self, **options):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(13, 21), nn.Tanh())
        self.head = pyrx.nn.MultiSampleDropoutClassifier(21, 5, 4, **options)

    def forward(self, x, y):
        return self.head(self.body(x), y)


def batch(seed, rows=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 13, generator=generator)
    y = (x[:, :5] * 2 + torch.randn(rows, 5, generator=generator) * 0.1).argmax(1)
    return x.to(dtype), y


def train(model, backend, monkeypatch):
    """40 steps on `backend`, the masks drawn alike; the losses."""
    monkeypatch.setenv("PYRX_BACKEND", backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for step in range(40):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss = model(*batch(step % 4, 64, torch.float64))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"sampling": "antithetic"}, {"combine": "logits"}], ids=str)
def test_backends_train_alike(backend, monkeypatch, options):
    torch.manual_seed(0)
    model = Model(**options).double()
    expected = train(copy.deepcopy(model), "reference", monkeypatch)
    found = train(model, backend, monkeypatch)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-7, atol=1e-9)
    assert sum(found[-4:]) < 0.6 * sum(found[:4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_gradient_scaler_trains(dtype):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(*batch(step % 4, 64))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 65536.0, "no step was skipped: no gradient overflowed"
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


# Activation checkpointing.


@pytest.mark.parametrize("seed", [None, 7], ids=["drawn", "given"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointed_gradients_are_the_same(backend, reentrant, reduction, seed):
    torch.manual_seed(0)
    x, y = batch(1)
    body = nn.Linear(13, 21)
    weight = torch.randn(5, 21, requires_grad=True)

    def function(x):
        features = pyrx.dropout(body(x), 0.3, seed=seed, backend=backend)
        copies = pyrx.multi_sample_dropout(features, 2, seed=seed, backend=backend).mean(0)
        return pyrx.multi_sample_dropout_cross_entropy(
            features + copies, weight, y, reduction=reduction, seed=seed, backend=backend
        )

    found = []
    for call in (function, lambda x: checkpoint(function, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_(), weight, *body.parameters()]
        for leaf in leaves:
            leaf.grad = None
        loss = call(leaves[0])
        loss.backward(torch.linspace(-1, 1, loss.numel()).reshape(loss.shape) + 0.5)
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Several processes.


def local_gradients(model, rank):
    """What a rank's own batch gives without any wrapper."""
    model = copy.deepcopy(model)
    torch.manual_seed(50 + rank)
    model(*batch(rank)).backward()
    return [parameter.grad for parameter in model.parameters()]


def with_process_group(rank, file, worker):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        worker(rank, Model(sampling="antithetic"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # gloo's threads, still at work on a busy machine, can abort a process that takes down its modules
    os._exit(0)


def averaged(gradients):
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / 2 for gradient in gradients]


def ddp(rank, model):
    expected = averaged(local_gradients(model, rank))
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second step goes through the buckets that the first has made
        wrapped.zero_grad()
        torch.manual_seed(50 + rank)
        wrapped(*batch(rank)).backward()
        torch.testing.assert_close([each.grad for each in wrapped.parameters()], expected)


def fsdp(rank, model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = averaged(local_gradients(model, rank))
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.body, model.head, model):
        fully_shard(part, mesh=mesh)
    torch.manual_seed(50 + rank)
    model(*batch(rank)).backward()
    torch.testing.assert_close([each.grad.full_tensor() for each in model.parameters()], expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert model(*batch(rank)).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("worker", [ddp, fsdp])
def test_two_processes(worker, tmp_path):
    mp.spawn(with_process_group, args=(tmp_path / "rendezvous", worker), nprocs=2)
