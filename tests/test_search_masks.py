"""Search of padded batches: every sample's blocks are those that it has alone, and hidden tokens change nothing."""

import pytest
import torch
from planted import inputs

import pyrx
from pyrx import search

SIZE = 32
# every rule of a search by itself, and all together
SEARCHES = {
    "pooled": lambda *x, **options: search.pooled(*x, block_size=SIZE, mass=0.7, similarity_threshold=-1.0, **options),
    "pooled, not alike": lambda *x, **options: search.pooled(*x, block_size=SIZE, mass=0.5, **options),
    "pooled topk": lambda *x, **options: search.pooled(
        *x, block_size=SIZE, topk=0.4, similarity_threshold=0.05, **options
    ),
    "vertical": lambda *x, **options: search.vertical_slash(
        *x, block_size=SIZE, last_queries=40, vertical=34, slash=0, **options
    ),
    "slash": lambda *x, **options: search.vertical_slash(
        *x, block_size=SIZE, last_queries=40, vertical=0, slash=105, **options
    ),
    "vertical_slash": lambda *x, **options: search.vertical_slash(
        *x, block_size=SIZE, vertical=32, slash=110, **options
    ),
    "topk_blocks": lambda *x, **options: search.topk_blocks(*x, block_size=SIZE, topk=4, **options),
    "topk_blocks alone": lambda *x, **options: search.topk_blocks(
        *x, block_size=SIZE, topk=2, local=0, initial=0, **options
    ),
}


@pytest.fixture(params=["reference", None], ids=["reference", "fastest"])
def backend(request):
    return request.param


def masked(lengths, tokens, left=False):
    position = torch.arange(tokens)
    return torch.stack([position >= tokens - each if left else position < each for each in lengths])


def alike(lengths, tokens):
    """Query and key of which some blocks' tokens are about one direction, with garbage where they are padding."""
    query, key = inputs(queries=tokens, keys=tokens, batch=len(lengths))
    query[:, :, :96] += 4 * torch.randn(len(lengths), 4, 1, query.shape[3])
    key[:, :, 32:160] += 4 * torch.randn(len(lengths), 2, 1, key.shape[3])
    hidden = ~masked(lengths, tokens)[:, None, :, None]
    return query.masked_fill(hidden, torch.nan), key.masked_fill(hidden, torch.nan)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SEARCHES)
def test_padded_is_alone(backend, name, is_causal):
    lengths = [400, 301, 256, 75, 12, 0]
    query, key = alike(lengths, 400)
    mask = masked(lengths, 400)
    options = {"is_causal": is_causal, "backend": backend}
    found = SEARCHES[name](query, key, key_mask=mask, query_mask=mask, **options).to_dense()
    for b, length in enumerate(lengths):
        alone = SEARCHES[name](query[b : b + 1, :, :length], key[b : b + 1, :, :length], **options).to_dense()[0]
        blocks = alone.shape[-1]
        assert torch.equal(found[b, :, :blocks, :blocks], alone), length
        assert not found[b, :, blocks:].any() and not found[b, :, :, blocks:].any(), length


@pytest.mark.parametrize("name", SEARCHES)
def test_padding_on_the_left(backend, name):
    """Shifted by whole blocks a sequence has its blocks, shifted."""
    query, key = alike([200], 200)
    shifted = [torch.nn.functional.pad(x, (0, 0, 3 * SIZE, 0), value=torch.inf) for x in (query, key)]
    mask = masked([200], 200 + 3 * SIZE, left=True)
    options = {"is_causal": True, "backend": backend}
    found = SEARCHES[name](*shifted, key_mask=mask, query_mask=mask, **options).to_dense()
    assert torch.equal(found[:, :, 3:, 3:], SEARCHES[name](query, key, **options).to_dense())
    assert not found[:, :, :3].any() and not found[..., :3].any()


