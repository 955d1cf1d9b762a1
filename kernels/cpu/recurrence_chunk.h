// One chunk of the gated recurrence, forward and backward, for one state head.
//
// Written for a gate on the state's rows. With x, y of D1 features and u, w of D2,
//
//     M = lower(x yᵀ ⊙ decay),   N = lower(w uᵀ),   S of D1 x D2
//     w's outputs  M u + (x ⊙ enter) S          x's outputs  lower(N ⊙ decay) y + enter ⊙ (w Sᵀ)
//
// the forward pass of a key gate is the first with x, y, u = q, k, v, and its dq the second with
// w = do. A value gate is the same with the roles exchanged: x, y, u, w = do, v, k, q and S
// transposed, so that its forward pass is the second and its dq the first. No gate, and a gate per
// head, count as key gates.
//
// The gradient of a gate is the sum over the pairs (j, i) whose decay holds it, j < t <= i, summed
// as such: a small gradient would be lost in the rounding of a difference of q ⊙ dq and k ⊙ dk.
//
// The delta rule replaces u = v by U, the solution of U = β (v - (y ⊙ enter) S - B U) with B =
// strictly lower (y yᵀ ⊙ decay): a forward substitution. Backward, k is one more query whose output
// gradient is -dv.
#pragma once
#include "recurrence_gates.h"

namespace lowline {

constexpr int SEGMENT = 4;  // chunks between saved states

enum class Gate { none, scalar, vector };

struct Shape {
  int K, V, queries;  // features; queries per state head
  Gate gate;
  bool by_value, delta;

  int D1() const { return by_value ? V : K; }
  int D2() const { return by_value ? K : V; }
  int ld() const { return (D2() + 15) / 16 * 16; }  // of rows of D2 features
  long state() const { return (long)D1() * ld(); }
};

// The tensors of a chunk, packed, and what is worked out from them.
struct Chunk {
  Shape shape;
  int D1, D2, ld, rows, m;  // tokens, and tokens rounded up to 16 (the rest is zero)
  float *x, *y, *u, *w;     // [C x D1] [C x D1] [C x ld] [C x ld]
  float *dx, *dy, *du, *dw, *beta, *dbeta, *dg;
  float *E, *B;  // delta: E = (y ⊙ enter) S - v + B U, and B
  ScalarGate scalar;
  VectorGate vector;
  float *M, *N, *pairs;                   // [C x C]
  float *turned1, *turned2, *scratch;     // transposed y, transposed u, scaled x or y
  float *turnedS, *turneddS;              // [D2 x D1]
  float *from, *to, *before, *after, *inside, *crossing, *ends;  // parts of dg

  Chunk(const Shape& s, Arena& arena) : shape(s), D1(s.D1()), D2(s.D2()), ld(s.ld()) {
    const size_t one = C * D1, two = C * ld;
    for (float** p : {&x, &dx, &dy, &scratch, &turned1, &from, &to, &before, &after, &inside})
      *p = arena.take(one);
    for (float** p : {&w, &du, &dw, &turned2}) *p = arena.take(two);
    for (float** p : {&vector.a, &vector.into, &vector.out, &vector.enter, &vector.leave,
                      &vector.left, &vector.right, &vector.turned, &dg})
      *p = arena.take(one);
    for (float** p : {&M, &N, &pairs, &scalar.matrix}) *p = arena.take(C * C);
    for (float** p : {&scalar.a, &scalar.enter, &scalar.leave, &beta, &dbeta}) *p = arena.take(C);
    turnedS = arena.take((size_t)(D2 + 15) * D1), turneddS = arena.take((size_t)(D2 + 15) * D1);
    crossing = arena.take(C / BLOCK * D1), ends = arena.take(D1);
    vector.D = D1;
  }

  // ---- pieces both passes use ----

  void prepare_gate() {
    if (shape.gate == Gate::scalar) scalar.prepare(m);
    if (shape.gate == Gate::vector) vector.prepare(m);
  }
  const float* entered(const float* rows_) {  // x ⊙ enter
    return scaled(rows_, scalar.enter, vector.enter);
  }
  const float* leaving(const float* rows_) {  // y ⊙ leave
    return scaled(rows_, scalar.leave, vector.leave);
  }
  void decay_state(float* S) const {
    if (shape.gate == Gate::none) return;
    for (int d = 0; d < D1; d++)
      scale(S + (long)d * ld, shape.gate == Gate::scalar ? scalar.total : vector.total(m)[d], ld);
  }
  void scores(float* out, const float* x_, const float* y_turned, bool strict) {
    if (shape.gate == Gate::vector) {
      vector.scores(out, x_, y, m, strict);
    } else {
      multiply_lower(out, C, {x_, D1}, y_turned, C, m, D1, strict);
      if (shape.gate == Gate::scalar) scalar.weigh(out, m);
    }
  }
  void turn_keys() {
    if (shape.gate != Gate::vector) transpose(turned1, C, y, D1, m, D1);
  }

