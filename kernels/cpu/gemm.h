// Products of small matrices that lie in the cache: register tiles of rows x vectors.
//
//   multiply(Y, A, B, m, n, k)        Y[m x n] (+)= A[m x k] · B[k x n]
//
// n is a multiple of 16; or one more (a normaliser's column), where m is a multiple of 16. k and m
// are anything, rows in sixteens being fast. A may be read transposed. A band leaves out the half of
// A that is zero (or unwritten); within a block of 16 x 16 on the diagonal the zeros must be there.
#pragma once
#include <algorithm>

#include "memory.h"
#include "simd.h"

namespace lowline {

enum class Band { full, lower, upper };

struct Left {  // element (i, t) is p[i * ld + t], or p[t * ld + i] when transposed
  const float* p;
  long ld;
  bool transposed = false;
  Band band = Band::full;
};

struct Span {
  int begin, end;
};
LOWLINE_INLINE Span columns(Band band, int i, int rows, int k) {
  return {band == Band::upper ? std::min(i, k) : 0,
          band == Band::lower ? std::min(i + rows, k) : k};
}

// R rows by N vectors of Y, at row i
template <int R, int N>
inline void tile(float* y, long ldy, Left a, const float* b, long ldb, int i, int k, bool add) {
  Ahead* soon = ahead;
  Span span = columns(a.band, i, R, k);
  const long across = a.transposed ? 1 : a.ld, along = a.transposed ? a.ld : 1;
  const float* pa = a.p + i * across + span.begin * along;
  const float* pb = b + span.begin * ldb;
  y += i * ldy;
  vec sums[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[r][j] = add ? load(y + r * ldy + j * W) : vec{};
  auto step = [&](long row) __attribute__((always_inline)) {
    vec right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) right[j] = load(pb + j * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[r][j] += pa[r * row] * right[j];
    pb += ldb;
  };
  for (int t = span.begin; t < span.end;) {
    if (soon) soon->some();
    const int stop = std::min(t + 16, span.end);
    if (a.transposed)
      for (; t < stop; t++, pa += a.ld) step(1);
    else
      for (; t < stop; t++, pa++) step(a.ld);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(y + r * ldy + j * W, sums[r][j]);
}

template <int N>
inline void panel(float* y, long ldy, Left a, const float* b, long ldb, int m, int k, bool add) {
  int i = 0;
  for (; i + 16 <= m; i += 16) {
    if constexpr (N == 1 && W == 16) {
      tile<16, N>(y, ldy, a, b, ldb, i, k, add);
    } else if constexpr (N <= 3 && W == 16) {
      tile<8, N>(y, ldy, a, b, ldb, i, k, add);
      tile<8, N>(y, ldy, a, b, ldb, i + 8, k, add);
    } else {
      tile<6, N>(y, ldy, a, b, ldb, i, k, add);
      tile<6, N>(y, ldy, a, b, ldb, i + 6, k, add);
      tile<4, N>(y, ldy, a, b, ldb, i + 12, k, add);
    }
  }
  for (; i < m; i++) tile<1, N>(y, ldy, a, b, ldb, i, k, add);
}

// one column of Y; B's elements are ldb apart
inline void column(float* y, long ldy, Left a, const float* b, long ldb, int m, int k, bool add) {
  float right[64], total[16];
  for (int i = 0; i < m; i += 16) {
    Span span = columns(a.band, i, 16, k);
    for (int r = 0; r < 16; r++) total[r] = add ? y[(i + r) * ldy] : 0;
    for (int t0 = span.begin; t0 < span.end; t0 += 64) {
      const int count = std::min(64, span.end - t0), whole = count / W * W;
      for (int t = 0; t < count; t++) right[t] = b[(t0 + t) * ldb];
      if (a.transposed) {
        for (int r = 0; r < 16; r += W) {
          vec sums = load(total + r);
          for (int t = 0; t < count; t++) sums += load(a.p + (t0 + t) * a.ld + i + r) * right[t];
          store(total + r, sums);
        }
      } else {
        for (int r = 0; r < 16; r++) {
          const float* row = a.p + (i + r) * a.ld + t0;
          vec sums{};
          for (int t = 0; t < whole; t += W) sums += load(row + t) * load(right + t);
          total[r] += sum(sums);
          for (int t = whole; t < count; t++) total[r] += row[t] * right[t];
        }
      }
    }
    for (int r = 0; r < 16; r++) y[(i + r) * ldy] = total[r];
  }
}

LOWLINE_OUTLINE void multiply(float* y, long ldy, Left a, const float* b, long ldb, int m, int n,
                              int k, bool add) {
  int vectors = n / 16 * 16 / W;
  if (n % 16) column(y + n - 1, ldy, a, b + n - 1, ldb, m, k, add);
  if constexpr (W == 16) {  // at most 24 sums, 4 vectors of B and one of A: 32 registers
    while (vectors) {
      int N = vectors == 5 || vectors == 6 || vectors == 9 ? 3 : std::min(vectors, 4);
      if (N == 4) panel<4>(y, ldy, a, b, ldb, m, k, add);
      if (N == 3) panel<3>(y, ldy, a, b, ldb, m, k, add);
      if (N == 2) panel<2>(y, ldy, a, b, ldb, m, k, add);
      if (N == 1) panel<1>(y, ldy, a, b, ldb, m, k, add);
      y += N * W, b += N * W, vectors -= N;
    }
  } else {  // 12 sums for 16 registers; 24 on 64-bit ARM, which has 32
#if defined(__aarch64__)
    constexpr int N = 4;
#else
    constexpr int N = 2;
#endif
    for (; vectors; vectors -= N, y += N * W, b += N * W) panel<N>(y, ldy, a, b, ldb, m, k, add);
  }
}

// The lower triangle of Y = A · B, full blocks of 16 x 16; zero above the diagonal, and on it too
// when `strict`, within the diagonal's blocks.
inline void clear_above(float* y, long ldy, int m, bool strict) {
  for (int i = 0; i < m; i++)
    for (int j = strict ? i : i + 1; j < (i / 16 + 1) * 16; j++) y[i * ldy + j] = 0;
}
inline void multiply_lower(float* y, long ldy, Left a, const float* b, long ldb, int m, int k,
                           bool strict) {
  for (int i = 0; i < m; i += 16) {
    Left rows = a;
    rows.p += a.transposed ? i : i * a.ld;
    multiply(y + i * ldy, ldy, rows, b, ldb, 16, i + 16, k, false);
  }
  clear_above(y, ldy, m, strict);
}

}  // namespace lowline
