// Window-and-rows attention in fp32: tokens enter states, which change in place; and its gradients.
// The formula is that of `lowline.kernels.memory.op`.
//
// Heads of several sizes are several groups of one call, each with a state. D, V: multiples of 16.
#include <array>

#include "row_memory_backward.h"
#include "row_memory_packed.h"

namespace lowline {
namespace {

struct Rule {  // of all groups
  long block;
  float keeps, bias, scale;
};

// Some key/value heads of the call, and their state.
struct Group {
  Memory state;
  std::vector<long> heads;
  long exact;
  int32_t* places = nullptr;  // (N, G, blocks, R + block): see `Choice`; null where not kept
};

struct KeysOrValues : Tokens {
  using Tokens::Tokens;

  // Keeps those of one head alone, as they are after packing.
  void round(long sequence, long T, long head, long features, Arena& arena) {
    float* rounded = arena.take(T * features);
    std::vector<int8_t> packed(features + SCALE_BYTES);
    for (long i = 0; i < T; i++) {
      pack_row(packed.data(), (*this)(sequence, i, head), features);
      unpack_row(rounded + i * features, packed.data(), features);
    }
    at = rounded, n = h = 0, t = features;
  }
};

struct Call {
  Tokens q;
  KeysOrValues k, v;
  const Pages& pages;
  float* out;
  long T, H, h;  // h query heads of a key/value head
  Rule rule;

  // All tokens of head i of a group, in sequence n.
  void run(const Group& group, long n, long i, Arena& arena) const {
    const Memory& x = group.state;
    if (!x.packed) return run(x, group, n, i, group.heads[i], arena);
    if (T == 1) return step_packed(group, n, i, arena);
    static thread_local Arena kept;
    kept.reset();
    const Unpacked head(x, pages[n], i, kept);
    Call rounded = *this;
    rounded.k.round(n, T, group.heads[i], x.D, kept);
    rounded.v.round(n, T, group.heads[i], x.V, kept);
    const long first = x.length(pages[n]), C = rule.block;
    rounded.run(head.memory, group, n, 0, group.heads[i], arena);
    head.pack(T, (first + C - 1) / C * C < first + T);
  }

  // Whether tokens leave the window for the rows where the token at a position enters.
  bool rows_change(const Memory& x, long position) const {
    const long left = position + rule.block - x.w;  // the first that stays
    return x.R && position % rule.block == 0 && left > std::max(position - x.w, x.sinks);
  }

  // The same of a packed head, of which no row is a mean.
  void let_leave_packed(const Group& group, long page, long i, long position, Arena& arena) const {
    static thread_local Choice choice;
    const Memory& x = group.state;
    const HeadRows of_head(x, page, i);
    const long held = of_head.held, oldest = std::max(position - x.w, x.sinks);
    choice.rows.clear();
    for (long r = 0; r < held; r++)
      choice.rows.push_back({nullptr, nullptr, of_head.received[r], of_head.tokens[r]});
    for (long p = oldest; p < position + rule.block - x.w; p++)
      choice.rows.push_back({nullptr, nullptr, x.ring_received(page, p % x.w, i), 1});
    choice.choose(x.R, group.exact, nullptr, 0, position, x.D, x.V, arena);
    for (int t : {0, 1}) {
      const long size = (t ? x.V : x.D) + SCALE_BYTES, total = choice.places.size();
      const int8_t* ring = Paged<int8_t>(x.at(t))[page] + i * size;
      int8_t* rows = Paged<int8_t>(x.at(5 + t))[page] + i * x.R * size;
      for (long r = 0; r < total; r++) {  // none lies before its place
        const long to = choice.places[r], slot = (oldest + r - held) % x.w;
        if (to < 0 || (to == r && r < held)) continue;
        std::memcpy(rows + to * size, r < held ? rows + r * size : ring + slot * x.G * size, size);
      }
    }
    for (size_t r = 0; r < choice.rows.size(); r++)
      of_head.received[r] = choice.rows[r].received, of_head.tokens[r] = choice.rows[r].tokens;
  }

