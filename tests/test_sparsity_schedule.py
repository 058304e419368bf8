"""Schedules of N:M sparsity: their phases, frames and decays, written out, and resuming with the same bits."""

import copy
import io
import math

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import pyrx
from pyrx.nn import (
    DenseThenSparse,
    ExponentialMDGF,
    GeometricSDGF,
    LinearMDGF,
    StepwiseSDGF,
    sparsify_,
)

MDGF = (LinearMDGF, ExponentialMDGF)
SCHEDULES = (DenseThenSparse, StepwiseSDGF, GeometricSDGF, *MDGF)


def sparse(n, m, features=128, **options):
    """A Linear layer in a model, and its NMSparsity."""
    model = nn.Sequential(nn.Linear(features, 6))
    sparsify_(model, n, m, **options)
    return model, model[0].parametrizations.weight[0]


def estimator_of(kind):
    return {"estimator": "mdgf"} if kind in MDGF else {}


def state_of(sparsity):
    return sparsity.enabled, sparsity.n, sparsity.m, sparsity.decay.item(), sparsity.frozen


def run(schedule, sparsity, steps):
    """The state in each step, and after the last."""
    states = [state_of(sparsity)]
    for _ in range(steps):
        schedule.step()
        states.append(state_of(sparsity))
    return states


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Frames and decays, written out.


def test_dense_then_sparse():
    model, sparsity = sparse(2, 4)
    schedule = DenseThenSparse(model, 9, dense_steps=3, fine_tune_steps=2)
    assert run(schedule, sparsity, 12) == (
        [(False, 2, 4, 1.0, False)] * 3 + [(True, 2, 4, 1.0, False)] * 4 + [(True, 2, 4, 1.0, True)] * 6
    )
    model, sparsity = sparse(2, 4)
    assert run(DenseThenSparse(model, 2), sparsity, 2) == [(True, 2, 4, 1.0, False)] * 2 + [(True, 2, 4, 1.0, True)]
    model, sparsity = sparse(2, 4)  # no flow: pruned once, then fine-tuned
    frozen = [(True, 2, 4, 1.0, True)]
    assert run(DenseThenSparse(model, 3, dense_steps=1, fine_tune_steps=2), sparsity, 3) == [
        (False, 2, 4, 1.0, False),
        *frozen * 3,
    ]
    model, sparsity = sparse(2, 4)
    assert run(DenseThenSparse(model, 1, fine_tune_steps=1), sparsity, 1) == frozen * 2


@pytest.mark.parametrize(
    "n, m, kept",
    [
        (1, 16, [15, 8, 4, 2, 1]),
        (2, 4, [3, 2]),
        (1, 4, [3, 2, 1]),
        (2, 8, [7, 4, 2]),
        (1, 8, [7, 4, 2, 1]),
        (4, 8, [7, 4]),
        (1, 32, [31, 16, 8, 4, 2, 1]),
        (1, 128, [127, 64, 32, 16, 8, 4, 2, 1]),
        (1, 2, [1, 1]),
        # M / N is no power of two
        (3, 8, [7, 4, 3]),
        (1, 6, [5, 3, 1]),
        (1, 3, [2, 1]),
        (5, 6, [5]),
        (3, 5, [4, 3]),
        (4, 4, [4]),
    ],
)
def test_stepwise_frames(n, m, kept):
    model, sparsity = sparse(n, m, features=4 * m)
    steps = 3 * len(kept)
    states = run(StepwiseSDGF(model, steps + 3, dense_steps=2, fine_tune_steps=1), sparsity, steps + 3)
    assert [(enabled, now, group) for enabled, now, group, *_ in states] == (
        [(False, kept[0], m)] * 2 + [(True, each, m) for each in kept for _ in range(3)] + [(True, n, m)] * 2
    )
    assert [frozen for *_, frozen in states] == [False] * (steps + 2) + [True] * 2
    if m < 128:  # the notes' formula: F = floor(log2(M / N)) + 1 frames, then N:M if it is not the last
        formula = [m - 1] + [math.floor(m / 2**i) for i in range(1, math.floor(math.log2(m / n)) + 1)]
        assert n == m or kept[: len(formula)] == formula


