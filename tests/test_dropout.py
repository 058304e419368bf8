"""Philox, masks and pyrx.dropout: exact on every backend."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    FLOATS,
    SAMPLINGS,
    assert_same_bits,
    bits,
    dropped,
    expected_mask,
    lanes,
    layouts,
    name_of,
    philox,
    scale_of,
    threads,
    threshold_of,
)
from hypothesis import given
from hypothesis import strategies as st

import pyrx
from pyrx import _random
from pyrx.reference import dropout as reference

SHAPES = [
    (),
    (0,),
    (1,),
    (3,),
    (63,),
    (64,),
    (100,),
    (1311,),
    (0, 63),
    (1, 63),
    (3, 63),
    (7, 100),
    (3, 0),
    (2, 5, 1311),
]
SEEDS = [0, 1, -1, -(2**63), 2**63, 2**64 - 1, 0x0123456789ABCDEF]
PROBABILITIES = [0.0, 0.3, 0.5, 0.999999]

# Random123's kat_vectors: philox 4x32, 10 rounds (counter, key, words)
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# of docs/randomness.md and more: seed, sample, lanes u of the first elements
KNOWN_LANES = [
    (0, 0, "e8d5 6627 c58d e169 ac4c bc57 dbd8 9b00 cca4 f8e4 00db 5cb2 74eb b1a5 ff67 097e"),
    (0x0123456789ABCDEF, 3, "02a1 4f1c 88c3 4169 62d0 2e66 6a0e f08d"),
]


# Masks.


@pytest.mark.parametrize("counter, key, words", RANDOM123, ids=["zeros", "ones", "pi"])
def test_numpy_philox_gives_random123s_known_answers(counter, key, words):
    assert tuple(int(each) for each in philox(counter, key)) == words


@pytest.mark.parametrize("seed, sample, text", KNOWN_LANES, ids=["seed_0", "seed_0123456789abcdef"])
def test_lanes_are_the_known_ones(seed, sample, text):
    u = [int(each, 16) for each in text.split()]
    assert lanes(seed, len(u), sample).tolist() == u
    assert reference.lanes(torch.tensor(seed), len(u), sample).tolist() == u


@pytest.mark.parametrize("seed, sample, text", KNOWN_LANES, ids=["seed_0", "seed_0123456789abcdef"])
def test_masks_keep_exactly_the_lanes_at_or_above_the_threshold(backend, seed, sample, text):
    u = [int(each, 16) for each in text.split()]
    for i, lane in enumerate(u):
        kept = pyrx.dropout_mask((len(u),), lane / 65536, seed, sample, backend=backend)
        assert kept[i], f"lane {i}: u = {lane:#x} is kept at threshold u"
        if lane < 65535:
            kept = pyrx.dropout_mask((len(u),), (lane + 1) / 65536, seed, sample, backend=backend)
            assert not kept[i], f"lane {i}: u = {lane:#x} is dropped at threshold u + 1"


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("p", PROBABILITIES)
def test_masks_equal_numpys(backend, shape, p):
    for sampling in SAMPLINGS:
        for sample in (0, 1, 2, 7, 2**31, 2**32 - 1):
            got = pyrx.dropout_mask(shape, p, 12345, sample, sampling=sampling, backend=backend)
            assert got.dtype == torch.bool and got.is_contiguous()
            assert torch.equal(got, expected_mask(shape, p, 12345, sample, sampling)), (sampling, sample)


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_seeds_of_64_bits(backend, seed):
    expected = expected_mask((3, 100), 0.5, seed)
    signed = seed - 2**64 if seed >= 2**63 else seed
    for given_seed in (seed, torch.tensor(signed), torch.tensor([signed])):
        assert torch.equal(pyrx.dropout_mask((3, 100), 0.5, given_seed, backend=backend), expected)


@pytest.mark.parametrize("shape", [each for each in SHAPES if each], ids=name_of)
def test_packed_masks_are_little_endian_rows(backend, shape):
    for sampling, sample, p in (
        ("independent", 0, 0.5),
        ("independent", 5, 0.3),
        ("antithetic", 3, 0.3),
        ("independent", 1, 0.0),
    ):
        plain = expected_mask(shape, p, 99, sample, sampling).numpy()
        packed = pyrx.dropout_mask(shape, p, 99, sample, True, sampling=sampling, backend=backend)
        assert packed.dtype == torch.uint8
        expected = torch.from_numpy(np.packbits(plain, axis=-1, bitorder="little"))
        assert packed.shape == expected.shape == (*shape[:-1], -(-shape[-1] // 8))
        assert torch.equal(packed, expected), (sampling, sample, p)


def test_antithetic_pairs(backend):
    def mask(p, sample, sampling="antithetic"):
        return pyrx.dropout_mask((7, 1311), p, 3, sample, sampling=sampling, backend=backend)

    assert torch.equal(mask(0.5, 1), ~mask(0.5, 0)) and torch.equal(mask(0.5, 7), ~mask(0.5, 6))
    assert torch.equal(mask(0.5, 4), mask(0.5, 4, "independent"))
    assert not torch.equal(mask(0.5, 5), mask(0.5, 5, "independent"))
    assert (mask(0.3, 0) | mask(0.3, 1)).all() and not (mask(0.7, 0) & mask(0.7, 1)).any()


@pytest.mark.parametrize(
    "p, expected",
    [
        (0, 0),
        (0.0, 0),
        (0.5, 32768),
        (0.3, 19661),
        (1 / 65536, 1),
        (1e-9, 0),
        (0.99999, 65535),
        (0.999999, 65535),
        (math.nextafter(1, 0), 65535),
    ],
)
def test_thresholds(p, expected):
    assert _random.threshold("dropout", p) == expected == threshold_of(p)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_kept_share_and_independence(backend, p):
    n = 1 << 18
    keep = 1 - threshold_of(p) / 65536
    masks = {
        "sample 0": pyrx.dropout_mask((n,), p, 42, 0, backend=backend),
        "sample 1": pyrx.dropout_mask((n,), p, 42, 1, backend=backend),
        "seed 43": pyrx.dropout_mask((n,), p, 43, 0, backend=backend),
        "seed 2**32": pyrx.dropout_mask((n,), p, 42 + 2**32, 0, backend=backend),
    }
    masks["one further"] = masks["sample 0"].roll(1)
    masks["eight further"] = masks["sample 0"].roll(8)
    deviation = (keep * (1 - keep) / n) ** 0.5
    for name, mask in masks.items():
        assert abs(mask.double().mean().item() - keep) < 5 * deviation, name
        if name != "sample 0":
            correlation = np.corrcoef(mask.numpy(), masks["sample 0"].numpy())[0, 1]
            assert abs(correlation) < 5 / n**0.5, name


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    p=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(2**63), 2**64 - 1),
    sample=st.integers(0, 2**32 - 1),
    sampling=st.sampled_from(SAMPLINGS),
)
def test_mask_layout(backend, shape, p, seed, sample, sampling):
    plain = pyrx.dropout_mask(shape, p, seed, sample, sampling=sampling, backend=backend)
    assert torch.equal(plain, expected_mask(shape, p, seed, sample, sampling))
    packed = pyrx.dropout_mask(shape, p, seed, sample, True, sampling=sampling, backend=backend)
    assert torch.equal(packed, torch.from_numpy(np.packbits(plain.numpy(), axis=-1, bitorder="little")))


def test_mask_device_follows_the_seed_or_the_argument(backend):
    assert pyrx.dropout_mask((3,), 0.5, torch.tensor(1), backend=backend).device.type == "cpu"
    assert pyrx.dropout_mask((3,), 0.5, 1, device="cpu", backend=backend).device.type == "cpu"


# Dropout.


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("p", PROBABILITIES)
def test_dropout_is_a_select_of_the_scaled_input(backend, dtype, p):
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        for sample in (0, 3):
            got = pyrx.dropout(x, p, seed=5, sample=sample, backend=backend)
            assert_same_bits(got, dropped(x, p, 5, sample), f"{shape}, sample {sample}")


def every_half_or_random_bits(dtype):
    """All values of a 16-bit dtype; random bits, so every kind of NaN and denormal, of a wider one."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    kind = torch.int32 if dtype == torch.float32 else torch.int64
    found = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (4096,), dtype=kind)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-310, -1e-40], dtype=dtype).view(kind)
    signalling = torch.tensor([torch.tensor(math.inf, dtype=dtype).view(kind).item() + 1], dtype=kind)
    return torch.cat([special, signalling, found]).view(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_dropout_at_p_0_is_the_input_bit_for_bit(backend, dtype):
    x = every_half_or_random_bits(dtype)
    got = pyrx.dropout(x, 0.0, seed=1, backend=backend)
    assert_same_bits(got, x)
    assert got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0], ids=str)
