// The backward pass of a sequence's heads, the last block of queries first.
#pragma once
#include "window_block.h"

namespace lowline {

struct Gradients {
  at::Tensor q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lambda, S;
};

// What the backward pass holds of each key block in view, beside `Block`.
struct KeyGradients {
  float *K, *Vt, *dK, *dV;
  std::vector<float*> phi, dphi;
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
      key.K = arena.take(C * c.D), key.Vt = arena.take(C * c.V);
      key.dK = arena.take(C * c.D), key.dV = arena.take(C * c.V);
      for (int h = 0; h < c.p; h++)
        key.phi.push_back(arena.take(C * c.F)), key.dphi.push_back(arena.take(C * c.F));
      keys.push_back(key);
    }
    sink_K = arena.take(c.X0 * c.D), sink_Vt = arena.take(c.X0 * c.V);
    dsink_K = arena.take(c.X0 * c.D), dsink_V = arena.take(c.X0 * c.V);
    start_sinks();
    for (int h = 0; h < c.p; h++) {
      dS.push_back(arena.take(c.F * (c.V + 1)));
      unpack_sum(dS[h], dz(h), c.state(to.S, n, g) + h * c.F * (c.V + 1), c.F, c.V);
    }
    const long blocks = c.blocks(n);
    for (long b = blocks - 1; b >= std::max(0L, blocks - 1 - c.M); b--)
      enter(b, rows_of_the_end(c, n, b));
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
  float *sink_K, *sink_Vt, *dsink_K, *dsink_V;

  float* dz(int h) const { return dS[h] + c.F * c.V; }

  void start_sinks() {
    if (!c.sinks) return;
    const long at = static_cast<long>(x.n) * c.sinks * c.G + x.g;
    std::memset(sink_K, 0, sizeof(float) * c.X0 * c.D);
    copy_rows(sink_K, c.D, c.sink_k.data_ptr<float>() + at * c.D, c.G * c.D, c.sinks, c.D);
    transpose_rows(sink_Vt, c.X0, c.sink_v.data_ptr<float>() + at * c.V, c.G * c.V, c.sinks, c.V);
    std::memset(dsink_K, 0, sizeof(float) * c.X0 * c.D);
    std::memset(dsink_V, 0, sizeof(float) * c.X0 * c.V);
  }

