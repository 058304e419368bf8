"""Block lists, selection of blocks and BlockMask by CUDA C++ on a GPU: the reference's bits, no waiting, graphs."""

import pytest
import torch
from helpers import capture, name_of, need
from torch.utils import _pytree as pytree

from pyrx import BlockMask
from pyrx.ops import block_mask as op
from pyrx.reference import block_mask as reference

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "cuda"
# a warp a row of few or many scores, a block a row, more than its registers hold
ROWS = [(2, 3, 4, 1), (1, 2, 5, 33), (2, 2, 9, 128), (1, 3, 70, 300), (1, 2, 40, 512), (1, 1, 9, 513), (1, 2, 3, 5000)]
ROWS += [(1, 1, 2, 8192), (1, 1, 2, 8193), (1, 1, 2, 20001)]
LISTS = [(2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 65, 129), (1, 1, 2100, 7), (2, 1, 8, 64), (1, 2, 512, 512), (1, 1, 3, 5000)]


@pytest.fixture(autouse=True)
def gpu(poison):
    return need(BACKEND, DEVICE, ops=("block_mask",))


def scores_of(kind, shape):
    x = torch.rand(shape, device=DEVICE)
    if kind == "softmax":
        return torch.softmax(8 * torch.randn(shape, device=DEVICE), -1)
    if kind == "ties":
        return (4 * x).floor() / 4
    if kind == "special":
        inf, nan = float("inf"), float("nan")
        special = torch.tensor([inf, -inf, nan, -nan, 0.0, -0.0, 1e-42, 1024.0, 1025.0, -3.0], device=DEVICE)
        return torch.where(x < 0.3, special[torch.randint(0, 10, shape, device=DEVICE)], x)
    return x


def same(got, expected):
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == its.dtype and mine.is_contiguous() and torch.equal(mine, its)


