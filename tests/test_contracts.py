"""What every op keeps to, whichever it is: under transforms, modes and defaults, as tensors of other kinds, again."""

import contextlib
import copy
import functools
import inspect
import io
import pickle
import re
import warnings

import pytest
import torch
from calls import CALLS, DIFFERENTIABLE, Call, loss_of, run, with_gradients
from helpers import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import pyrx

each_op = pytest.mark.parametrize("name", CALLS)
each_differentiable_op = pytest.mark.parametrize("name", DIFFERENTIABLE)
SEED = torch.tensor(5)


def same(found, expected, what=""):
    assert len(found) == len(expected), what
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other, what)


def without_gradients(results):
    return [each.detach() for each in results]


def test_every_public_function_has_a_call():
    functions = {each for each in pyrx.__all__ if callable(getattr(pyrx, each))} - {"MixedTarget", "NMPacked"}
    functions |= {f"search.{each}" for each in pyrx.search.__all__ if each.islower()}
    functions |= {each for each in pyrx.optim.__all__ if each.islower()}
    assert {name.split()[0] for name in CALLS} == functions


# torch.compile with sizes that it does not know beside sizes that it knows, which == finds equal and `in` does not.


@pytest.mark.parametrize("known", ["all but the first", "integers"])
@each_op
def test_known_beside_unknown_sizes_in_torch_compile(fresh_dynamo, cpu, name, known):
    call, tensors = CALLS[name], CALLS[name].tensors()
    expected = call(*[each.clone() for each in tensors], seed=SEED, backend=cpu)
    static = [each for each in tensors if not each.is_floating_point()] if known == "integers" else tensors[1:]
    if not static or len(static) == len(tensors):
        pytest.skip("its sizes are all known or none is")
    for each in static:
        torch._dynamo.mark_static(each)
    run = torch.compile(
        lambda *each: tuple(call(*each, seed=SEED, backend=cpu)), backend="aot_eager", fullgraph=True, dynamic=True
    )
    same(run(*tensors), expected)


# Transforms: the right result, or an error that says so.

NOT_BATCHED = ("cutmix inplace", "masked_adamw", "masked_sgd", "BlockMask", "reversed_attention", "token_importance")


@each_op
def test_vmap(cpu, name):
    call, tensors = CALLS[name], CALLS[name].tensors()
    stacked = [torch.stack([each, each.flip(0)]) for each in tensors]

    def batched():
        return torch.vmap(lambda *each: tuple(call(*each, seed=SEED)))(*stacked)

    if name in NOT_BATCHED:
        with pytest.raises(RuntimeError, match="vmap|Batching rule|functorch transforms"):
            batched()
        return
    results = batched()
    for i in range(2):
        same([each[i] for each in results], call(*(each[i] for each in stacked), seed=SEED))


def tangents_of(name, backend, differentiate):
    """The sum of the results' tangents under loss_of's weights, for tangents of one, by forward mode."""
    call, tensors = CALLS[name], CALLS[name].tensors(dtype=torch.float64)
    places = [i for i, each in enumerate(tensors) if each.is_floating_point()]

    def function(*leaves):
        every = list(tensors)
        for i, leaf in zip(places, leaves, strict=True):
            every[i] = leaf
        floats = [each for each in call(*every, seed=SEED, backend=backend) if each.is_floating_point()]
        weights = [torch.linspace(-1, 2, each.numel()).reshape(each.shape) for each in floats]
        return sum(((each * weight).sum() for each, weight in zip(floats, weights, strict=True)), torch.zeros(()))

    return differentiate(function, [tensors[i] for i in places])


def by_jvp(function, leaves):
    return torch.func.jvp(function, tuple(leaves), tuple(map(torch.ones_like, leaves)))[1]


def by_duals(function, leaves):
    with forward_ad.dual_level():
        result = function(*(forward_ad.make_dual(each, torch.ones_like(each)) for each in leaves))
        return forward_ad.unpack_dual(result).tangent


def by_grad(function, leaves):
    found = torch.func.grad(function, argnums=tuple(range(len(leaves))))(*leaves)
    return sum(each.sum() for each in found)


def by_backward(function, leaves):
    leaves = [each.clone().requires_grad_() for each in leaves]
    found = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    return sum(each.sum() for each in found if each is not None)


