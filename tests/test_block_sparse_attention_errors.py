"""Bad calls of attention over listed blocks: type and text of every error, by public function, kernel and fake."""

import math

import pytest
import torch
from attention import ROW, attention, raw
from helpers import need
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library

CALL = attention(
    2, 4, 40, 48, 8, kv_heads=2, value_size=12, block=(16, 32), bias=(2, 1), key_mask=True, query_scale=True,
    dtype=torch.float32,
)  # fmt: skip
Q, K, V, MASK, BIAS = CALL.query, CALL.key, CALL.value, CALL.mask, CALL.row_bias
MASKED, SCALE = CALL.key_mask, CALL.query_scale
RANGE = torch.tensor([0, 48], dtype=torch.int32).repeat(2, 40, 1)
ROWS_OF_BIAS, COLUMNS = BIAS[..., :6], BIAS[..., :8]
FLOATS = "of dtype float16, bfloat16, float32 or float64"
SHAPE = "of shape [B, H, S, D]"


def meta(tensor):
    return tensor.to("meta")


def masked(**changes):
    names = ("kv_counts", "kv_indices", "q_counts", "q_indices", "block_size", "seq_lengths", "key_range")
    return pyrx.BlockMask(*({name: getattr(MASK, name) for name in names} | changes).values())


