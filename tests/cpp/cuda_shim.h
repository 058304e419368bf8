// CUDA on the host, just enough to run csrc/cuda/*.cuh under the sanitizers: include this first, then the kernels.
//
//   shim::launch(kernel, {grid}, {threads}, shared_bytes, arguments...);
//
// Blocks run one after another; the threads of a block are fibers that change at barriers and warp collectives. A
// barrier or collective that not all threads (lanes) of the block (warp) reach is reported and ends the program.
// `shim::order` says in which order threads run: a result that depends on it lacks a barrier. Only full-warp
// collectives are here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __host__
#define __device__
#define __shared__ static  // blocks run one at a time
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// extern __shared__ is spelled so, to work in both worlds
#define PYRX_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(shim::block.shared.data())

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#define PYRX_SHIM_VECTOR(name, type)                                                      \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                \
  struct alignas(16) name##4 { type x, y, z, w; };                                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
PYRX_SHIM_VECTOR(int, int)
PYRX_SHIM_VECTOR(uint, unsigned)
PYRX_SHIM_VECTOR(float, float)
#undef PYRX_SHIM_VECTOR

namespace shim {

// kWarpByWarp lets each warp run ahead of the others as far as barriers allow
enum class Order { kForward, kBackward, kShuffled, kWarpByWarp };
inline Order order = Order::kForward;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s (block %u %u %u, thread %u %u %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  // two sets: a lane that is one collective ahead must not overwrite what others still read
  alignas(16) unsigned char slots[2][32][16];
};

struct Fiber {
  static constexpr size_t kStack = 128 * 1024;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  dim3 index;
  bool done = false;
  unsigned collectives = 0;
  void* fake_stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Barrier barrier;
  std::function<void()> body;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  int current = 0;
  uint64_t progress = 0;
};
inline Block block;

inline void leave(bool for_good) {
  Fiber& fiber = block.fibers[block.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_size);
#endif
  fiber.done = for_good;
  swapcontext(&fiber.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fibers[block.current].fake_stack, nullptr, nullptr);
#endif
}

inline void enter(int index) {
  Fiber& fiber = block.fibers[index];
  block.current = index;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), Fiber::kStack);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
  block.body();
  ++block.progress;
  leave(true);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++block.progress;
    return;
  }
  for (const uint64_t generation = barrier.generation; barrier.generation == generation;) leave(false);
}

inline void run_block() {
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  block.fibers.resize(std::max<size_t>(block.fibers.size(), threads));
  block.warps.assign((threads + 31) / 32, Warp{});
  std::fill(block.shared.begin(), block.shared.end(), 0xFF);  // NaN
  block.barrier = {threads, 0, 0};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    ++block.warps[i / 32].barrier.expected;
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.done = false;
    fiber.collectives = 0;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<int> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == Order::kBackward) std::reverse(turn.begin(), turn.end());
  uint64_t random = 88172645463325252u;
  for (int i = threads - 1; order == Order::kShuffled && i > 0; --i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::swap(turn[i], turn[(random >> 33) % (i + 1)]);
  }
  const bool ahead = order == Order::kWarpByWarp;
  const int span = ahead ? 32 : threads;
  for (int left = threads; left > 0;) {
    const uint64_t before = block.progress;
    for (int first = 0; first < threads; first += span) {
      uint64_t seen;
      do {
        seen = block.progress;
        for (int i = first; i < std::min(first + span, threads); ++i) {
          if (block.fibers[turn[i]].done) continue;
          enter(turn[i]);
          left -= block.fibers[turn[i]].done;
        }
      } while (ahead && block.progress != seen);
    }
    if (block.progress == before) fail("a barrier or warp collective is not reached by every thread");
  }
}

template <typename F, typename... Arguments>
void launch(const F& kernel, dim3 grid, dim3 threads, size_t shared_bytes, const Arguments&... arguments) {
  if (threads.x * threads.y * threads.z == 0 || threads.x * threads.y * threads.z > 1024) fail("1 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("a grid without blocks");
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) fail("a grid of too many blocks");
  gridDim = grid;
  blockDim = threads;
  block.shared.assign(shared_bytes, 0);
  block.body = [&] { kernel(arguments...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
  block.body = nullptr;
}

inline int linear_thread() { return block.current; }
inline int lane() { return linear_thread() % 32; }

// Every lane gives a value and sees all lanes' values.
template <typename T>
struct Exchange {
  Warp& warp = block.warps[linear_thread() / 32];
  const unsigned set = block.fibers[block.current].collectives++ % 2;

  Exchange(unsigned mask, const T& mine) {
    static_assert(sizeof(T) <= 16);
    const int lanes = warp.barrier.expected;
    if (mask != (lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1)) fail("a warp collective without all of its lanes");
    std::memcpy(warp.slots[set][lane()], &mine, sizeof(T));
    wait(warp.barrier);
  }
  T of(int other) const {
    if (other >= warp.barrier.expected) fail("a shuffle from a lane that is not there");
    T value;
    std::memcpy(&value, warp.slots[set][other], sizeof(T));
    return value;
  }
};

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::block.barrier); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { shim::Exchange<char>(mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return shim::Exchange<T>(mask, value).of((shim::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const int from = shim::lane() ^ other;
  return shim::Exchange<T>(mask, value).of((from ^ shim::lane()) >= width ? shim::lane() : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = shim::lane(), from = lane + int(by);
  return shim::Exchange<T>(mask, value).of(from / width == lane / width ? from : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = shim::lane(), from = lane - int(by);
  return shim::Exchange<T>(mask, value).of(from >= 0 && from / width == lane / width ? from : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const shim::Exchange<int> votes(mask, predicate);
  unsigned result = 0;
  for (int i = 0; i < votes.warp.barrier.expected; ++i) result |= unsigned(votes.of(i) != 0) << i;
  return result;
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t(static_cast<unsigned __int128>(a) * b >> 64); }

struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                          : std::ldexp(float(1024 + mantissa), exponent - 25);
  return h.bits >> 15 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return {0x7FFF};
  if (x >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  const int exponent = x == 0 ? -14 : std::max(std::ilogb(x), -14);
  const int units = int(std::nearbyint(std::ldexp(x, 10 - exponent)));  // to even; 2048 carries into the exponent
  return {uint16_t(sign | (((exponent + 15) << 10) + units - 1024))};
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t word = uint32_t(h.bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (std::isnan(x)) return {0x7FFF};
  return {uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
}
