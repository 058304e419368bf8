"""Masked optimizer steps: the reference against NumPy and torch.optim, every backend against it, bit for bit."""

import math

import numpy as np
import pytest
import torch
from helpers import FLOATS, assert_same_bits, assert_within_budget, bits, layouts, name_of, need, threads
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library
from pyrx.ops.masked_update import masked_adamw, masked_sgd
from pyrx.reference import masked_update as reference
from pyrx.reference.dropout import unpack_bits
from pyrx.reference.masked_update import RULES

# (shape, n, m, dim): whole bytes of bits and not, groups along rows, columns, channels; odd M; tails of every tile
CASES = [
    ((8, 16), 2, 4, -1),
    ((6, 12), 1, 3, 0),
    ((6, 12), 2, 3, 1),
    ((5, 7, 6), 2, 6, -1),
    ((4, 8, 3, 3), 2, 4, 1),
    ((4, 8, 1, 1), 2, 4, 1),
    ((33, 64, 3, 3), 4, 16, 1),
    ((4, 8, 1, 5), 1, 2, 1),
    ((128, 136), 3, 8, 0),
    ((128, 137), 30, 128, 0),
    ((3, 1016), 30, 127, 1),
    ((2, 12, 300), 1, 4, 1),
    ((2, 12, 300), 1, 4, -1),
    ((9000,), 2, 4, 0),
    ((4096, 5), 2, 64, 0),
    ((1, 3000), 1, 3, -1),
    ((4, 4, 257), 2, 4, 0),
    ((8, 2056), 4, 4, 0),
    ((5, 1), 1, 1, -1),
    ((0, 4), 2, 4, -1),
]
ADAMW = {"lr": 0.1, "weight_decay": 0.3, "strength": 0.2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-4}
SGD = {"lr": 0.1, "weight_decay": 0.3, "strength": 0.2, "momentum": 0.9, "nesterov": True}


def served(backend, dtype=torch.float32, device="cpu"):
    return need(backend, device, dtype, ("masked_update",))


class Tensors:
    """What one step takes, and what becomes of it."""

    def __init__(self, shape, n, m, dim, dtype=torch.float32, seed=0, step=3):
        generator = torch.Generator().manual_seed(seed)

        def normal():
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.n, self.m, self.dim = n, m, dim
        self.weight, self.grad = normal().to(dtype), normal().to(dtype)
        self.exp_avg, self.exp_avg_sq = (normal() / 10).to(dtype), (normal() ** 2 / 10).to(dtype)
        self.mask = pyrx.nm_mask(normal(), n, m, dim=dim, packed=True, backend="reference")
        self.step = torch.tensor(float(step))

    def clone(self):
        other = Tensors.__new__(Tensors)
        other.__dict__ = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}
        return other

    def kept(self):
        return unpack_bits(self.mask, self.weight.shape[-1])

    def adamw(self, **options):
        moments = ([self.exp_avg], [self.exp_avg_sq], [self.mask], [self.step])
        masked_adamw([self.weight], [self.grad], *moments, self.n, self.m, **(ADAMW | {"dim": self.dim} | options))
        return self

    def sgd(self, **options):
        options = SGD | {"dim": self.dim} | options
        buffers = [self.exp_avg] if options["momentum"] else []
        masked_sgd([self.weight], [self.grad], buffers, [self.mask], self.n, self.m, **options)
        return self

    def results(self):
        return {name: getattr(self, name) for name in ("weight", "exp_avg", "exp_avg_sq", "mask")}


def assert_same(got, expected, what=""):
    """The same bits, but that one NaN is as good as another."""
    for name, value in expected.results().items():
        own = got.results()[name]
        nan = value.isnan()
        assert torch.equal(own.isnan(), nan), f"{what} {name}: NaN elsewhere"
        different = (bits(own) != bits(value)) & ~nan
        assert not different.any(), f"{what} {name}: {int(different.sum())} of {value.numel()} elements differ"


def wide(tensor):
    """In NumPy, as the arithmetic reads it."""
    return tensor.double().numpy() if tensor.dtype == torch.float64 else tensor.float().numpy()


