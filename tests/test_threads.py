"""Called from several Python threads at once: the bits are those of one thread, and the C++ ops let the others run."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calls import CALLS, MATMULS, loss_of, run, with_gradients
from helpers import assert_same_bits, threads

import pyrx

THREADS = 8
SIZES = (1, 3, 40)


def at_once(function):
    """[function(i)] of 8 threads that begin together."""
    begin = threading.Barrier(THREADS, timeout=60)

    def work(i):
        begin.wait()
        return function(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def same(found, expected, what):
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other, what)


@pytest.mark.parametrize("counts", [(2,), (1, 2, 3)], ids=["one_count", "several_counts"])
def test_all_ops_at_once(cpu, counts):
    """Same ops and shapes in some threads, others in others; each thread has its own count of threads within an op."""
    keys = [(name, k) for name in CALLS for k in SIZES]
    with threads(2):
        expected = {key: run(*key) for key in keys}

    def work(i):
        torch.set_num_threads(counts[i % len(counts)])
        order = random.Random(i // 2).sample(keys, len(keys))  # pairs of threads go through the same ones
        return [(key, run(*key)) for key in order]

    with threads(2):
        found = at_once(work)
    for each in found:
        for key, results in each:
            if key[0] in MATMULS and len(counts) > 1:
                torch.testing.assert_close(results, expected[key])
            else:
                same(results, expected[key], str(key))


def test_the_same_tensors_in_every_thread(cpu):
    """One leaf, one call: what is shared is only read."""
    for name, call in CALLS.items():
        tensors = call.tensors(7)
        expected = run(name, tensors=tensors)
        for results in at_once(lambda i, name=name, tensors=tensors: run(name, tensors=tensors)):
            same(results, expected, name)


def test_one_graph_backward_in_every_thread(cpu):
    """retain_graph: what the forward saved serves all of them."""
    for name, call in CALLS.items():
        if not call.differentiable:
            continue
        tensors, leaves = with_gradients(call.tensors(7))
        loss = loss_of(call(*tensors, seed=5))

        def gradients(i, loss=loss, leaves=leaves):
            return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)

        expected = gradients(0)
        for found in at_once(gradients):
            for one, other in zip(found, expected, strict=True):
                assert one is other is None or torch.equal(one, other), name


FIRST = """
import random, sys, threading
import torch
import helpers, pyrx
from calls import CALLS, run
begin, found = threading.Barrier(8, timeout=60), {}

def work(i):
    begin.wait()
    names = random.Random(i).sample(sorted(CALLS), len(CALLS))
    found[i] = {name: run(name, 3) for name in names}

pool = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for each in pool: each.start()
for each in pool: each.join()
for name in CALLS:
    for i in range(8):
        for one, other in zip(found[i][name], run(name, 3), strict=True):
            helpers.assert_same_bits(one, other, name)
print("the same")
"""


def test_the_first_calls_of_a_process_may_be_at_once(cpu, python):
    assert "the same" in python(FIRST)


def test_a_generator_may_be_shared(cpu):
    """Every call draws a seed of its own: as many different ones as calls, the same ones whatever the order."""
    x = torch.ones(4096)
    per_thread = 20

    def masks(generator, count):
        return [tuple(pyrx.dropout(x, 0.5, generator=generator).nonzero()[:64, 0].tolist()) for _ in range(count)]

    expected = masks(torch.Generator().manual_seed(3), THREADS * per_thread)
    shared = torch.Generator().manual_seed(3)
    found = [each for drawn in at_once(lambda i: masks(shared, per_thread)) for each in drawn]
    assert sorted(found) == sorted(expected) and len(set(found)) == len(found)


# (name, size, whether its backward is as long): some milliseconds each
LONG = [
    ("dropout", 50000, True),
    ("multi_sample_dropout_cross_entropy", 200, False),
    ("mixed_cross_entropy", 40000, False),
    ("mixup", 2000, True),
    ("random_erasing", 2000, True),
    ("noise_mask", 4000, True),
    ("neighbor_fill", 1000, True),
    ("patch_mask", 4000, False),
    ("nm_mask", 300000, False),
    ("nm_sparsify", 100000, True),
    ("nm_transposable_mask", 40000, False),
    ("masked_adamw", 40000, False),
    ("block_sparse_attention", 300, True),
]


def ticks_within(function):
    """How often another thread ran in the middle of `function`."""
    seen, running = [], threading.Event()

    def tick():
        running.set()
        while running.is_set():
            seen.append(time.perf_counter())
            time.sleep(0.0002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    running.wait()
    begin = time.perf_counter()
    function()
    length = time.perf_counter() - begin
    running.clear()
    ticker.join()
    # an op that holds the lock lets others run just before it and just after it alone
    return sum(begin + 0.2 * length < each < begin + 0.8 * length for each in seen)


def test_ticks_tell_a_lock_that_is_held():
    numbers = torch.rand(300_000, dtype=torch.float64).tolist()
    assert not any(ticks_within(lambda: sorted(numbers)) for _ in range(3))
    assert any(ticks_within(lambda: time.sleep(0.01)) for _ in range(30))


@pytest.mark.parametrize("name, k, backward", LONG, ids=[name for name, _, _ in LONG])
def test_the_interpreter_lock_is_released(cpu, name, k, backward):
    tensors, leaves = with_gradients(CALLS[name].tensors(k))
    with threads(1):
        assert any(ticks_within(lambda: CALLS[name](*tensors, seed=5)) for _ in range(30))
        if backward:
            results = CALLS[name](*tensors, seed=5)
            results = [each for each in results if each.requires_grad]
            upstream = [torch.ones_like(each) for each in results]

            def differentiate():
                torch.autograd.grad(results, leaves, upstream, retain_graph=True)

            assert any(ticks_within(differentiate) for _ in range(30))
