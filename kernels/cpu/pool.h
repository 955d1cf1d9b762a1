// A pool of states: tensors that lead with pages, and which page each sequence of a call has.
#pragma once
#include <algorithm>
#include <vector>

#include "tensors.h"

namespace lowline {

// A tensor that leads with pages; each is contiguous, and they lie `apart`.
template <class T> struct Paged {
  T* at = nullptr;
  long apart = 0;

  Paged() = default;
  Paged(T* at, long apart) : at(at), apart(apart) {}
  explicit Paged(const at::Tensor& t) : at((T*)t.data_ptr()), apart(t.stride(0)) {}
  T* operator[](long page) const { return at + page * apart; }
};
inline bool has_whole_pages(const at::Tensor& t) {
  long size = 1;
  if (!t.dim() || !t.numel()) return t.dim();
  for (long d = t.dim() - 1; d > 0; size *= t.size(d--))
    if (t.size(d) != 1 && t.stride(d) != size) return false;
  return t.size(0) < 2 || t.stride(0) >= size;
}

// The page of each of N sequences in a pool: those of `rows`, int32 or int64, or all in turn.
// `valid` says whether they are N different ones that exist.
struct Pages {
  std::vector<long> of;
  bool valid;

  Pages(PyObject* rows, long N, long pool) : of(N), valid(N == pool) {
    if (rows == Py_None) {
      for (long n = 0; n < N; n++) of[n] = n;
      return;
    }
    valid = false;
    if (!plain(rows)) return;
    const at::Tensor& t = *tensor(rows);
    const bool wide = t.scalar_type() == at::kLong;
    if (t.dim() != 1 || t.size(0) != N || (!wide && t.scalar_type() != at::kInt)) return;
    for (long n = 0, step = t.stride(0); n < N; n++) {
      of[n] = wide ? t.data_ptr<int64_t>()[n * step] : t.data_ptr<int32_t>()[n * step];
      if (of[n] < 0 || of[n] >= pool) return;
    }
    std::vector<long> sorted = of;
    std::sort(sorted.begin(), sorted.end());
    valid = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  }
  long operator[](long n) const { return of[n]; }
};

}  // namespace lowline
