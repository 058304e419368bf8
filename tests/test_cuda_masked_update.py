"""Masked optimizer steps by CUDA C++ on a GPU: the reference's bits, layouts, graphs, torch's own AdamW."""

import math

import pytest
import test_masked_update as cases
import torch
from helpers import FLOATS, assert_same_bits, assert_within_budget, bits, capture, layouts, name_of, need
from test_masked_update import ADAMW, CASES, Tensors, assert_same

import pyrx
from pyrx.ops.masked_update import masked_adamw, masked_sgd
from pyrx.reference.masked_update import RULES

pytestmark = pytest.mark.gpu

NAMES = ("weight", "grad", "exp_avg", "exp_avg_sq", "mask", "step")
# every fused kernel: groups in a lane, in two, in sixteen; columns; tails of its tiles
FUSED = [((40, 1032), n, m, -1) for n, m in ((1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (3, 8), (4, 8))]
FUSED += [
    ((33, 1024), n, m, -1) for n, m in ((1, 16), (2, 16), (5, 16), (1, 32), (2, 32), (16, 32), (9, 64), (40, 128))
]
FUSED += [((72, 1032), n, m, 0) for n, m in ((1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (3, 8), (4, 8))]
FUSED += [((3, 48, 5, 16), 2, 4, 1), ((8, 8), 2, 4, 0), ((1, 8), 2, 4, 1), ((4, 8, 3, 3), 4, 4, 1)]


@pytest.fixture(autouse=True)
def cuda(poison):
    return need("cuda", "cuda", ops=("masked_update",))


def there(tensors, device="cuda"):
    moved = tensors.clone()
    for name in NAMES:
        setattr(moved, name, getattr(tensors, name).to(device, copy=True))
    return moved


def lists(several):
    return [[getattr(each, name) for each in several] for name in NAMES]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape, n, m, dim", CASES + FUSED, ids=name_of)
def test_the_reference_s_bits(dtype, shape, n, m, dim):
    for i, (rule, refresh, magnitude) in enumerate([(r, f, f or r != "hold") for r in RULES for f in (True, False)]):
        tensors = there(Tensors(shape, n, m, dim, dtype, seed=i, step=3**i))
        options = {"rule": rule, "refresh": refresh, "magnitude": magnitude, "maximize": i % 2 == 1}
        for step in ("adamw", "sgd"):
            more = {"momentum": 0.0, "nesterov": False} if step == "sgd" and i % 3 == 1 else {}
            expected, got = (
                getattr(tensors.clone(), step)(**options, **more, backend=each) for each in ("reference", "cuda")
            )
            assert_same(got, expected, f"{step} {options}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_the_cpu_s_bits(dtype):
    tensors = Tensors((64, 1024), 2, 4, -1, dtype, step=12345)
    for step in ("adamw", "sgd"):
        expected = getattr(tensors.clone(), step)(rule="sr-ste", backend="reference")
        assert_same(there(getattr(there(tensors), step)(rule="sr-ste", backend="cuda"), "cpu"), expected, step)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_special_values(dtype, rule):
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny / 4, 1.0, -1.0, 3.0], dtype=dtype)
    for seed, (shape, m, dim) in enumerate([((16, 40), 4, -1), ((16, 40), 8, 0), ((16, 64), 16, -1), ((16, 37), 4, 0)]):
        tensors = Tensors(shape, 2, m, dim, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        for name in ("weight", "grad", "exp_avg", "exp_avg_sq"):
            drawn = values[torch.randint(0, len(values), shape, generator=generator)]
            own = getattr(tensors, name)
            own.copy_(torch.where(torch.rand(shape, generator=generator) < 0.5, drawn, own))
        tensors = there(tensors)
        for step in ("adamw", "sgd"):
            expected, got = (getattr(tensors.clone(), step)(rule=rule, backend=e) for e in ("reference", "cuda"))
            assert_same(got, expected, f"{step} {shape}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape, dim", [((6, 40), -1), ((8, 24), 0), ((4, 8, 3, 3), 1)], ids=name_of)
def test_hold_holds_every_bit(dtype, shape, dim):
    tensors = Tensors(shape, 2, 4, dim, dtype)
    for i, value in enumerate((tensors.weight, tensors.exp_avg, tensors.exp_avg_sq)):
        value.view(-1)[i::5] = math.nan
        bits(value).view(-1)[i::5] += 3
    tensors = there(tensors)
    before, kept = tensors.clone(), tensors.kept()
    for _ in range(5):
        tensors.adamw(refresh=False, backend="cuda")
        tensors.step += 1
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert_same_bits(getattr(tensors, name)[~kept], getattr(before, name)[~kept], name)
    assert torch.equal(tensors.mask, before.mask) and not torch.equal(tensors.weight[kept], before.weight[kept])


@pytest.mark.parametrize("which", ["weight", "grad", "exp_avg", "exp_avg_sq", "mask"])
def test_layouts(which):
    tensors = there(Tensors((4, 8, 3, 8), 2, 4, 1))
    expected = tensors.clone().adamw(backend="reference")
    for name, like in layouts((4, 8, 3, 1 if which == "mask" else 8)):
        got = tensors.clone()
        value = torch.empty_strided(like.shape, like.stride(), dtype=getattr(got, which).dtype, device="cuda")
        setattr(got, which, value.copy_(getattr(got, which)))
        strides = value.stride()
        assert_same(got.adamw(backend="cuda"), expected, name)
        assert getattr(got, which).stride() == strides and getattr(got, which) is value


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("which", ["weight", "grad", "exp_avg", "exp_avg_sq", "mask"])
def test_pointers_of_any_alignment(dtype, which):
    for shape, dim in (((8, 64), -1), ((8, 64), 0)):
        tensors = there(Tensors(shape, 2, 4, dim, dtype))
        expected = tensors.clone().adamw(backend="reference")
        own = getattr(tensors, which)
        moved = torch.empty(own.numel() + 1, dtype=own.dtype, device="cuda")[1:].view(own.shape)
        setattr(tensors, which, moved.copy_(own))
        assert_same(tensors.adamw(backend="cuda"), expected)


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_many_tensors(step):
    """More than a launch takes, of every kernel, each with its own step."""
    shapes = [(8, 16), (4, 64), (3, 4, 40), (24,), (0, 8), (12, 5), (256, 512)] * 20
    several = [
        there(Tensors(shape, 2, 4, -1, seed=i, step=i + 1)) for i, shape in enumerate(shapes) if shape[-1] % 4 == 0
    ]
    expected = [each.clone() for each in several]
    options = ADAMW if step == "adamw" else {"lr": 0.1, "momentum": 0.9}
    for group, backend in ((several, "cuda"), (expected, "reference")):
        weights, grads, first, second, masks, steps = lists(group)
        if step == "adamw":
            masked_adamw(weights, grads, first, second, masks, steps, 2, 4, **options, backend=backend)
        else:
            masked_sgd(weights, grads, first, masks, 2, 4, **options, backend=backend)
    for got, other in zip(several, expected, strict=True):
        assert_same(got, other)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=name_of)
def test_a_tensor_learning_rate(kind):
    tensors = there(Tensors((8, 40), 2, 4, -1))
    lr = torch.tensor(0.017, dtype=kind)
    for step in ("adamw", "sgd"):
        expected = getattr(tensors.clone(), step)(lr=lr.item(), backend="reference")
        for given in (lr, lr.cuda()):
            assert_same(getattr(tensors.clone(), step)(lr=given, backend="cuda"), expected, step)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_torchs_fused_one(dtype, maximize):
    tensors = there(Tensors((40, 512), 4, 4, -1, dtype))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.3, "maximize": maximize}
    peers = [torch.nn.Parameter(tensors.weight.to(kind, copy=True)) for kind in (dtype, torch.float64)]
    optimizers = [torch.optim.AdamW([each], **options, fused=True) for each in peers]
    tensors.exp_avg.zero_(), tensors.exp_avg_sq.zero_(), tensors.step.zero_()
    for i in range(20):
        tensors.grad = torch.randn(40, 512, generator=torch.Generator().manual_seed(i)).to("cuda", dtype)
        for peer, optimizer in zip(peers, optimizers, strict=True):
            peer.grad = tensors.grad.to(peer.dtype)
            optimizer.step()
        tensors.step += 1
        tensors.adamw(lr=0.01, maximize=maximize, backend="cuda")
    results = (tensors.weight, peers[0].detach(), peers[1].detach())
    assert_within_budget(*results, "weight", slack=4)
    for name in ("exp_avg", "exp_avg_sq"):
        own, low, exact = getattr(tensors, name), *(o.state[p][name] for o, p in zip(optimizers, peers, strict=True))
        assert_within_budget(own, low, exact, name, slack=4)


