// One family of checks: every message names op, argument, expected and got.
#pragma once

#include <c10/util/Exception.h>

// PYRX_CHECK_VALUE(w.size(1) == d, "dropout", "weight of shape [C, D]", d, w.size(1));
#define PYRX_CHECK_VALUE(cond, op, argument, expected, got) \
  TORCH_CHECK_VALUE(cond, "pyrx::", op, ": expected ", argument, " ", expected, ", got ", got)
#define PYRX_CHECK_TYPE(cond, op, argument, expected, got) \
  TORCH_CHECK_TYPE(cond, "pyrx::", op, ": expected ", argument, " ", expected, ", got ", got)
#define PYRX_CHECK_RUNTIME(cond, op, argument, expected, got) \
  TORCH_CHECK(cond, "pyrx::", op, ": expected ", argument, " ", expected, ", got ", got)
