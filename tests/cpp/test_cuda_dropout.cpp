// The dropout kernels on the host shim against loops written from the definition of the masks.
#include "cuda_shim.h"

#include "cuda/dropout.cuh"
#include "cuda_test.h"

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

const int64_t kSizes[] = {1, 3, 7, 8, 9, 63, 64, 100, 1311, 20011};
const uint32_t kThresholds[] = {0, 1, 19661, 32768, 65535};

// the known answers of docs/randomness.md and more
void test_known_answers() {
  const uint16_t first[16] = {0xe8d5, 0x6627, 0xc58d, 0xe169, 0xac4c, 0xbc57, 0xdbd8, 0x9b00,
                              0xcca4, 0xf8e4, 0x00db, 0x5cb2, 0x74eb, 0xb1a5, 0xff67, 0x097e};
  const uint16_t other[8] = {0x02a1, 0x4f1c, 0x88c3, 0x4169, 0x62d0, 0x2e66, 0x6a0e, 0xf08d};
  for (int i = 0; i < 16; ++i) CHECK_EQUAL(lane_of(0, i, 0), first[i], "lane %d of seed 0", i);
  for (int i = 0; i < 8; ++i) CHECK_EQUAL(lane_of(0x0123456789abcdef, i, 3), other[i], "lane %d", i);
}

template <typename T>
void test_dropout(unsigned blocks, int offset) {
  for (const int64_t n : kSizes) {
    for (const uint32_t t : kThresholds) {
      const int64_t seed = int64_t(0x9123456789abcdef) + n;
      const uint32_t sample = t == 1 ? 0xFFFFFFFFu : t % 5;
      Buffer<T> input(n, offset), output(n, offset);
      for (int64_t i = 0; i < n; ++i) input[i] = i % 11 == 5 ? narrow<T>(NAN) : narrow<T>(Acc<T>(normal(i)));
      shim::launch(dropout_kernel<T>, {blocks}, {kDropoutThreads}, 0, input.data(), output.data(), &seed, n,
                   SampleMask{sample, t, false}, offset == 0);
      for (int64_t i = 0; i < n; ++i) {
        const T kept = t == 0 ? input[i] : narrow<T>(widen(input[i]) * Acc<T>(65536.0 / (65536.0 - t)));
        const T expected = lane_of(seed, i, sample) >= t ? kept : narrow<T>(0);
        CHECK(same_bits(output[i], expected), "dropout of %lld, threshold %u, element %lld", (long long)n, t,
              (long long)i);
      }
    }
  }
}

void test_masks(unsigned blocks) {
  const int64_t seed = -5;
  for (const bool second : {false, true}) {
    for (const uint32_t t : kThresholds) {
      const SampleMask mask = sample_mask(second ? 3 : 2, t, true);
      const auto kept = [&](int64_t i) { return (second ? 65535 - lane_of(seed, i, 2) : lane_of(seed, i, 2)) >= t; };
      for (const int64_t n : kSizes) {
        Buffer<uint8_t> output(n);
        shim::launch(mask_kernel, {blocks}, {kDropoutThreads}, 0, output.data(), &seed, n, mask);
        for (int64_t i = 0; i < n; ++i)
          CHECK_EQUAL(output[i], kept(i), "mask of %lld, element %lld", (long long)n, (long long)i);
      }
      for (const int64_t columns : {1, 3, 8, 63, 64, 100, 1311}) {
        const int64_t rows = 5, row_bytes = (columns + 7) / 8;
        Buffer<uint8_t> output(rows * row_bytes);
        shim::launch(packed_mask_kernel, {blocks}, {kDropoutThreads}, 0, output.data(), &seed, rows, columns, mask);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = 0; i < row_bytes * 8; ++i)
            CHECK_EQUAL(output[row * row_bytes + i / 8] >> i % 8 & 1, i < columns && kept(row * columns + i),
                        "packed mask of %lld columns, row %lld, column %lld", (long long)columns, (long long)row,
                        (long long)i);
      }
    }
  }
}

// what the kernels of later ops rest on: collectives, shared memory, narrow floats
__global__ void collectives_kernel(int* output) {
  __shared__ int last;
  PYRX_DYNAMIC_SHARED(int, values);
  const int thread = threadIdx.x;
  values[thread] = thread;
  if (thread == int(blockDim.x) - 1) last = thread;
  __syncthreads();
  const int other = values[last - thread];
  output[thread] = other + __shfl_down_sync(kAllLanes, thread, 1) + __shfl_sync(kAllLanes, thread, 5) +
                   __popc(__ballot_sync(kAllLanes, thread % 3 == 0)) + int(block_sum(thread)) + int(block_sum(1.0));
  atomicAdd(output + blockDim.x, 1);
}

void test_shim() {
  const int n = 96;
  Buffer<int> output(n + 1);
  output[n] = 0;
  shim::launch(collectives_kernel, {1}, {n}, n * sizeof(int), output.data());
  for (int i = 0; i < n; ++i) {
    int votes = 0;
    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) votes += j % 3 == 0;
    CHECK_EQUAL(output[i], n - 1 - i + (i % 32 == 31 ? i : i + 1) + i / 32 * 32 + 5 + votes + n * (n - 1) / 2 + n,
                "collectives, thread %d", i);
  }
  CHECK_EQUAL(output[n], n, "atomicAdd");
  for (int bits = 0; bits < 65536; ++bits) {
    const __half h{uint16_t(bits)};
    const __nv_bfloat16 b{uint16_t(bits)};
    if (!std::isnan(widen(h))) CHECK(same_bits(narrow<__half>(widen(h)), h), "float16 %04x", bits);
    if (!std::isnan(widen(b))) CHECK(same_bits(narrow<__nv_bfloat16>(widen(b)), b), "bfloat16 %04x", bits);
  }
  CHECK_EQUAL(narrow<__half>(1 + 1 / 2048.0f).bits, 0x3C00, "ties to even");
  CHECK_EQUAL(narrow<__half>(1 + 3 / 2048.0f).bits, 0x3C02, "ties to even");
  CHECK_EQUAL(narrow<__half>(65519.0f).bits, 0x7BFF, "the largest float16");
  CHECK_EQUAL(narrow<__half>(65520.0f).bits, 0x7C00, "float16 infinity");
  CHECK_EQUAL(narrow<__nv_bfloat16>(1 + 1 / 256.0f).bits, 0x3F80, "ties to even");
}

}  // namespace

int main() {
  test_known_answers();
  using shim::Order;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kShuffled, Order::kWarpByWarp}) {
    shim::order = order;
    test_shim();
  }
  shim::order = shim::Order::kForward;
  for (const unsigned blocks : {1u, 4u}) {
    for (const int offset : {0, 1}) {
      test_dropout<float>(blocks, offset);
      test_dropout<double>(blocks, offset);
      test_dropout<__half>(blocks, offset);
      test_dropout<__nv_bfloat16>(blocks, offset);
    }
    test_masks(blocks);
  }
  return report("dropout kernels");
}
