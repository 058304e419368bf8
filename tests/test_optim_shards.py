"""Masked optimizers over shards: the same bits as of whole weights, in two processes."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from test_training import with_process_group
from torch import nn

import pyrx
from pyrx.optim import MaskedAdamW, MaskedSGD

STEPS = 4
ADAMW = (MaskedAdamW, {"lr": 0.1, "weight_decay": 0.1})
SGD = (MaskedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1})
# of (shape, placed along, masks): rows of both ranks, of one alone, columns, and groups along what is cut
CUTS = [
    ((7, 24), 0, {"n": 2, "m": 4}),
    ((1, 24), 0, {"n": 1, "m": 8, "refresh_every": 3}),
    ((6, 32), 1, {"n": 2, "m": 4, "rule": "sr-ste", "strength": 0.1}),
    ((6, 32), 1, {"n": 2, "m": 3, "dim": 0}),
    ((24, 5), 0, {"n": 2, "m": 4, "dim": 0, "rule": "dense"}),
    ((8, 5), 0, {"n": 1, "m": 4, "dim": 0}),
    ((8, 6, 3, 3), 0, {"n": 1, "m": 3, "dim": 1}),
    ((5, 6), None, {"n": 1, "m": 2}),
]


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


def cut(x, over, dim):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(x.detach().clone(), over, [Replicate() if dim is None else Shard(dim)])


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_groups(rank, _):
    """Weights that nobody but the optimizer knows; state dicts on the way."""
    over = mesh()
    for make, options in (ADAMW, SGD):
        for shape, dim, masks in CUTS:
            whole = nn.Parameter(normal(*shape, seed=1))
            part = nn.Parameter(cut(whole, over, dim))
            optimizers = [make([x], **options, **masks) for x in (whole, part)]
            for step in range(STEPS):
                whole.grad = normal(*shape, seed=10 + step)
                part.grad = cut(whole.grad, over, dim)
                if step == 1:
                    again = make([part], **options, **masks)
                    again.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
                    optimizers[1] = again
                if step == 3:
                    for each in optimizers:
                        each.refresh_masks()
                for each in optimizers:
                    each.step()
                assert torch.equal(part.full_tensor(), whole), (make, shape, dim, step)
                ours, theirs = optimizers[1].state[part], optimizers[0].state[whole]
                assert ours.keys() == theirs.keys()
                for name, value in ours.items():
                    found = value.full_tensor() if hasattr(value, "full_tensor") else value
                    assert torch.equal(found, theirs[name]), (name, shape)
                assert ours["mask"].placements == part.placements and ours["mask"].dtype == torch.uint8


def refused(rank, _):
    over = mesh()
    cases = [
        ((4, 24), 1, {"n": 1, "m": 8}, r"in shards of whole groups of m = 8, got 12 of 24 along dimension 1 in each"),
        ((12, 5), 0, {"n": 1, "m": 4, "dim": 0}, r"in shards of whole groups of m = 4, got 6 of 12 along dimension 0"),
        ((4, 24), 1, {"n": 1, "m": 4}, r"in shards of whole bytes of the mask.* got 12 of 24 in each"),
    ]
    for make, options in (ADAMW, SGD):
        for shape, dim, masks, text in cases:
            part = nn.Parameter(cut(torch.zeros(shape), over, dim))
            with pytest.raises(RuntimeError, match=rf"expected params\[0\] {text}"):
                make([part], **options, **masks)


class Net(nn.Module):
    """Without biases: torch's step of the last few elements of a tensor rounds otherwise than that of the others."""

    def __init__(self):
        super().__init__()
        convolution, layers = (
            nn.Conv2d(8, 5, 3, bias=False),
            [nn.Linear(20, 24, bias=False), nn.Linear(24, 3, bias=False)],
        )
        self.layers = nn.Sequential(convolution, nn.Flatten(), nn.ReLU(), *layers)

    def forward(self, x):
        return self.layers(x)


def sparse_net():
    torch.manual_seed(0)
    model = Net()
    pyrx.nn.sparsify_(model, 1, 8, pad=True)  # of 20 inputs the last group has four
    return model


def shard(model, over):
    from torch.distributed.fsdp import fully_shard

    for part in (*(model.layers[i] for i in (0, 3, 4)), model):
        fully_shard(part, mesh=over)
    return model


def by_model(rank, _):
    """The forward of all of a weight takes the masks that its shards made: dense, getting sparser, frozen."""
    over = mesh()
    for make, options in (ADAMW, SGD):
        for more in ({}, {"refresh_every": 3}):
            alone, wrapped = sparse_net(), shard(sparse_net(), over)
            models = alone, wrapped
            optimizers = [make(each.parameters(), **options, **more, model=each) for each in models]
            phases = {"dense_steps": 2, "fine_tune_steps": 2}
            schedules = [pyrx.nn.StepwiseSDGF(each, total_steps=9, **phases) for each in models]
            for step in range(9):
                if step == 5:  # resumed in a model of its own
                    states = [wrapped.state_dict(), optimizers[1].state_dict(), schedules[1].state_dict()]
                    wrapped = shard(sparse_net(), over)
                    optimizers[1] = make(wrapped.parameters(), **options, **more, model=wrapped)
                    schedules[1] = pyrx.nn.StepwiseSDGF(wrapped, total_steps=9, **phases)
                    for each, state in zip((wrapped, optimizers[1], schedules[1]), states, strict=True):
                        each.load_state_dict(state)
                x = normal(4, 8, 4, 4, seed=step)
                found = [each(x) for each in (alone, wrapped)]
                assert torch.equal(*found), step
                for out in found:
                    out.square().sum().backward()
                for one, other in zip(wrapped.parameters(), alone.parameters(), strict=True):
                    torch.testing.assert_close(one.grad.full_tensor(), other.grad)
                    one.grad = cut(other.grad, over, 0)
                for each in (*optimizers, *schedules):
                    each.step()
                for one, other in zip(wrapped.parameters(), alone.parameters(), strict=True):
                    assert torch.equal(one.full_tensor(), other), step
                for i in (0, 3, 4):
                    ours, theirs = (each.layers[i].parametrizations.weight[0] for each in (wrapped, alone))
                    assert torch.equal(ours.mask, theirs.mask) and ours.frozen == theirs.frozen, (step, i)
                    mask = optimizers[1].state[wrapped.layers[i].parametrizations.weight.original]["mask"]
                    assert torch.equal(mask.full_tensor(), ours.mask)
                for each in optimizers:
                    each.zero_grad()
            report = pyrx.nn.sparsity_report(alone)
            assert ours.frozen and ours.n == 1 and report.density == pytest.approx(report.kept / report.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("worker", [by_groups, refused, by_model])
def test_two_processes(worker, tmp_path):
    mp.spawn(with_process_group, args=(tmp_path / "rendezvous", worker), nprocs=2)
