"""block_mass and block_recall on a GPU, by Triton: values, graphs, determinism, many keys."""

import math

import pytest
import test_block_mass as cases
import torch
from helpers import FLOATS, assert_same_bits, capture, name_of, need

from pyrx._attention import Logits
from pyrx.ops.block_mass import block_mass, block_recall

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "triton"


@pytest.fixture(autouse=True)
def gpu(poison):
    # float32 products in float32, whatever ran before
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield need(BACKEND, DEVICE, ops=("block_mass",))
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(*values):
    return [each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in values]


def operands(shape, dtype, logits):
    """(query, key, lse, logits) on the GPU."""
    query, key = cases.operands(shape, dtype)
    moved = on_gpu(query, key, cases.lse_of(query, key, logits), *logits)
    return *moved[:3], Logits(*moved[3:])


# Every dtype, head size and tile compiles kernels of its own: of block sizes and of 16-bit dtypes some in turn.


@pytest.mark.parametrize("i, name", list(enumerate(cases.FEATURES)))
def test_features(i, name):
    for turn, dtype in enumerate((FLOATS[i % 2], torch.float32)):
        block_size = ((64, 64), (128, 128), (32, 16))[(i + turn) % 3]
        query, key = cases.operands(cases.SHAPE, dtype)
        logits = cases.feature(name, cases.SHAPE, dtype)
        cases.assert_mass(BACKEND, query, key, logits, block_size, f"{name} {dtype}", DEVICE)
        blocks = cases.blocks_of(cases.SHAPE, block_size, lead=(2, 4))
        cases.assert_recall(BACKEND, query, key, logits, blocks, block_size, f"{name} {dtype}", DEVICE)


@pytest.mark.parametrize("i, size", list(enumerate([1, 16, 40, 64, 128, 200, 256])))
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=name_of)
def test_head_and_block_sizes(dtype, i, size):
    shape = (1, 4, 2, 333, 517, size)
    query, key = cases.operands(shape, dtype)
    turn = (i + FLOATS.index(dtype)) % 2
    for q_block, k_block in ((16, 16), (64, 64), (128, 128), (128, 32))[turn::2]:
        logits, block_size = cases.plain(size, right=100), (q_block, k_block)
        cases.assert_mass(BACKEND, query, key, logits, block_size, block_size, DEVICE)
        blocks = cases.blocks_of(shape, block_size)
        cases.assert_recall(BACKEND, query, key, logits, blocks, block_size, block_size, DEVICE)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 300), (300, 1), (16, 80), (512, 512)])
def test_lengths(queries, keys):
    shape = (2, 2, 2, queries, keys, 64)
    query, key = cases.operands(shape, torch.bfloat16)
    cases.assert_mass(BACKEND, query, key, cases.plain(64), (64, 64), shape, DEVICE)
    cases.assert_recall(BACKEND, query, key, cases.plain(64), cases.blocks_of(shape, (64, 64)), (64, 64), shape, DEVICE)


def test_the_same_bits_every_time():
    shape = (2, 4, 2, 700, 900, 64)
    query, key, lse, logits = operands(shape, torch.bfloat16, cases.plain(64, right=0))
    blocks = cases.blocks_of(shape, (64, 64)).to(DEVICE)
    mass = block_mass(query, key, lse, (64, 64), logits)
    recall = block_recall(query, key, blocks, (64, 64), logits)
    for _ in range(5):
        assert_same_bits(block_mass(query, key, lse, (64, 64), logits), mass)
        assert_same_bits(block_recall(query, key, blocks, (64, 64), logits), recall)


def test_graphs_follow_the_operands():
    shape = (1, 2, 2, 256, 384, 64)
    query, key, lse, logits = operands(shape, torch.bfloat16, cases.feature("key_mask", (1, 2, 2, 256, 384, 64)))
    blocks = cases.blocks_of(shape, (64, 64)).to(DEVICE)

    def both():
        recall = block_recall(query, key, blocks, (64, 64), logits)
        return block_mass(query, key, lse, (64, 64), logits), recall

    graph, captured = capture(both)
    for _ in range(2):
        query.normal_()
        graph.replay()
        for got, expected in zip(captured, both(), strict=True):
            assert_same_bits(got, expected)


def test_many_keys():
    """Rows of W add up to the rows of a block, and equal logits give equal blocks; offsets of more than 32 bits."""
    queries, keys, size = 256, 2**20 + 64, 128
    query = torch.zeros(1, 20, queries, size, device=DEVICE, dtype=torch.bfloat16)
    key = torch.zeros(1, 20, keys, size, device=DEVICE, dtype=torch.bfloat16)
    lse = torch.full((1, 20, queries), math.log(keys), device=DEVICE)
    mass = block_mass(query, key, lse, (128, 64), cases.plain(size))
    torch.testing.assert_close(mass, torch.full_like(mass, 128 * 64 / keys), rtol=1e-4, atol=0)
    blocks = torch.arange(mass.shape[3], device=DEVICE)[None, None, None] % 4 == 0
    recall = block_recall(query, key, blocks.expand(1, 1, 2, -1), (128, 64), cases.plain(size))
    expected = blocks.float().mean().expand_as(recall)
    torch.testing.assert_close(recall, expected.contiguous(), rtol=1e-4, atol=0)
