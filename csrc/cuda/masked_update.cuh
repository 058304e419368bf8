// Masked optimizer steps, many tensors a launch: update in registers, rank there, write. One pass over all that moves.
#pragma once

#include "cuda/nm_rank.cuh"
#include "kernels/masked_update.h"

namespace pyrx::cuda {

constexpr int kUpdateThreads = 256;
constexpr int kUpdateRounds = 4;    // of a block over a tensor
constexpr int kUpdateTensors = 48;  // of a launch, whose parameters are at most 4096 bytes
constexpr int kMostMoments = 2;

template <typename T>
constexpr uint64_t kInfinity = kInfinityFloat;  // its bits
template <>
inline constexpr uint64_t kInfinity<double> = kInfinityDouble;
template <>
inline constexpr uint64_t kInfinity<__half> = kInfinityHalf;
template <>
inline constexpr uint64_t kInfinity<__nv_bfloat16> = kInfinityBFloat16;

struct AdamW {
  static constexpr int kMoments = 2;
  using Options = AdamWOptions;
  template <typename A>
  using Step = AdamWStep<A>;

  template <typename A>
  __device__ static AdamWStep<A> step(const AdamWOptions& options, double lr, const float* count) {
    return adamw_step<A>(options, lr, *count);
  }
  template <typename A>
  __device__ static void update(const AdamWStep<A>& step, A& weight, A (&moments)[2], A gradient, bool kept) {
    const AdamWElement<A> found = adamw(step, {weight, moments[0], moments[1]}, gradient, kept);
    weight = found.weight;
    moments[0] = found.exp_avg;
    moments[1] = found.exp_avg_sq;
  }
};

struct SGD {
  static constexpr int kMoments = 1;
  using Options = SGDOptions;
  template <typename A>
  using Step = SGDStep<A>;

  template <typename A>
  __device__ static SGDStep<A> step(const SGDOptions& options, double lr, const float*) {
    return sgd_step<A>(options, lr);
  }
  template <typename A>
  __device__ static void update(const SGDStep<A>& step, A& weight, A (&moments)[1], A gradient, bool kept) {
    const SGDElement<A> found = sgd(step, {weight, moments[0]}, gradient, kept);
    weight = found.weight;
    moments[0] = found.momentum;
  }
};

// One tensor, row-major, and the bits of its mask.
template <typename T>
struct UpdateTensor {
  T* weight;
  const T* grad;
  T* moments[kMostMoments];  // null where there is none
  uint8_t* bits;
  const float* step;
  int64_t numel, row, inner;  // row: the last dimension; inner: from one element of a group to the next
  int64_t first_block;
};

template <typename Update, typename T>
struct UpdateTable {
  UpdateTensor<T> tensors[kUpdateTensors];  // in the order of their first blocks
  typename Update::Options options;
  const double* lr;  // null: that of the options
  RankOrder order;
  int count;
};

template <typename Update, typename T>
__device__ inline const UpdateTensor<T>& tensor_of_block(const UpdateTable<Update, T>& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.tensors[middle].first_block <= int64_t(blockIdx.x) ? low : high) = middle;
  }
  return table.tensors[low];
}

// The scalars of a step, found by one thread; to be called by all, with loads in flight.
template <typename Update, typename T>
__device__ inline auto block_step(const UpdateTable<Update, T>& table, const float* count) {
  using Step = typename Update::template Step<Acc<T>>;
  __shared__ Step step;
  if (threadIdx.x == 0)
    step = Update::template step<Acc<T>>(table.options, table.lr ? *table.lr : table.options.lr, count);
  __syncthreads();
  return step;
}

// V elements side by side and their bits of the mask.
template <typename Update, typename T, int V>
struct UpdateVector {
  Vector<T, V> weight, grad, moments[Update::kMoments];
  uint32_t kept;

  __device__ void read(const UpdateTensor<T>& tensor, int64_t at, int64_t byte) {
    weight = load<T, V>(tensor.weight + at);
    grad = load<T, V>(tensor.grad + at);
#pragma unroll
    for (int k = 0; k < Update::kMoments; ++k)
      moments[k] = tensor.moments[k] ? load<T, V>(tensor.moments[k] + at) : Vector<T, V>{};
    kept = uint32_t(tensor.bits[byte]);
  }
  // of whole bytes of the mask
  __device__ void read(const UpdateTensor<T>& tensor, int64_t at) {
    read(tensor, at, at / 8);
    kept >>= at % 8;
  }

