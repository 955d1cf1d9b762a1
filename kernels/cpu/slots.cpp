// Window-and-slots attention, a token at a time, of keys and values in fp32 or bf16, computed in
// fp32; the formula is that of
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
template <class T> struct Slots : Window<T> {
  using Window<T>::w;
  using Window<T>::G;
  using Window<T>::D;
  using Window<T>::V;
  using Window<T>::sinks;
  Paged<int64_t> slot;
  Paged<float> keys, values, count;
  long M;

  explicit Slots(PyObject* tuple)
      : Window<T>(tuple), slot(this->at(2)), keys(this->at(5)), values(this->at(6)),
        count(this->at(7)) {
    M = this->at(7).size(2);
  }

  // The slot of the token that the one at `position` replaces in the ring, and whether it joins it.
  int64_t& oldest(long page, long g, long position) const {
    return slot[page][position % w * G + g];
  }
  bool leaves(long position) const { return position - w >= sinks; }

  // The token at `position` goes into the ring, the one it replaces into its slot.
  void push(long page, long g, long position, const float* k, const float* v,
            int64_t of_slot) const {
    int64_t& ring_slot = oldest(page, g, position);
    if (leaves(position)) {
      const long to = g * M + ring_slot;
      add(keys[page] + to * D, this->ring_k(page, position % w, g), D);
      add(values[page] + to * V, this->ring_v(page, position % w, g), V);
      count[page][to] += 1;
    }
    ring_slot = of_slot;
    this->keep(page, g, position, k, v);
  }

  // o = the output of query q, when the state has taken in `seen` tokens
  void read(float* o, const float* q, const float* bias, long page, long g, long seen, float scale,
            float* weights) const {
    const long ring = std::min(seen, w), first = std::min(sinks, seen - ring);
    const long exact = first + ring, columns = exact + M;
    const float *of_slots = count[page] + g * M, *sums = keys[page] + g * M * D;
    for (long i = 0; i < first; i++) weights[i] = scale * dot(q, this->first_k(page, i, g), D);
    for (long i = 0; i < ring; i++)
      weights[first + i] = scale * dot(q, this->ring_k(page, i, g), D);
    for (long m = 0; m < M; m++) {
      const float tokens = of_slots[m];
      weights[exact + m] = tokens ? scale * dot(q, sums + m * D, D) / tokens + bias[m] : NEGATIVE;
    }
    std::fill_n(weights + columns, W, NEGATIVE);
    float top = NEGATIVE;
    for (long i = 0; i < columns; i++) top = std::max(top, weights[i]);
    for (long i = 0; i < columns; i += W) store(weights + i, exp(load(weights + i) - top));
    float total = 0;
    for (long i = 0; i < exact; i++) total += weights[i];
    for (long m = 0; m < M; m++) total += weights[exact + m] * of_slots[m];
    std::memset(o, 0, sizeof(float) * V);
    accumulate(o, V, weights, first, [&](long i) { return this->first_v(page, i, g); });
    accumulate(o, V, weights + first, ring, [&](long i) { return this->ring_v(page, i, g); });
    const float* of_values = values[page] + g * M * V;
    accumulate(o, V, weights + exact, M, [&](long m) { return of_values + m * V; });
    for (long j = 0; j < V; j += W) store(o + j, load(o + j) / total);
  }

 private:
  static void add(float* to, const T* x, long n) {
    for (long i = 0; i < n; i += W) store(to + i, load(to + i) + load(x + i));
  }
};

// A token of each sequence is taken in, then read: out (N, H, V).
template <class T>
void advance(const Slots<T>& x, const Pages& pages, const Tokens& q, const Tokens& k,
             const Tokens& v, const int64_t* slot, const float* bias, float scale, float* out,
             long H) {
  const long r = H / x.G, N = pages.of.size();
  const int64_t grain = std::max<int64_t>(1, TASK / ((x.w + x.M) * (x.D + x.V)));
  at::parallel_for(0, N * x.G, grain, [&](int64_t first, int64_t last) {
    static thread_local Arena arena;
    FlushDenormals flush;
    arena.reset();
    float* weights = arena.take(x.sinks + x.w + x.M + W);
    for (int64_t task = first; task < last; task++) {
      const long n = task / x.G, g = task % x.G, page = pages[n], position = x.length(page);
      x.push(page, g, position, k(n, 0, g), v(n, 0, g), slot[task]);
      for (long h = g * r; h < (g + 1) * r; h++)
        x.read(out + (n * H + h) * x.V, q(n, 0, h), bias + h * x.M, page, g, position + 1, scale,
               weights);
    }
  });
  for (long page : pages.of) x.length(page)++;
  x.changed();
}

// Whether all slots exist that the new token and those it replaces are in; else an error is set.
template <class T> bool all_exist(const Slots<T>& x, const Pages& pages, const int64_t* slot) {
  for (size_t i = 0; i < pages.of.size() * x.G; i++) {
    const long page = pages[i / x.G], position = x.length(page);
    const int64_t oldest = x.leaves(position) ? x.oldest(page, i % x.G, position) : 0;
    for (int64_t m : {slot[i], oldest})
      if (m < 0 || m >= x.M) {
        PyErr_Format(PyExc_IndexError, "slot_window_step: slot %lld of %ld",
                     static_cast<long long>(m), x.M);
        return false;
      }
  }
  return true;
}

