"""Block masks: lists and selection of every backend against the definition, the class against masks of elements."""

import pytest
import torch
from helpers import name_of, threads
from hypothesis import given
from hypothesis import strategies as st

from pyrx import BlockMask
from pyrx.ops import block_mask as op
from pyrx.reference import block_mask as reference
from pyrx.reference.block_sparse_attention import expand_blocks, visible_keys

SIZES = [(16, 16), (64, 16), (16, 128), (32, 64)]
LENGTHS = [(1, 1), (16, 33), (100, 63), (128, 128), (257, 300)]
each_size = pytest.mark.parametrize("size", SIZES, ids=name_of)
each_length = pytest.mark.parametrize("lengths", LENGTHS, ids=name_of)


def covered(elements, size):
    """bool blocks of bool elements (..., Sq, Sk): those that have one."""
    queries, keys = elements.shape[-2:]
    rows, columns = -(-queries // size[0]), -(-keys // size[1])
    blocks = torch.zeros(*elements.shape[:-2], rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            tile = elements[..., i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            blocks[..., i, j] = tile.flatten(-2).any(-1)
    return blocks


def elements_of(mask):
    """bool (B or 1, H or 1, Sq, Sk): which pairs the mask lets see each other."""
    blocks = expand_blocks(mask.to_dense(), *mask.block_size, *mask.seq_lengths)
    return blocks & visible_keys(*mask.seq_lengths, -1, -1, mask.key_range, None, mask.device)


def assert_lists(mask):
    """The two pairs of lists agree, within their bounds."""
    assert all(each.dtype == torch.int32 and each.is_contiguous() for each in mask.lists)
    batch, heads, rows, columns = mask.shape
    assert (rows, columns) == tuple(-(-a // b) for a, b in zip(mask.seq_lengths, mask.block_size, strict=True))
    assert mask.kv_counts.shape == (batch, heads, rows) and mask.q_counts.shape == (batch, heads, columns)
    transposed = reference.dense_blocks(mask.q_counts, mask.q_indices, rows)
    assert torch.equal(mask.to_dense(), transposed.transpose(-1, -2))


def random_blocks(*shape, density=0.4):
    return torch.rand(shape) < density


# The ops: lists and selection.


def same(got, expected):
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == its.dtype and torch.equal(mine, its)
        assert mine.is_contiguous()


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 65, 129), (1, 1, 200, 7), (2, 1, 8, 64)], ids=name_of
)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.7, 1.0])
def test_lists(backend, shape, density):
    blocks = random_blocks(*shape, density=density)
    rows, columns = shape[2:]
    for widths in ((columns, rows), (0, 0), (1, rows), (columns // 2, rows // 3)):
        same(op.block_lists(blocks, *widths, backend), reference.block_lists(blocks, *widths))
    # by hand, without the definition's sums
    kv_counts, kv_indices, q_counts, q_indices = op.block_lists(blocks, columns, rows, backend)
    for counts, indices, dense in ((kv_counts, kv_indices, blocks), (q_counts, q_indices, blocks.mT)):
        for count, listed, row in zip(counts.flatten(), indices.flatten(0, 2), dense.flatten(0, 2), strict=True):
            own = row.nonzero()[:, 0].tolist()
            assert count == len(own) and listed.tolist() == own + [0] * (len(row) - len(own))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (1, 1, 0, 0)], ids=name_of)