  // One token of head i of a packed state, which is read where it lies, in sequence n.
  void step_packed(const Group& group, long n, long i, Arena& arena) const {
    const Memory& x = group.state;
    const long D = x.D, V = x.V, page = pages[n], g = group.heads[i], position = x.length(page);
    const long k_apart = x.G * (D + SCALE_BYTES), v_apart = x.G * (V + SCALE_BYTES);
    arena.reset();
    auto ring = [&](int t, long apart) { return Paged<int8_t>(x.at(t))[page] + i * (apart / x.G); };
    auto rows = [&](int t, long size) { return Paged<int8_t>(x.at(t))[page] + i * x.R * size; };
    int8_t *ring_k = ring(0, k_apart), *ring_v = ring(1, v_apart);
    int8_t *sink_k = ring(3, k_apart), *sink_v = ring(4, v_apart);
    if (rows_change(x, position)) let_leave_packed(group, page, i, position, arena);
    const long slot = position % x.w;
    pack_row(ring_k + slot * k_apart, k(n, 0, g), D), pack_row(ring_v + slot * v_apart, v(n, 0, g), V);
    if (position < x.sinks) {
      std::memcpy(sink_k + position * k_apart, ring_k + slot * k_apart, D + SCALE_BYTES);
      std::memcpy(sink_v + position * v_apart, ring_v + slot * v_apart, V + SCALE_BYTES);
    }

    const long block = x.R ? rule.block : 1, begin = position / block * block, end = position + 1;
    const long from = std::min(std::max(begin + block - x.w, x.sinks), end), near = end - from;
    const long held = x.R ? HeadRows(x, page, i).held : 0, oldest = from % x.w;
    const long early = std::min(x.sinks, end), before = std::min(near, x.w - oldest);
    const int8_t *row_k = held ? rows(5, D + SCALE_BYTES) : nullptr;
    const int8_t *row_v = held ? rows(6, V + SCALE_BYTES) : nullptr;
    const PackedColumns columns[] = {
        {sink_k, sink_v, k_apart, v_apart, early, 0},
        {row_k, row_v, D + SCALE_BYTES, V + SCALE_BYTES, held, early},
        {ring_k + oldest * k_apart, ring_v + oldest * v_apart, k_apart, v_apart, before, early + held},
        {ring_k, ring_v, k_apart, v_apart, near - before, early + held + before}};
    const long all = early + held + near, width = (all + W - 1) / W * W;
    float *queries = arena.take(h * D), *weights = arena.take(h * width), *y = arena.take(h * V);
    for (long j = 0; j < h; j++)
      for (long d = 0; d < D; d++) queries[j * D + d] = q(n, 0, g * h + j)[d] * rule.scale;
    std::memset(y, 0, sizeof(float) * h * V);
    by_few(h, [&](auto few, long j) {
      for (const PackedColumns& part : columns)
        score_packed<decltype(few)::value>(weights + j * width, width, queries + j * D, D, part);
    });
    for (long j = 0; j < h; j++) {
      float* line = weights + j * width;
      std::fill(line + all, line + width, NEGATIVE);
      vec top = fill(NEGATIVE), total{};
      for (long c = 0; c < width; c += W) {
        const vec score = load(line + c);
        top = score > top ? score : top;
      }
      for (int half = W / 2; half; half /= 2) {
        const vec other = exchanged(top, half);
        top = other > top ? other : top;
      }
      for (long c = 0; c < width; c += W) {
        const vec weight = exp(load(line + c) - top);
        store(line + c, weight), total += weight;
      }
      const float share = 1 / sum(total);
      for (long c = 0; c < width; c += W) store(line + c, load(line + c) * share);
    }
    by_few(h, [&](auto few, long j) {
      for (const PackedColumns& part : columns)
        gather_packed<decltype(few)::value>(y + j * V, V, weights + j * width, width, part);
    });
    std::memcpy(out + (n * H + g * h) * V, y, sizeof(float) * h * V);
    if (!x.R) return;

    auto received = [&](long column) {
      float total = 0;
      for (long j = 0; j < h; j++) total += weights[j * width + column];
      return total;
    };
    x.ring_received(page, slot, i) = 0;
    for (long r = 0; r < held; r++) {
      float& of_row = x.row_received[page][i * x.R + r];
      of_row = rule.keeps * of_row + received(early + r);
    }
    for (long s = 0; s < x.w; s++) x.ring_received(page, s, i) *= rule.keeps;
    for (long c = early + held, s = oldest; c < all; c++, s = s + 1 == x.w ? 0 : s + 1)
      x.ring_received(page, s, i) += received(c);
    float *energy = x.q_energy[page] + i * D / 2, *value = arena.take(V);
    for (long j = 0; j < h; j++)
      for (long d = 0; d < D / 2; d++) {
        const float a = queries[j * D + d], b = queries[j * D + D / 2 + d];
        energy[d] += (a * a + b * b) / 2;
      }
    unpack_row(value, ring_v + slot * v_apart, V);
    x.v_energy[page][i] += dot(value, value, V);
  }