  // Takes key block b in, with what its first `rows` rows get through the sums after it.
  void enter(long b, int rows) {
    x.enter(b);
    const KeyGradients& key = keys[x.slot(b)];
    const int count = std::min<long>(C, c.keys(x.n) - b * C);
    const Rows k = c.of_key(c.k, x.n, x.g), v = c.of_key(c.v, x.n, x.g);
    copy_rows(key.K, c.D, k[b * C], k.step, count, c.D);
    transpose_rows(key.Vt, C, v[b * C], v.step, count, c.V);
    std::memset(key.dK, 0, sizeof(float) * C * c.D);
    std::memset(key.dV, 0, sizeof(float) * C * c.V);
    for (int h = 0; h < c.p && c.F; h++) {
      const Rows phi = c.of_key(c.phi_k, x.n, x.g * c.p + h);
      copy_rows(key.phi[h], c.F, phi[b * C], phi.step, count, c.F);
      const int gone = std::clamp<long>(x.sinks_end - b * C, 0, count);
      std::memset(key.phi[h], 0, sizeof(float) * gone * c.F);
      float* out = key.dphi[h];
      std::memset(out, 0, sizeof(float) * C * c.F);
      if (!rows) continue;
      transpose_rows(t.St, c.F, dS[h], c.V, c.F, c.V);
      for (int j = 0; j < rows; j++) std::memcpy(out + j * c.F, dz(h), sizeof(float) * c.F);
      product(out, c.F, {x.V[x.slot(b)], c.V}, t.St, c.F, {0, rows}, all(c.F), all(c.V), true);
      product(key.dV, c.V, {key.phi[h], c.F}, dS[h], c.V, {0, rows}, all(c.V), all(c.F), true);
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
    const Range m = x.m;
    const int M = std::min<long>(c.M, b);

    const Rows d_out = c.of_query(d_o, n, head);
    for (int i = m.first; i < m.last; i++)
      copy_rows(t.u + i * c.V, c.V, d_out[row0 + i], 0, 1, c.V, 1 / t.den[i]);
    for (int d = 0; d <= M; d++)
      product(t.dW + x.column(d), c.X, {t.u, c.V}, keys[x.slot(b - d)].Vt, C, m,
              [&](int i, int j) { return x.either(d, i, j); }, all(c.V), false);
    if (c.sinks) product(t.dW, c.X, {t.u, c.V}, sink_Vt, c.X0, m, all(c.X0), all(c.V), false);
    if (c.F) {
      transpose_rows(t.St, c.F, S, c.V, c.F, c.V);
      product(t.dphi, c.F, {t.u, c.V}, t.St, c.F, m, all(c.F), all(c.V), false);
    }
    for (int i = m.first; i < m.last; i++) gradient_row(i, M, h, head, z);

    for (int d = 0; d <= M; d++)
      product(t.dq, c.D, {t.ds + x.column(d), c.X}, keys[x.slot(b - d)].K, c.D, m, all(c.D),
              [&](int i, int j) { return x.exact(d, i, j); }, d > 0);
    if (c.sinks) product(t.dq, c.D, {t.ds, c.X}, sink_K, c.D, m, all(c.D), all(c.sinks), true);
    const Rows out_q = c.of_query(to.q, n, head);
    copy_rows(out_q[row0 + m.first], out_q.step, t.dq + m.first * c.D, c.D, m.last - m.first, c.D,
              c.scale);

    for (int d = 0; d <= M; d++) {
      const KeyGradients& key = keys[x.slot(b - d)];
      product(key.dK, c.D, {t.ds + x.column(d), c.X, true}, t.q, c.D, {0, C}, all(c.D),
              [&](int i, int j) { return x.exact_rows(d, i, j); }, true);
      product(key.dV, c.V, {t.weights + x.column(d), c.X, true}, t.u, c.V, {0, C}, all(c.V),
              [&](int i, int j) { return x.either_rows(d, i, j); }, true);
    }
    if (c.sinks) {
      product(dsink_K, c.D, {t.ds, c.X, true}, t.q, c.D, {0, c.sinks}, all(c.D), only(m), true);
      product(dsink_V, c.V, {t.weights, c.X, true}, t.u, c.V, {0, c.sinks}, all(c.V), only(m), true);
    }
    if (!c.F) return;

    for (int d = 0; d <= M; d++) {
      const KeyGradients& key = keys[x.slot(b - d)];
      product(t.dphi, c.F, {t.dlinear + x.column(d), c.X}, key.phi[ph], c.F, m, all(c.F),
              [&](int i, int j) { return x.older(d, i, j); }, true);
      product(key.dphi[ph], c.F, {t.dlinear + x.column(d), c.X, true}, t.phi_q, c.F, {0, C}, all(c.F),
              [&](int i, int) { return x.older_rows(d, i); }, true);
    }
    const Rows phi = c.of_query(c.phi_q, n, head), out = c.of_query(to.phi_q, n, head);
    const float lambda = c.lambda.data_ptr<float>()[head];
    for (int i = m.first; i < m.last; i++) {
      dlambda[h] += dot(phi[row0 + i], t.dphi + i * c.F, c.F);
      copy_rows(out[row0 + i], 0, t.dphi + i * c.F, 0, 1, c.F, lambda);
    }
    product(dS[ph], c.V, {t.phi_q + m.first * c.F, c.F, true}, t.u + m.first * c.V, c.V, {0, c.F},
            all(c.V), all(m.last - m.first), true);
    float* to_z = dz(ph);
    for (int i = m.first; i < m.last; i++)
      for (int f = 0; f < c.F; f += W)
        store(to_z + f, load(to_z + f) - load(t.phi_q + i * c.F + f) * t.delta[i]);
  }

  // Row i: δ, then ds (exact columns, with the arg max's share) and dlinear, zero elsewhere; and the
  // normaliser's part of d(λφq).
  void gradient_row(int i, int M, int h, int head, const float* z) {
    const float *w = t.weights + i * c.X, *p = t.dW + i * c.X;
    float *s = t.ds + i * c.X, *l = t.dlinear + i * c.X;
    const int begin = c.X0 + (c.M - M) * C;
    const int ea = c.X0 + x.exact_from(i), eb = c.X0 + x.exact_to(i);
    const int low = c.F ? begin : std::max(begin, ea / W * W);
    // Where W is zero dW may be unwritten.
    auto product_of = [&](int at) {
      const vec weight = load(w + at);
      return weight != 0 ? weight * load(p + at) : vec{};
    };
    vec total{};
    for (int at = 0; at < c.X0; at += W) total += product_of(at);
    for (int at = low; at < eb; at += W) total += product_of(at);
    float mean = sum(total);
    if (c.F) mean += dot(t.phi_q + i * c.F, t.dphi + i * c.F, c.F);
    mean /= t.den[i];
    t.delta[i] = mean;

    vec through{};
    for (int at = 0; at < c.X0; at += W) {
      const vec weight = load(w + at);
      const vec gradient = weight != 0 ? weight * (load(p + at) - mean) : vec{};
      store(s + at, gradient), through += gradient;
    }
    for (int at = begin; at < c.X; at += W) {
      const veci column = lanes() + at;
      const vec weight = load(w + at), error = load(p + at) - mean;
      const vec gradient = (column >= ea && column < eb && weight != 0) ? weight * error : vec{};
      store(s + at, gradient), through += gradient;
      if (c.F) store(l + at, column < ea ? error : vec{});
    }
    const float share = sum(through);
    s[t.top[i]] -= share;
    dgamma[h] += share / c.gamma.data_ptr<float>()[head];
    for (int f = 0; f < c.F; f += W)
      store(t.dphi + i * c.F + f, load(t.dphi + i * c.F + f) - load(z + f) * mean);
  }
};

void backward_heads(const Call& c, Arena& arena, int n, int first, int last, const at::Tensor& saved,
                    const at::Tensor& d_o, const Gradients& to) {
  Scratch scratch(c, arena);
  const auto heads = heads_of<Backward>(c, n, first, last, scratch, arena, saved, d_o, to);
  for (long b = c.blocks(n) - 1; b >= c.prefix / C && c.tokens[n]; b--)
    for (const auto& head : heads) head->queries(b);
  for (const auto& head : heads) head->finish();
}

}  // namespace lowline
