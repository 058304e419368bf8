"""pyrx.BlockMask in use: to FlexAttention's and back, copies and files, torch.compile and fake tensors."""

import copy
import io
import pickle

import pytest
import torch
from masks import assert_lists, covered, elements_of, random_blocks, same_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.utils import _pytree as pytree

import pyrx
from pyrx import BlockMask
from pyrx.reference import block_mask as reference
from pyrx.reference.block_sparse_attention import expand_blocks

# Conversions.


def some_masks():
    """(name, mask) of every kind, with and without batch, heads, key_range and whole blocks."""
    yield "dense", BlockMask.from_dense(random_blocks(2, 3, 4, 5), (256, 320), 64)
    yield "ragged", BlockMask.from_dense(random_blocks(1, 3, 3, 2), (300, 200), 128)
    yield "causal", BlockMask.causal(256)
    yield "window of documents", BlockMask.document([100, 57], 32) & BlockMask.sliding_window(157, (40, 3), 32)
    yield "documents", BlockMask.document([100, 57, 99], (64, 128))
    yield (
        "batch of documents",
        BlockMask.document(torch.tensor([[100, 57], [57, 100]]), 64)
        & BlockMask.from_dense(random_blocks(1, 3, 3, 3), 157, 64),
    )
    yield "nothing", BlockMask.from_dense(torch.zeros(2, 2, dtype=torch.bool))


each_mask = pytest.mark.parametrize("name", [name for name, _ in some_masks()])


def flex_elements(mask, batch, heads):
    """bool (batch, heads, Sq, Sk) that flex_attention's lists and mask_mod say together."""
    given = flex.create_mask(mask.mask_mod, batch, heads, *mask.seq_lengths, device="cpu")
    columns = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    partial = reference.dense_blocks(mask.kv_num_blocks, mask.kv_indices, columns)
    full = reference.dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    assert not (partial & full).any()
    partial, full = (expand_blocks(each, *mask.BLOCK_SIZE, *mask.seq_lengths) for each in (partial, full))
    return given & partial | full, given


@each_mask
def test_to_flex(name):
    mask = dict(some_masks())[name]
    other = mask.to_flex()
    assert other.seq_lengths == mask.seq_lengths and other.BLOCK_SIZE == mask.block_size
    expected = elements_of(mask).expand(2, 3, *mask.seq_lengths)
    for got in flex_elements(other, 2, 3):  # what compiled kernels and what eager mode see
        assert torch.equal(got, expected)
    back = BlockMask.from_flex(other, partial="whole")
    assert_lists(back)
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert back.key_range is None and back.seq_lengths == mask.seq_lengths


@each_mask
def test_flex_attention_agrees(name):
    mask = dict(some_masks())[name]
    q, k, v = (
        torch.randn(2, 3, length, 16, dtype=torch.float64) for length in (*mask.seq_lengths, mask.seq_lengths[1])
    )
    expected = flex.flex_attention(q, k, v, block_mask=mask.to_flex())
    got = pyrx.block_sparse_attention(q, k, v, mask, backend="reference")
    torch.testing.assert_close(got, expected.nan_to_num(0.0))


@pytest.mark.parametrize("size", [(128, 128), (64, 32)], ids=str)
def test_from_flex(size):
    def near(batch, head, query, key):
        return (query - key).abs() <= 40 * (head + 1)

    other = flex.create_block_mask(near, 2, 3, 300, 400, device="cpu", BLOCK_SIZE=size)
    mask = BlockMask.from_flex(other, partial="whole")
    assert_lists(mask)
    elements = flex.create_mask(near, 2, 3, 300, 400, device="cpu")
    assert torch.equal(mask.to_dense(), covered(elements, size))
    lists = flex.BlockMask.from_kv_blocks(
        other.kv_num_blocks, other.kv_indices, BLOCK_SIZE=size, seq_lengths=(300, 400)
    )
    partial = reference.dense_blocks(other.kv_num_blocks, other.kv_indices, other.kv_indices.shape[-1])
    assert torch.equal(BlockMask.from_flex(lists).to_dense(), partial)


def test_from_flex_refuses_a_rule_that_it_cannot_carry():
    def causal(batch, head, query, key):
        return query >= key

    other = flex.create_block_mask(causal, None, None, 256, 256, device="cpu")
    with pytest.raises(ValueError, match=r"BlockMask.from_flex: expected mask_mod to be noop_mask .*, got causal"):
        BlockMask.from_flex(other)
    assert torch.equal(BlockMask.from_flex(other, partial="whole").to_dense(), BlockMask.causal(256).to_dense())
    with pytest.raises(ValueError, match="expected partial to be one of None, 'whole', got 'half'"):
        BlockMask.from_flex(other, partial="half")
    with pytest.raises(
        TypeError, match="expected mask to be a torch.nn.attention.flex_attention.BlockMask, got BlockMask"
    ):
        BlockMask.from_flex(BlockMask.causal(64))


@each_mask
def test_copies_and_files(name):
    mask = dict(some_masks())[name]
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(mask)),
        copy.deepcopy(mask),
        torch.load(file, weights_only=True)["mask"],
        pytree.tree_map(torch.clone, mask),
        mask.to("cpu"),
    ):
        assert isinstance(other, BlockMask)
        same_mask(other, mask)
    assert mask.to("meta").device.type == "meta"
    leaves, tree = pytree.tree_flatten(mask)
    assert pytree.treespec_loads(pytree.treespec_dumps(tree)) == tree


