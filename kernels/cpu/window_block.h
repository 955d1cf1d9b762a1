// What forward and backward share: the call, and the weights of a block of queries.
#pragma once
#include <ATen/Parallel.h>

#include <limits>
#include <optional>
#include <vector>

#include "tensors.h"
#include "window_tiles.h"

namespace lowline {

constexpr int C = 64;  // rows of a block
constexpr float NEGATIVE = -std::numeric_limits<float>::infinity();

// Rows of one head of one sequence.
struct Rows {
  float* at;
  long step;
  float* operator[](long row) const { return at + row * step; }
};

// The arguments of a call. r query heads and p heads of phi(k) belong to a key/value head; a block of
// queries sees X columns: X0 of sinks, then those of its M + 1 key blocks.
struct Call {
  at::Tensor q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lambda, S, length;
  std::optional<at::Tensor> cu;
  int64_t window, prefix;
  float scale;
  int N, H, G, P, D, V, F, sinks, r, p, M, X0, X;
  std::vector<long> first_q, tokens, first_saved;

  // Of q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lambda, S, length, cu or None, window, prefix,
  // scale.
  explicit Call(PyObject* const* args) {
    at::Tensor* const to[] = {&q,      &k,     &v,      &phi_q, &phi_k, &sink_k,
                              &sink_v, &gamma, &lambda, &S,     &length};
    for (int i = 0; i < 11; i++) *to[i] = *tensor(args[i]);
    if (args[11] != Py_None) cu = *tensor(args[11]);
    window = PyLong_AsLong(args[12]), prefix = PyLong_AsLong(args[13]);
    scale = PyFloat_AsDouble(args[14]);
    N = length.size(0), H = q.size(2), G = k.size(2), P = phi_k.size(2);
    D = q.size(3), V = v.size(3), F = phi_q.size(3), sinks = sink_k.size(1);
    r = H / G, p = P / G, M = (window + C - 2) / C;
    X0 = (sinks + 15) / 16 * 16, X = X0 + (M + 1) * C;
    long saved = 0;
    for (int n = 0; n < N; n++) {
      const int64_t* bounds = cu ? cu->data_ptr<int64_t>() : nullptr;
      first_q.push_back(cu ? bounds[n] : 0);
      tokens.push_back(cu ? bounds[n + 1] - bounds[n] : q.size(1));
      first_saved.push_back(saved);
      saved += blocks(n) - prefix / C;
    }
  }
  long keys(int n) const { return prefix + tokens[n]; }
  long blocks(int n) const { return (keys(n) + C - 1) / C; }
  Rows of_query(const at::Tensor& x, int n, int head) const { return of(x, n, head, first_q[n]); }
  Rows of_key(const at::Tensor& x, int n, int head) const {
    return of(x, n, head, first_q[n] + (cu ? n * prefix : 0));
  }
  float* state(const at::Tensor& sums, int n, int g) const {
    return sums.data_ptr<float>() + (static_cast<long>(n) * P + g * p) * F * (V + 1);
  }
  // Runs work(arena, n, first head, last head) over all, in parallel.
  template <class Work>
  void each(long together, Work work) const {
    const long threads = at::get_num_threads();
    const long heads = std::min({together, long{G}, std::max(1L, N * G / threads)});
    const long tasks = (G + heads - 1) / heads;
    at::parallel_for(0, N * tasks, 1, [&](int64_t first, int64_t last) {
      static thread_local Arena arena;
      FlushDenormals flush;
      for (int64_t i = first; i < last; i++) {
        const long g = i % tasks * heads;
        arena.reset();
        work(arena, i / tasks, g, std::min<long>(g + heads, G));
      }
    });
  }
  // The sum before query block b (counted from 0) of sequence n; z follows S.
  float* saved_sum(const at::Tensor& saved, int n, long b, int head) const {
    return saved.data_ptr<float>() + ((first_saved[n] + b) * P + head) * F * (V + 1);
  }

