// Products of small matrices that lie in the cache, each tile of rows over its own band of columns or
// of terms; transposition; a thread's memory.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace lowline {

template <int... I>
constexpr veci lanes(std::integer_sequence<int, I...>) {
  return veci{I...};
}
constexpr veci LANES = lanes(std::make_integer_sequence<int, W>{});

// x with lanes i and i ^ h exchanged.
template <class Vector>
inline Vector exchanged(Vector x, int h) {
#if defined(__clang__)
  Vector y;
  for (int i = 0; i < W; i++) y[i] = x[i ^ h];
  return y;
#else
  return __builtin_shuffle(x, LANES ^ h);
#endif
}

inline float total_of(vec x) {
  for (int h = W / 2; h; h /= 2) x += exchanged(x, h);
  return x[0];
}
inline float dot(const float* a, const float* b, long n) {
  vec s{};
  for (long i = 0; i < n; i += W) s += load(a + i) * load(b + i);
  return total_of(s);
}

// Y[R x 16·NV] (+)= A[R x k] B[k x 16·NV], with A(i, t) = A[i·ar + t·ac].
template <int R, int NV>
inline void tile(float* Y, long ldy, const float* A, long ar, long ac, const float* B, long ldb,
                 int k, bool add) {
  vec c[R][NV];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) c[i][j] = add ? load(Y + i * ldy + W * j) : vec{};
  for (int t = 0; t < k; t++) {
    vec b[NV];
    for (int j = 0; j < NV; j++) b[j] = load(B + t * ldb + W * j);
    for (int i = 0; i < R; i++) {
      const float a = A[i * ar + t * ac];
      for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) store(Y + i * ldy + W * j, c[i][j]);
}

constexpr int WIDEST = W == 16 ? 4 : 2;  // 6 x 4 sums in 32 registers, 6 x 2 in 16

template <int R>
inline void rows(float* Y, long ldy, const float* A, long ar, long ac, const float* B, long ldb,
                 int n, int k, bool add) {
  for (int j = 0; j < n; j += WIDEST * W) {
    const int wide = std::min(WIDEST, (n - j) / W);
    if constexpr (WIDEST == 4) {
      if (wide == 4) tile<R, 4>(Y + j, ldy, A, ar, ac, B + j, ldb, k, add);
      if (wide == 3) tile<R, 3>(Y + j, ldy, A, ar, ac, B + j, ldb, k, add);
    }
    if (wide == 2) tile<R, 2>(Y + j, ldy, A, ar, ac, B + j, ldb, k, add);
    if (wide == 1) tile<R, 1>(Y + j, ldy, A, ar, ac, B + j, ldb, k, add);
  }
}

struct Range {
  int first, last;  // half open
};

// Y (+)= A B for the rows [m.first, m.last). A tile of rows [i, i + R) takes only the columns
// columns(i, i + R) of B and only the terms terms(i, i + R) of the sum.
template <class Columns, class Terms>
inline void product(float* Y, long ldy, const float* A, long ar, long ac, const float* B, long ldb,
                     Range m, Columns columns, Terms terms, bool add) {
  auto run = [&](auto count, int i) {
    constexpr int R = decltype(count)::value;
    const Range n = columns(i, i + R), k = terms(i, i + R);
    const int j = n.first / W * W, width = (n.last + W - 1) / W * W - j;
    if (width <= 0 || (k.last <= k.first && add)) return;
    rows<R>(Y + i * ldy + j, ldy, A + i * ar + k.first * ac, ar, ac, B + k.first * ldb + j, ldb,
            width, std::max(k.last - k.first, 0), add);
  };
  int i = m.first;
  for (; i + 6 <= m.last; i += 6) run(std::integral_constant<int, 6>{}, i);
  for (; i + 4 <= m.last; i += 4) run(std::integral_constant<int, 4>{}, i);
  for (; i < m.last; i++) run(std::integral_constant<int, 1>{}, i);
}

inline auto all(int n) {
  return [n](int, int) { return Range{0, n}; };
}

inline auto only(Range range) {
  return [range](int, int) { return range; };
}

// out[W x ldo] = in[n x W]ᵀ, zeros where in has no row.
template <bool WHOLE>
inline void transpose_tile(float* out, long ldo, const float* in, long ldi, int n) {
  vec x[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; r++) x[r] = WHOLE || r < n ? load(in + r * ldi) : vec{};
  auto swap = [&](auto step) {  // the blocks of h x h beside the diagonal
    constexpr int h = decltype(step)::value;
#pragma GCC unroll 16
    for (int r = 0; r < W; r++)
      if (!(r & h)) {
        const vec a = x[r], b = x[r | h];
#if defined(__clang__)
        for (int l = 0; l < W; l++) x[r][l] = l & h ? b[l - h] : a[l];
        for (int l = 0; l < W; l++) x[r | h][l] = l & h ? b[l] : a[l + h];
#else
        x[r] = __builtin_shuffle(a, b, (LANES & h) ? LANES - h + W : LANES);
        x[r | h] = __builtin_shuffle(a, b, (LANES & h) ? LANES + W : LANES + h);
#endif
      }
  };
  if constexpr (W > 8) swap(std::integral_constant<int, 8>{});
  if constexpr (W > 4) swap(std::integral_constant<int, 4>{});
  swap(std::integral_constant<int, 2>{});
  swap(std::integral_constant<int, 1>{});
#pragma GCC unroll 16
  for (int r = 0; r < W; r++) store(out + r * ldo, x[r]);
}

// out[columns x ldo] = in[n x columns]ᵀ, zeros for the rows that make n a multiple of W; columns is
// one.
inline void transpose_rows(float* out, long ldo, const float* in, long ldi, int n, int columns) {
  for (int i = 0; i < n; i += W)
    for (int j = 0; j < columns; j += W) {
      const float* from = in + i * ldi + j;
      if (i + W <= n) transpose_tile<true>(out + j * ldo + i, ldo, from, ldi, W);
      else transpose_tile<false>(out + j * ldo + i, ldo, from, ldi, n - i);
    }
}

inline void copy_rows(float* out, long ldo, const float* in, long ldi, int n, int columns,
                      float factor = 1) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < columns; j += W) store(out + i * ldo + j, load(in + i * ldi + j) * factor);
}

// One block of memory for a thread's buffers; every buffer starts at a cache line.
class Memory {
 public:
  explicit Memory(size_t floats)
      : at_(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64 + 64))) {
    if (!at_) throw std::bad_alloc();
    base_.reset(at_);
  }
  float* take(size_t floats) {
    float* p = at_;
    at_ += (floats + 15) / 16 * 16;
    return p;
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  float* at_;
  std::unique_ptr<float, Free> base_;
};

}  // namespace lowline