@pytest.mark.parametrize("differentiate", [by_jvp, by_duals, by_grad])
@each_differentiable_op
def test_other_ways_to_differentiate(backend, name, differentiate):
    """No tangent is lost on the way."""
    try:
        found = tangents_of(name, backend, differentiate)
    except RuntimeError as error:
        texts = ("functorch transforms", "jvp", "forward mode")
        assert any(each in str(error) for each in texts), error
        return
    assert found is not None, "expected a tangent or an error, got none"
    torch.testing.assert_close(found, tangents_of(name, backend, by_backward))


@each_differentiable_op
def test_double_backward(backend, name):
    """Right, or refused by name."""
    call, tensors = CALLS[name], CALLS[name].tensors(dtype=torch.float64)

    def function(*leaves):
        """Of the leaves that have a gradient, in their places; curved, so that there is a second derivative."""
        every = list(tensors)
        for i, leaf in zip(places, leaves, strict=True):
            every[i] = leaf
        return tuple(each.square() for each in call(*every, seed=SEED, backend=backend) if each.requires_grad)

    places = [i for i, each in enumerate(tensors) if each.is_floating_point()]
    _, leaves = with_gradients(tensors)
    used = torch.autograd.grad(loss_of(function(*leaves)), leaves, allow_unused=True)
    places = [i for i, gradient in zip(places, used, strict=True) if gradient is not None]
    leaves = [tensors[i].clone().requires_grad_() for i in places]
    gradients = torch.autograd.grad(loss_of(function(*leaves)), leaves, create_graph=True)
    try:
        sum(each.sum() for each in gradients).backward()
    except RuntimeError as error:
        assert "double backward" in str(error) or "once_differentiable" in str(error), error
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its upstream gradients
        if name != "nm_sparsify":  # a straight-through gradient is no derivative
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@each_differentiable_op
def test_checkpointed(cpu, name, reentrant):
    """Seeds are drawn alike when the forward runs again."""
    found = []
    for call in (CALLS[name], lambda *each: checkpoint(CALLS[name], *each, use_reentrant=reentrant)):
        torch.manual_seed(3)
        tensors, leaves = with_gradients(CALLS[name].tensors())
        results = call(*tensors)
        loss_of(results).backward()
        found.append(without_gradients(results) + [leaf.grad for leaf in leaves if leaf.grad is not None])
    same(*found)


@each_differentiable_op
def test_graph_that_is_kept(backend, name):
    """A second backward finds what the first found, whatever became of the first's results; hooks see them."""
    tensors, leaves = with_gradients(CALLS[name].tensors())
    results = CALLS[name](*tensors, seed=5, backend=backend)
    seen = []
    for each in results:
        if each.requires_grad:
            each.register_hook(lambda gradient: seen.append(gradient.shape))
    loss = loss_of(results)
    first = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    kept = [None if each is None else each.clone() for each in first]
    for each in first:
        if each is not None:
            each.fill_(torch.nan)
    assert sorted(seen) == sorted(each.shape for each in results if each.requires_grad)
    for leaf in leaves:
        leaf.register_hook(lambda gradient: gradient * 2)
    second = torch.autograd.grad(loss, leaves, allow_unused=True)
    for one, other in zip(kept, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(other, one * 2)


# Modes and defaults.


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)  # conftest.py puts back what was
    yield


def default_device():
    return torch.device("meta")


@pytest.mark.parametrize("mode", [default_dtype, default_device, deterministic])
@each_op
def test_defaults_change_nothing(backend, name, mode):
    tensors = CALLS[name].tensors()
    expected = run(name, tensors=tensors, backend=backend)
    with mode():
        found = run(name, tensors=tensors, backend=backend)
    same(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_op
def test_without_gradients(backend, name, mode):
    tensors, _ = with_gradients(CALLS[name].tensors())
    expected = without_gradients(CALLS[name](*tensors, seed=5, backend=backend))
    with mode():
        found = CALLS[name](*tensors, seed=5, backend=backend)
        made_there = CALLS[name](*(each.clone() for each in tensors), seed=5, backend=backend)
    assert not any(each.requires_grad for each in found if not any(each is tensor for tensor in tensors))
    same(found, expected)
    same(made_there, expected)


@each_op
def test_autocast(backend, name):
    """Gradients of the leaves' own dtype, values near those without; float64 is left alone."""
    expected = run(name, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(name, backend=backend)
        exact = run(name, tensors=CALLS[name].tensors(dtype=torch.float64), backend=backend)
    assert len(found) == len(expected)
    results = len(CALLS[name](*CALLS[name].tensors(), seed=5))
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype or i < results and one.dtype == torch.bfloat16
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0.05, atol=0.05 * max(1.0, other.double().max()))
    same(exact, run(name, tensors=CALLS[name].tensors(dtype=torch.float64), backend=backend))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.draws and name != "dropout_mask"])