  // A weight that holds is moved too but keeps its bits: no branch, and a NaN its payload. It moves as if by ones:
  // root and quotient of its moments, which are often 0, would take their slow ways.
  __device__ void move(const typename Update::template Step<Acc<T>>& step) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const bool hold = step.rule == kHold, bit = kept >> j & 1, moves = bit || !hold;
      Acc<T> to = widen(weight.v[j]), of[Update::kMoments], g = moves ? widen(grad.v[j]) : Acc<T>(1);
#pragma unroll
      for (int k = 0; k < Update::kMoments; ++k) of[k] = moves ? widen(moments[k].v[j]) : Acc<T>(1);
      Update::update(step, to, of, g, bit || hold);
      weight.v[j] = moves ? narrow<T>(to) : weight.v[j];
#pragma unroll
      for (int k = 0; k < Update::kMoments; ++k) moments[k].v[j] = moves ? narrow<T>(of[k]) : moments[k].v[j];
    }
  }

  __device__ void write(const UpdateTensor<T>& tensor, int64_t at) const {
    store(tensor.weight + at, weight);
#pragma unroll
    for (int k = 0; k < Update::kMoments; ++k)
      if (tensor.moments[k]) store(tensor.moments[k] + at, moments[k]);
  }
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of an access

// A thread's accesses in rows: chunks of eight elements, one or, of 16 bits, two.
template <typename T>
constexpr int kSlots = sizeof(T) == 2 ? 2 : 8 / kVector<T>;

template <typename T>
constexpr int64_t kRowTile = int64_t(kUpdateThreads) * kSlots<T> * kVector<T> * kUpdateRounds;  // elements of a block

// Bytes an element: 7 sizeof(T) + 1/4 for AdamW (28.25; 14.25 in 16 bits), 5 sizeof(T) for SGD, 3 without momentum.
// An H100 moves 28.25 in 8.4 ps, the time of 240 instructions, and 14.25 in that of 125. Operations of AdamW and 2:4:
// about 75, a third of them for a root and a quotient that are rounded correctly.
// Tensors are aligned to 16 bytes, and 8 divides their rows. kN, kM: of rank_chunks; kM = 1: the masks stay.
template <typename Update, typename T, int kN, int kM>
__global__ void __launch_bounds__(kUpdateThreads, sizeof(T) == 8 ? 2 : 3)
    update_rows_kernel(const __grid_constant__ UpdateTable<Update, T> table) {
  constexpr int V = kVector<T>, slots = kSlots<T>;
  // accesses that lanes make side by side, where no group is longer than one; else a thread's are side by side
  constexpr bool split = sizeof(T) == 2 || (kM != 0 && kM <= V);
  const UpdateTensor<T>& tensor = tensor_of_block(table);
  const int thread = threadIdx.x;
  const int64_t numel = tensor.numel;
  int64_t first = (blockIdx.x - tensor.first_block) * kRowTile<T>;
  const auto place = [&](int s) {
    return first + int64_t(split ? s * kUpdateThreads + thread : thread * slots + s) * V;
  };
  UpdateVector<Update, T, V> own[slots];
  const auto read = [&] {
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      if (place(s) < numel) own[s].read(tensor, place(s));
      else own[s] = {};
    }
  };
  read();
  const auto step = block_step(table, tensor.step);
#pragma unroll 1
  for (int round = 0; round < kUpdateRounds && first < numel; ++round) {
    if (round > 0) read();
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      own[s].move(step);
      if (place(s) < numel) own[s].write(tensor, place(s));
    }
    if constexpr (kM != 1) {
      using U = Bits<T>;
      Vector<T, V> weights[slots];
#pragma unroll
      for (int s = 0; s < slots; ++s) weights[s] = own[s].weight;
      Vector<U, kGroup> chunks[KeyWord<U>::lanes];
      static_assert(sizeof chunks == sizeof weights);
      std::memcpy(chunks, weights, sizeof chunks);
      const uint32_t bytes = rank_chunks<U, kN, kM>(chunks, table.order);
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int s = 0; s < slots; ++s)
          if (place(s) < numel) tensor.bits[place(s) / 8] = static_cast<uint8_t>(bytes >> 16 * s);
      } else if constexpr (split) {
        // half a byte of each slot: of two lanes the even one puts the first slot's together, the odd one the second's
        static_assert(slots == 2);
        const int odd = thread & 1;
        const uint32_t other = __shfl_xor_sync(kAllLanes, bytes, 1);
        const uint32_t byte = odd ? (bytes & 0xF0) | other >> 4 : (bytes & 0xF) | (other & 0xF) << 4;
        if (place(odd) < numel) tensor.bits[place(odd) / 8] = static_cast<uint8_t>(byte);
      } else if (place(0) < numel) {
        tensor.bits[place(0) / 8] = static_cast<uint8_t>(bytes);
      }
    }
    first += kRowTile<T> / kUpdateRounds;
  }
}

template <typename T, int kM>
constexpr int64_t kColumnTile = int64_t(kUpdateThreads) * kVector<T> * kM;  // elements of a block

