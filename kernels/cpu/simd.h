// Vectors of floats, through the compiler's vector extensions: 16 lanes with AVX-512, 8 with AVX,
// 4 elsewhere. Loads and stores need no alignment.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LOWLINE_INLINE inline __attribute__((always_inline))
#define LOWLINE_OUTLINE inline __attribute__((noinline))

namespace lowline {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t veci __attribute__((vector_size(4 * W)));
typedef uint32_t vecu __attribute__((vector_size(4 * W)));
typedef uint16_t vech __attribute__((vector_size(2 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t loose_vech __attribute__((vector_size(2 * W), aligned(2), may_alias));

LOWLINE_INLINE vec load(const float* p) { return *(const loose_vec*)p; }
LOWLINE_INLINE vec load(const int8_t* p) {
#if defined(__AVX512F__)  // GCC 12 converts integers of other widths one by one
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vec x;
  for (int i = 0; i < W; i++) x[i] = p[i];
  return x;
#endif
}
LOWLINE_INLINE void store(float* p, vec x) { *(loose_vec*)p = x; }
LOWLINE_INLINE vec fill(float x) { return x - vec{}; }

LOWLINE_INLINE veci lanes() {  // 0, 1, 2, ...
  static constexpr int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  veci x;
  std::memcpy(&x, numbers, sizeof x);
  return x;
}

// x with lanes i and i ^ half exchanged
template <class Vector> LOWLINE_INLINE Vector exchanged(Vector x, int half) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(x, lanes() ^ half);
#else
  Vector y;
  for (int i = 0; i < W; i++) y[i] = x[i ^ half];
  return y;
#endif
}
LOWLINE_INLINE float sum(vec x) {
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2) x += exchanged(x, half);
  return x[0];
}

struct bf16 {
  uint16_t bits;
};

LOWLINE_INLINE vec load(const bf16* p) {
  return (vec)(__builtin_convertvector(*(const loose_vech*)p, vecu) << 16);
}
LOWLINE_INLINE void store(bf16* p, vec x) {  // to the nearest, ties to even; a NaN stays one
  vecu bits = (vecu)x;
  vecu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = x == x ? rounded : (bits >> 16) | 0x40;
  *(loose_vech*)p = __builtin_convertvector(rounded, vech);
}
LOWLINE_INLINE float widen(float x) { return x; }
LOWLINE_INLINE float widen(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
LOWLINE_INLINE void narrow(float* p, float x) { *p = x; }
LOWLINE_INLINE void narrow(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

template <class T> LOWLINE_INLINE float dot(const float* x, const T* y, int n) {
  vec a{}, b{};
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a += load(x + i) * load(y + i);
    b += load(x + i + W) * load(y + i + W);
  }
  for (; i + W <= n; i += W) a += load(x + i) * load(y + i);
  float total = sum(a + b);
  for (; i < n; i++) total += x[i] * widen(y[i]);
  return total;
}

// e^x to about 1e-7 relative; exactly 0 where e^x is no normal number (-inf too), for x <= 88.
// 2^n · e^r with n = round(x / ln 2) and Taylor's polynomial of r in [-0.35, 0.35].
LOWLINE_INLINE vec exp(vec x) {
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  vec shifted = x * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  vec p = fill(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vec power = (vec)(((veci)shifted + 127) << 23);  // the magic's own bits leave at the top
  return x < -87.3f ? vec{} : p * power;
}

// Which lanes of two vectors make the lower and the upper one of a pair when blocks of half x half
// are exchanged.
struct Exchange {
  int32_t low[W], high[W];
  constexpr Exchange(int half) : low(), high() {
    for (int l = 0; l < W; l++) {
      low[l] = l & half ? l - half + W : l;
      high[l] = l & half ? l + W : l + half;
    }
  }
};
inline constexpr Exchange exchanges[] = {Exchange(1), Exchange(2), Exchange(4), Exchange(8)};

// out[n x m] = in[m x n]; m a multiple of 16, n a multiple of 16 or one more.
LOWLINE_OUTLINE void transpose(float* out, long ldo, const float* in, long ldi, int m, int n) {
  int j = 0;
#if defined(__GNUC__) && !defined(__clang__)
  for (; j + W <= n; j += W)
    for (int i = 0; i < m; i += W) {
      vec x[W];
#pragma GCC unroll 16
      for (int a = 0; a < W; a++) x[a] = load(in + (i + a) * ldi + j);
#pragma GCC unroll 4
      for (int stage = W == 16 ? 3 : W == 8 ? 2 : 1; stage >= 0; stage--) {
        const int half = 1 << stage;
        veci low, high;
        std::memcpy(&low, exchanges[stage].low, sizeof low);
        std::memcpy(&high, exchanges[stage].high, sizeof high);
#pragma GCC unroll 16
        for (int a = 0; a < W; a++)
          if (!(a & half)) {
            vec first = x[a], second = x[a + half];
            x[a] = __builtin_shuffle(first, second, low);
            x[a + half] = __builtin_shuffle(first, second, high);
          }
      }
#pragma GCC unroll 16
      for (int a = 0; a < W; a++) store(out + (j + a) * ldo + i, x[a]);
    }
#endif
  for (; j < n; j++)
    for (int i = 0; i < m; i++) out[j * ldo + i] = in[i * ldi + j];
}

// Numbers below the smallest normal one are zero while this lives: states decay there, and
// arithmetic on them takes a hundred times as long.
class FlushDenormals {
#if defined(__SSE2__)
  unsigned kept = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(kept | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(kept); }
#elif defined(__aarch64__)
  uint64_t kept;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(kept));
    asm volatile("msr fpcr, %0" ::"r"(kept | (1 << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(kept)); }
#else
 public:
  FlushDenormals() {}
#endif
};

}  // namespace lowline
