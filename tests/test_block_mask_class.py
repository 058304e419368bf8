"""pyrx.BlockMask: what its constructors cover against masks of elements, its conversions, combinations and errors."""

import pytest
import torch
from helpers import name_of
from masks import assert_lists, covered, elements_of, random_blocks

import pyrx
from pyrx import BlockMask
from pyrx.ops import block_sparse_attention as attention
from pyrx.reference.block_sparse_attention import visible_keys

SIZES = [(16, 16), (64, 16), (16, 128), (32, 64)]
LENGTHS = [(1, 1), (16, 33), (100, 63), (128, 128), (257, 300)]
each_size = pytest.mark.parametrize("size", SIZES, ids=name_of)
each_length = pytest.mark.parametrize("lengths", LENGTHS, ids=name_of)


@each_size
@each_length
def test_causal_and_windows(lengths, size):
    q, k = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    mask = BlockMask.causal(lengths, size)
    assert_lists(mask)
    assert torch.equal(mask.to_dense()[0, 0], covered(k <= q, size))
    assert torch.equal(elements_of(mask)[0, 0], k <= q)
    for left, right in ((0, 0), (5, 0), (0, 7), (40, -1), (-1, 70), (-1, -1), (1000, 1000)):
        allowed = torch.ones(lengths, dtype=torch.bool)
        if left >= 0:
            allowed &= k >= q - left
        if right >= 0:
            allowed &= k <= q + right
        mask = BlockMask.sliding_window(lengths, (left, right), size)
        assert_lists(mask)
        assert torch.equal(mask.to_dense()[0, 0], covered(allowed, size))
        assert torch.equal(elements_of(mask)[0, 0], allowed)
        mask = BlockMask.sliding_window(lengths, (left, right), size, is_causal=True)
        assert torch.equal(mask.to_dense()[0, 0], covered(allowed & (k <= q), size))
        assert torch.equal(elements_of(mask)[0, 0], allowed & (k <= q))


@each_size
@each_length
@pytest.mark.parametrize("batch", [1, 3])
def test_key_range(lengths, size, batch):
    first = torch.randint(-5, lengths[1] + 5, (batch, lengths[0]))
    key_range = torch.stack([first, first + torch.randint(-3, 60, first.shape)], -1).int()
    mask = BlockMask.from_key_range(key_range, lengths, size)
    assert_lists(mask)
    expected = visible_keys(*lengths, -1, -1, key_range, None, torch.device("cpu"))
    assert torch.equal(mask.to_dense(), covered(expected, size))
    assert torch.equal(elements_of(mask), expected)


@each_size
@pytest.mark.parametrize("lengths", [[], [1], [0, 5, 0], [100, 1, 37, 64, 16], [16] * 9], ids=str)
def test_documents(lengths, size):
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    same = document[:, None] == document
    for given_lengths in (lengths, torch.tensor(lengths, dtype=torch.int32)):
        for seq_lengths in (None, total, (total, total)):
            mask = BlockMask.document(given_lengths, size, seq_lengths=seq_lengths)
            assert_lists(mask)
            assert mask.seq_lengths == (total, total)
            assert torch.equal(elements_of(mask)[0, 0], same)
            assert torch.equal(mask.to_dense()[0, 0], covered(same, size))


@each_size
def test_documents_of_other_keys_and_of_a_batch(size):
    lengths, key_lengths = [[30, 0, 11], [1, 40, 0]], [[5, 70, 0], [0, 25, 50]]
    mask = BlockMask.document(torch.tensor(lengths), size, key_lengths=torch.tensor(key_lengths))
    assert_lists(mask)
    assert mask.seq_lengths == (41, 75) and mask.key_range.shape == (2, 41, 2)
    for b in range(2):
        query, key = (
            torch.repeat_interleave(torch.arange(3), torch.tensor(each[b])) for each in (lengths, key_lengths)
        )
        assert torch.equal(elements_of(mask)[b, 0], query[:, None] == key)


@each_size
def test_global_tokens(size):
    queries, keys = 130, 200
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    for count in (0, 1, 17, 500):
        mask = BlockMask.global_tokens(count, (queries, keys), size)
        assert_lists(mask)
        assert torch.equal(mask.to_dense()[0, 0], covered((q < count) | (k < count), size))
    tokens = torch.rand(3, keys) < 0.02
    mask = BlockMask.global_tokens(tokens, block_size=size)
    assert_lists(mask)
    assert torch.equal(mask.to_dense()[:, 0], covered(tokens[:, :, None] | tokens[:, None, :], size))
    assert torch.equal(BlockMask.global_tokens(tokens[1], keys, size).to_dense(), mask.to_dense()[1:2])


