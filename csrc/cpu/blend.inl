// Runs of elements blended by an alpha of their own, and their gradients. Included by simd.inl.

template <typename T>
inline Vec<accumulate_t<T>> storable(const Vec<accumulate_t<T>>& x) {
  if constexpr (std::is_same_v<T, uint8_t>) {  // in [0, 255], NaN 0
    const Vec<float> zero = Vec<float>::fill(0);
#if PYRX_ISA == 512
    return Vec<float>::max(x, zero);  // store saturates above
#else
    return zero - Vec<float>::max(zero - Vec<float>::max(x, zero), Vec<float>::fill(-255));
#endif
  } else {
    return x;
  }
}

template <typename T>
void blend(const T* x, const T* y, const accumulate_t<T>* alpha, int64_t n, T* out) {
  using V = Vec<accumulate_t<T>>;
  const V one = V::fill(1);
  blocks(n, [&](int64_t i, auto count) {
    const V own = load(x + i, count), other = load(y + i, count);
    const V weight = load(alpha + i, count), rest = one - weight;
    if constexpr (sizeof(T) == 1) {  // whole numbers times 1 and 0: what is copied comes out as it is
      store(out + i, storable<T>(weight * own + rest * other), count);
      return;
    }
    const uint32_t all = (1u << int(count)) - 1, whole = all & ~rest.nonzero(), none = all & ~weight.nonzero();
    const V copied = V::choose(whole, own, other), mixed = storable<T>(weight * own + rest * other);
    store(out + i, V::choose(whole | none, copied, mixed), count);
    if constexpr (sizeof(T) == 2) {  // a conversion would touch NaN's bits
      if ((whole | none) & (copied - copied).nonzero())
        for (int j = 0; j < int(count); ++j)
          if ((whole | none) >> j & 1) out[i + j] = whole >> j & 1 ? x[i + j] : y[i + j];
    }
  });
}

template <typename T>
void blend_gradients(const BlendRun<T>& run, bool add, int64_t n) {
  using V = Vec<accumulate_t<T>>;
  const V one = V::fill(1);
  blocks(n, [&](int64_t i, auto count) {
    const V grad = load(run.grad + i, count), weight = load(run.alpha + i, count), rest = one - weight;
    if (run.grad_x) store(run.grad_x + i, (grad * weight).keep(weight.nonzero()), count);
    if (run.grad_y) store(run.grad_y + i, (grad * rest).keep(rest.nonzero()), count);
    if (run.terms) {
      const V term = grad * (load(run.x + i, count) - load(run.y + i, count));
      store(run.terms + i, add ? load(run.terms + i, count) + term : term, count);
    }
  });
}

template <typename T>
constexpr BlendKernels<T> blend_table() {
  if constexpr (std::is_same_v<T, uint8_t>) return {&blend<T>, nullptr};
  else return {&blend<T>, &blend_gradients<T>};
}
