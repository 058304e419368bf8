"""Bad input of dropout, its heads and mixed_cross_entropy: the type and the text of every error, from the public
functions, the ops' kernels and their fakes."""

import math

import pytest
import torch
from errors import GENERATOR_ROWS, SEED_ROWS, check, row
from helpers import need
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrx
from pyrx import _library

X, W, Y = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 4])
MIXED, MIXED_LAM = pyrx.MixedTarget(Y, Y.flip(0), torch.rand(4)), torch.rand(4, 2)
PROBABILITIES = torch.softmax(torch.randn(4, 5), 1)
FLOATS = "of dtype float16, bfloat16, float32 or float64"
TENSORS = "to be a Tensor or a MixedTarget of Tensors"
IDS = "of class ids in [0, 5) or ignore_index = -100"


P_ROWS = [
    row("p", "in [0, 1)", "1.0", p=1.0),
    row("p", "in [0, 1)", "1", p=1),
    row("p", "in [0, 1)", "-0.1", p=-0.1),
    row("p", "in [0, 1)", "nan", p=math.nan),
    row("p", "to be a float", "str", TypeError, p="0.5"),
    row("p", "to be a float", "bool", TypeError, p=True),
    row("p", "to be a float", "Tensor", TypeError, p=torch.tensor(0.5)),
]
SAMPLE_ROWS = [
    row("sample", "in [0, 4294967295]", "-1", sample=-1),
    row("sample", "in [0, 4294967295]", "4294967296", sample=2**32),
    row("sample", "to be an int", "float", TypeError, sample=1.0),
]
INPUT_ROWS = [
    row("input", FLOATS, "torch.int64", TypeError, input=torch.ones(3, dtype=torch.int64)),
    row("input", FLOATS, "torch.bool", TypeError, input=torch.ones(3, dtype=torch.bool)),
    row("input", FLOATS, "torch.complex64", TypeError, input=torch.ones(3, dtype=torch.complex64)),
    row("input", "to be a Tensor", "list", TypeError, input=[1.0]),
]
SAMPLING_ROWS = [
    row("sampling", "to be one of 'independent', 'antithetic'", "'paired'", sampling="paired"),
    row("sampling", "to be one of 'independent', 'antithetic'", "None", sampling=None),
]
NUM_SAMPLES_ROWS = [
    row("num_samples", "in [1, 65535]", "0", num_samples=0),
    row("num_samples", "in [1, 65535]", "-3", num_samples=-3),
    row("num_samples", "in [1, 65535]", "65536", num_samples=65536),
    row("num_samples", "to be an int", "float", TypeError, num_samples=2.0),
    row("num_samples", "to be an int", "bool", TypeError, num_samples=True),
    row("p", "to be a float or num_samples = 3 floats", "2 floats", num_samples=3, p=[0.5, 0.5]),
    row("p", "to be a float or num_samples = 3 floats", "0 floats", num_samples=3, p=[]),
    row("p", "in [0, 1)", "1.5", num_samples=2, p=[0.5, 1.5]),
    row("p", "to be a float", "str", TypeError, num_samples=2, p=[0.5, "x"]),
]


@pytest.mark.parametrize("changes, error, text", INPUT_ROWS + P_ROWS + SAMPLE_ROWS + SEED_ROWS + GENERATOR_ROWS)
def test_dropout(backend, changes, error, text):
    check(pyrx.dropout, {"input": X, "backend": backend} | changes, "dropout", error, text)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        *P_ROWS,
        *SAMPLE_ROWS,
        *SAMPLING_ROWS,
        *SEED_ROWS[:-1],
        row("shape's sizes", f"in [0, {2**62}]", "-1", shape=(3, -1)),
        row("shape's sizes", "to be an int", "float", TypeError, shape=(3.0,)),
        row("shape of a packed mask", "of at least one dimension", "[]", shape=(), packed=True),
        row("seed", "to be an int or an int64 tensor", "None", TypeError, seed=None),
    ],
)
def test_dropout_mask(backend, changes, error, text):
    arguments = {"shape": (3, 5), "p": 0.5, "seed": 1, "backend": backend}
    check(pyrx.dropout_mask, arguments | changes, "dropout_mask", error, text)


