// Scores of a piece of a block with all that it reads, and what is made of them.
//
// A piece is c tokens of h query heads; its columns are sinks, rows and the window. Scores and
// weights are held transposed, one row per column and one lane per query, in multiples of 16: lane
// i·c + t is head i's token t.
#pragma once
#include "row_memory.h"

namespace lowline {

struct Columns {  // keys and values, so many floats apart
  const float *k, *v;
  long k_apart, v_apart, count;
};

struct Piece {
  long c, lanes, L, D, V, all = 0;
  float *q, *q_turned;            // (lanes, D) times the scale, and (D, L)
  float *weights, *total;         // exponentials, and their sum in each lane
  const Columns* columns;         // sinks, rows, and two parts of the window

  // of(lane) is a query
  template <class Of>
  Piece(long tokens, long heads, long D, long V, Of of, float scale, Arena& arena)
      : c(tokens), lanes(tokens * heads), L((lanes + 15) / 16 * 16), D(D), V(V) {
    q = turned_rows(of, D, scale, q_turned, arena);
    total = arena.take(L);
  }

  // Vectors of the lanes, times a factor: (L, n), and turned, (n, L); zero in lanes without query.
  template <class Of>
  float* turned_rows(Of of, long n, float factor, float*& turned, Arena& arena) const {
    float* rows = arena.take(L * n);
    turned = arena.take(n * L);
    for (long lane = 0; lane < lanes; lane++)
      copy_rows(rows + lane * n, n, of(lane), n, 1, n, factor);
    std::memset(rows + lanes * n, 0, sizeof(float) * (L - lanes) * n);
    transpose(turned, L, rows, n, L, n);
    return rows;
  }

  float* part(int which, float* of = nullptr) const {  // of the weights
    of = of ? of : weights;
    for (int i = 0; i < which; i++) of += columns[i].count * L;
    return of;
  }

  // The first query is at `start`, the window begins at `seen_from`; rows hold `tokens` each.
  void weigh(const Columns* read, long start, long seen_from, const float* tokens, float bias,
             Arena& arena) {
    columns = read;
    for (int i = 0; i < 4; i++) all += columns[i].count;
    weights = arena.take(all * L);
    for (int i = 0; i < 4; i++)
      multiply(part(i), L, {columns[i].k, columns[i].k_apart}, q_turned, L, columns[i].count, L, D,
               false);
    for (long r = 0; r < columns[1].count; r++)
      if (tokens[r] > 1) {
        const float more = std::log(tokens[r]) + bias;
        for (long l = 0; l < L; l++) part(1)[r * L + l] += more;
      }
    auto hide = [&](float* column, long position) {  // from queries before it
      for (long lane = 0; lane < lanes; lane++)
        if (start + lane % c < position) column[lane] = NEGATIVE;
    };
    for (long p = start + 1; p < columns[0].count; p++) hide(weights + p * L, p);
    for (long p = std::max(start + 1, seen_from); p < start + c; p++)
      hide(part(2) + (p - seen_from) * L, p);
    exponentials();
  }

  // y (lanes, n) = Σ over columns of x's lanes times what `of` returns: vectors of n, and how far
  // apart they are.
  template <class Of> void gather(float* y, float* x, long n, Of of, Arena& arena) const {
    if (lanes < 6) {  // too few for a product of matrices
      float* line = arena.take(all);
      std::memset(y, 0, sizeof(float) * lanes * n);
      for (long lane = 0; lane < lanes; lane++) {
        for (long at = 0; at < all; at++) line[at] = x[at * L + lane];
        const float* weights = line;
        for (int i = 0; i < 4; weights += columns[i++].count) {
          const auto [vectors, apart] = of(columns[i]);
          accumulate(y + lane * n, n, weights, columns[i].count,
                     [from = vectors, step = apart](long at) { return from + at * step; });
        }
      }
      return;
    }
    bool add = false;
    for (int i = 0; i < 4; i++) {
      if (!columns[i].count) continue;
      const auto [vectors, apart] = of(columns[i]);
      multiply(y, n, {part(i, x), L, true}, vectors, apart, lanes, n, columns[i].count, add);
      add = true;
    }
  }

 private:
  void exponentials() {  // less each lane's maximum
    for (long l = 0; l < L; l += W) {
      vec top = fill(NEGATIVE), sums{};
      for (long x = 0; x < all && l < lanes; x++) {
        const vec s = load(weights + x * L + l);
        top = s > top ? s : top;
      }
      for (long x = 0; x < all && l < lanes; x++) {
        float* at = weights + x * L + l;
        const vec e = exp(load(at) - top);
        store(at, e), sums += e;
      }
      store(total + l, sums);
    }
  }
};

}  // namespace lowline
