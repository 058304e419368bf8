"""The attention module against timm's and PyTorch's, and models whose scaled_dot_product_attention is replaced."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import expected_mask, need
from test_nn import drawn_seed
from torch import nn

import pyrx
from pyrx import BlockMask
from pyrx.nn import BlockSparseAttention, replace_attention

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

timm = pytest.importorskip("timm")
ROWS = ("block_sparse_attention",)
B, S, C, H = 2, 37, 24, 4


@pytest.fixture
def backend(backend):
    return need(backend, ops=ROWS)


def tokens(*shape, seed=0):
    shape = shape or (B, S, C)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def blocks_of(queries=S, keys=S, seed=3):
    """A mask and its (1, H, Sq, Sk); every query sees a key."""
    blocks = torch.rand(H, -(-queries // 16), -(-keys // 16), generator=torch.Generator().manual_seed(seed)) < 0.5
    blocks[..., 0] = True
    full = blocks.repeat_interleave(16, 1)[:, :queries].repeat_interleave(16, 2)[..., :keys]
    return BlockMask.from_dense(blocks, (queries, keys), 16), full[None]


def close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# BlockSparseAttention.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_module_is_timms_attention(backend, bias, masked):
    theirs = timm.layers.Attention(C, H, qkv_bias=bias, proj_bias=bias)
    mask, full = blocks_of() if masked else (None, None)
    module = BlockSparseAttention(C, H, mask, bias=bias, backend=backend)
    module.load_state_dict(theirs.state_dict())
    x = tokens().requires_grad_()
    got, expected = module(x), theirs(x, attn_mask=full)
    close(got, expected)
    upstream = tokens(seed=4)
    for a, b in zip(
        torch.autograd.grad(got, [x, *module.parameters()], upstream),
        torch.autograd.grad(expected, [x, *theirs.parameters()], upstream),
        strict=True,
    ):
        close(a, b, 1e-4)


def multihead(module, kdim=C):
    """MultiheadAttention of the module's weights."""
    theirs = nn.MultiheadAttention(C, H, batch_first=module.batch_first)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(module.qkv.weight)
        theirs.in_proj_bias.copy_(module.qkv.bias)
        theirs.out_proj.weight.copy_(module.proj.weight)
        theirs.out_proj.bias.copy_(module.proj.bias)
    return theirs


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("given", ["query", "key", "key and value"])
def test_cross_attention_is_multihead_attention(backend, batch_first, given):
    module = BlockSparseAttention(C, H, batch_first=batch_first, backend=backend)
    module.qkv.bias.data.normal_()
    query, key, value = tokens(B, 11, C), tokens(seed=1), tokens(seed=2)
    if given == "query":
        key = value = query
    elif given == "key":
        value = key
    arguments = {"query": (), "key": (key,), "key and value": (key, value)}[given]
    hidden = torch.rand(B, key.shape[1], generator=torch.Generator().manual_seed(2)) > 0.7
    if not batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        arguments = tuple(each.transpose(0, 1) for each in arguments)
    got = module(query, *arguments, key_mask=~hidden)
    expected, _ = multihead(module)(query, key, value, key_padding_mask=hidden)
    close(got, expected)