template <class T> PyObject* step_as(PyObject* const* args) {
  const Tokens q(tensor(args[0])), k(tensor(args[1])), v(tensor(args[2]));
  const int64_t* slot = tensor(args[3])->data_ptr<int64_t>();
  const Slots<T> x(args[5]);
  const at::Tensor& o = *tensor(args[8]);
  const Pages pages(args[7], o.size(0), x.at(8).size(0));
  if (!pages.valid) throw std::logic_error("rows that were not checked");
  if (!all_exist(x, pages, slot)) return nullptr;
  advance(x, pages, q, k, v, slot, tensor(args[4])->data_ptr<float>(), PyFloat_AsDouble(args[6]),
          o.data_ptr<float>(), o.size(1));
  Py_RETURN_NONE;
}

// step(q, k, v, slot, bias, state, scale, rows, o): o, q's output, is float32
PyObject* step(PyObject* const* args, Py_ssize_t) {
  const bool half = tensor(args[1])->scalar_type() == at::kBFloat16;
  return half ? step_as<bf16>(args) : step_as<float>(args);
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

// token(q, k, v, k°, centroids, bias, state, scale, rows, o): the step of a token of each sequence,
// all of (N, 1, heads, features), into the slots nearest to its keys before the rotary embedding.
// False, before anything has changed, where it does not cover the tensors.
PyObject* token(PyObject* const* args, Py_ssize_t) {
  PyObject* state = args[6];
  for (int i : {0, 1, 2, 3, 4, 5})
    if (!plain(args[i])) Py_RETURN_FALSE;
  const at::Tensor &q = *tensor(args[0]), &k = *tensor(args[1]), &v = *tensor(args[2]);
  const at::Tensor& centroids = *tensor(args[4]);
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || centroids.dim() != 3) Py_RETURN_FALSE;
  const int64_t N = q.size(0), H = q.size(2), G = k.size(2), D = k.size(3), V = v.size(3);
  const int64_t M = centroids.size(1);
  if (!G || H % G || D % 16 || V % 16 || M % 16) Py_RETURN_FALSE;
  auto fits = [](PyObject* object, std::initializer_list<int64_t> sizes) {
    const at::Tensor& t = *tensor(object);
    return t.scalar_type() == at::kFloat && t.sizes() == at::IntArrayRef(sizes) &&
           (sizes.size() == 4 ? t.stride(3) == 1 : t.is_contiguous());
  };
  auto held = [&](int i) { return PyTuple_GET_ITEM(state, i); };
  for (int i = 0; i < 9; i++)
    if (!plain(held(i)) || !has_whole_pages(*tensor(held(i)))) Py_RETURN_FALSE;
  if (tensor(held(0))->dim() != 4 || tensor(held(3))->dim() != 4) Py_RETURN_FALSE;
  const int64_t P = tensor(held(8))->size(0), w = tensor(held(0))->size(1);
  const int64_t sinks = tensor(held(3))->size(1);
  auto holds = [&](int i, std::initializer_list<int64_t> sizes, bool index = false) {
    const at::Tensor& t = *tensor(held(i));
    return t.scalar_type() == (index ? at::kLong : at::kFloat) &&
           t.sizes() == at::IntArrayRef(sizes);
  };
  const Pages pages(args[8], N, P);
  if (!fits(args[0], {N, 1, H, D}) || !fits(args[1], {N, 1, G, D}) ||
      !fits(args[2], {N, 1, G, V}) || !fits(args[3], {N, 1, G, D}) ||
      !fits(args[4], {G, M, D}) || !fits(args[5], {H, M}) || !holds(0, {P, w, G, D}) ||
      !holds(1, {P, w, G, V}) || !holds(2, {P, w, G}, true) || !holds(3, {P, sinks, G, D}) ||
      !holds(4, {P, sinks, G, V}) || !holds(5, {P, G, M, D}) || !holds(6, {P, G, M, V}) ||
      !holds(7, {P, G, M}) || !holds(8, {P}, true) || !pages.valid)
    Py_RETURN_FALSE;
  const Slots<float> x(state);
  static thread_local std::vector<int64_t> slot;
  slot.resize(N * G);
  const Tokens plain_k(tensor(args[3]));
  for (long i = 0; i < N * G; i++)
    slot[i] = nearest(plain_k(i / G, 0, i % G), centroids.data_ptr<float>() + i % G * M * D, M, D);
  if (!all_exist(x, pages, slot.data())) return nullptr;
  advance(x, pages, Tokens(&q), Tokens(&k), Tokens(&v), slot.data(),
          tensor(args[5])->data_ptr<float>(), PyFloat_AsDouble(args[7]),
          tensor(args[9])->data_ptr<float>(), H);
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {{"token", (PyCFunction)(void*)guarded<token>, METH_FASTCALL, nullptr},
                         {"step", (PyCFunction)(void*)guarded<step>, METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_slots", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_slots() { return PyModule_Create(&lowline::module); }
