// Window-plus-linear attention in fp32: forward, backward, and decoding from a state.
//
// Keys are processed in blocks of C = 64 rows. A block of 64 queries sees M + 1 key blocks, its own and
// the M before it, as one matrix of (M + 1)·64 keys; query i sees those before exact_from(i) as
// linear and those up to exact_to(i) as exact. Both bounds grow by one per query, so every product
// skips what lies outside its band. All blocks before those are in the sum S (F x V) and its
// normaliser z (F); sinks come before the keys. window/torch_form.py has the equations. The sums before each
// block of queries are all that the forward pass keeps for the backward pass. While a block is
// processed, the rows of the next one are prefetched.
//
// D, V, F: multiples of 16. H query heads, G key/value heads, P heads of phi(k) (G or H).
#include "window_backward.h"
#include "window_decode.h"

namespace lowline {
namespace {

// ---- forward -----------------------------------------------------------------------------------

class Forward {
 public:
  Block x;
  Forward(const Call& call, Scratch& scratch, Arena& arena, const at::Tensor& out,
          const at::Tensor& sums, int n, int g)
      : x(call, scratch, arena, n, g), c(call), t(scratch), o(out), saved(sums) {
    const float* from = c.state(c.S, n, g);
    for (int h = 0; h < c.p; h++) {
      S.push_back(arena.take(c.F * (c.V + 1)));
      unpack_sum(S[h], z(h), from + h * c.F * (c.V + 1), c.F, c.V);
    }
    const long first = c.prefix / C;
    for (long b = std::max(0L, first - c.M); b < first && c.tokens[n]; b++) x.enter(b);
  }

  // What `queries` will touch.
  void announce(long b) const {
    c.want_keys(c.k, x.n, x.g, b, c.D), c.want_keys(c.v, x.n, x.g, b, c.V);
    c.want_queries(c.q, x.n, x.g, b, c.D), c.want_queries(o, x.n, x.g, b, c.V);
    if (c.F) c.want_features(c.phi_k, x.n, x.g, b), c.want_queries(c.phi_q, x.n, x.g, b, c.F);
  }

