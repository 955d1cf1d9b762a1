// One token of the gated recurrence, for one state head:
//
//     S <- e^g S + k vᵀ,  o = scale · Sᵀ q        with the delta rule v <- β (v - (e^g S)ᵀ k)
//
// A pass over the state, which is the time it takes: it is read and written once.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "pool.h"

namespace lowline {

// out[N vectors] = factor · Σ_i weights[i] · S[i], of rows ld apart; two rows at a time hide the
// latency
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

// a tensor as rows of float32 or bfloat16 side by side; `kept` holds the copy where one is needed
inline View rows_of(const at::Tensor& t, at::Tensor& kept) {
  const bool direct = (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16) &&
                      (t.dim() < 3 || t.stride(-1) == 1);
  if (direct) return View(t);
  kept = t.to(at::kFloat).contiguous();
  return View(kept);
}
inline bool named(PyObject* text, const char* name) {
  return PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, name) == 0;
}

// step(q, k, v, g, beta, state, gate, scale, rows) -> o, or None for a call it does not cover
inline PyObject* step(PyObject* const* args, Py_ssize_t count) {
  if (count != 8 && count != 9)
    throw std::invalid_argument("step takes q, k, v, g, beta, state, gate, scale, [rows]");
  for (int i : {0, 1, 2, 5})
    if (!plain(args[i])) Py_RETURN_NONE;
  for (int i : {3, 4})
    if (args[i] != Py_None && !plain(args[i])) Py_RETURN_NONE;
  const at::Tensor &q = *tensor(args[0]), &k = *tensor(args[1]), &v = *tensor(args[2]);
  const at::Tensor *g = tensor(args[3]), *beta = tensor(args[4]), &state = *tensor(args[5]);
  const auto type = q.scalar_type();
  if (q.dim() != 3 || k.dim() != 3 || v.dim() != 3 || state.dim() != 4) Py_RETURN_NONE;
  const long B = k.size(0), H = k.size(1), K = k.size(2), V = v.size(2), Q = q.size(1);
  const auto fits = [&](const at::Tensor& t, long heads, long features) {
    return t.size(0) == B && t.size(1) == heads && (t.dim() == 2 || t.size(2) == features);
  };
  const bool value_gate = named(args[6], "value"), by_value = value_gate && g && g->dim() == 3;
  const bool covered =
      (type == at::kFloat || type == at::kBFloat16) && k.scalar_type() == type &&
      v.scalar_type() == type && state.scalar_type() == at::kFloat && !state.requires_grad() &&
      K % 16 == 0 && V % 16 <= 1 && H > 0 && Q % H == 0 && fits(q, Q, K) && fits(v, H, V) &&
      state.size(1) == H && state.size(2) == K && state.size(3) == V &&
      (value_gate || named(args[6], "key")) &&
      (!g || (g->is_floating_point() && (g->dim() == 2 || g->dim() == 3) &&
              fits(*g, H, by_value ? V : K))) &&
      (!beta || (beta->is_floating_point() && beta->dim() == 2 && fits(*beta, H, 0))) &&
      !(by_value && (beta || V % 16));
  if (!covered) Py_RETURN_NONE;
  const Pages pages(count == 9 ? args[8] : Py_None, B, state.size(0));
  if (!pages.valid) Py_RETURN_NONE;
  const double scale = PyFloat_AsDouble(args[7]);
  if (scale == -1 && PyErr_Occurred()) return nullptr;

  at::Tensor kept[6];
  const View vq = rows_of(q, kept[0]), vk = rows_of(k, kept[1]), vv = rows_of(v, kept[2]);
  const View vg = g ? rows_of(*g, kept[3]) : View(), vb = beta ? rows_of(*beta, kept[4]) : View();
  const bool in_place = state.stride(3) == 1;
  if (!in_place) kept[5] = state.contiguous();
  const at::Tensor& memory = in_place ? state : kept[5];
  at::Tensor o = at::empty({B, Q, V}, q.options());
  float* const S = memory.data_ptr<float>();
  const long along[3] = {memory.stride(0), memory.stride(1), memory.stride(2)};
  const View vo(o);
  const long queries = Q / H;

  at::parallel_for(0, B * H, std::max(1L, (1L << 18) / std::max(1L, K * V)),
                   [&](int64_t begin, int64_t end) {
    static thread_local Arena arena;
    FlushDenormals flush;
    arena.reset();
    float *q_ = arena.take(queries * K), *k_ = arena.take(K), *v_ = arena.take(V + 15);
    float *rows = arena.take(K), *columns = arena.take(V + 15), *out = arena.take(queries * V + 15);
    float *scratch = arena.take(K + V + 15), beta_;
    std::fill_n(rows, K, 1.0f);
    // rows of floats where they lie, or widened into `room`
    auto read = [&](float* room, const View& view, long at, long stride, int count, int n) {
      if (!view.half) return (const float*)view.p + at;
      pack_rows(room, n, (const bf16*)view.p + at, stride, count, n, 1);
      return (const float*)room;
    };
    for (long task = begin; task < end; task++) {
      const long b = task / H, h = task % H;
      auto token = [&](float* room, const View& view, int n) {
        return read(room, view, b * view.batch + h * view.time, 0, 1, n);
      };
      if (g) {
        const int n = g->dim() == 2 ? 1 : by_value ? V : K;
        float* decays = by_value ? columns : rows;
        const float* logs = token(decays, vg, n);
        if (n == 1)
          std::fill_n(rows, K, exp(fill(*logs))[0]);
        else
          for (int d = 0; d < n; d += W) store(decays + d, exp(load(logs + d)));
      }
      StepHead head{(int)K, (int)V, (int)queries, S + pages[b] * along[0] + h * along[1], along[2]};
      head.q = read(q_, vq, b * vq.batch + h * queries * vq.time, vq.time, queries, K);
      head.q_ld = vq.half ? K : vq.time;
      head.k = token(k_, vk, K), head.v = token(v_, vv, V);
      head.rows = rows, head.columns = by_value ? columns : nullptr;
      head.delta = beta, head.beta = beta ? *token(&beta_, vb, 1) : 1;
      head.scale = scale, head.scratch = scratch;
      const long at = (b * Q + h * queries) * V;
      head.out = vo.half ? out : (float*)vo.p + at;
      head.run();
      if (vo.half) unpack_rows((bf16*)vo.p + at, V, out, V, queries, V, 1);
    }
  });
  if (!in_place) state.copy_(kept[5]);
  state.unsafeGetTensorImpl()->bump_version();
  return THPVariable_Wrap(o);
}

}  // namespace lowline
