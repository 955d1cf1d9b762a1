// The gradients of window-and-rows attention over complete sequences, one head of one sequence at a
// time. `places` say where each row, and each token that left the window, went at every block: rows
// are made again from them, and their gradients go the same way back.
#pragma once
#include "row_memory_piece.h"

namespace lowline {

struct Backward {
  Tokens q, k, v, o, d_o;
  const int32_t* places;  // (N, G, blocks, R + C)
  float *dq, *dk, *dv;    // (N, T, heads, ·)
  float *d_row_k, *d_row_v;  // (N, G, R, ·): of the rows after the last token; changed
  long T, H, G, D, V, R, w, sinks, C;
  float bias, scale;

  struct Held {  // rows after a block has left the window
    float *k, *v, *tokens;
    long count;
  };

  void run(long n, long g, Arena& kept, Arena& arena) const {
    kept.reset();
    const long blocks = (T + C - 1) / C, h = H / G;
    float *keys = kept.take(T * D), *values = kept.take(T * V);
    float *d_keys = kept.take(T * D), *d_values = kept.take(T * V);
    float *d_k = d_row_k + (n * G + g) * R * D, *d_v = d_row_v + (n * G + g) * R * V;
    for (long t = 0; t < T; t++) {
      copy_rows(keys + t * D, D, k(n, t, g), D, 1, D);
      copy_rows(values + t * V, V, v(n, t, g), V, 1, V);
    }
    std::memset(d_keys, 0, sizeof(float) * T * D);
    std::memset(d_values, 0, sizeof(float) * T * V);
    std::vector<Held> rows{{nullptr, nullptr, nullptr, 0}};  // before each block, and at the end
    for (long b = 0; b < blocks; b++)
      rows.push_back(after(rows.back(), b, places + ((n * G + g) * blocks + b) * (R + C), keys,
                           values, kept));
    for (long b = blocks - 1; b >= 0; b--) {
      arena.reset();
      const long start = b * C, c = std::min(C, T - start), stop = start + c;
      const long seen_from = std::min(std::max(start + C - w, sinks), stop);
      const Held& held = rows[b + 1];
      const Columns columns[] = {{keys, values, D, V, std::min(sinks, stop)},
                                 {held.k, held.v, D, V, held.count},
                                 {keys + seen_from * D, values + seen_from * V, D, V,
                                  stop - seen_from},
                                 {nullptr, nullptr, D, V, 0}};
      auto token = [&](const Tokens& x) {
        return [&, x](long lane) { return x(n, start + lane % c, g * h + lane / c); };
      };
      Piece piece(c, h, D, V, token(q), scale, arena);
      piece.weigh(columns, start, seen_from, held.tokens, bias, arena);
      const long L = piece.L;
      float *turned, *d_rows = piece.turned_rows(token(d_o), V, 1, turned, arena);
      float *inverse = arena.take(L), *delta = arena.take(L), *d_q = arena.take(L * D);
      float* d_scores = arena.take(piece.all * L);
      std::memset(inverse, 0, sizeof(float) * L), std::memset(delta, 0, sizeof(float) * L);
      for (long lane = 0; lane < piece.lanes; lane++) {
        inverse[lane] = 1 / piece.total[lane];
        delta[lane] = dot(d_rows + lane * V, token(o)(lane), V);
      }
      for (int i = 0; i < 3; i++)
        multiply(piece.part(i, d_scores), L, {columns[i].v, V}, turned, L, columns[i].count, L, V,
                 false);
      for (long x = 0; x < piece.all; x++)
        for (long l = 0; l < L; l += W) {
          float *p = piece.weights + x * L + l, *d = d_scores + x * L + l;
          const vec weight = load(p) * load(inverse + l);
          store(p, weight), store(d, weight * (load(d) - load(delta + l)));
        }
      piece.gather(d_q, d_scores, D, [&](const Columns& x) { return std::pair(x.k, x.k_apart); },
                   arena);
      for (long lane = 0; lane < piece.lanes; lane++)
        copy_rows(dq + ((n * T + start + lane % c) * H + g * h + lane / c) * D, D, d_q + lane * D,
                  D, 1, D, scale);
      float* to_k[] = {d_keys, d_k, d_keys + seen_from * D};
      float* to_v[] = {d_values, d_v, d_values + seen_from * V};
      for (int i = 0; i < 3; i++) {
        const int count = columns[i].count;
        multiply(to_k[i], D, {piece.part(i, d_scores), L}, piece.q, D, count, D, L, true);
        multiply(to_v[i], V, {piece.part(i), L}, d_rows, V, count, V, L, true);
      }
      go_back(rows[b], held, b, places + ((n * G + g) * blocks + b) * (R + C), d_k, d_v, d_keys,
              d_values, arena);
    }
    for (long t = 0; t < T; t++) {
      copy_rows(dk + ((n * T + t) * G + g) * D, D, d_keys + t * D, D, 1, D);
      copy_rows(dv + ((n * T + t) * G + g) * V, V, d_values + t * V, V, 1, V);
    }
  }

