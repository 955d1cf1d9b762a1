// Window-plus-linear attention in fp32: forward, backward, and decoding from a state.
//
// Keys are worked in blocks of C = 64 rows. A block of 64 queries sees M + 1 key blocks, its own and
// the M before it, as one row of (M + 1)·64 columns; in row i the columns before exact_from(i) are
// linear and those up to exact_to(i) exact. Both bounds grow by one a row, so every product skips
// what lies outside its band. All blocks before those are in the sum S (F x V) and its normaliser
// z (F); sinks stand in columns of their own. chunk.py has the equations. The sums before each block
// of queries are all that the forward pass keeps for the backward pass.
//
// D, V, F: multiples of 16. H query heads, G key/value heads, P heads of phi(k) (G or H).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "window_backward.h"
#include "window_decode.h"

namespace lowline {

// ---- forward -----------------------------------------------------------------------------------

class Forward {
 public:
  Block x;
  static size_t floats(const Call& c) {
    return Block::floats(c) + c.p * (c.F * (c.V + 1) + 16);
  }
  Forward(const Call& call, Scratch& scratch, Memory& memory, int n, int g)
      : x(call, scratch, memory, n, g), c(call), t(scratch) {
    const float* from = c.state(c.S, n, g);
    for (int h = 0; h < c.p; h++) {
      S.push_back(memory.take(c.F * (c.V + 1)));
      unpack_sum(S[h], z(h), from + h * c.F * (c.V + 1), c.F, c.V);
    }
    const long first = c.prefix / C;
    for (long b = std::max(0L, first - c.M); b < first && c.tokens[n]; b++) x.enter(b);
  }

  // Query block b; the first comes first.
  void queries(long b, const at::Tensor& o, const at::Tensor& saved) {
    const long first = c.prefix / C;
    if (b > first && b - 1 - c.M >= 0)
      for (int h = 0; h < c.p && c.F; h++) add(b - 1 - c.M, h, C);
    x.enter(b);
    for (int h = 0; h < c.p && saved.numel(); h++)
      std::memcpy(c.saved_sum(saved, x.n, b - first, x.g * c.p + h), S[h],
                  sizeof(float) * c.F * (c.V + 1));
    for (int h = 0; h < c.r; h++) {
      const int ph = x.phi_head(h);
      x.weigh<false>(b, h, z(ph));
      for (int d = 0; d <= c.M && d <= b; d++)
        product(t.y, c.V, t.weights + x.column(d), c.X, 1, x.V[x.slot(b - d)], c.V, x.m, all(c.V),
                [&](int i, int j) { return x.either(d, i, j); }, d > 0);
      if (c.sinks)
        product(t.y, c.V, t.weights, c.X, 1, x.sink_V, c.V, x.m, all(c.V), all(c.sinks), true);
      if (c.F) product(t.y, c.V, t.phi_q, c.F, 1, S[ph], c.V, x.m, all(c.V), all(c.F), true);
      const Rows out = c.of_query(o, x.n, x.g * c.r + h);
      for (int i = x.m.first; i < x.m.last; i++)
        copy_rows(out[b * C - c.prefix + i], 0, t.y + i * c.V, 0, 1, c.V, 1 / t.den[i]);
    }
  }

  // The sum after the last token.
  void finish(const at::Tensor& S_out) {
    const long blocks = c.blocks(x.n);
    for (int h = 0; h < c.p; h++) {
      for (long b = std::max(0L, blocks - 1 - c.M); b < blocks && c.F; b++)
        if (const int rows = rows_of_the_end(c, x.n, b)) add(b, h, rows);
      pack_sum(c.state(S_out, x.n, x.g) + h * c.F * (c.V + 1), S[h], z(h), c.F, c.V);
    }
  }

 private:
  const Call& c;
  Scratch& t;
  std::vector<float*> S;

