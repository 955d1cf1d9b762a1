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
// queries sees X keys: X0 of sinks, then those of its M + 1 key blocks.
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
      Ahead soon;
      for (int64_t i = first; i < last; i++) {
        const long g = i % tasks * heads;
        arena.reset();
        work(arena, i / tasks, g, std::min<long>(g + heads, G));
      }
    });
  }
  // Announce the rows of block b: of all query heads of key/value head g, of its keys, of its φ(k).
  void want_queries(const at::Tensor& x, int n, int g, long b, int columns) const {
    for (int h = g * r; h < (g + 1) * r; h++)
      want(of_query(x, n, h), b * C - prefix, tokens[n], columns);
  }
  void want_keys(const at::Tensor& x, int n, int g, long b, int columns) const {
    want(of_key(x, n, g), b * C, keys(n), columns);
  }
  void want_features(const at::Tensor& x, int n, int g, long b) const {
    for (int h = g * p; h < (g + 1) * p; h++) want(of_key(x, n, h), b * C, keys(n), F);
  }
  // The sum before query block b (counted from 0) of sequence n; z follows S.
  float* saved_sum(const at::Tensor& saved, int n, long b, int head) const {
    return saved.data_ptr<float>() + ((first_saved[n] + b) * P + head) * F * (V + 1);
  }

 private:
  static void want(Rows rows, long first, long end, int columns) {
    end = std::min(end, first + C), first = std::max(0L, first);
    if (first < end)
      ahead->want(rows[first], rows.step * sizeof(float), end - first, columns * sizeof(float));
  }
  Rows of(const at::Tensor& x, int n, int head, long row) const {
    const long start = (cu ? 0 : n * x.stride(0)) + head * x.stride(2) + row * x.stride(1);
    return {x.data_ptr<float>() + start, x.stride(1)};
  }
};

// A thread's buffers for one block of queries at a time; the second half is the backward pass's.
// Matrices between queries and what they see (scores, weights, dW, ds, dlinear) are transposed, X
// rows of C queries: vectors hold queries, so that a softmax needs no sum within a vector.
struct Scratch {
  float *q, *q_t, *phi_q, *phi_q_t, *scores, *weights, *den, *y;
  float *u, *u_t, *dW, *ds, *dlinear, *dq, *dphi, *dphi_t, *dS_t, *mean;
  int32_t top[C];  // row of each query's largest score

  Scratch(const Call& c, Arena& arena) {
    for (float** p : {&q, &q_t, &dq}) *p = arena.take(C * c.D);
    for (float** p : {&phi_q, &phi_q_t, &dphi, &dphi_t}) *p = arena.take(C * c.F);
    for (float** p : {&y, &u, &u_t}) *p = arena.take(C * c.V);
    for (float** p : {&scores, &weights, &dW}) *p = arena.take(C * c.X);
    for (float** p : {&den, &mean}) *p = arena.take(C);
    dS_t = arena.take(c.F * c.V);
    ds = scores, dlinear = dW;  // written when those have been read
  }
};

// What sixteen queries see, as rows of their transposed matrices: [begin, from) is older for all of
// them, [whole, causal) exact for all; of [from, whole) the later queries see the row as older, of
// [causal, end) only they see it, as exact. A window of less than 16, or a sequence that begins
// among them, mixes all in [from, end).
struct Strip {
  int begin, from, whole, causal, end;
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
  std::vector<float*> K, V;
  std::vector<float*> features;  // phi(k) of (slot, head of the group)
  float *sink_K, *sink_V;

  Block(const Call& call, Scratch& scratch, Arena& arena, int sequence, int head)
      : c(call), t(scratch), n(sequence), g(head) {
    sink_K = arena.take(c.X0 * c.D), sink_V = arena.take(c.X0 * c.V);
    for (int s = 0; s <= c.M; s++) {
      K.push_back(arena.take(C * c.D)), V.push_back(arena.take(C * c.V));
      for (int h = 0; h < c.p; h++) features.push_back(arena.take(C * c.F));
    }
    const long first = c.length.data_ptr<int64_t>()[n] - c.prefix;  // position of row 0
    valid = std::max(0L, -first), sinks_end = std::max(valid, c.sinks - first);
    if (!c.sinks) return;
    const float* k = c.sink_k.data_ptr<float>() + (static_cast<long>(n) * c.sinks * c.G + g) * c.D;
    const float* v = c.sink_v.data_ptr<float>() + (static_cast<long>(n) * c.sinks * c.G + g) * c.V;
    take_rows(sink_K, k, c.G * c.D, c.sinks, c.X0, c.D);
    take_rows(sink_V, v, c.G * c.V, c.sinks, c.X0, c.V);
  }
  int slot(long b) const { return b % (c.M + 1); }
  float* phi(long b, int h) const { return features[slot(b) * c.p + h]; }
  int phi_head(int h) const { return c.p == 1 ? 0 : h; }

