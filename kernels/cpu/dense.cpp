// The dense parts of a decoder block for one token, in fp32: projections whose weights are fp32, or
// int8 with a scale for every `GROUP` inputs of a row (`lowline.kernels.int8`), RMSNorm, rotary
// embedding and MLP. One token reads every weight once, so that bytes and calls are what it costs.
//
//   linear(x, projection, y)                           y = P x
//   project(x, norm, eps, projections, outputs, h)     h = RMSNorm(x), y_i = P_i h
//   rotate(x, cos, sin, y)                             rotary embedding of heads, halves split
//   finish(o, x, out, norm, eps, gate, up, down, act)  x += P_out o, x += P_down(act(g) * u) with
//                                                      g, u = P_gate, P_up of RMSNorm(x)
//
// A projection is a tuple (weight, scale or None, bias or None), or a low-rank one's two and the
// activation between them: (weight, scale, bias, weight, scale, bias, activation). One more, with
// pivots (`lowline.cola.pivoted`), is 1 for each output that is z's next and 0 for the second's.
#include <ATen/Parallel.h>

#include <cmath>

#include "functions.h"
#include "tensors.h"

namespace lowline {
namespace {

constexpr long GROUP = 64;      // inputs of a scale
constexpr long AHEAD = 2048;    // bytes
constexpr long TASK = 1 << 15;  // weights that are worth a thread
enum Activation { IDENTITY, SILU, GELU, RELU };

typedef int8_t vecb __attribute__((vector_size(W)));
typedef int8_t loose_vecb __attribute__((vector_size(W), aligned(1), may_alias));
LOWLINE_INLINE vec load_int8(const int8_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector((vecb) * (const loose_vecb*)p, vec);
#endif
}

const float* floats(PyObject* object) {
  if (object == Py_None) return nullptr;
  const at::Tensor& t = *tensor(object);
  if (!plain(object) || t.scalar_type() != at::kFloat || !t.is_contiguous())
    throw std::invalid_argument("a decoding step takes contiguous float32 tensors on the CPU");
  return t.data_ptr<float>();
}
float* mutable_floats(PyObject* object) { return const_cast<float*>(floats(object)); }

struct Matrix {  // y[rows] = W x + bias
  const float *wide = nullptr, *scale, *bias;
  const int8_t* narrow = nullptr;
  long rows, n, groups;

  Matrix(PyObject* tuple, int i) {
    PyObject* weight = PyTuple_GET_ITEM(tuple, i);
    scale = floats(PyTuple_GET_ITEM(tuple, i + 1)), bias = floats(PyTuple_GET_ITEM(tuple, i + 2));
    if (scale)
      narrow = tensor(weight)->data_ptr<int8_t>();
    else
      wide = floats(weight);
    rows = tensor(weight)->size(0), n = tensor(weight)->size(1);
    groups = (n + GROUP - 1) / GROUP;
  }

  // W x of one row of int8; x has zeros up to a multiple of 16. Rows one by one are read in the
  // order of memory, which the processor prefetches, and all the better when it is asked to.
  float product(const float* x, long row) const {
    const int8_t* w = narrow + row * n;
    vec total{};
    for (long g = 0, i = 0; g < groups; g++) {
      vec part[2]{};
      __builtin_prefetch(w + i + AHEAD);
      if (i + GROUP <= n) {
#pragma GCC unroll 16
        for (int at = 0; at < GROUP; at += W, i += W)
          part[at / W % 2] += load_int8(w + i) * load(x + i);
      } else {
        for (; i < n; i += W) part[0] += load_int8(w + i) * load(x + i);
      }
      total += (part[0] + part[1]) * scale[row * groups + g];
    }
    return sum(total);
  }
  void multiply(float* y, const float* x) const {
    at::parallel_for(0, rows, TASK / n + 1, [&](int64_t row, int64_t last) {
      for (; row < last; row++)
        y[row] = (wide ? dot(wide + row * n, x, n) : product(x, row)) + (bias ? bias[row] : 0);
    });
  }
};

void activate(float* x, long n, long activation) {
  if (activation == GELU) {
    for (long i = 0; i < n; i++) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
    return;
  }
  for (long i = 0; i < n; i += W) {
    const int here = std::min<long>(W, n - i);
    const vec v = load(x + i, here);
    if (activation == SILU) store(x + i, v * sigmoid(v), here);
    if (activation == RELU) store(x + i, v < 0.0f ? vec{} : v, here);
  }
}

thread_local Arena arena;
float* padded(long n) {  // with zeros up to a multiple of 16
  float* p = arena.take(n + 16);
  std::memset(p + n, 0, sizeof(float) * 16);
  return p;
}

struct Projection {
  Matrix first, last;
  long activation = -1;
  const float* is_pivot = nullptr;