  // ---- forward ----

  // y, u (and beta) are packed and the gate prepared; with the delta rule u becomes U
  void begin(const float* S) {
    turn_keys();
    if (shape.delta) solve(S);
    if (shape.by_value) {
      transpose(turned2, C, u, ld, m, D2);
      transpose(turnedS, D1, S, ld, D1, D2);
    }
  }
  // the outputs of one query head: q is x, or w under a value gate; into dw, or dx
  void output(const float* S) {
    if (shape.by_value) {
      multiply_lower(N, C, {w, ld}, turned2, C, m, D2, false);
      vector.lower(dx, N, y, m, nullptr, nullptr, nullptr);
      multiply(scratch, D1, {w, ld}, turnedS, D1, m, D1, D2, false);
      add_product(dx, scratch, vector.enter, (long)m * D1);
    } else {
      scores(M, x, turned1, false);
      multiply(dw, ld, {entered(x), D1}, S, ld, m, D2, D1, false);
      multiply(dw, ld, {M, C, false, Band::lower}, u, ld, m, D2, m, true);
    }
  }
  void advance(float* S) {
    decay_state(S);
    multiply(S, ld, {leaving(y), D1, true}, u, ld, D1, D2, rows, true);
  }
  void solve(const float* S) {
    scores(B, y, turned1, true);
    multiply(E, ld, {entered(y), D1}, S, ld, m, D2, D1, false);
    for (long i = 0; i < (long)m * ld; i += W) store(E + i, load(E + i) - load(u + i));
    for (int I = 0; I < m; I += BLOCK) {
      multiply(E + (long)I * ld, ld, {B + I * C, C}, u, ld, BLOCK, D2, I, true);
      for (int i = I; i < I + BLOCK; i++)
        for (int d = 0; d < ld; d += W) {
          vec e = load(E + (long)i * ld + d);
          for (int j = I; j < i; j++) e += load(u + (long)j * ld + d) * B[i * C + j];
          store(E + (long)i * ld + d, e);
          store(u + (long)i * ld + d, e * -beta[i]);
        }
    }
  }

  // ---- backward ----

