// Window-and-slots attention, a token at a time, in fp32; the formula is that of
// `lowline.kernels.slots.op`.
//
// The state is a window's (window_decode.h), whose φ(k) are the tokens' shares of the slots and
// whose S are the slots' sums of [v, 1], beside the slots' sums of keys, (N, G, M, D). One row of
// weights has the sinks that have left the window, its ring, and the slots; empty slots weigh 0.
//
// D, V, M: multiples of 16. Each key/value head has slots of its own.
#include "window_decode.h"

namespace lowline {
namespace {

class SlotReader {
 public:
  SlotReader(const State& state, const float* keys, float empty, Arena& arena)
      : x(state), all_keys(keys), least(empty) {
    weights = arena.take(x.sinks + x.w + x.F + W);
  }

  // o = the output of query q of head h, when the state has taken in `seen` tokens
  void read(float* o, const float* q, const float* bias, long n, long g, long seen, float scale) {
    const long ring = std::min(seen, x.w), sinks = std::min(x.sinks, seen - ring);
    const long exact = sinks + ring, columns = exact + x.F;
    const float *S = x.sum(n, g), *keys = all_keys + (n * x.G + g) * x.F * x.D;
    for (long i = 0; i < sinks; i++) weights[i] = scale * dot(q, x.first_k(n, i, g), x.D);
    for (long i = 0; i < ring; i++) weights[sinks + i] = scale * dot(q, x.ring_k(n, i, g), x.D);
    auto count = [&](long m) { return S[m * (x.V + 1) + x.V]; };
    for (long m = 0; m < x.F; m++)
      weights[exact + m] = count(m) > least
                               ? scale * dot(q, keys + m * x.D, x.D) / count(m) + bias[m]
                               : NEGATIVE;
    std::fill_n(weights + columns, W, NEGATIVE);
    float top = NEGATIVE;
    for (long i = 0; i < columns; i++) top = std::max(top, weights[i]);
    for (long i = 0; i < columns; i += W) store(weights + i, exp(load(weights + i) - top));
    float total = 0;
    for (long i = 0; i < exact; i++) total += weights[i];
    for (long m = 0; m < x.F; m++) total += weights[exact + m] * count(m);
    std::memset(o, 0, sizeof(float) * x.V);
    accumulate(o, x.V, weights, sinks, [&](long i) { return x.first_v(n, i, g); });
    accumulate(o, x.V, weights + sinks, ring, [&](long i) { return x.ring_v(n, i, g); });
    accumulate(o, x.V, weights + exact, x.F, [&](long m) { return S + m * (x.V + 1); });
    for (long j = 0; j < x.V; j += W) store(o + j, load(o + j) / total);
  }

 private:
  const State& x;
  const float* all_keys;
  float least, *weights;
};

// step(q, k, v, r, bias, window state, keys, scale, empty, o): the token is taken in, then read
PyObject* step(PyObject* const* args, Py_ssize_t) {
  const Tokens q(tensor(args[0]));
  const NewTokens token{Tokens(tensor(args[1])), Tokens(tensor(args[2])), Tokens(tensor(args[3]))};
  const float* bias = tensor(args[4])->data_ptr<float>();
  const State x(args[5]);
  const at::Tensor &all_keys = *tensor(args[6]), &o = *tensor(args[9]);
  const float scale = PyFloat_AsDouble(args[7]), empty = PyFloat_AsDouble(args[8]);
  float *keys = all_keys.data_ptr<float>(), *out = o.data_ptr<float>();
  const long H = o.size(1), r = H / x.G;
  const int64_t grain = std::max<int64_t>(1, TASK / ((x.w + x.F) * (x.D + x.V)));
  at::parallel_for(0, x.N * x.G, grain, [&](int64_t first, int64_t last) {
    static thread_local Arena arena;
    FlushDenormals flush;
    arena.reset();
    SlotReader reader(x, keys, empty, arena);
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G, position = x.length[n];
      if (position - x.w >= x.sinks) {  // push has the rest of what leaves the window
        const long slot = position % x.w;
        const float *left = x.ring_k(n, slot, g), *r_left = x.ring_phi(n, slot, g);
        for (long m = 0; m < x.F; m++) {
          float* key = keys + (task * x.F + m) * x.D;
          for (long d = 0; d < x.D; d += W)
            store(key + d, load(key + d) + load(left + d) * r_left[m]);
        }
      }
      push(x, n, g, position, token, 0);
      for (long h = g * r; h < (g + 1) * r; h++)
        reader.read(out + (n * H + h) * x.V, q(n, 0, h), bias + h * x.F, n, g, position + 1, scale);
    }
  });
  for (long n = 0; n < x.N; n++) x.length[n]++;
  x.changed();
  all_keys.unsafeGetTensorImpl()->bump_version();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"step", (PyCFunction)(void*)guarded<step>, METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_slots", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_slots() { return PyModule_Create(&lowline::module); }
