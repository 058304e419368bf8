"""Every row on a GPU, by each of its backends: the reference's values, the same bits from run to run, other streams,
two streams at once, CUDA graphs, no waiting for the device, a second GPU."""

import pytest
import row_calls
import torch
from helpers import assert_same_bits, capture, need
from test_row_calls import assert_agree

from pyrx._backends import ABSENT

pytestmark = pytest.mark.gpu

TABLE = [
    pytest.param(call, backend, id=f"{call.row}, {call.name}, {backend}")
    for call in row_calls.TABLE
    for backend in ("cuda", "triton")
    if (call.row, backend) not in ABSENT
]


class Case:
    """A call with its tensors on a device."""

    def __init__(self, call, backend, device="cuda"):
        need(backend, "cuda", ops=(call.row,))
        self.call, self.backend, self.device = call, backend, torch.device(device)

    def tensors(self, seed=0):
        return [each.to(self.device) for each in self.call.tensors(seed)]

    def seed(self, value=7):
        return torch.full((), value, dtype=torch.int64, device=self.device)

    def run(self, tensors, seed):
        return self.call(tensors, seed, self.backend)


@pytest.fixture
def case(request):
    return Case(*request.param)


def each_row(function):
    parameters = [pytest.param(tuple(each.values), id=each.id) for each in TABLE]
    return pytest.mark.parametrize("case", parameters, indirect=True)(function)


def assert_same(got, expected, what):
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one.cpu(), other.cpu(), what)


@each_row
def test_the_reference_s_values(case):
    got = case.run(case.tensors(), case.seed())
    expected = case.call(case.call.tensors(), torch.tensor(7), "reference")
    assert_agree(case.call, [each.cpu() for each in got], expected)


@each_row
def test_the_same_bits_from_run_to_run(case):
    tensors = case.tensors()
    first = case.run(tensors, case.seed())
    for _ in range(5):
        assert_same(case.run(tensors, case.seed()), first, "the next run")


@each_row
def test_another_stream(case):
    """Work is queued behind what makes its tensors, on the stream that is current."""
    tensors, seed = case.tensors(), case.seed()
    expected = case.run(tensors, seed)
    late, late_seed = [torch.empty_like(each) for each in tensors], torch.empty_like(seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for to, each in zip((*late, late_seed), (*tensors, seed), strict=True):
            to.copy_(each)
        got = case.run(late, late_seed)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, expected, "on another stream")


@each_row
def test_two_streams_at_once(case):
    given = [(case.tensors(i), case.seed(i)) for i in range(2)]
    expected = [case.run(*each) for each in given]
    streams = [torch.cuda.Stream() for _ in given]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = [[], []]
    for _ in range(4):
        for stream, each, found in zip(streams, given, got, strict=True):
            with torch.cuda.stream(stream):
                found.append(case.run(*each))
    torch.cuda.synchronize()
    for found, each in zip(got, expected, strict=True):
        for one in found:
            assert_same(one, each, "beside another stream")


@each_row
def test_a_graph_replays(case):
    """What a graph computes follows its tensors and its seed."""
    tensors, seed = case.tensors(), case.seed()
    graph, got = capture(lambda: case.run(tensors, seed))
    for value in (1, 2):
        for to, each in zip(tensors, case.tensors(value), strict=True):
            to.copy_(each)
        seed.fill_(value)
        graph.replay()
        assert_same(got, case.run(case.tensors(value), case.seed(value)), "a replay")


@each_row
def test_nothing_waits(case):
    tensors, seed = case.tensors(), case.seed()
    case.run(tensors, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(tensors, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_row
def test_the_second_gpu(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = case.run(case.tensors(), case.seed())
    there = Case(case.call, case.backend, "cuda:1")
    assert torch.cuda.current_device() == 0
    got = there.run(there.tensors(), there.seed())
    assert all(each.device.index == 1 for each in got)
    assert_agree(case.call, [each.cpu() for each in got], [each.cpu() for each in expected])