  // The same where head g of the tokens is head i of the state.
  void run(const Memory& x, const Group& group, long n, long i, long g, Arena& arena) const {
    static thread_local Choice choice;
    const long page = pages[n], first = x.length(page), end = first + T;
    const long C = x.R ? rule.block : 1;  // without rows the window moves by a token
    for (long start = first, stop; start < end; start = stop) {
      arena.reset();
      const long begin = start / C * C, seen_from = std::max(begin + C - x.w, x.sinks);
      stop = std::min(begin + C, end);
      if (start == begin && x.R) {
        HeadRows of_head(x, page, i);
        choice.rows.clear();
        for (long r = 0; r < of_head.held; r++) choice.rows.push_back(of_head[r]);
        for (long p = std::max(begin - x.w, x.sinks); p < begin + C - x.w; p++) {
          const long slot = p % x.w;
          choice.rows.push_back(
              {x.ring_k(page, slot, i), x.ring_v(page, slot, i), x.ring_received(page, slot, i), 1});
        }
        if ((long)choice.rows.size() > of_head.held) {
          choice.choose(x.R, group.exact, x.q_energy[page] + i * x.D / 2,
                        x.v_energy[page][i], begin, x.D, x.V, arena);
          of_head.set(choice.rows);
          if (group.places) {
            const long blocks = (T + C - 1) / C, at = (n * x.G + i) * blocks + begin / C;
            std::copy(choice.places.begin(), choice.places.end(), group.places + at * (x.R + C));
          }
        }
      }
      for (long p = start; p < stop; p++) {
        x.keep(page, i, p, k(n, p - first, g), v(n, p - first, g));
        if (x.R) x.ring_received(page, p % x.w, i) = 0;
      }
      read(x, n, i, g, start, stop, std::min(seen_from, stop), arena);
    }
  }