@pytest.mark.parametrize("shape", LISTS, ids=name_of)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_lists(shape, density):
    blocks = torch.rand(shape, device=DEVICE) < density
    rows, columns = shape[2:]
    for each in (blocks, blocks.mT.contiguous().mT, blocks[:, :1].expand(shape)):
        for widths in ((columns, rows), (0, 0), (columns // 2, rows // 3)):
            same(op.block_lists(each, *widths, BACKEND), reference.block_lists(each, *widths))


@pytest.mark.parametrize("shape", ROWS, ids=name_of)
@pytest.mark.parametrize("kind", ["uniform", "softmax", "ties", "special"])
def test_selection(shape, kind):
    scores, keys = scores_of(kind, shape), shape[3]
    wanted = [torch.full((1, 1, 1), count, dtype=torch.int32, device=DEVICE) for count in (0, 1, keys // 3, keys + 3)]
    wanted.append(torch.randint(-1, keys + 2, shape[:3], dtype=torch.int32, device=DEVICE))
    always = torch.rand(shape[0], 1, 1, keys, device=DEVICE) < 0.1
    for count, mass in ((each, 1.0) for each in wanted):
        got = op.select_blocks(scores, count, mass, always, BACKEND)
        assert torch.equal(got, reference.select_blocks(scores, count, mass, always))
    for mass in (0.0, 0.3, 0.9, 0.98, 1.0):
        got = op.select_blocks(scores, None, mass, None, BACKEND)
        assert torch.equal(got, reference.select_blocks(scores, None, mass, None)), mass


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (1, 1, 0, 0)], ids=name_of)
def test_of_nothing(shape):
    blocks = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    same(op.block_lists(blocks, shape[3], shape[2], BACKEND), reference.block_lists(blocks, shape[3], shape[2]))
    assert op.select_blocks(blocks.float(), None, 0.5, None, BACKEND).shape == shape


def builders(device):
    """Masks of every constructor, of tensors that are on the device already."""
    blocks = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.3
    first = torch.randint(0, 1000, (1, 1250), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    tokens = torch.rand(2, 1250, generator=torch.Generator().manual_seed(3)) < 0.01
    counts, indices, *_ = reference.block_lists(blocks, 20, 20)
    documents, keep = torch.tensor([1000, 0, 250]), torch.tensor([True, False, True])
    given = (blocks, torch.stack([first, first + 99], -1), tokens, counts, indices, documents, keep)
    blocks, key_range, tokens, counts, indices, documents, keep = (each.to(device) for each in given)
    return {
        "from_dense": lambda: BlockMask.from_dense(blocks, 1250, 64),
        "from_lists": lambda: BlockMask.from_lists(counts, indices, 1250, 64),
        "from_key_range": lambda: BlockMask.from_key_range(key_range, (1250, 1100), 64),
        "causal": lambda: BlockMask.causal(1250, 64, device=device),
        "sliding_window": lambda: BlockMask.sliding_window(1250, (100, 20), 64, device=device),
        "global_tokens": lambda: BlockMask.global_tokens(tokens, block_size=64),
        "first_tokens": lambda: BlockMask.global_tokens(5, 1250, 64, device=device),
        "strided": lambda: BlockMask.strided(1250, 3, 64, device=device),
        "document": lambda: BlockMask.document(documents, 64, seq_lengths=1250),
        "key_blocks": lambda: BlockMask.key_blocks(tokens, block_size=64),
        "combined": lambda: ~BlockMask.from_dense(blocks, 1250, 64) & BlockMask.causal(1250, 64, device=device),
        "keep_heads": lambda: BlockMask.from_dense(blocks, 1250, 64).keep_heads(keep),
    }


@pytest.mark.parametrize("name", builders("cpu"))
def test_masks_are_built_without_waiting(name):
    build = builders(DEVICE)[name]
    build()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = build()
        density = got.density()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = builders("cpu")[name]()
    for mine, its in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert mine.device.type == DEVICE
        assert torch.equal(mine.cpu(), its)
    assert torch.equal(density.cpu(), expected.density())


def test_a_graph_follows_its_scores():
    scores = torch.randn(1, 4, 100, 300, device=DEVICE)
    count = torch.full((1, 4, 1), 30, dtype=torch.int32, device=DEVICE)

    def search():
        by_count = BlockMask.from_dense(op.select_blocks(scores, count), block_size=64)
        return by_count, BlockMask.from_dense(op.select_blocks(scores, None, 0.8), block_size=64)

    graph, found = capture(search)
    for i in range(3):
        scores.copy_(torch.randn_like(scores))
        count.fill_(10 + i)
        graph.replay()
        for mine, its in zip(pytree.tree_leaves(found), pytree.tree_leaves(search()), strict=True):
            assert torch.equal(mine, its)


def test_masks_move():
    mask = BlockMask.document([1000, 250], 64)
    there = mask.to(DEVICE)
    assert there.device.type == DEVICE and there.key_range.device.type == DEVICE
    for mine, its in zip(pytree.tree_leaves(there.to("cpu")), pytree.tree_leaves(mask), strict=True):
        assert torch.equal(mine, its)


def test_lengths_on_a_gpu_need_their_sum():
    with pytest.raises(ValueError, match="expected seq_lengths of lengths that are on a GPU or compiled, got None"):
        BlockMask.document(torch.tensor([3, 4], device=DEVICE))


@pytest.mark.parametrize(
    "call",
    [
        "BlockMask.document(torch.tensor([3, 4], device='cuda'), seq_lengths=8)",
        "BlockMask.from_lists(torch.ones(3, dtype=torch.int32, device='cuda'), "
        "torch.full((3, 2), 3, dtype=torch.int32, device='cuda'), 40, 16)",
    ],
)
def test_wrong_values_fail_an_assertion_of_the_device(python, call):
    script = f"""
import torch
from pyrx import BlockMask
try:
    {call}
    torch.cuda.synchronize()
except Exception as error:
    print("raised", type(error).__name__)
"""
    assert "raised" in python(script)
