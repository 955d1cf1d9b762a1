// The backward pass of a sequence's heads, the last block of queries first.
#pragma once
#include "window_block.h"

namespace lowline {

struct Gradients {
  at::Tensor q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lambda, S;
};

// What the backward pass holds of each key block in view, beside `Block`.
struct KeyGradients {
  float *dK, *dV;
  std::vector<float*> dphi;
};

class Backward {
 public:
  Block x;
  Backward(const Call& call, Scratch& scratch, Arena& arena, const at::Tensor& sums,
           const at::Tensor& dout, const Gradients& grads, int n, int g)
      : x(call, scratch, arena, n, g), c(call), t(scratch), saved(sums), d_o(dout), to(grads),
        dgamma(call.r), dlambda(call.r) {
    for (int s = 0; s <= c.M; s++) {
      KeyGradients key;
      key.dK = arena.take(C * c.D), key.dV = arena.take(C * c.V);
      for (int h = 0; h < c.p; h++) key.dphi.push_back(arena.take(C * c.F));
      keys.push_back(key);
    }
    dsink_K = arena.take(c.X0 * c.D), dsink_V = arena.take(c.X0 * c.V);
    std::memset(dsink_K, 0, sizeof(float) * c.X0 * c.D);
    std::memset(dsink_V, 0, sizeof(float) * c.X0 * c.V);
    for (int h = 0; h < c.p; h++) {
      dS.push_back(arena.take(c.F * (c.V + 1)));
      unpack_sum(dS[h], dz(h), c.state(to.S, n, g) + h * c.F * (c.V + 1), c.F, c.V);
    }
    const long blocks = c.blocks(n);
    for (long b = blocks - 1; b >= std::max(0L, blocks - 1 - c.M); b--)
      enter(b, rows_of_the_end(c, n, b));
  }

  // What `queries` will touch.
  void announce(long b) const {
    const int n = x.n, g = x.g;
    c.want_queries(c.q, n, g, b, c.D), c.want_queries(to.q, n, g, b, c.D);
    c.want_queries(d_o, n, g, b, c.V);
    c.want_keys(to.k, n, g, b, c.D), c.want_keys(to.v, n, g, b, c.V);
    const long entering = b - 1 - c.M;
    if (entering >= 0) c.want_keys(c.k, n, g, entering, c.D), c.want_keys(c.v, n, g, entering, c.V);
    if (!c.F) return;
    c.want_queries(c.phi_q, n, g, b, c.F), c.want_queries(to.phi_q, n, g, b, c.F);
    c.want_features(to.phi_k, n, g, b);
    if (entering >= 0) c.want_features(c.phi_k, n, g, entering);
    const size_t sums = sizeof(float) * c.p * c.F * (c.V + 1);
    ahead->want(c.saved_sum(saved, n, b - c.prefix / C, g * c.p), 0, 1, sums);
  }

  // Query block b; the last comes first.
  void queries(long b) {
    for (int h = 0; h < c.r; h++) queries_of(b, h);
    leave(b);
    if (b > c.prefix / C && b - 1 - c.M >= 0) enter(b - 1 - c.M, C);
  }

  void finish() {
    const long rest = c.tokens[x.n] ? c.prefix / C : c.blocks(x.n);
    for (long b = rest - 1; b >= 0; b--) leave(b);
    for (int h = 0; h < c.p; h++)
      pack_sum(c.state(to.S, x.n, x.g) + h * c.F * (c.V + 1), dS[h], dz(h), c.F, c.V);
    for (int h = 0; h < c.r; h++) {
      to.gamma.data_ptr<float>()[x.n * c.H + x.g * c.r + h] = dgamma[h];
      to.lambda.data_ptr<float>()[x.n * c.H + x.g * c.r + h] = dlambda[h];
    }
    const long sink = static_cast<long>(x.n) * c.sinks * c.G + x.g;
    copy_rows(to.sink_k.data_ptr<float>() + sink * c.D, c.G * c.D, dsink_K, c.D, c.sinks, c.D);
    copy_rows(to.sink_v.data_ptr<float>() + sink * c.V, c.G * c.V, dsink_V, c.V, c.sinks, c.V);
  }

 private:
  const Call& c;
  Scratch& t;
  const at::Tensor &saved, &d_o;
  const Gradients& to;
  std::vector<KeyGradients> keys;
  std::vector<float*> dS;
  std::vector<double> dgamma, dlambda;
  float *dsink_K, *dsink_V;

  float* dz(int h) const { return dS[h] + c.F * c.V; }

