// The softmaxes of the Hedgehog feature map on a CPU, in one pass over rows that a GEMM has just left
// in the cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "functions.h"

namespace {

using namespace lowline;
using at::Tensor;

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread

// softmax(u) and softmax(-u) of a row, in full vectors; lanes beyond the row's end are zero.
void softmaxes(const float* u, int64_t features, float* positive, float* negative) {
  vec top = fill(u[0]), bottom = top;
  int64_t f = 0;
  for (; f + W <= features; f += W) {
    const vec x = load(u + f);
    top = x > top ? x : top;
    bottom = x < bottom ? x : bottom;
  }
  float high = top[0], low = bottom[0];
  for (int i = 1; i < W; i++) high = std::max(high, top[i]), low = std::min(low, bottom[i]);
  for (; f < features; f++) high = std::max(high, u[f]), low = std::min(low, u[f]);
  vec sum_positive = {}, sum_negative = {};
  for (f = 0; f < features; f += W) {
    const int lanes = std::min<int64_t>(W, features - f);
    const vec x = load(u + f, lanes);
    store(positive + f, vec{});
    store(negative + f, vec{});
    store(positive + f, exp(x - high), lanes);
    store(negative + f, exp(low - x), lanes);
    sum_positive += load(positive + f);
    sum_negative += load(negative + f);
  }
  const float share_positive = 1 / sum(sum_positive), share_negative = 1 / sum(sum_negative);
  for (f = 0; f < features; f += W) {
    store(positive + f, load(positive + f) * share_positive);
    store(negative + f, load(negative + f) * share_negative);
  }
}

// For each row of u (H, M, F): f(h, m, its softmaxes).
template <class F> void each_row(const Tensor& u, F f) {
  const int64_t rows = u.size(1), features = u.size(2), filled = (features + W - 1) / W * W;
  const float* data = u.data_ptr<float>();
  at::parallel_for(0, u.size(0) * rows, std::max<int64_t>(1, GRAIN / filled),
                   [&](int64_t begin, int64_t end) {
    std::vector<float> positive(filled), negative(filled);
    for (int64_t i = begin; i < end; i++) {
      softmaxes(data + i * features, features, positive.data(), negative.data());
      f(i / rows, i % rows, positive.data(), negative.data());
    }
  });
}

// (H, M, 2F) in any strides but the last, from u (H, M, F)
template <class T> void hedgehog(const Tensor& u, const Tensor& out, float floor) {
  const int64_t features = u.size(2);
  each_row(u, [&](int64_t h, int64_t m, const float* positive, const float* negative) {
    T* row = (T*)out.data_ptr() + h * out.stride(0) + m * out.stride(1);
    for (int64_t f = 0; f < features; f += W) {
      const int lanes = std::min<int64_t>(W, features - f);
      const vec p = load(positive + f), n = load(negative + f);
      store(row + f, p < floor ? fill(floor) : p, lanes);
      store(row + features + f, n < floor ? fill(floor) : n, lanes);
    }
  });
}

// u is overwritten by its gradient
template <class T> void hedgehog_backward(const Tensor& u, const Tensor& grad, float floor) {
  const int64_t features = u.size(2), rows = u.size(1);
  each_row(u, [&](int64_t h, int64_t m, const float* positive, const float* negative) {
    const T* row = (const T*)grad.data_ptr() + h * grad.stride(0) + m * grad.stride(1);
    float* du = u.data_ptr<float>() + (h * rows + m) * features;
    vec mean_positive = {}, mean_negative = {};
    for (int64_t f = 0; f < features; f += W) {
      const int lanes = std::min<int64_t>(W, features - f);
      const vec p = load(positive + f), n = load(negative + f);
      mean_positive += p < floor ? vec{} : p * load(row + f, lanes);
      mean_negative += n < floor ? vec{} : n * load(row + features + f, lanes);
    }
    const float positive_mean = sum(mean_positive), negative_mean = sum(mean_negative);
    for (int64_t f = 0; f < features; f += W) {
      const int lanes = std::min<int64_t>(W, features - f);
      const vec p = load(positive + f), n = load(negative + f);
      const vec dp = p < floor ? vec{} : load(row + f, lanes);
      const vec dn = n < floor ? vec{} : load(row + features + f, lanes);
      store(du + f, p * (dp - positive_mean) - n * (dn - negative_mean), lanes);
    }
  });
}

// Calls f with a null pointer to x's elements.
template <class F> void with_type(const Tensor& x, F f) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "fp32 or bf16");
  if (x.scalar_type() == at::kFloat) f((float*)nullptr);
  else f((bf16*)nullptr);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("hedgehog", [](const Tensor& u, const Tensor& out, float floor) {
    with_type(out, [&](auto* p) { hedgehog<std::remove_pointer_t<decltype(p)>>(u, out, floor); });
  });
  m.def("hedgehog_backward", [](const Tensor& u, const Tensor& grad, float floor) {
    with_type(grad, [&](auto* p) {
      hedgehog_backward<std::remove_pointer_t<decltype(p)>>(u, grad, floor);
    });
  });
}