 private:
  // The tokens that leave the window where block b begins.
  std::pair<long, long> leaving(long b) const {
    const long first = std::max(b * C - w, sinks);
    return {first, std::max(b * C + C - w, first)};
  }

  Held after(const Held& before, long b, const int32_t* place, const float* keys,
             const float* values, Arena& kept) const {
    const auto [first, end] = leaving(b);
    if (first == end) return before;
    const long P = before.count + end - first;
    Held now{kept.take(R * D), kept.take(R * V), kept.take(R), 0};
    std::memset(now.k, 0, sizeof(float) * R * D), std::memset(now.v, 0, sizeof(float) * R * V);
    std::fill_n(now.tokens, R, 0.0f);
    auto tokens = [&](long p) { return p < before.count ? before.tokens[p] : 1; };
    for (long p = 0; p < P; p++)
      if (place[p] >= 0)
        now.tokens[place[p]] += tokens(p), now.count = std::max(now.count, place[p] + 1L);
    for (long p = 0; p < P; p++) {
      if (place[p] < 0) continue;
      const long t = first + p - before.count;
      const float share = tokens(p) / now.tokens[place[p]];
      add(now.k + place[p] * D, p < before.count ? before.k + p * D : keys + t * D, share, D);
      add(now.v + place[p] * V, p < before.count ? before.v + p * V : values + t * V, share, V);
    }
    return now;
  }

  // From the gradients of the rows after block b to those of the rows before it and of tokens.
  void go_back(const Held& before, const Held& now, long b, const int32_t* place, float* d_k,
               float* d_v, float* d_keys, float* d_values, Arena& arena) const {
    const auto [first, end] = leaving(b);
    if (first == end) return;
    float *old_k = arena.take(R * D), *old_v = arena.take(R * V);
    std::memset(old_k, 0, sizeof(float) * R * D), std::memset(old_v, 0, sizeof(float) * R * V);
    for (long p = 0; p < before.count + end - first; p++) {
      if (place[p] < 0) continue;
      const bool row = p < before.count;
      const long t = first + p - before.count;
      const float share = (row ? before.tokens[p] : 1) / now.tokens[place[p]];
      add(row ? old_k + p * D : d_keys + t * D, d_k + place[p] * D, share, D);
      add(row ? old_v + p * V : d_values + t * V, d_v + place[p] * V, share, V);
    }
    std::memcpy(d_k, old_k, sizeof(float) * R * D), std::memcpy(d_v, old_v, sizeof(float) * R * V);
  }

  static void add(float* to, const float* x, float factor, long n) {
    for (long i = 0; i < n; i += W) store(to + i, load(to + i) + load(x + i) * factor);
  }
};

}  // namespace lowline