@pytest.mark.parametrize(
    "n, m, frames, expected",
    [
        (1, 8, 4, [(8, 64), (4, 32), (2, 16), (1, 8)]),
        (2, 4, 4, [(16, 32), (8, 16), (4, 8), (2, 4)]),
        (1, 4, 3, [(4, 16), (2, 8), (1, 4)]),
        (2, 4, 1, [(2, 4)]),
        (1, 1, 8, [(128 >> i, 128 >> i) for i in range(8)]),
    ],
)
def test_geometric_frames(n, m, frames, expected):
    model, sparsity = sparse(n, m)
    schedule = GeometricSDGF(model, 2 * frames + 5, dense_steps=4, fine_tune_steps=1, frames=frames)
    states = run(schedule, sparsity, 2 * frames + 5)
    assert [each[:3] for each in states] == (
        [(False, *expected[0])] * 4 + [(True, *each) for each in expected for _ in range(2)] + [(True, n, m)] * 2
    )


def test_frames_share_the_flow():
    """Of 5 frames in 13 steps none is empty and the last ends with the flow."""
    model, sparsity = sparse(1, 16)
    states = run(StepwiseSDGF(model, 13), sparsity, 12)
    assert [n for _, n, *_ in states] == [15] * 3 + [8] * 3 + [4] * 2 + [2] * 3 + [1] * 2
    model, sparsity = sparse(1, 16)
    assert [n for _, n, *_ in run(StepwiseSDGF(model, 5), sparsity, 4)] == [15, 8, 4, 2, 1]


def test_layers_of_other_ratios_have_their_own_frames():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify_(model, 1, 16, per_layer={"1": (2, 4)})
    schedule = StepwiseSDGF(model, 10)
    seen = []
    for _ in range(10):
        seen.append([layer.parametrizations.weight[0].n for layer in model])
        schedule.step()
    assert seen == [[15, 3], [15, 3], [8, 3], [8, 3], [4, 3], [4, 2], [2, 2], [2, 2], [1, 2], [1, 2]]


def decays(schedule, sparsity, steps):
    return [decay for *_, decay, _ in run(schedule, sparsity, steps)]


def test_linear_decay():
    model, sparsity = sparse(1, 4, estimator="mdgf")
    schedule = LinearMDGF(model, 10, dense_steps=2, fine_tune_steps=2, beta=0.25)
    found = decays(schedule, sparsity, 11)
    assert found == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    model, sparsity = sparse(1, 4, estimator="mdgf")
    found = decays(LinearMDGF(model, 7, dense_steps=1, fine_tune_steps=1), sparsity, 7)
    assert found == [1.0, 1.0, 1 - 1 / 5 * 1, 1 - 1 / 5 * 2, 1 - 1 / 5 * 3, 1 - 1 / 5 * 4, 0.0, 0.0]


def test_exponential_decay():
    model, sparsity = sparse(1, 4, estimator="mdgf-scaled")
    schedule = ExponentialMDGF(model, 8, dense_steps=2, fine_tune_steps=1, beta=0.3)
    found = run(schedule, sparsity, 8)
    expected = [1.0, 1.0, 1.0, *(math.exp(-0.3 * t) for t in (1, 2, 3, 4)), 0.0, 0.0]
    assert [decay for *_, decay, _ in found] == expected
    assert [each[:3] for each in found] == [(False, 1, 4)] * 2 + [(True, 1, 4)] * 7
    assert [each[4] for each in found] == [False] * 7 + [True] * 2
    model, sparsity = sparse(1, 4, estimator="mdgf")
    found = decays(ExponentialMDGF(model, 100), sparsity, 100)
    assert math.isclose(found[50], 0.1) and 0.01 < found[99] < 0.011 and found[100] == 0