# What the op itself checks: (error, changes of its arguments, text).
QUERY_ROWS = [
    (TypeError, {"query": Q.long()}, f"query {FLOATS}, got torch.int64"),
    (ValueError, {"query": Q[0]}, f"query {SHAPE}, got [4, 40, 8]"),
    (TypeError, {"key": K.bool()}, f"key {FLOATS}, got torch.bool"),
    (ValueError, {"key": K[0]}, f"key {SHAPE}, got [2, 48, 8]"),
    (TypeError, {"key": K.double()}, "key of dtype torch.float32, got torch.float64"),
    (RuntimeError, {"key": meta(K)}, "key on device cpu, got meta"),
    (ValueError, {"query": Q[..., :0], "key": K[..., :0]}, "query of a head size in [1, 256], got 0"),
    (
        ValueError,
        {"query": Q.repeat(1, 1, 1, 40)[..., :257], "key": K.repeat(1, 1, 1, 40)[..., :257]},
        "query of a head size in [1, 256], got 257",
    ),
    (ValueError, {"key": K[:1]}, "key of the query's batch size 2, got 1"),
    (ValueError, {"key": K[:, :1].expand(-1, 3, -1, -1)}, "key of a number of heads that divides the query's 4, got 3"),
    (ValueError, {"key": K[:, :0]}, "key of a number of heads that divides the query's 4, got 0"),
    (ValueError, {"key": K.repeat(1, 4, 1, 1)}, "key of a number of heads that divides the query's 4, got 8"),
    (ValueError, {"key": K[..., :7]}, "key of the query's head size 8, got 7"),
]
VALUE_ROWS = [
    (TypeError, {"value": V.long()}, f"value {FLOATS}, got torch.int64"),
    (ValueError, {"value": V[0]}, f"value {SHAPE}, got [2, 48, 12]"),
    (TypeError, {"value": V.bfloat16()}, "value of dtype torch.float32, got torch.bfloat16"),
    (RuntimeError, {"value": meta(V)}, "value on device cpu, got meta"),
    (ValueError, {"value": V[:1]}, "value of the query's batch size 2, got 1"),
    (ValueError, {"value": V[:, :1]}, "value of shape [B, Hkv, Sk, Dv] = [2, 2, 48, 12], got [2, 1, 48, 12]"),
    (ValueError, {"value": V[:, :, 1:]}, "value of shape [B, Hkv, Sk, Dv] = [2, 2, 48, 12], got [2, 2, 47, 12]"),
    (ValueError, {"value": V[..., :0]}, "value of a head size in [1, 256], got 0"),
    (ValueError, {"value": V.repeat(1, 1, 1, 30)[..., :257]}, "value of a head size in [1, 256], got 257"),
]
LOGIT_ROWS = [
    (TypeError, {"key_mask": MASKED.float()}, "key_mask of dtype torch.bool, got torch.float32"),
    (ValueError, {"key_mask": MASKED[:1]}, "key_mask of shape [B, Sk] = [2, 48], got [1, 48]"),
    (ValueError, {"key_mask": MASKED[:, :40]}, "key_mask of shape [B, Sk] = [2, 48], got [2, 40]"),
    (RuntimeError, {"key_mask": meta(MASKED)}, "key_mask on device cpu, got meta"),
    (ValueError, {"query_scale": SCALE[:, :1]}, "query_scale of shape [B, H, Sq] = [2, 4, 40], got [2, 1, 40]"),
    (ValueError, {"query_scale": SCALE[..., None]}, "query_scale of shape [B, H, Sq] = [2, 4, 40], got [2, 4, 40, 1]"),
    (RuntimeError, {"query_scale": meta(SCALE)}, "query_scale on device cpu, got meta"),
]
ONLY_RAW_ROWS = [
    (TypeError, {"query_scale": SCALE.double()}, "query_scale of dtype torch.float32, got torch.float64"),
    (TypeError, {"key_range": RANGE.long()}, "key_range of dtype torch.int32, got torch.int64"),
    *[
        (
            ValueError,
            {"key_range": each},
            f"key_range of shape [B or 1, Sq, 2] = [2 or 1, 40, 2], got {list(each.shape)}",
        )
        for each in (RANGE[0], RANGE[:, :39], RANGE[..., :1], RANGE[:1].repeat(3, 1, 1))
    ],
    (RuntimeError, {"key_range": meta(RANGE)}, "key_range on device cpu, got meta"),
    (ValueError, {"left": -2}, "left and right of at least 0, or -1 for no limit, got [-2, -1]"),
    (ValueError, {"right": -5}, "left and right of at least 0, or -1 for no limit, got [-1, -5]"),
    (TypeError, {"row_bias": BIAS.double()}, "row_bias of dtype torch.float32, got torch.float64"),
    (RuntimeError, {"row_bias": meta(BIAS)}, "row_bias on device cpu, got meta"),
    *[
        (
            ValueError,
            {"row_bias": each},
            f"row_bias of shape [B or 1, H or 1, Sq, ...] of a query [2, 4, 40, 8], got {list(each.shape)}",
        )
        for each in (BIAS[0], BIAS[:, :, :1], BIAS.expand(2, 2, 40, 48), BIAS[:1].expand(3, 1, 40, 48))
    ],
    (ValueError, {"row_bias": BIAS[..., :1]}, "row_bias of 48 keys along the last dimension, got [2, 1, 40, 1]"),
    (ValueError, {"row_bias": None, "column_bias": COLUMNS}, "column_bias with a row_bias, got None"),
    (
        ValueError,
        {"row_bias": ROWS_OF_BIAS, "column_bias": BIAS[..., :7]},
        "column_bias of a last dimension that divides the 48 keys, got 7",
    ),
    (
        ValueError,
        {"row_bias": ROWS_OF_BIAS, "column_bias": BIAS[..., :0]},
        "column_bias of a last dimension that divides the 48 keys, got 0",
    ),
    (
        ValueError,
        {"row_bias": BIAS[..., :5], "column_bias": COLUMNS},
        "row_bias of 6 keys along the last dimension, got [2, 1, 40, 5]",
    ),
    (
        TypeError,
        {"row_bias": ROWS_OF_BIAS, "column_bias": COLUMNS.half()},
        "column_bias of dtype torch.float32, got torch.float16",
    ),
    (
        ValueError,
        {"row_bias": ROWS_OF_BIAS, "column_bias": COLUMNS[:, :, 1:]},
        "column_bias of shape [B or 1, H or 1, Sq, ...] of a query [2, 4, 40, 8], got [2, 1, 39, 8]",
    ),
    (
        RuntimeError,
        {"row_bias": ROWS_OF_BIAS, "column_bias": meta(COLUMNS)},
        "column_bias on device cpu, got meta",
    ),
    *[(ValueError, {"scale": each}, f"scale to be finite, got {each}") for each in (math.inf, -math.inf, math.nan)],
    *[
        (ValueError, {"softcap": each}, f"softcap to be finite and not negative, got {each}")
        for each in (-1.5, math.inf, math.nan)
    ],
    *[
        (ValueError, {"q_block": each}, f"q_block to be one of 16, 32, 64, 128, got {each}")
        for each in (0, 8, 24, 256, -16)
    ],
    (ValueError, {"k_block": 1}, "k_block to be one of 16, 32, 64, 128, got 1"),
    *[(ValueError, {"threshold": each}, f"threshold in [0, 65536), got {each}") for each in (-1, 65536)],
    (ValueError, {"threshold": 5}, "seed for a threshold above 0, got None"),
    (TypeError, {"seed": torch.tensor(1.0)}, "seed of dtype torch.int64, got torch.float32"),
    (ValueError, {"seed": torch.tensor([1, 2])}, "seed of one element, got [2]"),
    (RuntimeError, {"seed": meta(torch.tensor(1))}, "seed on device cpu, got meta"),
]
# of the mask's lists, which the public function hands on as they are
KV, LISTS = MASK.kv_counts, "of shape [B or 1, H or 1, 3] for a query of [2, 4, 40, 8]"
LIST_ROWS = [
    (TypeError, {"kv_counts": KV.long()}, "kv_counts of dtype torch.int32, got torch.int64"),
    (TypeError, {"kv_indices": MASK.kv_indices.float()}, "kv_indices of dtype torch.int32, got torch.float32"),
    (TypeError, {"q_counts": MASK.q_counts.bool()}, "q_counts of dtype torch.int32, got torch.bool"),
    (TypeError, {"q_indices": MASK.q_indices.long()}, "q_indices of dtype torch.int32, got torch.int64"),
    (RuntimeError, {"kv_counts": meta(KV)}, "kv_counts on device cpu, got meta"),
    (RuntimeError, {"kv_indices": meta(MASK.kv_indices)}, "kv_indices on device cpu, got meta"),
    (RuntimeError, {"q_counts": meta(MASK.q_counts)}, "q_counts on device cpu, got meta"),
    (RuntimeError, {"q_indices": meta(MASK.q_indices)}, "q_indices on device cpu, got meta"),
    (ValueError, {"kv_counts": KV[0]}, f"kv_counts {LISTS}, got [1, 3]"),
    (ValueError, {"kv_counts": KV[..., :2]}, f"kv_counts {LISTS}, got [1, 1, 2]"),
    (ValueError, {"kv_counts": KV.expand(3, 1, 3)}, f"kv_counts {LISTS}, got [3, 1, 3]"),
    (ValueError, {"kv_counts": KV.expand(1, 2, 3)}, f"kv_counts {LISTS}, got [1, 2, 3]"),
    (ValueError, {"kv_indices": MASK.kv_indices[0]}, "kv_indices of shape [1, 1, 3, 'W'], got [1, 3, 4]"),
    (
        ValueError,
        {"kv_indices": MASK.kv_indices[:, :, :2]},
        "kv_indices of shape [..., W] = [1, 1, 3, 4], got [1, 1, 2, 4]",
    ),
    (
        ValueError,
        {"q_counts": MASK.q_counts[..., :1]},
        "q_counts of shape [B or 1, H or 1, 2] for a query of [2, 4, 40, 8], got [1, 1, 1]",
    ),
    (
        ValueError,
        {"q_indices": MASK.q_indices.expand(2, 1, 2, -1)},
        f"q_indices of shape [..., W] = [1, 1, 2, {MASK.q_indices.shape[3]}], got [2, 1, 2, {MASK.q_indices.shape[3]}]",
    ),
    (
        ValueError,
        {"kv_counts": KV.expand(2, 1, 3), "kv_indices": MASK.kv_indices.expand(2, 1, 3, -1)},
        "q_counts of the leading dimensions of kv_counts [2, 1], got [1, 1, 2]",
    ),
]
RAW_ROWS = [*QUERY_ROWS, *VALUE_ROWS, *LOGIT_ROWS, *ONLY_RAW_ROWS, *LIST_ROWS]