  // Takes key block b into its slot.
  void enter(long b) {
    const int rows = std::min<long>(C, c.keys(n) - b * C);
    const Rows k = c.of_key(c.k, n, g), v = c.of_key(c.v, n, g);
    take_rows(K[slot(b)], k[b * C], k.step, rows, C, c.D);
    take_rows(V[slot(b)], v[b * C], v.step, rows, C, c.V);
    for (int h = 0; h < c.p && c.F; h++) {
      const Rows from = c.of_key(c.phi_k, n, g * c.p + h);
      take_rows(phi(b, h), from[b * C], from.step, rows, C, c.F);
      const int gone = std::clamp<long>(sinks_end - b * C, 0, rows);
      std::memset(phi(b, h), 0, sizeof(float) * gone * c.F);
    }
  }
  int exact_from(int i) const { return C * c.M + i - c.window + 1; }
  int exact_to(int i) const { return C * c.M + i + 1; }
  // Keys, within key block b - d, of the queries [i, j).
  Range exact(int d, int i, int j) const {
    return within(d, exact_from(i), exact_to(j - 1));
  }
  Range older(int d, int, int j) const { return within(d, 0, exact_from(j - 1)); }
  Range either(int d, int i, int j) const {
    return c.F ? within(d, 0, exact_to(j - 1)) : exact(d, i, j);
  }
  Range within(int d, int from, int to) const {
    const int x = (c.M - d) * C;
    return {std::clamp(from - x, 0, C), std::clamp(to - x, 0, C)};
  }
  // Queries of the block that see the keys [i, j) of key block b - d.
  Range exact_rows(int d, int i, int j) const {
    return {std::max(m.first, i - C * d), std::min<int>(m.last, j - 1 - C * d + c.window)};
  }
  Range older_rows(int d, int i) const {
    return {std::max<int>(m.first, i - C * d + c.window), m.last};
  }
  Range either_rows(int d, int i, int j) const {
    return c.F ? Range{std::max(m.first, i - C * d), m.last} : exact_rows(d, i, j);
  }
  // The rows of key block b - d in a transposed matrix.
  float* of_block(float* turned, int d) const { return turned + (c.X0 + (c.M - d) * C) * C; }

  // The weights of query block b and head h of the group, and their sums, z's part included; with TOP
  // also the row of each query's largest score.
  template <bool TOP>
  void weigh(long b, int h, const float* z) {
    const int head = g * c.r + h;
    const long row0 = b * C - c.prefix;  // the token of row 0
    m.first = std::max(0L, -row0), m.last = std::min<long>(C, c.tokens[n] - row0);
    take_queries(t.q, t.q_t, c.of_query(c.q, n, head), row0, c.D, c.scale);
    if (c.F)
      take_queries(t.phi_q, t.phi_q_t, c.of_query(c.phi_q, n, head), row0, c.F,
                   c.lambda.data_ptr<float>()[head]);
    if (c.sinks) product(t.scores, C, {sink_K, c.D}, t.q_t, C, {0, c.X0}, only(m), all(c.D), false);
    for (int d = 0; d <= c.M && d <= b; d++) {
      product(of_block(t.scores, d), C, {K[slot(b - d)], c.D}, t.q_t, C, {0, C},
              [&](int i, int j) { return exact_rows(d, i, j); }, all(c.D), false);
      if (c.F)
        product(of_block(t.weights, d), C, {phi(b - d, phi_head(h)), c.F}, t.phi_q_t, C, {0, C},
                [&](int i, int) { return older_rows(d, i); }, all(c.F), false);
    }
    const int begin = c.X0 + std::max<long>(0, c.M - b) * C;
    absent = {begin, std::max<int>(begin, c.X0 + valid - (b - c.M) * C)};
    clear_absent(t.weights);
    const long left = c.length.data_ptr<int64_t>()[n] + row0 - c.window + 1;
    for (int i = m.first / 16 * 16; i < m.last; i += 16)
      weigh_strip<TOP>(i, std::clamp<long>(left + i, -16, c.sinks), c.gamma.data_ptr<float>()[head], z);
  }

