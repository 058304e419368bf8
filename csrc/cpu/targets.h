// What the losses share: matrices by rows, class ids that are in range.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "check.h"

namespace pyrx::cpu {

// (rows, columns) whose columns are next to each other.
inline at::Tensor rows_of(const at::Tensor& x) { return x.dim() == 2 && x.stride(1) == 1 ? x : x.contiguous(); }

// A class id out of range is an error, before anything is written.
inline void check_classes(std::string_view op, const at::Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t* ids = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i)
    PYRX_CHECK_VALUE(ids[i] == ignore_index || (ids[i] >= 0 && ids[i] < classes), op, "target",
                     "of class ids in [0, " + text(classes) + ") or ignore_index = " + text(ignore_index), ids[i]);
}

}  // namespace pyrx::cpu