# Where and when it runs.


def of_every_kernel():
    shapes = [((40, 1032), -1), ((8, 64), 0), ((4, 8, 3, 3), 1), ((64, 20), -1)]
    return [there(Tensors(shape, 2, 4, dim, seed=i, step=1)) for i, (shape, dim) in enumerate(shapes)]


def advance(several, lr):
    torch._foreach_add_([each.step for each in several], 1)
    for each in several:
        each.adamw(lr=lr, rule="sr-ste", backend="cuda")
        each.sgd(lr=lr, backend="cuda")


def test_graph_replays_its_steps():
    several, lr = of_every_kernel(), torch.full((), 0.1, dtype=torch.float64, device="cuda")
    expected = [each.clone() for each in several]
    graph, _ = capture(lambda: advance(several, lr), lambda: advance([each.clone() for each in several], lr))
    masks = several[0].mask.clone()
    for rate in (0.1, 0.03, 0.2, 0.01):
        lr.fill_(rate)
        for each in several:
            each.grad.mul_(-1.5)
        graph.replay()
        for got, other in zip(several, expected, strict=True):
            other.grad.mul_(-1.5)
            other.step += 1
            other.adamw(lr=rate, rule="sr-ste", backend="reference").sgd(lr=rate, backend="reference")
            assert_same(got, other, f"lr {rate}")
    assert several[0].step.item() == 5 and not torch.equal(several[0].mask, masks)