def test_the_forward_is_what_the_schedule_says():
    model, sparsity = sparse(1, 4, features=16, estimator="mdgf")
    schedule = LinearMDGF(model, 5, dense_steps=1, fine_tune_steps=1, beta=0.5)
    original = model[0].parametrizations.weight.original
    for decay in (None, 1.0, 0.5, 0.0):
        expected = original if decay is None else pyrx.nm_sparsify(original, 1, 4, estimator="mdgf", decay=decay)
        assert_same_bits(model[0].weight, expected)
        schedule.step()
        with torch.no_grad():
            original.add_(torch.randn_like(original))
    assert schedule.phase == "fine-tune" and sparsity.frozen
    assert (model[0].weight != 0).sum() == original.numel() // 4


def test_masks_are_frozen_at_the_weights_of_that_step():
    model, sparsity = sparse(2, 4, features=16)
    original = model[0].parametrizations.weight.original
    schedule = DenseThenSparse(model, 4, fine_tune_steps=2)
    masks = []
    for _ in range(4):
        masks.append(pyrx.nm_mask(original, 2, 4))
        assert_same_bits(model[0].weight, torch.where(masks[min(len(masks) - 1, 2)], original, 0.0))
        with torch.no_grad():
            original.copy_(torch.randn_like(original))
        schedule.step()
    assert not torch.equal(masks[2], masks[3])


def test_shared_masks_follow_the_frames():
    model, sparsity = sparse(1, 8, features=16)
    original = model[0].parametrizations.weight.original
    bits = pyrx.nm_mask(original, 1, 8, packed=True)
    sparsity.use_mask(bits)
    schedule = StepwiseSDGF(model, 4)
    for kept in (7, 4, 2, 1):
        assert sparsity.mask is bits and torch.equal(bits, pyrx.nm_mask(original, kept, 8, packed=True))
        schedule.step()


def test_shared_masks_are_those_of_the_weights_after_the_warm_up():
    """An optimizer does not refresh them while its weights are dense, nor while they are frozen."""
    model, sparsity = sparse(2, 4, features=16)
    original = model[0].parametrizations.weight.original
    bits = torch.zeros_like(pyrx.nm_mask(original, 2, 4, packed=True))
    sparsity.use_mask(bits)
    schedule = DenseThenSparse(model, 4, dense_steps=1, fine_tune_steps=1)
    for frozen in (False, False, True, True):
        with torch.no_grad():
            original.copy_(torch.randn_like(original))
        before = bits.clone()
        schedule.step()
        ranked = pyrx.nm_mask(original, 2, 4, packed=True)
        changes = schedule.steps_done in (1, 3)
        assert (
            sparsity.frozen == frozen
            and torch.equal(bits, ranked if changes else before)
            and not torch.equal(ranked, before)
        )
    DenseThenSparse(model, 4)
    assert sparsity.mask is bits and not sparsity.frozen and torch.equal(bits, ranked)


def test_a_new_schedule_thaws_what_is_frozen():
    model, sparsity = sparse(1, 4)
    schedule = DenseThenSparse(model, 1)
    schedule.step()
    assert sparsity.frozen
    StepwiseSDGF(model, 3)
    assert not sparsity.frozen and sparsity.mask is None and sparsity.n == 3


# Bad input.


