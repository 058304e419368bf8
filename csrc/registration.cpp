// The Python module. Importing it loads the TORCH_LIBRARY_IMPL registrations of the other sources.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <mutex>
#include <set>
#include <thread>

#include "cpu/simd.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef PYRX_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

// How many threads an at::parallel_for of our own code runs on: 1 if it was compiled without OpenMP.
size_t parallel_threads_seen() {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  at::parallel_for(0, 4 * at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return seen.size();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What this module was compiled against and with.");
  m.def("cpu_kernels", &pyrx::cpu::capability, "Instruction set of the CPU kernels that this process runs.");
  m.def("parallel_threads_seen", &parallel_threads_seen, "Threads that take part in an at::parallel_for of pyrx.");
}
