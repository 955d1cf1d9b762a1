// A thread's working memory, and prefetching.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"

namespace lowline {

// Memory that a thread keeps between calls, dealt out in pieces that stay where they are until
// `reset`. A thread's calls are alike: from the second on one slab holds all.
class Arena {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<float, Free>> slabs;
  size_t room = 0, used = 0, total = 0;  // floats: of the last slab, of it taken, taken in all

  void add_slab(size_t floats) {
    slabs.emplace_back((float*)std::aligned_alloc(64, floats * sizeof(float)));
    if (!slabs.back()) throw std::bad_alloc();
    room = floats, used = 0;
  }

 public:
  void reset() {
    if (slabs.size() > 1) slabs.clear(), add_slab(total);
    used = total = 0;
  }
  float* take(size_t floats) {
    floats = (floats + 15) / 16 * 16 + 80;  // five cache lines keep pieces off each other's sets
    if (slabs.empty() || used + floats > room) add_slab(std::max(floats, size_t{1} << 16));
    float* piece = slabs.back().get() + used;
#if defined(LOWLINE_POISON)  // for tests: what is read before it is written shows
    std::fill_n(piece, floats, std::numeric_limits<float>::quiet_NaN());
#endif
    used += floats, total += floats;
    return piece;
  }
};

// Memory that will be needed soon. `multiply` prefetches some of it every 16 steps, so that it
// arrives meanwhile: the processor does not prefetch rows that lie apart by itself.
class Ahead;
inline thread_local Ahead* ahead __attribute__((tls_model("initial-exec"))) = nullptr;

class Ahead {  // lives for a thread's part of a call
  static constexpr int ROOM = 1024, PIECE = 256;  // pieces, bytes
  const char* pieces[ROOM];
  int next = 0, end = 0, at_once = 1;
  Ahead* const before = ahead;

 public:
  Ahead() { ahead = this; }
  ~Ahead() { ahead = before; }
  void clear() { next = end = 0; }
  void want(const void* p, long stride, int count, int bytes) {  // in bytes
    for (int i = 0; i < count; i++)
      for (int at = 0; at < bytes && end < ROOM; at += PIECE)
        pieces[end++] = (const char*)p + i * stride + at;
  }
  void over(int times) { at_once = (end + times - 1) / times; }  // asked for in so many steps
  LOWLINE_INLINE void some() {
    for (int left = at_once; next < end && left; left--, next++)
      for (int at = 0; at < PIECE; at += 64) __builtin_prefetch(pieces[next] + at, 0, 2);
  }
};

}  // namespace lowline