@each_size
@pytest.mark.parametrize("stride, local, summary", [(1, 0, 0), (3, 2, 0), (4, 1, 1), (4, 0, 4), (5, 3, 2), (3, 0, 0)])
def test_strided(size, stride, local, summary):
    lengths, unit = (700, 1000), max(size)
    mask = BlockMask.strided(lengths, stride, size, local=local, summary=summary)
    assert_lists(mask)
    i, j = torch.arange(lengths[0])[:, None] // unit, torch.arange(lengths[1]) // unit
    far = j % stride >= stride - summary if summary else (i - j) % stride == 0
    expected = covered(((i - j).abs() < local) | far.expand(lengths), size)
    assert torch.equal(mask.to_dense()[0, 0], expected)


@each_size
@pytest.mark.parametrize("lengths", LENGTHS, ids=name_of)
def test_key_blocks(lengths, size):
    regions = torch.rand(2, lengths[1]) < 0.02
    expected = covered(regions[:, None].expand(2, *lengths), size)
    mask = BlockMask.key_blocks(regions, lengths, size)
    assert_lists(mask)
    assert torch.equal(mask.to_dense()[:, 0], expected)
    assert torch.equal(BlockMask.key_blocks(regions[1], lengths, size).to_dense()[0, 0], expected[1])
    assert BlockMask.key_blocks(regions, block_size=size).seq_lengths == (lengths[1], lengths[1])


def test_lists_in_any_order_twice_and_of_zero_length():
    blocks = random_blocks(2, 3, 5, 7)
    counts = blocks.sum(-1)
    listed = torch.full((2, 3, 5, 11), 2**31 - 1, dtype=torch.int32)
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        own = blocks[tuple(at)].nonzero()[:, 0]
        own = own[torch.randperm(len(own))]
        own = torch.cat([own, own[:1]])  # one of them twice
        listed[tuple(at)][: len(own)] = own
        counts[tuple(at)] = len(own)
    mask = BlockMask.from_lists(counts.int(), listed, (70, 100), 16)
    assert_lists(mask)
    assert torch.equal(mask.to_dense(), blocks)
    one = BlockMask.from_lists(counts[1, 2].int(), listed[1, 2], (70, 100), 16)
    assert one.shape == (1, 1, 5, 7) and torch.equal(one.to_dense()[0, 0], blocks[1, 2])
    empty = BlockMask.from_lists(torch.zeros(3, 5).int(), torch.zeros(3, 5, 0).int(), (70, 100), 16)
    assert_lists(empty)
    assert empty.density() == 0 and empty.shape == (1, 3, 5, 7)


@pytest.mark.parametrize("sides", [((1, 1), (2, 3)), ((2, 1), (1, 3)), ((2, 3), (2, 3))], ids=str)
def test_combinations(sides):
    a, b = (BlockMask.from_dense(random_blocks(*lead, 4, 6), (60, 90), 16) for lead in sides)
    for got, expected in (
        (a & b, a.to_dense() & b.to_dense()),
        (a | b, a.to_dense() | b.to_dense()),
        (~a, ~a.to_dense()),
    ):
        assert_lists(got)
        assert torch.equal(got.to_dense(), expected)
        assert got.seq_lengths == (60, 90) and got.block_size == (16, 16)


def test_intersection_of_key_ranges():
    documents = BlockMask.document(torch.tensor([[40, 60], [70, 30]]), 16)
    first = torch.randint(0, 80, (1, 100))
    ranges = BlockMask.from_key_range(torch.stack([first, first + 25], -1).int(), 100, 16)
    blocks = BlockMask.from_dense(random_blocks(2, 3, 7, 7), 100, 16)
    for a, b in ((documents, ranges), (ranges, documents), (documents, blocks), (blocks, ranges)):
        both = a & b
        assert_lists(both)
        assert torch.equal(elements_of(both), elements_of(a) & elements_of(b))
    for combine in (lambda: documents | blocks, lambda: blocks | documents, lambda: ~documents):
        with pytest.raises(ValueError, match="without a key_range"):
            combine()


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("keep_shape", [(3,), (1, 3), (2, 3)], ids=str)
def test_keep_heads(lead, keep_shape):
    mask = BlockMask.from_dense(random_blocks(*lead, 4, 6), (60, 90), 16)
    keep = torch.rand(keep_shape) < 0.5
    kept = mask.keep_heads(keep)
    assert_lists(kept)
    expected = mask.to_dense() & (keep if keep.dim() == 2 else keep[None])[..., None, None]
    assert torch.equal(kept.to_dense(), expected)
    assert torch.equal(elements_of(mask), elements_of(BlockMask.from_dense(mask.to_dense(), (60, 90), 16)))


