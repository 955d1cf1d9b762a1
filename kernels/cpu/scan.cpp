// The selective scan (Mamba, arXiv 2312.00752) and the causal short convolution on a CPU.
//
//   h_t = e^{δ_t A} h_{t-1} + δ_t x_t B_t,   y_t = (Σ_n C_tn h_tn + D x_t) silu(z_t)
//
// A vector holds neighbouring channels, which share B_t and C_t (those of their set, where sets of
// channels have their own): the states of a group of channels
// are N vectors, and the forward loop has no sum over lanes. Tokens go in chunks of 64, all
// groups of channels of a chunk before the next, so that a chunk's rows are read while they are in
// the cache; rows lie too far apart for the processor to fetch the next ones by itself. For the
// backward pass the forward one keeps the states at the chunks' beginnings; a chunk's states and
// decays are computed from them again. A group belongs to one thread, for all sequences, so only
// the gradients of B and C, sums over channels, need a copy per thread.
#include <torch/csrc/utils/pybind.h>

#include "conv.h"

namespace {

using namespace lowline;

template <class T> struct Scan {
  Rows<T> x, dt, z;
  Tensor rates_tensor, B_tensor, C_tensor;
  const float *rates, *B, *C;  // rates: A·log2(e), (group, N, lane); B, C: (batch, time, set, N)
  Channels D, bias;
  bool use_softplus;
  int64_t time, channels, states, groups, sets;
  std::vector<Sequence> all;

  Scan(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
       const Optional& D_, const Optional& z_, const Optional& bias_, bool softplus_,
       const Optional& cu_seqlens)
      : x(x_), dt(dt_), z(z_), D(D_), bias(bias_), use_softplus(softplus_), time(x_.size(1)),
        channels(x_.size(2)), states(A_.size(1)), groups((channels + W - 1) / W), sets(B_.size(2)),
        all(sequences(x_.size(0), time, cu_seqlens)) {
    rates_tensor = whole_vectors(A_.to(at::kFloat).t() * 1.4426950408889634);
    rates_tensor = rates_tensor.view({states, groups, W}).transpose(0, 1).contiguous();
    B_tensor = in_float(B_), C_tensor = in_float(C_);
    rates = rates_tensor.data_ptr<float>();
    B = B_tensor.data_ptr<float>();
    C = C_tensor.data_ptr<float>();
  }

  int lanes_of(int64_t group) const { return std::min<int64_t>(W, channels - group * W); }

  // where a token's B and C for a group of channels are
  int64_t into(int64_t token, int64_t group) const {
    return (token * sets + group * sets / groups) * states;
  }

  // δ before softplus, and after it
  vec raw_step(const Sequence& s, int64_t t, int64_t group) const {
    return load(dt.at(s.batch, s.start + t) + group * W, lanes_of(group)) + bias[group];
  }
  vec step(vec raw) const { return use_softplus ? softplus(raw) : raw; }

  // (S, channels, N) to and from N vectors per group
  void load_state(const float* from, int64_t group, float* h) const {
    const int lanes = lanes_of(group);
    std::fill(h, h + states * W, 0.0f);
    for (int i = 0; i < lanes; i++)
      for (int64_t n = 0; n < states; n++) h[n * W + i] = from[(group * W + i) * states + n];
  }
  void store_state(const float* h, int64_t group, float* to) const {
    const int lanes = lanes_of(group);
    for (int i = 0; i < lanes; i++)
      for (int64_t n = 0; n < states; n++) to[(group * W + i) * states + n] = h[n * W + i];
  }

  // y, and where `kept` is given the states at the chunks' beginnings: (chunk, group, N, W)
  void forward(Rows<T> y, float* state, float* kept) const {
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      Buffer carried((end - begin) * states);
      for (size_t s = 0; s < all.size(); s++) {
        float* own = state + s * channels * states;
        for (int64_t g = begin; g < end; g++) load_state(own, g, carried.at((g - begin) * states));
        for (int64_t t0 = 0; t0 < all[s].length; t0 += CHUNK)
          for (int64_t g = begin; g < end; g++) {
            float* h = carried.at((g - begin) * states);
            if (kept)
              std::copy_n(h, states * W,
                          kept + ((all[s].chunk + t0 / CHUNK) * groups + g) * states * W);
            forward_chunk(all[s], t0, g, h, y);
          }
        for (int64_t g = begin; g < end; g++)
          store_state(carried.at((g - begin) * states), g, own);
      }
    });
  }

  void forward_chunk(const Sequence& s, int64_t t0, int64_t group, float* h, Rows<T> y) const {
    const int lanes = lanes_of(group);
    const vec skip = D[group];
    for (int64_t t = t0; t < std::min(t0 + CHUNK, s.length); t++) {
      const int64_t row = s.start + t, token = s.batch * time + row;
      const int64_t soon = s.start + std::min(t + AHEAD, s.length - 1);
      prefetch(s.batch, soon, group * W, x, dt, z, y);
      const vec xt = load(x.at(s.batch, row) + group * W, lanes), dtt = step(raw_step(s, t, group));
      const vec in = dtt * xt;
      const float* rate = rates + group * states * W;
      const float *b = B + into(token, group), *c = C + into(token, group);
      vec out = skip * xt;
      for (int64_t n = 0, count = states; n < count; n++) {
        const vec next = exp2(dtt * load(rate + n * W)) * load(h + n * W) + in * b[n];
        store(h + n * W, next);
        out += next * c[n];
      }
      if (z.data) {
        const vec zt = load(z.at(s.batch, row) + group * W, lanes);
        out *= zt * sigmoid(zt);
      }
      store(y.at(s.batch, row) + group * W, out, lanes);
    }
  }

  struct Gradients {
    Rows<T> x, dt, z;
    float *A, *D, *bias;  // (group, N, lane), (group, lane), (group, lane)
    float *B, *C;          // (threads, batch, time, set, N)
    float* state;          // in: of the final states; out: of the initial ones
  };

  void backward(Rows<T> dy, const float* kept, Gradients grad) const {
    int64_t tokens = 0;
    for (const Sequence& s : all) tokens += s.length;
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      FlushDenormals flush;
      Buffer carried((end - begin) * states), hs((CHUNK + 1) * states), decays(CHUNK * states);
      Gradients own = grad;
      own.B += at::get_thread_num() * tokens * sets * states;
      own.C += at::get_thread_num() * tokens * sets * states;
      for (size_t s = 0; s < all.size(); s++) {
        float* dstate = grad.state + s * channels * states;
        for (int64_t g = begin; g < end; g++)
          load_state(dstate, g, carried.at((g - begin) * states));
        for (int64_t c = chunks_of(all[s].length) - 1; c >= 0; c--)
          for (int64_t g = begin; g < end; g++) {
            const float* first = kept + ((all[s].chunk + c) * groups + g) * states * W;
            float* dh = carried.at((g - begin) * states);
            backward_chunk(all[s], c * CHUNK, g, first, dh, dy, own, hs, decays);
          }
        for (int64_t g = begin; g < end; g++)
          store_state(carried.at((g - begin) * states), g, dstate);
      }
    });
  }

  void backward_chunk(const Sequence& s, int64_t t0, int64_t group, const float* first, float* dh,
                      Rows<T> dy, const Gradients& grad, Buffer& hs, Buffer& decays) const {
    constexpr float ln2 = 0.693147181f;
    const int lanes = lanes_of(group);
    const int64_t length = std::min(CHUNK, s.length - t0);
    const vec skip = D[group];
    const float* rate = rates + group * states * W;
    float* dA = grad.A + group * states * W;
    const int64_t count = states;
    vec raw[CHUNK], xs[CHUNK], out[CHUNK];
    std::copy_n(first, count * W, hs.at(0));
    for (int64_t i = 0; i < length; i++) {
      const int64_t row = s.start + t0 + i, token = s.batch * time + row;
      const int64_t soon = s.start + t0 + std::min(i + AHEAD, length - 1);
      prefetch(s.batch, soon, group * W, x, dt);
      xs[i] = load(x.at(s.batch, row) + group * W, lanes);
      raw[i] = raw_step(s, t0 + i, group);
      const vec dtt = step(raw[i]), in = dtt * xs[i];
      const float *b = B + into(token, group), *c = C + into(token, group);
      const float* h = hs.at(i * count);
      float *next_h = hs.at((i + 1) * count), *decay = decays.at(i * count);
      vec y = skip * xs[i];
      for (int64_t n = 0; n < count; n++) {
        const vec a = exp2(dtt * load(rate + n * W)), next = a * load(h + n * W) + in * b[n];
        store(decay + n * W, a);
        store(next_h + n * W, next);
        y += next * c[n];
      }
      out[i] = y;
    }
    vec dD = {}, dbias = {};
    for (int64_t i = length - 1; i >= 0; i--) {
      const int64_t row = s.start + t0 + i, token = s.batch * time + row;
      const int64_t soon = s.start + t0 + std::max<int64_t>(i - AHEAD, 0);
      prefetch(s.batch, soon, group * W, dy, z, grad.x, grad.dt, grad.z);
      vec dout = load(dy.at(s.batch, row) + group * W, lanes);
      if (z.data) {
        const vec zt = load(z.at(s.batch, row) + group * W, lanes), gate = sigmoid(zt);
        store(grad.z.at(s.batch, row) + group * W, dout * out[i] * silu_slope(zt, gate), lanes);
        dout *= zt * gate;
      }
      const vec dtt = step(raw[i]), in = dtt * xs[i];
      const float *b = B + into(token, group), *c = C + into(token, group);
      const float *h = hs.at(i * count), *next_h = hs.at((i + 1) * count);
      const float* decay = decays.at(i * count);
      vec din = {}, dlog_rate = {};
      for (int64_t n0 = 0; n0 < count; n0 += W) {
        const int some = std::min<int64_t>(W, count - n0);
        vec dBs[W] = {}, dCs[W] = {};
        for (int j = 0; j < some; j++) {
          const int64_t n = n0 + j, at = n * W;
          const vec d = load(dh + at) + dout * c[n], before = d * load(decay + at);
          const vec dlog = before * load(h + at);  // with respect to δA
          dCs[j] = dout * load(next_h + at);
          dBs[j] = d * in;
          din += d * b[n];
          dlog_rate += dlog * load(rate + at);
          store(dA + at, load(dA + at) + dlog * dtt);
          store(dh + at, before);
        }
        float *dB = grad.B + into(token, group) + n0, *dC = grad.C + into(token, group) + n0;
        store(dB, load(dB, some) + sums(dBs), some);
        store(dC, load(dC, some) + sums(dCs), some);
      }
      vec ddt = din * xs[i] + dlog_rate * ln2;
      if (use_softplus) ddt *= sigmoid(raw[i]);
      store(grad.x.at(s.batch, row) + group * W, din * dtt + dout * skip, lanes);
      store(grad.dt.at(s.batch, row) + group * W, ddt, lanes);
      dD += dout * xs[i];
      dbias += ddt;
    }
    store(grad.D + group * W, load(grad.D + group * W) + dD);
    store(grad.bias + group * W, load(grad.bias + group * W) + dbias);
  }
};

