// The state of window-and-rows attention, and which rows stay or merge when a block of tokens
// leaves the window, by the rule of `lowline.kernels.memory.op`.
//
// Among equals the older row stays, and the pair of older rows merges. NaN counts as no attention
// received, and as the highest cost.
#pragma once
#include <cmath>
#include <numeric>

#include "window_decode.h"

namespace lowline {

constexpr long SCALE_BYTES = 4;  // of packed features, after a byte for each

// The tensors of a MemoryState; or of a WindowState without features: a memory without rows.
struct Memory : Window<float> {
  Paged<float> received, row_k, row_v, row_received, row_tokens, q_energy, v_energy;
  long R = 0;
  bool packed;  // see row_memory_packed.h: keys and values are not to be read here

  explicit Memory(PyObject* tuple) : Window(tuple), packed(at(0).scalar_type() == at::kChar) {
    if (packed) D -= SCALE_BYTES, V -= SCALE_BYTES;
    if (PyTuple_GET_SIZE(tuple) != 12) return;
    auto data = [&](int i) { return Paged<float>(at(i)); };
    received = data(2), row_k = data(5), row_v = data(6), row_received = data(7);
    row_tokens = data(8), q_energy = data(9), v_energy = data(10), R = at(8).size(2);
  }
  float& ring_received(long page, long slot, long g) const { return received[page][slot * G + g]; }
};

struct Row {
  const float *k, *v;
  float received, tokens;
};

// The rows of one head; those that hold tokens come first.
struct HeadRows {
  float *k, *v, *received, *tokens;
  long R, D, V, held = 0;

  HeadRows(const Memory& x, long page, long g) : R(x.R), D(x.D), V(x.V) {
    k = x.row_k[page] + g * R * D, v = x.row_v[page] + g * R * V;
    received = x.row_received[page] + g * R, tokens = x.row_tokens[page] + g * R;
    while (held < R && tokens[held] > 0) held++;
  }
  Row operator[](long r) const { return {k + r * D, v + r * V, received[r], tokens[r]}; }

  // HeadRows of which none lies before its place.
  void set(const std::vector<Row>& rows) {
    held = rows.size();
    for (long r = 0; r < held; r++) {
      const Row& row = rows[r];
      if (row.k != k + r * D) std::memmove(k + r * D, row.k, sizeof(float) * D);
      if (row.v != v + r * V) std::memmove(v + r * V, row.v, sizeof(float) * V);
      received[r] = row.received, tokens[r] = row.tokens;
    }
  }
};

// Chooses among rows; its vectors keep their memory between calls.
class Choice {
 public:
  std::vector<Row> rows;
  std::vector<int> places;  // of all rows before the choice: the number of the row after it, or -1

  // Leaves R rows, in the order they came. Energies are sums over `seen` tokens of the head.
  void choose(long R, long exact, const float* q_energy, float v_energy, long seen, long D, long V,
              Arena& arena) {
    const long P = rows.size();
    places.resize(P), std::iota(places.begin(), places.end(), 0);
    if (P <= R) return;
    order.resize(P), std::iota(order.begin(), order.end(), 0);
    auto rank = [&](int i) {
      return rows[i].tokens < 1.5f && rows[i].received >= 0 ? rows[i].received : -1;
    };
    std::nth_element(order.begin(), order.begin() + exact, order.end(), [&](int i, int j) {
      return rank(i) > rank(j) || (rank(i) == rank(j) && i < j);
    });
    stays.assign(P, 0);
    for (long i = 0; i < exact; i++) stays[order[i]] = 1;
    if (exact < R) {
      E = D + V;
      weight = arena.take(E);
      for (long d = 0; d < D; d++)
        weight[d] = std::sqrt(std::max(q_energy[d % (D / 2)] / seen, 1e-12f));
      std::fill_n(weight + D, V, 1 / std::sqrt(std::max(v_energy / seen, 1e-12f)));
      merge(P - R, D, V, arena);
    }
    long kept = 0;
    for (long i = 0; i < P; i++) {  // rows merge into earlier ones
      places[i] = stays[i] ? kept : places[i] < i ? places[places[i]] : -1;
      if (stays[i]) rows[kept++] = rows[i];
    }
    rows.resize(kept);
  }

