// The gated linear recurrence, chunk by chunk: forward and backward over complete sequences, and one
// token (see recurrence_chunk.h for the mathematics, recurrence/cpu.py for the shapes).
//
// One task per sequence and state head. A thread takes its heads of a sequence together, segment by
// segment, so that (batch, time, heads, features) memory is read in the order it lies in. States
// are saved every SEGMENT chunks, and recomputed in between by the backward pass, which keeps the
// segment's packed keys and values (with the delta rule U) until it has been through them.
#include <ATen/Parallel.h>

#include <vector>

#include "recurrence_chunk.h"
#include "recurrence_step.h"
#include "tensors.h"

namespace lowline {
namespace {

constexpr int HEADS = 8;  // that a thread takes together
constexpr long TOKENS = C * SEGMENT;

struct Call {
  Shape shape;
  View q, k, v, g, beta, o, dq, dk, dv, dg, dbeta, grad_o;
  const float *initial, *grad_state, *saved;
  float *state, *grad_initial, *save;
  float scale;
  long B, T, H;
  std::vector<long> bounds, segments;  // of packed sequences: first token, first segment

  bool packed() const { return bounds.size() > 0; }
  long sequences() const { return packed() ? bounds.size() - 1 : B; }
  long batch(long n) const { return packed() ? 0 : n; }
  long begin(long n) const { return packed() ? bounds[n] : 0; }
  long length(long n) const { return packed() ? bounds[n + 1] - bounds[n] : T; }
  // where the state before a segment is saved, and the room for all
  long saved_at(long n, long segment, long h) const {
    const long start = packed() ? segments[n] : n * segments_of(T);
    return ((start + segment) * H + h) * shape.state();
  }
  long saved_room() const {
    const long N = sequences();
    return N ? saved_at(N - 1, segments_of(length(N - 1)), 0) : 0;
  }
  static long segments_of(long length) {
    return std::max(1L, (length + TOKENS - 1) / TOKENS);
  }
};

// a state of K x V in memory, and as the kernels hold it: D1 x ld
void read_state(float* S, const float* in, const Shape& s) {
  if (!in) return zero(S, s.state());
  if (s.by_value) return transpose(S, s.ld(), in, s.V, s.K, s.V);
  for (int d = 0; d < s.K; d++) {
    std::memcpy(S + (long)d * s.ld(), in + (long)d * s.V, s.V * sizeof(float));
    zero(S + (long)d * s.ld() + s.V, s.ld() - s.V);
  }
}
void write_state(float* out, const float* S, const Shape& s) {
  if (s.by_value) return transpose(out, s.V, S, s.ld(), s.V, s.K);
  for (int d = 0; d < s.K; d++)
    std::memcpy(out + (long)d * s.V, S + (long)d * s.ld(), s.V * sizeof(float));
}

// Sets up the gate and beta of the chunk of tokens [t, t + rows); `open_chunk` packs k and v too.
void open_gate(Chunk& c, const Call& call, long b, long t, long h, int rows) {
  const Shape& s = c.shape;
  c.rows = rows, c.m = (rows + 15) / 16 * 16;
  if (s.gate == Gate::vector) {
    pack(c.vector.a, c.D1, call.g, b, t, h, rows, c.m, c.D1);  // zeros: a decay of one
    for (long i = 0; i < (long)c.m * c.D1; i += W)
      store(c.vector.a + i, exp(load(c.vector.a + i)));
  }
  if (s.gate == Gate::scalar) {
    pack(c.scalar.a, 1, call.g, b, t, h, rows, c.m, 1);
    for (int i = 0; i < c.m; i += W) store(c.scalar.a + i, exp(load(c.scalar.a + i)));
  }
  if (s.delta) pack(c.beta, 1, call.beta, b, t, h, rows, c.m, 1);
  c.prepare_gate();
}
void open_chunk(Chunk& c, const Call& call, long b, long t, long h, int rows) {
  const Shape& s = c.shape;
  open_gate(c, call, b, t, h, rows);
  pack(c.y, c.D1, s.by_value ? call.v : call.k, b, t, h, rows, c.m, c.D1);
  pack(c.u, c.ld, s.by_value ? call.k : call.v, b, t, h, rows, c.m, c.D2);
}
void open_query(Chunk& c, const Call& call, long b, long t, long head) {
  const bool by_value = c.shape.by_value;
  pack(by_value ? c.w : c.x, by_value ? c.ld : c.D1, call.q, b, t, head, c.rows, c.m, c.shape.K,
       call.scale);
}

// Announces the inputs of the chunk at [t, t + rows); k, v and g, and what its queries take.
void want_keys(const Call& call, long b, long t, long h, int rows) {
  const Shape& s = call.shape;
  want(call.k, b, t, h, rows, s.K);
  want(call.v, b, t, h, rows, s.V);
  if (s.gate == Gate::vector) want(call.g, b, t, h, rows, s.D1());
}
void want_queries(const Call& call, long b, long t, long h, int rows) {
  const Shape& s = call.shape;
  for (long head = h * s.queries; head < (h + 1) * s.queries; head++) {
    want(call.q, b, t, head, rows, s.K);
    want(call.grad_o, b, t, head, rows, s.V);
  }
}

void forward_heads(const Call& call, Arena& arena, long n, long h0, int heads) {
  const Shape& s = call.shape;
  arena.reset();
  Chunk c(s, arena);
  c.y = arena.take(C * s.D1()), c.u = arena.take(C * s.ld());
  c.E = arena.take(C * s.ld()), c.B = arena.take(C * C);
  float* S[HEADS];
  for (int h = 0; h < heads; h++) {
    S[h] = arena.take(s.state());
    read_state(S[h], call.initial ? call.initial + (n * call.H + h0 + h) * s.K * s.V : nullptr, s);
  }
  const long b = call.batch(n), start = call.begin(n), length = call.length(n);
  for (long t = 0; t < std::max(1L, length); t += C)
    for (int h = 0; h < heads; h++) {
      if (call.save && t % TOKENS == 0)
        std::memcpy(call.save + call.saved_at(n, t / TOKENS, h0 + h), S[h],
                    s.state() * sizeof(float));
      if (!length) continue;
      open_chunk(c, call, b, start + t, h0 + h, std::min((long)C, length - t));
      const int next_h = (h + 1) % heads;
      const long next = next_h ? t : t + C;
      const int rows = std::min((long)C, length - next);
      ahead->clear();
      for (int i = 0; i < s.queries; i++)
        want(call.o, b, start + t, (h0 + h) * s.queries + i, c.rows, s.V);
      want_keys(call, b, start + next, h0 + next_h, rows);
      want_queries(call, b, start + next, h0 + next_h, rows);
      ahead->over(90);
      c.begin(S[h]);
      for (int i = 0; i < s.queries; i++) {
        const long head = (h0 + h) * s.queries + i;
        open_query(c, call, b, start + t, head);
        c.output(S[h]);
        unpack(call.o, b, start + t, head, s.by_value ? c.dx : c.dw, s.by_value ? c.D1 : c.ld,
               c.rows, s.V);
      }
      c.advance(S[h]);
    }
  for (int h = 0; h < heads; h++)
    write_state(call.state + (n * call.H + h0 + h) * s.K * s.V, S[h], s);
}

void backward_chunk(Chunk& c, const Call& call, const float* S, float* dS, long b, long t, long h) {
  const Shape& s = c.shape;
  c.begin_backward(S, dS);
  for (int i = 0; i < s.queries; i++) {
    const long head = h * s.queries + i;
    open_query(c, call, b, t, head);
    pack(s.by_value ? c.x : c.w, s.by_value ? c.D1 : c.ld, call.grad_o, b, t, head, c.rows, c.m,
         s.V);
    c.query_backward(S, dS, false);
    unpack(call.dq, b, t, head, s.by_value ? c.dw : c.dx, s.by_value ? c.ld : c.D1, c.rows, s.K,
           call.scale);
  }
  if (s.delta) {
    c.solve_backward(S, dS);
    unpack(call.dbeta, b, t, h, c.dbeta, 1, c.rows, 1);
  }
  unpack(s.by_value ? call.dv : call.dk, b, t, h, c.dy, c.D1, c.rows, c.D1);
  unpack(s.by_value ? call.dk : call.dv, b, t, h, c.du, c.ld, c.rows, c.D2);
  if (s.gate != Gate::none) {
    const int features = s.gate == Gate::vector ? c.D1 : 1;
    c.gate_backward();
    unpack(call.dg, b, t, h, c.dg, features, c.rows, features);
  }
}

void backward_heads(const Call& call, Arena& arena, long n, long h0, int heads) {
  const Shape& s = call.shape;
  arena.reset();
  Chunk c(s, arena);
  float *S[SEGMENT], *y[SEGMENT], *u[SEGMENT], *E[SEGMENT], *B[SEGMENT], *dS[HEADS];
  for (int i = 0; i < SEGMENT; i++) {
    S[i] = arena.take(s.state());
    y[i] = arena.take(C * s.D1()), u[i] = arena.take(C * s.ld());
    E[i] = arena.take(C * s.ld()), B[i] = arena.take(C * C);
  }
  for (int h = 0; h < heads; h++) {
    dS[h] = arena.take(s.state());
    const long at = (n * call.H + h0 + h) * s.K * s.V;
    read_state(dS[h], call.grad_state ? call.grad_state + at : nullptr, s);
  }
  const long b = call.batch(n), start = call.begin(n), length = call.length(n);
  for (long segment = Call::segments_of(length) - 1; segment >= 0; segment--)
    for (int h = 0; h < heads; h++) {
      const long first = segment * TOKENS, end = std::min(length, first + TOKENS);
      const int chunks = (end - first + C - 1) / C;
      auto open = [&](int i, auto how) {
        const long t = first + i * C;
        c.y = y[i], c.u = u[i], c.E = E[i], c.B = B[i];
        how(c, call, b, start + t, h0 + h, std::min((long)C, end - t));
      };
      std::memcpy(S[0], call.saved + call.saved_at(n, segment, h0 + h), s.state() * sizeof(float));
      for (int i = 0; i < chunks; i++) {
        open(i, open_chunk);
        if (s.delta) c.turn_keys(), c.solve(S[i]);
        if (i + 1 == chunks) break;
        std::memcpy(S[i + 1], S[i], s.state() * sizeof(float));
        ahead->clear();
        const long later = first + (i + 1) * C;
        const int rows = std::min((long)C, end - later);
        want_keys(call, b, start + later, h0 + h, rows);
        if (i + 2 == chunks) want_queries(call, b, start + later, h0 + h, rows);
        ahead->over(40);
        c.advance(S[i + 1]);
      }
      for (int i = chunks - 1; i >= 0; i--) {
        if (i + 1 < chunks) open(i, open_gate);
        const long t = first + i * C;
        ahead->clear();
        for (int query = 0; query < s.queries; query++)
          want(call.dq, b, start + t, (h0 + h) * s.queries + query, c.rows, s.K);
        want(call.dk, b, start + t, h0 + h, c.rows, s.K);
        want(call.dv, b, start + t, h0 + h, c.rows, s.V);
        if (s.gate == Gate::vector) want(call.dg, b, start + t, h0 + h, c.rows, s.D1());
        if (i) {
          want_queries(call, b, start + t - C, h0 + h, C);
        } else if (h + 1 < heads || segment) {
          const int next_h = (h + 1) % heads;
          const long next = next_h ? first : first - TOKENS;
          want_keys(call, b, start + next, h0 + next_h, std::min((long)C, length - next));
        }
        ahead->over(200);
        backward_chunk(c, call, S[i], dS[h], b, start + t, h0 + h);
      }
    }
  if (call.grad_initial)
    for (int h = 0; h < heads; h++)
      write_state(call.grad_initial + (n * call.H + h0 + h) * s.K * s.V, dS[h], s);
}

template <typename Function>
void for_heads(const Call& call, Function function) {
  const long N = call.sequences(), tokens = std::max(1L, call.B * call.T / std::max(1L, N));
  const long grain = std::max(1L, 256 / tokens);  // short sequences are not worth a thread each
  at::parallel_for(0, N * call.H, grain, [&](int64_t begin, int64_t end) {
    static thread_local Arena arena;
    FlushDenormals flush;
    Ahead soon;
    for (long task = begin; task < end;) {
      const long n = task / call.H, h = task % call.H;
      const int heads = std::min({(long)HEADS, call.H - h, (long)end - task});
      function(call, arena, n, h, heads);
      task += heads;
    }
  });
}

// what forward and backward share of their arguments: q, k, v, g, beta, cu_seqlens, by_value, scale
Call read_call(PyObject* const* args) {
  Call call{};
  const at::Tensor &q = *tensor(args[0]), &k = *tensor(args[1]), &v = *tensor(args[2]);
  const at::Tensor *g = tensor(args[3]), *cu = tensor(args[5]);
  call.B = k.size(0), call.T = k.size(1), call.H = k.size(2);
  Shape& s = call.shape;
  s.K = k.size(3), s.V = v.size(3), s.queries = q.size(2) / std::max(1L, call.H);
  s.gate = !g ? Gate::none : g->dim() == 3 ? Gate::scalar : Gate::vector;
  s.by_value = s.gate == Gate::vector && PyObject_IsTrue(args[6]);
  s.delta = args[4] != Py_None;
  call.q = View(q), call.k = View(k), call.v = View(v), call.g = view(args[3]);
  call.beta = view(args[4]);
  call.scale = PyFloat_AsDouble(args[7]);
  if (cu) {
    const int64_t* p = cu->data_ptr<int64_t>();
    call.bounds.assign(p, p + cu->numel());
    long total = 0;
    for (size_t n = 0; n + 1 < call.bounds.size(); n++) {
      call.segments.push_back(total);
      total += Call::segments_of(p[n + 1] - p[n]);
    }
  }
  return call;
}
float* floats(PyObject* object) {
  return object == Py_None ? nullptr : tensor(object)->data_ptr<float>();
}
float* saved_states(PyObject* object, const Call& call) {
  if (object != Py_None && tensor(object)->numel() < call.saved_room())
    throw std::logic_error("no room for the saved states");
  return floats(object);
}

constexpr int SHARED = 8;  // arguments of read_call

// forward(*shared, initial_state, o, state, saved)
PyObject* forward(PyObject* const* args, Py_ssize_t) {
  Call call = read_call(args);
  args += SHARED;
  call.initial = floats(args[0]), call.o = view(args[1]);
  call.state = floats(args[2]), call.save = saved_states(args[3], call);
  for (int i : {1, 3}) huge_pages(args[i]);
  {
    WithoutPython meanwhile;
    for_heads(call, forward_heads);
  }
  Py_RETURN_NONE;
}

// backward(*shared, saved, grad_o, grad_state, dq, dk, dv, dg, dbeta, dinitial)
PyObject* backward(PyObject* const* args, Py_ssize_t) {
  Call call = read_call(args);
  args += SHARED;
  call.saved = saved_states(args[0], call);
  call.grad_o = view(args[1]), call.grad_state = floats(args[2]);
  call.dq = view(args[3]), call.dk = view(args[4]), call.dv = view(args[5]);
  call.dg = view(args[6]), call.dbeta = view(args[7]), call.grad_initial = floats(args[8]);
  for (int i = 3; i < 8; i++) huge_pages(args[i]);
  {
    WithoutPython meanwhile;
    for_heads(call, backward_heads);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void*)guarded<forward>, METH_FASTCALL, nullptr},
    {"backward", (PyCFunction)(void*)guarded<backward>, METH_FASTCALL, nullptr},
    {"step", (PyCFunction)(void*)guarded<step>, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_recurrence", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_recurrence() { return PyModule_Create(&lowline::module); }
