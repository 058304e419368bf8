"""Online search: planted blocks are found, every rule against its definition written out densely, caches over steps."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import search
from pyrx.search.measured import head_sparsities


@pytest.fixture(params=["reference", None], ids=["reference", "fastest"])
def backend(request):
    return request.param


def planted(blocks, size, lengths, group=1, strength=4.0, noise=0.05, dim=64):
    """query and key of which every block of queries attends to `blocks` (B, Hkv * group, NQ, NK) alone: each block of
    keys has a direction of its own."""
    batch, heads, q_blocks, k_blocks = blocks.shape
    directions = torch.eye(dim)[:k_blocks] * strength * dim**0.25
    query = (blocks.float() @ directions).repeat_interleave(size[0], 2)[:, :, : lengths[0]]
    key = directions.repeat_interleave(size[1], 0)[: lengths[1]].expand(batch, heads // group, -1, -1)
    return query + noise * torch.randn_like(query), key + noise * torch.randn(key.shape)


def random_blocks(shape, count, generator=None, allowed=None):
    """bool (B, H, NQ, NK), `count` (an int, or one for each row) of a row's allowed ones."""
    scores = torch.rand(shape, generator=generator)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return rank < torch.as_tensor(count)[..., None]


def inputs(heads=4, kv_heads=2, queries=300, keys=300, dim=24, batch=2):
    return torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim)


