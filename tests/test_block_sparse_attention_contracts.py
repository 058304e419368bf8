"""Attention over listed blocks: registrations, torch.compile, autocast, transforms, threads, memory, a training run."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention import CASES, NAMES, ROW, attention, block_mask, formula, gradients, raw
from helpers import ROOT, assert_same_bits, name_of, need, threads
from torch.utils.checkpoint import checkpoint

import pyrx
from pyrx import _library

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

KINDS = {
    "plain": {},
    "heads": {"heads": 4, "kv_heads": 2, "lead": (2, 4), "value_size": 24, "is_causal": True},
    "bias": {"bias": (2, 1), "query_scale": True, "softcap": 2.0, "window": (9, 30)},
    "pair": {"bias": (1, 2), "columns": 8, "keys": 40, "key_mask": True, "ranges": 2},
    "dropout": {"dropout_p": 0.3, "seed": 3, "block": (16, 32)},
    "empty": {"queries": 0},
}


def call_of(kind, dtype=torch.float32, **changes):
    return attention(**{"queries": 33, "keys": 40, "block": (16, 16), "size": 8} | KINDS[kind] | changes, dtype=dtype)


# Registrations.


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(cpu, kind):
    ops = _library.namespace(need(cpu, ops=(ROW,)))
    call = call_of(kind)
    held, _ = call.leaves()
    for each, want_entropy in ((held, True), (call, False)):
        torch.library.opcheck(ops.block_sparse_attention.default, (*raw(each), want_entropy))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_the_backward(cpu, kind):
    ops = _library.namespace(need(cpu, ops=(ROW,)))
    call = call_of(kind)
    arguments = raw(call)
    out, lse, entropy = ops.block_sparse_attention(*arguments, True)
    rows = torch.randn_like(lse)
    present = [getattr(call, name) is not None for name in NAMES]
    op = ops.block_sparse_attention_backward.default
    torch.library.opcheck(op, (torch.randn_like(out), rows, rows, out, lse, entropy, *arguments, present))
    some = [one and i % 2 == 0 for i, one in enumerate(present)]
    torch.library.opcheck(op, (torch.randn_like(out), None, None, out, lse, lse.new_empty(0), *arguments, some))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
def test_opcheck_of_other_dtypes_and_layouts(cpu, dtype):
    ops = _library.namespace(need(cpu, ops=(ROW,)))
    call = call_of("bias", dtype)
    turned = call.replace(
        **{name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in NAMES[:3]}
    )
    held, _ = turned.leaves()
    torch.library.opcheck(ops.block_sparse_attention.default, (*raw(held), True))


def test_the_op_takes_a_window_of_any_size(cpu):
    ops = _library.namespace(need(cpu, ops=(ROW,)))
    arguments = raw(call_of("plain"))
    at = 9  # of left; right follows
    assert arguments[at : at + 2] == [-1, -1]
    wide = [*arguments[:at], 2**63 - 1, 2**63 - 1, *arguments[at + 2 :]]
    for one, other in zip(
        ops.block_sparse_attention(*wide, True), ops.block_sparse_attention(*arguments, True), strict=True
    ):
        assert_same_bits(one, other)


# torch.compile.


def function_of(backend, **options):
    def function(query, key, value, mask, query_scale, bias):
        out, lse, entropy = pyrx.block_sparse_attention(
            query * 1,
            key,
            value,
            mask,
            query_scale=query_scale,
            bias=bias,
            return_lse=True,
            return_entropy=True,
            enable_gqa=True,
            backend=backend,
            **options,
        )
        return out + 1, lse, entropy

    return function


def compiled_and_eager(fast, function, call):
    """Results and gradients of both."""
    found = []
    for each in (fast, function):
        held, leaves = call.leaves()
        results = each(held.query, held.key, held.value, held.mask, held.query_scale, held.row_bias)
        pairs = [(one, torch.ones_like(one)) for one in results if one.requires_grad]
        grads = torch.autograd.grad([one for one, _ in pairs], list(leaves.values()), [one for _, one in pairs])
        found.append((results, grads))
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, dynamic):
    need(backend, ops=(ROW,))
    every = {"is_causal": True, "dropout_p": 0.4, "seed": 3, "softcap": 3.0}
    shapes = [
        {"queries": 33, "keys": 40},
        {"queries": 100, "keys": 131, "batch": 3, "heads": 4, "kv_heads": 2, "lead": (3, 1)},
    ]
    # the reference over symbolic shapes takes long to trace
    few = backend == "reference"
    for options in ({},) if few else ({}, every):
        function = function_of(backend, **options)
        fast = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for arguments in shapes[:1] if few else shapes:
            batch, heads = arguments.get("batch", 2), arguments.get("heads", 2)
            call = attention(
                **arguments,
                size=8,
                block=(16, 32),
                density=0.8,
                query_scale=True,
                bias=(batch, heads),
                dtype=torch.float32,
            )
            found, expected = compiled_and_eager(fast, function, call)
            torch.testing.assert_close(found, expected)
            for one, other in zip(found[0], expected[0], strict=True):
                assert one.stride() == other.stride()


def test_compiled_without_a_mask(cpu):
    backend = need(cpu, ops=(ROW,))

    def function(query, key, value):
        return pyrx.block_sparse_attention(query, key, value, is_causal=True, window=20, backend=backend)

    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (100, 200, 33):
        tensors = [torch.randn(1, 2, length, 8) for _ in range(3)]
        torch.testing.assert_close(fast(*tensors), function(*tensors))


@pytest.mark.slow
def test_inductor(cpu):
    need(cpu, ops=(ROW,))
    function = function_of(cpu, is_causal=True, dropout_p=0.2, seed=1)
    fast = torch.compile(function, fullgraph=True)
    call = attention(size=8, block=(16, 32), density=0.8, query_scale=True, bias=(2, 2), dtype=torch.float32)
    found, expected = compiled_and_eager(fast, function, call)
    torch.testing.assert_close(found, expected)


def test_a_new_mask_is_no_new_graph(backend):
    """Masks change in training: of the same lengths and widths they share one graph."""
    need(backend, ops=(ROW,))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(function_of(backend), fullgraph=True, backend=counter)
    call = attention(lead=(2, 2), dtype=torch.float32)
    for seed in range(4):
        blocks = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(seed)) < 0.5
        lists = block_mask(blocks, (32, 32), (150, 190), extra=0, width=6)
        held = call.replace(mask=lists, blocks=blocks)
        got = fast(held.query, held.key, held.value, lists, None, None)
        torch.testing.assert_close(got[0] - 1, formula(held)[0], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_the_blocks_count_in_eager_compiled_and_beyond_the_recompile_limit(backend):
    """FlexAttention in eager mode ignores block lists; after too many compilations a compiled call is an eager one."""
    need(backend, ops=(ROW,))

    def function(query, key, value, mask, label):
        # a constant of the graph: each label is a compilation
        scale = len(label) / len(label)
        return pyrx.block_sparse_attention(query * scale, key, value, mask, backend=backend)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(function, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2):
        for step in range(5):
            blocks = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(step)) < 0.4
            call = attention(blocks=blocks, block=(32, 32), dtype=torch.float32)
            dense = attention(density=1.0, block=(32, 32), dtype=torch.float32)
            expected = formula(call)[0]
            got = fast(call.query, call.key, call.value, call.mask, "x" * (step + 1))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                function(call.query, call.key, call.value, call.mask, "x"), expected, rtol=1e-4, atol=1e-5
            )
            assert (got - formula(dense)[0]).abs().max() > 0.1
    assert counter.frame_count == 2, "the limit was reached"


def test_the_blocks_count_in_the_gradients(backend):
    need(backend, ops=(ROW,))
    call, dense = (attention(density=density, dtype=torch.float32) for density in (0.5, 1.0))
    _, found = gradients(call, lambda each: each(backend))
    _, expected = gradients(dense, formula)
    assert all((found[name] - expected[name]).abs().max() > 0.1 for name in found)


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(backend, kind, dtype):
    call = call_of(kind)
    held, leaves = call.leaves()
    with torch.autocast("cpu", dtype=dtype):
        out, lse, entropy = held(backend)
    assert out.dtype == dtype and lse.dtype == entropy.dtype == torch.float32
    expected = call.to(dtype).replace(query_scale=call.query_scale)(backend)
    for one, other in zip((out, lse, entropy), expected, strict=True):
        assert_same_bits(one.detach(), other)
    for leaf, gradient in zip(
        leaves.values(), torch.autograd.grad(out.float().sum(), list(leaves.values())), strict=True
    ):
        assert gradient.dtype == leaf.dtype == torch.float32 and gradient.isfinite().all()


def test_autocast_leaves_float64_alone_and_unites_dtypes(backend):
    call = call_of("heads", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(call(backend)[0], call(backend)[0])
        assert call(backend)[0].dtype == torch.float64
        mixed = call_of("heads").replace(value=call.value.bfloat16(), key=call.key.half())
        assert mixed(backend)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert call_of("heads")(backend)[0].dtype == torch.float32


# Inside a model.


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_dropout(backend, use_reentrant):
    call = attention(dropout_p=0.5, bias=(2, 2), dtype=torch.float32)
    need(backend, ops=(ROW,))

    def function(query, key, value, bias):
        return pyrx.block_sparse_attention(query * 2, key, value, call.mask, bias=bias, dropout_p=0.5, backend=backend)

    found = []
    for run in (function, lambda *tensors: checkpoint(function, *tensors, use_reentrant=use_reentrant)):
        _, leaves = call.leaves()
        torch.manual_seed(4)
        out = run(*leaves.values())
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves.values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_vmap(backend):
    """The mask is shared; the samples are those of a loop."""
    call = attention(3, 2, 33, 40, 8, block=(16, 16), dtype=torch.float32)
    need(backend, ops=(ROW,))
    stacked = [torch.stack([each, 2 * each]) for each in (call.query, call.key, call.value)]

    def function(query, key, value):
        return pyrx.block_sparse_attention(query, key, value, call.mask, backend=backend)

    got = torch.vmap(function)(*stacked)
    for i in range(2):
        torch.testing.assert_close(got[i], function(*(each[i] for each in stacked)))


def test_functional_gradients_raise(cpu):
    call = attention(2, 2, 33, 40, 8, block=(16, 16), dtype=torch.float64)
    need(cpu, ops=(ROW,))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda query: call.replace(query=query)(cpu)[0].sum())(call.query)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}], ids=["plain", "dropout"])
def test_a_model_trains_alike_on_every_backend(backend, options):
    """A token is told by one far away, which a sliding window reaches through a global token alone."""
    need(backend, ops=(ROW,))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8, 32)
            self.place = torch.nn.Parameter(torch.randn(80, 32) * 0.1)
            self.qkv = torch.nn.Linear(32, 96)
            self.bias = torch.nn.Parameter(torch.zeros(1, 2, 80, 80))
            self.head = torch.nn.Linear(32, 8)

        def forward(self, x, backend, seed):
            x = self.embed(x) + self.place
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            out, _, entropy = pyrx.block_sparse_attention(
                query,
                key,
                value,
                mask,
                bias=self.bias,
                return_lse=True,
                return_entropy=True,
                seed=seed,
                backend=backend,
                **options,
            )
            return self.head(x + out.transpose(1, 2).flatten(2)), entropy

    band = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    band[:, 0] = True
    mask = block_mask(band[None, None], (16, 16), (80, 80))
    torch.manual_seed(0)
    first = Model().double()
    losses = {}
    for name in ("reference", backend):
        model, losses[name] = copy.deepcopy(first), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        generator = torch.Generator().manual_seed(1)
        for step in range(40):
            x = torch.randint(0, 8, (16, 80), generator=generator)
            logits, entropy = model(x, name, step)
            loss = F.cross_entropy(logits.flatten(0, 1), x[:, :1].expand(-1, 80).flatten()) + 1e-3 * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[backend]), torch.tensor(losses["reference"]), rtol=1e-6, atol=1e-8)
    assert losses[backend][-1] < 0.6 * losses[backend][0], losses[backend]


# Bits.


BITS = ("together", "together_pair", "heads_4_1", "blocks_16_16", "blocks_128_128", "lengths_1311", "decoding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("name", BITS)
def test_threads_and_runs_do_not_change_bits(cpu, name, dtype):
    call = attention(**CASES[name], dropout_p=0.3, seed=5, dtype=dtype)
    found = []
    for count in (1, 2, 3, 3):
        with threads(count):
            results, grads = gradients(call, lambda each: each(cpu))
            found.append([*results, *grads.values()])
            with torch.no_grad():
                found[-1] += call(cpu, return_entropy=False)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_samples_bits_do_not_depend_on_the_rest_of_the_batch(cpu, dtype):
    call = attention(3, 4, kv_heads=2, is_causal=True, dtype=dtype)
    whole, grads = gradients(call, lambda each: each(cpu), through=("out",))
    alone = call.map(lambda each: each[:1].contiguous())
    out, found = gradients(alone, lambda each: each(cpu), through=("out",))
    assert_same_bits(out[0], whole[0][:1])
    assert set(found) == set(grads)


# Memory.

PEAK = """
import sys
sys.path.append(sys.argv[2])
import torch, pyrx
from peak_memory import added_peak
backward = sys.argv[1] == "backward"
torch.set_num_threads(2)