@pytest.mark.parametrize(
    "changes, error, text", INPUT_ROWS + P_ROWS + NUM_SAMPLES_ROWS + SAMPLING_ROWS + SEED_ROWS + GENERATOR_ROWS
)
def test_multi_sample_dropout(backend, changes, error, text):
    check(pyrx.multi_sample_dropout, {"input": X, "backend": backend} | changes, "multi_sample_dropout", error, text)


def meta(tensor):
    return tensor.to("meta")


HEAD_ROWS = [
    # features and parameters
    row("input", "of shape [..., D]", "[]", input=torch.tensor(1.0)),
    row("linear_weight", "to be a Tensor", "list", TypeError, linear_weight=[[1.0]]),
    row("linear_weight", FLOATS, "torch.int64", TypeError, linear_weight=W.long()),
    row("linear_weight", "of dtype torch.float32", "torch.bfloat16", TypeError, linear_weight=W.bfloat16()),
    row("linear_weight", "of dtype torch.float16", "torch.float32", TypeError, input=X.half()),
    row("linear_weight", "of shape [C, D] with D = 8", "[5, 7]", linear_weight=W[:, :7]),
    row("linear_weight", "of shape [C, D] with D = 8", "[8]", linear_weight=W[0]),
    row("linear_weight", "of at least one class", "[0, 8]", linear_weight=W[:0]),
    row("linear_weight", "on device cpu", "meta", RuntimeError, linear_weight=meta(W)),
    row("linear_bias", FLOATS, "torch.int64", TypeError, linear_bias=torch.ones(5).long()),
    row("linear_bias", "of dtype torch.float32", "torch.float64", TypeError, linear_bias=torch.ones(5).double()),
    row("linear_bias", "of shape [C] = [5]", "[4]", linear_bias=torch.ones(4)),
    row("linear_bias", "of shape [C] = [5]", "[5, 1]", linear_bias=torch.ones(5, 1)),
    row("linear_bias", "on device cpu", "meta", RuntimeError, linear_bias=meta(torch.ones(5))),
    row("weight", FLOATS, "torch.int64", TypeError, weight=torch.ones(5).long()),
    row("weight", "to be a Tensor", "list", TypeError, weight=[1.0] * 5),
    row("weight", "of shape [C] = [5]", "[6]", weight=torch.ones(6)),
    row("weight", "on device cpu", "meta", RuntimeError, weight=meta(torch.ones(5))),
    row(
        "weight",
        "without requires_grad: there is no gradient to class weights",
        "requires_grad=True",
        weight=torch.ones(5, requires_grad=True),
    ),
    # class ids
    row("target", TENSORS, "list", TypeError, target=[0, 1, 2, 4]),
    row("target", "of dtype torch.int64", "torch.int32", TypeError, target=Y.int()),
    row("target", "of dtype torch.int64", "torch.bool", TypeError, target=Y.bool()),
    row("target", "of shape [...] = [4]", "[3]", target=Y[:3]),
    row("target", "of shape [...] = [4]", "[4, 1]", target=Y[:, None]),
    row("target", "on device cpu", "meta", RuntimeError, target=meta(Y)),
    row("target", IDS, "5", target=Y + 1),
    row("target", IDS, "-1", target=Y - 1),
    row("target", IDS, str(2**62), target=Y + 2**62 * (Y == 0)),
    row("target", IDS.replace("-100", "7"), "-100", target=Y - 101 * (Y == 1), ignore_index=7),
    # probabilities
    row("target", "of shape [..., C] = [4, 'C']", "[3, 5]", target=PROBABILITIES[:3]),
    row("target", "of shape [..., C] = [4, 'C']", "[4]", target=PROBABILITIES[0, :4]),
    row("target", "of shape [B, C] = [4, 5]", "[4, 4]", target=PROBABILITIES[:, :4]),
    row("target", "of shape [B, C] = [4, 5]", "[4, 0]", target=PROBABILITIES[:, :0]),
    row(
        "target",
        "without requires_grad: there is no gradient to targets",
        "requires_grad=True",
        target=PROBABILITIES.clone().requires_grad_(),
    ),
    row("ignore_index", "negative where target holds probabilities", "2", target=PROBABILITIES, ignore_index=2),
    # mixed
    row("target", TENSORS, "tuple", TypeError, target=(Y, Y, torch.rand(4))),
    row("target.a", "of dtype torch.int64", "torch.int32", TypeError, target=MIXED._replace(a=Y.int())),
    row("target.b", TENSORS, "int", TypeError, target=MIXED._replace(b=3)),
    row("target.b", "of shape [...] = [4]", "[2]", target=MIXED._replace(b=Y[:2])),
    row("target.lam", FLOATS, "torch.int64", TypeError, target=MIXED._replace(lam=Y)),
    row("target.lam", TENSORS, "float", TypeError, target=MIXED._replace(lam=0.5)),
    row("target.lam", "of shape [...] = [4]", "[]", target=MIXED._replace(lam=torch.tensor(0.5))),
    row(
        "target.lam",
        "without requires_grad: there is no gradient to targets",
        "requires_grad=True",
        target=MIXED._replace(lam=torch.rand(4, requires_grad=True)),
    ),
    row("target", IDS, "9", target=MIXED._replace(b=torch.tensor([0, 9, 1, 2]))),
    # options
    row("combine", "to be one of 'losses', 'logits'", "'mean'", combine="mean"),
    row("reduction", "to be one of 'none', 'mean', 'sum'", "'batchmean'", reduction="batchmean"),
    row("label_smoothing", "in [0, 1]", "-0.1", label_smoothing=-0.1),
    row("label_smoothing", "in [0, 1]", "1.5", label_smoothing=1.5),
    row("label_smoothing", "in [0, 1]", "nan", label_smoothing=math.nan),
]