  explicit Projection(PyObject* tuple)
      : first(tuple, 0), last(tuple, PyTuple_GET_SIZE(tuple) > 3 ? 3 : 0) {
    if (PyTuple_GET_SIZE(tuple) > 6) activation = PyLong_AsLong(PyTuple_GET_ITEM(tuple, 6));
    if (PyTuple_GET_SIZE(tuple) > 7) is_pivot = floats(PyTuple_GET_ITEM(tuple, 7));
  }
  long outputs() const { return last.rows + (is_pivot ? first.rows : 0); }
  void operator()(float* y, const float* x) const {
    if (activation < 0) return first.multiply(y, x);
    float* z = padded(first.rows);
    first.multiply(z, x);
    activate(z, first.rows, activation);
    if (!is_pivot) return last.multiply(y, z);
    float* rest = padded(last.rows);
    last.multiply(rest, z);
    for (long i = 0, at = 0; i < outputs(); i++) {  // without branches, which would be guessed wrong
      const bool here = is_pivot[i] > 0;
      const float from_z = z[at], other = rest[i - at];
      y[i] = here ? from_z : other;
      at += here;
    }
  }
};

float* copied(const float* x, long n) {
  float* y = padded(n);
  std::memcpy(y, x, sizeof(float) * n);
  return y;
}
float* normalised(const float* x, const float* weight, float eps, long n) {
  float* y = padded(n);
  const float factor = 1 / std::sqrt(dot(x, x, n) / n + eps);
  for (long i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
  return y;
}

PyObject* linear(PyObject* const* args, Py_ssize_t) {
  arena.reset();
  const Projection projection(args[1]);
  projection(mutable_floats(args[2]), copied(floats(args[0]), tensor(args[0])->numel()));
  Py_RETURN_NONE;
}

PyObject* project(PyObject* const* args, Py_ssize_t) {
  arena.reset();
  const long n = tensor(args[0])->numel();
  const float* h = normalised(floats(args[0]), floats(args[1]), PyFloat_AsDouble(args[2]), n);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[3]); i++)
    Projection(PyTuple_GET_ITEM(args[3], i))(mutable_floats(PyTuple_GET_ITEM(args[4], i)), h);
  if (args[5] != Py_None) std::memcpy(mutable_floats(args[5]), h, sizeof(float) * n);
  Py_RETURN_NONE;
}

PyObject* rotate(PyObject* const* args, Py_ssize_t) {
  const float *x = floats(args[0]), *cos = floats(args[1]), *sin = floats(args[2]);
  float* y = mutable_floats(args[3]);
  const long D = tensor(args[1])->numel(), half = D / 2, end = tensor(args[0])->numel();
  for (long h = 0; h < end; h += D)
    for (long i = 0; i < half; i++) {
      y[h + i] = x[h + i] * cos[i] - x[h + half + i] * sin[i];
      y[h + half + i] = x[h + half + i] * cos[half + i] + x[h + i] * sin[half + i];
    }
  Py_RETURN_NONE;
}

PyObject* finish(PyObject* const* args, Py_ssize_t) {
  arena.reset();
  float* x = mutable_floats(args[1]);
  const long n = tensor(args[1])->numel();
  auto add = [&](const Projection& projection, const float* from) {
    float* y = padded(n);
    projection(y, from);
    for (long i = 0; i < n; i++) x[i] += y[i];
  };
  add(Projection(args[2]), copied(floats(args[0]), tensor(args[0])->numel()));
  const float* h = normalised(x, floats(args[3]), PyFloat_AsDouble(args[4]), n);
  const Projection gate(args[5]), up(args[6]);
  const long width = gate.outputs();
  float *g = padded(width), *u = padded(width);
  gate(g, h), up(u, h);
  activate(g, width, PyLong_AsLong(args[8]));
  for (long i = 0; i < width; i++) g[i] *= u[i];
  add(Projection(args[7]), g);
  Py_RETURN_NONE;
}

#define METHOD(name) {#name, (PyCFunction)(void*)guarded<name>, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {METHOD(linear), METHOD(project), METHOD(rotate), METHOD(finish),
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_dense", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_dense() { return PyModule_Create(&lowline::module); }
