// One token of the gated recurrence, for one state head:
//
//     S <- e^g S + k vᵀ,  o = scale · Sᵀ q        with the delta rule v <- β (v - (e^g S)ᵀ k)
//
// A pass over the state, which is the time it takes: it is read and written once.
#pragma once
#include "simd.h"

namespace lowline {

// out[N vectors] = factor · Σ_i weights[i] · S[i], of rows ld apart; two rows at a time hide the latency
template <int N>
inline void read_columns(float* out, const float* S, long ld, const float* weights, int K,
                         float factor) {
  vec even[N] = {}, odd[N] = {};
  for (int i = 0; i < K; i += 2, S += 2 * ld)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      even[j] += load(S + j * W) * weights[i];
      odd[j] += load(S + ld + j * W) * weights[i + 1];
    }
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) store(out + j * W, (even[j] + odd[j]) * factor);
}

// S[i] = decay · S[i] + k[i] · v, out = factor · Σ_i q[i] · S[i]; the decay is rows[i], or columns
template <int N, bool BY_VALUE>
inline void update_columns(float* out, float* S, long ld, const float* q, const float* k,
                           const float* v, const float* rows, const float* columns, int K,
                           float factor) {
  vec even[N] = {}, odd[N] = {}, value[N], decay[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) {
    value[j] = load(v + j * W);
    decay[j] = BY_VALUE ? load(columns + j * W) : vec{};
  }
  for (int i = 0; i < K; i += 2, S += 2 * ld)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      float *a = S + j * W, *b = S + ld + j * W;
      vec x = load(a) * (BY_VALUE ? decay[j] : fill(rows[i])) + value[j] * k[i];
      vec y = load(b) * (BY_VALUE ? decay[j] : fill(rows[i + 1])) + value[j] * k[i + 1];
      store(a, x), store(b, y);
      even[j] += x * q[i], odd[j] += y * q[i + 1];
    }
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) store(out + j * W, (even[j] + odd[j]) * factor);
}

// calls function.operator()<N>(column) for panels of N vectors that cover n columns
template <typename Function>
LOWLINE_INLINE void by_panels(int n, Function function) {
  constexpr int WIDE = W == 4 ? 2 : 4;
  int d = 0;
  for (; d + WIDE * W <= n; d += WIDE * W) function.template operator()<WIDE>(d);
  for (; d + W <= n; d += W) function.template operator()<1>(d);
}

struct StepHead {
  int K, V, queries;  // K a multiple of 16; V too, or one more
  float* S;           // rows ld apart
  long ld;
  const float* q;  // `queries` rows, q_ld apart
  long q_ld;
  const float *k, *v;
  const float *rows, *columns;  // decays of keys, or of values when not null
  float beta;
  bool delta;
  float scale;
  float *out, *scratch;  // out: `queries` rows of V; scratch: K + V floats

  void run() {
    const int whole = V / 16 * 16;
    if (delta) {
      float *weights = scratch, *u = scratch + K;
      for (int i = 0; i < K; i += W) store(weights + i, load(k + i) * load(rows + i));
      read(u, weights, 1);
      for (int d = 0; d < V; d++) u[d] = beta * (v[d] - u[d]);
      v = u;
    }
    if (columns)
      by_panels(whole, [&]<int N>(int d) {
        update_columns<N, true>(out + d, S + d, ld, q, k, v + d, rows, columns + d, K, scale);
      });
    else
      by_panels(whole, [&]<int N>(int d) {
        update_columns<N, false>(out + d, S + d, ld, q, k, v + d, rows, nullptr, K, scale);
      });
    if (V > whole) {  // the normaliser's column
      for (int i = 0; i < K; i++) S[i * ld + whole] = S[i * ld + whole] * rows[i] + k[i] * v[whole];
      read_last(out, q, scale);
    }
    for (int g = 1; g < queries; g++) read(out + g * V, q + g * q_ld, scale);
  }

 private:
  void read(float* o, const float* weights, float factor) const {
    by_panels(V / 16 * 16, [&]<int N>(int d) {
      read_columns<N>(o + d, S + d, ld, weights, K, factor);
    });
    if (V % 16) read_last(o, weights, factor);
  }
  void read_last(float* o, const float* weights, float factor) const {
    float total = 0;
    for (int i = 0; i < K; i++) total += weights[i] * S[i * ld + V - 1];
    o[V - 1] = total * factor;
  }
};

}  // namespace lowline