@pytest.mark.parametrize(
    "changes, error, text",
    INPUT_ROWS + HEAD_ROWS + P_ROWS + NUM_SAMPLES_ROWS + SAMPLING_ROWS + SEED_ROWS + GENERATOR_ROWS,
)
def test_head(backend, changes, error, text):
    arguments = {"input": X, "linear_weight": W, "target": Y, "backend": backend} | changes
    check(pyrx.multi_sample_dropout_cross_entropy, arguments, "multi_sample_dropout_cross_entropy", error, text)


LOGITS = torch.randn(4, 5)
MIXED_ROWS = [
    row("input", "of shape [N, C, ...] or [C]", "[]", input=torch.tensor(1.0)),
    row("input", "of at least one class", "[4, 0]", input=LOGITS[:, :0]),
    row("target", "to be a MixedTarget", "tuple", TypeError, target=(Y, Y, torch.rand(4))),
    row("target", "to be a MixedTarget", "Tensor", TypeError, target=Y),
    row("target", IDS, "5", target=MIXED._replace(a=Y + 1)),
    row("target", IDS, "-1", target=MIXED._replace(b=Y - 1)),
    row("target", IDS.replace("-100", "7"), "-100", target=MIXED._replace(b=Y - 101 * (Y == 1)), ignore_index=7),
    row("target.a", "of shape [...] = [4, 2]", "[4]", input=torch.randn(4, 5, 2), target=MIXED._replace(lam=MIXED_LAM)),
    row("target.lam", "of shape [...] = []", "[4]", input=LOGITS[0]),
    row("target", "on device cpu", "meta", RuntimeError, target=MIXED._replace(a=meta(Y))),
    row("target_b", "on device cpu", "meta", RuntimeError, target=MIXED._replace(b=meta(Y))),
    row("lam", "on device cpu", "meta", RuntimeError, target=MIXED._replace(lam=meta(MIXED.lam))),
    *[each for each in HEAD_ROWS if set(each.values[0]) & {"weight", "reduction", "label_smoothing"}],
    *[each for each in HEAD_ROWS if each.values[2].startswith(("expected target.", "expected target.lam"))],
]