@pytest.mark.parametrize(
    "kind, options, error, text",
    [
        (DenseThenSparse, {"total_steps": 0}, ValueError, "expected total_steps in [1, "),
        (DenseThenSparse, {"total_steps": 2.0}, TypeError, "expected total_steps to be an int, got float"),
        (DenseThenSparse, {"total_steps": 5, "dense_steps": -1}, ValueError, "expected dense_steps in [0, "),
        (DenseThenSparse, {"total_steps": 5, "fine_tune_steps": -1}, ValueError, "expected fine_tune_steps in [0, "),
        (
            DenseThenSparse,
            {"total_steps": 5, "dense_steps": 3, "fine_tune_steps": 3},
            ValueError,
            "expected total_steps of at least dense_steps + fine_tune_steps + 0 of the flow = 6, got 5",
        ),
        (StepwiseSDGF, {"total_steps": 3}, ValueError, "+ 4 of the flow = 4, got 3"),
        (StepwiseSDGF, {"total_steps": 9, "dense_steps": 9}, ValueError, "+ 4 of the flow = 13, got 9"),
        (GeometricSDGF, {"total_steps": 9, "fine_tune_steps": 6}, ValueError, "+ 4 of the flow = 10, got 9"),
        (GeometricSDGF, {"total_steps": 9, "frames": 0}, ValueError, "expected frames in [1, 8], got 0"),
        (
            GeometricSDGF,
            {"total_steps": 9, "frames": 6},
            ValueError,
            "expected layer '0' with m * 2^(frames - 1) at most 128, got 8 * 32 = 256",
        ),
        (
            GeometricSDGF,
            {"total_steps": 9, "frames": 5},
            ValueError,
            "expected layer '0' of a size along dimension -1 that its first group of 128 divides (or pad=True), "
            "got [6, 64]",
        ),
        (
            LinearMDGF,
            {"total_steps": 4, "dense_steps": 4, "estimator": "mdgf"},
            ValueError,
            "+ 1 of the flow = 5, got 4",
        ),
        (LinearMDGF, {"total_steps": 4, "beta": 0}, ValueError, "expected beta in (0, inf), got 0"),
        (LinearMDGF, {"total_steps": 4, "beta": math.nan}, ValueError, "expected beta in (0, inf), got nan"),
        (ExponentialMDGF, {"total_steps": 4, "beta": "x"}, TypeError, "expected beta to be a float, got str"),
        (
            ExponentialMDGF,
            {"total_steps": 4, "estimator": "ste"},
            ValueError,
            "expected estimator to be one of None, 'mdgf', 'mdgf-scaled', got 'ste'",
        ),
        (
            LinearMDGF,
            {"total_steps": 4},
            ValueError,
            "expected layer '0' of the estimator mdgf or mdgf-scaled (or estimator= here, which sets it), got sr-ste",
        ),
    ],
)
def test_bad_arguments_change_nothing(kind, options, error, text):
    model, sparsity = sparse(1, 8, features=64, estimator="sr-ste")
    before = sparsity.get_extra_state().tolist()
    with pytest.raises(error) as caught:
        kind(model, **options)
    assert text in str(caught.value) and f"pyrx::{kind.__name__}: " in str(caught.value)
    assert sparsity.get_extra_state().tolist() == before


@pytest.mark.parametrize("kind", SCHEDULES)
def test_models_that_no_schedule_serves(kind):
    with pytest.raises(
        ValueError, match=f"pyrx::{kind.__name__}: expected model with pyrx.nn.NMSparsity on its layers"
    ):
        kind(nn.Linear(4, 4), 100)
    with pytest.raises(TypeError, match="expected model to be a torch.nn.Module, got list"):
        kind([], 100)
    model, sparsity = sparse(1, 4, **({} if kind in MDGF else {"estimator": "mdgf"}))
    with pytest.raises(ValueError, match="estimator"):
        kind(model, 100)
    assert sparsity.enabled


def test_the_estimator_may_be_set():
    model, sparsity = sparse(1, 4)
    LinearMDGF(model, 5, estimator="mdgf-scaled")
    assert sparsity.estimator == "mdgf-scaled"


def test_padding_lets_large_groups_pass():
    model, sparsity = sparse(1, 8, features=24, pad=True)
    GeometricSDGF(model, 4)
    assert (sparsity.n, sparsity.m) == (8, 64) and model[0].weight.count_nonzero() == 6 * 8


# Resuming.

STEPS, PHASES = 14, {"dense_steps": 3, "fine_tune_steps": 4}


def optimizer_of(model, masked):
    if not masked:
        return torch.optim.AdamW(model.parameters(), lr=0.05)
    optim = pytest.importorskip("pyrx.optim")
    # masks that are older than the weights, so that they must be restored and not ranked
    return optim.MaskedAdamW(model.parameters(), lr=0.05, model=model, refresh_every=3, rule="dense")


