// The masked optimizer kernels on the host shim, bit for bit against the steps of single elements and sorts of groups.
#include "cuda_shim.h"

#include "cuda/masked_update.cuh"
#include "cuda_test.h"

using namespace pyrx;
using namespace pyrx::cuda;

namespace {

struct Form {
  int64_t outer, length, inner, row;  // (outer, length, inner), groups along length; rows of the last dimension
  int64_t numel() const { return outer * length * inner; }
  int64_t bytes() const { return numel() / row * ((row + 7) / 8); }
};

struct Options {
  Rule rule;
  bool maximize, with_lr;
  int64_t step;
};

template <typename Update>
typename Update::Options options_of(const Options& given);
template <>
AdamWOptions options_of<AdamW>(const Options& given) {
  // of a small beta1 the other form of the first moment
  return {{given.rule, given.maximize, 0.37, 1e-2}, given.step % 2 ? 0.9 : 0.3, 0.99, 1e-8, 0.1};
}
template <>
SGDOptions options_of<SGD>(const Options& given) {
  const double momentum = given.step == 3 ? 0.0 : 0.9, decay = given.step == 2 ? 0.0 : 0.1;
  return {{given.rule, given.maximize, 0.37, 1e-2}, momentum, 0.25, decay, given.step % 2 == 0};
}

template <typename T>
struct Tensor {
  Form form;
  float step;
  Buffer<T> weight, grad, moments[2];
  Buffer<uint8_t> bits;