  // Takes key block b in, with what its first `rows` rows get through the sums after it.
  void enter(long b, int rows) {
    x.enter(b);
    const KeyGradients& key = keys[x.slot(b)];
    std::memset(key.dK, 0, sizeof(float) * C * c.D);
    std::memset(key.dV, 0, sizeof(float) * C * c.V);
    for (int h = 0; h < c.p && c.F; h++) {
      float* out = key.dphi[h];
      std::memset(out, 0, sizeof(float) * C * c.F);
      if (!rows) continue;
      transpose(t.dS_t, c.F, dS[h], c.V, c.F, c.V);
      for (int j = 0; j < rows; j++) std::memcpy(out + j * c.F, dz(h), sizeof(float) * c.F);
      product(out, c.F, {x.V[x.slot(b)], c.V}, t.dS_t, c.F, {0, rows}, all(c.F), all(c.V), true);
      product(key.dV, c.V, {x.phi(b, h), c.F}, dS[h], c.V, {0, rows}, all(c.V), all(c.F), true);
    }
  }

  void leave(long b) {
    const KeyGradients& key = keys[x.slot(b)];
    const int count = std::min<long>(C, c.keys(x.n) - b * C);
    const Rows k = c.of_key(to.k, x.n, x.g), v = c.of_key(to.v, x.n, x.g);
    copy_rows(k[b * C], k.step, key.dK, c.D, count, c.D);
    copy_rows(v[b * C], v.step, key.dV, c.V, count, c.V);
    const int gone = std::clamp<long>(x.sinks_end - b * C, 0, count);
    for (int h = 0; h < c.p && c.F; h++) {
      std::memset(key.dphi[h], 0, sizeof(float) * gone * c.F);
      const Rows phi = c.of_key(to.phi_k, x.n, x.g * c.p + h);
      copy_rows(phi[b * C], phi.step, key.dphi[h], c.F, count, c.F);
    }
  }

  // Query block b and head h of the group: all its gradients, and its part in dS.
  void queries_of(long b, int h) {
    const int n = x.n, head = x.g * c.r + h, ph = x.phi_head(h);
    const long row0 = b * C - c.prefix;
    const float* S = c.F ? c.saved_sum(saved, n, b - c.prefix / C, x.g * c.p + ph) : nullptr;
    const float* z = S + c.F * c.V;
    x.weigh<true>(b, h, z);
    const Range m = x.m, sinks{0, c.sinks};
    const int M = std::min<long>(c.M, b);

    const Rows d_out = c.of_query(d_o, n, head);
    if (m.first || m.last < C) std::memset(t.u, 0, sizeof(float) * C * c.V);
    for (int i = m.first; i < m.last; i++)
      copy_rows(t.u + i * c.V, c.V, d_out[row0 + i], 0, 1, c.V, 1 / t.den[i]);
    transpose(t.u_t, C, t.u, c.V, C, c.V);
    for (int d = 0; d <= M; d++)
      product(x.of_block(t.dW, d), C, {x.V[x.slot(b - d)], c.V}, t.u_t, C, {0, C},
              [&](int i, int j) { return x.either_rows(d, i, j); }, all(c.V), false);
    if (c.sinks) product(t.dW, C, {x.sink_V, c.V}, t.u_t, C, {0, c.X0}, only(m), all(c.V), false);
    if (c.F) product(t.dphi_t, C, {S, c.V}, t.u_t, C, {0, c.F}, only(m), all(c.V), false);
    x.clear_absent(t.ds), x.clear_absent(t.dlinear);
    vec through{};
    for (int i = m.first / 16 * 16; i < m.last; i += 16) through += gradient_strip(i, z);
    dgamma[h] += sum(through) / c.gamma.data_ptr<float>()[head];

    for (int d = 0; d <= M; d++)
      product(t.dq, c.D, {x.of_block(t.ds, d), C, true}, x.K[x.slot(b - d)], c.D, m, all(c.D),
              [&](int i, int j) { return x.exact(d, i, j); }, d > 0);
    if (c.sinks) product(t.dq, c.D, {t.ds, C, true}, x.sink_K, c.D, m, all(c.D), all(c.sinks), true);
    const Rows out_q = c.of_query(to.q, n, head);
    copy_rows(out_q[row0 + m.first], out_q.step, t.dq + m.first * c.D, c.D, m.last - m.first, c.D,
              c.scale);

    for (int d = 0; d <= M; d++) {
      const KeyGradients& key = keys[x.slot(b - d)];
      product(key.dK, c.D, {x.of_block(t.ds, d), C}, t.q, c.D, {0, C}, all(c.D),
              [&](int i, int j) { return x.exact_rows(d, i, j); }, true);
      product(key.dV, c.V, {x.of_block(t.weights, d), C}, t.u, c.V, {0, C}, all(c.V),
              [&](int i, int j) { return x.either_rows(d, i, j); }, true);
    }
    if (c.sinks) {
      product(dsink_K, c.D, {t.ds, C}, t.q, c.D, sinks, all(c.D), only(m), true);
      product(dsink_V, c.V, {t.weights, C}, t.u, c.V, sinks, all(c.V), only(m), true);
    }
    if (!c.F) return;

    transpose(t.dphi, c.F, t.dphi_t, C, c.F, C);
    for (int d = 0; d <= M; d++) {
      product(t.dphi, c.F, {x.of_block(t.dlinear, d), C, true}, x.phi(b - d, ph), c.F, m, all(c.F),
              [&](int i, int j) { return x.older(d, i, j); }, true);
      product(keys[x.slot(b - d)].dphi[ph], c.F, {x.of_block(t.dlinear, d), C}, t.phi_q, c.F, {0, C},
              all(c.F), [&](int i, int) { return x.older_rows(d, i); }, true);
    }
    const Rows phi = c.of_query(c.phi_q, n, head), out = c.of_query(to.phi_q, n, head);
    const float lambda = c.lambda.data_ptr<float>()[head];
    vec along{};
    for (int i = m.first; i < m.last; i++)
      for (int f = 0; f < c.F; f += W) {
        const vec gradient = load(t.dphi + i * c.F + f);
        along += load(phi[row0 + i] + f) * gradient;
        store(out[row0 + i] + f, gradient * lambda);
      }
    dlambda[h] += sum(along);
    product(dS[ph], c.V, {t.phi_q_t, C}, t.u, c.V, {0, c.F}, all(c.V), only(m), true);
    for (int f = 0; f < c.F; f += W) {
      vec total = load(dz(ph) + f);
      for (int i = m.first; i < m.last; i++) total -= load(t.phi_q + i * c.F + f) * t.mean[i];
      store(dz(ph) + f, total);
    }
  }