def test_never_waits_for_the_device():
    several, lr = of_every_kernel(), torch.full((), 0.1, dtype=torch.float64, device="cuda")
    advance(several, lr)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        advance(several, lr)
        advance(several, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("optimizer", [pyrx.optim.MaskedAdamW, pyrx.optim.MaskedSGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_tensor_learning_rate_of_dense_weights_is_not_waited_for(optimizer, dtype):
    nets = [torch.nn.Linear(64, 8).to(device) for device in ("cpu", "cuda")]
    nets[1].load_state_dict(nets[0].state_dict())
    rates = 0.1, torch.tensor(0.1, dtype=dtype, device="cuda")
    for net, lr in zip(nets, rates, strict=True):
        more = {"momentum": 0.9} if optimizer is pyrx.optim.MaskedSGD else {}
        own = optimizer([{"params": [net.weight], "n": 2, "m": 4}, {"params": [net.bias]}], lr=lr, **more)
        before = torch.cuda.get_sync_debug_mode()
        for i in range(3):
            for each in net.parameters():
                each.grad = torch.full_like(each, 0.5 - i)
            try:
                torch.cuda.set_sync_debug_mode("error" if i else before)
                own.step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.parametrize("shape, n, m, dim", [((64, 512), 2, 4, -1), ((64, 512), 2, 16, -1), ((64, 512), 2, 4, 0)])
def test_one_launch(shape, n, m, dim):
    several = [there(Tensors(shape, n, m, dim, dtype=torch.bfloat16, seed=i)) for i in range(40)]
    step = lambda: masked_adamw(*lists(several), n, m, dim=dim, **ADAMW, backend="cuda")  # noqa: E731
    step()
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [each.name for each in kernels]


def test_errors_come_before_any_launch():
    good, bad = there(Tensors((8, 16), 2, 4, -1)), there(Tensors((8, 16), 2, 4, -1))
    before = [good.clone(), bad.clone()]
    bad.mask = bad.mask.cpu()
    with pytest.raises(RuntimeError, match=r"expected masks\[1\] on device cuda:0"):
        masked_adamw(*lists([good, bad]), 2, 4, **ADAMW, backend="cuda")
    bad.mask, bad.step = bad.mask.cuda(), bad.step.cpu()
    with pytest.raises(RuntimeError, match=r"expected steps\[1\] on device cuda:0"):
        masked_adamw(*lists([good, bad]), 2, 4, **ADAMW, backend="cuda")
    for got, other in zip((good, bad), before, strict=True):
        assert_same(got, other)


@pytest.mark.parametrize("op", ["adamw", "sgd"])
def test_opcheck(op):
    for shape, dim in (((6, 40), -1), ((8, 5), 0)):
        arguments = cases.raw(there(Tensors(shape, 2, 4, dim)), op)
        torch.library.opcheck(getattr(torch.ops.pyrx, f"masked_{op}").default, arguments)


def test_compiles():
    compiled = torch.compile(lambda tensors: tensors.adamw(backend="cuda"), fullgraph=True)
    tensors = there(Tensors((6, 40), 2, 4, -1))
    expected = tensors.clone().adamw(backend="reference")
    assert_same(compiled(tensors), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_more_than_2_to_the_31_elements(dim):
    rows, columns = 2**16 + 4, 2**15
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * columns:
        pytest.skip("not enough memory")
    last = there(Tensors((4, columns), 2, 4, dim, torch.bfloat16))
    huge = last.clone()
    for name in ("weight", "grad", "exp_avg", "exp_avg_sq", "mask"):
        own = getattr(last, name)
        value = torch.zeros((rows, own.shape[1]), dtype=own.dtype, device="cuda")
        value[-4:] = own
        setattr(huge, name, value)
    huge.adamw(backend="cuda")
    assert not huge.weight[:-4].any()
    last.adamw(backend="reference")
    for name, value in last.results().items():
        assert_same_bits(getattr(huge, name)[-4:], value, name)


def test_the_masks_are_those_of_the_weights():
    for shape, n, m, dim in FUSED:
        tensors = there(Tensors(shape, n, m, dim, torch.bfloat16)).adamw(backend="cuda")
        made = pyrx.nm_mask(tensors.weight, n, m, dim=dim, packed=True, backend="cuda")
        assert torch.equal(tensors.mask, made), (shape, n, m, dim)