def test_grouped_queries(backend):
    module = BlockSparseAttention(C, H, num_kv_heads=2, is_causal=True, window=9, softcap=3.0, backend=backend)
    x = tokens()
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).split([C, C // 2, C // 2], -1)
    q, k, v = (each.unflatten(-1, (-1, C // H)).transpose(1, 2) for each in (q, k, v))
    out = pyrx.block_sparse_attention(
        q, k, v, is_causal=True, window=9, softcap=3.0, enable_gqa=True, backend="reference"
    )
    close(module(x), module.proj(out.transpose(1, 2).flatten(2)))
    cross = module(x, tokens(seed=5))
    assert cross.shape == x.shape


def test_mask_and_bias_of_a_call(backend):
    module = BlockSparseAttention(C, H, blocks_of()[0], backend=backend)
    other, full = blocks_of(seed=9)
    bias = tokens(1, H, S, S)
    x = tokens()
    got = module(x, block_mask=other, attn_bias=bias)
    theirs = timm.layers.Attention(C, H, qkv_bias=True)
    theirs.load_state_dict(module.state_dict())
    close(got, theirs(x, attn_mask=bias.masked_fill(~full, -math.inf)))


def test_dropout_only_in_training(backend):
    module = BlockSparseAttention(C, H, dropout=0.5, head_dropout=0.5, backend=backend)
    x = tokens()
    seed = int(drawn_seed(3))
    got = module(x)
    assert not torch.equal(got, module(x))
    q, k, v = module.qkv(x).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(q @ k.mT * (C // H) ** -0.5, -1) * expected_mask((B, H, S, S), 0.5, seed) * 2
    keep = expected_mask((B, H), 0.5, seed, sample=1)
    heads = weights @ v * (keep * H / keep.sum(1, keepdim=True).clamp(min=1))[..., None, None]
    close(got, module.proj(heads.transpose(1, 2).flatten(2)))
    module.eval()
    state = torch.get_rng_state()
    assert torch.equal(module(x), module(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mask_moves_with_the_module():
    mask, _ = blocks_of()
    module = BlockSparseAttention(C, H, mask)
    copied = copy.deepcopy(module)
    moved = module.to("meta")
    assert moved.block_mask.device.type == "meta" and mask.device.type == "cpu"
    assert copied.block_mask.device.type == "cpu" and copied.block_mask is not mask
    copied.double()
    assert copied.block_mask.kv_counts.dtype == torch.int32
    assert copied(tokens().double()).dtype == torch.float64
    assert list(copied.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert "num_heads=4" in repr(copied)


def test_compiled_module_and_autocast(backend):
    module = BlockSparseAttention(C, H, blocks_of()[0], dropout=0.2, backend=backend).eval()
    x = tokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    close(got.float(), module(x), 3e-2)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"num_heads": 5}, "expected embed_dim to be a multiple of the 5 heads, got 24"),
        ({"num_heads": 0}, f"expected num_heads in [1, {2**31 - 1}], got 0"),
        ({"num_kv_heads": 3}, "expected num_kv_heads to divide the 4 heads, got 3"),
        ({"num_kv_heads": 8}, "expected num_kv_heads in [1, 4], got 8"),
        ({"dropout": 1.0}, "expected dropout in [0, 1), got 1.0"),
        ({"head_dropout": -0.5}, "expected head_dropout in [0, 1), got -0.5"),
        ({"window": "x"}, "expected window to be an int or a pair (left, right), got 'x'"),
        ({"block_mask": 3}, "expected block_mask to be a pyrx.BlockMask, got int"),
    ],
)
def test_errors_of_the_module(changes, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        BlockSparseAttention(**{"embed_dim": C, "num_heads": H} | changes)
    assert str(caught.value) == f"pyrx::BlockSparseAttention: {text}"


def test_errors_of_a_call(backend):
    module = BlockSparseAttention(C, H, blocks_of()[0], backend=backend)
    with pytest.raises(ValueError, match=r"expected query of shape \[B, S, C\] with C = 24, got \[2, 37, 23\]"):
        module(tokens()[..., 1:])
    with pytest.raises(
        ValueError, match=r"expected block_mask for the lengths \(Sq, Sk\) = \[36, 36\], got \[37, 37\]"
    ):
        module(tokens()[:, 1:])


# replace_attention.


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5, depth=2).eval()


IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
EYE = BlockMask.from_dense(torch.eye(1, dtype=torch.bool), (10, 10), 16)
HALF = BlockMask.from_dense(torch.tensor([[False]]), (10, 10), 16)


def served(monkeypatch):
    """The calls that pyrx serves."""
    from pyrx.nn import block_sparse_attention as module

    calls = []

    def record(query, key, value, mask=None, **options):
        calls.append((tuple(query.shape), mask, options))
        return pyrx.block_sparse_attention(query, key, value, mask, **options)

    monkeypatch.setattr(module, "block_sparse_attention", record)
    return calls


def test_a_vision_transformer_under_a_full_mask(backend, monkeypatch):
    model = vit()
    expected = model(IMAGES)
    calls = served(monkeypatch)
    with replace_attention(backend=backend):
        got = model(IMAGES)
    assert len(calls) == 2 and calls[0][0] == (2, 3, 10, 64)
    close(got, expected)
    parameters = list(model.parameters())
    upstream = tokens(2, 5)
    for a, b in zip(*(torch.autograd.grad(each, parameters, upstream) for each in (got, expected)), strict=True):
        close(a, b, 1e-4)
    with replace_attention(EYE, backend=backend):
        close(model(IMAGES), expected)
    assert torch.equal(model(IMAGES), expected), "outside of the context nothing is replaced"


def test_the_blocks_matter(backend):
    model = vit()
    attention = [block.attn for block in model.blocks]
    for each in attention:
        each.fused_attn = False
    plain = model(IMAGES)
    for each in attention:
        each.fused_attn = True
    with replace_attention(HALF, backend=backend):
        empty = model(IMAGES)
    assert not torch.allclose(empty, plain, atol=1e-3)
    for each in attention:  # what no token attends to: the values give 0, and proj its bias
        each.qkv.weight.data.zero_()
        each.qkv.bias.data.zero_()
    close(empty, model(IMAGES))


def test_what_a_call_says(backend):
    q, k, v = tokens(B, H, S, 8), tokens(B, 2, S - 4, 8, seed=1), tokens(B, 2, S - 4, 8, seed=2)
    mask, full = blocks_of(S, S - 4)
    with replace_attention(mask, backend=backend):
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    visible = full & torch.ones(S, S - 4, dtype=torch.bool).tril()
    visible[..., :1] = True  # every query sees the first key
    close(got, F.scaled_dot_product_attention(q, k, v, visible.expand(B, -1, -1, -1), scale=0.3, enable_gqa=True))
    with replace_attention(backend=backend):
        seed = int(drawn_seed(1))
        got = F.scaled_dot_product_attention(q, k, v, None, 0.25, False, enable_gqa=True)
    expected = pyrx.block_sparse_attention(q, k, v, dropout_p=0.25, seed=seed, enable_gqa=True, backend=backend)
    assert torch.equal(got, expected)
    with replace_attention(window=3, softcap=2.0, generator=torch.Generator(), backend=backend):
        got = F.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True)
    close(got, pyrx.block_sparse_attention(q, k, v, window=3, softcap=2.0, enable_gqa=True, backend=backend))


def masks_of_calls():
    hidden = torch.rand(B, 1, 1, S, generator=torch.Generator().manual_seed(1)) > 0.3
    bias = tokens(B, H, S, S, seed=7)
    return {
        "bool (B, 1, 1, Sk)": hidden,
        "bool (1, 1, 1, Sk)": hidden[:1],
        "bool (1, Sk)": hidden[0, 0],
        "bool (B, 1, Sq, Sk), expanded": hidden.expand(B, 1, S, S),
        "bool (B, H, Sq, Sk), expanded": hidden.expand(B, H, S, S),
        "bool (Sq, Sk)": torch.ones(S, S, dtype=torch.bool).tril(2),
        "bool (B, 1, Sq, Sk)": hidden & torch.ones(S, S, dtype=torch.bool).tril(2),
        "bool (B, H, 1, Sk)": hidden & (bias[:, :, :1] < 1),
        "float (B, H, Sq, Sk)": bias,
        "float (Sq, Sk)": bias[0, 0],
        "float (H, Sq, Sk)": bias[0],
        "float (B, 1, 1, Sk)": torch.zeros(B, 1, 1, S).masked_fill(~hidden, -math.inf),
        "lowest (B, 1, 1, Sk)": torch.zeros(B, 1, 1, S).masked_fill(~hidden, torch.finfo().min),
        "float (1, Sk)": bias[0, 0, :1],
    }


@pytest.mark.parametrize("name", masks_of_calls())
def test_masks_that_a_model_gives(backend, name):
    q, k, v = (tokens(B, H, S, 8, seed=seed) for seed in range(3))
    mask, full = blocks_of()
    given = masks_of_calls()[name]
    if given.dtype != torch.bool:
        given = given.requires_grad_()
    with replace_attention(mask, backend=backend):
        got = F.scaled_dot_product_attention(q, k, v, given)
    as_bias = torch.zeros(given.shape).masked_fill(~given, -math.inf) if given.dtype == torch.bool else given
    logits = (q @ k.mT * 8**-0.5 + as_bias).masked_fill(~full, -math.inf)
    expected = torch.softmax(logits, -1) @ v
    close(got, expected)
    if given.requires_grad:
        upstream = tokens(B, H, S, 8, seed=4)
        close(*(torch.autograd.grad(each, given, upstream)[0] for each in (got, expected)), 1e-4)


@pytest.mark.parametrize("expanded", [False, True])
def test_bool_masks_of_keys_cost_no_bias(monkeypatch, expanded):
    q, hidden = tokens(B, H, S, 8), masks_of_calls()["bool (B, 1, 1, Sk)"]
    seen = []
    served = pyrx.nn.block_sparse_attention.block_sparse_attention
    monkeypatch.setattr(
        pyrx.nn.block_sparse_attention, "block_sparse_attention", lambda *a, **k: seen.append(k) or served(*a, **k)
    )
    with replace_attention():
        F.scaled_dot_product_attention(q, q, q, hidden.expand(B, H, S, S) if expanded else hidden)
    assert seen[0]["bias"] is None and torch.equal(seen[0]["key_mask"], hidden[:, 0, 0])


BAD = [
    ({"attn_mask": torch.ones(B, 2, 1, S, dtype=torch.bool)}, "expected attn_mask of a shape that broadcasts to "
     "[2, 4, 37, 37], got [2, 2, 1, 37]"),
    ({"attn_mask": torch.ones(3, 1, 1, S)}, "expected attn_mask of a shape that broadcasts to [2, 4, 37, 37], got "
     "[3, 1, 1, 37]"),
    ({"attn_mask": torch.ones(S, S).int()}, "expected attn_mask of bool or a floating-point dtype, got torch.int32"),
    ({"query": tokens(H, S, 8)}, "expected query of shape [B, H, S, D], got [4, 37, 8]"),
]  # fmt: skip


@pytest.mark.parametrize("changes, text", BAD)
def test_what_cannot_be_served_raises(backend, changes, text):
    arguments = {name: tokens(B, H, S, 8) for name in ("query", "key", "value")} | changes
    with replace_attention(backend=backend), pytest.raises((ValueError, TypeError)) as caught:
        F.scaled_dot_product_attention(**arguments)
    assert str(caught.value) == f"pyrx::replace_attention: {text}"


@pytest.mark.parametrize("compiled", [False, True])
def test_other_lengths_are_never_dense(backend, compiled):
    model = vit()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with replace_attention(BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), (11, 11), 16), backend=backend):
        with pytest.raises(ValueError, match=r"expected block_mask for the lengths \(Sq, Sk\) = \[10, 10\], got"):
            run(IMAGES)
        with pytest.raises(ValueError, match="expected block_mask for the lengths"):
            F.scaled_dot_product_attention(*[tokens(B, H, S, 8)] * 3)


def test_errors_of_the_context():
    with pytest.raises(TypeError, match="replace_attention: expected block_mask to be a pyrx.BlockMask or callable"):
        replace_attention(3)
    with pytest.raises(TypeError, match="replace_attention: expected only to be callable, got int"):
        replace_attention(only=3)
    with pytest.raises(TypeError, match="replace_attention: expected window to be an int or a pair"):
        replace_attention(window="x")


def test_calls_that_are_chosen(backend, monkeypatch):
    calls = served(monkeypatch)
    self_, cross = tokens(B, H, S, 8), tokens(B, H, 5, 8)
    hidden = torch.rand(S, 5) > 0.5
    expected = F.scaled_dot_product_attention(self_, cross, cross, hidden, scale=0.5)
    mask, full = blocks_of()
    with replace_attention(mask, only=lambda query, key: query.shape == key.shape, backend=backend):
        sparse = F.scaled_dot_product_attention(self_, self_, self_)
        dense = F.scaled_dot_product_attention(self_, cross, cross, hidden, scale=0.5)
    torch.testing.assert_close(dense, expected, equal_nan=True, rtol=0, atol=0)
    close(sparse, F.scaled_dot_product_attention(self_, self_, self_, full.expand(B, -1, -1, -1)))
    assert len(calls) == 1


def test_a_mask_for_each_call(backend):
    seen = []

    def search(query, key):
        seen.append(query.shape)
        return blocks_of()[0] if len(seen) % 2 else None

    x = tokens(B, H, S, 8)
    with replace_attention(search, backend=backend):
        first, second = (F.scaled_dot_product_attention(x, x, x) for _ in range(2))
    close(first, F.scaled_dot_product_attention(x, x, x, blocks_of()[1].expand(B, -1, -1, -1)))
    close(second, F.scaled_dot_product_attention(x, x, x))
    assert len(seen) == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_pytorchs_own_encoder(backend, training, compiled):
    """Neither its fast path in eval, which calls no scaled_dot_product_attention, nor MultiheadAttention's function,
    which a mode overrides as a whole, may hide the call."""
    layer = nn.TransformerEncoderLayer(C, H, 32, dropout=0.0, batch_first=True).train(training)
    x, hidden = tokens(), torch.rand(B, S, generator=torch.Generator().manual_seed(4)) > 0.8
    hidden[:, 0] = False
    mask, full = blocks_of()
    dense = full.masked_fill(hidden[:, None, None], False).expand(B, H, S, S)
    expected = layer(x, src_mask=torch.zeros(B * H, S, S).masked_fill(~dense.flatten(0, 1), -math.inf))
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    with replace_attention(mask, backend=backend), torch.set_grad_enabled(training):
        got = run(x, src_key_padding_mask=hidden)
    close(got, expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_nested_contexts_and_errors_leave_things_as_they_were():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with replace_attention():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    context = replace_attention(HALF)
    x = tokens(B, H, 10, 8)
    with pytest.raises(RuntimeError, match="inside"), context, context, replace_attention(EYE):
        assert (F.scaled_dot_product_attention(x, x, x) != 0).any(), "the innermost serves"
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError("inside")
    assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_models(backend):
    model = vit()
    dense = model(IMAGES)
    with replace_attention(HALF, backend=backend):
        sparse = model(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        close(compiled(IMAGES), dense)
        with replace_attention(HALF, backend=backend):
            close(compiled(IMAGES), sparse)
        with replace_attention(EYE, backend=backend):
            close(compiled(IMAGES), dense)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inside(images):
        with replace_attention(HALF, backend=backend):
            return model(images)

    close(inside(IMAGES), sparse)


def test_compiled_pytorch_inside_of_what_is_compiled(backend):
    layer = nn.TransformerEncoderLayer(C, H, 32, dropout=0.0, batch_first=True).eval()
    mask = blocks_of()[0]

    def run(x):
        with replace_attention(mask, backend=backend):
            return layer(x)

    with torch.no_grad():
        expected = run(tokens())
        assert not torch.allclose(expected, layer(tokens()), atol=1e-3)
        close(torch.compile(run, backend="aot_eager")(tokens()), expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_under_autocast(backend):
    model = vit()
    bias = tokens(H, 10, 10)
    x = tokens(B, H, 10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IMAGES)
        with replace_attention(EYE, backend=backend):
            close(model(IMAGES), expected, 5e-2)
            got = F.scaled_dot_product_attention(x, x, x, bias)
    assert got.dtype == torch.bfloat16
    close(got.float(), F.scaled_dot_product_attention(x, x, x, bias.expand(B, -1, -1, -1)), 3e-2)


@pytest.mark.parametrize("way", ["grad", "backward", "Tensor.backward"])
def test_checkpointed_inside_of_the_context(backend, monkeypatch, way):
    model = vit()
    weight = model.blocks[0].attn.qkv.weight
    with replace_attention(HALF, backend=backend):
        (expected,) = torch.autograd.grad(model(IMAGES).sum(), weight)
    model.set_grad_checkpointing()
    calls = served(monkeypatch)
    with replace_attention(HALF, backend=backend):
        loss = model(IMAGES).sum()
        if way == "grad":
            (got,) = torch.autograd.grad(loss, weight)
        else:
            loss.backward() if way == "Tensor.backward" else torch.autograd.backward(loss)
            got = weight.grad
    assert len(calls) == 4, "the blocks are computed again, by the same attention"
    close(got, expected, 1e-3)