def test_of_nothing(backend, shape):
    same(
        op.block_lists(random_blocks(*shape), shape[3], shape[2], backend),
        reference.block_lists(random_blocks(*shape), shape[3], shape[2]),
    )
    scores = torch.randn(shape)
    for count in (torch.full((1, 1, 1), 2, dtype=torch.int32), None):
        got = op.select_blocks(scores, count, 0.5, None, backend)
        assert got.shape == shape and got.dtype == torch.bool


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every_second", "offset"])
def test_any_strides(backend, layout):
    def laid_out(x):
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "expanded":
            return x[:, :1].expand(x.shape)
        if layout == "every_second":
            return torch.stack([x, ~x if x.dtype == torch.bool else -x], -1)[..., 0]
        return torch.cat([x[..., :1], x], -1)[..., 1:]

    blocks, scores, always = (
        laid_out(random_blocks(2, 3, 20, 30)),
        laid_out(torch.randn(2, 3, 20, 30)),
        laid_out(random_blocks(2, 3, 20, 30)),
    )
    same(op.block_lists(blocks, 30, 20, backend), reference.block_lists(blocks, 30, 20))
    for count in (
        torch.randint(0, 30, (2, 3, 20), dtype=torch.int32),
        torch.randint(0, 30, (20, 3, 2), dtype=torch.int32).permute(2, 1, 0),
        None,
    ):
        got = op.select_blocks(scores, count, 0.7, always, backend)
        assert torch.equal(got, reference.select_blocks(scores, count, 0.7, always))


SPECIAL = torch.tensor(
    [torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0, 1e-42, -1e-42, 1e-20, 1024.0, 1025.0, -3.0]
)


def scores_of(kind, shape, generator=None):
    """Scores that are hard to rank or to sum."""
    x = torch.rand(shape, generator=generator)
    if kind == "softmax":
        return torch.softmax(8 * torch.randn(shape, generator=generator), -1)
    if kind == "ties":
        return (4 * x).floor() / 4
    if kind == "special":
        return SPECIAL[torch.randint(0, len(SPECIAL), shape, generator=generator)]
    if kind == "some special":
        return torch.where(x < 0.3, scores_of("special", shape, generator), x)
    if kind == "wide":
        return torch.randn(shape, generator=generator) * 10 ** (80 * x - 40)
    if kind == "one value":
        return torch.full(shape, 0.25)
    if kind == "hidden":
        return torch.full(shape, -torch.inf)
    return x


KINDS = ("uniform", "softmax", "ties", "special", "some special", "wide", "one value", "hidden")
ROWS = [(2, 3, 4, 1), (1, 2, 5, 33), (1, 3, 7, 100), (1, 1, 3, 1311), (1, 1, 2, 5000)]


@pytest.mark.parametrize("shape", ROWS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_selection(backend, kind, shape):
    scores, keys = scores_of(kind, shape), shape[3]
    for count in (-3, 0, 1, keys // 5, keys // 2, keys - 1, keys, keys + 9):
        wanted = torch.full((1, 1, 1), count, dtype=torch.int32)
        got = op.select_blocks(scores, wanted, 1.0, None, backend)
        assert torch.equal(got, reference.select_blocks(scores, wanted, 1.0, None)), count
        assert (got.sum(-1) <= max(count, 0)).all()
    for lead in ((shape[0], 1, 1), (1, shape[1], shape[2]), shape[:3]):
        wanted = torch.randint(0, keys + 1, lead, dtype=torch.int32)
        assert torch.equal(
            op.select_blocks(scores, wanted, 1.0, None, backend), reference.select_blocks(scores, wanted, 1.0, None)
        )
    for mass in (0.0, 1e-9, 0.1, 0.5, 0.9, 0.98, 1 - 1e-12, 1.0):
        got = op.select_blocks(scores, None, mass, None, backend)
        assert torch.equal(got, reference.select_blocks(scores, None, mass, None)), mass
    for lead in ((1, 1, 1, keys), (1, 1, shape[2], 1), shape):
        always = random_blocks(*lead, density=0.2)
        for wanted in (torch.full((1, 1, 1), keys // 3, dtype=torch.int32), None):
            got = op.select_blocks(scores, wanted, 0.6, always, backend)
            assert torch.equal(got, reference.select_blocks(scores, wanted, 0.6, always))


@given(st.data())
def test_selection_of_few_values(backend, data):
    """Sums that meet the limit exactly, ties at the cut, units that round to none."""
    values = st.sampled_from(
        [0.0, 2.0**-37, 2.0**-36, 3 * 2.0**-36, 0.25, 0.5, 1.0, 1024.0, -1.0, float("inf"), float("-inf"), float("nan")]
    )
    scores = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=40)))[None, None, None]
    mass = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1))
    assert torch.equal(
        op.select_blocks(scores, None, mass, None, backend), reference.select_blocks(scores, None, mass, None)
    )
    count = torch.tensor([[[data.draw(st.integers(-1, 42))]]], dtype=torch.int32)
    assert torch.equal(
        op.select_blocks(scores, count, 1.0, None, backend), reference.select_blocks(scores, count, 1.0, None)
    )