 private:
  Rows of(const at::Tensor& x, int n, int head, long row) const {
    const long start = (cu ? 0 : n * x.stride(0)) + head * x.stride(2) + row * x.stride(1);
    return {x.data_ptr<float>() + start, x.stride(1)};
  }
};

// A thread's buffers for one block of queries at a time; the second half is the backward pass's.
struct Scratch {
  float *q, *phi_q, *scores, *linear, *weights, *shift, *den, *y;
  float *u, *dW, *ds, *dlinear, *dq, *dphi, *St, *delta;
  int top[C];  // column of each row's largest score

  Scratch(const Call& c, Arena& arena) {
    for (float** p : {&q, &dq}) *p = arena.take(C * c.D);
    for (float** p : {&phi_q, &dphi}) *p = arena.take(C * c.F);
    for (float** p : {&y, &u}) *p = arena.take(C * c.V);
    for (float** p : {&scores, &linear, &weights, &dW}) *p = arena.take(C * c.X);
    for (float** p : {&shift, &den, &delta}) *p = arena.take(C);
    St = arena.take(c.F * c.V);
    ds = scores, dlinear = linear;  // written when those have been read
  }
};

// What forward and backward share: one key/value head of one sequence, the key blocks in view, and
// the weights of a block of queries.
struct Block {
  const Call& c;
  Scratch& t;
  int n, g;
  long sinks_end;  // rows before it are sinks, or before the sequence: no part of S
  long valid;      // rows before it are before the sequence
  Range m{0, 0};   // the rows of the block that hold queries
  std::vector<float*> Kt, V;
  std::vector<float*> Pt;  // phi(k)ᵀ of (slot, head of the group)
  float *sink_Kt, *sink_V;

  Block(const Call& call, Scratch& scratch, Arena& arena, int sequence, int head)
      : c(call), t(scratch), n(sequence), g(head) {
    sink_Kt = arena.take(c.X0 * c.D), sink_V = arena.take(c.X0 * c.V);
    for (int s = 0; s <= c.M; s++) {
      Kt.push_back(arena.take(C * c.D)), V.push_back(arena.take(C * c.V));
      for (int h = 0; h < c.p; h++) Pt.push_back(arena.take(C * c.F));
    }
    const long first = c.length.data_ptr<int64_t>()[n] - c.prefix;  // position of row 0
    valid = std::max(0L, -first), sinks_end = std::max(valid, c.sinks - first);
    if (!c.sinks) return;
    const float* k = c.sink_k.data_ptr<float>() + (static_cast<long>(n) * c.sinks * c.G + g) * c.D;
    const float* v = c.sink_v.data_ptr<float>() + (static_cast<long>(n) * c.sinks * c.G + g) * c.V;
    transpose_rows(sink_Kt, c.X0, k, c.G * c.D, c.sinks, c.D);
    std::memset(sink_V, 0, sizeof(float) * c.X0 * c.V);
    copy_rows(sink_V, c.V, v, c.G * c.V, c.sinks, c.V);
  }
  int slot(long b) const { return b % (c.M + 1); }
  float* phi_t(long b, int h) const { return Pt[slot(b) * c.p + h]; }
  int phi_head(int h) const { return c.p == 1 ? 0 : h; }