def numpy_gradient(tensors, rule, maximize, strength):
    g = -wide(tensors.grad) if maximize else wide(tensors.grad)
    if rule == "sr-ste":
        g = np.where(tensors.kept().numpy(), g, g + g.dtype.type(strength) * wide(tensors.weight))
    return g


def ranked(weight, n, m, dim):
    """By its definition: sort each group by magnitude, then index."""
    groups = weight.movedim(dim, -1).reshape(-1, m)
    kept = torch.zeros(groups.shape, dtype=torch.bool)
    for i, group in enumerate(groups.double().abs().tolist()):
        order = sorted(range(m), key=lambda j: (-(math.inf if math.isnan(group[j]) else group[j]), j))
        kept[i, order[:n]] = True
    moved = weight.movedim(dim, -1).shape
    return kept.reshape(moved).movedim(-1, dim)


def expect(tensors, rule, refresh, moved):
    """`tensors` with the NumPy arrays of `moved` in them where the rule lets them move."""
    found = tensors.clone()
    moves = tensors.kept() if rule == "hold" else torch.ones_like(tensors.kept())
    for name, value in moved.items():
        own = getattr(tensors, name)
        assert value.dtype == wide(own).dtype
        setattr(found, name, torch.where(moves, torch.from_numpy(value).to(own.dtype), own))
    if refresh:
        found.mask = reference.nm_mask(found.weight, found.n, found.m, found.dim % found.weight.dim(), True, True)
        assert torch.equal(found.kept(), ranked(found.weight, found.n, found.m, found.dim))
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "maximize, refresh, beta1, step", [(False, True, 0.9, 1), (True, False, 0.3, 7), (False, True, 0.0, 2**24)]
)
def test_adamw_formula(backend, dtype, rule, maximize, refresh, beta1, step):
    served(backend, dtype)
    tensors = Tensors((6, 40), 2, 4, -1, dtype, step=step)
    kind = wide(tensors.weight).dtype.type

    def power(base):
        result, exponent = 1.0, step
        while exponent:
            result, base, exponent = result * base if exponent & 1 else result, base * base, exponent >> 1
        return result

    g = numpy_gradient(tensors, rule, maximize, 0.2)
    w, moment, square = (wide(each) for each in (tensors.weight, tensors.exp_avg, tensors.exp_avg_sq))
    moment = moment + kind(1 - beta1) * (g - moment) if 1 - beta1 < 0.5 else g - kind(beta1) * (g - moment)
    square = kind(0.99) * square + kind(1 - 0.99) * g * g
    root = np.sqrt(square) * kind(1 / math.sqrt(1 - power(0.99))) + kind(1e-4)
    w = kind(1 - 0.1 * 0.3) * w - kind(0.1 / (1 - power(beta1))) * moment / root
    expected = expect(tensors, rule, refresh, {"weight": w, "exp_avg": moment, "exp_avg_sq": square})
    got = tensors.clone().adamw(rule=rule, maximize=maximize, refresh=refresh, beta1=beta1, backend=backend)
    assert_same(got, expected)
    assert not torch.equal(got.weight, tensors.weight) and torch.equal(got.mask, tensors.mask) == (not refresh)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("momentum, dampening, nesterov", [(0.0, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)])
@pytest.mark.parametrize("decay, maximize", [(0.0, True), (0.3, False)])
def test_sgd_formula(backend, dtype, rule, momentum, dampening, nesterov, decay, maximize):
    served(backend, dtype)
    tensors = Tensors((6, 40), 2, 4, -1, dtype)
    kind = wide(tensors.weight).dtype.type
    g, w, buffer = numpy_gradient(tensors, rule, maximize, 0.2), wide(tensors.weight), wide(tensors.exp_avg)
    if decay:
        g = g + kind(decay) * w
    moved = {}
    if momentum:
        buffer = kind(momentum) * buffer + kind(1 - dampening) * g
        g = g + kind(momentum) * buffer if nesterov else buffer
        moved["exp_avg"] = buffer
    expected = expect(tensors, rule, True, {"weight": w - kind(0.1) * g, **moved})
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
    got = tensors.clone().sgd(rule=rule, maximize=maximize, backend=backend, **options)
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape, n, m, dim", CASES, ids=name_of)
def test_backends_agree(cpu, dtype, shape, n, m, dim):
    served(cpu, dtype)
    for i, (rule, refresh, magnitude) in enumerate([(r, f, f or r != "hold") for r in RULES for f in (True, False)]):
        tensors = Tensors(shape, n, m, dim, dtype, seed=i)
        options = {"rule": rule, "refresh": refresh, "magnitude": magnitude}
        for step in ("adamw", "sgd"):
            expected, got = (getattr(tensors.clone(), step)(**options, backend=each) for each in ("reference", cpu))
            assert_same(got, expected, f"{step} {options}")


