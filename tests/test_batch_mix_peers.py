"""CutMix, mixup and their targets pixel for pixel against timm, torchvision and kornia, where those are right."""

import numpy as np
import pytest
import torch
from helpers import assert_same_bits

import pyrx

IMAGES = torch.rand(6, 3, 24, 32)
LABELS = torch.tensor([0, 1, 2, 3, 3, 1])


def drawn(per_sample=True, pairing="flip", seed=1):
    """A draw to hand to the others."""
    _, target = pyrx.cutmix(IMAGES, LABELS, per_sample=per_sample, pairing=pairing, seed=seed)
    return target


@pytest.fixture
def timm_mixup(monkeypatch):
    """timm's module of Mixup with its randomness replaced by a draw of pyrx's, and its class."""
    module = pytest.importorskip("timm.data.mixup")

    def make(target, **keywords):
        boxes, lams = target.boxes.tolist(), target.lam.tolist()
        given = iter(range(len(boxes)))

        def box_and_lam(*_, **__):
            i = next(given)
            y0, x0, y1, x1 = boxes[i]
            return (y0, y1, x0, x1), lams[i]

        monkeypatch.setattr(module, "cutmix_bbox_and_lam", box_and_lam)
        monkeypatch.setattr(np.random, "beta", lambda *_, size=None: 0.5 if size is None else np.full(size, 0.5))
        return module.Mixup(num_classes=4, label_smoothing=0.1, **keywords)

    return make


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_cutmix_equals_timms(backend, timm_mixup, mode):
    target = drawn(per_sample=mode == "elem")
    expected, soft = timm_mixup(target, mixup_alpha=0.0, cutmix_alpha=1.0, mode=mode)(IMAGES.clone(), LABELS)
    mixed, same = pyrx.cutmix(IMAGES, LABELS, lam=target.lam, boxes=target.boxes, backend=backend)
    assert_same_bits(mixed, expected)
    torch.testing.assert_close(same.to_probabilities(4, 0.1), soft)


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_mixup_equals_timms(backend, timm_mixup, mode):
    expected, soft = timm_mixup(drawn(), mixup_alpha=1.0, mode=mode)(IMAGES.clone(), LABELS)
    mixed, target = pyrx.mixup(IMAGES, LABELS, lam=0.5, backend=backend)
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(target.to_probabilities(4, 0.1), soft)


def test_cutmix_equals_torchvisions(backend, monkeypatch):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    target = drawn(per_sample=False, pairing="roll")
    y0, x0, y1, x1 = target.boxes[0].tolist()
    parameters = {"box": (x0, y0, x1, y1), "lam_adjusted": target.lam[0].item()}
    cutmix = transforms.CutMix(num_classes=4)
    monkeypatch.setattr(cutmix, "make_params", lambda inputs: {**parameters, **sizes(inputs)})

    def sizes(inputs):
        return {"labels": LABELS, "batch_size": 6}

    expected, soft = cutmix(IMAGES.clone(), LABELS)
    mixed, same = pyrx.cutmix(
        IMAGES, LABELS, lam=target.lam, boxes=target.boxes, pairing="roll", per_sample=False, backend=backend
    )
    assert_same_bits(mixed, expected)
    torch.testing.assert_close(same.to_probabilities(4), soft)


def test_mixup_equals_torchvisions(backend, monkeypatch):
    transforms = pytest.importorskip("torchvision.transforms.v2")
    mixup = transforms.MixUp(num_classes=4)
    monkeypatch.setattr(mixup, "make_params", lambda _: {"lam": 0.25, "labels": LABELS, "batch_size": 6})
    expected, soft = mixup(IMAGES.clone(), LABELS)
    mixed, target = pyrx.mixup(IMAGES, LABELS, lam=0.25, pairing="roll", backend=backend)
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(target.to_probabilities(4), soft)