  // Takes key block b into its slot.
  void enter(long b) {
    const int rows = std::min<long>(C, c.keys(n) - b * C);
    const Rows k = c.of_key(c.k, n, g), v = c.of_key(c.v, n, g);
    transpose_rows(Kt[slot(b)], C, k[b * C], k.step, rows, c.D);
    copy_rows(V[slot(b)], c.V, v[b * C], v.step, rows, c.V);
    for (int h = 0; h < c.p && c.F; h++) {
      const Rows phi = c.of_key(c.phi_k, n, g * c.p + h);
      transpose_rows(phi_t(b, h), C, phi[b * C], phi.step, rows, c.F);
      const int gone = std::clamp<long>(sinks_end - b * C, 0, rows);
      for (int f = 0; f < c.F && gone; f++) std::fill_n(phi_t(b, h) + f * C, gone, 0.0f);
    }
  }
  int exact_from(int i) const { return std::max<int>(0, C * c.M + i - c.window + 1); }
  int exact_to(int i) const { return C * c.M + i + 1; }
  // Columns, within key block b - m, of the rows [i, j).
  Range exact(int m, int i, int j) const {
    return within(m, exact_from(i), exact_to(j - 1));
  }
  Range older(int m, int, int j) const { return within(m, 0, exact_from(j - 1)); }
  Range either(int m, int i, int j) const {
    return c.F ? within(m, 0, exact_to(j - 1)) : exact(m, i, j);
  }
  Range within(int m, int from, int to) const {
    const int x = (c.M - m) * C;
    return {std::clamp(from - x, 0, C), std::clamp(to - x, 0, C)};
  }
  // Rows of the block that touch the columns [i, j) of key block b - m.
  Range exact_rows(int k, int i, int j) const {
    return {std::max(m.first, i - C * k), std::min<int>(m.last, j - 1 - C * k + c.window)};
  }
  Range older_rows(int k, int i) const {
    return {std::max<int>(m.first, i - C * k + c.window), m.last};
  }
  Range either_rows(int k, int i, int j) const {
    return c.F ? Range{std::max(m.first, i - C * k), m.last} : exact_rows(k, i, j);
  }
  int column(int m) const { return c.X0 + (c.M - m) * C; }

  // The weights (C x X) of query block b and head h of the group, and their sums, z's part included;
  // with TOP also the column of each row's largest score.
  template <bool TOP>
  void weigh(long b, int h, const float* z) {
    const int head = g * c.r + h;
    const long row0 = b * C - c.prefix;  // the token of row 0
    m.first = std::max(0L, -row0), m.last = std::min<long>(C, c.tokens[n] - row0);
    const Rows rq = c.of_query(c.q, n, head);
    const float gamma = c.gamma.data_ptr<float>()[head], lambda = c.lambda.data_ptr<float>()[head];
    copy_rows(t.q + m.first * c.D, c.D, rq[row0 + m.first], rq.step, m.last - m.first, c.D, c.scale);
    if (c.F) {
      const Rows rp = c.of_query(c.phi_q, n, head);
      copy_rows(t.phi_q + m.first * c.F, c.F, rp[row0 + m.first], rp.step, m.last - m.first, c.F,
                lambda);
    }
    if (c.sinks) product(t.scores, c.X, {t.q, c.D}, sink_Kt, c.X0, m, all(c.X0), all(c.D), false);
    for (int d = 0; d <= c.M && d <= b; d++) {
      product(t.scores + column(d), c.X, {t.q, c.D}, Kt[slot(b - d)], C, m,
              [&](int i, int j) { return exact(d, i, j); }, all(c.D), false);
      if (c.F)
        product(t.linear + column(d), c.X, {t.phi_q, c.F}, phi_t(b - d, phi_head(h)), C, m,
                [&](int i, int j) { return older(d, i, j); }, all(c.F), false);
    }
    const long position = c.length.data_ptr<int64_t>()[n] + row0;
    const int missing = c.X0 + std::max<long>({0, (c.M - b) * C, valid - (b - c.M) * C});
    for (int i = m.first; i < m.last; i++) {
      const int out = std::clamp<long>(position + i - c.window + 1, 0, c.sinks);
      t.shift[i] = largest<TOP>(i, out, std::max(c.X0 + exact_from(i), missing));
    }
    for (int i = m.first; i < m.last; i++) {
      const int out = std::clamp<long>(position + i - c.window + 1, 0, c.sinks);
      t.den[i] = weigh_row(i, out, missing, gamma);
      if (c.F) t.den[i] += dot(t.phi_q + i * c.F, z, c.F);
    }
  }