@given(
    st.lists(st.integers(1, 20), min_size=0, max_size=2),
    st.lists(st.integers(1, 20), min_size=0, max_size=2),
    st.integers(1, 128),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from(RULES),
)
def test_backends_agree_on_any_shape(before, after, m, groups, seed, rule):
    need("cpu", ops=("masked_update",))
    shape, n = (*before, groups * m, *after), seed % m + 1
    tensors = Tensors(shape, n, m, len(before), seed=seed)
    assert_same(tensors.clone().adamw(rule=rule), tensors.clone().adamw(rule=rule, backend="reference"))
    assert_same(tensors.clone().sgd(rule=rule), tensors.clone().sgd(rule=rule, backend="reference"))


@pytest.mark.parametrize("which", ["weight", "grad", "exp_avg", "exp_avg_sq", "mask"])
def test_layouts(backend, which):
    served(backend)
    tensors = Tensors((4, 8, 3, 5), 2, 4, 1)
    expected = tensors.clone().adamw(backend="reference")
    for name, like in layouts((4, 8, 3, 1 if which == "mask" else 5)):
        got = tensors.clone()
        value = torch.empty_strided(like.shape, like.stride(), dtype=getattr(got, which).dtype)
        setattr(got, which, value.copy_(getattr(got, which)))
        strides = value.stride()
        assert_same(got.adamw(backend=backend), expected, name)
        assert getattr(got, which).stride() == strides and getattr(got, which) is value