  // Query block b; the first comes first.
  void queries(long b) {
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
        product(t.y, c.V, {x.of_block(t.weights, d), C, true}, x.V[x.slot(b - d)], c.V, x.m,
                all(c.V), [&](int i, int j) { return x.either(d, i, j); }, d > 0);
      if (c.sinks)
        product(t.y, c.V, {t.weights, C, true}, x.sink_V, c.V, x.m, all(c.V), all(c.sinks), true);
      if (c.F) product(t.y, c.V, {t.phi_q, c.F}, S[ph], c.V, x.m, all(c.V), all(c.F), true);
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
  const at::Tensor &o, &saved;
  std::vector<float*> S;

  float* z(int h) const { return S[h] + c.F * c.V; }
  // Adds the first `rows` rows of key block b to the sum of head h.
  void add(long b, int h, int rows) {
    const float* phi = x.phi(b, h);
    product(S[h], c.V, {phi, c.F, true}, x.V[x.slot(b)], c.V, {0, c.F}, all(c.V), all(rows), true);
    for (int f = 0; f < c.F; f += W) {
      vec total = load(z(h) + f);
      for (int j = 0; j < rows; j++) total += load(phi + j * c.F + f);
      store(z(h) + f, total);
    }
  }
};

// Heads whose blocks a thread works in turn: their rows are neighbours in memory.
constexpr int TOGETHER = 8;

void forward_heads(const Call& c, Arena& arena, int n, int first, int last, const at::Tensor& o,
                   const at::Tensor& S_out, const at::Tensor& saved) {
  Scratch scratch(c, arena);
  const auto heads = heads_of<Forward>(c, n, first, last, scratch, arena, o, saved);
  const long end = c.tokens[n] ? c.blocks(n) : 0;
  for (long b = c.prefix / C; b < end; b++)
    each_in_turn(heads, b, b + 1 < end ? b + 1 : -1, 200);
  for (const auto& head : heads) head->finish(S_out);
}

// ---- the module's functions ---------------------------------------------------------------------

constexpr int SHARED = 15;  // arguments of Call

// forward(*shared, o, S_out, saved): writes o, S_out and, unless it is empty, saved, the sums before
// each block of queries
PyObject* forward(PyObject* const* args, Py_ssize_t) {
  const Call c(args);
  const at::Tensor &o = *tensor(args[SHARED]), &S_out = *tensor(args[SHARED + 1]);
  const at::Tensor& saved = *tensor(args[SHARED + 2]);
  huge_pages(args[SHARED]), huge_pages(args[SHARED + 2]);
  {
    WithoutPython meanwhile;
    c.each(TOGETHER, [&](Arena& arena, int n, int first, int last) {
      forward_heads(c, arena, n, first, last, o, S_out, saved);
    });
  }
  Py_RETURN_NONE;
}

// backward(*shared, saved, d_o, *gradients): writes every gradient; dS comes in as that of S_out;
// dgamma and dlambda are (N, H)
PyObject* backward(PyObject* const* args, Py_ssize_t) {
  const Call c(args);
  const at::Tensor &saved = *tensor(args[SHARED]), &d_o = *tensor(args[SHARED + 1]);
  PyObject* const* to = args + SHARED + 2;
  auto at = [&](int i) { return *tensor(to[i]); };
  const Gradients grads{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  for (int i = 0; i < 5; i++) huge_pages(to[i]);
  {
    WithoutPython meanwhile;
    c.each(TOGETHER, [&](Arena& arena, int n, int first, int last) {
      backward_heads(c, arena, n, first, last, saved, d_o, grads);
    });
  }
  Py_RETURN_NONE;
}

// What step and verify share: q, k, v, phi_q, phi_k, state, gamma, lambda, scale, rows, and o of
// (B, T, H, V), or (B, H, V) for a token that enters the state before it is read.
template <class T> void decode_as(PyObject* const* args, const at::Tensor& o, bool enters) {
  const at::Tensor& q = *tensor(args[0]);
  const Tokens tq(&q), tpq(tensor(args[3]));
  const NewTokens token{Tokens(tensor(args[1])), Tokens(tensor(args[2])), Tokens(tensor(args[4]))};
  const State<T> x(args[5]);
  const long N = q.size(0), count = enters ? 1 : q.size(1), H = q.size(q.dim() - 2), r = H / x.G;
  const Pages pages(args[9], N, x.at(6).size(0));
  auto factor = [&](int i) {
    return args[i] == Py_None ? nullptr : tensor(args[i])->data_ptr<float>();
  };
  const float *gamma = factor(6), *lambda = factor(7);
  const float scale =
      args[8] == Py_None ? 1 / std::sqrt(float(x.D)) : float(PyFloat_AsDouble(args[8]));
  float* out = o.data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, TASK / (x.w * (x.D + x.V) + x.F * x.V + 1));
  at::parallel_for(0, N * x.G, grain, [&](int64_t first, int64_t last) {
    static thread_local Arena arena;
    FlushDenormals flush;
    arena.reset();
    Reader<T> reader(x, arena, count);
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G, page = pages[n], before = x.length(page);
      if (enters) push(x, page, g, before, token, n, 0);
      for (long i = 0; i < count; i++)
        for (long h = g * r; h < (g + 1) * r; h++) {
          const Query query{tq(n, i, h), tpq(n, i, h), n, page, h, before + i, gamma ? gamma[h] : 1,
                            lambda ? lambda[h] : 1, scale};
          reader.read(out + ((n * count + i) * H + h) * x.V, query, token, r,
                      enters ? before + 1 : before, enters ? 0 : i + 1);
        }
    }
  });
  if (enters) {
    for (long n = 0; n < N; n++) x.length(pages[n])++;
    x.changed();
  }
}
bool is_half(PyObject* x) { return tensor(x)->scalar_type() == at::kBFloat16; }
void decode(PyObject* const* args, const at::Tensor& o, bool enters) {
  is_half(args[1]) ? decode_as<bf16>(args, o, enters) : decode_as<float>(args, o, enters);
}

// step(q, k, v, phi_q, phi_k, state, gamma, lambda, scale, rows) -> o (B, H, V), the token taken
// in; or None, nothing done, for a call that it does not cover
PyObject* step(PyObject* const* args, Py_ssize_t) {
  if (!covers(args)) Py_RETURN_NONE;
  const at::Tensor &q = *tensor(args[0]), &v = *tensor(args[2]);
  const at::Tensor o = at::empty({q.size(0), q.size(1), v.size(2)}, q.options().dtype(at::kFloat));
  decode(args, o, true);
  return THPVariable_Wrap(o.to(q.scalar_type()));
}

// verify(q, k, v, phi_q, phi_k, state, gamma, lambda, scale, None, o): the outputs, in float32, of
// a block of tokens
PyObject* verify(PyObject* const* args, Py_ssize_t) {
  decode(args, *tensor(args[10]), false);
  Py_RETURN_NONE;
}

template <class T> void advance_as(PyObject* const* args) {
  const NewTokens token{Tokens(tensor(args[0])), Tokens(tensor(args[1])), Tokens(tensor(args[2]))};
  const State<T> x(args[3]);
  const int64_t* count = tensor(args[4])->data_ptr<int64_t>();
  const long N = x.at(6).size(0);
  const int64_t grain = std::max<int64_t>(1, TASK / (x.F * x.V + x.D + x.V));
  at::parallel_for(0, N * x.G, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G;
      for (long i = 0; i < count[n]; i++) push(x, n, g, x.length(n) + i, token, n, i);
    }
  });
  for (long n = 0; n < N; n++) x.length(n) += count[n];
  x.changed();
}

// advance(k, v, phi_k, state, accepted): sequence n takes in its first accepted[n] tokens
PyObject* advance(PyObject* const* args, Py_ssize_t) {
  is_half(args[0]) ? advance_as<bf16>(args) : advance_as<float>(args);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void*)guarded<forward>, METH_FASTCALL, nullptr},
    {"backward", (PyCFunction)(void*)guarded<backward>, METH_FASTCALL, nullptr},
    {"step", (PyCFunction)(void*)guarded<step>, METH_FASTCALL, nullptr},
    {"verify", (PyCFunction)(void*)guarded<verify>, METH_FASTCALL, nullptr},
    {"advance", (PyCFunction)(void*)guarded<advance>, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_window", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_window() { return PyModule_Create(&lowline::module); }