 private:
  std::vector<int> order, others, nearest;
  std::vector<char> stays;
  long E, width;  // features of a row; the others' number, rounded up
  float *weight, *means, *weighed, *turned, *cost, *square;

  // Merges pairs of those that do not stay yet, until there are `excess` fewer.
  void merge(long excess, long D, long V, Arena& arena) {
    others.clear();
    for (size_t i = 0; i < rows.size(); i++)
      if (!stays[i]) others.push_back(i), stays[i] = 1;
    const long F = others.size();
    width = (F + 15) / 16 * 16;
    means = arena.take(F * E), weighed = arena.take(width * E), turned = arena.take(E * width);
    cost = arena.take(width * width), square = arena.take(width);
    float* lines = arena.take(excess * width);
    for (long f = 0; f < F; f++) {
      Row& row = rows[others[f]];
      std::memcpy(means + f * E, row.k, sizeof(float) * D);
      std::memcpy(means + f * E + D, row.v, sizeof(float) * V);
      row.k = means + f * E, row.v = means + f * E + D;
      for (long e = 0; e < E; e++) weighed[f * E + e] = means[f * E + e] * weight[e];
    }
    std::memset(weighed + F * E, 0, sizeof(float) * (width - F) * E);
    transpose(turned, width, weighed, E, width, E);
    multiply(cost, width, {weighed, E}, turned, width, width, width, E, false);
    for (long f = 0; f < width; f++) square[f] = cost[f * width + f];
    for (long i = 0; i < width; i++)
      for (long j = 0; j < width; j++)
        cost[i * width + j] =
            i < F && j < F && i != j ? price(i, j, cost[i * width + j]) : INFINITY;
    while (excess > 0) {
      find_pairs(F);
      order.resize(std::min<long>(order.size(), excess));
      for (int i : order) unite(i, nearest[i], F);
      for (size_t p = 0; p < order.size(); p++) {  // as the product of all would have them
        float* line = lines + p * width;
        multiply(line, width, {weighed + order[p] * E, E}, turned, width, 1, width, E, false);
        square[order[p]] = line[order[p]];
      }
      for (size_t p = 0; p < order.size(); p++)
        for (long i = order[p], f = 0; f < F; f++)
          if (f != i && stays[others[f]])
            cost[i * width + f] = cost[f * width + i] = price(i, f, lines[p * width + f]);
      excess -= order.size();
    }
  }

  float price(long i, long j, float product) const {
    const float a = rows[others[i]].tokens, b = rows[others[j]].tokens;
    const float distance = std::max(square[i] + square[j] - 2 * product, 0.0f) * (a * b / (a + b));
    constexpr float most = std::numeric_limits<float>::max();
    return distance < most ? distance : most;
  }

  // Finds the pairs of rows that are each other's nearest: their first ones, cheapest pair first.
  void find_pairs(long F) {
    nearest.assign(F, -1), order.clear();
    std::vector<float> least(F);
    for (long i = 0; i < F; i++) {
      if (!stays[others[i]]) continue;
      const float* costs = cost + i * width;
      vec low = fill(INFINITY);
      for (long j = 0; j < width; j += W) {
        const vec x = load(costs + j);
        low = x < low ? x : low;
      }
      least[i] = INFINITY;
      for (int lane = 0; lane < W; lane++) least[i] = std::min(least[i], low[lane]);
      nearest[i] = std::find(costs, costs + width, least[i]) - costs;
    }
    for (long i = 0; i < F; i++)
      if (nearest[i] > i && nearest[nearest[i]] == i) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int i, int j) { return least[i] < least[j]; });
  }

  // Row i takes in row j, which is gone then.
  void unite(long i, long j, long F) {
    Row &a = rows[others[i]], &b = rows[others[j]];
    const float share = b.tokens / (a.tokens + b.tokens);
    for (long e = 0; e < E; e++) {
      float& mean = means[i * E + e];
      mean += share * (means[j * E + e] - mean);
      turned[e * width + i] = weighed[i * E + e] = mean * weight[e];
    }
    a.received += b.received, a.tokens += b.tokens;
    stays[others[j]] = 0, places[others[j]] = others[i];
    for (long f = 0; f < F; f++) cost[j * width + f] = cost[f * width + j] = INFINITY;
  }
};

}  // namespace lowline
