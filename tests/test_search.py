"""Online search: planted blocks are found, and every rule against its definition written out densely."""

import math

import pytest
import torch
from masks import elements_of
from planted import by_blocks, dense_logits, inputs, lse_of, near_diagonal, planted, random_blocks, touched

import pyrx
from pyrx import search
from pyrx.search.measured import head_sparsities


@pytest.fixture(params=["reference", None], ids=["reference", "fastest"])
def backend(request):
    return request.param


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
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 70}, {"window": 1}, {"scale": 0.4}], ids=str)
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
    seen = dense_logits(query, key, **{**options, "key_mask": None}) > -math.inf
    in_sight = touched(seen, size).any(1, keepdim=True)
    reachable = in_sight & touched(key_mask[:, None, None].expand(2, 1, 300, 270), size)
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
    lse = lse_of(query, key)
    found = search.lse_cached(query, key, lse, block_size=size, sparsity=0.75, text_tokens=text, backend=backend)
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
    found = search.vertical_slash(query, key, block_size=16, vertical=31, slash=101, is_causal=True)
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
    found = search.topk_blocks(query, key, topk=3, initial=0, is_causal=True, backend=backend).to_dense()
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


def shares_of(query, key, kept, whole, query_mask=None, **options):
    """{per: recall} of what is kept of the whole attention, bool that broadcast to (B, H, Sq, Sk)."""
    p = torch.softmax(dense_logits(query, key, **options).masked_fill(~whole, -math.inf), -1)
    shares = torch.where(kept & whole, p, 0).sum(-1)
    shares[p.isnan().any(-1)] = 1
    visible = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool) if query_mask is None else query_mask
    heads = torch.stack([each[:, seen].mean(-1) for each, seen in zip(shares, visible, strict=True)])
    return {
        "query": torch.where(visible[:, None], shares, 1).float(),
        "head": heads.float(),
        "all": shares[visible[:, None].expand_as(shares)].mean().float(),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["causal", "window", "documents", "blocks under causal", "documents within", "within"])
def test_recall_minds_the_rule_of_elements(backend, name, padded):
    """Of the mask alone: what the whole attention is, arguments and `within` say."""
    query, key = inputs(queries=150, keys=150)
    size = (32, 16)
    causal, window = pyrx.BlockMask.causal(150, size), pyrx.BlockMask.sliding_window(150, (20, 7), size)
    documents = pyrx.BlockMask.document([40, 100, 10], size)
    blocks = pyrx.BlockMask.from_dense(torch.rand(2, 4, 5, 10) < 0.5, 150, size)
    few = pyrx.BlockMask.from_dense(torch.rand(2, 1, 5, 10) < 0.7, 150, size)
    mask, options, within = {
        "causal": (causal, {}, None),
        "window": (window, {"is_causal": True}, None),
        "documents": (documents, {}, None),
        "blocks under causal": (blocks & causal, {"is_causal": True}, None),
        "documents within": (window, {"scale": 0.5}, documents),
        "within": (blocks, {}, few & causal),
    }[name]
    query_mask = None
    if padded:
        query_mask = torch.rand(2, 150) < 0.7
        query_mask[1, :100] = False
    every = torch.ones(1, 1, 150, 150, dtype=torch.bool)
    whole = every if within is None else elements_of(within)
    expected = shares_of(query, key, elements_of(mask), whole, query_mask, **options)
    assert 0.02 < expected["all"] < 0.98
    for per in ("query", "head", "all"):
        got = search.recall(query, key, mask, per=per, query_mask=query_mask, within=within, backend=backend, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected[per], rtol=1e-4, atol=1e-5)


def test_recall_of_nothing_but_padding():
    query, key = inputs(queries=64, keys=64)
    none = torch.zeros(2, 64, dtype=torch.bool)
    none[0] = True
    heads = search.recall(query, key, pyrx.BlockMask.causal(64, 16), per="head", query_mask=none)
    assert (heads[1] == 1).all() and (heads[0] < 1).all()
    assert search.recall(query, key, pyrx.BlockMask.causal(64, 16), query_mask=none & False) == 1


# What masks bring into a search, and out of it.

