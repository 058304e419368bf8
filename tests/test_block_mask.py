"""Lists of blocks and the choice of blocks by score: every backend against the definition, and that by hand."""

import pytest
import torch
from helpers import name_of, threads
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pyrx.ops import block_mask as op
from pyrx.reference import block_mask as reference


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


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets_agree(cpu, python, capability, tmp_path):
    rows = {(kind, shape): scores_of(kind, shape) for kind in KINDS for shape in ROWS}
    torch.save(rows, tmp_path / "in.pt")
    script = """
import sys, torch
from pathlib import Path
from pyrx.ops import block_mask as op
folder, found = Path(sys.argv[1]), {}
for name, scores in torch.load(folder / "in.pt").items():
    count = torch.full((1, 1, 1), scores.shape[-1] // 3, dtype=torch.int32)
    found[name] = [op.select_blocks(scores, count, 1.0, None, "cpu"), op.select_blocks(scores, None, 0.7, None, "cpu")]
torch.save(found, folder / "out.pt")
"""
    python(script, tmp_path, ATEN_CPU_CAPABILITY=capability)
    for name, (by_count, by_mass) in torch.load(tmp_path / "out.pt").items():
        scores = rows[name]
        count = torch.full((1, 1, 1), scores.shape[-1] // 3, dtype=torch.int32)
        assert torch.equal(by_count, reference.select_blocks(scores, count, 1.0, None)), name
        assert torch.equal(by_mass, reference.select_blocks(scores, None, 0.7, None)), name


# Errors: the same from the public function, the kernels' own entry and the fake.

BLOCKS, SCORES = torch.ones(2, 3, 4, 5, dtype=torch.bool), torch.ones(2, 3, 4, 5)
COUNT, ALWAYS = torch.ones(1, 3, 1, dtype=torch.int32), torch.ones(1, 1, 4, 5, dtype=torch.bool)
BAD_LISTS = [
    ({"blocks": SCORES}, TypeError, "blocks of dtype torch.bool, got torch.float32"),
    ({"blocks": BLOCKS[0]}, ValueError, "blocks of shape [B or 1, H or 1, NQ, NK], got [3, 4, 5]"),
    ({"kv_width": 6}, ValueError, "kv_width in [0, 5], got 6"),
    ({"kv_width": -1}, ValueError, "kv_width in [0, 5], got -1"),
    ({"q_width": 5}, ValueError, "q_width in [0, 4], got 5"),
]
BAD_SELECTION = [
    ({"scores": SCORES.double()}, TypeError, "scores of dtype torch.float32, got torch.float64"),
    ({"scores": SCORES[0]}, ValueError, "scores of shape [B, H, NQ, NK], got [3, 4, 5]"),
    ({"count": COUNT.long()}, TypeError, "count of dtype torch.int32, got torch.int64"),
    (
        {"count": COUNT[0]},
        ValueError,
        "count of shape [B or 1, H or 1, NQ or 1] of scores of [2, 3, 4, 5], got [3, 1]",
    ),
    (
        {"count": COUNT.repeat(1, 1, 3)},
        ValueError,
        "count of shape [B or 1, H or 1, NQ or 1] of scores of [2, 3, 4, 5], got [1, 3, 3]",
    ),
    ({"count": COUNT.to("meta")}, RuntimeError, "count on device cpu, got meta"),
    ({"count": None, "mass": 1.5}, ValueError, "mass in [0, 1], got 1.5"),
    ({"count": None, "mass": -0.5}, ValueError, "mass in [0, 1], got -0.5"),
    ({"count": None, "mass": float("nan")}, ValueError, "mass in [0, 1], got nan"),
    ({"always": SCORES}, TypeError, "always of dtype torch.bool, got torch.float32"),
    (
        {"always": BLOCKS[:, :, :3]},
        ValueError,
        "always of a shape that broadcasts to the scores' [2, 3, 4, 5], got [2, 3, 3, 5]",
    ),
    (
        {"always": BLOCKS[0]},
        ValueError,
        "always of a shape that broadcasts to the scores' [2, 3, 4, 5], got [3, 4, 5]",
    ),
    ({"always": ALWAYS.to("meta")}, RuntimeError, "always on device cpu, got meta"),
]


def each_way(name, arguments, backend):
    """The op by its Python function, by its own entry, and by its fake."""
    yield lambda: getattr(op, name)(*arguments, backend=backend)
    if backend == "cpu":
        yield lambda: getattr(torch.ops.pyrx, name)(*arguments)

    def fake():
        with FakeTensorMode() as mode:
            getattr(torch.ops.pyrx, name)(
                *(mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in arguments)
            )

    yield fake


@pytest.mark.parametrize(
    "name, given_, changes, error, text",
    [
        *(("block_lists", {"blocks": BLOCKS, "kv_width": 5, "q_width": 4}, *each) for each in BAD_LISTS),
        *(
            ("select_blocks", {"scores": SCORES, "count": COUNT, "mass": 1.0, "always": ALWAYS}, *each)
            for each in BAD_SELECTION
        ),
    ],
)
def test_bad_arguments(backend, name, given_, changes, error, text):
    for call in each_way(name, list((given_ | changes).values()), backend):
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error
        assert str(caught.value) == f"pyrx::{name}: expected {text}"
