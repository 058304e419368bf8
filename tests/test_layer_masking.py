"""pyrx.nn.LayerMasking against the rules written out, on networks of torchvision and timm and on small ones."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import name_of
from torch import nn

import pyrx
from pyrx.nn import LayerMasking

FILLS = ("neighbors", None, "renormalize")


def with_statistics(model):
    """Batch norms that do something in eval mode, biases included."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for each in (module.weight.data, module.running_var):
                each.copy_(torch.rand(each.shape, generator=generator) + 0.5)
            for each in (module.bias.data, module.running_mean):
                each.copy_(torch.randn(each.shape, generator=generator) / 4)
    return model.eval()


def sequential():
    return with_statistics(
        nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 6, 3, padding="same", dilation=2, groups=2),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 10, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, 5),
        )
    )


def torchvision_model(name):
    return with_statistics(getattr(pytest.importorskip("torchvision").models, name)(weights=None))


def timm_model(name):
    return with_statistics(pytest.importorskip("timm").create_model(name, pretrained=False))


MODELS = {
    "sequential": sequential,
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "densenet121": lambda: torchvision_model("densenet121"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2"),
    "timm resnet50": lambda: timm_model("resnet50"),
    "timm seresnet50": lambda: timm_model("seresnet50"),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def patches(n=2, size=64, keep=0.5, patch=8, seed=0):
    shape = (n, 1, size // patch, size // patch)
    coarse = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep
    return coarse.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def pictures(n=2, size=64, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# Whole networks.


@pytest.mark.parametrize("fill", FILLS)
@torch.no_grad()
def test_all_shown_is_the_model_bit_for_bit(model, fill):
    images = pictures()
    got = LayerMasking(model, fill)(images, torch.ones(2, 1, 64, 64, dtype=torch.bool))
    assert torch.equal(got, model(images))


@pytest.mark.parametrize("fill", FILLS)
@torch.no_grad()
def test_masked_pixels_do_not_matter(model, fill):
    images, mask, masked = pictures(), patches(), LayerMasking(model, fill)
    expected = masked(images, mask)
    assert expected.isfinite().all() and not torch.equal(expected, model(images))
    for other in (images.flip(0), torch.full_like(images, float("nan")), torch.full_like(images, float("inf"))):
        assert torch.equal(masked(torch.where(mask, images, other), mask), expected)
    assert torch.equal(masked(images, mask.float()), expected)
    other = images.clone()
    other[:, :, 32:, 32:] += mask[:, :, 32:, 32:]
    assert not torch.equal(masked(other, mask), expected), "shown pixels do"


@torch.no_grad()
def test_the_fills_differ(model):
    found = [LayerMasking(model, fill)(pictures(), patches()) for fill in FILLS]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@torch.no_grad()
def test_backends_agree(model):
    found = [LayerMasking(model, backend=each)(pictures(), patches()) for each in ("reference", None)]
    assert torch.equal(*found)


@pytest.mark.parametrize("fill", FILLS)
def test_gradients(fill):
    torch.manual_seed(0)
    model, images, mask = sequential().double(), pictures(1, 32, torch.float64).requires_grad_(), patches(1, 32)
    masked = LayerMasking(model, fill)
    out = masked(images, mask)
    grad, *parameters = torch.autograd.grad(out.square().sum(), [images, *model.parameters()])
    assert grad.isfinite().all() and grad.any() and not torch.where(mask, 0, grad).any()
    assert all(each.isfinite().all() for each in parameters)
    if fill != "neighbors":  # whose fills are constants
        at = (0, 1, *torch.nonzero(mask[0, 0])[7].tolist())
        step = torch.zeros_like(images)
        step[at] = 1e-6
        with torch.no_grad():
            ahead, behind = (masked(images + s, mask).square().sum() for s in (step, -step))
        torch.testing.assert_close(grad[at], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_nothing_shown_is_finite(model):
    for fill in FILLS:
        assert LayerMasking(model, fill)(pictures(), torch.zeros(2, 1, 64, 64, dtype=torch.bool)).isfinite().all()


# The rules.


def notes_conv(conv, x, m, fill):
    """A convolution as the paper's code does it: products, k rings for a k x k kernel."""
    x = x * m
    k = max(conv.kernel_size)
    kept, ones = m, torch.ones(1, 1, 3, 3, dtype=x.dtype)
    for _ in range(k if fill == "neighbors" else 0):
        n = F.conv2d(x, ones.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1])
        d = F.conv2d(kept, ones, padding=1)
        x, kept = x + ((1 - kept) * n / (d + 1e-5)).detach(), (kept + d).clip(0, 1)
    y = conv(x)
    if fill == "renormalize":
        # the mean over the window's places inside the image
        c = F.avg_pool2d(m, conv.kernel_size, conv.stride, conv.padding, count_include_pad=False) + 1e-8
        y = y / c + (0 if conv.bias is None else conv.bias[:, None, None]) * (1 - 1 / c)
    after = F.max_pool2d(m, conv.kernel_size, conv.stride, conv.padding)
    return y * after, after


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    "kernel, stride, padding", [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (5, 1, 2), (7, 2, 3), (3, 1, 0)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_convolution(fill, kernel, stride, padding, bias):
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 4, kernel, stride, padding, bias=bias).double()
    images, mask = pictures(dtype=torch.float64), patches(keep=0.2)
    got = LayerMasking(nn.Sequential(conv), fill)(images, mask)
    expected, after = notes_conv(conv, images, mask.double(), fill)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.where(after == 0, got, 0), torch.zeros_like(got))


def test_as_many_rings_as_the_kernel_sees_are_enough():
    """k rings of the paper's code and our k - 1 give the same bits."""
    torch.manual_seed(1)
    for kernel, padding in ((3, 1), (5, 2), (7, 3), ((3, 5), (1, 2)), (2, 1)):
        conv = nn.Conv2d(3, 4, kernel, 1, padding)
        images, mask = pictures(), patches(keep=0.1)
        k = max(conv.kernel_size)
        filled, _ = pyrx.neighbor_fill(images, mask, k)
        after = F.max_pool2d(mask.float(), conv.kernel_size, 1, conv.padding) > 0
        got = LayerMasking(nn.Sequential(conv))(images, mask)
        assert torch.equal(got, torch.where(after, conv(filled), 0))
        fewer, _ = pyrx.neighbor_fill(images, mask, k - 2)
        assert not torch.equal(got, torch.where(after, conv(fewer), 0))


def test_rules_of_a_small_network():
    """Every rule once, written out."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
            self.norm, self.most = nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1)
            self.mean, self.head = nn.AvgPool2d(2), nn.Linear(12, 5)

        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            y = self.most(x)
            z = self.mean(x)
            y = y + self.second(z)
            y = torch.cat([y, z, self.second(z)], 1)
            return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))

    torch.manual_seed(2)
    model = with_statistics(Network()).double()
    images, mask = pictures(dtype=torch.float64), patches(keep=0.2)
    x, m = notes_conv(model.first, images, mask.double(), "neighbors")
    x = F.relu(model.norm(x * m)) * m
    y, m_y = model.most(x), model.most(m)
    z = model.mean(x)
    m_z = (model.mean(m) > 0).double()
    w, m_w = notes_conv(model.second, z, m_z, "neighbors")
    y, m_y = (y + w) * (m_y * m_w), m_y * m_w
    most = (m_y + m_z + m_w > 1.5).double()
    assert 0 < most.mean() < 1 and not torch.equal(m_y, m_w) and not torch.equal(m_w, most)
    y = torch.cat([y, z, w], 1)
    y = (y * most).mean((2, 3)) / (most.mean((2, 3)) + 1e-8)
    torch.testing.assert_close(LayerMasking(model)(images, mask), model.head(y), rtol=1e-9, atol=1e-9)


def test_renormalizing_divides_by_the_share_that_is_there():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight.data.fill_(1 / 9)
    mask = patches(keep=0.5)
    got = LayerMasking(nn.Sequential(conv), "renormalize")(torch.ones(2, 1, 64, 64), mask)
    inside = F.avg_pool2d(torch.ones(2, 1, 64, 64), 3, 1, 1)
    seen = F.max_pool2d(mask.float(), 3, 1, 1)
    torch.testing.assert_close(got, seen * inside)


def test_padding_modes():
    images, mask = pictures(), patches(keep=0.3)
    for mode in ("reflect", "replicate", "circular"):
        conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
        got = LayerMasking(nn.Sequential(conv), None)(images, mask)
        padded = F.pad(mask.float(), (1, 1, 1, 1), mode)
        expected = conv(images * mask) * F.max_pool2d(padded, 3, 1)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("fill", FILLS)
def test_dtypes(dtype, fill):
    torch.manual_seed(0)
    model, images, mask = sequential().to(dtype), pictures(dtype=dtype), patches()
    got = LayerMasking(model, fill)(images, mask)
    exact = LayerMasking(copy.deepcopy(model).double(), fill)(images.double(), mask)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_channels_last_stays_so():
    torch.manual_seed(0)
    model = sequential()[:5].to(memory_format=torch.channels_last)
    images = pictures().to(memory_format=torch.channels_last)
    for fill in FILLS:
        got = LayerMasking(model, fill)(images, patches())
        assert got.is_contiguous(memory_format=torch.channels_last), fill
        torch.testing.assert_close(got, LayerMasking(sequential_like(model), fill)(images.contiguous(), patches()))


def sequential_like(model):
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


# The module.


def test_it_is_the_models_own_parameters_and_modes():
    model = sequential()
    masked = LayerMasking(model)
    assert [name for name, _ in masked.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]
    assert set(masked.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    images, mask = pictures(), patches()
    before = masked(images, mask)
    for other in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        assert torch.equal(other(images, mask), before)
        other.model[0].weight.data.zero_()
        assert torch.equal(masked(images, mask), before) and not torch.equal(other(images, mask), before)
    masked.train()
    assert model.training
    masked(images, mask)
    masked.eval()
    assert not torch.equal(masked(images, mask), before), "statistics have moved"
    assert "fill='neighbors'" in repr(masked)


def test_images_are_left_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))
    images, mask = pictures(), patches()
    before = images.clone(), mask.clone()
    LayerMasking(model)(images, mask)
    LayerMasking(model)(images, torch.ones_like(mask))
    assert torch.equal(images, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize("fill", FILLS)
def test_compiled_equals_eager(fill):
    torch.manual_seed(0)
    torch._dynamo.reset()
    masked = LayerMasking(sequential(), fill)
    compiled = torch.compile(masked, fullgraph=True)
    torch.testing.assert_close(compiled(pictures(), patches()), masked(pictures(), patches()), rtol=1e-4, atol=1e-5)


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="there Dynamo does not see that modules change")
def test_functions_follow_the_mode():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Dropping()).train()
    masked, images, mask = LayerMasking(model), pictures(), patches()
    assert not torch.equal(masked(images, mask), masked(images, mask))
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    model.eval()  # not through LayerMasking
    got = compiled(images, mask)
    assert torch.equal(got, masked(images, mask)) and torch.equal(got, masked(images, mask))
    model.train()
    assert not torch.equal(masked(images, mask), masked(images, mask))
    assert not torch.equal(compiled(images, mask), compiled(images, mask))
    torch._dynamo.reset()


class Shuffled(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), act

    def forward(self, x):
        return self.act(self.conv(x))


@pytest.mark.parametrize(
    "act, node, kind",
    [
        (nn.ConvTranspose2d(4, 4, 3), "act", "the module act, a ConvTranspose2d"),
        (lambda x: x.permute(0, 2, 3, 1), "permute", "the method permute"),
        (lambda x: torch.softmax(x, 1), "softmax", "the function softmax"),
        (lambda x: torch.cat([x, x], 2), "cat", "the function cat"),
        (lambda x: x.mean(1), "mean", "the method mean"),
        (lambda x: x.view(2, 2, 2, 62, 62), "view", "the method view"),
        (lambda x: torch.add(x, x, alpha=2), "add", "the function add"),
    ],
)
def test_a_node_without_a_rule_is_named(act, node, kind):
    text = f"node {node!r} to be of a kind that has a rule for masked activations, got {kind}"
    with pytest.raises(ValueError) as caught:
        LayerMasking(Shuffled(act))(pictures(), patches())
    assert str(caught.value) == f"pyrx::LayerMasking: expected {text}"


def test_errors():
    def error(kind, text, *arguments, **options):
        with pytest.raises(kind) as caught:
            if options:
                LayerMasking(sequential(), **options)
            else:
                LayerMasking(sequential())(*arguments)
        assert str(caught.value) == f"pyrx::LayerMasking: expected {text}"

    x, mask = pictures(), patches()
    error(ValueError, "fill to be one of 'neighbors', None, 'renormalize', got 'zeros'", fill="zeros")
    error(TypeError, "images of dtype float16, bfloat16, float32 or float64, got torch.uint8", x.byte(), mask)
    error(ValueError, "images of shape [N, C, H, W], got [3, 64, 64]", x[0], mask)
    error(TypeError, "mask to be a Tensor, got float", x, 0.5)
    error(TypeError, "mask of dtype torch.bool or torch.float32, got torch.int64", x, mask.long())
    error(ValueError, "mask of shape [N, 1, H, W] = [2, 1, 64, 64], got [2, 64, 64]", x, mask[:, 0])
    error(RuntimeError, "mask on device cpu, got meta", x, mask.to("meta"))