  // The outputs of the tokens [start, stop) of a block, which the window holds already.
  void read(const Memory& x, long n, long i, long g, long start, long stop, long seen_from,
            Arena& arena) const {
    const long D = x.D, V = x.V, c = stop - start, page = pages[n], first = x.length(page);
    const long held = x.R ? HeadRows(x, page, i).held : 0;
    auto of_head = [&](const Paged<float>& of_rows, long size) {
      return x.R ? of_rows[page] + i * size : nullptr;
    };
    const float* row_tokens = of_head(x.row_tokens, x.R);
    const long slot = seen_from % x.w, near = stop - seen_from, before = std::min(near, x.w - slot);
    const Columns columns[] = {
        {x.first_k(page, 0, i), x.first_v(page, 0, i), x.G * D, x.G * V, std::min(x.sinks, stop)},
        {of_head(x.row_k, x.R * D), of_head(x.row_v, x.R * V), D, V, held},
        {x.ring_k(page, slot, i), x.ring_v(page, slot, i), x.G * D, x.G * V, before},
        {x.ring_k(page, 0, i), x.ring_v(page, 0, i), x.G * D, x.G * V, near - before}};
    auto query = [&](long lane) { return q(n, start - first + lane % c, g * h + lane / c); };
    Piece piece(c, h, D, V, query, rule.scale, arena);
    piece.weigh(columns, start, seen_from, row_tokens, rule.bias, arena);
    float *y = arena.take(piece.lanes * V), *total = piece.total;
    piece.gather(y, piece.weights, V,
                 [](const Columns& from) { return std::pair(from.v, from.v_apart); }, arena);
    for (long lane = 0; lane < piece.lanes; lane++)
      copy_rows(out + ((n * T + start - first + lane % c) * H + g * h + lane / c) * V, V,
                y + lane * V, V, 1, V, 1 / total[lane]);
    if (!x.R) return;

    // What was received: weights over their totals, faded to the end of the piece.
    const long L = piece.L, few = (piece.lanes + W - 1) / W * W;
    std::memset(total + piece.lanes, 0, sizeof(float) * (L - piece.lanes));
    for (long lane = 0; lane < piece.lanes; lane++)
      total[lane] = std::pow(rule.keeps, float(c - 1 - lane % c)) / total[lane];
    const float fade = std::pow(rule.keeps, float(c));
    float* received = of_head(x.row_received, x.R);
    for (long r = 0; r < held; r++)
      received[r] = fade * received[r] + dot(piece.part(1) + r * L, total, few);
    for (long s = 0; s < x.w; s++) x.ring_received(page, s, i) *= fade;
    const float* weights = piece.part(2);
    for (long p = seen_from, s = slot; p < stop; p++, s = s + 1 == x.w ? 0 : s + 1, weights += L)
      x.ring_received(page, s, i) += dot(weights, total, few);
    float* energy = of_head(x.q_energy, D / 2);
    for (long lane = 0; lane < piece.lanes; lane++)
      for (long d = 0; d < D / 2; d++) {
        const float a = piece.q[lane * D + d], b = piece.q[lane * D + D / 2 + d];
        energy[d] += (a * a + b * b) / 2;
      }
    for (long t = start - first; t < stop - first; t++)
      x.v_energy[page][i] += dot(v(n, t, g), v(n, t, g), V);
  }
};

const at::Tensor& item(PyObject* tuple, int i) { return *tensor(PyTuple_GET_ITEM(tuple, i)); }

// Whether tokens, (B, T, heads, features), and groups are fp32, lie as `Call` reads them and fit
// each other.
bool covers(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, PyObject* groups,
            long block, long pool) {
  for (const at::Tensor* x : {&q, &k, &v})
    if (x->scalar_type() != at::kFloat || x->dim() != 4 || x->stride(3) != 1) return false;
  const long N = q.size(0), D = q.size(3), G = k.size(2), V = v.size(3);
  using Sizes = at::IntArrayRef;
  if (k.sizes() != Sizes{N, q.size(1), G, D} || v.sizes() != Sizes{N, q.size(1), G, V} || !G ||
      q.size(2) % G || D % 16 || V % 16)
    return false;
  const long P = pool;
  long heads = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(groups); i++) {
    PyObject* group = PyTuple_GET_ITEM(groups, i);
    PyObject *state = PyTuple_GET_ITEM(group, 0), *of_group = PyTuple_GET_ITEM(group, 1);
    if (!PyTuple_Check(state)) return false;
    const long size = PyTuple_GET_SIZE(state), g = PyTuple_GET_SIZE(of_group);
    if (size != 7 && size != 12) return false;
    const bool packed = plain(PyTuple_GET_ITEM(state, 0)) && item(state, 0).scalar_type() == at::kChar;
    const long d = D + (packed ? SCALE_BYTES : 0), e = V + (packed ? SCALE_BYTES : 0);
    for (int j = 0; j < size; j++) {
      const bool is_kv = j < 2 || j == 3 || j == 4 || (size == 12 && (j == 5 || j == 6));
      if (!plain(PyTuple_GET_ITEM(state, j)) || !has_whole_pages(item(state, j))) return false;
      if (item(state, j).scalar_type() !=
          (j == size - 1 ? at::kLong : packed && is_kv ? at::kChar : at::kFloat))
        return false;
    }
    const long w = item(state, 0).dim() == 4 ? item(state, 0).size(1) : 0;
    const long s = item(state, 3).dim() == 4 ? item(state, 3).size(1) : 0;
    auto is = [&](int j, Sizes sizes) { return item(state, j).sizes() == sizes; };
    if (!w || !is(0, {P, w, g, d}) || !is(1, {P, w, g, e}) || !is(3, {P, s, g, d}) ||
        !is(4, {P, s, g, e}) || !is(size - 1, {P}))
      return false;
    if (size == 7 && item(state, 2).numel()) return false;  // features
    if (size == 12) {
      const long R = item(state, 8).dim() == 3 ? item(state, 8).size(2) : 0;
      const long exact = PyLong_AsLong(PyTuple_GET_ITEM(group, 2));
      if (packed && exact != R) return false;
      if (!R || block < 1 || block > w || exact < 0 || exact > R || !is(2, {P, w, g}) || !is(5, {P, g, R, d}) ||
          !is(6, {P, g, R, e}) || !is(7, {P, g, R}) || !is(8, {P, g, R}) ||
          !is(9, {P, g, D / 2}) || !is(10, {P, g}))
        return false;
    }
    for (long j = 0; j < g; j++) {
      const long head = PyLong_AsLong(PyTuple_GET_ITEM(of_group, j));
      if (head < 0 || head >= G) return false;
    }
    heads += g;
  }
  return heads == G;
}

// advance(q, k, v, groups, block, keeps, bias, scale, places, rows) -> o (B, T, H, V); or None,
// nothing done, for a call that it does not cover. A group is (state, its key/value heads, exact). `places`,
// of one group without a past, is what `backward` needs, or None.
PyObject* advance(PyObject* const* args, Py_ssize_t) {
  for (int i = 0; i < 3; i++)
    if (!plain(args[i])) Py_RETURN_NONE;
  const at::Tensor &q = *tensor(args[0]), &k = *tensor(args[1]), &v = *tensor(args[2]);
  const long block = PyLong_AsLong(args[4]);
  if (!PyTuple_GET_SIZE(args[3])) Py_RETURN_NONE;
  PyObject* first = PyTuple_GET_ITEM(PyTuple_GET_ITEM(args[3], 0), 0);
  if (!PyTuple_Check(first) || !PyTuple_GET_SIZE(first)) Py_RETURN_NONE;
  PyObject* lengths = PyTuple_GET_ITEM(first, PyTuple_GET_SIZE(first) - 1);
  if (!plain(lengths) || tensor(lengths)->dim() != 1 || q.dim() != 4) Py_RETURN_NONE;
  const Pages pages(args[9], q.size(0), tensor(lengths)->size(0));
  if (!pages.valid || !covers(q, k, v, args[3], block, tensor(lengths)->size(0))) Py_RETURN_NONE;
  const at::Tensor o = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  std::vector<Group> groups;
  std::vector<std::array<long, 3>> tasks;  // group, sequence, head
  long work = 1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[3]); i++) {
    PyObject* group = PyTuple_GET_ITEM(args[3], i);
    PyObject* heads = PyTuple_GET_ITEM(group, 1);
    groups.push_back({Memory(PyTuple_GET_ITEM(group, 0)), {},
                      PyLong_AsLong(PyTuple_GET_ITEM(group, 2))});
    const Memory& x = groups.back().state;
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(heads); j++)
      groups.back().heads.push_back(PyLong_AsLong(PyTuple_GET_ITEM(heads, j)));
    for (long n = 0; n < q.size(0); n++)
      for (long j = 0; j < x.G; j++) tasks.push_back({i, n, j});
    work = std::max(work, (x.w + x.R) * (x.D + x.V) * long(q.size(1)));
  }
  if (args[8] != Py_None) groups[0].places = tensor(args[8])->data_ptr<int32_t>();
  const Call call{Tokens(&q), KeysOrValues(&k), KeysOrValues(&v), pages, o.data_ptr<float>(), q.size(1), q.size(2),
                  q.size(2) / k.size(2),
                  {block, float(PyFloat_AsDouble(args[5])), float(PyFloat_AsDouble(args[6])),
                   float(PyFloat_AsDouble(args[7]))}};
  {
    WithoutPython others;
    at::parallel_for(0, tasks.size(), std::max<int64_t>(1, TASK / work),
                     [&](int64_t from, int64_t to) {
                       static thread_local Arena arena;
                       FlushDenormals flush;
                       for (int64_t t = from; t < to; t++)
                         call.run(groups[tasks[t][0]], tasks[t][1], tasks[t][2], arena);
                     });
  }
  for (const Group& group : groups) {
    for (long page : pages.of) group.state.length(page) += call.T;
    group.state.changed();
  }
  return THPVariable_Wrap(o);
}

