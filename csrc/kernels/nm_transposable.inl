// The exact search of 2:4 tiles: of the 90 4 x 4 patterns that keep two of every row and column one of the largest sum.
// Included by nm_transposable.h for one tile, and inside each set of vector kernels for as many as a vector has lanes:
// A is a float or a vector of them, P an integer or a vector of integers of A's size.

template <typename A, typename P>
struct TileSearch {
  A sums[4][6];  // of each row and pair of columns
  A best;        // the largest sum so far, and its pattern: bit 4 r + c is row r, column c
  P pattern;

  PYRX_HOST_DEVICE void set_row(int row, A x0, A x1, A x2, A x3) {
    sums[row][0] = x0 + x1;
    sums[row][1] = x0 + x2;
    sums[row][2] = x0 + x3;
    sums[row][3] = x1 + x2;
    sums[row][4] = x1 + x3;
    sums[row][5] = x2 + x3;
  }

  // Rows 0 and 1 keep each column as often as rows 2 and 3 do not: the halves of such a split are searched alone. Of
  // equal sums the first stays.
  PYRX_HOST_DEVICE P search() {
    best = (sums[0][0] + sums[1][0]) + (sums[2][5] + sums[3][5]);
    pattern = P{} + (rows_bits(0, 0, 0) | rows_bits(2, 5, 5));
    same_pairs<1>();
    same_pairs<2>();
    same_pairs<3>();
    same_pairs<4>();
    same_pairs<5>();
    shared_columns<0, 1, 2, 3>();
    shared_columns<0, 2, 1, 3>();
    shared_columns<0, 3, 1, 2>();
    shared_columns<1, 0, 2, 3>();
    shared_columns<1, 2, 0, 3>();
    shared_columns<1, 3, 0, 2>();
    shared_columns<2, 0, 1, 3>();
    shared_columns<2, 1, 0, 3>();
    shared_columns<2, 3, 0, 1>();
    shared_columns<3, 0, 1, 2>();
    shared_columns<3, 1, 0, 2>();
    shared_columns<3, 2, 0, 1>();
    const Half top = opposite_pairs<0>(), bottom = opposite_pairs<2>();
    offer(top.sum + bottom.sum, top.pattern | bottom.pattern);
    return pattern;
  }

 private:
  struct Half {
    A sum;
    P pattern;
  };

  PYRX_HOST_DEVICE void offer(A sum, P kept) {
    pattern = sum > best ? kept : pattern;
    best = sum > best ? sum : best;
  }

  // Rows kRow and kRow + 1 keep pairs kFirst and kSecond, where that is better.
  template <int kRow, int kFirst, int kSecond>
  PYRX_HOST_DEVICE void better(Half& half) {
    const A sum = sums[kRow][kFirst] + sums[kRow + 1][kSecond];
    half.pattern = sum > half.sum ? P{} + rows_bits(kRow, kFirst, kSecond) : half.pattern;
    half.sum = sum > half.sum ? sum : half.sum;
  }

  template <int kRow, int kFirst, int kSecond>
  PYRX_HOST_DEVICE Half half_of() {
    return {sums[kRow][kFirst] + sums[kRow + 1][kSecond], P{} + rows_bits(kRow, kFirst, kSecond)};
  }

  // Rows 0 and 1 keep one pair twice.
  template <int kPair>
  PYRX_HOST_DEVICE void same_pairs() {
    offer((sums[0][kPair] + sums[1][kPair]) + (sums[2][5 - kPair] + sums[3][5 - kPair]),
          P{} + (rows_bits(0, kPair, kPair) | rows_bits(2, 5 - kPair, 5 - kPair)));
  }

  // Column kTop is kept by rows 0 and 1, kBottom by rows 2 and 3, k and l by one of each.
  template <int kTop, int kBottom, int k, int l>
  PYRX_HOST_DEVICE void shared_columns() {
    constexpr int top_k = pair_index(kTop, k), top_l = pair_index(kTop, l);
    constexpr int bottom_k = pair_index(kBottom, k), bottom_l = pair_index(kBottom, l);
    Half top = half_of<0, top_k, top_l>(), bottom = half_of<2, bottom_k, bottom_l>();
    better<0, top_l, top_k>(top);
    better<2, bottom_l, bottom_k>(bottom);
    offer(top.sum + bottom.sum, top.pattern | bottom.pattern);
  }

  // Two rows that keep every column once.
  template <int kRow>
  PYRX_HOST_DEVICE Half opposite_pairs() {
    Half half = half_of<kRow, 0, 5>();
    better<kRow, 1, 4>(half);
    better<kRow, 2, 3>(half);
    better<kRow, 3, 2>(half);
    better<kRow, 4, 1>(half);
    better<kRow, 5, 0>(half);
    return half;
  }
};
