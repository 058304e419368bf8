// CutMix, mixup and ResizeMix: one launch draws, mixes and converts; memory alone decides its time.
#pragma once

#include <type_traits>

#include "cuda/batch_mix_samples.cuh"

namespace pyrx::cuda {

constexpr int kMixFlight = 4;   // vectors in flight a thread
constexpr int kSwapFlight = 3;  // each of two samples
constexpr int kMixBlocks = 3;  // a multiprocessor, at least
constexpr int kMixChannels = 64;

__device__ inline float widen(uint8_t x) { return x; }
template <>
__device__ inline uint8_t narrow<uint8_t>(float x) { return static_cast<uint8_t>(std::rint(x)); }

template <typename In, typename Out>
using MixAcc = std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;

template <typename A>
struct MixNormalisation {
  bool used;
  A scale[kMixChannels], bias[kMixChannels];
};

// Where in its sample an element lies.
struct MixPlace {
  int64_t row;  // of all the planes'
  int y, column;
};

__device__ inline MixPlace place_of(int64_t element, const MixLayout& layout) {
  const int64_t row = layout.by_row.quotient(element);
  return {row, static_cast<int>(row - layout.by_height.quotient(row) * layout.height),
          static_cast<int>(element - row * layout.row)};
}

__device__ inline int clamp(int value, int high) { return value < 0 ? 0 : value > high ? high : value; }

// Bit j: element j of the K from `place` on is inside. Rows may end within.
template <int K>
__device__ inline uint32_t inside(const MixRegion& region, MixPlace place, const MixLayout& layout) {
  uint32_t bits = 0;
  int start = -place.column;  // of the row, counted from the first element
  for (int y = place.y;; y = y + 1 == layout.height ? 0 : y + 1) {
    if (y >= region.y0 && y < region.y1)
      bits |= ((1u << clamp(start + region.x1, K)) - 1) & ~((1u << clamp(start + region.x0, K)) - 1);
    start += layout.row;
    if (start >= K) return bits;
  }
}

template <int K>
constexpr uint32_t kAllBits = (1u << K) - 1;

// A vector in whole registers: the elements of a Vector in flight take one each.
template <int kBytes>
struct [[gnu::may_alias]] alignas(kBytes) MixWords {
  using Word = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;
  static constexpr int kCount = kBytes / sizeof(Word);
  Word w[kCount];
};
template <typename T, int K>
using MixVector = MixWords<sizeof(T) * K>;

template <typename T, int K>
__device__ inline MixVector<T, K> load_words(const T* from) { return *reinterpret_cast<const MixVector<T, K>*>(from); }
template <typename T, int K>
__device__ inline void store_words(T* to, const MixVector<T, K>& words) {
  *reinterpret_cast<MixVector<T, K>*>(to) = words;
}

template <typename T, int K>
__device__ inline Vector<T, K> unpack(const MixVector<T, K>& words) {
  Vector<T, K> values;
  memcpy(&values, &words, sizeof(words));
  return values;
}
template <typename T, int K>
__device__ inline MixVector<T, K> pack(const Vector<T, K>& values) {
  MixVector<T, K> words;
  memcpy(&words, &values, sizeof(words));
  return words;
}

// All bits of those elements of size `kSize` in word `i` of a vector that are set in `bits`.
template <int kSize>
__device__ inline uint32_t word_mask(uint32_t bits, int i) {
  if constexpr (kSize == 1) return (((bits >> 4 * i & 15) * 0x00204081u) & 0x01010101u) * 0xFFu;
  if constexpr (kSize == 2) return (((bits >> 2 * i & 3) * 0x8001u) & 0x00010001u) * 0xFFFFu;
  return 0u - (bits >> i * 4 / kSize & 1);
}

// `chosen` where bits are set, `rest` elsewhere, no bit changed.
template <typename T, int K>
__device__ inline MixVector<T, K> blend(uint32_t bits, const MixVector<T, K>& chosen, const MixVector<T, K>& rest) {
  if constexpr (K == 1) {
    return bits ? chosen : rest;
  } else {
    MixVector<T, K> result;
#pragma unroll
    for (int i = 0; i < result.kCount; ++i) {
      const uint32_t mask = word_mask<sizeof(T)>(bits, i);
      result.w[i] = (chosen.w[i] & mask) | (rest.w[i] & ~mask);
    }
    return result;
  }
}

template <typename A>
__device__ inline A weigh(A own, A other, A weight) { return mul(own, weight) + mul(other, 1 - weight); }

// What a region shows: the partner, or both weighed.
template <typename T, int K>
__device__ inline MixVector<T, K> mixed(const MixVector<T, K>& own, const MixVector<T, K>& other, float weight) {
  if (weight == 0) return other;
  const Vector<T, K> owns = unpack<T, K>(own), others = unpack<T, K>(other);
  Vector<T, K> result;
#pragma unroll
  for (int j = 0; j < K; ++j)
    result.v[j] = narrow<T>(weigh<Acc<T>>(widen(owns.v[j]), widen(others.v[j]), Acc<T>(weight)));
  return pack<T, K>(result);
}

// ResizeMix: the K elements from `place` on of the whole partner shrunk into the box, those that are inside.
template <typename T, int K>
__device__ inline MixVector<T, K> shrunk(const T* other, MixPlace place, uint32_t bits, const MixSample& sample,
                                         const MixLayout& layout) {
  Vector<T, K> result{};
  const int64_t width = layout.by_step.quotient(layout.row);
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (bits >> j & 1) {
      const int64_t x = layout.by_step.quotient(place.column);
      const int64_t from_y = sample.by_box_height.quotient((place.y - sample.box.y0) * layout.height);
      const int64_t from_x = sample.by_box_width.quotient((x - sample.box.x0) * width);
      result.v[j] = other[(place.row - place.y + from_y) * layout.row + place.column + (from_x - x) * layout.step];
    }
    if (++place.column == layout.row) {
      place.column = 0;
      ++place.row;
      if (++place.y == layout.height) place.y = 0;
    }
  }
  return pack<T, K>(result);
}

