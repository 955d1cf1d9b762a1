// Between Python and the kernels: arguments taken as they are, and rows of any stride, in float32
// or bfloat16, packed into tiles of floats.
#pragma once
#include <torch/csrc/autograd/python_variable.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>

#include "gemm.h"

namespace lowline {

// a tensor's memory: element (batch, time, head, feature); features lie side by side
struct View {
  char* p = nullptr;
  bool half = false;
  long batch = 0, time = 0, head = 0;

  View() = default;
  explicit View(const at::TensorBase& t)
      : p((char*)t.data_ptr()), half(t.scalar_type() == at::kBFloat16) {
    if (t.dim() > 0) batch = t.stride(0);
    if (t.dim() > 1) time = t.stride(1);
    if (t.dim() > 2) head = t.stride(2);
  }
  char* at(long b, long t, long h) const {
    return p + (b * batch + t * time + h * head) * (half ? 2 : 4);
  }
};

template <typename T>
inline void pack_rows(float* out, long ldo, const T* in, long stride, int rows, int n,
                      float factor) {
  const int whole = n / 16 * 16;
  for (int i = 0; i < rows; i++, out += ldo, in += stride) {
    int d = 0;
    for (; d < whole; d += W) store(out + d, load(in + d) * factor);
    for (; d < n; d++) out[d] = widen(in[d]) * factor;
    for (; d < ldo; d++) out[d] = 0;
  }
}
template <typename T>
inline void unpack_rows(T* out, long stride, const float* in, long ldi, int rows, int n,
                        float factor) {
  const int whole = n / 16 * 16;
  for (int i = 0; i < rows; i++, in += ldi, out += stride) {
    int d = 0;
    for (; d < whole; d += W) store(out + d, load(in + d) * factor);
    for (; d < n; d++) narrow(out + d, in[d] * factor);
  }
}

// `rows` rows of n features from (b, t, h) on, times `factor`, with zeros up to m rows of ldo
LOWLINE_OUTLINE void pack(float* out, long ldo, const View& view, long b, long t, long h, int rows,
                          int m, int n, float factor = 1) {
  if (view.half)
    pack_rows(out, ldo, (const bf16*)view.at(b, t, h), view.time, rows, n, factor);
  else
    pack_rows(out, ldo, (const float*)view.at(b, t, h), view.time, rows, n, factor);
  std::memset(out + rows * ldo, 0, sizeof(float) * (m - rows) * ldo);
}
LOWLINE_OUTLINE void unpack(const View& view, long b, long t, long h, const float* in, long ldi,
                            int rows, int n, float factor = 1) {
  if (view.half)
    unpack_rows((bf16*)view.at(b, t, h), view.time, in, ldi, rows, n, factor);
  else
    unpack_rows((float*)view.at(b, t, h), view.time, in, ldi, rows, n, factor);
}

// prefetches what pack or unpack will touch
inline void want(const View& view, long b, long t, long h, int rows, int n) {
  const int size = view.half ? 2 : 4;
  if (view.p) ahead->want(view.at(b, t, h), view.time * size, rows, n * size);
}

inline const at::Tensor* tensor(PyObject* object) {  // null for None
  return object == Py_None ? nullptr : &THPVariable_Unpack(object);
}
inline bool plain(PyObject* object) {  // a tensor proper, in this machine's memory
  return THPVariable_CheckExact(object) && THPVariable_Unpack(object).is_cpu();
}
inline View view(PyObject* object) {
  return object == Py_None ? View() : View(THPVariable_Unpack(object));
}

// Asks for pages of 2 MB under a large output: its first writing takes a fault per page.
inline void huge_pages(PyObject* object) {
#if defined(MADV_HUGEPAGE)
  if (object == Py_None) return;
  constexpr uintptr_t PAGE = 1 << 21;
  const at::Tensor& t = THPVariable_Unpack(object);
  const uintptr_t begin = ((uintptr_t)t.data_ptr() + PAGE - 1) & -PAGE;
  const uintptr_t end = ((uintptr_t)t.data_ptr() + t.nbytes()) & -PAGE;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#endif
}

// Other Python threads run while this lives.
class WithoutPython {
  PyThreadState* state = PyEval_SaveThread();

 public:
  ~WithoutPython() { PyEval_RestoreThread(state); }
};

// a function of the module: C++ exceptions become Python's
template <PyObject* (*function)(PyObject* const*, Py_ssize_t)>
PyObject* guarded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return function(args, count);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace lowline
