// On the vectors of simd.h: loads and stores of a row's last few elements, and the functions that
// are made of exponentials.
#pragma once
#include <algorithm>
#include <cstring>

#include "simd.h"

namespace lowline {

// The first n elements at p, the other lanes zero; and their way back.
template <class T> LOWLINE_INLINE vec load(const T* p, int n) {
  if (n == W) return load(p);
  T row[W] = {};
  std::copy_n(p, n, row);
  return load(row);
}
template <class T> LOWLINE_INLINE void store(T* p, vec x, int n) {
  if (n == W) return store(p, x);
  T row[W];
  store(row, x);
  std::copy_n(row, n, p);
}

// 2^x to about 1e-7 relative for x < 128, by the series of e^(r ln 2) for r in [-0.5, 0.5]. Below
// -126 it loses its precision to the exponent's end, at -127 it is 0. A rate multiplied by log2(e)
// beforehand spares e^x's split of ln 2.
LOWLINE_INLINE vec exp2(vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec bounded = x < -127.0f ? fill(-127.0f) : x;
  const vec shifted = bounded + magic, r = bounded - (shifted - magic);
  vec p = fill(1.52527338e-5f);  // ln(2)^7 / 7!
  p = p * r + 1.54035304e-4f;
  p = p * r + 1.33335581e-3f;
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 0.240226507f;
  p = p * r + 0.693147181f;
  p = p * r + 1.0f;
  return (vec)((veci)p + ((veci)shifted << 23));
}

LOWLINE_INLINE vec sigmoid(vec x) {
  const vec u = exp(x < 0.0f ? x : -x);
  return (x < 0.0f ? u : fill(1.0f)) / (u + 1.0f);
}

// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|, and log(1 + u) = 2 artanh(u / (2 + u)), a
// series in a number of at most 1/3, exact for small u too.
LOWLINE_INLINE vec softplus(vec x) {
  const vec u = exp(x < 0.0f ? x : -x), s = u / (u + 2.0f), s2 = s * s;
  vec p = fill(1.0f / 13);
  p = p * s2 + 1.0f / 11;
  p = p * s2 + 1.0f / 9;
  p = p * s2 + 1.0f / 7;
  p = p * s2 + 1.0f / 5;
  p = p * s2 + 1.0f / 3;
  p = p * s2 + 1.0f;
  return (x > 0.0f ? x : vec{}) + 2.0f * s * p;
}

// d/dx of x·sigmoid(x), s being sigmoid(x).
LOWLINE_INLINE vec silu_slope(vec x, vec s) { return s * (1.0f + x * (1.0f - s)); }

// The vector whose lane i is the sum of v[i]'s lanes; v[0 … W) is scratch. Neighbours' even and odd
// lanes are added until one vector is left.
LOWLINE_INLINE vec sums(vec* v) {
#if defined(__GNUC__) && !defined(__clang__)
  veci even;
  for (int i = 0; i < W; i++) even[i] = 2 * i;
#pragma GCC unroll 4
  for (int left = W / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; i++)
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) +
             __builtin_shuffle(v[2 * i], v[2 * i + 1], even + 1);
  return v[0];
#else
  vec total = {};
  for (int i = 0; i < W; i++) total[i] = sum(v[i]);
  return total;
#endif
}

}  // namespace lowline