  // What later chunks contribute to this one: dS is the gradient of the state after it, and becomes
  // the decayed one.
  void begin_backward(const float* S, float* dS) {
    turn_keys();
    transpose(turned2, C, u, ld, m, D2);
    transpose(turnedS, D1, S, ld, D1, D2);
    transpose(turneddS, D1, dS, ld, D1, D2);
    multiply(dy, D1, {u, ld}, turneddS, D1, m, D1, D2, false);
    multiply(du, ld, {leaving(y), D1}, dS, ld, m, D2, D1, false);
    if (shape.gate == Gate::scalar) {
      ends[0] = 0;
      for (int d = 0; d < D1; d++) ends[0] += dot(S + (long)d * ld, dS + (long)d * ld, D2);
      ends[0] *= scalar.total;
      for (int j = 0; j < m; j++) {
        scale(dy + j * D1, scalar.leave[j], D1);
        to[j] = dot(y + j * D1, dy + j * D1, D1);
      }
      zero(from, m), zero(pairs, C * C);
    }
    if (shape.gate == Gate::vector) {
      const long n = (long)m * D1;
      for (int d = 0; d < D1; d++)
        ends[d] = vector.total(m)[d] * dot(S + (long)d * ld, dS + (long)d * ld, D2);
      product(dy, dy, vector.leave, n);
      product(to, y, dy, n);
      for (float* part : {from, before, after, inside}) zero(part, n);
      zero(crossing, m / BLOCK * D1);
    }
    decay_state(dS);
  }
  // One query head: x and w are packed; dx (and dw under a value gate) are its own, dy, du and dS
  // add up. `strict` is the delta rule's k as a query, whose M is B.
  void query_backward(const float* S, float* dS, bool strict) {
    const long n = (long)m * D1;
    const bool gated = shape.gate == Gate::vector;
    multiply_lower(N, C, {w, ld}, turned2, C, m, D2, strict);
    if (!strict) scores(M, x, turned1, false);
    multiply(dx, D1, {w, ld}, turnedS, D1, m, D1, D2, false);
    if (gated) {
      product(dx, dx, vector.enter, n);
      add_product(from, x, dx, n);
      vector.lower(scratch, N, y, m, x, before, crossing);
      for (long i = 0; i < n; i += W) store(dx + i, load(dx + i) + load(scratch + i));
      vector.upper(dy, N, x, m, y, after, inside);
    } else {
      if (shape.gate == Gate::scalar) {
        for (int i = 0; i < m; i++) {
          scale(dx + i * D1, scalar.enter[i], D1);
          from[i] += dot(x + i * D1, dx + i * D1, D1);
          add_product(pairs + i * C, (strict ? B : M) + i * C, N + i * C, (i / 16 + 1) * 16);
        }
        scalar.weigh(N, m);
      }
      multiply(dx, D1, {N, C, false, Band::lower}, y, D1, m, D1, m, true);
      multiply(dy, D1, {N, C, true, Band::upper}, x, D1, m, D1, m, true);
    }
    const float* query = entered(x);
    if (shape.by_value) {
      multiply(dw, ld, {query, D1}, S, ld, m, D2, D1, false);
      multiply(dw, ld, {M, C, false, Band::lower}, u, ld, m, D2, m, true);
    }
    if (!strict) multiply(du, ld, {M, C, true, Band::upper}, w, ld, m, D2, m, true);
    multiply(dS, ld, {query, D1, true}, w, ld, D1, D2, rows, true);
  }
  // The delta rule: du is the gradient of U; becomes dv. Ends with k as a query: adds to dy.
  void solve_backward(const float* S, float* dS) {
    for (int I = m - BLOCK; I >= 0; I -= BLOCK) {
      const int next = I + BLOCK;
      multiply(du + (long)I * ld, ld, {B + next * C + I, C, true}, w + (long)next * ld, ld, BLOCK,
               D2, m - next, true);
      for (int i = next - 1; i >= I; i--) {
        for (int d = 0; d < ld; d += W) {
          vec r = load(du + (long)i * ld + d);
          for (int j = i + 1; j < next; j++) r += load(w + (long)j * ld + d) * B[j * C + i];
          store(du + (long)i * ld + d, r);
          store(w + (long)i * ld + d, r * -beta[i]);
        }
        dbeta[i] = -dot(du + (long)i * ld, E + (long)i * ld, D2);
      }
    }
    std::memcpy(x, y, sizeof(float) * m * D1);
    query_backward(S, dS, true);
    for (long i = 0; i < (long)m * D1; i += W) store(dy + i, load(dy + i) + load(dx + i));
    for (long i = 0; i < (long)m * ld; i += W) store(du + i, -load(w + i));
  }
  // dg, of [C] or [C x D1], once every query has been through
  void gate_backward() {
    if (shape.gate == Gate::scalar) {
      float columns[C];  // Σ_{i >= t} pairs[i][j]
      zero(columns, C);
      float rest = 0;
      for (int t = m - 1; t >= 0; t--) {
        for (int j = 0; j < (t / BLOCK + 1) * BLOCK; j += W)
          store(columns + j, load(columns + j) + load(pairs + t * C + j));
        vec crossed{};
        for (int j = 0; j < t; j += W)
          crossed += lanes() + j < t ? load(columns + j) : vec{};
        rest += from[t];
        dg[t] = rest + ends[0] + sum(crossed);
      }
      rest = 0;
      for (int t = 0; t < m; t++) dg[t] += rest, rest += to[t];
    }
    if (shape.gate == Gate::vector)
      for (int d = 0; d < D1; d += W) {
        vec chunk = load(ends + d), block{};
        for (int t = m - 1; t >= 0; t--) {
          if (t % BLOCK == BLOCK - 1) block = load(crossing + t / BLOCK * D1 + d);
          chunk += load(from + t * D1 + d), block += load(before + t * D1 + d);
          store(dg + t * D1 + d, load(inside + t * D1 + d) + chunk + block);
        }
        chunk = block = vec{};
        for (int t = 0; t < m; t++) {
          if (t % BLOCK == 0) block = vec{};
          store(dg + t * D1 + d, load(dg + t * D1 + d) + chunk + block);
          chunk += load(to + t * D1 + d), block += load(after + t * D1 + d);
        }
      }
  }

 private:
  const float* scaled(const float* in, const float* by_row, const float* by_feature) {
    if (shape.gate == Gate::none) return in;
    if (shape.gate == Gate::vector) {
      product(scratch, in, by_feature, (long)m * D1);
    } else {
      for (int i = 0; i < m; i++)
        for (int d = 0; d < D1; d += W)
          store(scratch + i * D1 + d, load(in + i * D1 + d) * by_row[i]);
    }
    return scratch;
  }
};

}  // namespace lowline
