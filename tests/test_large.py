"""Tensors of more than 2^31 elements: their far end is what the definition gives there, found by its own index.

Inputs are windows of a short tensor, so that every row differs and mostly the result alone takes memory.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import philox, scale_of, threshold_of

import pyrx

pytestmark = pytest.mark.large

COLUMNS = 2048
ROWS = 2**20 + 3
FAR = slice(ROWS - 5, ROWS)  # past 2^31
SIDE = 224
IMAGES = 2**31 // (3 * SIDE * SIDE) + 3


def room(gibibytes):
    """Skips where fewer are available, with two to spare."""
    with open("/proc/meminfo") as file:
        available = int(file.read().split("MemAvailable:")[1].split()[0]) / 2**20
    if available < gibibytes + 2:
        pytest.skip(f"expected {gibibytes + 2} GiB of memory available, got {available:.1f}")


@pytest.fixture(autouse=True)
def poison():
    """None: it would write every result twice."""


def windows(dtype=torch.bfloat16):
    """(ROWS, COLUMNS) whose row r begins at element r."""
    values = torch.randn(ROWS + COLUMNS, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).unfold(0, COLUMNS, 1)[:ROWS]


def far_mask(p, seed, sample=0):
    """The mask of the last rows, by its definition."""
    first = FAR.start * COLUMNS
    groups = np.arange(first // 8, ROWS * COLUMNS // 8, dtype=np.uint64)
    counter = (groups & np.uint64(0xFFFFFFFF), groups >> np.uint64(32), np.full_like(groups, sample), groups * 0)
    words = philox(counter, (seed, 0))
    u = np.stack([half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))], axis=1)
    return torch.from_numpy(u.reshape(-1).astype(np.int64) >= threshold_of(p)).reshape(-1, COLUMNS)


def test_dropout_mask(cpu):
    room(0.5)
    bits = pyrx.dropout_mask((ROWS, COLUMNS), 0.3, 7, sample=2, packed=True)
    places = torch.arange(8, dtype=torch.uint8)
    found = (bits[FAR, :, None] >> places & 1).bool().flatten(1)
    assert torch.equal(found, far_mask(0.3, 7, 2))


def test_dropout(cpu):
    room(4)
    x = windows()
    found = pyrx.dropout(x, 0.3, seed=7)
    expected = torch.where(far_mask(0.3, 7), (x[FAR].float() * scale_of(0.3)).bfloat16(), 0)
    assert torch.equal(found[FAR], expected)


def test_multi_sample_dropout(cpu):
    """Many samples of a short input: the result alone is large."""
    room(4)
    x = windows()[: 2**15]
    found = pyrx.multi_sample_dropout(x, 33, 0.5, seed=7)
    mask = pyrx.dropout_mask(x.shape, 0.5, 7, sample=32, backend="reference")
    assert torch.equal(found[32, -5:], torch.where(mask[-5:], x[-5:] * 2, 0))


def test_nm_mask(cpu):
    room(6.5)
    x = windows()
    found = pyrx.nm_mask(x, 2, 8)
    assert torch.equal(found[FAR], pyrx.nm_mask(x[FAR].contiguous(), 2, 8, backend="reference"))
    assert found.sum(1, dtype=torch.int32).eq(COLUMNS // 4).all()


def test_mixed_cross_entropy(cpu):
    room(4.5)
    x = windows()
    a, b = torch.arange(ROWS) % COLUMNS, torch.arange(ROWS) * 7 % COLUMNS
    lam = torch.rand(ROWS)
    with torch.no_grad():
        loss = pyrx.mixed_cross_entropy(x, pyrx.MixedTarget(a, b, lam), reduction="none")
    one, other = (F.cross_entropy(x[FAR].float(), each[FAR], reduction="none") for each in (a, b))
    expected = lam[FAR] * one + (1 - lam[FAR]) * other
    torch.testing.assert_close(loss[FAR].float(), expected, rtol=1e-2, atol=1e-2)


def test_head(cpu):
    room(4.5)
    x, weight, labels = windows(), torch.randn(2, COLUMNS).bfloat16() / 32, torch.arange(ROWS) % 2
    with torch.no_grad():
        loss = pyrx.multi_sample_dropout_cross_entropy(x, weight, labels, num_samples=1, reduction="none", seed=7)
    dropped = torch.where(far_mask(0.5, 7), x[FAR].double() * 2, 0)
    expected = F.cross_entropy(dropped @ weight.double().t(), labels[FAR], reduction="none")
    torch.testing.assert_close(loss[FAR].double(), expected, rtol=2e-2, atol=2e-2)


def images():
    """uint8; the value of a pixel tells its image, and its place in it."""
    place = (torch.arange(3 * SIDE * SIDE) % 97).to(torch.uint8).reshape(3, SIDE, SIDE)
    image = (torch.arange(IMAGES) % 151).to(torch.uint8)[:, None, None, None]
    return torch.add(place, image, out=torch.empty(IMAGES, 3, SIDE, SIDE, dtype=torch.uint8))


def pasted(last, partner, box):
    y0, x0, y1, x1 = box.tolist()
    expected = last.clone()
    expected[:, y0:y1, x0:x1] = partner[:, y0:y1, x0:x1]
    assert (y1 - y0) * (x1 - x0) > 0
    return expected


@pytest.mark.parametrize("inplace", [True, False])
def test_cutmix(cpu, inplace):
    room(2.5 if inplace else 4.5)
    x = images()
    first, last = x[:3].clone(), x[-3:].clone()
    boxes = torch.tensor([[20, 30, 120, 180]]).repeat(IMAGES, 1)
    boxes[-3:] = torch.tensor([[0, 0, 224, 100], [50, 60, 51, 224], [3, 4, 220, 218]])
    found, _ = pyrx.cutmix(x, None, boxes=boxes, inplace=inplace)
    for i in (1, 2, 3):  # the batch is flipped
        assert torch.equal(found[-i], pasted(last[-i], first[i - 1], boxes[-i]))


def test_blend(cpu):
    room(4.5)
    x = images()
    y = torch.arange(SIDE * SIDE, dtype=torch.uint8).reshape(1, 1, SIDE, SIDE).expand(x.shape)
    alpha = (torch.arange(IMAGES)[:, None, None, None] + torch.arange(SIDE)) % 3 == 0
    alpha = alpha.expand(IMAGES, 1, SIDE, SIDE)
    found = pyrx.blend(x, y, alpha)
    assert torch.equal(found[-3:], torch.where(alpha[-3:], x[-3:], y[-3:]))


def test_random_erasing(cpu):
    room(2.5)
    x = images()
    last = x[-3:].clone()
    found, boxes = pyrx.random_erasing(x, prob=1.0, value=7.0, inplace=True, seed=3, return_boxes=True)
    for i in (1, 2, 3):
        (box,) = boxes[-i].reshape(-1, 4)[:1]
        assert torch.equal(found[-i], pasted(last[-i], torch.full_like(last[-i], 7), box))
