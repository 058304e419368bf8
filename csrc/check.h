// One family of checks: every message names op, argument, expected and got.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <concepts>
#include <string>

namespace pyrx {

// As Python prints it. No stream is asked to print a number: where the compiler links its own libstdc++ into the
// extension, that crashes.
inline std::string text(const std::string& value) { return value; }
inline std::string text(const char* value) { return value; }
inline std::string text(c10::Device value) { return value.str(); }
inline std::string text(std::integral auto value) { return std::to_string(value); }
inline std::string text(double value) {
  char digits[32];
  const std::string found(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
  return found.find_first_of(".ein") == std::string::npos ? found + ".0" : found;
}
inline std::string text(c10::IntArrayRef values) {
  std::string found = "[";
  for (const int64_t value : values) found += (found.size() > 1 ? ", " : "") + text(value);
  return found + "]";
}

}  // namespace pyrx

// PYRX_CHECK_VALUE(w.size(1) == d, "dropout", "weight of shape [C, D]", d, w.size(1));
#define PYRX_CHECK_VALUE(cond, op, argument, expected, got) \
  TORCH_CHECK_VALUE(cond, "pyrx::", op, ": expected ", argument, " ", pyrx::text(expected), ", got ", pyrx::text(got))
#define PYRX_CHECK_TYPE(cond, op, argument, expected, got) \
  TORCH_CHECK_TYPE(cond, "pyrx::", op, ": expected ", argument, " ", pyrx::text(expected), ", got ", pyrx::text(got))
#define PYRX_CHECK_RUNTIME(cond, op, argument, expected, got) \
  TORCH_CHECK(cond, "pyrx::", op, ": expected ", argument, " ", pyrx::text(expected), ", got ", pyrx::text(got))