@pytest.mark.parametrize("changes, error, text", INPUT_ROWS + MIXED_ROWS)
def test_mixed_cross_entropy(backend, changes, error, text):
    arguments = {"input": LOGITS, "target": MIXED, "backend": backend} | changes
    check(pyrx.mixed_cross_entropy, arguments, "mixed_cross_entropy", error, text)


@pytest.mark.parametrize(
    "name",
    ["dropout", "dropout_mask", "mixed_cross_entropy", "multi_sample_dropout", "multi_sample_dropout_cross_entropy"],
)
@pytest.mark.parametrize("asked", ["CPU", "", "gpu", "none"])
def test_backend_names(name, asked):
    arguments = {
        "dropout": {"input": X},
        "dropout_mask": {"shape": (3,), "p": 0.5, "seed": 1},
        "mixed_cross_entropy": {"input": LOGITS, "target": MIXED},
        "multi_sample_dropout": {"input": X},
        "multi_sample_dropout_cross_entropy": {"input": X, "linear_weight": W, "target": Y},
    }[name]
    with pytest.raises(ValueError, match="expected backend to be one of 'reference', 'cpu', 'cuda', 'triton', got '"):
        getattr(pyrx, name)(**arguments, backend=asked)


def test_training_false_is_no_excuse(backend):
    for changes in ({"p": 1.0}, {"input": X.long()}, {"sample": -1}):
        with pytest.raises((ValueError, TypeError)):
            pyrx.dropout(**({"input": X, "training": False, "backend": backend} | changes))


