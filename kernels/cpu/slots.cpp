// Window-and-slots attention, a token at a time, in fp32; the formula is that of
// `lowline.kernels.slots.op`.
//
// One row of weights has the sinks that have left the window, its ring, and the slots; empty slots
// weigh 0.
//
// D, V, M: multiples of 16. Each key/value head has slots of its own.
#include "window_decode.h"

namespace lowline {
namespace {

// The tensors of a SlotState.
struct Slots : Window {
  int64_t* slot;
  float *keys, *values, *count;
  long M;

  explicit Slots(PyObject* tuple) : Window(tuple) {
    slot = at(2).data_ptr<int64_t>();
    keys = at(5).data_ptr<float>(), values = at(6).data_ptr<float>();
    count = at(7).data_ptr<float>(), M = at(7).size(2);
  }

  // The slot of the token that the one at `position` replaces in the ring, and whether it joins it.
  int64_t& oldest(long n, long g, long position) const {
    return slot[(n * w + position % w) * G + g];
  }
  bool leaves(long position) const { return position - w >= sinks; }

  // The token at `position` goes into the ring, the one it replaces into its slot.
  void push(long n, long g, long position, const float* k, const float* v, int64_t of_slot) const {
    int64_t& ring_slot = oldest(n, g, position);
    if (leaves(position)) {
      const long to = (n * G + g) * M + ring_slot;
      add(keys + to * D, ring_k(n, position % w, g), D);
      add(values + to * V, ring_v(n, position % w, g), V);
      count[to] += 1;
    }
    ring_slot = of_slot;
    keep(n, g, position, k, v);
  }

  // o = the output of query q, when the state has taken in `seen` tokens
  void read(float* o, const float* q, const float* bias, long n, long g, long seen, float scale,
            float* weights) const {
    const long ring = std::min(seen, w), first = std::min(sinks, seen - ring);
    const long exact = first + ring, columns = exact + M, head = (n * G + g) * M;
    for (long i = 0; i < first; i++) weights[i] = scale * dot(q, first_k(n, i, g), D);
    for (long i = 0; i < ring; i++) weights[first + i] = scale * dot(q, ring_k(n, i, g), D);
    for (long m = 0; m < M; m++) {
      const float tokens = count[head + m];
      weights[exact + m] =
          tokens ? scale * dot(q, keys + (head + m) * D, D) / tokens + bias[m] : NEGATIVE;
    }
    std::fill_n(weights + columns, W, NEGATIVE);
    float top = NEGATIVE;
    for (long i = 0; i < columns; i++) top = std::max(top, weights[i]);
    for (long i = 0; i < columns; i += W) store(weights + i, exp(load(weights + i) - top));
    float total = 0;
    for (long i = 0; i < exact; i++) total += weights[i];
    for (long m = 0; m < M; m++) total += weights[exact + m] * count[head + m];
    std::memset(o, 0, sizeof(float) * V);
    accumulate(o, V, weights, first, [&](long i) { return first_v(n, i, g); });
    accumulate(o, V, weights + first, ring, [&](long i) { return ring_v(n, i, g); });
    accumulate(o, V, weights + exact, M, [&](long m) { return values + (head + m) * V; });
    for (long j = 0; j < V; j += W) store(o + j, load(o + j) / total);
  }

 private:
  static void add(float* to, const float* x, long n) {
    for (long i = 0; i < n; i += W) store(to + i, load(to + i) + load(x + i));
  }
};

// step(q, k, v, slot, bias, state, scale, o): the token is taken in, then read
PyObject* step(PyObject* const* args, Py_ssize_t) {
  const Tokens q(tensor(args[0])), k(tensor(args[1])), v(tensor(args[2]));
  const int64_t* slot = tensor(args[3])->data_ptr<int64_t>();
  const float* bias = tensor(args[4])->data_ptr<float>();
  const Slots x(args[5]);
  const float scale = PyFloat_AsDouble(args[6]);
  const at::Tensor& o = *tensor(args[7]);
  float* out = o.data_ptr<float>();
  const long H = o.size(1), r = H / x.G;
  for (long i = 0; i < x.N * x.G; i++) {
    const long n = i / x.G, position = x.length[n];
    const int64_t oldest = x.leaves(position) ? x.oldest(n, i % x.G, position) : 0;
    for (int64_t m : {slot[i], oldest})
      if (m < 0 || m >= x.M)
        return PyErr_Format(PyExc_IndexError, "slot_window_step: slot %lld of %ld",
                            static_cast<long long>(m), x.M);
  }
  const int64_t grain = std::max<int64_t>(1, TASK / ((x.w + x.M) * (x.D + x.V)));
  at::parallel_for(0, x.N * x.G, grain, [&](int64_t first, int64_t last) {
    static thread_local Arena arena;
    FlushDenormals flush;
    arena.reset();
    float* weights = arena.take(x.sinks + x.w + x.M + W);
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G, position = x.length[n];
      x.push(n, g, position, k(n, 0, g), v(n, 0, g), slot[task]);
      for (long h = g * r; h < (g + 1) * r; h++)
        x.read(out + (n * H + h) * x.V, q(n, 0, h), bias + h * x.M, n, g, position + 1, scale,
               weights);
    }
  });
  for (long n = 0; n < x.N; n++) x.length[n]++;
  x.changed();
  Py_RETURN_NONE;
}

// nearest(k, centroids, slot): of each head's key k, (G, D), the centroid (G, M, D) nearest to it
PyObject* nearest(PyObject* const* args, Py_ssize_t) {
  const float *k = tensor(args[0])->data_ptr<float>(), *c = tensor(args[1])->data_ptr<float>();
  int64_t* slot = tensor(args[2])->data_ptr<int64_t>();
  const long G = tensor(args[1])->size(0), M = tensor(args[1])->size(1);
  const long D = tensor(args[1])->size(2);
  for (long g = 0; g < G; g++, k += D) {
    float most = -std::numeric_limits<float>::infinity();
    slot[g] = 0;
    for (long m = 0; m < M; m++, c += D) {
      const float near = dot(k, c, D) - dot(c, c, D) / 2;
      if (near > most) most = near, slot[g] = m;
    }
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"nearest", (PyCFunction)(void*)guarded<nearest>, METH_FASTCALL, nullptr},
                         {"step", (PyCFunction)(void*)guarded<step>, METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_slots", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_slots() { return PyModule_Create(&lowline::module); }