def test_dropped_elements_are_plus_zero_whatever_they_were(backend, dtype, value):
    x = torch.full((3, 100), value, dtype=dtype)
    got = pyrx.dropout(x, 0.5, seed=2, backend=backend)
    mask = expected_mask((3, 100), 0.5, 2)
    assert (bits(got)[~mask] == 0).all()
    assert torch.equal(got[mask].isnan(), x[mask].isnan())
    if not math.isnan(value):
        assert (got[mask] == value * 2).all()


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 7, 5), (2, 3, 4, 5, 6)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_any_strides_in_the_same_strides_out(backend, shape, dtype):
    for name, x in layouts(shape, dtype):
        x.requires_grad_()
        got = pyrx.dropout(x, 0.3, seed=7, backend=backend)
        assert_same_bits(got, dropped(x.detach(), 0.3, 7), name)
        assert got.stride() == torch.empty_like(x).stride(), name
        for grad_name, upstream in layouts(shape, dtype):
            (grad,) = torch.autograd.grad(got, x, upstream, retain_graph=True)
            assert_same_bits(grad, dropped(upstream, 0.3, 7), f"{name}, gradient {grad_name}")


def test_expanded_and_overlapping_inputs(backend):
    row = torch.randn(1, 37)
    for x in (row.expand(5, 37), torch.randn(50).as_strided((5, 10), (3, 1)), torch.randn(()).expand(4, 9)):
        got = pyrx.dropout(x, 0.5, seed=7, backend=backend)
        assert_same_bits(got, dropped(x, 0.5, 7))
        assert got.stride() == torch.empty_like(x).stride()
    row.requires_grad_()
    (grad,) = torch.autograd.grad(pyrx.dropout(row.expand(5, 37), 0.5, seed=7, backend=backend).sum(), row)
    torch.testing.assert_close(grad, dropped(torch.ones(5, 37), 0.5, 7).sum(0, keepdim=True), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backward_uses_the_same_mask(backend, dtype):
    x = torch.randn(7, 100, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = torch.randn(7, 100, dtype=torch.float64).to(dtype)
    upstream[0, :50] = math.inf
    got = pyrx.dropout(x, 0.3, seed=11, sample=4, backend=backend)
    (grad,) = torch.autograd.grad(got, x, upstream, retain_graph=True)
    assert_same_bits(grad, dropped(upstream, 0.3, 11, 4))
    (again,) = torch.autograd.grad(got, x, upstream)
    assert_same_bits(again, grad)


def test_gradcheck_twice(backend):
    x = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)

    def function(value):
        return pyrx.dropout(value, 0.3, seed=1, backend=backend)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_double_backward_is_the_mask_once_more(backend):
    x = torch.randn(5, 63, requires_grad=True)
    y = pyrx.dropout(x, 0.5, seed=3, backend=backend)
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 2 * 4 * expected_mask((5, 63), 0.5, 3).float())