 private:
  // The scores at x of row i, -inf outside of [first, last).
  vec scores_within(int i, int x, int first, int last) const {
    const vec s = load(t.scores + i * c.X + x);
    if (first <= x && x + W <= last) return s;
    const veci column = lanes() + x;
    return (column >= first && column < last) ? s : fill(NEGATIVE);
  }

  // The largest score of row i, over sinks [0, out) and columns [ea, eb); with TOP also its column.
  template <bool TOP>
  float largest(int i, int out, int ea) const {
    vec best = fill(NEGATIVE);
    veci where{};
    auto look = [&](int x, int first, int last) {
      const vec s = scores_within(i, x, first, last);
      if constexpr (TOP) where = s > best ? lanes() + x : where;
      best = s > best ? s : best;
    };
    const int eb = c.X0 + exact_to(i);
    for (int x = 0; x < out; x += W) look(x, 0, out);
    for (int x = ea / W * W; x < eb; x += W) look(x, ea, eb);
    vec most = best;
    for (int h = W / 2; h; h /= 2) {
      const vec other = exchanged(most, h);
      most = other > most ? other : most;
    }
    if constexpr (TOP) {
      where = best == most ? where : lanes() * 0 + c.X;
      for (int h = W / 2; h; h /= 2) {
        const veci other = exchanged(where, h);
        where = other < where ? other : where;
      }
      t.top[i] = where[0];
    }
    return most[0];
  }

  // The weights of row i, and their sum: sinks [0, out) and columns [ea, eb) exact, columns
  // [missing, ea) linear, the rest zero.
  float weigh_row(int i, int out, int missing, float gamma) {
    const float *linear = t.linear + i * c.X, shift = t.shift[i];
    float* w = t.weights + i * c.X;
    const int from = c.X0 + exact_from(i), ea = std::max(from, missing), eb = c.X0 + exact_to(i);
    vec total{};
    for (int x = 0; x < c.X0; x += W) {
      const vec e = exp(scores_within(i, x, 0, out) - shift) * gamma;
      store(w + x, e), total += e;
    }
    const int begin = missing / W * W;
    for (int x = c.X0; x < begin; x += W) store(w + x, vec{});
    for (int x = begin; x < c.X; x += W) {
      vec e{};
      if (x + W > ea && x < eb) e = exp(scores_within(i, x, ea, eb) - shift) * gamma;
      if (x < from && c.F) {
        const veci column = lanes() + x;
        e += (column >= missing && column < from) ? load(linear + x) : vec{};
      }
      store(w + x, e), total += e;
    }
    return sum(total);
  }
};

// The rows of key block b that have left the window when the last token is seen: all before it.
inline int rows_of_the_end(const Call& c, int n, long b) {
  return std::clamp<long>(c.tokens[n] ? c.keys(n) - c.window - b * C : 0, 0, C);
}

// S and z, of F x (V + 1) in the state, side by side.
inline void unpack_sum(float* S, float* z, const float* state, int F, int V) {
  for (int f = 0; f < F; f++) {
    std::memcpy(S + f * V, state + f * (V + 1), sizeof(float) * V);
    z[f] = state[f * (V + 1) + V];
  }
}

inline void pack_sum(float* state, const float* S, const float* z, int F, int V) {
  for (int f = 0; f < F; f++) {
    std::memcpy(state + f * (V + 1), S + f * V, sizeof(float) * V);
    state[f * (V + 1) + V] = z[f];
  }
}

// The heads of one sequence that one thread works side by side, a block of each in turn: their rows
// are neighbours in memory.
template <class Head, class... Args>
std::vector<std::unique_ptr<Head>> heads_of(const Call& c, int n, int first, int last,
                                            Args&&... args) {
  std::vector<std::unique_ptr<Head>> heads;
  for (int g = first; g < last; g++) heads.push_back(std::make_unique<Head>(c, args..., n, g));
  return heads;
}

}  // namespace lowline