// The state is (S, channels, N) in fp32; it is moved over the sequences in place. `kept` is empty, or
// has room for the states at the chunks' beginnings: for every chunk N times full vectors.
Tensor scan_forward(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                    const Tensor& C, const Optional& D, const Optional& z, const Optional& bias,
                    bool softplus, const Tensor& state, const Optional& cu_seqlens,
                    const Tensor& kept) {
  Tensor y = at::empty(x.sizes(), x.options());
  with_type(x, [&](auto element) {
    using T = decltype(element);
    Scan<T> scan(x, dt, A, B, C, D, z, bias, softplus, cu_seqlens);
    TORCH_INTERNAL_ASSERT(!kept.numel() || kept.numel() >= chunk_count(scan.all) * scan.groups *
                                                               scan.states * W);
    scan.forward(Rows<T>(y), state.data_ptr<float>(),
                 kept.numel() ? kept.data_ptr<float>() : nullptr);
  });
  return y;
}

// Gradients of x, dt, A, B, C, D, z and the bias; `dstate` holds those of the final states, and then
// those of the initial ones.
std::vector<Tensor> scan_backward(const Tensor& dy, const Tensor& x, const Tensor& dt,
                                  const Tensor& A, const Tensor& B, const Tensor& C,
                                  const Optional& D, const Optional& z, const Optional& bias,
                                  bool softplus, const Optional& cu_seqlens, const Tensor& kept,
                                  const Tensor& dstate) {
  auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  const auto sums_like = dstate.options();
  Tensor dx = like(x), ddt = like(dt), dz = z ? like(*z) : at::empty({0}, x.options());
  const int64_t threads = at::get_num_threads();
  Tensor dBs = at::zeros({threads, B.size(0), B.size(1), B.size(2), B.size(3)}, sums_like);
  Tensor dCs = at::zeros_like(dBs), dA, dD, dbias;
  with_type(x, [&](auto element) {
    using T = decltype(element);
    Scan<T> scan(x, dt, A, B, C, D, z, bias, softplus, cu_seqlens);
    const int64_t filled = scan.groups * W;
    dA = at::zeros({scan.groups, A.size(1), W}, sums_like);
    dD = at::zeros({filled}, sums_like);
    dbias = at::zeros({filled}, sums_like);
    scan.backward(Rows<T>(dy), kept.data_ptr<float>(),
                  {Rows<T>(dx), Rows<T>(ddt), z ? Rows<T>(dz) : Rows<T>(), dA.data_ptr<float>(),
                   dD.data_ptr<float>(), dbias.data_ptr<float>(), dBs.data_ptr<float>(),
                   dCs.data_ptr<float>(), dstate.data_ptr<float>()});
  });
  const int64_t channels = x.size(2);
  dA = dA.transpose(1, 2).flatten(0, 1).narrow(0, 0, channels);
  return {dx, ddt, dA, dBs.sum(0), dCs.sum(0),
          dD.narrow(0, 0, channels), dz, dbias.narrow(0, 0, channels)};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("scan_forward", &scan_forward);
  m.def("scan_backward", &scan_backward);
  m.def("conv_forward", &conv_forward);
  m.def("conv_backward", &conv_backward);
}
