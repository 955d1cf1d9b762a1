// Sequences of rows of channels, which the selective scan and the convolution go through: tensors
// (batch, time, channels) in fp32 or bf16, and one number per channel, padded to full vectors.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "functions.h"

namespace lowline {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t CHUNK = 64;
constexpr int64_t AHEAD = 4;  // tokens between a row's prefetch and its use

// (batch, time, channels) in memory, channels contiguous; null where there is no tensor.
template <class T> struct Rows {
  T* data = nullptr;
  int64_t batch = 0, time = 0;
  Rows() = default;
  explicit Rows(const Tensor& t) : data((T*)t.data_ptr()), batch(t.stride(0)), time(t.stride(1)) {
    TORCH_INTERNAL_ASSERT(t.size(2) <= 1 || t.stride(2) == 1);
  }
  explicit Rows(const Optional& t) { if (t) *this = Rows(*t); }
  T* at(int64_t b, int64_t t) const { return data + b * batch + t * time; }
};

template <class... R> void prefetch(int64_t b, int64_t t, int64_t channel, const R&... rows) {
  ((rows.data ? __builtin_prefetch(rows.at(b, t) + channel) : void()), ...);
}

// Where a sequence lies: rows [start, start + length) of a batch row, and its first chunk's number.
struct Sequence { int64_t batch, start, length, chunk; };

inline int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

inline std::vector<Sequence> sequences(int64_t batch, int64_t time, const Optional& cu_seqlens) {
  std::vector<Sequence> found;
  int64_t chunk = 0;
  auto add = [&](int64_t b, int64_t start, int64_t length) {
    found.push_back({b, start, length, chunk});
    chunk += chunks_of(length);
  };
  if (cu_seqlens) {
    const Tensor bounds = cu_seqlens->to(at::kLong).contiguous();
    const int64_t* at = bounds.data_ptr<int64_t>();
    for (int64_t s = 0; s + 1 < bounds.numel(); s++) add(0, at[s], at[s + 1] - at[s]);
  } else {
    for (int64_t b = 0; b < batch; b++) add(b, 0, time);
  }
  return found;
}

inline int64_t chunk_count(const std::vector<Sequence>& all) {
  return all.empty() ? 0 : all.back().chunk + chunks_of(all.back().length);
}

inline Tensor in_float(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

// (..., channels) in fp32, padded with zeros to full vectors.
inline Tensor whole_vectors(const Tensor& t) {
  return in_float(at::constant_pad_nd(t, {0, (W - t.size(-1) % W) % W}));
}

struct Channels {  // one number per channel; zeros where there is no tensor
  Tensor kept;
  const float* data = nullptr;
  explicit Channels(const Optional& t) {
    if (t) kept = whole_vectors(*t), data = kept.data_ptr<float>();
  }
  vec operator[](int64_t group) const { return data ? load(data + group * W) : vec{}; }
};

struct Buffer {  // room for n vectors
  struct alignas(4 * W) Line { float lane[W]; };
  std::vector<Line> lines;
  explicit Buffer(int64_t n) : lines(n) {}
  float* at(int64_t i) { return lines.data()[i].lane; }
};

// Calls f with an element of x's type.
template <class F> void with_type(const Tensor& x, F f) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "fp32 or bf16");
  if (x.scalar_type() == at::kFloat) f(float{});
  else f(bf16{});
}

}  // namespace lowline
