// Scratch memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cpu/gemm.h"

namespace pyrx::cpu {

// Buffers cut from one allocation, each on a cache line.
class Workspace {
 public:
  template <typename U>
  int64_t reserve(int64_t count) {
    const int64_t at = size_;
    size_ += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return at;
  }
  void allocate() { memory_ = at::empty({size_ + 64}, at::kByte); }
  const at::Tensor& memory() const { return memory_; }
  template <typename U>
  U* at_offset(int64_t offset) const {
    const auto base = reinterpret_cast<uintptr_t>(memory_.data_ptr());
    return reinterpret_cast<U*>(round_up(static_cast<int64_t>(base), 64) + offset);
  }

 private:
  int64_t size_ = 0;
  at::Tensor memory_;
};

// Uninitialised elements on a cache line.
template <typename U>
class Array {
 public:
  explicit Array(int64_t count)
      : memory_(at::empty({count * static_cast<int64_t>(sizeof(U))}, at::kByte)),
        data_(static_cast<U*>(memory_.mutable_data_ptr())) {}
  operator U*() const { return data_; }
  const at::Tensor& memory() const { return memory_; }

 private:
  at::Tensor memory_;
  U* data_;
};

}  // namespace pyrx::cpu