// Steps through the channels of consecutive elements.
struct MixChannel {
  int channel, left;

  __device__ MixChannel(int64_t element, const MixPlace& place, const MixLayout& layout) {
    if (layout.step == 1) {
      channel = static_cast<int>(layout.by_channel_rows.quotient(place.row));
      const int64_t rest = (channel + 1) * layout.run - element;
      left = rest < kMixThreads ? static_cast<int>(rest) : kMixThreads;
    } else {
      channel = place.column - static_cast<int>(layout.by_step.quotient(place.column)) * layout.step;
      left = 1;
    }
  }
  // Whether the next element has another channel.
  __device__ bool step(const MixLayout& layout) {
    if (--left) return false;
    left = layout.run < kMixThreads ? static_cast<int>(layout.run) : kMixThreads;
    if (++channel == layout.channels) channel = 0;
    return true;
  }
};

// Out of place. Bytes: CutMix (one source a pixel) n (sizeof(In) + sizeof(Out)) over 4.8 TB/s, 32 us for
// (256, 3, 224, 224) bfloat16; mixup n sizeof(In) more, as far as no cache holds the partner. Operations: about 60 a
// vector for its place and bits, 20 to 40 an element for weights, scales and conversions; and `vectors / chunk` draws a
// sample, each of N Philox calls where pairs are random.
//
// A block has `chunk` vectors of K elements of one sample; aligned to their size unless K is 1.
template <typename In, typename Out, int K>
__global__ void __launch_bounds__(kMixThreads, kMixBlocks)
    mix_kernel(const In* images, Out* output, const __grid_constant__ MixCall call,
               const __grid_constant__ MixLayout layout,
               const __grid_constant__ MixNormalisation<MixAcc<In, Out>> normalisation, int blocks, int64_t chunk) {
  using A = MixAcc<In, Out>;
  __shared__ MixSample sample;
  __shared__ A scales[kMixChannels], biases[kMixChannels];  // the parameters' bank serves one address at a time
  const int64_t n = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int64_t partner = find_partner(call, n);
  if (threadIdx.x == 0) draw_sample(call, layout, n, partner, &sample);
  if (normalisation.used && threadIdx.x < kMixChannels) {
    scales[threadIdx.x] = normalisation.scale[threadIdx.x];
    biases[threadIdx.x] = normalisation.bias[threadIdx.x];
  }
  __syncthreads();
  if (block == 0 && threadIdx.x == 0) write_sample(call, n, sample);

  const MixRegion region = sample.region;
  const bool both = region.weight != 0;
  const In* own = images + n * layout.elements;
  const In* other = images + sample.partner * layout.elements;
  Out* to = output + n * layout.elements;
  const int64_t begin = block * chunk, left = layout.elements / K - begin, end = begin + (left < chunk ? left : chunk);

  const auto finish = [&](int64_t at, uint32_t bits, const MixVector<In, K>& own_words,
                          const MixVector<In, K>& other_words) {
    if constexpr (std::is_same_v<In, Out>) {
      if (std::is_same_v<Out, uint8_t> || !normalisation.used) {  // integers are never normalised
        const auto inner = mixed<In, K>(own_words, other_words, region.weight);
        return store_words<In, K>(to + at, blend<In, K>(bits, inner, own_words));
      }
    }
    const Vector<In, K> owns = unpack<In, K>(own_words), others = unpack<In, K>(other_words);
    MixChannel channel(at, place_of(at, layout), layout);
    A scale = 1, bias = 0;
    if (normalisation.used) scale = scales[channel.channel], bias = biases[channel.channel];
    Vector<Out, K> result;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const A mine = widen(owns.v[j]), theirs = widen(others.v[j]);
      A x = !(bits >> j & 1) ? mine : both ? weigh(mine, theirs, A(region.weight)) : theirs;
      if (normalisation.used) {
        x = mul(x, scale) + bias;
        if (channel.step(layout)) scale = scales[channel.channel], bias = biases[channel.channel];
      }
      result.v[j] = narrow<Out>(static_cast<Acc<Out>>(x));
    }
    store_words<Out, K>(to + at, pack<Out, K>(result));
  };

  if (call.draw.kind == kResizemix && sample.box.y0 >= 0) {
    for (int64_t vector = begin + threadIdx.x; vector < end; vector += kMixThreads) {
      const MixPlace place = place_of(vector * K, layout);
      const uint32_t bits = inside<K>(region, place, layout);
      const auto others = shrunk<In, K>(other, place, bits, sample, layout);
      finish(vector * K, bits, load_words<In, K>(own + vector * K), others);
    }
    return;
  }
  for (int64_t first = begin + threadIdx.x; first < end; first += kMixThreads * kMixFlight) {
    MixVector<In, K> owns[kMixFlight], others[kMixFlight];
    uint32_t bits[kMixFlight];
#pragma unroll
    for (int i = 0; i < kMixFlight; ++i) {
      const int64_t vector = first + i * kMixThreads;
      owns[i] = others[i] = {};
      if (vector < end) {
        bits[i] = inside<K>(region, place_of(vector * K, layout), layout);
        if (both || bits[i] != kAllBits<K>) owns[i] = load_words<In, K>(own + vector * K);
        if (bits[i]) others[i] = load_words<In, K>(other + vector * K);
      }
    }
#pragma unroll
    for (int i = 0; i < kMixFlight; ++i) {
      const int64_t vector = first + i * kMixThreads;
      if (vector < end) finish(vector * K, bits[i], owns[i], others[i]);
    }
  }
}

