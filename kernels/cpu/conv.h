// The causal short convolution; each thread takes neighbouring channels of all sequences.
#pragma once
#include <array>

#include "channels.h"

namespace lowline {

// y_t = act(bias + Σ_k weight_k x_{t-taps+1+k}) per channel; rows before the first are the state's.
template <class T> struct Conv {
  Rows<T> x;
  Tensor weight_tensor;
  const float* weight;  // (taps, channels), full vectors
  Channels bias;
  bool silu;
  const T* state;  // (S, taps - 1, channels)
  int64_t taps, channels, groups;
  std::vector<Sequence> all;

  Conv(const Tensor& x_, const Tensor& weight_, const Optional& bias_, bool silu_,
       const Tensor& state_, const Optional& cu_seqlens)
      : x(x_), weight_tensor(whole_vectors(weight_.t())), weight(weight_tensor.data_ptr<float>()),
        bias(bias_), silu(silu_), state((const T*)state_.data_ptr()), taps(weight_.size(1)),
        channels(x_.size(2)), groups((channels + W - 1) / W),
        all(sequences(x_.size(0), x_.size(1), cu_seqlens)) {}

  int lanes_of(int64_t group) const { return std::min<int64_t>(W, channels - group * W); }
  vec tap(int64_t k, int64_t group) const { return load(weight + (k * groups + group) * W); }

  // Row t of a sequence; before its first token, the state's.
  const T* row(size_t s, int64_t t) const {
    return t >= 0 ? x.at(all[s].batch, all[s].start + t)
                  : state + (s * (taps - 1) + taps - 1 + t) * channels;
  }

  vec before_activation(const T* const* rows, int64_t group, int lanes) const {
    vec sum = bias[group];
    for (int64_t k = 0; k < taps; k++) sum += tap(k, group) * load(rows[k] + group * W, lanes);
    return sum;
  }

  // Calls f(sequence, first group, last group + 1) for all, a thread's channels side by side: rows
  // are read in order.
  template <class F> void each_sequence(F f) const {
    at::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
      for (size_t s = 0; s < all.size(); s++) f(s, begin, end);
    });
  }

  void forward(Rows<T> y, T* final_state) const {
    each_sequence([&](size_t s, int64_t begin, int64_t end) {
      std::vector<const T*> rows(taps);
      for (int64_t t = 0; t < all[s].length; t++) {
        for (int64_t k = 0; k < taps; k++) rows[k] = row(s, t - taps + 1 + k);
        T* to = y.at(all[s].batch, all[s].start + t);
        for (int64_t g = begin; g < end; g++) {
          vec out = before_activation(rows.data(), g, lanes_of(g));
          if (silu) out *= sigmoid(out);
          store(to + g * W, out, lanes_of(g));
        }
      }
      for (int64_t r = 0; r < taps - 1; r++)
        for (int64_t g = begin; g < end; g++)
          store(final_state + (s * (taps - 1) + r) * channels + g * W,
                load(row(s, all[s].length - taps + 1 + r) + g * W, lanes_of(g)), lanes_of(g));
    });
  }

  // From the last token down to the state's first row: dx_t = Σ_k weight_k d_{t+taps-1-k}, where d
  // is the gradient before the activation; recent[j] holds d_{t+j}.
  void backward(Rows<T> dy, const float* dfinal, Rows<T> dx, float* dstate, float* dweight,
                float* dbias) const {
    each_sequence([&](size_t s, int64_t begin, int64_t end) {
      const auto& [batch, start, length, chunk] = all[s];
      Buffer buffer(taps * (end - begin));
      std::vector<float*> recent(taps);
      for (int64_t j = 0; j < taps; j++) recent[j] = buffer.at(j * (end - begin));
      std::vector<const T*> rows(taps);
      for (int64_t t = length - 1; t > -taps; t--) {
        std::rotate(recent.begin(), recent.end() - 1, recent.end());
        if (t >= 0)
          for (int64_t k = 0; k < taps; k++) rows[k] = row(s, t - taps + 1 + k);
        const int64_t left = t - length + taps - 1;  // the row's place in the final state
        for (int64_t g = begin; g < end; g++) {
          const int lanes = lanes_of(g);
          vec d = {}, sum = {};
          if (t >= 0) {
            d = load(dy.at(batch, start + t) + g * W, lanes);
            if (silu) {
              const vec out = before_activation(rows.data(), g, lanes);
              d *= silu_slope(out, sigmoid(out));
            }
            for (int64_t k = 0; k < taps; k++) {
              float* at = dweight + (k * groups + g) * W;
              store(at, load(at) + d * load(rows[k] + g * W, lanes));
            }
            store(dbias + g * W, load(dbias + g * W) + d);
          }
          store(recent[0] + (g - begin) * W, d);
          for (int64_t k = 0; k < taps; k++)
            sum += tap(k, g) * load(recent[taps - 1 - k] + (g - begin) * W);
          if (left >= 0)
            sum += load(dfinal + (s * (taps - 1) + left) * channels + g * W, lanes);
          if (t >= 0) store(dx.at(batch, start + t) + g * W, sum, lanes);
          else store(dstate + (s * (taps - 1) + taps - 1 + t) * channels + g * W, sum, lanes);
        }
      }
    });
  }
};

// States are (S, taps - 1, channels) here, in x's type; their gradients are in fp32.
inline std::array<Tensor, 2> conv_forward(const Tensor& x, const Tensor& weight,
                                          const Optional& bias, bool silu, const Tensor& state,
                                          const Optional& cu_seqlens) {
  Tensor y = at::empty(x.sizes(), x.options()), final_state = at::empty_like(state);
  with_type(x, [&](auto element) {
    using T = decltype(element);
    Conv<T>(x, weight, bias, silu, state, cu_seqlens)
        .forward(Rows<T>(y), (T*)final_state.data_ptr());
  });
  return {y, final_state};
}

// Gradients of x, weight, bias and the initial state.
inline std::array<Tensor, 4> conv_backward(const Tensor& dy, const Tensor& dfinal,
                                           const Tensor& x, const Tensor& weight,
                                           const Optional& bias, bool silu, const Tensor& state,
                                           const Optional& cu_seqlens) {
  const int64_t channels = x.size(2), filled = (channels + W - 1) / W * W;
  const Tensor wide = in_float(dfinal);
  Tensor dx = at::empty(x.sizes(), x.options()), dstate = at::empty_like(wide);
  Tensor dweight = at::zeros({weight.size(1), filled}, wide.options());
  Tensor dbias = at::zeros({filled}, wide.options());
  with_type(x, [&](auto element) {
    using T = decltype(element);
    Conv<T>(x, weight, bias, silu, state, cu_seqlens)
        .backward(Rows<T>(dy), wide.data_ptr<float>(), Rows<T>(dx), dstate.data_ptr<float>(),
                  dweight.data_ptr<float>(), dbias.data_ptr<float>());
  });
  return {dx, dweight.narrow(1, 0, channels).t(), dbias.narrow(0, 0, channels), dstate};
}

}  // namespace lowline