  Strip strip(int i) const {
    const int diagonal = c.X0 + C * c.M + i, end = diagonal + 16;
    const int begin = absent.last, from = std::max<int>(begin, diagonal - c.window + 1);
    const int whole = std::max<int>(begin, end - c.window);
    if (whole > diagonal) return {begin, from, end, end, end};
    return {begin, from, whole, diagonal + 1, end};
  }
  // How far before the query lies what row x holds, for the queries [i, i + W).
  veci age(int i, int x) const { return lanes() + (c.X0 + C * c.M + i - x); }
  veci exact_at(int i, int x) const {
    const veci past = age(i, x);
    return past >= 0 & past < int(c.window);
  }
  void clear_absent(float* turned) const {
    std::fill_n(turned + absent.first * C, (absent.last - absent.first) * C, 0.0f);
  }

  // The queries of a head, as rows and transposed, with zeros where there are none.
  void take_queries(float* rows, float* turned, Rows from, long row0, int columns, float factor) {
    if (m.first || m.last < C) std::memset(rows, 0, sizeof(float) * C * columns);
    copy_rows(rows + m.first * columns, columns, from[row0 + m.first], from.step, m.last - m.first,
              columns, factor);
    transpose(turned, C, rows, columns, C, columns);
  }

 private:
  Range absent{0, 0};  // rows of the key blocks in view that are before the sequence

  static void take_rows(float* out, const float* in, long step, int rows, int room, int columns) {
    copy_rows(out, columns, in, step, rows, columns);
    std::memset(out + rows * columns, 0, sizeof(float) * (room - rows) * columns);
  }

  // Sixteen queries, of which the first sees `left` sinks, each of the others one more.
  template <bool TOP>
  void weigh_strip(int first, int left, float gamma, const float* z) {
    const Strip rows = strip(first);
    for (int i = first; i < first + 16; i += W, left += W) {
      const float* s = t.scores + i;
      float* w = t.weights + i;
      const veci sinks = lanes() + left;

      vec best = fill(NEGATIVE);
      veci where{};
      auto look = [&](int x, vec score) __attribute__((always_inline)) {
        if constexpr (TOP) where = score > best ? veci{} + x : where;
        best = score > best ? score : best;
      };
      auto look_at_some = [&](int from, int to) __attribute__((always_inline)) {
        for (int x = from; x < to; x++) look(x, exact_at(i, x) ? load(s + x * C) : fill(NEGATIVE));
      };
      for (int x = 0; x < c.sinks; x++) look(x, sinks > x ? load(s + x * C) : fill(NEGATIVE));
      look_at_some(rows.from, rows.whole);
      for (int x = rows.whole; x < rows.causal; x++) look(x, load(s + x * C));
      look_at_some(rows.causal, rows.end);
      if constexpr (TOP) std::memcpy(t.top + i, &where, sizeof where);

      vec total{};
      auto put = [&](int x, vec weight) __attribute__((always_inline)) {
        store(w + x * C, weight), total += weight;
      };
      auto weight = [&](int x) __attribute__((always_inline)) {
        return exp(load(s + x * C) - best) * gamma;
      };
      auto put_some = [&](int from, int to) __attribute__((always_inline)) {
        for (int x = from; x < to; x++) {
          const vec linear = c.F && x < rows.whole ? load(w + x * C) : vec{};
          put(x, exact_at(i, x) ? weight(x) : age(i, x) > 0 ? linear : vec{});
        }
      };
      for (int x = 0; x < c.sinks; x++) put(x, sinks > x ? weight(x) : vec{});
      for (int x = c.sinks; x < c.X0; x++) store(w + x * C, vec{});
      if (c.F)
        for (int x = rows.begin; x < rows.from; x++) total += load(w + x * C);
      else
        for (int x = rows.from / 16 * 16; x < rows.from; x++) store(w + x * C, vec{});
      put_some(rows.from, rows.whole);
      for (int x = rows.whole; x < rows.causal; x++) put(x, weight(x));
      put_some(rows.causal, rows.end);
      for (int f = 0; f < c.F; f++) total += load(t.phi_q_t + f * C + i) * z[f];
      store(t.den + i, total);
    }
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

// Works query block b of each head in turn, `next` being the block after it, or -1, while what comes
// after that arrives; `steps`: about as many sixteens of terms as the products of a block take.
template <class Head>
void each_in_turn(const std::vector<std::unique_ptr<Head>>& heads, long b, long next, int steps) {
  for (size_t h = 0; h < heads.size(); h++) {
    ahead->clear();
    if (h + 1 < heads.size())
      heads[h + 1]->announce(b);
    else if (next >= 0)
      heads[0]->announce(next);
    ahead->over(steps);
    heads[h]->queries(b);
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
