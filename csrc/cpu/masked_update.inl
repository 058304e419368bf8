// Runs of masked optimizer steps, the arithmetic of kernels/masked_update.h. Included by nm_simd.inl.

// p[i] = x where `moves` says so; the others keep their bits.
template <typename T, typename Count>
inline void store_moved(T* p, const Vec<accumulate_t<T>>& x, uint32_t moves, Count count) {
#if PYRX_ISA == 512
  const uint32_t lanes = moves & ((1u << int(count)) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), x.v);
  if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), _mm512_loadu_pd(x.v));
    return _mm512_mask_storeu_pd(p + 8, static_cast<__mmask8>(lanes >> 8), _mm512_loadu_pd(x.v + 8));
  }
  if constexpr (sizeof(T) == 2) {
    T out[kLanes];
    store(out, x);
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out));
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes), all);
  }
#endif
  if constexpr (sizeof(T) == 2) {  // a conversion would touch NaN's bits
    T out[kLanes];
    store(out, x);
    for (int i = 0; i < int(count); ++i)
      p[i].bits = static_cast<uint16_t>(moves >> i & 1 ? out[i].bits : p[i].bits);
  } else {
    store(p, Vec<T>::choose(moves, x, load(p, count)), count);
  }
}

// The gradient of a block as ruled_gradient makes it.
template <typename V, typename Step>
inline V ruled(const Step& step, const V& gradient, const V& weight, uint32_t kept) {
  const V g = step.maximize ? gradient * V::fill(-1) : gradient;
  return step.rule == kSrSte ? V::choose(kept, g, g + V::fill(step.strength) * weight) : g;
}

template <typename T>
void adamw(const AdamWStep<accumulate_t<T>>& step, const T* gradient, const uint8_t* bits, int64_t n, T* weight,
           T* exp_avg, T* exp_avg_sq) {
  using V = Vec<accumulate_t<T>>;
  const V decay = V::fill(step.decay), beta1 = V::fill(step.beta1), rest1 = V::fill(step.rest1),
          beta2 = V::fill(step.beta2), rest2 = V::fill(step.rest2), step_size = V::fill(step.step_size),
          inverse_root = V::fill(step.inverse_root), eps = V::fill(step.eps);
  blocks(n, [&](int64_t i, auto count) {
    const uint32_t kept = bits_of(bits, i, count), moves = step.rule == kHold ? kept : 0xFFFF;
    const V old = load(weight + i, count), before = load(exp_avg + i, count);
    const V g = ruled(step, load(gradient + i, count), old, kept);
    const V away = g - before;
    const V moment = step.near ? before + rest1 * away : g - beta1 * away;
    const V square = beta2 * load(exp_avg_sq + i, count) + rest2 * g * g;
    const V root = square.sqrt() * inverse_root + eps;
    store_moved(weight + i, decay * old - step_size * moment / root, moves, count);
    store_moved(exp_avg + i, moment, moves, count);
    store_moved(exp_avg_sq + i, square, moves, count);
  });
}

template <typename T>
void sgd(const SGDStep<accumulate_t<T>>& step, const T* gradient, const uint8_t* bits, int64_t n, T* weight,
         T* momentum) {
  using V = Vec<accumulate_t<T>>;
  const V lr = V::fill(step.lr), factor = V::fill(step.momentum), rest = V::fill(step.rest),
          decay = V::fill(step.weight_decay);
  blocks(n, [&](int64_t i, auto count) {
    const uint32_t kept = bits_of(bits, i, count), moves = step.rule == kHold ? kept : 0xFFFF;
    const V old = load(weight + i, count);
    V g = ruled(step, load(gradient + i, count), old, kept);
    if (step.has_decay) g = g + decay * old;
    if (step.has_momentum) {
      const V velocity = factor * load(momentum + i, count) + rest * g;
      g = step.nesterov ? g + factor * velocity : velocity;
      store_moved(momentum + i, velocity, moves, count);
    }
    store_moved(weight + i, old - lr * g, moves, count);
  });
}

template <typename T>
constexpr MaskedKernels<T> masked_table() {
  return {&adamw<T>, &sgd<T>};
}
