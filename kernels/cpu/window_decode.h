// Decoding: tokens enter the ring buffers of a state, and queries read it.
#pragma once
#include "window_block.h"

namespace lowline {

// The tensors of a WindowState: contiguous, changed in place.
struct State {
  float *k, *v, *phi, *sink_k, *sink_v, *S;
  int64_t* length;
  long N, w, G, D, V, P, F, sinks;

  State(const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& phi_k, const at::Tensor& sk,
        const at::Tensor& sv, const at::Tensor& S_, const at::Tensor& length_)
      : k(k_.data_ptr<float>()), v(v_.data_ptr<float>()), phi(phi_k.data_ptr<float>()),
        sink_k(sk.data_ptr<float>()), sink_v(sv.data_ptr<float>()), S(S_.data_ptr<float>()),
        length(length_.data_ptr<int64_t>()), N(k_.size(0)), w(k_.size(1)), G(k_.size(2)),
        D(k_.size(3)), V(v_.size(3)), P(phi_k.size(2)), F(phi_k.size(3)), sinks(sk.size(1)) {}
  float* ring_k(long n, long position, long g) const {
    return k + ((n * w + position % w) * G + g) * D;
  }
  float* ring_v(long n, long position, long g) const {
    return v + ((n * w + position % w) * G + g) * V;
  }
  float* ring_phi(long n, long position, long h) const {
    return phi + ((n * w + position % w) * P + h) * F;
  }
  float* sum(long n, long h) const { return S + (n * P + h) * F * (V + 1); }
};

// A block of new tokens, (B, T, heads, features), the last dimension dense.
struct Tokens {
  const float* at;
  long n, t, h;
  explicit Tokens(const at::Tensor& x)
      : at(x.data_ptr<float>()), n(x.stride(0)), t(x.stride(1)), h(x.stride(2)) {}
  const float* operator()(long b, long i, long head) const { return at + b * n + i * t + head * h; }
};

// The token at `position` of sequence n goes into the ring (head g), the one it replaces into S.
void push(const State& x, long n, long g, long position, const float* k, const float* v,
          const Tokens& phi, long i) {
  float *to_k = x.ring_k(n, position, g), *to_v = x.ring_v(n, position, g);
  const long p = x.P / x.G;
  for (long h = g * p; h < (g + 1) * p && x.F; h++) {
    float* to_phi = x.ring_phi(n, position, h);
    if (position - x.w >= x.sinks)
      for (long f = 0; f < x.F; f++) {
        float* S = x.sum(n, h) + f * (x.V + 1);
        for (long j = 0; j < x.V; j += W) store(S + j, load(S + j) + load(to_v + j) * to_phi[f]);
        S[x.V] += to_phi[f];
      }
    std::memcpy(to_phi, phi(n, i, h), sizeof(float) * x.F);
  }
  std::memcpy(to_k, k, sizeof(float) * x.D);
  std::memcpy(to_v, v, sizeof(float) * x.V);
  if (position < x.sinks) {
    std::memcpy(x.sink_k + ((n * x.sinks + position) * x.G + g) * x.D, k, sizeof(float) * x.D);
    std::memcpy(x.sink_v + ((n * x.sinks + position) * x.G + g) * x.V, v, sizeof(float) * x.V);
  }
}

// y[0, V) += Σ_i weight[i]·at(i)[0, V).
template <class At>
inline void accumulate(float* y, long V, const float* weight, long n, At at) {
  auto run = [&](auto count, long j) {
    constexpr int NV = decltype(count)::value;
    vec total[NV];
    for (int l = 0; l < NV; l++) total[l] = load(y + j + l * W);
    for (long i = 0; i < n; i++)
      for (int l = 0; l < NV; l++) total[l] += load(at(i) + j + l * W) * weight[i];
    for (int l = 0; l < NV; l++) store(y + j + l * W, total[l]);
  };
  long j = 0;
  for (; j + 4 * W <= V; j += 4 * W) run(std::integral_constant<int, 4>{}, j);
  for (; j < V; j += W) run(std::integral_constant<int, 1>{}, j);
}

// One query at position t, head h of sequence n, over the state and `fresh` tokens after it.
class Reader {
 public:
  Reader(const State& state, long most_fresh)
      : x(state), weights(state.sinks + state.w + most_fresh + W), y(state.V), phi_q(state.F) {}

  void read(float* o, const float* q, const float* phi, long n, long h, long r, long t, float gamma,
            float lambda, float scale, const Tokens& k, const Tokens& v, const Tokens& phi_k,
            long fresh) {
    const long g = h / r, ph = h * x.P / (x.G * r), seen = x.length[n];
    const long start = std::max(0L, seen - x.w), sinks = std::min(x.sinks, start);
    const long ring = seen - start, columns = sinks + ring + fresh;
    for (long f = 0; f < x.F; f++) phi_q[f] = lambda * phi[f];
    auto older = [&](long p) { return t - p >= x.w && p >= x.sinks; };
    float most = NEGATIVE;
    auto score = [&](long column, const float* key) {
      const float s = scale * dot(q, key, x.D);
      weights[column] = s;
      most = s > most || s != s ? s : most;
    };
    for (long i = 0; i < sinks; i++) score(i, x.sink_k + ((n * x.sinks + i) * x.G + g) * x.D);
    for (long i = 0; i < ring; i++)
      older(start + i) ? void(weights[sinks + i] = NEGATIVE)
                       : score(sinks + i, x.ring_k(n, start + i, g));
    for (long i = 0; i < fresh; i++)
      older(seen + i) ? void(weights[sinks + ring + i] = NEGATIVE)
                      : score(sinks + ring + i, k(n, i, g));
    std::fill_n(weights.begin() + columns, W, NEGATIVE);
    vec sums{};
    for (long i = 0; i < columns; i += W) {
      const vec e = exp(load(&weights[i]) - most) * gamma;
      store(&weights[i], e), sums += e;
    }
    float den = total_of(sums);
    for (long i = 0; i < ring && x.F && t - start - i >= x.w; i++)
      if (older(start + i))  // the ring may begin with sinks
        den += weights[sinks + i] = dot(phi_q.data(), x.ring_phi(n, start + i, ph), x.F);
    for (long i = 0; i < fresh && x.F && t - seen - i >= x.w; i++)
      if (older(seen + i))
        den += weights[sinks + ring + i] = dot(phi_q.data(), phi_k(n, i, ph), x.F);

    std::fill(y.begin(), y.end(), 0.0f);
    const float* S = x.sum(n, ph);
    accumulate(y.data(), x.V, weights.data(), sinks,
               [&](long i) { return x.sink_v + ((n * x.sinks + i) * x.G + g) * x.V; });
    accumulate(y.data(), x.V, &weights[sinks], ring,
               [&](long i) { return x.ring_v(n, start + i, g); });
    accumulate(y.data(), x.V, &weights[sinks + ring], fresh, [&](long i) { return v(n, i, g); });
    accumulate(y.data(), x.V, phi_q.data(), x.F, [&](long f) { return S + f * (x.V + 1); });
    for (long f = 0; f < x.F; f++) den += phi_q[f] * S[f * (x.V + 1) + x.V];
    copy_rows(o, 0, y.data(), 0, 1, x.V, 1 / den);
  }

 private:
  const State& x;
  std::vector<float> weights, y, phi_q;
};

}  // namespace lowline