def test_causal_padding_sees_no_keys():
    """Without a key_mask too: no place goes to keys that queries of padding alone would see."""
    query, key = inputs(queries=512, keys=512)
    mask = masked([272, 144], 512)
    for options in ({"topk": 8}, {"topk": 2, "local": 0, "initial": 0}):
        options |= {"block_size": (128, 16), "is_causal": True}
        found = search.topk_blocks(query, key, query_mask=mask, **options).to_dense()
        for b, length in enumerate((272, 144)):
            x, y = query[b : b + 1, :, :length], key[b : b + 1, :, :length]
            alone = search.topk_blocks(x, y, **options).to_dense()[0]
            assert torch.equal(found[b, :, : alone.shape[1], : alone.shape[2]], alone)
            assert found[b].sum() == alone.sum()


@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_hidden_is_no_mask(backend, name):
    query, key = inputs(queries=150, keys=330)
    masks = {"key_mask": torch.ones(2, 330, dtype=torch.bool), "query_mask": torch.ones(2, 150, dtype=torch.bool)}
    found = SEARCHES[name](query, key, backend=backend, **masks)
    assert torch.equal(found.to_dense(), SEARCHES[name](query, key, backend=backend).to_dense())


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_scattered_keys(backend, name, is_causal):
    """Hidden keys anywhere: what they hold changes nothing, and blocks of none but them are dropped."""
    query, key = inputs(queries=330, keys=330)
    mask = torch.rand(2, 330) < 0.5
    mask[0, 96:160], mask[1, :64] = False, False
    options = {"key_mask": mask, "is_causal": is_causal, "backend": backend}
    found = SEARCHES[name](query, key, **options).to_dense()
    garbage = torch.where(mask[:, None, :, None], key, 1e4 * torch.randn_like(key))
    assert torch.equal(SEARCHES[name](query, garbage, **options).to_dense(), found)
    assert not found[0, ..., 3:5].any() and not found[1, ..., :2].any()
    assert found[:, :, 2:].any(-1).all()


def test_hidden_keys_have_no_place_among_the_first():
    """MInference's first 30 keys and NSA's first blocks are the first that are visible."""
    query, key = inputs(queries=256, keys=256)
    mask = (torch.arange(256) % 2 == 0).expand(2, -1).clone()
    mask[:, :32] = False
    vertical = search.vertical_slash(query, key, block_size=16, vertical=30, slash=0, key_mask=mask).to_dense()
    assert vertical[..., 2:6].all() and not vertical[..., :2].any() and not vertical[..., 6:].any()
    blocks = search.topk_blocks(query, key, block_size=16, topk=2, local=0, initial=2, key_mask=mask).to_dense()
    assert blocks[..., 2:4].all() and blocks.sum() == blocks[..., 2:4].numel()


def test_the_last_visible_queries_are_asked():
    """Of two samples only the padding differs: a key that the queries before it attend to is found."""
    query, key = 0.01 * torch.randn(2, 1, 256, 16), 0.01 * torch.randn(2, 1, 256, 16)
    key[:, :, 200, 0] = 10
    query[0, :, 60:128, 0], query[1, :, 188:, 0] = 10, 10
    mask = masked([128, 256], 256)
    options = {"block_size": 16, "vertical": 31, "slash": 0}
    found = search.vertical_slash(query, key, query_mask=mask, **options).to_dense()
    assert found[0, 0, :8, 12].all() and found[1, 0, :, 12].all() and not found[0, 0, 8:].any()
    assert not search.vertical_slash(query, key, **options).to_dense()[0, 0, :, 12].any()


def test_attention_of_a_padded_batch():
    """Search and attention together: no NaN of the padding reaches a query, and recall counts what is seen."""
    lengths = [200, 70]
    query, key = (torch.randn(2, 2, 200, 16) for _ in range(2))
    mask = masked(lengths, 200)
    for find in (search.pooled, search.topk_blocks, search.vertical_slash):
        blocks = find(query, key, block_size=16, key_mask=mask, query_mask=mask)
        out = pyrx.block_sparse_attention(query, key, key, blocks, key_mask=mask)
        for b, length in enumerate(lengths):
            x, y = query[b : b + 1, :, :length], key[b : b + 1, :, :length]
            expected = pyrx.block_sparse_attention(x, y, y, find(x, y, block_size=16))
            torch.testing.assert_close(out[b : b + 1, :, :length], expected)
            # rows of padding alone
            assert not out[b, :, -(-length // 16) * 16 :].any()