  float* z(int h) const { return S[h] + c.F * c.V; }
  // Adds the first `rows` rows of key block b to the sum of head h.
  void add(long b, int h, int rows) {
    const float* phi_t = x.phi_t(b, h);
    product(S[h], c.V, phi_t, C, 1, x.V[x.slot(b)], c.V, {0, c.F}, all(c.V), all(rows), true);
    for (int f = 0; f < c.F; f++) {
      float total = 0;
      if (rows == C) {
        vec lanes{};
        for (int j = 0; j < C; j += W) lanes += load(phi_t + f * C + j);
        total = total_of(lanes);
      } else {
        for (int j = 0; j < rows; j++) total += phi_t[f * C + j];
      }
      z(h)[f] += total;
    }
  }
};

void forward_heads(const Call& c, int n, int first, int last, const at::Tensor& o,
                   const at::Tensor& S_out, const at::Tensor& saved) {
  Memory memory(Scratch::floats(c) + (last - first) * Forward::floats(c));
  Scratch scratch(c, memory);
  const auto heads = heads_of<Forward>(c, n, first, last, scratch, memory);
  const long end = c.tokens[n] ? c.blocks(n) : 0;
  for (long b = c.prefix / C; b < end; b++)
    for (const auto& head : heads) head->queries(b, o, saved);
  for (const auto& head : heads) head->finish(S_out);
}

// ---- entry points ------------------------------------------------------------------------------

#define LOWLINE_CALL                                                                            \
  at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor phi_q, at::Tensor phi_k, at::Tensor sink_k, \
      at::Tensor sink_v, at::Tensor gamma, at::Tensor lambda, at::Tensor S, at::Tensor length,     \
      std::optional<at::Tensor> cu, int64_t window, int64_t prefix, double scale
#define LOWLINE_CALL_NAMES \
  q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lambda, S, length, cu, window, prefix, scale

// Asks for large pages, before they are first touched: most of the time in fresh memory goes to page
// faults and address translation.
void use_large_pages(const at::Tensor& x) {
#if defined(__linux__)
  constexpr size_t PAGE = 1 << 21;
  const size_t from = (reinterpret_cast<size_t>(x.data_ptr()) + PAGE - 1) / PAGE * PAGE;
  const size_t to = (reinterpret_cast<size_t>(x.data_ptr()) + x.nbytes()) / PAGE * PAGE;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// Writes o, S_out and, unless it is empty, saved: the sums before each block of queries.
void forward(LOWLINE_CALL, at::Tensor o, at::Tensor S_out, at::Tensor saved) {
  const Call c(LOWLINE_CALL_NAMES);
  use_large_pages(o), use_large_pages(saved);
  c.each(Forward::floats(c), [&](int n, int first, int last) {
    forward_heads(c, n, first, last, o, S_out, saved);
  });
}

// Writes every gradient; dS comes in as that of S_out. dgamma and dlambda: (N, H).
void backward(LOWLINE_CALL, at::Tensor saved, at::Tensor d_o, std::vector<at::Tensor> to) {
  const Call c(LOWLINE_CALL_NAMES);
  const Gradients grads{to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], to[8], to[9]};
  for (int i = 0; i < 5; i++) use_large_pages(to[i]);
  c.each(Backward::floats(c), [&](int n, int first, int last) {
    backward_heads(c, n, first, last, saved, d_o, grads);
  });
}

#define LOWLINE_STATE                                                                             \
  at::Tensor ring_k, at::Tensor ring_v, at::Tensor ring_phi, at::Tensor sink_k, at::Tensor sink_v, \
      at::Tensor S, at::Tensor length
#define LOWLINE_STATE_NAMES ring_k, ring_v, ring_phi, sink_k, sink_v, S, length

constexpr int64_t TASK = 1 << 15;  // floats of state that are worth a thread

// The outputs of a block of tokens, into o (B, T, H, V). With push_first (T = 1) the token enters
// the state before it is read, else the state stays.
void decode(at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor phi_q, at::Tensor phi_k,
            LOWLINE_STATE, at::Tensor gamma, at::Tensor lambda, double scale, bool push_first,
            at::Tensor o) {
  const State x(LOWLINE_STATE_NAMES);
  const Tokens tq(q), tk(k), tv(v), tpq(phi_q), tpk(phi_k);
  const long T = q.size(1), H = q.size(2), r = H / x.G;
  const float *gammas = gamma.data_ptr<float>(), *lambdas = lambda.data_ptr<float>();
  float* out = o.data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, TASK / (x.w * (x.D + x.V) + x.F * x.V + 1));
  if (push_first)
    for (long n = 0; n < x.N; n++) x.length[n]++;
  at::parallel_for(0, x.N * x.G, grain, [&](int64_t first, int64_t last) {
    Reader reader(x, T);
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G, seen = x.length[n];
      if (push_first) push(x, n, g, seen - 1, tk(n, 0, g), tv(n, 0, g), tpk, 0);
      for (long i = 0; i < T; i++)
        for (long h = g * r; h < (g + 1) * r; h++)
          reader.read(out + ((n * T + i) * H + h) * x.V, tq(n, i, h), tpq(n, i, h), n, h, r,
                      push_first ? seen - 1 : seen + i, gammas[h], lambdas[h],
                      static_cast<float>(scale), tk, tv, tpk, push_first ? 0 : i + 1);
    }
  });
}

// Sequence n takes in its first accepted[n] tokens of the block.
void advance(at::Tensor k, at::Tensor v, at::Tensor phi_k, LOWLINE_STATE, at::Tensor accepted) {
  const State x(LOWLINE_STATE_NAMES);
  const Tokens tk(k), tv(v), tpk(phi_k);
  const int64_t* count = accepted.data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, TASK / (x.F * x.V + x.D + x.V));
  at::parallel_for(0, x.N * x.G, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G;
      for (long i = 0; i < count[n]; i++)
        push(x, n, g, x.length[n] + i, tk(n, i, g), tv(n, i, g), tpk, i);
    }
  });
  for (long n = 0; n < x.N; n++) x.length[n] += count[n];
}

}  // namespace lowline

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &lowline::forward, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("backward", &lowline::backward, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("decode", &lowline::decode);
  m.def("advance", &lowline::advance);
}