def dense_logits(query, key, is_causal=False, window=None, scale=None, key_mask=None):
    """float64 (B, H, Sq, Sk), minus infinity where a key is hidden."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    q, k = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    hidden = (k > q) & is_causal
    if window is not None:
        hidden = hidden | ((q - k).abs() > window)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    return logits.masked_fill(hidden, -math.inf)


def lse_of(query, key, **options):
    return torch.logsumexp(dense_logits(query, key, **options), -1).float()


def by_blocks(values, size):
    """Sums of (..., Sq, Sk) over blocks."""
    queries, keys = values.shape[-2:]
    padded = torch.nn.functional.pad(values, (0, -keys % size[1], 0, -queries % size[0]))
    return padded.unflatten(-1, (-1, size[1])).unflatten(-3, (-1, size[0])).sum((-1, -3))


def touched(tokens, size):
    return by_blocks(tokens.float(), size) > 0


def near_diagonal(lengths, size):
    """Blocks (NQ, NK) that hold a query and the key of its position."""
    positions = torch.arange(lengths[0])[:, None] == torch.arange(lengths[1])
    return touched(positions, size)


def expanded(mask, lengths):
    blocks = mask.to_dense()
    size = mask.block_size
    return blocks.repeat_interleave(size[0], 2)[:, :, : lengths[0]].repeat_interleave(size[1], 3)[..., : lengths[1]]


# AdaSpa.


@pytest.mark.parametrize("size, lengths", [((64, 64), (512, 512)), ((32, 16), (250, 333)), ((128, 64), (700, 130))])
@pytest.mark.parametrize("group", [1, 2])
def test_planted_blocks_are_found(backend, size, lengths, group):
    counts = [-(-length // each) for length, each in zip(lengths, size, strict=True)]
    count = max(1, counts[1] // 4)
    truth = random_blocks((2, 4, *counts), count)
    query, key = planted(truth, size, lengths, group)
    found = search.lse_cached(
        query,
        key,
        lse_of(query, key),
        block_size=size,
        sparsity=1 - count / counts[1],
        head_adaptive=False,
        backend=backend,
    )
    assert torch.equal(found.to_dense(), truth)
    assert found.block_size == size and found.seq_lengths == lengths
    assert search.recall(query, key, found, backend=backend) > 0.99
    lost = search.recall(query, key, pyrx.BlockMask.from_dense(~truth, lengths, size), backend=backend)
    assert lost < 0.01


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 70}, {"scale": 0.4}], ids=str)
def test_rows_keep_the_blocks_of_most_mass(backend, options, sparsity):
    query, key = inputs(keys=270)
    key_mask = torch.rand(2, 270) < 0.8
    key_mask[:, 64:128] = False  # a whole block
    size, lengths = (32, 64), (300, 270)
    options = {**options, "key_mask": key_mask}
    logits = dense_logits(query, key, **options)
    lse = torch.logsumexp(logits, -1)
    mass = by_blocks(torch.exp(logits - lse[..., None]).nan_to_num(0), size)
    found = search.lse_cached(
        query,
        key,
        lse.float(),
        block_size=size,
        sparsity=sparsity,
        head_adaptive=False,
        backend=backend,
        **options,
    ).to_dense()
    reachable = (mass > 0).any(1, keepdim=True)
    diagonal = (
        near_diagonal(lengths, size) & reachable if len(options) > 1 and "scale" not in options else reachable & False
    )
    for b in range(2):
        for h in range(4):
            for row in range(mass.shape[2]):
                able = [j for j in range(mass.shape[3]) if reachable[b, 0, row, j] and not diagonal[b, 0, row, j]]
                count = max(1, round((1 - sparsity) * len(able)))
                best = sorted(able, key=lambda j: -mass[b, h, row, j])[:count]
                expected = set(best) | set(diagonal[b, 0, row].nonzero().flatten().tolist())
                assert set(found[b, h, row].nonzero().flatten().tolist()) == expected


def test_an_old_lse_chooses_nearly_the_same():
    truth = random_blocks((1, 4, 8, 8), 2)
    query, key = planted(truth, (64, 64), (512, 512))
    lse = lse_of(query, key)
    options = {"sparsity": 0.75, "head_adaptive": False}
    expected = search.lse_cached(query, key, lse, **options).to_dense()
    assert torch.equal(search.lse_cached(query, key, lse + 3 * torch.rand(1, 4, 1), **options).to_dense(), expected)


def test_head_sparsities_by_hand():
    recalls = torch.tensor([[0.9, 0.5, 0.85, 0.1], [0.9, 0.95, 0.99, 0.85], [0.1, 0.2, 0.3, 0.4]])
    # two above .8; four, of which two count; none
    expected = torch.tensor([[0.9, 0.7, 0.9, 0.7], [0.7, 0.9, 0.9, 0.7], [0.8, 0.8, 0.8, 0.8]])
    torch.testing.assert_close(head_sparsities(recalls, 0.8, 0.8), expected)
    torch.testing.assert_close(head_sparsities(recalls[:1], 0.2, 0.8), torch.tensor([[0.4, 0.0, 0.4, 0.0]]))
    torch.testing.assert_close(
        head_sparsities(torch.tensor([[0.9, 0.9, 0.9]]), 0.5, 0.8), torch.tensor([[0.75, 0.5, 0.25]])
    )
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        found = head_sparsities(torch.rand(50, 7), sparsity, 0.5)
        torch.testing.assert_close(found.mean(-1), torch.full((50,), sparsity))
        assert (found >= -1e-6).all() and (found <= 1 + 1e-6).all()


def test_concentrated_heads_become_sparser(backend):
    # heads 1 and 3 attend to one block, heads 0, 2 and 4 to all of them
    truth = torch.ones(1, 5, 10, 10, dtype=torch.bool)
    truth[:, 1] = truth[:, 3] = torch.eye(10, dtype=torch.bool)
    query, key = planted(truth, (32, 32), (320, 320), strength=3.5)
    lse = lse_of(query, key)
    found = search.lse_cached(query, key, lse, block_size=32, sparsity=0.8, backend=backend)
    per_row = found.kv_counts.flatten(0, 1)
    # the two above .8 keep 1 of 10, the two of the lowest recall 3, the other 2
    assert per_row[1].eq(1).all() and per_row[3].eq(1).all()
    assert sorted(per_row[head, 0].item() for head in (0, 2, 4)) == [2, 3, 3]
    assert all(len(row.unique()) == 1 for row in per_row)
    assert found.density().item() == pytest.approx(0.2)
    assert (found.to_dense() | ~truth)[:, [1, 3]].all()
    even = search.lse_cached(query, key, lse, block_size=32, sparsity=0.8, recall_threshold=1.0, backend=backend)
    assert (even.kv_counts == 2).all()
    uniform = search.lse_cached(query, key, lse, block_size=32, head_adaptive=False, backend=backend)
    assert torch.equal(uniform.to_dense(), even.to_dense())


@pytest.mark.parametrize("text", [(0, 50), (256, 300), (100, 101), (64, 128), (0, 0), (0, 300)], ids=str)
def test_text_blocks_are_always_kept(backend, text):
    query, key = inputs(queries=300, keys=300)
    size = (32, 64)
    found = search.lse_cached(
        query, key, lse_of(query, key), block_size=size, sparsity=0.75, text_tokens=text, backend=backend
    )
    position = torch.arange(300)
    is_text = (position >= text[0]) & (position < text[1])
    always = touched(is_text[:, None] | is_text, size)
    dense = found.to_dense()
    assert dense[:, :, always].all()
    room = (~always).sum(-1)
    chosen = (dense & ~always).sum(-1)
    for head, share in zip(range(4), chosen.double().mean((0, 2)), strict=True):
        assert abs(share - 0.25 * room.double().mean()) <= 0.25 * room.max(), head
    uniform = search.lse_cached(
        query,
        key,
        lse,
        block_size=size,
        sparsity=0.75,
        text_tokens=text,
        head_adaptive=False,
        backend=backend,
    )
    expected = torch.minimum((0.25 * room).round().clamp(min=1).long(), room)
    assert torch.equal((uniform.to_dense() & ~always).sum(-1), expected.expand(2, 4, -1))


def test_always_blocks_are_kept_beside_the_others():
    query, key = inputs(queries=256, keys=256)
    lse = lse_of(query, key)
    free = search.lse_cached(query, key, lse, sparsity=0.5, head_adaptive=False).to_dense()
    for shape in ((4, 4), (4, 1, 4), (2, 1, 1, 4), (1, 4, 4, 1)):
        always = torch.rand(shape) < 0.5
        found = search.lse_cached(query, key, lse, sparsity=0.5, head_adaptive=False, always=always).to_dense()
        room = (~always.expand(2, 4, 4, 4)).sum(-1)
        assert found[always.expand(2, 4, 4, 4)].all()
        assert torch.equal((found & ~always).sum(-1), torch.minimum((0.5 * room).round().clamp(min=1).long(), room))
    assert torch.equal(free.sum(-1), torch.full((2, 4, 4), 2))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 3}, {"window": (0, 5)}], ids=str)
def test_no_query_is_left_without_a_key(options):
    query, key = inputs(queries=200, keys=200)
    searches = [
        lambda: search.lse_cached(query, key, torch.zeros(2, 4, 200), block_size=(64, 16), sparsity=1.0, **options)
    ]
    if "is_causal" in options:
        searches += [
            lambda: search.pooled(query, key, mass=0.0, similarity_threshold=-1.0, **options),
            lambda: search.vertical_slash(query, key, block_size=(64, 16), vertical=0, slash=0, **options),
            lambda: search.topk_blocks(query, key, block_size=(64, 16), topk=1, local=0, initial=0, **options),
        ]
    for find in searches:
        mask = find()
        _, own = pyrx.block_sparse_attention(query, key, key, mask, enable_gqa=True, return_lse=True, **options)
        assert own.isfinite().all()
        assert mask.density() < 0.7


# SpargeAttn.


def expected_pooled(query, key, size, threshold, mass, topk, is_causal):
    """Block by block in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    query, key = query.double(), key - key.mean(2, keepdim=True)
    lengths, scale = (query.shape[2], key.shape[2]), query.shape[-1] ** -0.5
    position = torch.arange(max(lengths))
    seen = position[: lengths[0], None] >= position[: lengths[1]]
    reachable = touched(seen | (not is_causal), size)
    blocks = torch.zeros(*query.shape[:2], *reachable.shape, dtype=torch.bool)

    def parts(x, block):
        return [x[first : first + block] for first in range(0, len(x), block)]

    def alike(part):
        unit = torch.nn.functional.normalize(part, dim=-1)
        return (unit @ unit.T).mean() > threshold

    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            rows, columns = parts(query[b, h], size[0]), parts(key[b, h], size[1])
            good = [alike(part) for part in columns]
            for i, row in enumerate(rows):
                able = [j for j in range(len(columns)) if reachable[i, j] and good[j]]
                logits = (
                    torch.stack([row.mean(0) @ columns[j].mean(0) * scale for j in able]) if able else torch.zeros(0)
                )
                shares = dict(zip(able, logits.softmax(0).tolist(), strict=True))
                order = sorted(able, key=lambda j: -shares[j])
                if topk is None:
                    count, total = 0, 0.0
                    while count < len(order) and total + shares[order[count]] <= mass:
                        total += shares[order[count]]
                        count += 1
                else:
                    count = round(topk * int(reachable[i].sum()))
                kept = set(order[: max(1, count)])
                kept |= {j for j in range(len(columns)) if not good[j] or not alike(row)}
                blocks[b, h, i, list(kept)] = True
    return blocks & reachable | (near_diagonal(lengths, size) & is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("topk", [None, 0.3, 0.0])
@pytest.mark.parametrize("mass", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("size", [(128, 64), (16, 32)])
def test_pooled_is_its_definition(backend, size, mass, topk, is_causal):
    query, key = inputs(queries=290, keys=260, batch=1)
    # some blocks of tokens about one direction, the others noise
    query[:, :, :256] += 3 * (torch.randn(1, 4, 2, 24)).repeat_interleave(128, 2)
    key[:, :, :128] += 4 * (torch.randn(1, 2, 2, 24)).repeat_interleave(64, 2)
    expected = expected_pooled(query, key, size, 0.6, mass, topk, is_causal)
    found = search.pooled(query, key, block_size=size, mass=mass, topk=topk, is_causal=is_causal, backend=backend)
    assert torch.equal(found.to_dense(), expected)
    assert found.block_size == size


# MInference.


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("vertical, slash", [(0, 0), (40, 0), (0, 110), (35, 120), (1000, 6096)])
@pytest.mark.parametrize("size, lengths, last", [((32, 32), (400, 400), 64), ((64, 16), (150, 350), 20)])
def test_vertical_slash_is_its_definition(backend, size, lengths, last, vertical, slash, is_causal):
    query, key = inputs(queries=lengths[0], keys=lengths[1], batch=1)
    probabilities = torch.softmax(dense_logits(query, key, is_causal=is_causal)[:, :, -last:], -1)
    found = search.vertical_slash(
        query,
        key,
        block_size=size,
        last_queries=last,
        vertical=vertical,
        slash=slash,
        is_causal=is_causal,
        backend=backend,
    ).to_dense()
    q, k = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    distance = q - k
    seen = (distance >= 0) | (not is_causal)
    last_distance = distance[-last:]
    for h in range(4):
        p = probabilities[0, h]
        columns = {j: 1000 - j if j < 30 else p[:, j].sum().item() for j in range(lengths[1])}
        diagonals = {
            d: 1000 - abs(d) if abs(d) < 100 else p[last_distance == d].sum().item()
            for d in last_distance.unique().tolist()
            if d >= 0 or not is_causal
        }
        best = sorted(columns, key=lambda j: -columns[j])[:vertical]
        tokens = torch.isin(k, torch.tensor(best, dtype=torch.long)).expand_as(distance).clone()
        ranked = sorted(diagonals, key=lambda d: -diagonals[d])
        tokens |= torch.isin(distance, torch.tensor(ranked[:slash], dtype=torch.long))
        # whole blocks in reach: a line through a block's hidden corner counts
        expected = touched(tokens, size) & touched(seen, size) | (near_diagonal(lengths, size) & is_causal)
        assert torch.equal(found[0, h], expected)


def test_planted_lines_are_found():
    dim, keys, stripe, period = 32, 512, 200, 128
    query, key = 0.05 * torch.randn(1, 1, keys, dim), 0.05 * torch.randn(1, 1, keys, dim)
    key[..., 0], query[..., 0] = 0, 8
    key[:, :, stripe, 0] = 8
    # phases: a query's logits are greatest at keys a whole number of periods away
    angle = torch.arange(keys) * (2 * math.pi / period)
    for x in (query, key):
        x[..., 1], x[..., 2] = 6 * angle.cos(), 6 * angle.sin()
    found = search.vertical_slash(query, key, block_size=16, vertical=31, slash=101)
    assert found.to_dense()[0, 0, 13:, stripe // 16].all()
    lines = found.to_dense()[0, 0, -1].nonzero().flatten().tolist()
    assert set(range(25, 32)) <= set(lines) and {0, 1, stripe // 16} <= set(lines)
    assert len(lines) <= 13


# NSA.


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("topk, local, initial", [(4, 1, 1), (3, 2, 0), (1, 3, 2), (2, 0, 0), (100, 1, 1)])
@pytest.mark.parametrize("size", [(32, 32), (64, 16)])
def test_topk_blocks_is_its_definition(backend, size, topk, local, initial, is_causal):
    query, key = inputs(queries=250, keys=270)
    found = search.topk_blocks(
        query, key, block_size=size, topk=topk, local=local, initial=initial, is_causal=is_causal, backend=backend
    ).to_dense()
    count = -(-270 // size[1])
    means = torch.stack([part.double().mean(2) for part in key.split(size[1], 2)], 2)
    q, last = torch.arange(250)[:, None], (torch.arange(count) + 1) * size[1] - 1
    visible = (last.clamp(max=269) <= q) | (not is_causal)
    logits = dense_logits(query, means).masked_fill(~visible, -math.inf)
    p = torch.softmax(logits, -1).nan_to_num(0).unflatten(1, (2, 2)).sum(2)
    scores = by_blocks(p, (size[0], 1))
    seen = (q >= torch.arange(270)) | (not is_causal)
    reachable = touched(seen, size)
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 2], found[:, 3])
    for b in range(2):
        for h in range(2):
            for row in range(scores.shape[2]):
                able = [j for j in range(count) if reachable[row, j]]
                own = [j for j in able if near_diagonal((250, 270), size)[row, j]]
                forced = {j for j in able if j < initial} | (set(own) if is_causal else set())
                if local and own:
                    around = range(min(own) - local + 1, max(own) + (local if not is_causal else 1))
                    forced |= {j for j in able if j in around}
                rest = sorted((j for j in able if j not in forced), key=lambda j: -scores[b, h, row, j])
                expected = forced | set(rest[: max(0, topk - len(forced))])
                assert set(found[b, 2 * h, row].nonzero().flatten().tolist()) == expected, (b, h, row)


def test_planted_blocks_are_selected(backend):
    before = torch.ones(8, 8, dtype=torch.bool).tril(-1)
    truth = random_blocks((2, 1, 8, 8), torch.arange(8).clamp(max=2), allowed=before).repeat_interleave(4, 1)
    query, key = planted(truth, (64, 64), (512, 512), group=4)
    found = search.topk_blocks(query, key, topk=3, initial=0, backend=backend).to_dense()
    assert (found | ~truth).all() and torch.equal(found[:, :, 3:], (truth | torch.eye(8, dtype=torch.bool))[:, :, 3:])


# Recall.


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 40}, {"scale": 0.7}], ids=str)
def test_recall_is_the_share_of_the_attention(backend, options):
    query, key = inputs(queries=150, keys=170)
    options = {**options, "key_mask": torch.rand(2, 170) < 0.7}
    mask = pyrx.BlockMask.from_dense(torch.rand(2, 4, 5, 3) < 0.5, (150, 170), (32, 64))
    p = torch.softmax(dense_logits(query, key, **options), -1)
    kept = expanded(mask, (150, 170))
    shares = torch.where(kept, p, 0).sum(-1).float()
    blind = p.isnan().any(-1)
    shares[blind] = 1
    for per, expected in (("query", shares), ("head", shares.mean(-1)), ("all", shares.mean())):
        got = search.recall(query, key, mask, per=per, backend=backend, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_recall_minds_the_key_range():
    query, key = inputs(queries=64, keys=64)
    key_range = torch.tensor([[[0, 40]]], dtype=torch.int32).expand(1, 64, 2).contiguous()
    mask = pyrx.BlockMask.from_dense(torch.tensor([[True, False], [False, True]]), (64, 64), 32, key_range=key_range)
    p = torch.softmax(dense_logits(query, key[:, :, :40]), -1)
    expected = torch.cat([p[:, :, :32, :32], torch.nn.functional.pad(p[:, :, 32:, 32:], (0, 24))], 2).sum(-1)
    torch.testing.assert_close(search.recall(query, key, mask, per="query"), expected.float(), rtol=1e-4, atol=1e-5)


# Across denoising steps.


def drifting(steps, heads=4):
    """query, key, value of every step, about planted blocks: 2 of 8 a row."""
    truth = random_blocks((1, heads, 8, 8), 2)
    query, key = planted(truth, (32, 32), (256, 256), strength=3.0)
    value, change = torch.randn(1, heads, 256, 16), torch.randn(2, 1, heads, 256, 64)
    for step in range(steps):
        far = 0.3 * step / steps
        yield query + far * change[0] + 0.1 * torch.randn_like(query), key + far * change[1], value


def test_adaptive_steps():
    attention = search.AdaptiveSparseAttention(
        sparsity=0.75, block_size=32, warmup=3, search_steps=(3, 6), head_adaptive=False
    )
    lse, mask = None, None
    for step, (query, key, value) in enumerate(drifting(9), 1):
        got = attention(query, key, value, step)
        dense, own = pyrx.block_sparse_attention(query, key, value, return_lse=True)
        if step == 3:
            lse = own
        if step in (3, 6):
            mask = search.lse_cached(query, key, lse, sparsity=0.75, block_size=32, head_adaptive=False)
        expected = dense if step <= 3 else pyrx.block_sparse_attention(query, key, value, mask)
        torch.testing.assert_close(got, expected)
        assert (attention.block_mask is None) == (step < 3)
        if step >= 3:
            assert torch.equal(attention.block_mask.to_dense(), mask.to_dense())
            assert torch.equal(attention.lse, lse) and not attention.lse.requires_grad
            assert search.recall(query, key, attention.block_mask) > 0.9
            assert (got - dense).abs().max() < 0.6
            fresh = search.lse_cached(query, key, own, sparsity=0.75, block_size=32, head_adaptive=False)
            kept = [search.recall(query, key, each) for each in (attention.block_mask, fresh)]
            assert kept[0] > kept[1] - 0.02
    assert not torch.equal(got, dense) and not attention.state_dict()


def test_adaptive_forgets():
    def fresh():
        return search.AdaptiveSparseAttention(block_size=16, warmup=1, search_steps=(1,))

    def draw(queries=64):
        return [torch.randn(1, 2, queries, 16) for _ in range(3)]

    attention, x = fresh(), draw()
    attention(*x, 1)
    mask = attention.block_mask
    attention(*draw(), 2)
    attention(*draw(), 2)
    assert attention.block_mask is mask
    # a new run, other shapes, a reset: each searches by itself
    y = draw()
    torch.testing.assert_close(attention(*y, 1), pyrx.block_sparse_attention(*y))
    assert attention.block_mask is not mask
    z = draw(80)
    torch.testing.assert_close(attention(*z, 3), pyrx.block_sparse_attention(*z))
    assert attention.block_mask.seq_lengths == (80, 80)
    attention.reset()
    assert attention.block_mask is None and attention.lse is None
    torch.testing.assert_close(attention(*x, 7), pyrx.block_sparse_attention(*x))
    assert attention.block_mask is not None
    never = search.AdaptiveSparseAttention(block_size=16, warmup=0, search_steps=())
    torch.testing.assert_close(never(*x, 1), pyrx.block_sparse_attention(*x))
    assert (never(*x, 2) - pyrx.block_sparse_attention(*x)).abs().max() > 0.1
    two = torch.nn.ModuleList([fresh(), fresh()])
    two[0](*x, 1)
    assert two[1].block_mask is None
    assert "sparsity=0.8" in repr(two[0])


def test_adaptive_options_reach_attention():
    x = [torch.randn(2, heads, 96, 16) for heads in (4, 2, 2)]
    key_mask = torch.rand(2, 96) < 0.7
    options = {"is_causal": True, "scale": 0.5, "softcap": 3.0}
    attention = search.AdaptiveSparseAttention(block_size=16, warmup=1, search_steps=(1,), sparsity=0.4, **options)
    dense, lse = pyrx.block_sparse_attention(*x, enable_gqa=True, key_mask=key_mask, return_lse=True, **options)
    torch.testing.assert_close(attention(*x, 1, key_mask=key_mask), dense)
    mask = search.lse_cached(*x[:2], lse, block_size=16, sparsity=0.4, key_mask=key_mask, **options)
    expected = pyrx.block_sparse_attention(*x, mask, enable_gqa=True, key_mask=key_mask, **options)
    torch.testing.assert_close(attention(*x, 2, key_mask=key_mask), expected)


def test_adaptive_trains():
    x = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
    attention = search.AdaptiveSparseAttention(block_size=16, warmup=1, search_steps=(1,))
    for step in (1, 2):
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(attention(*x, step).square().sum(), x))