  // Sixteen queries: δ, then ds (exact rows, with the arg max's share), dlinear, and the normaliser's
  // part of d(λφq). A product reads rows by sixteens: those that are not the strip's are zero. Returns
  // the sums of ds without the arg max's share.
  vec gradient_strip(int first, const float* z) {
    const Strip rows = x.strip(first);
    vec all_through{};
    for (int i = first; i < first + 16; i += W) {
      const float *w = t.weights + i, *dW = t.dW + i;
      float *ds = t.ds + i, *dl = t.dlinear + i;
      vec mean{};
      auto add = [&](int from, int to) __attribute__((always_inline)) {
        for (int at = from; at < to; at++) mean += load(w + at * C) * load(dW + at * C);
      };
      auto add_some = [&](int from, int to) __attribute__((always_inline)) {
        for (int at = from; at < to; at++) {  // where W is zero dW may be unwritten
          const vec weight = load(w + at * C);
          mean += weight != 0 ? weight * load(dW + at * C) : vec{};
        }
      };
      add(0, c.X0);
      if (c.F) add(rows.begin, rows.from);
      add_some(rows.from, rows.whole), add(rows.whole, rows.causal), add_some(rows.causal, rows.end);
      for (int f = 0; f < c.F; f++) mean += load(t.phi_q_t + f * C + i) * load(t.dphi_t + f * C + i);
      mean /= load(t.den + i);
      store(t.mean + i, mean);

      vec through{};
      auto put = [&](int at, vec gradient) __attribute__((always_inline)) {
        store(ds + at * C, gradient), through += gradient;
      };
      auto weighed = [&](int at) __attribute__((always_inline)) {
        return load(w + at * C) * (load(dW + at * C) - mean);
      };
      for (int at = 0; at < c.X0; at++) put(at, weighed(at));
      for (int at = rows.from / 16 * 16; at < rows.from; at++) store(ds + at * C, vec{});
      auto put_some = [&](int from, int to) __attribute__((always_inline)) {
        for (int at = from; at < to; at++) put(at, x.exact_at(i, at) ? weighed(at) : vec{});
      };
      put_some(rows.from, rows.whole);
      for (int at = rows.whole; at < rows.causal; at++) put(at, weighed(at));
      put_some(rows.causal, rows.end);
      for (int f = 0; f < c.F; f++) {
        float* gradient = t.dphi_t + f * C + i;
        store(gradient, load(gradient) - z[f] * mean);
      }
      if (c.F) {
        for (int at = rows.begin; at < rows.whole; at++)
          store(dl + at * C, x.age(i, at) >= int(c.window) ? load(dW + at * C) - mean : vec{});
        for (int at = rows.whole; at < (rows.whole + 15) / 16 * 16; at++) store(dl + at * C, vec{});
      }
      for (int l = 0; l < W; l++) ds[t.top[i + l] * C + l] -= through[l];
      const veci query = lanes() + i;
      all_through += (query >= x.m.first & query < x.m.last) ? through : vec{};
    }
    return all_through;
  }
};

void backward_heads(const Call& c, Arena& arena, int n, int first, int last, const at::Tensor& saved,
                    const at::Tensor& d_o, const Gradients& to) {
  Scratch scratch(c, arena);
  const auto heads = heads_of<Backward>(c, n, first, last, scratch, arena, saved, d_o, to);
  const long first_block = c.prefix / C;
  for (long b = c.blocks(n) - 1; b >= first_block && c.tokens[n]; b--)
    each_in_turn(heads, b, b > first_block ? b - 1 : -1, 450);
  for (const auto& head : heads) head->finish();
}

}  // namespace lowline
