"""The modules: train and eval, state, and the loop that they replace."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import SAMPLINGS

import pyrx
from pyrx.nn import MultiSampleDropout, MultiSampleDropoutClassifier

X, Y = torch.randn(9, 21, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 5
OPTIONS = [
    {},
    {"num_samples": 3, "p": 0.3},
    {"num_samples": 2, "p": [0.1, 0.7], "bias": False},
    {"combine": "logits", "label_smoothing": 0.1},
    {"sampling": "antithetic", "reduction": "sum"},
    {"weight": torch.rand(5) + 0.5, "ignore_index": 3, "reduction": "none"},
]


def drawn_seed(manual_seed):
    """The seed that an op draws first after torch.manual_seed."""
    torch.manual_seed(manual_seed)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    torch.manual_seed(manual_seed)
    return seed


# MultiSampleDropoutClassifier.


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "defaults")
def test_classifier_in_training_is_the_function(options):
    module = MultiSampleDropoutClassifier(21, 5, **options)
    seed = drawn_seed(4)
    loss = module(X, Y)
    keywords = {name: value for name, value in options.items() if name != "bias"}
    expected = pyrx.multi_sample_dropout_cross_entropy(
        X, module.weight, Y, linear_bias=module.bias, seed=seed, **keywords
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert loss.requires_grad
    assert not torch.equal(loss, module(X, Y)), "new masks in every call"


def test_classifier_without_target_or_in_eval_is_linear():
    module = MultiSampleDropoutClassifier(21, 5)
    logits = F.linear(X, module.weight, module.bias)
    assert torch.equal(module(X), logits)
    module.eval()
    assert torch.equal(module(X), logits) and torch.equal(module(X, Y), logits)
    state = torch.get_rng_state()
    module(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_classifier_takes_every_target():
    module = MultiSampleDropoutClassifier(21, 5).double()
    x, lam = X.double(), torch.rand(9)
    mixed = pyrx.MixedTarget(Y, Y.flip(0), lam)
    dense = lam.double()[:, None] * F.one_hot(Y, 5) + (1 - lam.double())[:, None] * F.one_hot(Y.flip(0), 5)
    losses = []
    for target in (mixed, dense):
        torch.manual_seed(1)
        losses.append(module(x, target))
    torch.testing.assert_close(*losses)
    assert module(x[None], Y[None]).shape == ()


def test_classifier_state_is_that_of_linear():
    module, linear = MultiSampleDropoutClassifier(21, 5), torch.nn.Linear(21, 5)
    assert list(module.state_dict()) == ["weight", "bias"]
    module.load_state_dict(linear.state_dict())
    assert torch.equal(module(X), linear(X))
    linear.load_state_dict(module.state_dict())
    assert list(MultiSampleDropoutClassifier(21, 5, bias=False).state_dict()) == ["weight"]
    weighted = MultiSampleDropoutClassifier(21, 5, weight=torch.rand(5))
    assert list(weighted.state_dict()) == ["weight", "bias", "class_weight"]
    assert [name for name, _ in weighted.named_parameters()] == ["weight", "bias"]


def test_classifier_dtype_and_device():
    module = MultiSampleDropoutClassifier(21, 5, dtype=torch.bfloat16, device="cpu")
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16
    assert module(X.bfloat16(), Y).dtype == torch.bfloat16
    assert MultiSampleDropoutClassifier(21, 5, weight=torch.rand(5)).double()(X.double(), Y).dtype == torch.float64


def copied(module):
    return copy.deepcopy(module)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copied, saved])
def test_modules_can_be_copied_and_saved(again):
    classifier = MultiSampleDropoutClassifier(21, 5, 3, 0.3, sampling="antithetic", weight=torch.rand(5))
    wrapper = MultiSampleDropout(torch.nn.Linear(21, 5), 3, 0.3, sampling="antithetic")
    for module in (classifier, wrapper):
        other = again(module)
        assert repr(other) == repr(module)
        losses = []
        for each in (module, other):
            torch.manual_seed(1)
            losses.append(each(X, Y))
        assert torch.equal(*losses)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert next(module.parameters()).any()


def test_representations_tell_the_options():
    text = repr(MultiSampleDropoutClassifier(21, 5, 3, 0.3, combine="logits", sampling="antithetic"))
    for part in ("in_features=21", "out_features=5", "num_samples=3", "p=0.3", "'logits'", "'antithetic'"):
        assert part in text
    text = repr(MultiSampleDropout(torch.nn.Linear(21, 5), 3, 0.3))
    for part in ("Linear", "num_samples=3", "p=0.3", "'independent'"):
        assert part in text


# MultiSampleDropout.


@pytest.mark.parametrize("p", [0.5, [0.1, 0.5, 0.9]], ids=["half", "list"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_wrapper_equals_the_loop_over_dropouts(sampling, p):
    head = torch.nn.Sequential(torch.nn.Linear(21, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    module = MultiSampleDropout(head, 3, p, sampling=sampling)
    x = X.double().requires_grad_()
    each_p = p if isinstance(p, list) else [p] * 3
    seed = drawn_seed(6)
    loss = module(x, Y)

    def sample(m):
        mask = pyrx.dropout_mask(x.shape, each_p[m], seed, m, sampling=sampling)
        kept = 65536 - round(65536 * each_p[m])
        return head(torch.where(mask, x * (65536 / kept), 0.0))

    expected = sum(F.cross_entropy(sample(m), Y) for m in range(3)) / 3
    torch.testing.assert_close(loss, expected)
    parameters = [x, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
    torch.manual_seed(6)
    torch.testing.assert_close(module(x), torch.stack([sample(m) for m in range(3)]))


def test_wrapper_in_eval_is_the_head():
    head = torch.nn.Linear(21, 5)
    module = MultiSampleDropout(head, 3).eval()
    assert torch.equal(module(X), head(X))
    assert torch.equal(module(X, Y), F.cross_entropy(head(X), Y))


def test_wrapper_uses_the_loss_it_is_given():
    calls = []

    def loss(output, target):
        calls.append(output.shape)
        return F.mse_loss(output, target, reduction="none").mean(1)

    module = MultiSampleDropout(torch.nn.Linear(21, 4), 6, loss=loss)
    target = torch.randn(9, 4)
    assert module(X, target).shape == (9,)
    assert calls == [(9, 4)] * 6
    torch.manual_seed(2)
    outputs = module(X)
    torch.manual_seed(2)
    torch.testing.assert_close(module(X, target), ((outputs - target) ** 2).mean(2).mean(0))


def test_wrapper_around_a_convolutional_head():
    head = torch.nn.Sequential(torch.nn.Conv2d(4, 5, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    module = MultiSampleDropout(head, 2)
    x = torch.randn(3, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert module(x).shape == (2, 3, 5)
    module(x, torch.tensor([0, 1, 4])).backward()
    assert x.grad.abs().sum() > 0 and head[0].weight.grad.abs().sum() > 0


def test_modules_take_empty_batches():
    assert MultiSampleDropout(torch.nn.Linear(21, 5), 3)(X[:0]).shape == (3, 0, 5)
    assert MultiSampleDropoutClassifier(21, 5, reduction="none")(X[:0], Y[:0]).shape == (0,)
    assert MultiSampleDropoutClassifier(21, 5, reduction="sum")(X[:0], Y[:0]) == 0


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"num_samples": 0}, ValueError, "expected num_samples in [1, 65535], got 0"),
        ({"num_samples": 2.0}, TypeError, "expected num_samples to be an int, got float"),
        ({"p": 1.0}, ValueError, "expected p in [0, 1), got 1.0"),
        ({"p": [0.5]}, ValueError, "expected p to be a float or num_samples = 8 floats, got 1 floats"),
        ({"sampling": "x"}, ValueError, "expected sampling to be one of 'independent', 'antithetic', got 'x'"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("kind", ["MultiSampleDropout", "MultiSampleDropoutClassifier"])
def test_bad_options_are_told_when_the_module_is_made(kind, changes, error, text):
    arguments = (21, 5) if kind == "MultiSampleDropoutClassifier" else (torch.nn.Linear(21, 5),)
    with pytest.raises(error) as caught:
        getattr(pyrx.nn, kind)(*arguments, **changes)
    assert str(caught.value) == f"pyrx::{kind}: {text}"


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"combine": "mean"}, "expected combine to be one of 'losses', 'logits', got 'mean'"),
        ({"reduction": "max"}, "expected reduction to be one of 'none', 'mean', 'sum', got 'max'"),
        ({"label_smoothing": 1.5}, "expected label_smoothing in [0, 1], got 1.5"),
    ],
)
def test_bad_options_of_the_loss_are_told_when_the_module_is_made(changes, text):
    with pytest.raises(ValueError) as caught:
        MultiSampleDropoutClassifier(21, 5, **changes)
    assert str(caught.value) == f"pyrx::MultiSampleDropoutClassifier: {text}"


def test_a_backend_that_is_asked_for_serves(backend, monkeypatch):
    """Or raises, whatever the environment says."""
    monkeypatch.setenv("PYRX_BACKEND", "cuda")
    for module in (
        MultiSampleDropoutClassifier(21, 5, backend=backend),
        MultiSampleDropout(torch.nn.Linear(21, 5), backend=backend),
    ):
        module(X, Y).backward()
        module.backend = "cuda"
        with pytest.raises(RuntimeError, match="got 'cuda', which cannot: it serves device cuda, not cpu"):
            module(X, Y)


def test_class_weights_are_a_tensor():
    with pytest.raises(TypeError, match="pyrx::MultiSampleDropoutClassifier: expected weight to be a Tensor, got list"):
        MultiSampleDropoutClassifier(21, 5, weight=[1.0] * 5)


@pytest.mark.parametrize("flag", ["correct_lam", "inplace", "mixed_target"])
def test_flags_of_mixup(flag):
    with pytest.raises(TypeError, match=f"pyrx::Mixup: expected {flag} to be a bool, got int"):
        pyrx.nn.Mixup(1.0, **{flag: 1})
