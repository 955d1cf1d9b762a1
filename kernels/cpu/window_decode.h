// Decoding: tokens enter the ring buffers of a state, and queries read it.
#pragma once
#include <ATen/ops/empty.h>

#include "pool.h"
#include "window_block.h"

namespace lowline {

constexpr int64_t TASK = 1 << 15;  // floats of state that are worth a thread

inline void narrow_row(float* to, const float* x, long n) { std::memcpy(to, x, sizeof(float) * n); }
inline void narrow_row(bf16* to, const float* x, long n) {
  for (long i = 0; i < n; i += W) store(to + i, load(x + i));
}

// The window of a pool of states, a tuple of tensors that begins with the rings of keys and values,
// of type T, and has the sinks' at 3 and 4, the lengths last: changed in place.
template <class T> struct Window {
  PyObject* tensors;
  Paged<T> k, v, sink_k, sink_v;
  Paged<int64_t> lengths;
  long w, G, D, V, sinks;

  explicit Window(PyObject* tuple)
      : tensors(tuple), k(at(0)), v(at(1)), sink_k(at(3)), sink_v(at(4)),
        lengths(at(PyTuple_GET_SIZE(tuple) - 1)) {
    w = at(0).size(1), G = at(0).size(2), D = at(0).size(3);
    V = at(1).size(3), sinks = at(3).size(1);
  }
  const at::Tensor& at(int i) const { return *tensor(PyTuple_GET_ITEM(tensors, i)); }
  void changed() const {  // autograd counts versions
    for (int i = 0; i < PyTuple_GET_SIZE(tensors); i++)
      at(i).unsafeGetTensorImpl()->bump_version();
  }

  int64_t& length(long page) const { return *lengths[page]; }
  T* ring_k(long page, long slot, long g) const { return k[page] + (slot * G + g) * D; }
  T* ring_v(long page, long slot, long g) const { return v[page] + (slot * G + g) * V; }
  T* first_k(long page, long i, long g) const { return sink_k[page] + (i * G + g) * D; }
  T* first_v(long page, long i, long g) const { return sink_v[page] + (i * G + g) * V; }

  // The token at `position` of a page's sequence, head g, takes its place.
  void keep(long page, long g, long position, const float* new_k, const float* new_v) const {
    narrow_row(ring_k(page, position % w, g), new_k, D);
    narrow_row(ring_v(page, position % w, g), new_v, V);
    if (position < sinks) {
      narrow_row(first_k(page, position, g), new_k, D);
      narrow_row(first_v(page, position, g), new_v, V);
    }
  }
};

// The tensors of a WindowState.
template <class T> struct State : Window<T> {
  Paged<T> phi;
  Paged<float> S;
  long P, F;

  explicit State(PyObject* tuple) : Window<T>(tuple), phi(this->at(2)), S(this->at(5)) {
    P = this->at(2).size(2), F = this->at(2).size(3);
  }
  T* ring_phi(long page, long slot, long h) const { return phi[page] + (slot * P + h) * F; }
  float* sum(long page, long h) const { return S[page] + h * F * (this->V + 1); }
};

// New tokens, (B, T, heads, features) or one of each sequence, (B, heads, features); features lie
// side by side. Those in bfloat16 are widened.
struct Tokens {
  at::Tensor wide;
  const float* at = nullptr;
  long n = 0, t = 0, h = 0;

