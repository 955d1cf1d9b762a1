// One chunk of the gated recurrence: the decays, and the three products that hold them.
//
// A decay from token j to token i is the product of e^g over j < t <= i: always a product of
// numbers in [0, 1], never a quotient or a difference of sums: any gate is exact, -inf included.
// With a gate for every feature the products over a chunk are made from blocks of 16 tokens: within
// a block token by token, between blocks as a matrix product of
//
//     into[i] = decay from the block's entry to i,   out[j] = decay from j to the block's end
//
// and the decays of complete blocks in between.
#pragma once
#include "gemm.h"

namespace lowline {

constexpr int C = 64;  // tokens per chunk
constexpr int BLOCK = 16;

// elementwise over n floats, n a multiple of 16
LOWLINE_INLINE void product(float* out, const float* x, const float* y, long n) {
  for (long i = 0; i < n; i += W) store(out + i, load(x + i) * load(y + i));
}
LOWLINE_INLINE void add_product(float* out, const float* x, const float* y, long n) {
  for (long i = 0; i < n; i += W) store(out + i, load(out + i) + load(x + i) * load(y + i));
}
LOWLINE_INLINE void scale(float* x, float factor, long n) {
  for (long i = 0; i < n; i += W) store(x + i, load(x + i) * factor);
}
inline void zero(float* x, long n) { std::memset(x, 0, n * sizeof(float)); }

// ---- a gate per head -------------------------------------------------------------------------

struct ScalarGate {
  float* a;       // [C] e^g
  float* enter;   // [C] decay from the chunk's entry to i
  float* leave;   // [C] decay from j to the chunk's end
  float* matrix;  // [C x C] decay from j to i, lower blocks of 16 x 16
  float total;

  void prepare(int m) {
    float running = 1;
    for (int i = 0; i < m; i++) enter[i] = running *= a[i];
    total = running, running = 1;
    for (int j = m - 1; j >= 0; j--) leave[j] = running, running *= a[j];
    for (int i = 0; i < m; i++) {
      float* row = matrix + i * C;
      const int width = (i / BLOCK + 1) * BLOCK;
      if (i % BLOCK == 0) zero(row + i, BLOCK);
      if (i)
        for (int j = 0; j < (i % BLOCK ? width : i); j += W)
          store(row + j, load(row + j - C) * a[i]);
      row[i] = 1;
    }
  }
  void weigh(float* M, int m) const {
    for (int i = 0; i < m; i++) product(M + i * C, M + i * C, matrix + i * C, (i / 16 + 1) * 16);
  }
};

// ---- a gate per feature ----------------------------------------------------------------------

struct VectorGate {
  int D;
  float* a;      // [C x D] e^g
  float* into;   // [C x D] decay from the block's entry to i
  float* out;    // [C x D] decay from j to the block's end
  float* enter;  // [C x D] decay from the chunk's entry to i
  float* leave;  // [C x D] decay from j to the chunk's end
  float *left, *right, *turned;  // [C x D] scratch

  const float* block(int I) const { return into + (I * BLOCK + BLOCK - 1) * D; }
  const float* total(int m) const { return enter + (m - 1) * D; }

  void prepare(int m) {
    for (int d = 0; d < D; d += W) {
      vec chunk = fill(1), inside = fill(1);
      for (int i = 0; i < m; i++) {
        vec x = load(a + i * D + d);
        inside = i % BLOCK ? inside * x : x;
        chunk *= x;
        store(into + i * D + d, inside);
        store(enter + i * D + d, chunk);
      }
      chunk = inside = fill(1);
      for (int j = m - 1; j >= 0; j--) {
        if (j % BLOCK == BLOCK - 1) inside = fill(1);
        store(out + j * D + d, inside);
        store(leave + j * D + d, chunk);
        inside *= load(a + j * D + d);
        chunk *= load(a + j * D + d);
      }
    }
  }

  // M[i][j] = Σ_d x[i] · decay(j, i) · y[j] for j <= i (j < i when strict); lower blocks written
  void scores(float* M, const float* x, const float* y, int m, bool strict) const {
    transpose(turned, C, y, D, m, D);
    for (int I = 0; I < m / BLOCK; I++)
      diagonal_scores(M + I * BLOCK * (C + 1), x + I * BLOCK * D, a + I * BLOCK * D,
                      turned + I * BLOCK);
    if (m > BLOCK) {
      product(left, x, into, (long)m * D);
      product(right, y, out, (long)m * D);
      transpose(turned, C, right, D, m, D);
      for (int I = 1; I < m / BLOCK; I++) {
        multiply(M + I * BLOCK * C, C, {left + I * BLOCK * D, D}, turned, C, BLOCK, I * BLOCK, D,
                 false);
        if (I + 1 < m / BLOCK)  // decay what is behind over this block
          for (int d = 0; d < D; d++) scale(turned + d * C, block(I)[d], I * BLOCK);
      }
    }
    clear_above(M, C, m, strict);
  }