@pytest.mark.cpu_kernels
def test_a_bad_call_leaves_its_tensors_and_the_generator_alone(backend):
    """Raised before anything is written."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    before = x.detach().clone(), w.detach().clone()
    with pytest.raises(ValueError):
        pyrx.multi_sample_dropout_cross_entropy(x, w, Y + 1, backend=backend)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1]) and x.grad is None and w.grad is None


# The ops themselves: kernel and fake say the same.

SEED = torch.tensor(1)
OPS = {
    "dropout": {"input": X, "seed": SEED, "threshold": 32768, "sample": 0},
    "dropout_mask": {
        "seed": SEED,
        "shape": [3, 5],
        "threshold": 32768,
        "sample": 0,
        "antithetic": False,
        "packed": False,
    },
    "multi_sample_dropout": {"input": X, "seed": SEED, "thresholds": [32768] * 2, "antithetic": False},
    "multi_sample_dropout_fold": {
        "grad": torch.randn(2, 4, 8),
        "seed": SEED,
        "thresholds": [32768] * 2,
        "antithetic": False,
    },
    "multi_sample_dropout_cross_entropy": {
        "input": X,
        "linear_weight": W,
        "linear_bias": None,
        "target": Y,
        "target_b": None,
        "lam": None,
        "weight": None,
        "seed": SEED,
        "thresholds": [32768] * 2,
        "antithetic": False,
        "combine_logits": False,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "needs_grad": [True, True, True],
        "loss_dtype": torch.float32,
    },
    "multi_sample_dropout_cross_entropy_scale_": {
        "grad_input": torch.ones(4, 8),
        "grad_weight": torch.ones(5, 8),
        "grad_bias": torch.ones(0),
        "grad_loss": torch.tensor(2.0),
    },
}
OPS["mixed_cross_entropy"] = {
    "input": LOGITS,
    "target": MIXED.a,
    "target_b": MIXED.b,
    "lam": MIXED.lam,
    "weight": None,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "needs_grad": True,
    "loss_dtype": torch.float32,
}
OPS["mixed_cross_entropy_scale_"] = {"gradient": torch.ones(4, 5), "grad_loss": torch.tensor(2.0)}
OPS["multi_sample_dropout_cross_entropy_backward"] = {"grad_loss": torch.ones(4)} | {
    name: value
    for name, value in OPS["multi_sample_dropout_cross_entropy"].items()
    if name not in ("reduction", "loss_dtype")
}
SEED_CHANGES = [{"seed": SEED.int()}, {"seed": torch.tensor([1, 2])}]
THRESHOLD_CHANGES = [{"threshold": -1}, {"threshold": 65536}, {"sample": -1}, {"sample": 2**32}]
THRESHOLDS_CHANGES = [{"thresholds": []}, {"thresholds": [-1, 0]}, {"thresholds": [32768, 65536]}]
DTYPE_CHANGES = [{"input": X.long()}, {"input": X.bool()}, {"input": X.to(torch.complex64)}]
HEAD_CHANGES = [
    *SEED_CHANGES,
    *THRESHOLDS_CHANGES,
    *DTYPE_CHANGES,
    {"input": X[0]},
    {"input": X[None]},
    {"input": X.double()},
    {"linear_weight": W.half()},
    {"linear_weight": W[:, :7]},
    {"linear_weight": W[0]},
    {"linear_weight": W[:0]},
    {"linear_bias": torch.ones(4)},
    {"linear_bias": torch.ones(5, 1)},
    {"linear_bias": torch.ones(5).half()},
    {"weight": torch.ones(4)},
    {"weight": torch.ones(5).double()},
    {"target": Y[:3]},
    {"target": Y[:, None]},
    {"target": Y.int()},
    {"target": PROBABILITIES.double()},
    {"target": PROBABILITIES[:, :4]},
    {"target": PROBABILITIES, "ignore_index": 3},
    {"target_b": Y},
    {"lam": torch.ones(4)},
    {"target": PROBABILITIES, "target_b": Y, "lam": torch.ones(4)},
    {"target_b": Y.int(), "lam": torch.ones(4)},
    {"target_b": Y[:3], "lam": torch.ones(4)},
    {"target_b": Y, "lam": torch.ones(3)},
    {"target_b": Y, "lam": torch.ones(4).double()},
    {"label_smoothing": -0.5},
    {"label_smoothing": 1.25},
    {"label_smoothing": 2.0},
    {"label_smoothing": math.nan},
]
MIXED_CHANGES = [
    {"input": LOGITS.long()},
    {"input": LOGITS.double()},
    {"input": LOGITS[0]},
    {"input": LOGITS[None]},
    {"input": LOGITS[:, :0]},
    {"target": Y[:3]},
    {"target": Y.int()},
    {"target": Y[:, None]},
    {"target_b": Y[:3]},
    {"target_b": Y.int()},
    {"lam": torch.ones(3)},
    {"lam": torch.ones(4).double()},
    {"lam": torch.tensor(1.0)},
    {"weight": torch.ones(4)},
    {"weight": torch.ones(5).half()},
    {"label_smoothing": -0.5},
    {"label_smoothing": 1.25},
    {"label_smoothing": math.nan},
    {"reduction": "Mean"},
    {"loss_dtype": torch.bfloat16},
]
CHANGES = [
    *[("mixed_cross_entropy", each) for each in MIXED_CHANGES],
    ("mixed_cross_entropy_scale_", {"gradient": torch.ones(4, 5).int()}),
    ("mixed_cross_entropy_scale_", {"gradient": torch.ones(5, 4).t()}),
    ("mixed_cross_entropy_scale_", {"gradient": torch.ones(4)}),
    ("mixed_cross_entropy_scale_", {"grad_loss": torch.ones(3)}),
    ("mixed_cross_entropy_scale_", {"grad_loss": torch.ones(4, 1)}),
    ("mixed_cross_entropy_scale_", {"grad_loss": torch.ones(4).double()}),
    *[("dropout", each) for each in SEED_CHANGES + THRESHOLD_CHANGES + DTYPE_CHANGES],
    *[("dropout_mask", each) for each in SEED_CHANGES + THRESHOLD_CHANGES],
    ("dropout_mask", {"shape": [], "packed": True}),
    *[("multi_sample_dropout", each) for each in SEED_CHANGES + THRESHOLDS_CHANGES + DTYPE_CHANGES],
    *[("multi_sample_dropout_fold", each) for each in SEED_CHANGES + THRESHOLDS_CHANGES],
    ("multi_sample_dropout_fold", {"grad": torch.randn(3, 4)}),
    ("multi_sample_dropout_fold", {"grad": torch.tensor(1.0)}),
    ("multi_sample_dropout_fold", {"grad": torch.ones(2, 3).long()}),
    *[("multi_sample_dropout_cross_entropy", each) for each in HEAD_CHANGES],
    ("multi_sample_dropout_cross_entropy", {"reduction": "Mean"}),
    ("multi_sample_dropout_cross_entropy", {"loss_dtype": torch.bfloat16}),
    ("multi_sample_dropout_cross_entropy_scale_", {"grad_input": torch.ones(4, 8).int()}),
    ("multi_sample_dropout_cross_entropy_scale_", {"grad_weight": torch.ones(5, 8).half()}),
    ("multi_sample_dropout_cross_entropy_scale_", {"grad_weight": torch.ones(8, 5).t()}),
    ("multi_sample_dropout_cross_entropy_scale_", {"grad_loss": torch.ones(1)}),
    ("multi_sample_dropout_cross_entropy_scale_", {"grad_loss": torch.tensor(1)}),
    *[("multi_sample_dropout_cross_entropy_backward", each) for each in HEAD_CHANGES],
    ("multi_sample_dropout_cross_entropy_backward", {"grad_loss": torch.ones(3)}),
    ("multi_sample_dropout_cross_entropy_backward", {"grad_loss": torch.tensor(1.0)}),
    ("multi_sample_dropout_cross_entropy_backward", {"grad_loss": torch.ones(4).double()}),
]


def told(value):
    return (
        f"{value.dtype}{list(value.shape)}".removeprefix("torch.") if isinstance(value, torch.Tensor) else repr(value)
    )


def raised(op, arguments):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        op(**arguments)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "name, changes",
    CHANGES,
    ids=[f"{name}-{','.join(f'{k}={told(v)}' for k, v in changes.items())}" for name, changes in CHANGES],
)
def test_kernels_and_fakes_raise_the_same(name, changes):
    op = getattr(_library.namespace(need("cpu")), name)
    arguments = OPS[name] | changes
    real = raised(op, arguments)
    with FakeTensorMode() as mode:
        fake = raised(op, {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert fake == real
    assert real[1].startswith(f"pyrx::{name}: expected ") and ", got " in real[1]


@pytest.mark.parametrize("name", OPS)
def test_the_tables_good_calls_are_good(name):
    """What the rows above change is what is wrong with them."""
    op = getattr(_library.namespace(need("cpu")), name)
    op(**OPS[name])
    with FakeTensorMode() as mode:
        op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in OPS[name].items()})


@pytest.mark.cpu_kernels
def test_mixed_class_ids_out_of_range_are_found_by_the_kernel(cpu):
    op = _library.namespace(cpu).mixed_cross_entropy
    for name in ("target", "target_b"):
        for bad in (Y + 1, Y - 1):
            error, text = raised(op, OPS["mixed_cross_entropy"] | {name: bad})
            assert error is ValueError and text.startswith(f"pyrx::mixed_cross_entropy: expected target {IDS}, got ")


@pytest.mark.cpu_kernels
def test_class_ids_out_of_range_are_found_by_the_kernels(cpu):
    for name in ("multi_sample_dropout_cross_entropy", "multi_sample_dropout_cross_entropy_backward"):
        op = getattr(_library.namespace(cpu), name)
        for changes in ({"target": Y + 1}, {"target_b": Y - 1, "lam": torch.ones(4)}):
            error, text = raised(op, OPS[name] | changes)
            assert error is ValueError and text.startswith(f"pyrx::{name}: expected target {IDS}, got ")