def test_generators(backend, name):
    """One that is given is all that is drawn from; else torch's own."""
    call, tensors = CALLS[name], CALLS[name].tensors(3)

    def drawn(seed):
        return call(*tensors, generator=torch.Generator().manual_seed(seed), backend=backend)

    before = torch.random.get_rng_state()
    first = drawn(1)
    same(drawn(1), first)
    assert any(not torch.equal(one, other) for one, other in zip(drawn(2), first, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    same(call(*tensors, backend=backend), first)
    assert not torch.equal(torch.random.get_rng_state(), before)


# Other kinds of tensors.


class Tagged(torch.Tensor):
    """A subclass without rules of its own."""


@pytest.mark.parametrize("kind", [Tagged, torch.nn.Parameter])
@each_op
def test_subclasses(backend, name, kind):
    tensors = CALLS[name].tensors()
    expected = CALLS[name](*tensors, seed=5, backend=backend)

    def made(each):
        return each.as_subclass(Tagged) if kind is Tagged else kind(each) if each.is_floating_point() else each

    found = CALLS[name](*map(made, tensors), seed=5, backend=backend)
    same([each.detach().as_subclass(torch.Tensor) for each in found], expected)


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
@each_op
def test_tensors_without_memory(name, fake):
    """Shapes, dtypes and strides are those of real results; what is drawn is no concern of theirs."""
    call, tensors = CALLS[name], CALLS[name].tensors()
    expected = call(*tensors, seed=5)
    if fake:
        with FakeTensorMode() as mode:
            found = call(*map(mode.from_tensor, tensors), seed=5)
    else:
        found = call(*(each.to("meta") for each in tensors), seed=5)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.device.type == ("cpu" if fake else "meta")
        if fake:  # the meta device is served by the reference, whose strides are its own
            assert one.stride() == other.stride()


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return tuple(self.call(*tensors, seed=SEED))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CALLS if " " not in name])
def test_exported(cpu, name):
    tensors = CALLS[name].tensors()
    with torch.no_grad():
        program = torch.export.export(Module(CALLS[name]), tuple(tensors), strict=False)
        same(program.module()(*tensors), CALLS[name](*tensors, seed=SEED))


# Files and copies.


def through_a_file(value, weights_only):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_a_mixed_target_in_a_file():
    _, target = pyrx.cutmix(torch.rand(4, 3, 9, 8), torch.arange(4))
    for again in (through_a_file({"target": target}, True)["target"], pickle.loads(pickle.dumps(target))):
        assert isinstance(again, pyrx.MixedTarget) and again.masks is None
        same(again[:5], target[:5])


MODULES = {
    "Mixup": (lambda: pyrx.nn.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5), ("float 4 3 9 8", "ids 4")),
    "LayerMasking": (
        lambda: pyrx.nn.LayerMasking(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.ReLU())),
        ("float 2 3 8 8", "bool 2 1 8 8"),
    ),
    "BlockSparseAttention": (
        lambda: pyrx.nn.BlockSparseAttention(16, 2, pyrx.BlockMask.causal(40, 16), dropout=0.2, is_causal=True),
        ("float 2 40 16",),
    ),
    "MultiSampleDropoutClassifier": (lambda: pyrx.nn.MultiSampleDropoutClassifier(13, 5), ("float 7 13", "ids 7")),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_files(name):
    """Whole, as a copy, and as a state dict that is loaded into another."""
    made, shapes = MODULES[name]
    module, tensors = made(), Call(None, shapes).tensors()
    fresh = made()
    fresh.load_state_dict(through_a_file(module.state_dict(), True))
    found = []
    for each in (module, through_a_file(module, False), copy.deepcopy(module), fresh):
        torch.manual_seed(2)
        found.append([x.detach() for x in pytree.tree_leaves(each(*tensors)) if isinstance(x, torch.Tensor)])
    for other in found[1:]:
        same(other, found[0])


# Tensors of other layouts, and what is no flag.