# What the public function says of its own arguments; of these lists it names the mask.
MASK_SHAPE = "block_mask of shape [B or 1, H or 1, NQ, NK] for a query of [2, 4, 40, 8]"
MASK_ROWS = [
    (RuntimeError, {"kv_counts": meta(KV)}, "block_mask on device cpu, got meta"),
    (ValueError, {"kv_counts": KV.expand(3, 1, 3)}, f"{MASK_SHAPE}, got [3, 1, 3, 2]"),
    (ValueError, {"kv_counts": KV.expand(1, 2, 3)}, f"{MASK_SHAPE}, got [1, 2, 3, 2]"),
]
OF_LISTS = {
    "kv_counts on device cpu, got meta",
    f"kv_counts {LISTS}, got [3, 1, 3]",
    f"kv_counts {LISTS}, got [1, 2, 3]",
}
PUBLIC_ROWS = [
    *[row for row in QUERY_ROWS if "[B, H, S, D]" not in row[2]],
    *VALUE_ROWS,
    *LOGIT_ROWS,
    *[(error, {"block_mask": masked(**changes)}, text) for error, changes, text in LIST_ROWS if text not in OF_LISTS],
    *[(error, {"block_mask": masked(**changes)}, text) for error, changes, text in MASK_ROWS],
    *[(TypeError, {name: [1.0]}, f"{name} to be a Tensor, got list") for name in ("query", "key", "value")],
    (ValueError, {"query": Q[0]}, f"query and key {SHAPE}, got [[4, 40, 8], [2, 2, 48, 8]]"),
    (ValueError, {"key": K[0, 0]}, f"query and key {SHAPE}, got [[2, 4, 40, 8], [48, 8]]"),
    (ValueError, {"enable_gqa": False}, "key of the query's 4 heads (or enable_gqa=True), got 2"),
    (TypeError, {"block_mask": CALL.blocks}, "block_mask to be a pyrx.BlockMask, got Tensor"),
    (TypeError, {"block_mask": "causal"}, "block_mask to be a pyrx.BlockMask, got str"),
    (
        ValueError,
        {"block_mask": masked(seq_lengths=(40, 49))},
        "block_mask for the lengths (Sq, Sk) = [40, 48], got [40, 49]",
    ),
    (
        ValueError,
        {"block_mask": masked(seq_lengths=(48, 40))},
        "block_mask for the lengths (Sq, Sk) = [40, 48], got [48, 40]",
    ),
    (ValueError, {"block_mask": masked(block_size=(16, 24))}, "k_block to be one of 16, 32, 64, 128, got 24"),
    (ValueError, {"block_mask": masked(block_size=(256, 32))}, "q_block to be one of 16, 32, 64, 128, got 256"),
    (TypeError, {"block_mask": masked(key_range=RANGE.long())}, "key_range of dtype torch.int32, got torch.int64"),
    *[(ValueError, {"dropout_p": each}, f"dropout_p in [0, 1), got {each}") for each in (1.0, -0.1, 1, math.nan)],
    (TypeError, {"dropout_p": "0.5"}, "dropout_p to be a float, got str"),
    (TypeError, {"dropout_p": True}, "dropout_p to be a float, got bool"),
    (TypeError, {"dropout_p": 0.5, "seed": 0.5}, "seed to be an int, got float"),
    (TypeError, {"dropout_p": 0.5, "seed": torch.tensor(1.0)}, "seed of dtype torch.int64, got torch.float32"),
    (ValueError, {"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, "seed of one element, got [2]"),
    (RuntimeError, {"dropout_p": 0.5, "seed": meta(torch.tensor(1))}, "seed on device cpu, got meta"),
    (
        ValueError,
        {"dropout_p": 0.5, "seed": 1, "generator": torch.Generator()},
        "at most one of seed and generator, got both",
    ),
    (TypeError, {"dropout_p": 0.5, "generator": 3}, "generator to be a torch.Generator, got int"),
    *[
        (TypeError, {"window": each}, f"window to be an int or a pair (left, right), got {each!r}")
        for each in (1.5, (1, 2, 3), "4")
    ],
    (ValueError, {"window": -2}, "window in [-1, 2147483647], got -2"),
    (ValueError, {"window": -3, "block_mask": None}, "window in [-1, 2147483647], got -3"),
    (ValueError, {"window": (3, 2**31)}, "window in [-1, 2147483647], got 2147483648"),
    (TypeError, {"window": (1.0, 2)}, "window to be an int, got float"),
    (TypeError, {"window": (True, 2)}, "window to be an int, got bool"),
    *[(TypeError, {name: "1"}, f"{name} to be a float, got str") for name in ("scale", "softcap")],
    *[(ValueError, {"scale": each}, f"scale to be finite, got {each}") for each in (math.inf, math.nan)],
    *[(ValueError, {"softcap": each}, f"softcap above 0, or None, got {each}") for each in (0, 0.0, -1.5, math.nan)],
    (ValueError, {"softcap": math.inf}, "softcap to be finite and not negative, got inf"),
    (TypeError, {"query_scale": 0.5}, "query_scale to be a Tensor, got float"),
    (TypeError, {"query_scale": SCALE.long()}, f"query_scale {FLOATS}, got torch.int64"),
    (TypeError, {"key_mask": [True]}, "key_mask to be a Tensor, got list"),
    (TypeError, {"bias": 0.5}, "bias to be a Tensor, got float"),
    (TypeError, {"bias": [BIAS, BIAS]}, "bias to be a Tensor, got list"),
    (TypeError, {"bias": (BIAS, None)}, "bias[1] to be a Tensor, got NoneType"),
    (TypeError, {"bias": (0.5, BIAS)}, "bias[0] to be a Tensor, got float"),
    (ValueError, {"bias": (BIAS,)}, "bias to be a Tensor or a pair (row, column), got 1 tensors"),
    (TypeError, {"bias": BIAS.double()}, "row_bias of dtype torch.float32, got torch.float64"),
    (ValueError, {"bias": BIAS[..., :1]}, "row_bias of 48 keys along the last dimension, got [2, 1, 40, 1]"),
    (
        ValueError,
        {"bias": (ROWS_OF_BIAS, BIAS[..., :7])},
        "column_bias of a last dimension that divides the 48 keys, got 7",
    ),
    (ValueError, {"backend": "gpu"}, "backend to be one of 'reference', 'cpu', 'cuda', 'triton', got 'gpu'"),
]


@pytest.mark.parametrize("error, changes, text", PUBLIC_ROWS, ids=[row[2][:90] for row in PUBLIC_ROWS])
def test_public_function(backend, error, changes, text):
    need(backend, ops=(ROW,))
    arguments = {
        "query": Q,
        "key": K,
        "value": V,
        "block_mask": MASK,
        "enable_gqa": True,
        "key_mask": MASKED,
        "query_scale": SCALE,
        "bias": BIAS,
        "backend": backend,
    }
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        pyrx.block_sparse_attention(**arguments | changes)
    assert type(caught.value) is error and str(caught.value) == f"pyrx::{ROW}: expected {text}"
    assert torch.equal(torch.get_rng_state(), state)


def test_the_tables_good_calls_are_good(backend):
    assert CALL(backend)[0].isfinite().all()
    ops = _library.namespace(need("cpu", ops=(ROW,)))
    ops.block_sparse_attention(**forward_arguments())
    assert len(ops.block_sparse_attention_backward(**backward_arguments())) == 6


# The ops: kernel and fake say the same.


def forward_arguments():
    names = [each.name for each in torch.ops.pyrx.block_sparse_attention.default._schema.arguments]
    return dict(zip(names, [*raw(CALL), True], strict=True))


def backward_arguments():
    arguments = forward_arguments()
    del arguments["want_entropy"]
    rows = torch.zeros(2, 4, 40)
    out = torch.zeros(2, 4, 40, 12)
    return {
        "grad": out,
        "grad_lse": rows,
        "grad_entropy": rows,
        "out": out,
        "lse": rows,
        "entropy": rows,
        **arguments,
        "needs": [True] * 5 + [False],
    }


def raised(op, arguments):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        op(**arguments)
    return type(caught.value), str(caught.value)


def assert_alike(name, arguments, error, text):
    op = getattr(_library.namespace(need("cpu", ops=(ROW,))), name)
    real = raised(op, arguments)
    assert real == (error, f"pyrx::{name}: expected {text}")
    with FakeTensorMode() as mode:
        fake = raised(op, {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert fake == real


@pytest.mark.parametrize("error, changes, text", RAW_ROWS, ids=[row[2][:90] for row in RAW_ROWS])
def test_kernel_and_fake(cpu, error, changes, text):
    assert_alike(ROW, forward_arguments() | changes, error, text)
    assert_alike(f"{ROW}_backward", backward_arguments() | changes, error, text)


OUT, LSE = torch.zeros(2, 4, 40, 12), torch.zeros(2, 4, 40)
BACKWARD_ROWS = [
    *[
        row
        for name in ("grad", "out")
        for row in (
            (TypeError, {name: OUT.double()}, f"{name} of dtype torch.float32, got torch.float64"),
            (ValueError, {name: OUT[..., :8]}, f"{name} of shape [B, H, Sq, Dv] = [2, 4, 40, 12], got [2, 4, 40, 8]"),
            (ValueError, {name: OUT[0]}, f"{name} of shape [B, H, Sq, Dv] = [2, 4, 40, 12], got [4, 40, 12]"),
            (RuntimeError, {name: meta(OUT)}, f"{name} on device cpu, got meta"),
        )
    ],
    *[
        row
        for name in ("lse", "grad_lse", "grad_entropy", "entropy")
        for row in (
            (TypeError, {name: LSE.double()}, f"{name} of dtype torch.float32, got torch.float64"),
            (ValueError, {name: LSE[:, :1]}, f"{name} of shape [B, H, Sq] = [2, 4, 40], got [2, 1, 40]"),
            (RuntimeError, {name: meta(LSE)}, f"{name} on device cpu, got meta"),
        )
    ],
    (ValueError, {"entropy": LSE[:0, 0, 0]}, "entropy of shape [B, H, Sq] = [2, 4, 40], got [0]"),
    (ValueError, {"needs": [True] * 6}, "column_bias for its gradient, got None"),
    (ValueError, {"row_bias": None}, "row_bias for its gradient, got None"),
    (ValueError, {"query_scale": None}, "query_scale for its gradient, got None"),
]


@pytest.mark.parametrize("error, changes, text", BACKWARD_ROWS, ids=[row[2][:90] for row in BACKWARD_ROWS])
def test_backward_kernel_and_fake(cpu, error, changes, text):
    assert_alike(f"{ROW}_backward", backward_arguments() | changes, error, text)


def test_backends_that_cannot_serve():
    for backend, reason in (("cuda", "its GPU kernels are Triton's"), ("triton", "it serves device cuda")):
        with pytest.raises(RuntimeError, match=f"pyrx::{ROW}: expected backend that serves .* {reason}"):
            pyrx.block_sparse_attention(Q, Q, Q, backend=backend)


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_numbers_beyond_the_dtype_of_logits(backend, name):
    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"pyrx::block_sparse_attention: expected {name} of at most 3.4e\\+38"):
        pyrx.block_sparse_attention(query, query, query, **{name: 1e300}, backend=backend)
    pyrx.block_sparse_attention(*[query.double()] * 3, **{name: 1e300}, backend=backend)