def selected_by_hand(scores, count, mass):
    """One row, by Python's own sort and integers."""

    def rank(i):
        score = scores[i]
        return (score == score, -score if score == score else 0, i)

    order = sorted(range(len(scores)), key=rank)
    if count is None:
        units = [int(min(max(each, 0.0), 1024.0) * 2**36) if each == each else 2**46 for each in scores]
        limit, total, count = int(float(sum(units)) * mass), 0, 0
        for i in order:
            total += units[i]
            if total > limit:
                break
            count += 1
        count = max(count, 1)
    return {i for i in order[: max(count, 0)] if scores[i] != -torch.inf}


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_by_hand(kind):
    for keys in (1, 7, 50):
        scores = scores_of(kind, (1, 1, 3, keys))
        for count, mass in ((2, 1.0), (keys // 2, 1.0), (None, 0.3), (None, 0.9)):
            wanted = None if count is None else torch.full((1, 1, 1), count, dtype=torch.int32)
            got = reference.select_blocks(scores, wanted, mass, None)
            for row, kept in zip(scores[0, 0].tolist(), got[0, 0], strict=True):
                assert set(kept.nonzero()[:, 0].tolist()) == selected_by_hand(row, count, mass)


def test_thread_count_changes_nothing(cpu):
    scores = torch.softmax(4 * torch.randn(2, 8, 64, 300), -1)
    count = torch.full((1, 1, 1), 60, dtype=torch.int32)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            blocks = op.select_blocks(scores, count, 1.0, None, cpu)
            results.append(
                (blocks, op.select_blocks(scores, None, 0.9, None, cpu), *op.block_lists(blocks, 300, 64, cpu))
            )
    for other in results[1:]:
        same(other, results[0])


def test_opcheck(cpu):
    ops = torch.ops.pyrx
    blocks, scores = random_blocks(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.library.opcheck(ops.block_lists.default, (blocks, 5, 4))
    torch.library.opcheck(ops.block_lists.default, (blocks[:, :1], 2, 0))
    for always in (None, blocks[:1, :, :1]):
        torch.library.opcheck(
            ops.select_blocks.default, (scores, torch.full((1, 3, 1), 2, dtype=torch.int32), 1.0, always)
        )
        torch.library.opcheck(ops.select_blocks.default, (scores, None, 0.5, always))


# The class: what its constructors cover.


@each_size
@each_length
def test_causal_and_windows(lengths, size):
    q, k = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    mask = BlockMask.causal(lengths, size)
    assert_lists(mask)
    assert torch.equal(mask.to_dense()[0, 0], covered(k <= q, size))
    for left, right in ((0, 0), (5, 0), (0, 7), (40, -1), (-1, 70), (-1, -1), (1000, 1000)):
        allowed = torch.ones(lengths, dtype=torch.bool)
        if left >= 0:
            allowed &= k >= q - left
        if right >= 0:
            allowed &= k <= q + right
        mask = BlockMask.sliding_window(lengths, (left, right), size)
        assert_lists(mask)
        assert torch.equal(mask.to_dense()[0, 0], covered(allowed, size))
        mask = BlockMask.sliding_window(lengths, (left, right), size, is_causal=True)
        assert torch.equal(mask.to_dense()[0, 0], covered(allowed & (k <= q) if right != 0 else allowed, size))


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
