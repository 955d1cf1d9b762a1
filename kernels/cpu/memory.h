// Memory that a thread works in, and memory that it will want.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace lowline {

// Memory that a thread keeps between calls, dealt out in pieces.
class Arena {
  float* memory = nullptr;
  size_t room = 0, used = 0, pieces = 0;

 public:
  ~Arena() { std::free(memory); }
  void reset(size_t floats) {
    used = pieces = 0;
    if (floats <= room) return;
    std::free(memory);
    room = (floats + 15) / 16 * 16;
    memory = (float*)std::aligned_alloc(64, room * sizeof(float));
    if (!memory) throw std::bad_alloc();
  }
  float* take(size_t floats) {  // steps of five cache lines keep pieces off each other's sets
    float* piece = memory + used;
    used += (floats + 15) / 16 * 16 + 80;
    return piece;
  }
};

// Memory that will be wanted soon. `multiply` asks for some of it every 16 steps, so that it
// arrives meanwhile: rows that lie apart are beyond the processor's own foresight.
class Ahead;
inline thread_local Ahead* ahead __attribute__((tls_model("initial-exec"))) = nullptr;

class Ahead {  // lives for a thread's part of a call
  static constexpr int ROOM = 1024, PIECE = 256;  // pieces, bytes
  const char* pieces[ROOM];
  int next = 0, end = 0, at_once = 1;

 public:
  Ahead() { ahead = this; }
  ~Ahead() { ahead = nullptr; }
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