@each_mask
def test_repr_and_plot(name):
    mask = dict(some_masks())[name]
    text = repr(mask)
    assert text.startswith(f"BlockMask({list(mask.shape)} blocks of {mask.block_size[0]} x {mask.block_size[1]}")
    assert ("key_range" in text) == (mask.key_range is not None)
    matplotlib = pytest.importorskip("matplotlib")
    figure = mask.plot(batch=mask.shape[0] - 1, most_heads=2)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert len(figure.axes) == min(mask.shape[1], 2)
    for head, axes in enumerate(figure.axes):
        assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), mask.to_dense()[-1, head])
    figure.savefig(io.BytesIO())
    with pytest.raises(ValueError, match=rf"expected batch in \[0, {mask.shape[0] - 1}\], got 7"):
        mask.plot(batch=7)


# torch.compile and fake tensors.


def builders(lengths):
    """Functions of tensors to masks, all of `lengths` (both the same)."""
    return {
        "dense": lambda x: BlockMask.from_dense(x["blocks"], lengths, 32),
        "lists": lambda x: BlockMask.from_lists(x["counts"], x["indices"], lengths, 32),
        "key_range": lambda x: BlockMask.from_key_range(x["key_range"], lengths, 32),
        "causal": lambda x: BlockMask.causal(lengths, 32),
        "sliding_window": lambda x: BlockMask.sliding_window(lengths, (20, 3), 32),
        "global_tokens": lambda x: BlockMask.global_tokens(x["tokens"], block_size=32),
        "first_tokens": lambda x: BlockMask.global_tokens(5, lengths, 32),
        "strided": lambda x: BlockMask.strided(lengths, 3, 32),
        "document": lambda x: BlockMask.document(x["documents"], 32, seq_lengths=lengths),
        "key_blocks": lambda x: BlockMask.key_blocks(x["tokens"], block_size=32),
        "and": lambda x: BlockMask.causal(lengths, 32) & BlockMask.from_key_range(x["key_range"], lengths, 32),
        "or": lambda x: (
            BlockMask.causal(lengths, 32).whole().__invert__() | BlockMask.from_dense(x["blocks"], lengths, 32)
        ),
        "keep_heads": lambda x: BlockMask.from_dense(x["blocks"], lengths, 32).keep_heads(x["keep"]),
    }


def builder_inputs():
    first = torch.randint(0, 100, (1, 150), dtype=torch.int32)
    return {
        "blocks": random_blocks(2, 3, 5, 5),
        "counts": torch.randint(0, 4, (3, 5), dtype=torch.int32),
        "indices": torch.randint(0, 5, (3, 5, 3), dtype=torch.int32),
        "key_range": torch.stack([first, first + 30], -1),
        "tokens": torch.rand(2, 150) < 0.02,
        "documents": torch.tensor([100, 0, 50]),
        "keep": torch.tensor([True, False, True]),
    }


@pytest.mark.parametrize("name", builders(150))
def test_compiled_masks(fresh_dynamo, name):
    build, inputs = builders(150)[name], builder_inputs()
    got = torch.compile(build, fullgraph=True, backend="aot_eager")(inputs)
    assert isinstance(got, BlockMask)
    same_mask(got, build(inputs))


@pytest.mark.parametrize("name", builders(150))
def test_fake_masks(name):
    build, inputs = builders(150)[name], builder_inputs()
    expected = build(inputs)
    with FakeTensorMode() as mode:
        got = build({key: mode.from_tensor(each) for key, each in inputs.items()})
    for mine, its in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (its.shape, its.dtype, its.stride())


def test_a_mask_goes_through_a_compiled_function(fresh_dynamo):
    def attend(q, mask, keep):
        mask = mask.keep_heads(keep)
        return pyrx.block_sparse_attention(q, q, q, mask, backend="reference"), mask, mask.density()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for tokens in (100, 150, 200):  # the second and third with dynamic shapes
        q, keep = torch.randn(2, 3, tokens, 16), torch.tensor([True, False, True])
        mask = BlockMask.document([tokens - 30, 30], 32)
        (got, got_mask, density), (expected, mask, expected_density) = (f(q, mask, keep) for f in (compiled, attend))
        same_mask(got_mask, mask)
        torch.testing.assert_close(got, expected)
        assert density == expected_density


@pytest.mark.parametrize("build", ["causal", "sliding_window", "strided", "first_tokens", "document"])
def test_compiled_masks_of_any_length(fresh_dynamo, build):
    def density(tokens, documents):
        return builders(tokens.shape[-1])[build]({"documents": documents}).density()

    compiled = torch.compile(density, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (150, 200, 333):
        tokens, documents = torch.ones(2, length, dtype=torch.bool), torch.tensor([length - 30, 30])
        assert compiled(tokens, documents) == density(tokens, documents)


def test_documents_of_ints_tell_their_own_lengths(fresh_dynamo):
    assert BlockMask.document([30, 40], 16, key_lengths=[8, 0], device="meta").seq_lengths == (70, 8)
    compiled = torch.compile(
        lambda x: x + BlockMask.document([30, 40], 16).density(), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.zeros(())) == BlockMask.document([30, 40], 16).density()


def test_compiled_attention_without_a_mask(fresh_dynamo):
    def attend(q):
        return pyrx.block_sparse_attention(q, q, q, is_causal=True, window=40, backend="reference")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (100, 200, 333):
        q = torch.randn(1, 2, tokens, 16)
        torch.testing.assert_close(compiled(q), attend(q))