class Run:
    """A model in training."""

    def __init__(self, kind, seed=0, masked=False):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(8, 32, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
        sparsify_(self.model, 1, 4, **estimator_of(kind))
        self.optimizer = optimizer_of(self.model, masked)
        self.schedule = self.make(kind)

    def make(self, kind):
        options = {"frames": 2} if kind is GeometricSDGF else {}
        return kind(self.model, STEPS, **PHASES, **options)

    def train(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 8, 2, 2, generator=generator), torch.randint(0, 4, (16,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.schedule.step()

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def state(self):
        return {name: part.state_dict() for name, part in self.parts().items()}


def assert_same_training(one, other):
    assert one.schedule.steps_done == other.schedule.steps_done
    first, second = one.model.state_dict(), other.model.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(second[name], value, name)
        else:
            assert second[name] == value, name
    for a, b in zip(one.model.children(), other.model.children(), strict=True):
        if hasattr(a, "weight"):
            assert_same_bits(b.weight, a.weight)
    moments = [each.optimizer.state_dict()["state"].values() for each in (one, other)]
    for a, b in zip(*moments, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_same_bits(b[name], a[name], name)


@pytest.mark.parametrize("order", ["model first", "schedule first", "schedule made last"])
@pytest.mark.parametrize("stop", [0, 2, 3, 4, 6, 8, 9, 10, 11, 13, 14, 16])
@pytest.mark.parametrize("masked", [False, True], ids=["AdamW", "MaskedAdamW"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_resuming_gives_the_same_bits(kind, masked, stop, order):
    whole = Run(kind, masked=masked)
    whole.train(range(stop))
    saved = through_a_file(whole.state())
    resumed = Run(kind, seed=1, masked=masked)
    if order == "schedule made last":
        resumed.model.load_state_dict(saved["model"])
        resumed.optimizer.load_state_dict(saved["optimizer"])
        resumed.schedule = resumed.make(kind)
        resumed.schedule.load_state_dict(saved["schedule"])
    else:
        parts = list(resumed.parts().items())
        for name, part in parts if order == "model first" else reversed(parts):
            part.load_state_dict(saved[name])
    assert_same_training(whole, resumed)
    for each in (whole, resumed):
        each.train(range(stop, STEPS + 3))
    assert_same_training(whole, resumed)
    for layer in (resumed.model[0], resumed.model[3]):
        assert layer.weight.count_nonzero() == layer.weight.numel() // 4


def test_a_frozen_mask_differs_from_that_of_the_resumed_weights():
    """Or the tests of resuming would not see a mask that is lost."""
    run = Run(DenseThenSparse)
    run.train(range(13))
    convolution = run.model[0].parametrizations.weight
    assert not torch.equal(pyrx.nm_mask(convolution.original, 1, 4, dim=1, packed=True), convolution[0].mask)


def test_states_of_other_schedules_are_refused():
    model, sparsity = sparse(1, 4, estimator="mdgf")
    schedule = LinearMDGF(model, 10, dense_steps=2)
    state = schedule.state_dict()
    for other, text in (
        (LinearMDGF(model, 11, dense_steps=2), "a state of total_steps 11, got 10"),
        (LinearMDGF(model, 10, dense_steps=3), "a state of dense_steps 3, got 2"),
        (LinearMDGF(model, 10, dense_steps=2, fine_tune_steps=1), "a state of fine_tune_steps 1, got 0"),
        (LinearMDGF(model, 10, dense_steps=2, beta=0.5), "a state of beta 0.5, got 0.125"),
        (ExponentialMDGF(model, 10, dense_steps=2), "a state of name ExponentialMDGF, got LinearMDGF"),
    ):
        with pytest.raises(ValueError) as caught:
            other.load_state_dict(state)
        assert text in str(caught.value) and other.steps_done == 0
    other, _ = sparse(2, 4, estimator="mdgf")
    with pytest.raises(ValueError, match=r"a state of frames \[\[\(2, 4\)\]\], got \[\[\(1, 4\)\]\]"):
        LinearMDGF(other, 10, dense_steps=2).load_state_dict(state)


def test_saved_states_do_not_change_with_the_run():
    run = Run(StepwiseSDGF)
    run.train(range(12))
    state = copy.deepcopy(run.schedule.state_dict())
    run.train(range(12, 14))
    for mask, before in zip(run.schedule.state_dict()["masks"], state["masks"], strict=True):
        assert torch.equal(mask, before)
    assert state["steps_done"] == 12 and Run(StepwiseSDGF).schedule.state_dict()["masks"] == [None, None]
