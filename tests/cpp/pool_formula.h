// Means of a block of tokens and how alike they are, from the definition, in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

struct PoolAnswer {
  std::vector<double> mean;
  double similarity;
};

// value(token, i) of `count` tokens of `size` elements.
template <typename F>
PoolAnswer pooled(int64_t count, int64_t size, F value) {
  PoolAnswer found{std::vector<double>(size), 0};
  std::vector<double> tokens(count * size), lengths(count);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < size; ++i) {
      const double x = tokens[t * size + i] = value(t, i);
      found.mean[i] += x / double(count);
      lengths[t] += x * x;
    }
  // the mean cosine of all pairs
  for (int64_t a = 0; a < count; ++a)
    for (int64_t b = 0; b < count; ++b) {
      double product = 0;
      for (int64_t i = 0; i < size; ++i) product += tokens[a * size + i] * tokens[b * size + i];
      if (lengths[a] > 0 && lengths[b] > 0) found.similarity += product / std::sqrt(lengths[a] * lengths[b]);
    }
  found.similarity /= double(count) * double(count);
  return found;
}