# All of them.

SEARCHES = {
    "lse_cached": lambda q, k, lse: search.lse_cached(q, k, lse, block_size=32, text_tokens=(0, 10)),
    "lse_cached causal": lambda q, k, lse: search.lse_cached(q, k, lse, block_size=32, is_causal=True),
    "pooled": lambda q, k, lse: search.pooled(q, k, block_size=32, is_causal=True),
    "pooled topk": lambda q, k, lse: search.pooled(q, k, topk=0.5, similarity_threshold=-1.0),
    "vertical_slash": lambda q, k, lse: search.vertical_slash(q, k, block_size=32, vertical=40, slash=110),
    "topk_blocks": lambda q, k, lse: search.topk_blocks(q, k, block_size=32, topk=3),
}


def arguments(dtype=torch.float32, queries=200):
    query, key = inputs(queries=queries, keys=queries)
    return query.to(dtype), key.to(dtype), lse_of(query, key)


@pytest.mark.parametrize("name", SEARCHES)
def test_compiled(name):
    torch._dynamo.reset()
    compiled = torch.compile(SEARCHES[name], fullgraph=True)
    for queries in (200, 264):
        given = arguments(queries=queries)
        got, expected = compiled(*given), SEARCHES[name](*given)
        assert isinstance(got, pyrx.BlockMask) and got.seq_lengths == (queries, queries)
        assert got.block_size == expected.block_size
        assert torch.equal(got.to_dense(), expected.to_dense())