  Tensor(const Form& of, float count, int64_t seed, int64_t offset)
      : form(of), step(count), weight(of.numel(), offset), grad(of.numel(), offset),
        moments{Buffer<T>(of.numel(), offset), Buffer<T>(of.numel(), offset)}, bits(of.bytes()) {
    const double kinds[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-41};
    for (int64_t i = 0; i < of.numel(); ++i) {
      const int64_t at = seed + i;
      // ties: many weights of few values, whose gradients and moments are equal too
      const bool tied = i % 64 < 24, odd = at % 29 == 3;
      weight[i] = narrow<T>(Acc<T>(odd ? kinds[at / 29 % 6] : tied ? std::round(2 * normal(at)) / 2 : normal(at)));
      grad[i] = narrow<T>(Acc<T>(tied ? 0.5 : at % 101 == 7 ? kinds[at / 101 % 6] : normal(at + 1000000)));
      moments[0][i] = narrow<T>(Acc<T>(tied ? 0.25 : normal(at + 2000000) / 8));
      moments[1][i] = narrow<T>(Acc<T>(tied ? 0.125 : std::fabs(normal(at + 3000000)) / 64));
      if (odd && std::isnan(widen(weight[i]))) reinterpret_cast<unsigned char*>(&weight[i])[0] ^= 0x15;  // a payload
    }
    for (int64_t i = 0; i < of.bytes(); ++i) {
      const int64_t left = of.row - i % ((of.row + 7) / 8) * 8;
      bits[i] = uint8_t(lane_of(5, seed + i, 0) & (left < 8 ? (1 << left) - 1 : 255));
    }
  }
  int64_t byte(int64_t i) const { return i / form.row * ((form.row + 7) / 8) + i % form.row / 8; }
  int bit(int64_t i) const { return int(i % form.row % 8); }
};

template <typename A>
void scalar_step(const AdamWOptions& options, double lr, float count, A& weight, A (&moments)[2], A grad, bool kept) {
  const auto found = adamw(adamw_step<A>(options, lr, count), {weight, moments[0], moments[1]}, grad, kept);
  weight = found.weight;
  moments[0] = found.exp_avg;
  moments[1] = found.exp_avg_sq;
}
template <typename A>
void scalar_step(const SGDOptions& options, double lr, float, A& weight, A (&moments)[2], A grad, bool kept) {
  const auto found = sgd(sgd_step<A>(options, lr), {weight, moments[0]}, grad, kept);
  weight = found.weight;
  moments[0] = found.momentum;
}

// What the step makes of a tensor; n = 0: its mask stays.
template <typename Update, typename T>
void expect(Tensor<T>& tensor, const typename Update::Options& options, double lr, const NM& nm) {
  const Form& form = tensor.form;
  for (int64_t i = 0; i < form.numel(); ++i) {
    const bool kept = tensor.bits[tensor.byte(i)] >> tensor.bit(i) & 1;
    if (options.rule == kHold && !kept) continue;
    Acc<T> weight = widen(tensor.weight[i]), moments[2] = {widen(tensor.moments[0][i]), widen(tensor.moments[1][i])};
    scalar_step(options, lr, tensor.step, weight, moments, widen(tensor.grad[i]), kept);
    tensor.weight[i] = narrow<T>(weight);
    for (int k = 0; k < Update::kMoments; ++k) tensor.moments[k][i] = narrow<T>(moments[k]);
  }
  if (nm.n == 0) return;
  std::memset(tensor.bits.data(), 0, tensor.bits.size());
  for (int64_t first = 0; first < form.numel(); ++first) {
    if (first / form.inner % form.length % nm.m != 0) continue;
    std::vector<int64_t> order;
    for (int j = 0; j < nm.m; ++j) order.push_back(first + j * form.inner);
    const auto key = [&](int64_t i) {
      Bits<T> raw;
      std::memcpy(&raw, &tensor.weight[i], sizeof raw);
      return rank_key<Bits<T>>(raw, Bits<T>(kInfinity<T>), nm.magnitude);
    };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
    for (int j = 0; j < nm.n; ++j) tensor.bits[tensor.byte(order[j])] |= uint8_t(1 << tensor.bit(order[j]));
  }
}

// nm.n = 0: the kernel makes no masks.
template <typename Update, typename T>
void test_kernel(const char* what, void (*kernel)(UpdateTable<Update, T>), int64_t tile,
                 const std::vector<Form>& forms, const NM& nm, const Options& given, int64_t offset = 0) {
  const auto options = options_of<Update>(given);
  const double lr = 3e-2;
  const bool buffers = Update::kMoments == 2 || given.step != 3;
  std::vector<std::unique_ptr<Tensor<T>>> tensors, expected;
  UpdateTable<Update, T> table{{}, options, given.with_lr ? &lr : nullptr, {kInfinity<T>, nm.n, nm.m, nm.magnitude}, 0};
  int64_t blocks = 0;
  for (const Form& form : forms) {
    for (auto* list : {&tensors, &expected})
      list->push_back(std::make_unique<Tensor<T>>(form, float(given.step + table.count), 977 * table.count, offset));
    Tensor<T>& own = *tensors.back();
    T* second = Update::kMoments == 2 ? own.moments[1].data() : nullptr;
    T* first = buffers ? own.moments[0].data() : nullptr;
    table.tensors[table.count++] = {own.weight.data(), own.grad.data(), {first, second}, own.bits.data(), &own.step,
                                    form.numel(),      form.row,        form.inner,      blocks};
    blocks += (form.numel() + tile - 1) / tile;
  }
  shim::launch(kernel, {unsigned(blocks)}, {kUpdateThreads}, 0, table);
  for (size_t k = 0; k < forms.size(); ++k) {
    expect<Update>(*expected[k], options, given.with_lr ? lr : options.lr, nm);
    const Tensor<T>&got = *tensors[k], &right = *expected[k];
    const auto check = [&](bool same, const char* name, int64_t i) {
      CHECK(same, "%s %d:%d: %s %lld of tensor %zu", what, nm.n, nm.m, name, (long long)i, k);
    };
    for (int64_t i = 0; i < got.form.numel(); ++i) {
      check(same_bits(got.weight[i], right.weight[i]), "weight", i);
      for (int j = 0; j < 2; ++j) check(same_bits(got.moments[j][i], right.moments[j][i]), "moment", i);
    }
    for (int64_t i = 0; i < got.form.bytes(); ++i) check(got.bits[i] == right.bits[i], "byte", i);
  }
}

const Options kOptions[] = {
    {kHold, false, false, 1}, {kSrSte, true, true, 2}, {kDense, false, true, 3}, {kHold, true, false, 12345}};

template <typename Update, typename T, int kN, int kM>
void test_rows(int n, int m) {
  const int64_t wide = std::max(m, 8), tile = kRowTile<T>;
  const std::vector<Form> forms = {{1, wide, 1, wide}, {5, 3 * wide, 1, 3 * wide}, {tile / wide + 3, wide, 1, wide}};
  for (const Options& each : kOptions)
    test_kernel("rows", &update_rows_kernel<Update, T, kN, kM>, tile, forms, NM{n, m, each.step != 2}, each);
}

template <typename Update, typename T, int kN, int kM>
void test_columns(int n) {
  const int64_t tile = kColumnTile<T, kM>;
  const int64_t wide = tile / kM / 2 + 40;
  const std::vector<Form> forms = {{1, kM, 8, 8}, {3, 5 * kM, 24, 8}, {2, 2 * kM, wide, wide}};
  for (const Options& each : kOptions)
    test_kernel("columns", &update_columns_kernel<Update, T, kN, kM>, tile, forms, NM{n, kM, each.step != 2}, each);
}

template <typename Update, typename T>
void test_alone() {
  const std::vector<Form> whole = {{3, 8, 1, 8}, {1, 2 * kRowTile<T> + 40, 1, 2 * kRowTile<T> + 40}};
  const std::vector<Form> odd = {{1, 1, 1, 1},   {7, 3, 1, 3},   {100, 100, 1, 100},
                                 {2, 5, 13, 13}, {4, 16, 1, 16}, {1, 1, 1311, 1311}};
  for (const Options& each : kOptions) {
    test_kernel("alone", &update_rows_kernel<Update, T, 0, 1>, kRowTile<T>, whole, NM{0, 1, true}, each);
    for (const int64_t offset : {0, 1})
      test_kernel("elements", &update_elements_kernel<Update, T>, kElementTile, odd, NM{0, 1, true}, each, offset);
  }
}

template <typename Update, typename T>
void test_ratios() {
  test_rows<Update, T, 1, 2>(1, 2);
  test_rows<Update, T, 1, 4>(1, 4);
  test_rows<Update, T, 2, 4>(2, 4);
  test_rows<Update, T, 3, 4>(3, 4);
  for (const int n : {1, 4, 5, 8}) test_rows<Update, T, 0, 8>(n, 8);
  for (const int m : {16, 32, 128}) test_rows<Update, T, 1, 0>(1, m);
  for (const int m : {16, 64}) test_rows<Update, T, 2, 0>(2, m);
  for (const int m : {16, 32, 128}) test_rows<Update, T, 0, 0>(m / 2 - 1, m);
  test_columns<Update, T, 1, 2>(1);
  test_columns<Update, T, 1, 4>(1);
  test_columns<Update, T, 2, 4>(2);
  test_columns<Update, T, 3, 4>(3);
  for (const int n : {1, 4, 7}) test_columns<Update, T, 0, 8>(n);
}

// what is told to be ranked has a kernel that ranks it
void test_dispatch() {
  for (int m = 1; m <= kMostGroup; ++m)
    for (int n = 1; n <= m; ++n)
      for (const bool columns : {false, true}) {
        int calls = 0;
        const auto fits = [&](auto ratio) {
          const bool inside = ratio.m == m && (m == 8 ? ratio.n == 0 : ratio.n == n);
          const bool across = ratio.m == 0 && (ratio.n == 0 || ratio.n == n) && m % 8 == 0;
          calls += inside || (across && !columns) ? 1 : 1000;
        };
        const bool served = dispatch_fused(NM{n, m, true}, columns, fits);
        CHECK(calls == int(served), "dispatch of %d:%d, columns %d", n, m, int(columns));
        if (n < m && (m == 2 || m == 4 || m == 8)) CHECK(served, "%d:%d, columns %d", n, m, int(columns));
      }
}

// as many tensors as a launch takes
void test_full_table() {
  std::vector<Form> forms;
  for (int i = 0; i < kUpdateTensors; ++i) forms.push_back({i % 3 + 1, 8 * (i % 5 + 1), 1, 8 * (i % 5 + 1)});
  test_kernel("full table", &update_rows_kernel<AdamW, float, 2, 4>, kRowTile<float>, forms, NM{2, 4, true},
              kOptions[0]);
}

template <typename Update>
void test_update() {
  test_alone<Update, float>();
  test_alone<Update, double>();
  test_alone<Update, __half>();
  test_alone<Update, __nv_bfloat16>();
  test_ratios<Update, float>();
  test_ratios<Update, __half>();
  test_ratios<Update, __nv_bfloat16>();
}

}  // namespace

int main() {
  test_dispatch();
  test_full_table();
  test_update<AdamW>();
  test_update<SGD>();
  for (const shim::Order order : {shim::Order::kBackward, shim::Order::kShuffled, shim::Order::kWarpByWarp}) {
    shim::order = order;
    test_alone<AdamW, float>();
    test_rows<AdamW, float, 2, 4>(2, 4);
    test_rows<AdamW, float, 0, 0>(5, 32);
    test_rows<AdamW, __nv_bfloat16, 2, 4>(2, 4);
    test_columns<AdamW, float, 2, 4>(2);
    test_columns<AdamW, __nv_bfloat16, 2, 4>(2);
  }
  return report("masked optimizer kernels");
}
