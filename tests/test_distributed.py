"""A model of several kinds of pyrx layers in two processes: each wrapper trains it as gradients averaged by hand do."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from test_training import averaged, with_process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pyrx

TOKENS, STEPS = 40, 3


class Model(nn.Module):
    """Sparse layers around block-sparse attention with dropout, and the fused head under mixed labels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        mask = pyrx.BlockMask.sliding_window(TOKENS, 10, 16)
        self.attention = pyrx.nn.BlockSparseAttention(16, 2, mask, dropout=0.2, window=10)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        pyrx.nn.sparsify_(self.mlp, 2, 4)
        self.head = pyrx.nn.MultiSampleDropoutClassifier(16, 5, 4)

    def forward(self, x, labels):
        x, target = pyrx.mixup(x[:, None], labels)
        x = self.embed(x[:, 0])
        x = x + self.attention(x)
        return self.head((x + self.mlp(x)).mean(1), target)


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(6, TOKENS, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)


def step_of(model, optimizer, rank, step, average=False):
    """Every draw comes from the rank's own seed."""
    torch.manual_seed(100 * step + rank)
    optimizer.zero_grad()
    loss = model(*batch(rank, step))
    loss.backward()
    if average:
        for parameter, gradient in zip(
            model.parameters(), averaged([each.grad for each in model.parameters()]), strict=True
        ):
            parameter.grad = gradient
    optimizer.step()
    return loss.detach()


def train_both(rank, wrap, optimizer_of):
    """The wrapped model and the one whose gradients are averaged by hand."""
    torch.manual_seed(0)
    model = Model()
    alone = copy.deepcopy(model)
    wrapped = wrap(model)
    optimizer, other = optimizer_of(wrapped), optimizer_of(alone)
    for step in range(STEPS):
        losses = step_of(wrapped, optimizer, rank, step), step_of(alone, other, rank, step, average=True)
        torch.testing.assert_close(*losses)
    return wrapped, alone


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def masked_adamw(model):
    return pyrx.optim.MaskedAdamW(model.parameters(), lr=0.01, model=model)


def ddp(rank, _):
    for optimizer in (adamw, masked_adamw):
        wrapped, alone = train_both(rank, DistributedDataParallel, optimizer)
        for one, other in zip(wrapped.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other)
        weight = wrapped.module.mlp[0].weight
        assert torch.equal(weight != 0, alone.mlp[0].weight != 0)
        assert weight.count_nonzero() == weight.numel() // 2


def sharded(rank, _):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def wrap(model):
        for part in (model.attention, *(model.mlp[i] for i in (0, 2)), model.head, model):
            fully_shard(part, mesh=mesh)
        return model

    for optimizer in (adamw, masked_adamw):
        wrapped, alone = train_both(rank, wrap, optimizer)
        for one, other in zip(wrapped.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.full_tensor(), other)
        masks = [each.mlp[0].parametrizations.weight[0].mask for each in (wrapped, alone)]
        assert torch.equal(*masks) if optimizer is masked_adamw else masks == [None, None]


def flat(rank, _):
    """FullyShardedDataParallel, whose flat parameters are views."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(model):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    wrapped, alone = train_both(rank, wrap, adamw)
    with pytest.raises(
        RuntimeError, match="of fully_shard or whole, or without a mask, got a part of FullyShardedDataParallel's"
    ):
        masked_adamw(wrapped)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        for one, other in zip(wrapped.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("worker", [ddp, sharded, flat])
def test_two_processes(worker, tmp_path):
    mp.spawn(with_process_group, args=(tmp_path / "rendezvous", worker), nprocs=2)