  // o[i] = Σ_{j <= i} N[i][j] · decay(j, i) · y[j]. For the gate's gradient (`crossing` not null),
  // with x the other factor of the pairs: `before`[i] += x[i] · the part of o[i] from earlier
  // blocks; crossing[T] += the pairs from blocks before T to blocks after T.
  void lower(float* o, const float* N, const float* y, int m, const float* x, float* before,
             float* crossing) const {
    product(right, y, out, (long)m * D);
    for (int I = 0; I < m / BLOCK; I++) {
      float* part = o + I * BLOCK * D;
      const long at = (long)I * BLOCK * D;
      const float* weights = N + I * BLOCK * C;
      if (I == 0) {
        zero(part, BLOCK * D);
      } else {
        if (crossing) {
          for (int J = 0; J < I; J++) {
            multiply(part, D, {weights + J * BLOCK, C}, right + J * BLOCK * D, D, BLOCK, D, BLOCK,
                     J > 0);
            if (J + 1 < I)
              for (int d = 0; d < D; d += W) {
                vec total = load(crossing + (J + 1) * D + d);
                for (int i = 0; i < BLOCK; i++)
                  total += load(x + at + i * D + d) * load(into + at + i * D + d) *
                           load(part + i * D + d);
                store(crossing + (J + 1) * D + d, total);
              }
          }
        } else {
          multiply(part, D, {weights, C}, right, D, BLOCK, D, I * BLOCK, false);
        }
        product(part, part, into + at, BLOCK * D);
        if (crossing) add_product(before + at, x + at, part, BLOCK * D);
        if (I + 1 < m / BLOCK)
          for (int j = 0; j < I * BLOCK; j++) product(right + j * D, right + j * D, block(I), D);
      }
      diagonal_lower(part, weights + I * BLOCK, y + at, a + at);
    }
  }

  // o[j] += Σ_{i >= j} N[i][j] · decay(j, i) · x[i]; after[j] += y[j] · the part from later blocks;
  // dg[t] += the pairs within t's block.
  void upper(float* o, const float* N, const float* x, int m, const float* y, float* after,
             float* dg) const {
    product(left, x, into, (long)m * D);
    for (int J = m / BLOCK - 1; J >= 0; J--) {
      const long at = (long)J * BLOCK * D, behind = at + BLOCK * D;
      const int later = m - (J + 1) * BLOCK;
      if (later) {
        float* part = right;
        multiply(part, D, {N + (J + 1) * BLOCK * C + J * BLOCK, C, true}, left + behind, D, BLOCK,
                 D, later, false);
        product(part, part, out + at, BLOCK * D);
        add_product(after + at, y + at, part, BLOCK * D);
        for (int i = 0; i < BLOCK * D; i += W) store(o + at + i, load(o + at + i) + load(part + i));
        if (J)
          for (int i = 0; i < later; i++)
            product(left + behind + i * D, left + behind + i * D, block(J), D);
      }
      diagonal_upper(o + at, N + J * BLOCK * (C + 1), x + at, y + at, a + at, dg + at);
    }
  }

 private:
  // lanes are the keys j of the block; a key decays once per row
  void diagonal_scores(float* M, const float* x, const float* a, const float* turned) const {
    for (int j0 = 0; j0 < BLOCK; j0 += W) {
      vec sums[BLOCK] = {};
      const veci lane = lanes() + j0;
      for (int d = 0; d < D; d++) {
        vec y = load(turned + d * C + j0);
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK; i++) {
          y = lane < i ? y * a[i * D + d] : y;
          sums[i] += y * x[i * D + d];
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < BLOCK; i++) store(M + i * C + j0, sums[i]);
    }
  }
  void diagonal_lower(float* o, const float* N, const float* y, const float* a) const {
    for (int d = 0; d < D; d += W) {
      vec decayed[BLOCK];
#pragma GCC unroll 16
      for (int i = 0; i < BLOCK; i++) {
        vec decay = load(a + i * D + d), total = load(o + i * D + d);
#pragma GCC unroll 16
        for (int j = 0; j < i; j++) {
          decayed[j] *= decay;
          total += decayed[j] * N[i * C + j];
        }
        decayed[i] = load(y + i * D + d);
        store(o + i * D + d, total + decayed[i] * N[i * C + i]);
      }
    }
  }
  void diagonal_upper(float* o, const float* N, const float* x, const float* y, const float* a,
                      float* dg) const {
    for (int d = 0; d < D; d += W) {
      vec decayed[BLOCK];
      for (int j = BLOCK - 1; j >= 0; j--) {
        vec total{}, key = load(y + j * D + d);
        vec decay = j + 1 < BLOCK ? load(a + (j + 1) * D + d) : vec{};
        for (int i = BLOCK - 1; i > j; i--) {
          decayed[i] *= decay;
          total += decayed[i] * N[i * C + j];
          store(dg + i * D + d, load(dg + i * D + d) + total * key);
        }
        decayed[j] = load(x + j * D + d);
        total += decayed[j] * N[j * C + j];
        store(o + j * D + d, load(o + j * D + d) + total);
      }
    }
  }
};

}  // namespace lowline