def step(q, k, v):
    count = q.shape[2] // 128
    near = (torch.arange(count)[:, None] - torch.arange(count)).abs() <= 4
    mask = pyrx.BlockMask.from_dense(near, block_size=128)
    out = pyrx.block_sparse_attention(q, k, v, mask, window=512, dropout_p=0.1, seed=1, backend="cpu")
    if backward:
        out.backward(torch.ones(()).expand(out.shape))

for length in (256, 8192, 16384):
    tensors = [torch.randn(1, 2, length, 64, requires_grad=backward) for _ in range(3)]
    print(added_peak(lambda: step(*tensors), "cpu"))
"""


@pytest.mark.parametrize("direction, tensors", [("forward", 1), ("backward", 4)])
def test_extra_memory_is_linear_in_the_length(cpu, python, direction, tensors):
    """Beside the output, and the gradients of query, key and value."""
    need(cpu, ops=(ROW,))
    _, half, full = map(int, python(PEAK, direction, ROOT / "bench").split())
    outputs = tensors * 2 * 16384 * 64 * 4
    print(direction, half / 2**20, full / 2**20)
    assert full > 0.9 * outputs, "the measurement sees the outputs"
    # the weights alone would be 2 * 16384^2 * 4 bytes, 2 GB
    assert full < 4 * outputs + 32 * 2**20, f"{full / 2**20:.0f} MB beside {outputs / 2**20:.0f} MB of outputs"
    assert full < 2.2 * half + 4 * 2**20, f"{half / 2**20:.0f} MB for half the length, {full / 2**20:.0f} MB for it"