// Which of V columns' elements stay of groups of kM; bit v of found[j]: the one in row j of column v.
template <typename U, int kN, int kM, bool kFull, int V>
__device__ inline void rank_columns(const Vector<U, V> (&rows)[kM], const RankOrder& order, uint32_t (&found)[kM]) {
  using W = Word<U>;
  constexpr int lanes = KeyWord<U>::lanes, words = V / lanes;
#pragma unroll
  for (int i = 0; i < words; ++i) {
    W key[kM], kept[kM];
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      W raw[words];
      std::memcpy(raw, &rows[j], sizeof raw);
      key[j] = key_word<U, kFull>(raw[i], order.infinity);
    }
    rank_pairs<U, kN, kM, kFull>(key, order.n, kept);
#pragma unroll
    for (int j = 0; j < kM; ++j)
#pragma unroll
      for (int lane = 0; lane < lanes; ++lane)
        found[j] |= static_cast<uint32_t>(kept[j] >> (8 * sizeof(U) * (lane + 1) - 1) & 1) << (lanes * i + lane);
  }
}

// As update_rows_kernel, with groups along another dimension than the last: a thread has the columns of one access
// through the kM rows of a group. Tensors are aligned to 16 bytes, and 8 divides their last dimension.
template <typename Update, typename T, int kN, int kM>
__global__ void __launch_bounds__(kUpdateThreads, 2)
    update_columns_kernel(const __grid_constant__ UpdateTable<Update, T> table) {
  constexpr int V = kVector<T>, kLanes = 8 / V;  // kLanes: that share a byte of bits
  constexpr int kBatch = 2;                      // rows whose loads are in flight
  static_assert(kM % kBatch == 0);
  const UpdateTensor<T>& tensor = tensor_of_block(table);
  const int64_t item = (blockIdx.x - tensor.first_block) * kUpdateThreads + threadIdx.x, across = tensor.inner / V;
  const bool valid = item < tensor.numel / (kM * V);
  const int64_t group = quotient(item, across), at = group * (kM - 1) * tensor.inner + item * V;
  Vector<T, V> moved[kM];
  typename Update::template Step<Acc<T>> step;
#pragma unroll
  for (int j = 0; j < kM; j += kBatch) {
    UpdateVector<Update, T, V> own[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (valid) own[i].read(tensor, at + (j + i) * tensor.inner);
    if (j == 0) step = block_step(table, tensor.step);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      own[i].move(step);
      if (valid) own[i].write(tensor, at + (j + i) * tensor.inner);
      moved[j + i] = own[i].weight;
    }
  }
  using U = Bits<T>;
  Vector<U, V> rows[kM];
  std::memcpy(rows, moved, sizeof rows);
  uint32_t found[kM] = {};
  if (table.order.magnitude) rank_columns<U, kN, kM, false>(rows, table.order, found);
  else rank_columns<U, kN, kM, true>(rows, table.order, found);
#pragma unroll
  for (int j = 0; j < kM; ++j) {
    uint32_t byte = found[j] << (threadIdx.x % kLanes * V);
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) byte |= __shfl_xor_sync(kAllLanes, byte, offset);
    if (valid && threadIdx.x % kLanes == 0) tensor.bits[(at + j * tensor.inner) / 8] = static_cast<uint8_t>(byte);
  }
}

// Calls f with the Ratio of the fused kernel that ranks n of m, kM never 0 for columns; false where none does.
template <typename F>
bool dispatch_fused(const NM& nm, bool columns, F&& f) {
  if (columns && nm.m >= 8) {
    if (nm.m == 8) f(Ratio<0, 8>());
    return nm.m == 8;
  }
  return dispatch_ratio(nm.n, nm.m, [&](auto ratio) { f(Ratio<ratio.m == 8 ? 0 : ratio.n, ratio.m>()); });
}

constexpr int64_t kElementTile = int64_t(kUpdateThreads) * kUpdateRounds;  // elements of a block

// The update alone, of rows of any length and alignment. The masks stay.
template <typename Update, typename T>
__global__ void __launch_bounds__(kUpdateThreads)
    update_elements_kernel(const __grid_constant__ UpdateTable<Update, T> table) {
  const UpdateTensor<T>& tensor = tensor_of_block(table);
  const int64_t first = (blockIdx.x - tensor.first_block) * kElementTile + threadIdx.x;
  const int64_t row_bytes = (tensor.row + 7) / 8;
  UpdateVector<Update, T, 1> own[kUpdateRounds] = {};
#pragma unroll
  for (int i = 0; i < kUpdateRounds; ++i) {
    const int64_t at = first + i * kUpdateThreads, row = quotient(at, tensor.row), column = at - row * tensor.row;
    if (at >= tensor.numel) continue;
    own[i].read(tensor, at, row * row_bytes + column / 8);
    own[i].kept >>= column % 8;
  }
  const auto step = block_step(table, tensor.step);
#pragma unroll
  for (int i = 0; i < kUpdateRounds; ++i) {
    own[i].move(step);
    if (first + i * kUpdateThreads < tensor.numel) own[i].write(tensor, first + i * kUpdateThreads);
  }
}

}  // namespace pyrx::cuda