SEARCHES = {
    "lse_cached": lambda q, k, **o: search.lse_cached(q, k, lse_of(q, k, **o), block_size=(32, 16), sparsity=0.5, **o),
    "pooled": lambda q, k, **o: search.pooled(q, k, block_size=(32, 16), topk=0.5, **o),
    "vertical_slash": lambda q, k, **o: search.vertical_slash(q, k, block_size=(32, 16), vertical=20, slash=20, **o),
    "topk_blocks": lambda q, k, **o: search.topk_blocks(q, k, block_size=(32, 16), topk=4, **o),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_causal_search_gives_a_causal_mask(name):
    query, key = inputs(kv_heads=4, queries=150, keys=150)
    q, k = torch.arange(150)[:, None], torch.arange(150)
    for options, limits in (({}, (-1, -1)), ({"is_causal": True}, (-1, 0)), ({"window": 30}, (30, 30))):
        if "window" in options and name != "lse_cached":
            continue
        mask = SEARCHES[name](query, key, **options)
        assert mask.window == limits and mask.key_range is None
        seen = expanded(mask, (150, 150))
        seen = seen & (k <= q) if "is_causal" in options else seen & ((q - k).abs() <= 30) if options else seen
        got = pyrx.block_sparse_attention(query, key, key, mask)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, seen)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_adaptive", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_lse_cached_searches_within_a_mask(backend, batch, head_adaptive):
    query, key = inputs(queries=160, keys=160)
    each = torch.tensor([[40, 100, 20], [100, 10, 50]])[:batch]
    size = (32, 16)
    within = pyrx.BlockMask.document(each, size) & pyrx.BlockMask.causal(160, size)
    within = within & pyrx.BlockMask.from_dense((torch.rand(2, 4, 5, 10) < 0.8) | torch.eye(10).bool()[1::2], 160, size)
    seen = elements_of(within)
    out, lse = pyrx.block_sparse_attention(query, key, key, within, enable_gqa=True, return_lse=True)
    options = {"block_size": size, "head_adaptive": head_adaptive, "within": within, "backend": backend}
    mask = search.lse_cached(query, key, lse, sparsity=0.0, **options)
    assert not (elements_of(mask) & ~seen).any()  # nothing that it does not let be seen
    assert torch.equal(elements_of(mask), seen)
    mask = search.lse_cached(query, key, lse, sparsity=0.5, **options)
    assert mask.window == within.window and torch.equal(mask.key_range, within.key_range)
    assert not (elements_of(mask) & ~seen).any()
    mass = by_blocks(torch.softmax(dense_logits(query, key).masked_fill(~seen, -math.inf), -1).nan_to_num(0), size)
    if not head_adaptive:
        kept = mask.to_dense()
        left = torch.where(within.to_dense() & ~kept, mass, -1).amax(-1)
        # beside the diagonal, whatever its mass, a row keeps its best
        near = near_diagonal((160, 160), size)
        assert (torch.where(kept & ~near, mass, math.inf).amin(-1) >= left - 1e-6).all()
        room = (within.to_dense() & ~near).sum(-1)
        assert torch.equal((kept & ~near).sum(-1), (room / 2).round().clamp(min=1).minimum(room).long())


def test_blocks_beyond_the_range_of_keys_are_no_candidates(backend):
    """A mask may list more blocks than its key_range reaches."""
    query, key = inputs(queries=128, keys=128)
    key_range = torch.tensor([20, 60], dtype=torch.int32).expand(1, 128, 2)
    within = pyrx.BlockMask.from_dense(torch.ones(4, 8, dtype=torch.bool), 128, (32, 16), key_range=key_range)
    _, lse = pyrx.block_sparse_attention(query, key, key, within, enable_gqa=True, return_lse=True)
    options = {"block_size": (32, 16), "within": within, "head_adaptive": False, "backend": backend}
    for sparsity, count in ((0.0, 3), (0.4, 2)):
        kept = search.lse_cached(query, key, lse, sparsity=sparsity, **options).to_dense()
        assert (kept.sum(-1) == count).all() and not kept[..., 0].any() and not kept[..., 4:].any()


def test_adaptive_steps_within_a_mask():
    attention = search.AdaptiveSparseAttention(sparsity=0.5, block_size=16, warmup=1, search_steps=(1,))
    within = pyrx.BlockMask.document([60, 68], 16) & pyrx.BlockMask.causal(128, 16)
    query, key, value = (torch.randn(1, 4, 128, 16) for _ in range(3))
    dense = pyrx.block_sparse_attention(query, key, value, within)
    torch.testing.assert_close(attention(query, key, value, 1, within=within), dense)
    mask = attention.block_mask
    assert not (elements_of(mask) & ~elements_of(within)).any() and mask.density() < within.density()
    got = attention(query, key, value, 2, within=within)
    torch.testing.assert_close(got, pyrx.block_sparse_attention(query, key, value, mask))
    assert not torch.equal(got, dense)