@pytest.mark.parametrize(
    "shape, memory_format",
    [
        ((8, 12, 3, 5), torch.channels_last),
        ((3, 8, 1, 3), torch.channels_last),
        ((2, 12, 3, 2, 5), torch.channels_last_3d),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_channels_last(backend, shape, memory_format, dim):
    served(backend)
    m = shape[dim] if shape[dim] % 4 else 4
    for step in ("adamw", "sgd"):
        tensors = Tensors(shape, 1, m, dim)
        expected = getattr(tensors.clone(), step)(backend="reference")
        for name in ("weight", "grad", "exp_avg", "exp_avg_sq"):
            setattr(tensors, name, getattr(tensors, name).contiguous(memory_format=memory_format))
        assert_same(getattr(tensors, step)(backend=backend), expected)
        assert tensors.weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape, dim", [((8, 12), -1), ((8, 5), 0), ((8, 8, 1, 1), 1), ((8, 8, 3, 3), 1)], ids=name_of)
def test_bits_beyond_the_rows_say_nothing(backend, shape, dim):
    served(backend)
    tensors = Tensors(shape, 2, 4, dim)
    expected = tensors.clone().adamw(backend="reference")
    tensors.mask[..., -1] |= (0xFF << (shape[-1] % 8 or 8)) & 0xFF
    assert_same(tensors.adamw(backend=backend), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_special_values(backend, dtype, rule):
    """NaN, infinities, zeros and denormals in weights, gradients and moments; ties."""
    served(backend, dtype)
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny / 4, 1.0, -1.0, 3.0, tiny * 5], dtype=dtype
    )
    for seed in range(4):
        tensors = Tensors((16, 40), 2, 4, -1, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        for name in ("weight", "grad", "exp_avg", "exp_avg_sq"):
            drawn = values[torch.randint(0, len(values), (16, 40), generator=generator)]
            own = getattr(tensors, name)
            own.copy_(torch.where(torch.rand(16, 40, generator=generator) < 0.5, drawn, own))
        assert_same(
            tensors.clone().adamw(rule=rule, backend=backend), tensors.clone().adamw(rule=rule, backend="reference")
        )
        assert_same(
            tensors.clone().sgd(rule=rule, backend=backend), tensors.clone().sgd(rule=rule, backend="reference")
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("step", ["adamw", "sgd"])
@pytest.mark.parametrize("shape, dim", [((6, 40), -1), ((8, 21), 0), ((4, 8, 3, 3), 1)], ids=name_of)
def test_hold_holds_every_bit(backend, dtype, step, shape, dim):
    """Against weight decay and momentum, whatever the bits are: NaN's payload too."""
    served(backend, dtype)
    tensors = Tensors(shape, 2, 4, dim, dtype)
    for i, value in enumerate((tensors.weight, tensors.exp_avg, tensors.exp_avg_sq)):
        value.view(-1)[i::5] = math.nan
        bits(value).view(-1)[i::5] += 3
    before, kept = tensors.clone(), tensors.kept()
    for _ in range(5):
        getattr(tensors, step)(refresh=False, backend=backend)
        tensors.step += 1
    for name, value in before.results().items():
        if name != "mask":
            own = getattr(tensors, name)
            assert torch.equal(bits(own)[~kept], bits(value)[~kept]), name
    assert torch.equal(tensors.mask, before.mask)
    finite = kept & before.weight.isfinite() & before.exp_avg.isfinite() & before.exp_avg_sq.isfinite()
    assert (tensors.weight != before.weight)[finite].float().mean() > 0.8  # bfloat16 rounds some back


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_adamw_is_torchs(backend, dtype, maximize, rule):
    """Twenty steps, for all weights or, with "hold", for those that are kept; the regularised gradient of "sr-ste"."""
    served(backend, dtype)
    tensors = Tensors((12, 40), 2, 4, -1, dtype)
    kept = tensors.kept() if rule == "hold" else torch.ones(12, 40, dtype=torch.bool)
    options = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-4,
        "weight_decay": 0.3,
        "maximize": maximize,
        "foreach": False,
    }
    peers = [torch.nn.Parameter(tensors.weight.to(kind, copy=True)) for kind in (dtype, torch.float64)]
    optimizers = [torch.optim.AdamW([each], **options) for each in peers]
    tensors.exp_avg.zero_(), tensors.exp_avg_sq.zero_(), tensors.step.zero_()
    for i in range(20):
        tensors.grad = torch.randn(12, 40, generator=torch.Generator().manual_seed(i)).to(dtype)
        for peer, optimizer in zip(peers, optimizers, strict=True):
            grad = tensors.grad.to(peer.dtype)
            sign = -1 if maximize else 1
            peer.grad = torch.where(tensors.kept() | (rule != "sr-ste"), grad, grad + sign * 0.2 * peer.detach())
            optimizer.step()
        tensors.step += 1
        tensors.adamw(lr=0.01, maximize=maximize, rule=rule, refresh=False, backend=backend)
    results = (tensors.weight, peers[0].detach(), peers[1].detach())
    assert_within_budget(*(each[kept] for each in results), "weight", slack=4)
    for name in ("exp_avg", "exp_avg_sq"):
        own, low, exact = getattr(tensors, name), *(o.state[p][name] for o, p in zip(optimizers, peers, strict=True))
        assert_within_budget(own[kept], low[kept], exact[kept], name, slack=4)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_sgd_is_torchs(backend, dtype, options):
    served(backend, dtype)
    tensors, options = Tensors((12, 40), 4, 4, -1, dtype), {"lr": 0.01, "weight_decay": 0.1, **options}
    peers = [torch.nn.Parameter(tensors.weight.to(kind, copy=True)) for kind in (dtype, torch.float64)]
    optimizers = [torch.optim.SGD([each], foreach=False, **options) for each in peers]
    tensors.exp_avg.zero_()
    for i in range(20):
        tensors.grad = torch.randn(12, 40, generator=torch.Generator().manual_seed(i)).to(dtype)
        for peer, optimizer in zip(peers, optimizers, strict=True):
            peer.grad = tensors.grad.to(peer.dtype)
            optimizer.step()
        tensors.sgd(**({"momentum": 0.0, "nesterov": False} | options), backend=backend)
    assert_within_budget(tensors.weight, *(each.detach() for each in peers), "weight", slack=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_sr_ste_is_a_step_of_its_gradient(backend, dtype, step):
    served(backend, dtype)
    tensors = Tensors((12, 40), 2, 4, -1, dtype)
    regularised = tensors.clone()
    zero = torch.zeros((), dtype=dtype)
    regularised.grad += torch.where(tensors.kept(), zero, torch.full((), 0.2, dtype=dtype) * tensors.weight)
    got = getattr(tensors, step)(rule="sr-ste", backend=backend)
    assert_same(got, getattr(regularised, step)(rule="dense", backend=backend))
    # as the estimator of the same name has it
    weight = Tensors((12, 40), 2, 4, -1, dtype).weight.requires_grad_()
    upstream, mask = Tensors((12, 40), 2, 4, -1, dtype).grad, Tensors((12, 40), 2, 4, -1, dtype).mask
    pyrx.nm_sparsify(weight, 2, 4, estimator="sr-ste", strength=0.2, mask=mask).backward(upstream)
    assert_same_bits(weight.grad, regularised.grad)


def test_several_weights_are_as_one_by_one(backend):
    served(backend)
    shapes = [(8, 16), (3, 5, 40), (24,), (0, 8)]
    several = [Tensors(shape, 2, 4, -1, seed=i, step=i + 1) for i, shape in enumerate(shapes)]
    expected = [each.clone().adamw(backend="reference") for each in several]
    names = ("weight", "grad", "exp_avg", "exp_avg_sq", "mask", "step")
    masked_adamw(*[[getattr(each, name) for each in several] for name in names], 2, 4, **ADAMW, backend=backend)
    for got, other in zip(several, expected, strict=True):
        assert_same(got, other)
    masked_adamw([], [], [], [], [], [], 2, 4, backend=backend)
    masked_sgd([], [], [], [], 2, 4, backend=backend)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_a_tensor_learning_rate(backend, kind, step):
    served(backend)
    tensors = Tensors((8, 40), 2, 4, -1)
    lr = torch.tensor(0.017, dtype=kind)
    expected = getattr(tensors.clone(), step)(lr=lr.item(), backend="reference")
    assert_same(getattr(tensors.clone(), step)(lr=lr, backend=backend), expected)
    assert_same(getattr(tensors.clone(), step)(lr=lr.reshape(1), backend=backend), expected)


@pytest.mark.parametrize("shape, dim", [((256, 1000), -1), ((256, 1000), 0), ((64, 64, 3, 3), 1)], ids=name_of)
def test_threads_do_not_matter(cpu, shape, dim):
    served(cpu)
    tensors = Tensors(shape, 2, 4, dim)
    with threads(1):
        expected = tensors.clone().adamw(backend=cpu)
    with threads(4):
        assert_same(tensors.clone().adamw(backend=cpu), expected)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets(cpu, python, tmp_path, capability):
    """Plain C++ and AVX2 give the bits of what this processor has."""
    served(cpu)
    script = """
import sys
import torch
from test_masked_update import CASES, FLOATS, RULES, Tensors

found = []
for dtype in FLOATS:
    for i, (shape, n, m, dim) in enumerate(CASES):
        tensors = Tensors(shape, n, m, dim, dtype, seed=i)
        for step in ("adamw", "sgd"):
            for rule in RULES:
                found.append(getattr(tensors.clone(), step)(rule=rule, backend="cpu").results())
torch.save(found, sys.argv[1])
"""
    python(script, tmp_path / "own")
    python(script, tmp_path / "other", ATEN_CPU_CAPABILITY=capability)
    own, other = torch.load(tmp_path / "own"), torch.load(tmp_path / "other")
    assert len(own) == len(FLOATS) * len(CASES) * 2 * len(RULES)
    for a, b in zip(own, other, strict=True):
        for name in a:
            assert_same_bits(a[name], b[name], name)


# The arithmetic's own parts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_roots_are_rounded_correctly(dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2**63 - 1, (400_000,), generator=generator)
    x = drawn.view(torch.float64).to(dtype) if dtype == torch.float64 else drawn.int().abs().view(torch.float32)
    x = torch.cat([x[x >= 0], torch.tensor([0.0, torch.finfo(dtype).smallest_normal / 8, math.inf], dtype=dtype)])
    assert len(x) > 100_000
    assert_same_bits(reference.sqrt(x), torch.from_numpy(np.sqrt(x.numpy())))


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 1 - 2**-20])
def test_power(base):
    for exponent in (1, 2, 3, 17, 1000, 10**6 + 1, 2**24):
        got = reference.power(base, torch.tensor(exponent)).item()
        assert got == pytest.approx(base**exponent, rel=1e-8, abs=1e-300)


# What ops owe torch.


def raw(tensors, op="adamw"):
    lists = [tensors.weight], [tensors.grad]
    masking = (None, tensors.n, tensors.m, tensors.dim, True, 0, 0.1, True)
    if op == "adamw":
        moments = [tensors.exp_avg], [tensors.exp_avg_sq], [tensors.mask], [tensors.step]
        return (*lists, *moments, *masking, 0.1, 0.9, 0.99, 1e-8, 0.1, False)
    return (*lists, [tensors.exp_avg], [tensors.mask], *masking, 0.1, 0.9, 0.0, 0.1, True, False)


@pytest.mark.parametrize("op", ["adamw", "sgd"])
def test_opcheck(cpu, op):
    served(cpu)
    for shape, dim in (((6, 40), -1), ((8, 5), 0)):
        torch.library.opcheck(getattr(torch.ops.pyrx, f"masked_{op}").default, raw(Tensors(shape, 2, 4, dim), op))


@pytest.mark.parametrize("op", ["adamw", "sgd"])
def test_what_is_written_is_told(cpu, op):
    served(cpu)
    tensors = Tensors((6, 40), 2, 4, -1)
    names = ("weight", "exp_avg", "exp_avg_sq", "mask", "grad", "step")
    before = {name: getattr(tensors, name)._version for name in names}
    getattr(tensors, op)(backend=cpu)
    after = {name: getattr(tensors, name)._version - before[name] for name in names}
    written = {"weight", "exp_avg", "mask"} | ({"exp_avg_sq"} if op == "adamw" else set())
    assert after == {name: int(name in written) for name in names}


@pytest.mark.parametrize("op", ["adamw", "sgd"])
def test_compile(backend, op):
    served(backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors: getattr(tensors, op)(backend=backend), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        tensors = Tensors((6, 40), 2, 4, -1, seed=seed)
        expected = getattr(tensors.clone(), op)(backend=backend)
        assert_same(compiled(tensors), expected)


# Bad input.

LIST = "of as many tensors as weights = 1"
BAD = [
    ("weights[0]", "of a size along dimension 1 that m = 3 divides", "[6, 40]", ValueError, {"m": 3}),
    ("weights[0]", "of a size along dimension 0 that m = 4 divides", "[6, 40]", ValueError, {"dim": 0}),
    ("n", "in [1, 4]", "5", ValueError, {"n": 5}),
    ("m", "in [1, 128]", "129", ValueError, {"m": 129}),
    ("dim", "in [-2, 1]", "2", ValueError, {"dim": 2}),
    ("dim", "in [-2, 1]", "-3", ValueError, {"dim": -3}),
    ("weights[0]", "of dtype float16, bfloat16, float32 or float64", "torch.int64", TypeError, {"weight": torch.int64}),
    ("weights[0]", "of at least one dimension", "[]", ValueError, {"weight": torch.ones(())}),
    ("grads[0]", "of dtype torch.float32", "torch.float16", TypeError, {"grad": torch.float16}),
    ("grads[0]", "of shape of its weight = [6, 40]", "[6, 44]", ValueError, {"grad": torch.ones(6, 44)}),
    ("exp_avgs[0]", "of shape of its weight = [6, 40]", "[40, 6]", ValueError, {"exp_avg": torch.ones(40, 6)}),
    ("exp_avg_sqs[0]", "of dtype torch.float32", "torch.float64", TypeError, {"exp_avg_sq": torch.float64}),
    ("masks[0]", "of dtype torch.uint8", "torch.bool", TypeError, {"mask": torch.bool}),
    ("masks[0]", "of shape [..., ceil(D / 8)] = [6, 5]", "[6, 40]", ValueError, {"mask": torch.ones(6, 40).byte()}),
    ("steps[0]", "of dtype torch.float32", "torch.int64", TypeError, {"step": torch.int64}),
    ("steps[0]", "of one element", "[2]", ValueError, {"step": torch.ones(2)}),
    ("grads[0]", "on device cpu", "meta", RuntimeError, {"grad": torch.ones(6, 40, device="meta")}),
    ("masks[0]", "on device cpu", "meta", RuntimeError, {"mask": torch.ones(6, 5, device="meta").byte()}),
]


def changed(changes):
    tensors = Tensors((6, 40), 2, 4, -1)
    for name, value in changes.items():
        old = getattr(tensors, name)
        setattr(tensors, name, old.to(value) if isinstance(value, torch.dtype) else value)
    return tensors


@pytest.mark.parametrize("argument, expected, got, error, changes", BAD, ids=lambda value: str(value)[:40])
def test_errors(backend, argument, expected, got, error, changes):
    served(backend)
    tensors = changed(changes)
    before = {name: value.clone() for name, value in tensors.results().items()}
    text = f"pyrx::masked_adamw: expected {argument} {expected}, got {got}"
    with pytest.raises(error) as caught:
        tensors.adamw(backend=backend)
    assert str(caught.value) == text and type(caught.value) is error
    for name, value in before.items():
        if value.device.type == "cpu":
            assert_same_bits(getattr(tensors, name), value)


@pytest.mark.parametrize("op", ["adamw", "sgd"])
@pytest.mark.parametrize("argument, expected, got, error, changes", BAD, ids=lambda value: str(value)[:40])
def test_kernel_and_fake_say_the_same(cpu, op, argument, expected, got, error, changes):
    served(cpu)
    tensors = changed(changes)
    kernel = getattr(torch.ops.pyrx, f"masked_{op}")
    if op == "sgd" and argument.split("[")[0] in ("steps", "exp_avg_sqs"):
        pytest.skip("which SGD does not have")
    texts = []
    for mode in (None, FakeTensorMode(allow_non_fake_inputs=True)):
        with pytest.raises(error) as caught:
            if mode is None:
                kernel(*raw(tensors, op))
            else:
                with mode:
                    kernel(*raw(tensors, op))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"pyrx::masked_{op}: expected ")


def test_errors_of_lists(cpu):
    served(cpu)
    ops = _library.namespace(cpu)
    for op, position, name in [
        ("adamw", 1, "grads"),
        ("adamw", 4, "masks"),
        ("adamw", 5, "steps"),
        ("sgd", 2, "momentum_buffers"),
    ]:
        arguments = list(raw(Tensors((6, 40), 2, 4, -1), op))
        arguments[position] = []
        with pytest.raises(ValueError, match=f"pyrx::masked_{op}: expected {name} {LIST}, got 0"):
            getattr(ops, f"masked_{op}")(*arguments)
    one, other = Tensors((6, 40), 2, 4, -1), Tensors((6, 40), 2, 4, -1, torch.float64)
    lists = [[getattr(each, name) for each in (one, other)] for name in ("weight", "grad", "exp_avg", "exp_avg_sq")]
    before = one.clone()
    for backend in ("reference", cpu):
        with pytest.raises(TypeError, match=r"expected weights\[1\] of dtype torch.float32, got torch.float64"):
            masked_adamw(*lists, [one.mask, other.mask], [one.step, other.step], 2, 4, backend=backend)
        with pytest.raises(ValueError, match="expected rule to be one of 'hold', 'sr-ste', 'dense', got 'soft'"):
            one.adamw(rule="soft", backend=backend)
        with pytest.raises(ValueError, match="expected momentum_buffers to be empty without momentum, got 1"):
            masked_sgd([one.weight], [one.grad], [one.exp_avg], [one.mask], 2, 4, backend=backend)
        with pytest.raises(ValueError, match=r"expected lr to be a float or a .* of one element, got .* \[2\]"):
            one.adamw(lr=torch.ones(2), backend=backend)
        with pytest.raises(TypeError, match="expected lr to be a dense Tensor, got torch.sparse_coo"):
            one.sgd(lr=torch.ones(1).to_sparse(), backend=backend)
        for n, got in ((2.5, "float"), (torch.float32, "dtype"), (None, "NoneType")):
            with pytest.raises(TypeError, match=f"expected n to be an int, got {got}"):
                masked_sgd([one.weight], [one.grad], [], [one.mask], n, 4, backend=backend)
    assert_same(one, before)
