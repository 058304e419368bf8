// Large results: their memory's pages, and stores past the caches.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyrx::cpu {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kHugeBytes = 4 * kHugePage;

// A fresh result of many megabytes costs more in page faults, one a 4 KiB page, than the copy into it: 18 ms for 38 MB
// where the copy takes 4. Pages of 2 MiB make it 5.
inline void use_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__)
  const int64_t bytes = static_cast<int64_t>(fresh.nbytes());
  if (bytes < kHugeBytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: nothing is lost where it fails
#endif
}

// Whether a result goes past the caches, where what an op reads and writes has so many bytes that it would not fit in
// anyway.
inline bool is_streamed(size_t bytes) { return bytes >= 16 << 20; }

// After the last store past the caches.
inline void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace pyrx::cpu
