"""The model of the GPU kernels (bench/gpu_model.py): no kernel is without one, and the page names them all."""

import re
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu_model
from gpu_cases import Cost

PAGE = ROOT / "bench/gpu_model.md"
H200 = gpu_model.DEVICES[0]


def usage(**fields):
    return gpu_model.Usage(**{"registers": 32, "stack": 0, "shared": 0, "threads": 256} | fields)


def test_the_tree_s_kernels_are_found():
    found = gpu_model.in_the_tree()
    text = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*"))
    assert len([each for each in found if ":" not in each]) == text.count("__global__ void")
    assert {"dropout_kernel", "update_rows_kernel", "patch_mask:_patch_mask_kernel"} <= found


def test_every_kernel_has_a_cost():
    assert gpu_model.modelled() == gpu_model.in_the_tree()


def test_cases_have_names_of_their_own():
    names = [each.name for each in gpu_model.all_cases()]
    assert len(names) == len(set(names))


def test_the_page_names_every_kernel():
    shown = re.findall(r"^\| `([^`]+)` \| (cuda|triton) \|", PAGE.read_text(), re.M)
    expected = set()
    for case in gpu_model.all_cases():
        assert f"### {case.name}\n" in PAGE.read_text(), "make gpu-model writes the page anew"
        expected |= {(gpu_model.shown(each.instance), "cuda") for each in case.cuda}
        expected |= {(each.kernel, "triton") for each in case.triton}
    assert set(shown) == expected, "make gpu-model writes the page anew"


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, 1.0),
        ({"registers": 64}, 0.5),
        ({"registers": 65}, 0.375),  # 72 a thread
        ({"registers": 255}, 0.125),
        ({"threads": 32}, 0.5),  # 32 blocks
        ({"shared": 100 * 1024}, 0.25),
        ({"shared": 227 * 1024, "threads": 1024}, 0.5),
    ],
)
def test_occupancy(fields, share):
    assert gpu_model.occupancy(usage(**fields), 228 * 1024) == share


def test_times():
    memory = Cost(H200.memory, alu=H200.alu / 2, fma=H200.fma / 4)
    found = gpu_model.time_of(memory, H200)
    assert found == (pytest.approx(1 + H200.launch), pytest.approx(1 + H200.launch), "memory")
    busy = gpu_model.time_of(memory._replace(alu=H200.alu * 2), H200)
    assert busy == (pytest.approx(2, rel=1e-5), pytest.approx(2.25, rel=1e-5), "integers")
    twice = gpu_model.time_of(Cost(4.0, launches=2), H200)
    assert twice.best == pytest.approx(2 * H200.launch) and twice.bound == "launch (memory)"
    # without a loop the instructions are counted, and take their time
    straight = usage(instructions=1000, programs=int(H200.fma / 256 / 1000))
    assert gpu_model.time_of(Cost(4.0), H200, straight).best == pytest.approx(1, rel=1e-3)
    assert gpu_model.time_of(Cost(4.0), H200, straight._replace(loops=1)).best < 1e-5


def test_machine_code_is_read():
    text = """
Fatbin elf code:
arch = sm_80
 Function _Z3foov:
  REG:40 STACK:8 SHARED:1024 LOCAL:0
arch = sm_90
 Function _Z3foov:
  REG:42 STACK:0 SHARED:2048 LOCAL:0
"""
    assert list(gpu_model.resource_usage(text)) == [(80, "_Z3foov", (40, 8, 1024)), (90, "_Z3foov", (42, 0, 2048))]
    code = gpu_model.Code()
    for line in (
        "        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0 */",
        "        /*0020*/              @!P0 LDG.E.U16.CONSTANT R4, [R2.64] ;",
        "        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;",
        "        /*0040*/                   STL [R1], R4 ;",
        "        /*0050*/               @P0 BRA 0x10 ;",
        "        /*0060*/                   BRA 0x60;",
        "        /*0070*/                   NOP;",
    ):
        code.read(line)
    found = code.of(usage())
    assert (found.instructions, found.local, found.loops, found.widest, found.products) == (6, 1, 1, 128, "HGMMA")
