// Checks of tensors shared by the CPU and CUDA entries of all ops, with the texts of pyrx/_checks.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <string>
#include <string_view>

#include "check.h"

namespace pyrx {

// As Python prints it: torch.float32.
inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte: return "torch.uint8";
    case at::kChar: return "torch.int8";
    case at::kShort: return "torch.int16";
    case at::kInt: return "torch.int32";
    case at::kLong: return "torch.int64";
    case at::kHalf: return "torch.float16";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kFloat: return "torch.float32";
    case at::kDouble: return "torch.float64";
    case at::kComplexFloat: return "torch.complex64";
    case at::kComplexDouble: return "torch.complex128";
    case at::kBool: return "torch.bool";
    default: return std::string("torch.") + c10::toString(dtype);
  }
}

inline at::ScalarType accumulation_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// The floating-point dtypes that kernels serve.
inline bool is_float(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

inline void check_float(std::string_view op, std::string_view argument, const at::Tensor& value) {
  const auto dtype = value.scalar_type();
  PYRX_CHECK_TYPE(is_float(dtype), op, argument,
                  "of dtype float16, bfloat16, float32 or float64", dtype_name(dtype));
}

inline void check_dtype(std::string_view op, std::string_view argument, const at::Tensor& value, at::ScalarType dtype) {
  PYRX_CHECK_TYPE(value.scalar_type() == dtype, op, argument, "of dtype " + dtype_name(dtype),
                  dtype_name(value.scalar_type()));
}

inline void check_device(std::string_view op, std::string_view argument, const at::Tensor& value, at::Device device) {
  PYRX_CHECK_RUNTIME(value.device() == device, op, argument, "on device " + device.str(), value.device());
}

// `names` are the dimensions' names, as "[C, D]".
inline void check_shape(std::string_view op, std::string_view argument, const at::Tensor& value, std::string_view names,
                        at::IntArrayRef shape) {
  PYRX_CHECK_VALUE(value.sizes() == shape, op, argument, "of shape " + std::string(names) + " = " + text(shape), value.sizes());
}

inline void check_seed(std::string_view op, const at::Tensor& seed, at::Device device) {
  check_dtype(op, "seed", seed, at::kLong);
  check_device(op, "seed", seed, device);
  PYRX_CHECK_VALUE(seed.numel() == 1, op, "seed", "of one element", seed.sizes());
}

inline void check_mask(std::string_view op, int64_t threshold, int64_t sample) {
  PYRX_CHECK_VALUE(threshold >= 0 && threshold < 65536, op, "threshold", "in [0, 65536)", threshold);
  PYRX_CHECK_VALUE(sample >= 0 && sample <= 0xFFFFFFFFll, op, "sample", "in [0, 4294967295]", sample);
}

inline void check_packed(std::string_view op, at::IntArrayRef shape, bool packed) {
  PYRX_CHECK_VALUE(!packed || !shape.empty(), op, "shape of a packed mask", "of at least one dimension", shape);
}

// A tensor of `size` elements; `names` is its dimension's, as "[C]".
inline void check_vector(std::string_view op, std::string_view argument, const std::optional<at::Tensor>& value,
                         at::ScalarType dtype, std::string_view names, int64_t size, at::Device device) {
  if (!value) return;
  check_dtype(op, argument, *value, dtype);
  check_shape(op, argument, *value, names, {size});
  check_device(op, argument, *value, device);
}

}  // namespace pyrx