def test_nothing_of_the_inputs_size_is_saved(cpu):
    saved = []
    x = torch.randn(300, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        pyrx.dropout(x, 0.5, backend=cpu)
        pyrx.multi_sample_dropout(x, 3, 0.5, backend=cpu)
    assert saved == [8, 8], "the two seeds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_thread_counts_do_not_change_bits(backend, dtype):
    x = torch.randn(401, 1311).to(dtype)
    with threads(1):
        one = (
            pyrx.dropout(x, 0.3, seed=9, backend=backend),
            pyrx.dropout_mask((401, 1311), 0.3, 9, 0, True, backend=backend),
        )
    for count in (2, 3):
        with threads(count):
            assert_same_bits(pyrx.dropout(x, 0.3, seed=9, backend=backend), one[0], f"{count} threads")
            assert torch.equal(pyrx.dropout_mask((401, 1311), 0.3, 9, 0, True, backend=backend), one[1])
    assert_same_bits(one[0], dropped(x, 0.3, 9))


def test_training_false_is_the_input_itself(backend):
    x = torch.randn(3, requires_grad=True)
    assert pyrx.dropout(x, 0.5, training=False, backend=backend) is x


def test_seeds_are_drawn_from_the_generator(backend):
    x = torch.ones(64)

    def draw(generator=None):
        return pyrx.dropout(x, 0.5, generator=generator, backend=backend)

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)
    with_own = draw(torch.Generator().manual_seed(7))
    state = torch.get_rng_state()
    assert torch.equal(draw(torch.Generator().manual_seed(7)), with_own)
    assert torch.equal(torch.get_rng_state(), state), "a generator of the caller's leaves torch's own alone"
    drawn = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(7))
    assert torch.equal(with_own, dropped(x, 0.5, int(drawn)))


def test_a_given_seed_leaves_the_generators_alone(backend):
    state = torch.get_rng_state()
    pyrx.dropout(torch.ones(8), 0.5, seed=1, backend=backend)
    pyrx.dropout(torch.ones(8), 0.5, training=False, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


def test_expectation_is_exact(backend):
    """Over all 65536 values of u a kept element's scale times its kept share is one."""
    for p in (0.1, 0.3, 0.5, 0.9):
        kept = 65536 - threshold_of(p)
        x = torch.ones(8, dtype=torch.float64)
        got = pyrx.dropout(x, p, seed=1, backend=backend)
        assert set(got.tolist()) <= {0.0, 65536 / kept} and scale_of(p) * kept == pytest.approx(65536, rel=1e-15)