  explicit Tokens(const at::Tensor* x) {
    if (!x) return;
    if (x->scalar_type() == at::kBFloat16) wide = x->to(at::kFloat), x = &wide;
    at = x->data_ptr<float>(), n = x->stride(0), h = x->stride(x->dim() - 2);
    if (x->dim() == 4) t = x->stride(1);
  }
  const float* operator()(long b, long i, long head) const { return at + b * n + i * t + head * h; }
};
struct NewTokens {
  Tokens k, v, phi;
};

// The token at `position` goes into a page's ring (head g), the one it replaces into S: token i of
// sequence n.
template <class T>
inline void push(const State<T>& x, long page, long g, long position, const NewTokens& token,
                 long n, long i) {
  const long slot = position % x.w, p = x.P / x.G;
  const T* left = x.ring_v(page, slot, g);
  for (long h = g * p; h < (g + 1) * p && x.F; h++) {
    T* to_phi = x.ring_phi(page, slot, h);
    if (position - x.w >= x.sinks)
      for (long f = 0; f < x.F; f++) {
        float *S = x.sum(page, h) + f * (x.V + 1), phi = widen(to_phi[f]);
        for (long j = 0; j < x.V; j += W) store(S + j, load(S + j) + load(left + j) * phi);
        S[x.V] += phi;
      }
    narrow_row(to_phi, token.phi(n, i, h), x.F);
  }
  x.keep(page, g, position, token.k(n, i, g), token.v(n, i, g));
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

struct Query {
  const float *q, *phi;
  long n, page, head, position;
  float gamma, lambda, scale;
};

// Reads a state, and some new tokens behind it, with one query at a time.
template <class T> class Reader {
 public:
  Reader(const State<T>& state, Arena& arena, long most_fresh) : x(state) {
    weights = arena.take(x.sinks + x.w + most_fresh + W);
    y = arena.take(x.V), phi_q = arena.take(x.F);
  }

  // The state has taken in `seen` tokens. The columns are the sinks that have left its ring, the
  // ring's slots as they lie, and the first `fresh` new tokens.
  void read(float* o, const Query& query, const NewTokens& token, long r, long seen, long fresh) {
    const long n = query.n, page = query.page, g = query.head / r, ph = query.head * x.P / (x.G * r);
    const long ring = std::min(seen, x.w), turn = seen % x.w;
    const long sinks = std::min(x.sinks, seen - ring), columns = sinks + ring + fresh;
    auto position = [&](long slot) { return seen - turn + slot - (slot < turn ? 0 : x.w); };
    auto older = [&](long p) { return query.position - p >= x.w && p >= x.sinks; };

    float *on_ring = weights + sinks, *on_fresh = on_ring + ring;
    for (long i = 0; i < sinks; i++) weights[i] = dot(query.q, x.first_k(page, i, g), x.D);
    for (long i = 0; i < ring; i++) on_ring[i] = dot(query.q, x.ring_k(page, i, g), x.D);
    for (long i = 0; i < fresh; i++) on_fresh[i] = dot(query.q, token.k(n, i, g), x.D);
    auto each_older = [&](auto set) {  // without new tokens the window holds the ring
      for (long i = 0; i < ring && fresh; i++)
        if (older(position(i))) on_ring[i] = set(x.ring_phi(page, i, ph));
      for (long i = 0; i < fresh; i++)
        if (older(seen + i)) on_fresh[i] = set(token.phi(n, i, ph));
    };
    std::fill_n(weights + columns, W, NEGATIVE);
    each_older([](const auto*) { return NEGATIVE; });
    vec top = fill(NEGATIVE), sums{};
    for (long i = 0; i < columns; i += W) {
      const vec s = load(weights + i) * query.scale;
      store(weights + i, s), top = s > top ? s : top;
    }
    for (int half = W / 2; half; half /= 2) {
      const vec other = exchanged(top, half);
      top = other > top ? other : top;
    }
    for (long i = 0; i < columns; i += W) {
      const vec e = exp(load(weights + i) - top) * query.gamma;
      store(weights + i, e), sums += e;
    }
    float den = sum(sums);

    std::memset(y, 0, sizeof(float) * x.V);
    if (x.F) {
      for (long f = 0; f < x.F; f++) phi_q[f] = query.lambda * query.phi[f];
      each_older([&](const auto* phi) {
        const float weight = dot(phi_q, phi, x.F);
        den += weight;
        return weight;
      });
      const float* S = x.sum(page, ph);
      accumulate(y, x.V, phi_q, x.F, [&](long f) { return S + f * (x.V + 1); });
      for (long f = 0; f < x.F; f++) den += phi_q[f] * S[f * (x.V + 1) + x.V];
    }
    accumulate(y, x.V, weights, sinks, [&](long i) { return x.first_v(page, i, g); });
    accumulate(y, x.V, on_ring, ring, [&](long i) { return x.ring_v(page, i, g); });
    accumulate(y, x.V, on_fresh, fresh, [&](long i) { return token.v(n, i, g); });
    copy_rows(o, 0, y, 0, 1, x.V, 1 / den);
  }

 private:
  const State<T>& x;
  float *weights, *y, *phi_q;
};

// Whether `step` covers its arguments: they fit each other, the state and `rows`, in float32 or
// bfloat16, where they lie.
inline bool covers(PyObject* const* args) {
  const at::Tensor* t[5];
  for (int i = 0; i < 5; i++) {
    if (args[i] == Py_None && i > 2) {
      t[i] = nullptr;
      continue;
    }
    if (!plain(args[i])) return false;
    t[i] = tensor(args[i]);
    if (t[i]->scalar_type() != t[0]->scalar_type() || t[i]->dim() != 3) return false;
    if (t[i]->size(2) && t[i]->stride(2) != 1) return false;
  }
  const auto given = t[0]->scalar_type();
  if (given != at::kFloat && given != at::kBFloat16) return false;
  if (args[8] != Py_None && !PyFloat_Check(args[8])) return false;
  if (!t[3] != !t[4] || !PyTuple_Check(args[5]) || PyTuple_GET_SIZE(args[5]) != 7) return false;
  const at::Tensor* s[7];
  for (int i = 0; i < 7; i++) {
    if (!plain(PyTuple_GET_ITEM(args[5], i))) return false;
    s[i] = tensor(PyTuple_GET_ITEM(args[5], i));
    const auto type = i == 6 ? at::kLong : i == 5 ? at::kFloat : given;
    if (s[i]->scalar_type() != type || !has_whole_pages(*s[i])) return false;
    if (s[i]->dim() != (i == 6 ? 1 : 4)) return false;
  }
  const long N = t[1]->size(0), G = t[1]->size(1), D = t[1]->size(2), V = t[2]->size(2);
  const long H = t[0]->size(1), P = t[4] ? t[4]->size(1) : G, F = t[4] ? t[4]->size(2) : 0;
  const long w = s[0]->size(1), sinks = s[3]->size(1), pool = s[6]->size(0);
  if (!G || H % G || (P != G && P != H) || D % 16 || V % 16 || F % 16) return false;
  for (int i : {6, 7})  // factors of heads
    if (args[i] != Py_None) {
      if (!plain(args[i])) return false;
      const at::Tensor& factor = *tensor(args[i]);
      if (factor.scalar_type() != at::kFloat || !factor.is_contiguous() ||
          factor.sizes() != at::IntArrayRef{H})
        return false;
    }
  using Sizes = at::IntArrayRef;
  return t[0]->sizes() == Sizes{N, H, D} && t[2]->sizes() == Sizes{N, G, V} &&
         (!t[3] || t[3]->sizes() == Sizes{N, H, F}) && s[0]->sizes() == Sizes{pool, w, G, D} &&
         s[1]->sizes() == Sizes{pool, w, G, V} && s[2]->sizes() == Sizes{pool, w, P, F} &&
         s[3]->sizes() == Sizes{pool, sinks, G, D} && s[4]->sizes() == Sizes{pool, sinks, G, V} &&
         s[5]->sizes() == Sizes{pool, P, F, V + 1} &&
         Pages(args[9], N, pool).valid;
}

}  // namespace lowline
