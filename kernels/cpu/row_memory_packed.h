// A head of a packed state (`lowline.kernels.memory.int8`) as a memory in fp32 of its own, and back.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "row_memory.h"

namespace lowline {

constexpr float LEVELS = 127;
constexpr uint32_t LOST_BITS = 0x7f;  // of the scale, so that each product with a level is exact

inline void pack_row(int8_t* to, const float* x, long n) {
  float most = 0, scale;
  for (long i = 0; i < n; i++) {
    const float a = std::fabs(x[i]);
    most = a > most || a != a ? a : most;
  }
  scale = most / LEVELS;
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits), bits &= ~LOST_BITS, std::memcpy(&scale, &bits, sizeof bits);
  const bool counts = scale > 0 && scale <= std::numeric_limits<float>::max();
  for (long i = 0; i < n; i++)
    to[i] = counts ? (int8_t)std::min(LEVELS, std::max(-LEVELS, std::nearbyint(x[i] / scale))) : 0;
  if (!(scale <= std::numeric_limits<float>::max())) scale = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(to + n, &scale, SCALE_BYTES);
}
inline float scale_of(const int8_t* x, long n) {
  float scale;
  std::memcpy(&scale, x + n, SCALE_BYTES);
  return scale;
}
inline void unpack_row(float* to, const int8_t* x, long n) {
  const float scale = scale_of(x, n);
  for (long i = 0; i < n; i++) to[i] = x[i] * scale;
}

// Packed keys and values that a token sees, and the number of those before them.
struct PackedColumns {
  const int8_t *k, *v;
  long k_apart, v_apart, count, first;
};

// weights[j·width + column] = q_j·k of N queries.
template <int N>
inline void score_packed(float* weights, long width, const float* q, long D, const PackedColumns& x) {
  weights += x.first;
  for (long i = 0; i < x.count; i++) {
    const int8_t* k = x.k + i * x.k_apart;
    vec total[N]{};
    for (long d = 0; d < D; d += W) {
      const vec wide = load(k + d);
      for (int j = 0; j < N; j++) total[j] += wide * load(q + j * D + d);
    }
    const float scale = scale_of(k, D);
    for (int j = 0; j < N; j++) weights[j * width + i] = sum(total[j]) * scale;
  }
}

// y_j += Σ weights[j·width + column]·v of N queries.
template <int N>
inline void gather_packed(float* y, long V, const float* weights, long width, const PackedColumns& x) {
  weights += x.first;
  auto run = [&](auto count, long e) {
    constexpr int M = decltype(count)::value;
    vec total[N][M];
    for (int j = 0; j < N; j++)
      for (int m = 0; m < M; m++) total[j][m] = load(y + j * V + e + m * W);
    for (long i = 0; i < x.count; i++) {
      const int8_t* v = x.v + i * x.v_apart;
      const float scale = scale_of(v, V);
      for (int m = 0; m < M; m++) {
        const vec wide = load(v + e + m * W);
        for (int j = 0; j < N; j++) total[j][m] += wide * (weights[j * width + i] * scale);
      }
    }
    for (int j = 0; j < N; j++)
      for (int m = 0; m < M; m++) store(y + j * V + e + m * W, total[j][m]);
  };
  long e = 0;
  for (; e + 4 * W <= V; e += 4 * W) run(std::integral_constant<int, 4>{}, e);
  for (; e < V; e += W) run(std::integral_constant<int, 1>{}, e);
}

// Calls work(how many, first) for all of `lanes`, at most 4 at once.
template <class Work> inline void by_few(long lanes, Work work) {
  long j = 0;
  for (; j + 4 <= lanes; j += 4) work(std::integral_constant<int, 4>{}, j);
  if (lanes - j == 3) work(std::integral_constant<int, 3>{}, j);
  if (lanes - j == 2) work(std::integral_constant<int, 2>{}, j);
  if (lanes - j == 1) work(std::integral_constant<int, 1>{}, j);
}

// Rows of n features in a packed tensor, `apart` from each other, and in fp32.
struct PackedRows {
  int8_t* packed = nullptr;
  float* wide = nullptr;
  long n = 0, apart = 0;

  // Of page and head of a tensor (pages, slots, heads, ·), or (pages, heads, slots, ·).
  PackedRows(const at::Tensor& t, long page, long head, bool heads_first, Arena& arena) {
    const long slots = t.size(heads_first ? 2 : 1), heads = t.size(heads_first ? 1 : 2);
    const long bytes = t.size(3);
    n = bytes - SCALE_BYTES, apart = heads_first ? bytes : heads * bytes;
    packed = Paged<int8_t>(t)[page] + head * (heads_first ? slots * bytes : bytes);
    wide = arena.take(slots * n);
  }
  void unpack(long slots) const {
    for (long s = 0; s < slots; s++) unpack_row(wide + s * n, packed + s * apart, n);
  }
  void pack(long slot) const { pack_row(packed + slot * apart, wide + slot * n, n); }
};

class Unpacked {
  const Memory& whole;
  long page, head, first;
  Arena& arena;
  PackedRows k, v, sink_k, sink_v, row_k, row_v;

  PackedRows of(int i, bool heads_first = false) {
    return {whole.at(i), page, head, heads_first, arena};
  }
  PackedRows of_rows(int i) { return whole.R ? of(i, true) : k; }

 public:
  Memory memory;  // of one head, whatever the page

  Unpacked(const Memory& x, long page, long head, Arena& arena)
      : whole(x), page(page), head(head), first(x.length(page)), arena(arena), k(of(0)), v(of(1)),
        sink_k(of(3)), sink_v(of(4)), row_k(of_rows(5)), row_v(of_rows(6)), memory(x) {
    const long w = x.w, R = x.R, held = std::min(first, w), early = std::min(first, x.sinks);
    k.unpack(held), v.unpack(held), sink_k.unpack(early), sink_v.unpack(early);
    memory.G = 1, memory.lengths = {x.lengths[page], 0};
    memory.k = {k.wide, 0}, memory.v = {v.wide, 0};
    memory.sink_k = {sink_k.wide, 0}, memory.sink_v = {sink_v.wide, 0};
    if (!R) return;
    memory.row_tokens = {x.row_tokens[page] + head * R, 0};
    memory.row_received = {x.row_received[page] + head * R, 0};
    memory.q_energy = {x.q_energy[page] + head * x.D / 2, 0};
    memory.v_energy = {x.v_energy[page] + head, 0};
    memory.row_k = {row_k.wide, 0}, memory.row_v = {row_v.wide, 0};
    const long rows = HeadRows(memory, 0, 0).held;
    row_k.unpack(rows), row_v.unpack(rows);
    memory.received = {arena.take(w), 0};
    for (long s = 0; s < w; s++) memory.received[0][s] = x.ring_received(page, s, head);
  }

  // What changed with T tokens; whether rows did.
  void pack(long T, bool rows_changed) const {
    const long end = first + T, w = whole.w;
    for (long p = std::max(first, end - w); p < end; p++) k.pack(p % w), v.pack(p % w);
    for (long p = first; p < std::min(end, whole.sinks); p++) sink_k.pack(p), sink_v.pack(p);
    if (!whole.R) return;
    for (long s = 0; s < w; s++) whole.ring_received(page, s, head) = memory.received[0][s];
    if (!rows_changed) return;
    const long rows = HeadRows(memory, 0, 0).held;
    for (long r = 0; r < rows; r++) row_k.pack(r), row_v.pack(r);
  }
};

}  // namespace lowline