def test_cutmix_equals_kornias(backend):
    kornia = pytest.importorskip("kornia.augmentation")
    cutmix = kornia.RandomCutMixV2(p=1.0, data_keys=["input", "class"])
    expected, rows = cutmix(IMAGES, LABELS)
    corners = cutmix._params["crop_src"][0].long()  # (N, 4, 2) of (x, y), the last pixels inside
    boxes = torch.stack([corners[:, 0, 1], corners[:, 0, 0], corners[:, 2, 1] + 1, corners[:, 2, 0] + 1], 1)
    pairs = cutmix._params["mix_pairs"][0]
    mixed, target = pyrx.cutmix(IMAGES, LABELS, boxes=boxes, pairing=pairs, backend=backend)
    assert_same_bits(mixed, expected)
    # rows are (a, b, the weight of b)
    assert torch.equal(rows[0][:, 0].long(), target.a) and torch.equal(rows[0][:, 1].long(), target.b)
    torch.testing.assert_close(1 - rows[0][:, 2], target.lam)


# nn.Mixup.


ARGUMENTS = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.9, "switch_prob": 0.4, "num_classes": 4}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
@pytest.mark.parametrize("samples", [1, 5, 6])
def test_nn_mixup_takes_timms_place(backend, mode, samples):
    images, labels = torch.rand(samples, 3, 8, 8), torch.arange(samples) % 4
    mix = pyrx.nn.Mixup(**ARGUMENTS, mode=mode, backend=backend, generator=torch.Generator().manual_seed(3))
    kept = images.clone()
    mixed, soft = mix(images, labels)
    rows = samples // 2 if mode == "half" else samples
    assert mixed.shape == (rows, 3, 8, 8) and soft.shape == (rows, 4) and soft.dtype == torch.float32
    assert mixed.data_ptr() == images.data_ptr() or rows == 0  # in place, as timm
    torch.testing.assert_close(soft.sum(1), torch.ones(rows))
    again = pyrx.nn.Mixup(
        **ARGUMENTS,
        mode=mode,
        backend=backend,
        generator=torch.Generator().manual_seed(3),
        inplace=False,
        mixed_target=True,
    )
    same, target = again(kept, labels)
    assert_same_bits(same, mixed)
    assert isinstance(target, pyrx.MixedTarget)
    torch.testing.assert_close(target.to_probabilities(4, 0.1), soft)


def test_nn_mixup_draws_as_its_mode_says(backend):
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40)
    for mode, shared in (("batch", 1), ("pair", 20), ("elem", 40)):
        mix = pyrx.nn.Mixup(mixup_alpha=1.0, mode=mode, inplace=False, mixed_target=True, backend=backend)
        lam = mix(images, labels)[1].lam
        assert len(set(lam.tolist())) == shared
        if mode == "pair":
            assert torch.equal(lam, lam.flip(0))


def test_nn_mixup_switches(backend):
    images, labels = torch.rand(4000, 1, 16, 16), torch.zeros(4000, dtype=torch.int64)
    mix = pyrx.nn.Mixup(
        1.0, 1.0, switch_prob=0.3, prob=0.5, mode="elem", inplace=False, mixed_target=True, backend=backend
    )
    boxes = mix(images, labels)[1].boxes
    mixed = (boxes[:, 0] == -1).double().mean().item()
    pasted = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) > 0).double().mean().item()
    assert abs(mixed - 0.5 * 0.7) < 0.04
    assert 0.08 < pasted < 0.15 + 0.03
    for target_of in (mix.eval(), mix.train()):
        mix.mixup_enabled = mix.training is False
        same, target = target_of(images, labels)
        assert same is images and (target.lam == 1).all()


def test_nn_mixup_minmax(backend):
    mix = pyrx.nn.Mixup(0.0, cutmix_minmax=(0.25, 0.5), mode="elem", inplace=False, mixed_target=True, backend=backend)
    boxes = mix(torch.rand(200, 1, 16, 16), torch.zeros(200, dtype=torch.int64))[1].boxes
    heights = boxes[:, 2] - boxes[:, 0]
    assert heights.min() == 4 and heights.max() == 7