// The vectors of K elements of every plane that a region touches; K divides the row.
struct MixVisit {
  Divisor by_width, by_height;
  int first;  // vector of a row
  int64_t count;
};

template <int K>
__device__ inline void plan_visit(const MixSample& sample, const MixLayout& layout, MixVisit* to) {
  const MixRegion& region = sample.region;
  const bool empty = region.is_empty();
  const int height = empty ? 0 : region.y1 - region.y0, width = empty ? 0 : (region.x1 + K - 1) / K - region.x0 / K;
  *to = {make_divisor(width), make_divisor(height), region.x0 / K, layout.planes * height * width};
}

// In place. Bytes: of CutMix 2 sizeof(T) a pixel of the patches over 4.8 TB/s, 10 us for (256, 3, 224, 224) bfloat16
// and alpha 1; of mixup one read and one write of all, 32 us. Operations: about 80 a vector, and two draws a block.
//
// The blocks of both samples share their pair's work: the vectors that the first one's region touches, then what the
// second one's touches beside them. A thread loads a vector of both, then stores: nobody else has it.
template <typename T, int K>
__global__ void __launch_bounds__(kMixThreads, kMixBlocks)
    swap_kernel(T* images, const __grid_constant__ MixCall call, const __grid_constant__ MixLayout layout, int blocks) {
  __shared__ MixSample samples[2];  // of the pair, in order
  __shared__ MixVisit visits[2];
  const int64_t n = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  int64_t partner = find_partner(call, n);
  const bool alone = partner < 0 || partner == n, second = !alone && partner < n;
  // the two draws run on two warps
  if (threadIdx.x == 0 || (threadIdx.x == kWarp && !alone)) {
    const bool mine = threadIdx.x == 0;
    MixSample& sample = samples[mine ? second : !second];
    draw_sample(call, layout, mine ? n : partner, mine ? partner : n, &sample);
    if (alone && sample.region.weight == 0) sample.region = {};
    plan_visit<K>(sample, layout, visits + (mine ? second : !second));
  }
  if (alone && threadIdx.x == kWarp) {
    samples[1].region = {};
    visits[1].count = 0;
  }
  __syncthreads();
  if (block == 0 && threadIdx.x == 0) write_sample(call, n, samples[second]);

  const MixRegion region_a = samples[0].region, region_b = samples[1].region;
  const bool both_a = region_a.weight != 0, both_b = region_b.weight != 0;
  if (alone) partner = n;
  T* a = images + (second ? partner : n) * layout.elements;
  T* b = images + (second ? n : partner) * layout.elements;
  const int64_t count_a = visits[0].count, count = count_a + visits[1].count;
  const int64_t parts = alone ? blocks : 2 * blocks, chunk = (count + parts - 1) / parts;
  const int64_t begin = chunk * (second ? blocks + block : block), end = begin + chunk < count ? begin + chunk : count;
  for (int64_t first = begin + threadIdx.x; first < end; first += kMixThreads * kSwapFlight) {
    MixVector<T, K> from_a[kSwapFlight], from_b[kSwapFlight];
    uint32_t bits_a[kSwapFlight], bits_b[kSwapFlight];
    int64_t at[kSwapFlight];
#pragma unroll
    for (int i = 0; i < kSwapFlight; ++i) {
      const int64_t index = first + i * kMixThreads;
      bits_a[i] = bits_b[i] = 0;
      from_a[i] = from_b[i] = {};
      if (index < end) {
        const bool in_b = index >= count_a;
        const MixVisit& visit = visits[in_b];
        const int64_t vector = in_b ? index - count_a : index, row = visit.by_width.quotient(vector);
        const int64_t plane = visit.by_height.quotient(row);
        const int y = (in_b ? region_b : region_a).y0 + static_cast<int>(row - plane * visit.by_height.divisor);
        const int column = (visit.first + static_cast<int>(vector - row * visit.by_width.divisor)) * K;
        const MixPlace place{plane * layout.height + y, y, column};
        at[i] = place.row * layout.row + column;
        bits_a[i] = inside<K>(region_a, place, layout);
        bits_b[i] = inside<K>(region_b, place, layout);
        if (in_b && bits_a[i]) bits_a[i] = bits_b[i] = 0;
        if (bits_b[i] || (bits_a[i] && (both_a || bits_a[i] != kAllBits<K>))) from_a[i] = load_words<T, K>(a + at[i]);
        if (bits_a[i] || (bits_b[i] && (both_b || bits_b[i] != kAllBits<K>))) from_b[i] = load_words<T, K>(b + at[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSwapFlight; ++i) {
      const auto mix = [&](T* to, uint32_t bits, const auto& own, const auto& other, float weight) {
        if (bits) store_words<T, K>(to + at[i], blend<T, K>(bits, mixed<T, K>(own, other, weight), own));
      };
      mix(a, bits_a[i], from_a[i], from_b[i], region_a.weight);
      mix(b, bits_b[i], from_b[i], from_a[i], region_b.weight);
    }
  }
}

}  // namespace pyrx::cuda