// backward(q, k, v, o, d_o, places, dq, dk, dv, d_row_k, d_row_v, window, sinks, block, bias,
// scale): of complete sequences. dq … d_row_v are contiguous; those of rows are given, and change.
PyObject* backward(PyObject* const* args, Py_ssize_t) {
  auto data = [&](int i) { return tensor(args[i])->data_ptr<float>(); };
  const at::Tensor &q = *tensor(args[0]), &k = *tensor(args[1]), &rows = *tensor(args[9]);
  const Backward call{Tokens(&q), Tokens(&k), Tokens(tensor(args[2])), Tokens(tensor(args[3])),
                      Tokens(tensor(args[4])), tensor(args[5])->data_ptr<int32_t>(),
                      data(6), data(7), data(8), data(9), data(10), q.size(1), q.size(2),
                      k.size(2), q.size(3), tensor(args[2])->size(3), rows.size(2),
                      PyLong_AsLong(args[11]), PyLong_AsLong(args[12]), PyLong_AsLong(args[13]),
                      float(PyFloat_AsDouble(args[14])), float(PyFloat_AsDouble(args[15]))};
  {
    WithoutPython others;
    at::parallel_for(0, q.size(0) * call.G, 1, [&](int64_t from, int64_t to) {
      Arena kept, arena;
      FlushDenormals flush;
      for (int64_t t = from; t < to; t++) call.run(t / call.G, t % call.G, kept, arena);
    });
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"advance", (PyCFunction)(void*)guarded<advance>, METH_FASTCALL, nullptr},
    {"backward", (PyCFunction)(void*)guarded<backward>, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_row_memory", nullptr, -1, methods};

}  // namespace
}  // namespace lowline

PyMODINIT_FUNC PyInit_lowline_row_memory() { return PyModule_Create(&lowline::module); }
