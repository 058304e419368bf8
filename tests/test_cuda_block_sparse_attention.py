"""Block-sparse attention by Triton on a GPU: large problems, graphs, the same bits.

Values of every feature are in test_triton_block_sparse_attention.py."""

import helpers
import pytest
import test_triton_block_sparse_attention as cases
import torch
from triton_helpers import INTERPRETED

import pyrx
from pyrx.ops.block_mask import BlockMask
from pyrx.reference import block_sparse_attention as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="a GPU's own")]


@pytest.fixture(autouse=True)
def gpu(poison):
    return helpers.need("triton", "cuda", ops=("block_sparse_attention",))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=helpers.name_of)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("block", [64, 128])
def test_large(dtype, size, block):
    options = {"size": size, "blocks": (block, block), "batch": 1, "queries": 1000, "keys": 1096, "device": "cuda"}
    cases.check(cases.Case(dtype=dtype, heads=4, kv_heads=2, density=0.3, right=200, **options))
    cases.check(cases.Case(dtype=dtype, density=0.3, dropout_p=0.2, row_bias=(1, 2), columns=8, **options))


@pytest.mark.parametrize("tf32", [False, True])
def test_single_precision_follows_the_switch(monkeypatch, tf32):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    case = cases.Case(device="cuda", queries=256, keys=256, size=64)
    got, _ = case.found(cases.kernels, torch.float32)
    exact, _ = case.found(reference.block_sparse_attention, torch.float64)
    error = (got[0] - exact[0]).abs().max().item()
    assert error < (1e-2 if tf32 else 1e-5) and (error > 1e-5) == tf32


def test_the_same_bits_again():
    case = cases.Case(
        device="cuda", dtype=torch.bfloat16, queries=900, keys=1000, size=128, dropout_p=0.1, row_bias=(1, 1)
    )
    results, gradients = case.found(cases.kernels, torch.bfloat16)
    for _ in range(3):
        again, found = case.found(cases.kernels, torch.bfloat16)
        for one, other in zip([*again, *found.values()], [*results, *gradients.values()], strict=True):
            helpers.assert_same_bits(one, other)


def leaves_of(tokens, heads=2, size=64):
    return [torch.randn(1, heads, tokens, size, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]


def test_many_keys():
    """More than 2**31 logits a head, in blocks that are few."""
    tokens, block = 50000, 128
    rows = -(-tokens // block)
    dense = torch.eye(rows, dtype=torch.bool, device="cuda")
    dense[:, -1] = dense[-1] = True
    query, key, value = leaves_of(tokens)
    mask = BlockMask.from_dense(dense, (tokens, tokens), block, backend="reference")
    options = {"dropout_p": 0.3, "seed": 3, "enable_gqa": True}
    out = pyrx.block_sparse_attention(query, key, value, mask, backend="triton", **options)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), upstream)
    assert out.isfinite().all() and all(each.isfinite().all() for each in grads)
    # the last query block but one sees its own keys and the last block's
    first = (rows - 2) * block
    q, k, v = query[:, :, first : first + block], key[:, :, first:], value[:, :, first:]
    logits = (q.double() @ k.double().mT) * 64**-0.5
    index = torch.arange(2, device="cuda")[:, None, None] * tokens + first
    index = (index + torch.arange(block, device="cuda")[:, None]) * tokens + first
    index = index + torch.arange(tokens - first, device="cuda")
    words = helpers.philox(
        tuple(each.cpu().numpy() for each in ((index // 8) % 2**32, index // 8 >> 32, index * 0, index * 0)), (3, 0)
    )
    lane = (index % 8).cpu()
    words = torch.stack([torch.from_numpy(each.astype("int64")) for each in words])
    u = words.gather(0, lane[None] // 2)[0] >> 16 * (lane % 2) & 0xFFFF
    keep = (u >= helpers.threshold_of(0.3)).cuda()
    expected = torch.where(keep, torch.softmax(logits, -1), 0) @ v.double() * helpers.scale_of(0.3)
    torch.testing.assert_close(out[:, :, first : first + block].double(), expected, rtol=2e-2, atol=2e-2)


def test_graph_replays_with_another_seed():
    query, key, value = leaves_of(512)
    seed = torch.tensor(1, device="cuda")
    mask = BlockMask.from_dense(torch.ones(4, 4, dtype=torch.bool, device="cuda"), backend="reference")
    upstream = torch.randn_like(query)

    def step():
        out = pyrx.block_sparse_attention(
            query, key, value, mask, is_causal=True, dropout_p=0.2, seed=seed, backend="triton"
        )
        return out, *torch.autograd.grad(out, (query, key, value), upstream)

    graph, captured = helpers.capture(step)
    for value_of_seed in (2, 3):
        seed.fill_(value_of_seed)
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            helpers.assert_same_bits(got, expected)


def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = cases.Case(device="cuda:1", key_mask=0.7, dropout_p=0.2)
    results, gradients = case.found(cases.kernels, torch.float32)
    assert torch.cuda.current_device() == 0
    assert all(each.device.index == 1 for each in (*results, *gradients.values()))
    cases.check(case)


def test_compiled():
    query, key, value = leaves_of(300)
    mask = BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool, device="cuda"), (300, 300), backend="reference")

    def attend(query, key, value):
        return pyrx.block_sparse_attention(query, key, value, mask, is_causal=True, backend="triton") * 2

    expected = attend(query, key, value)
    helpers.assert_same_bits(torch.compile(attend, fullgraph=True)(query, key, value), expected)
