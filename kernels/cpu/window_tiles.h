// Products in which every strip of 16 rows has its own band of columns or of terms; rows packed.
#pragma once
#include "gemm.h"

namespace lowline {

struct Range {
  int first, last;  // half open
};

inline auto all(int n) {
  return [n](int, int) { return Range{0, n}; };
}
inline auto only(Range range) {
  return [range](int, int) { return range; };
}

// Y (+)= A B for the rows [m.first, m.last), in strips that end at multiples of 16. The rows [i, j) of
// a strip take the columns columns(i, j) of B, widened to multiples of 16, and only the terms
// terms(i, j) of the sum.
template <class Columns, class Terms>
inline void product(float* y, long ldy, Left a, const float* b, long ldb, Range m, Columns columns,
                    Terms terms, bool add) {
  for (int i = m.first, rows; i < m.last; i += rows) {
    rows = std::min(16 - i % 16, m.last - i);
    const Range n = columns(i, i + rows), k = terms(i, i + rows);
    const int from = n.first / 16 * 16, width = (n.last + 15) / 16 * 16 - from;
    const int depth = std::max(k.last - k.first, 0);
    if (width <= 0 || (add && !depth)) continue;
    Left strip = a;
    strip.p += a.transposed ? i + k.first * a.ld : i * a.ld + k.first;
    const float* terms_of_b = b + k.first * ldb + from;
    multiply(y + i * ldy + from, ldy, strip, terms_of_b, ldb, rows, width, depth, add);
  }
}

// columns: a multiple of 16
inline void copy_rows(float* out, long ldo, const float* in, long ldi, int n, int columns,
                      float factor = 1) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < columns; j += W) store(out + i * ldo + j, load(in + i * ldi + j) * factor);
}

}  // namespace lowline
