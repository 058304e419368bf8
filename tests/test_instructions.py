"""The built module needs no newer processor than it may, and what looks for that finds it."""

import shutil
import subprocess

import pytest
from instructions import misplaced

from pyrx import _extension

pytestmark = pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")

FUNCTIONS = """
#include <immintrin.h>
#include <algorithm>
#define AVX2 __attribute__((target("avx2,bmi2")))
#define AVX512 __attribute__((target("avx2,bmi2,avx512f,avx512vl")))
#define SSE4 __attribute__((target("sse4.2,popcnt")))
namespace avx2 {
AVX2 void right(float* x) { _mm256_storeu_ps(x, _mm256_setzero_ps()); }
AVX512 void too_wide(float* x) { _mm512_storeu_ps(x, _mm512_set1_ps(x[9])); }
AVX512 void too_many(float* x, unsigned char k) { _mm256_mask_storeu_ps(x, k, _mm256_set1_ps(2)); }
}
namespace avx512 {
AVX512 void right(float* x) { _mm512_storeu_ps(x, _mm512_set1_ps(x[9])); }
}
SSE4 int counted(unsigned x) { return _mm_popcnt_u32(x); }
AVX2 unsigned spread(unsigned x, unsigned y) { return _pdep_u32(x, y); }
// what the linker may pick for the whole module
template <typename T> AVX2 __attribute__((noinline)) void shared(T* x) { x[0] = x[1] + x[2]; }
template void shared<float>(float*);
int plain(const int* x, int n) { return *std::max_element(x, x + n); }
"""


def test_the_module_runs_on_old_processors():
    if _extension.module is None:
        pytest.skip(_extension.error)
    assert misplaced(_extension.module.__file__) == []


def test_what_is_misplaced_is_found(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    source, library = tmp_path / "functions.cpp", tmp_path / "functions.so"
    source.write_text(FUNCTIONS)
    subprocess.run(["g++", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    found = {function: instruction.split()[0] for function, instruction in misplaced(library)}
    assert {name for name in found if "right" in name or "plain" in name} == set()
    expected = {"too_wide": "v", "too_many": "kmov", "counted": "popcnt", "spread": "pdep", "shared": "v"}
    for name, instruction in expected.items():
        (starts,) = [found[function] for function in found if name in function]
        assert starts.startswith(instruction), (name, starts)
