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

// A token of each sequence is taken in, then read: out (N, H, V).
void advance(const Slots& x, const Tokens& q, const Tokens& k, const Tokens& v, const int64_t* slot,
             const float* bias, float scale, float* out, long H) {
  const long r = H / x.G;
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
}

// Whether all slots exist that the new token and those it replaces are in; else an error is set.
bool all_exist(const Slots& x, const int64_t* slot) {
  for (long i = 0; i < x.N * x.G; i++) {
    const long n = i / x.G, position = x.length[n];
    const int64_t oldest = x.leaves(position) ? x.oldest(n, i % x.G, position) : 0;
    for (int64_t m : {slot[i], oldest})
      if (m < 0 || m >= x.M) {
        PyErr_Format(PyExc_IndexError, "slot_window_step: slot %lld of %ld",
                     static_cast<long long>(m), x.M);
        return false;
      }
  }
  return true;
}

// step(q, k, v, slot, bias, state, scale, o)
PyObject* step(PyObject* const* args, Py_ssize_t) {
  const Tokens q(tensor(args[0])), k(tensor(args[1])), v(tensor(args[2]));
  const int64_t* slot = tensor(args[3])->data_ptr<int64_t>();
  const Slots x(args[5]);
  if (!all_exist(x, slot)) return nullptr;
  const at::Tensor& o = *tensor(args[7]);
  advance(x, q, k, v, slot, tensor(args[4])->data_ptr<float>(), PyFloat_AsDouble(args[6]),
          o.data_ptr<float>(), o.size(1));
  Py_RETURN_NONE;
}

// The number of the centroid (M, D) nearest to a key.
int64_t nearest(const float* k, const float* c, long M, long D) {
  float most = -std::numeric_limits<float>::infinity();
  int64_t found = 0;
  for (long m = 0; m < M; m++, c += D) {
    const float near = dot(k, c, D) - dot(c, c, D) / 2;
    if (near > most) most = near, found = m;
  }
  return found;
}

// token(q, k, v, k°, centroids, bias, state, scale, o): the step of one sequence's token, all of
// (1, 1, heads, features), into the slots nearest to its keys before the rotary embedding. False,
// before anything has changed, where it does not cover the tensors.
PyObject* token(PyObject* const* args, Py_ssize_t) {
  PyObject* state = args[6];
  for (int i : {0, 1, 2, 3, 4, 5})
    if (!plain(args[i])) Py_RETURN_FALSE;
  const at::Tensor &q = *tensor(args[0]), &k = *tensor(args[1]), &v = *tensor(args[2]);
  const at::Tensor& centroids = *tensor(args[4]);
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || centroids.dim() != 3) Py_RETURN_FALSE;
  const int64_t H = q.size(2), G = k.size(2), D = k.size(3), V = v.size(3), M = centroids.size(1);
  if (!G || H % G || D % 16 || V % 16 || M % 16) Py_RETURN_FALSE;
  auto fits = [](PyObject* object, std::initializer_list<int64_t> sizes, bool index = false) {
    if (!plain(object)) return false;
    const at::Tensor& t = *tensor(object);
    return t.is_contiguous() && t.scalar_type() == (index ? at::kLong : at::kFloat) &&
           t.sizes() == at::IntArrayRef(sizes);
  };
  auto held = [&](int i) { return PyTuple_GET_ITEM(state, i); };
  if (!plain(held(0)) || !plain(held(3)) || tensor(held(0))->dim() != 4 ||
      tensor(held(3))->dim() != 4)
    Py_RETURN_FALSE;
  const int64_t w = tensor(held(0))->size(1), sinks = tensor(held(3))->size(1);
  if (!fits(args[0], {1, 1, H, D}) || !fits(args[1], {1, 1, G, D}) ||
      !fits(args[2], {1, 1, G, V}) || !fits(args[3], {1, 1, G, D}) ||
      !fits(args[4], {G, M, D}) || !fits(args[5], {H, M}) || !fits(held(0), {1, w, G, D}) ||
      !fits(held(1), {1, w, G, V}) || !fits(held(2), {1, w, G}, true) ||
      !fits(held(3), {1, sinks, G, D}) || !fits(held(4), {1, sinks, G, V}) ||
      !fits(held(5), {1, G, M, D}) || !fits(held(6), {1, G, M, V}) || !fits(held(7), {1, G, M}) ||
      !fits(held(8), {1}, true))
    Py_RETURN_FALSE;
  const Slots x(state);
  static thread_local std::vector<int64_t> slot;
  slot.resize(G);
  const float* plain_k = tensor(args[3])->data_ptr<float>();
  for (long g = 0; g < G; g++)
    slot[g] = nearest(plain_k + g * D, centroids.data_ptr<float>() + g * M * D, M, D);
  if (!all_exist(x, slot.data())) return nullptr;
  advance(x, Tokens(&q), Tokens(&k), Tokens(&v), slot.data(), tensor(args[5])->data_ptr<float>(),
          PyFloat_AsDouble(args[7]), tensor(args[8])->data_ptr<float>(), H);
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {{"token", (PyCFunction)(void*)guarded<token>, METH_FASTCALL, nullptr},
                         {"step", (PyCFunction)(void*)guarded<step>, METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_slots", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_slots() { return PyModule_Create(&lowline::module); }