def negative(tensor):
    """The same values as a view that holds their negatives."""
    return torch.complex(tensor, -tensor).conj().imag if tensor.is_floating_point() else tensor


@each_op
def test_negative_views(backend, name):
    tensors = CALLS[name].tensors()
    views = [negative(each) for each in tensors]
    assert all(each.is_neg() for each in views if each.is_floating_point())
    found, expected = run(name, tensors=views, backend=backend), run(name, tensors=tensors, backend=backend)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)  # strides may change the order of sums


def steps(**changes):
    arguments = {"weights": 1, "grads": 1, "exp_avgs": 1, "exp_avg_sqs": 1}
    made = {key: [changes.get(key, torch.rand(8, 16))] for key in arguments}
    masks = [pyrx.nm_mask(made["weights"][0], 2, 4, packed=True)]
    return pyrx.optim.masked_adamw(**made, masks=masks, steps=[torch.ones((), dtype=torch.float32)], n=2, m=4)


WRITES = {
    "cutmix inplace": lambda x: pyrx.cutmix(x, torch.zeros(4).long(), inplace=True),
    "cutmix out": lambda x: pyrx.cutmix(torch.rand(x.shape), torch.zeros(4).long(), out=x),
    "mixup inplace": lambda x: pyrx.mixup(x, torch.zeros(4).long(), inplace=True),
    "mixup out": lambda x: pyrx.mixup(torch.rand(x.shape), torch.zeros(4).long(), out=x),
    "resizemix out": lambda x: pyrx.resizemix(torch.rand(x.shape), torch.zeros(4).long(), out=x),
    "fmix out": lambda x: pyrx.fmix(torch.rand(x.shape), torch.zeros(4).long(), out=x),
    "blend out": lambda x: pyrx.blend(torch.rand(x.shape), torch.rand(x.shape), torch.rand(x.shape), out=x),
    "random_erasing inplace": lambda x: pyrx.random_erasing(x, prob=1.0, inplace=True),
    "cutout inplace": lambda x: pyrx.cutout(x, inplace=True),
    "masked_adamw weights[0]": lambda x: steps(weights=x[0, 0]),
    "masked_adamw exp_avgs[0]": lambda x: steps(exp_avgs=x[0, 0]),
}


@pytest.mark.parametrize("name", WRITES)
def test_negative_views_are_not_written(backend, name, monkeypatch):
    monkeypatch.setenv("PYRX_BACKEND", backend)
    op, argument = name.split()
    whole = torch.randn(4, 3, 8, 16, dtype=torch.complex64)
    before = whole.clone()
    text = f"pyrx::{op}: expected {argument} to hold its own values, got a negative view"
    with pytest.raises(ValueError, match=re.escape(text)):
        WRITES[name](whole.conj().imag)
    assert torch.equal(whole, before)


@each_op
def test_sparse_tensors_are_refused(backend, name):
    tensors = CALLS[name].tensors()
    for i, each in enumerate(tensors if name != "dropout_mask" else ()):  # which takes a shape
        changed = [*tensors[:i], each.to_sparse(), *tensors[i + 1 :]]
        with pytest.raises(TypeError, match=r"pyrx::[\w.]+: expected .+ to be a dense Tensor, got torch.sparse_coo"):
            CALLS[name](*changed, seed=SEED, backend=backend)


def flags_of(name):
    """(where it lies, its own name, flag) of each bool that the function takes."""
    *module, own = name.split()[0].split(".")
    place = functools.reduce(getattr, module, pyrx.optim if own in pyrx.optim.__all__ else pyrx)
    parameters = inspect.signature(getattr(place, own)).parameters.values()
    return [(place, own, each.name) for each in parameters if each.annotation == "bool"]


FLAGS = {f"{name} {flag[2]}": (name, *flag) for name in CALLS if " " not in name for flag in flags_of(name)}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_are_bools(backend, case, monkeypatch):
    name, place, own, flag = FLAGS[case]
    function = getattr(place, own)
    for wrong in (1, None, torch.tensor(True)):
        monkeypatch.setattr(place, own, lambda *args, wrong=wrong, **o: function(*args, **{**o, flag: wrong}))
        with pytest.raises(TypeError) as caught:
            CALLS[name](*CALLS[name].tensors(), seed=SEED, backend=backend)
        assert str(caught.value).endswith(f": expected {flag} to be a bool, got {type(wrong).__name__}")
