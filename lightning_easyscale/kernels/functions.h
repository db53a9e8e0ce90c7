// The format's elementary functions, one element at a time. Every operation below is one rounding; `fma` is fused. They
// are free of branches so that the compiler can evaluate them on vectors, which does not change any bit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "coefficients.h"

static inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline int32_t bits(float x) { int32_t i; std::memcpy(&i, &x, 4); return i; }
static inline float from_bits(int32_t i) { float x; std::memcpy(&x, &i, 4); return x; }

constexpr float INF = __builtin_inff();
constexpr float NOT_A_NUMBER = __builtin_nanf("");
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr float LOG2E = 0x1.715476p+0f;
constexpr float LN2_HIGH = 0x1.62e4p-1f;  // 13 significant bits, so that its product with an exponent is exact
constexpr float LN2_LOW = 0x1.7f7d1cp-20f;

template <int N>
static inline float horner(const float (&c)[N], float x) {
  float y = c[N - 1];
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = fma_(y, x, c[i]);
  return y;
}

// 2^n for -126 <= n <= 127
static inline float power_of_two(int32_t n) { return from_bits((n + 127) << 23); }

// exp(r) - 1 and n with x = n ln 2 + r; x within [-104, 89]
static inline float reduced_expm1(float x, int32_t* n) {
  float shifted = fma_(x, LOG2E, MAGIC);
  float rounded = shifted - MAGIC;
  *n = bits(shifted) - bits(MAGIC);
  float r = fma_(rounded, -LN2_HIGH, x);
  r = fma_(rounded, -LN2_LOW, r);
  return fma_(r * r, horner(EXP, r), r);
}

static inline float exp_(float x) {
  float inside = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  int32_t n;
  float y = 1.0f + reduced_expm1(inside, &n);
  int32_t half = n >> 1;
  // Two factors: the first is exact, the second rounds once, also into the denormals.
  y = (y * power_of_two(half)) * power_of_two(n - half);
  return x != x ? x : y;
}

static inline float expm1_(float x) {
  float inside = x < -30.0f ? -30.0f : (x > 89.0f ? 89.0f : x);
  int32_t n;
  float p = reduced_expm1(inside, &n);
  // 2^n (1 + p) - 1, with the factor 2 taken out so that n = 128 stays finite
  float scale = power_of_two(n - 1);
  float y = 2.0f * fma_(scale, p, scale - 0.5f);
  y = from_bits(bits(x) & 0x7fffffff) < 0x1p-25f ? x : y;
  return x != x ? x : y;
}

static inline float log_(float x) {
  bool small = x < 0x1p-126f;
  float scaled = small ? x * 0x1p23f : x;
  int32_t shifted = bits(scaled) - 0x3f3504f3;  // the bits of sqrt(1/2)
  int32_t e = shifted >> 23;
  float f = from_bits((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  float exponent = (float)(e - (small ? 23 : 0));
  float square = f * f;
  float y = f * square * horner(LOG, f);
  y = fma_(exponent, LN2_LOW, y);
  y = fma_(-0.5f, square, y);
  y = f + y;
  y = fma_(exponent, LN2_HIGH, y);
  y = x == INF ? INF : y;
  y = x == 0.0f ? -INF : y;
  y = x < 0.0f ? NOT_A_NUMBER : y;
  return x != x ? x : y;
}

static inline float log1p_(float x) {
  float u = 1.0f + x;
  float lost = x - (u - 1.0f);
  float y = log_(u) + lost / u;
  y = x == -1.0f ? -INF : (x == INF ? INF : y);
  return from_bits(bits(x) & 0x7fffffff) < 0x1p-25f ? x : y;
}

static inline float tanh_(float x) {
  float t = from_bits(bits(x) & 0x7fffffff);
  float s = x * x;
  float small = fma_(x * s, horner(TANH, s), x);
  float capped = t > 10.0f ? 10.0f : t;
  float large = 1.0f - 2.0f / (exp_(2.0f * capped) + 1.0f);
  large = from_bits((bits(large) & 0x7fffffff) | (bits(x) & (int32_t)0x80000000));
  float y = t < 0.625f ? small : large;
  y = x == 0.0f ? x : y;
  return x != x ? x : y;
}

static inline float erf_(float x) {
  float t = from_bits(bits(x) & 0x7fffffff);
  float s = x * x;
  float small = fma_(x, horner(ERF, s), x);
  float capped = t > 4.0f ? 4.0f : t;
  float large = 1.0f - exp_(-horner(ERFC, capped));
  large = from_bits((bits(large) & 0x7fffffff) | (bits(x) & (int32_t)0x80000000));
  float y = t < 0.875f ? small : large;
  return x != x ? x : y;
}

// sine and cosine of 2 pi u for u in [0, 1)
static inline void sincos_turn(float u, float* sine, float* cosine) {
  float quarter = fma_(4.0f, u, MAGIC) - MAGIC;  // 0 .. 4
  float f = fma_(quarter, -0.25f, u);            // exact
  float s = f * f;
  float a = f * horner(SIN, s);
  float b = fma_(s, horner(COS, s), 1.0f);
  int32_t q = (int32_t)quarter;
  float si = (q & 1) ? b : a, co = (q & 1) ? a : b;
  *sine = (q & 2) ? -si : si;
  *cosine = ((q + 1) & 2) ? -co : co;
}

// Philox 4x32, 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
static inline void philox(uint64_t counter, uint64_t key, uint32_t out[4]) {
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1; c3 = (uint32_t)p0; c0 = n0; c2 = n2;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

static inline float uniform_of(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }  // [0, 1)

// Two standard normal numbers from two words (Box and Muller 1958)
static inline void normal_of(uint32_t first, uint32_t second, float* a, float* b) {
  float u = (float)((first >> 8) + 1) * 0x1p-24f;  // (0, 1]
  float radius = std::sqrt(-2.0f * log_(u));
  float sine, cosine;
  sincos_turn(uniform_of(second), &sine, &cosine);
  *a = radius * cosine;
  *b = radius * sine;
}