def test_compiled_recall_and_attention():
    def step(query, key, value, lse):
        mask = search.lse_cached(query, key, lse, block_size=32)
        out = pyrx.block_sparse_attention(query, key, value, mask, enable_gqa=True)
        return out, search.recall(query, key, mask)

    query, key, lse = arguments()
    given = (query, key, torch.randn_like(key), lse)
    for one, other in zip(torch.compile(step, fullgraph=True)(*given), step(*given), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", SEARCHES)
def test_no_value_is_read_on_the_host(name):
    given = arguments()
    mode = FakeTensorMode()  # raises where Python asks for a value
    fake = [mode.from_tensor(each) for each in given]
    with mode:
        got = SEARCHES[name](*fake)
    expected = SEARCHES[name](*given)
    assert [each.shape for each in got.lists] == [each.shape for each in expected.lists]
    assert [each.dtype for each in got.lists] == [each.dtype for each in expected.lists]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(name, dtype):
    query, key, lse = arguments(dtype)
    got = SEARCHES[name](query, key, lse.to(torch.float64 if dtype == torch.float64 else torch.float32))
    exact = SEARCHES[name](query.float(), key.float(), lse)
    assert (got.to_dense() == exact.to_dense()).float().mean() > 0.95


@pytest.mark.parametrize("name", SEARCHES)
def test_any_strides_and_no_gradient(name):
    query, key, lse = arguments()
    expected = SEARCHES[name](query, key, lse).to_dense()
    q = query.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = key.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    found = SEARCHES[name](q, k, lse)
    assert torch.equal(found.to_dense(), expected)
    assert not any(each.requires_grad for each in found.lists)
    assert torch.equal(found.kv_counts.sum((0, 1)), found.to_dense().sum((0, 1, 3), dtype=torch.int32))


@pytest.mark.parametrize("shape", [(0, 4, 40), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("name", [each for each in SEARCHES if "text" not in each and each != "lse_cached"])
def test_empty(name, shape):
    query = torch.randn(*shape, 16)
    found = SEARCHES[name](query, query, torch.zeros(shape))
    assert found.to_dense().shape[:2] == shape[:2] and found.seq_lengths == (shape[2], shape[2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEARCHES)
def test_on_a_gpu_nothing_waits(name):
    given = arguments()
    on_gpu = [each.cuda() for each in given]
    SEARCHES[name](*on_gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = SEARCHES[name](*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = SEARCHES[name](*given)
    assert (found.to_dense().cpu() == expected.to_dense()).float().mean() > 0.98


# Bad input.

Q, K = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
LSE = torch.zeros(1, 4, 64)
TEXT = "text_tokens within the tokens that are queries and keys, [0, 64], got"
ERRORS = [
    ("lse_cached", {"query": [1]}, TypeError, "query to be a Tensor, got list"),
    ("lse_cached", {"key": K[:, :, :, :4]}, ValueError, "key of the query's head size 8, got 4"),
    ("lse_cached", {"sparsity": 1.5}, ValueError, "sparsity in [0, 1], got 1.5"),
    ("lse_cached", {"sparsity": None}, TypeError, "sparsity to be a float, got NoneType"),
    ("lse_cached", {"recall_threshold": -0.1}, ValueError, "recall_threshold in [0, 1], got -0.1"),
    ("lse_cached", {"block_size": 48}, ValueError, "block_size to be one of 16, 32, 64, 128, got 48"),
    ("lse_cached", {"text_tokens": (10, 65)}, ValueError, f"{TEXT} (10, 65) of 64 queries"),
    ("lse_cached", {"text_tokens": (10, 5)}, ValueError, f"{TEXT} (10, 5) of 64 queries"),
    ("lse_cached", {"text_tokens": 3}, TypeError, "text_tokens to be a pair (start, stop), got 3"),
    ("lse_cached", {"always": torch.ones(4, 4)}, TypeError, "always of dtype torch.bool, got torch.float32"),
    (
        "lse_cached",
        {"always": torch.ones(3, 1, dtype=torch.bool), "block_size": 32},
        ValueError,
        "always of a shape that broadcasts to the blocks' [1, 4, 2, 2], got [3, 1]",
    ),
    ("lse_cached", {"softcap": 0.0}, ValueError, "softcap above 0, or None, got 0.0"),
    ("pooled", {"mass": 1.1}, ValueError, "mass in [0, 1], got 1.1"),
    ("pooled", {"topk": 16}, ValueError, "topk in [0, 1], got 16"),
    ("pooled", {"similarity_threshold": "x"}, TypeError, "similarity_threshold to be a float, got str"),
    (
        "pooled",
        {"key": K[:, :1].expand(1, 3, 64, 8)},
        ValueError,
        "key of a number of heads that divides the query's 4, got 3",
    ),
    ("vertical_slash", {"last_queries": 0}, ValueError, "last_queries in [1, 2147483647], got 0"),
    ("vertical_slash", {"slash": -1}, ValueError, "slash in [0, 2147483647], got -1"),
    ("vertical_slash", {"vertical": 0.5}, TypeError, "vertical to be an int, got float"),
    ("topk_blocks", {"topk": 0}, ValueError, "topk in [1, 2147483647], got 0"),
    ("topk_blocks", {"local": -1}, ValueError, "local in [0, 2147483647], got -1"),
    ("topk_blocks", {"query": Q.half()}, TypeError, "key of dtype torch.float16, got torch.float32"),
    ("recall", {"block_mask": None}, TypeError, "block_mask to be a pyrx.BlockMask, got NoneType"),
    ("recall", {"per": "row"}, ValueError, "per to be one of 'all', 'head', 'query', got 'row'"),
]


@pytest.mark.parametrize("name, changes, error, text", ERRORS, ids=[f"{each[0]}: {each[3]}"[:90] for each in ERRORS])
def test_errors(name, changes, error, text):
    given = {"query": Q, "key": K}
    if name == "lse_cached":
        given["lse"] = LSE
    if name == "recall":
        given["block_mask"] = pyrx.BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), (64, 64), 64)
    with pytest.raises(error) as caught:
        getattr(search, name)(**{**given, **changes})
    assert str(caught.value) == f"pyrx::search.{name}: expected {text}"


def test_errors_of_the_ops_below():
    for lse, error in ((LSE.double(), TypeError), (LSE[:, :2], ValueError), (LSE.to("meta"), RuntimeError)):
        with pytest.raises(error, match="pyrx::block_mass: expected lse"):
            search.lse_cached(Q, K, lse)
    other = pyrx.BlockMask.from_dense(torch.ones(2, 1, dtype=torch.bool), (100, 64), 64)
    with pytest.raises(ValueError, match=r"block_mask for the lengths \(Sq, Sk\) = \[64, 64\], got \[100, 64\]"):
        search.recall(Q, K, other)


ADAPTIVE_ERRORS = [
    ({"sparsity": 2.0}, ValueError, "sparsity in [0, 1], got 2.0"),
    ({"warmup": -1}, ValueError, "warmup in [0, 2147483647], got -1"),
    ({"search_steps": (0,)}, ValueError, "search_steps in [1, 2147483647], got 0"),
    ({"block_size": 8}, ValueError, "block_size to be one of 16, 32, 64, 128, got 8"),
]


@pytest.mark.parametrize("changes, error, text", ADAPTIVE_ERRORS, ids=[each[2] for each in ADAPTIVE_ERRORS])
def test_adaptive_errors(changes, error, text):
    with pytest.raises(error) as caught:
        search.AdaptiveSparseAttention(**changes)
    assert str(caught.value) == f"pyrx::search.AdaptiveSparseAttention: expected {text}"


def test_adaptive_step_error():
    with pytest.raises(ValueError, match=r"expected step in \[1, 2147483647\], got 0"):
        search.AdaptiveSparseAttention()(Q, K, K, 0)