def test_density_counts_listed_blocks():
    blocks = random_blocks(2, 3, 4, 6)
    torch.testing.assert_close(BlockMask.from_dense(blocks).density(), blocks.float().mean())
    assert BlockMask.from_dense(torch.ones(0, 0, dtype=torch.bool)).density() == 0


# What attention gets where it has no mask.


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 40, (10, -1), (-1, 200), (30, 5)], ids=str)
def test_the_default_mask_of_attention_covers_its_rule(is_causal, window):
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (300, 400, 400))
    mask = attention.default_mask("test", q, k, is_causal, window)
    left, right = window if isinstance(window, tuple) else (-1 if window is None else window,) * 2
    allowed = visible_keys(300, 400, left, 0 if is_causal else right, None, None, torch.device("cpu"))
    assert torch.equal(mask.to_dense(), covered(allowed, (128, 128)))
    got = pyrx.block_sparse_attention(q, k, v, is_causal=is_causal, window=window, backend="reference")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(got, expected)


# Errors.

SIZE_ERROR = "block_size to be one of 16, 32, 64, 128, got"
FLAGS, RANGE = torch.ones(40, dtype=torch.bool), torch.zeros(1, 40, 2, dtype=torch.int32)
COUNTS, INDICES = torch.ones(3, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
OTHER_DEVICE = torch.zeros(1, 40, 2, dtype=torch.int32, device="meta")
GIVEN = {
    "from_dense": {"blocks": torch.ones(3, 3, dtype=torch.bool), "seq_lengths": 40, "block_size": 16},
    "from_lists": {"kv_counts": COUNTS, "kv_indices": INDICES, "seq_lengths": 40, "block_size": 16},
    "from_key_range": {"key_range": RANGE, "seq_lengths": (40, 50)},
    "causal": {"seq_lengths": 40},
    "sliding_window": {"seq_lengths": 40, "window": 3},
    "global_tokens": {"tokens": 2, "seq_lengths": 40},
    "strided": {"seq_lengths": 40, "stride": 2},
    "document": {"lengths": [30, 10]},
    "key_blocks": {"regions": FLAGS},
}


@pytest.mark.parametrize("name", GIVEN)
def test_bad_sizes_and_lengths(name):
    make = getattr(BlockMask, name)
    make(**GIVEN[name])
    for bad in (8, 24, 256, (16, 8), (0, 16)):
        with pytest.raises(ValueError, match=f"^pyrx::BlockMask.{name}: expected {SIZE_ERROR}"):
            make(**GIVEN[name] | {"block_size": bad})
    for bad in ("16", (16,), (16, 16, 16), None, 16.0):
        with pytest.raises(TypeError, match=f"^pyrx::BlockMask.{name}: expected block_size to be an int or a pair"):
            make(**GIVEN[name] | {"block_size": bad})
    for bad in (-1, (40, -1), (2**31, 40)):
        with pytest.raises(ValueError, match=rf"^pyrx::BlockMask.{name}: expected seq_lengths in \[0, 2147483647\]"):
            make(**GIVEN[name] | {"seq_lengths": bad})
    for bad in ("40", (40,), 40.0, (40.0, 40), (True, 40)):
        with pytest.raises(TypeError, match=f"^pyrx::BlockMask.{name}: expected seq_lengths to be an int"):
            make(**GIVEN[name] | {"seq_lengths": bad})


BAD = [
    ("from_dense", {"blocks": torch.ones(3, 3)}, TypeError, "blocks of dtype torch.bool, got torch.float32"),
    ("from_dense", {"blocks": FLAGS}, ValueError, "blocks of shape [NQ, NK], [H, NQ, NK] or"),
    ("from_dense", {"seq_lengths": 49}, ValueError, "= [1, 1, 4, 4], got [1, 1, 3, 3]"),
    ("from_dense", {"key_range": RANGE.long()}, TypeError, "key_range of dtype torch.int32, got torch.int64"),
    ("from_dense", {"key_range": RANGE[:, 1:]}, ValueError, "= [B or 1, 40, 2], got [1, 39, 2]"),
    ("from_dense", {"key_range": OTHER_DEVICE}, RuntimeError, "key_range on device cpu, got meta"),
    (
        "from_dense",
        {"key_range": RANGE.repeat(3, 1, 1), "blocks": torch.ones(2, 1, 3, 3, dtype=torch.bool)},
        ValueError,
        "key_range of shape [B or 1, Sq, 2] = [2, 40, 2], got [3, 40, 2]",
    ),
    ("from_lists", {"kv_counts": COUNTS.long()}, TypeError, "kv_counts of dtype torch.int32, got torch.int64"),
    ("from_lists", {"kv_counts": COUNTS[1:]}, ValueError, "kv_counts of shape [..., NQ] = [..., 3] and 1 to 3"),
    ("from_lists", {"kv_indices": COUNTS}, ValueError, "kv_indices of shape [3, 'W'], got [3]"),
    ("from_lists", {"kv_indices": INDICES[1:]}, ValueError, "kv_indices of shape [..., NQ, W] = [3, 2], got [2, 2]"),
    ("from_lists", {"kv_indices": INDICES.to("meta")}, RuntimeError, "kv_indices on device cpu, got meta"),
    ("from_lists", {"kv_counts": COUNTS * 3}, ValueError, "kv_counts in [0, 2], got [3, 3, 3]"),
    ("from_lists", {"kv_counts": -COUNTS}, ValueError, "kv_counts in [0, 2], got [-1, -1, -1]"),
    ("from_lists", {"kv_indices": INDICES + 3}, ValueError, "kv_indices in [0, 3) where they are listed, got [[3, 3]"),
    (
        "from_lists",
        {"kv_indices": INDICES - 1},
        ValueError,
        "kv_indices in [0, 3) where they are listed, got [[-1, -1]",
    ),
    ("from_key_range", {"key_range": RANGE.float()}, TypeError, "key_range of dtype torch.int32, got torch.float32"),
    ("from_key_range", {"key_range": RANGE[0]}, ValueError, "key_range of shape [B or 1, Sq, 2]"),
    ("sliding_window", {"window": "3"}, TypeError, "window to be an int or a pair (left, right), got '3'"),
    ("sliding_window", {"window": (3, -2)}, ValueError, "window in [-1, 2147483647], got -2"),
    ("global_tokens", {"tokens": 2.0}, TypeError, "tokens to be an int, got float"),
    ("global_tokens", {"tokens": -1}, ValueError, "tokens in [0, 2147483647], got -1"),
    ("global_tokens", {"tokens": 3, "seq_lengths": None}, TypeError, "seq_lengths to be an int or a pair"),
    ("global_tokens", {"tokens": FLAGS.int()}, TypeError, "tokens of dtype torch.bool, got torch.int32"),
    ("global_tokens", {"tokens": FLAGS[None, None]}, ValueError, "tokens of shape [S] or [B, S], got [1, 1, 40]"),
    ("global_tokens", {"tokens": FLAGS, "seq_lengths": (40, 50)}, ValueError, "seq_lengths of tokens of shape [40]"),
    ("strided", {"stride": 0}, ValueError, "stride in [1, 2147483647], got 0"),
    ("strided", {"local": -1}, ValueError, "local in [0, 2147483647], got -1"),
    ("strided", {"summary": 3}, ValueError, "summary in [0, 2], got 3"),
    ("document", {"lengths": 40}, TypeError, "lengths to be a list of ints or a Tensor, got int"),
    ("document", {"lengths": [30.0]}, TypeError, "lengths to be an int, got float"),
    ("document", {"lengths": [30, -1]}, ValueError, "lengths in [0, 2147483647], got -1"),
    (
        "document",
        {"lengths": torch.tensor([30]).to_sparse()},
        TypeError,
        "lengths to be a dense Tensor, got torch.sparse_coo",
    ),
    ("document", {"lengths": torch.tensor([30, -1])}, ValueError, "lengths of at least 0, got [[30, -1]]"),
    ("document", {"lengths": torch.tensor([-30, 10])}, ValueError, "lengths of at least 0, got [[-30, 10]]"),
    ("document", {"lengths": -torch.ones(65).int()}, ValueError, "lengths of at least 0, got 65 values from -1 to -1"),
    (
        "document",
        {"lengths": torch.tensor([30.0])},
        TypeError,
        "lengths of dtype torch.int32 or torch.int64, got torch",
    ),
    ("document", {"lengths": torch.tensor(30)}, ValueError, "lengths of shape [N] or [B, N], got []"),
    ("document", {"seq_lengths": 41}, ValueError, "lengths that sum to 41, got [40]"),
    ("document", {"key_lengths": [3, 4], "seq_lengths": (40, 8)}, ValueError, "key_lengths that sum to 8, got [7]"),
    ("document", {"key_lengths": [3]}, ValueError, "key_lengths of shape [B or 1, N] = [1, 2], got [1, 1]"),
    ("document", {"lengths": torch.tensor([[30], [31]])}, ValueError, "lengths that sum to 31, got [30, 31]"),
    (
        "document",
        {"lengths": torch.ones(3, device="meta").int()},
        ValueError,
        "seq_lengths of lengths that are on a GPU",
    ),
    ("key_blocks", {"regions": FLAGS.float()}, TypeError, "regions of dtype torch.bool, got torch.float32"),
    ("key_blocks", {"seq_lengths": (40, 41)}, ValueError, "seq_lengths of regions of 40 keys, got [40, 41]"),
    ("causal", {"backend": "gpu"}, ValueError, "backend to be one of 'reference', 'cpu', 'cuda', 'triton', got 'gpu'"),
    ("causal", {"backend": "triton"}, RuntimeError, "its GPU kernels are CUDA C++"),
]


@pytest.mark.parametrize("name, changes, error, text", BAD, ids=[f"{each[0]}-{each[3][:40]}" for each in BAD])
def test_bad_arguments(name, changes, error, text):
    with pytest.raises(error) as caught:
        getattr(BlockMask, name)(**GIVEN[name] | changes)
    assert type(caught.value) is error
    op = "block_mask" if "backend" in changes else f"BlockMask.{name}"
    assert str(caught.value).startswith(f"pyrx::{op}: expected ") and text in str(caught.value)


def test_bad_combinations():
    mask = BlockMask.from_dense(random_blocks(2, 3, 4, 4), 64, 16)
    for other, text in (
        (
            BlockMask.from_dense(random_blocks(2, 3, 4, 4), 63, 16),
            r"& *: expected other of seq_lengths \[64, 64\], got",
        ),
        (BlockMask.causal(64, (16, 32)), r"& *: expected other of block_size \[16, 16\], got \[16, 32\]"),
        (BlockMask.from_dense(random_blocks(3, 3, 4, 4), 64, 16), r"that broadcast to \[2, 3\], got \[3, 3\]"),
        (BlockMask.from_dense(random_blocks(2, 2, 4, 4), 64, 16), r"that broadcast to \[2, 3\], got \[2, 2\]"),
        (BlockMask.document(torch.tensor([[64], [64], [64]]), 16), r"that broadcast to \[2, 3\], got \[3, 1\]"),
    ):
        with pytest.raises(ValueError, match=text):
            mask & other
    with pytest.raises(RuntimeError, match="expected other on device cpu, got meta"):
        mask & mask.to("meta")
    for combine in (lambda: mask & 3, lambda: mask | None):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine()
    for keep, error, text in (
        (torch.ones(3), TypeError, "keep of dtype torch.bool, got torch.float32"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"keep of shape \[B or 1, H\] of a mask of \[2, 3\], got \[2\]"),
        (torch.ones(3, 3, dtype=torch.bool), ValueError, r"of a mask of \[2, 3\], got \[3, 3\]"),
        (torch.ones(1, 1, 3, dtype=torch.bool), ValueError, r"of a mask of \[2, 3\], got \[1, 1, 3\]"),
        (torch.ones(3, dtype=torch.bool, device="meta"), RuntimeError, "keep on device cpu, got meta"),
    ):
        with pytest.raises(error, match=f"BlockMask.keep_heads: expected {text}" if error is TypeError else text):
            mask.keep_heads(keep)
