// The CPU kernels of the format (see the package's docstring). Built once per vector width; the width changes how many
// output elements are computed at a time, never the operations of one of them.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <vector>

#include "functions.h"

#ifdef __AVX512F__
typedef __m512 vec;
constexpr int WIDTH = 16, MR = 12;
static inline vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec same(float x) { return _mm512_set1_ps(x); }
static inline vec fma_(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
typedef __m256 vec;
constexpr int WIDTH = 8, MR = 6;
static inline vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec same(float x) { return _mm256_set1_ps(x); }
static inline vec fma_(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif
constexpr int NR = 2 * WIDTH;

constexpr long SEGMENT = 256, BLOCK = 4096;       // of a dot product
constexpr long LANES = 128, SUM_BLOCK = 4096;     // of a sum

// The format rounds to nearest and keeps denormals, whatever the calling thread's control register says.
struct Rounding {
  unsigned saved = _mm_getcsr();
  Rounding() { _mm_setcsr(0x1f80); }
  ~Rounding() { _mm_setcsr(saved); }
};

#include "winograd.h"

// ---- dot products -------------------------------------------------------------------------------------------------

// out[MR][NR] = chains over `length` values of k, from packed panels
static void chain(const float* a, const float* b, long length, float* out) {
  vec sum[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = same(0.0f);
  for (long k = 0; k < length; ++k) {
    vec b0 = load(b + k * NR), b1 = load(b + k * NR + WIDTH);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      vec x = same(a[k * MR + i]);
      sum[i][0] = fma_(x, b0, sum[i][0]);
      sum[i][1] = fma_(x, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
    store(out + i * NR, sum[i][0]);
    store(out + i * NR + WIDTH, sum[i][1]);
  }
}

// Panels of `width` rows of `source`, of which `rows` exist; the others are zero and their results are dropped.
static void pack(const float* source, long row, long column, long rows, long length, int width, float* out) {
  long panels = (rows + width - 1) / width;
  for (long p = 0; p < panels; ++p) {
    long there = std::min<long>(width, rows - p * width);
    const float* from = source + p * width * row;
    float* to = out + p * width * length;
    if (row == 1) {
      for (long k = 0; k < length; ++k) {
        for (long i = 0; i < there; ++i) to[k * width + i] = from[k * column + i];
        for (long i = there; i < width; ++i) to[k * width + i] = 0.0f;
      }
    } else {
      for (long i = 0; i < there; ++i)
        for (long k = 0; k < length; ++k) to[k * width + i] = from[i * row + k * column];
      for (long i = there; i < width; ++i)
        for (long k = 0; k < length; ++k) to[k * width + i] = 0.0f;
    }
  }
}

struct Matrix { const float* data; long batch, row, column; };

constexpr long TILE_M = 8 * MR, TILE_N = 4 * NR;

static void tile(const float* a, long am, long ak, const float* b, long bk, long bn, float* c, long ldc, long m, long n,
                 long depth, bool accumulate, float* work) {
  float* total = work;
  float* block = total + TILE_M * TILE_N;
  float* pa = block + TILE_M * TILE_N;
  float* pb = pa + TILE_M * SEGMENT;
  float part[MR * NR];
  for (long i = 0; i < m; ++i)
    for (long j = 0; j < n; ++j) total[i * TILE_N + j] = accumulate ? c[i * ldc + j] : 0.0f;
  for (long start = 0; start < depth; start += BLOCK) {
    long end = std::min(start + BLOCK, depth);
    std::fill(block, block + m * TILE_N, 0.0f);
    for (long k = start; k < end; k += SEGMENT) {
      long length = std::min(SEGMENT, end - k);
      pack(a + k * ak, am, ak, m, length, MR, pa);
      pack(b + k * bk, bn, bk, n, length, NR, pb);
      for (long j = 0; j < n; j += NR)
        for (long i = 0; i < m; i += MR) {
          chain(pa + i * length, pb + j * length, length, part);
          long rows = std::min<long>(MR, m - i), columns = std::min<long>(NR, n - j);
          for (long y = 0; y < rows; ++y)
            for (long x = 0; x < columns; ++x) block[(i + y) * TILE_N + j + x] += part[y * NR + x];
        }
    }
    for (long i = 0; i < m; ++i)
      for (long j = 0; j < n; ++j) total[i * TILE_N + j] += block[i * TILE_N + j];
  }
  for (long i = 0; i < m; ++i)
    for (long j = 0; j < n; ++j) c[i * ldc + j] = total[i * TILE_N + j];
}

extern "C" void es_matmul(const float* a, long ab, long am, long ak, const float* b, long bb, long bk, long bn, float* c,
                          long batch, long m, long n, long k, int accumulate, int threads) {
  long tm = (m + TILE_M - 1) / TILE_M, tn = (n + TILE_N - 1) / TILE_N;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
    std::vector<float> work(2 * TILE_M * TILE_N + (TILE_M + TILE_N) * SEGMENT);
#pragma omp for schedule(dynamic)
    for (long t = 0; t < batch * tm * tn; ++t) {
      long i = t / tn % tm * TILE_M, j = t % tn * TILE_N, z = t / (tm * tn);
      tile(a + z * ab + i * am, am, ak, b + z * bb + j * bn, bk, bn, c + (z * m + i) * n + j, n, std::min(TILE_M, m - i),
           std::min(TILE_N, n - j), k, accumulate, work.data());
    }
  }
}

// ---- sums ---------------------------------------------------------------------------------------------------------

// One block of at most SUM_BLOCK rows of `width` columns: 128 lanes, then a tree over the lanes. `lanes` is scratch.
template <bool ONE>
static void sum_block(const float* x, long rows, long stride, long width, float* out, float* lanes) {
  long w = ONE ? 1 : width;
  std::fill(lanes, lanes + LANES * w, 0.0f);
  if (ONE) {
    for (long r = 0; r < rows; r += LANES) {
      long there = std::min(LANES, rows - r);
      for (long l = 0; l < there; ++l) lanes[l] += x[r + l];
    }
  } else {
    for (long r = 0; r < rows; ++r)
      for (long i = 0; i < w; ++i) lanes[r % LANES * w + i] += x[r * stride + i];
  }
  for (long half = LANES / 2; half; half /= 2)
    for (long i = 0; i < half * w; ++i) lanes[i] += lanes[half * w + i];
  std::copy(lanes, lanes + w, out);
}

// out[outer][inner] = sums of x[outer][rows][inner] over the middle; the blocks' sums are summed the same way.
extern "C" void es_sum(const float* x, float* out, long outer, long rows, long inner, int threads) {
  if (rows == 0) { std::fill(out, out + outer * inner, 0.0f); return; }
  long blocks = (rows + SUM_BLOCK - 1) / SUM_BLOCK;
  std::vector<float> partial;
  float* target = out;
  if (blocks > 1) { partial.resize(outer * blocks * inner); target = partial.data(); }
  constexpr long STRIP = 32;
  long strips = (inner + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
    std::vector<float> lanes(LANES * STRIP);
#pragma omp for
    for (long t = 0; t < outer * blocks * strips; ++t) {
      long s = t % strips * STRIP, b = t / strips % blocks, o = t / (strips * blocks);
      long first = b * SUM_BLOCK, there = std::min(SUM_BLOCK, rows - first);
      const float* from = x + (o * rows + first) * inner + s;
      float* to = target + (o * blocks + b) * inner + s;
      if (inner == 1) sum_block<true>(from, there, 1, 1, to, lanes.data());
      else sum_block<false>(from, there, inner, std::min(STRIP, inner - s), to, lanes.data());
    }
  }
  if (blocks > 1) es_sum(target, out, outer, blocks, inner, threads);
}

// ---- elementwise --------------------------------------------------------------------------------------------------

template <typename Function>
static void each(const float* x, float* out, long n, int threads, Function f) {
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 8192)
  {
    Rounding rounding;
#pragma omp for simd schedule(static)
    for (long i = 0; i < n; ++i) out[i] = f(x[i]);
  }
}

extern "C" int es_unary(int which, const float* x, float* out, long n, int threads) {
  switch (which) {
    case 0: each(x, out, n, threads, [](float v) { return exp_(v); }); break;
    case 1: each(x, out, n, threads, [](float v) { return expm1_(v); }); break;
    case 2: each(x, out, n, threads, [](float v) { return log_(v); }); break;
    case 3: each(x, out, n, threads, [](float v) { return log1p_(v); }); break;
    case 4: each(x, out, n, threads, [](float v) { return tanh_(v); }); break;
    case 5: each(x, out, n, threads, [](float v) { return erf_(v); }); break;
    case 6: each(x, out, n, threads, [](float v) { return std::sqrt(v); }); break;
    default: return 1;
  }
  return 0;
}

// ---- random numbers -----------------------------------------------------------------------------------------------

extern "C" void es_random(int normal, uint64_t key, float* out, long n, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 8192)
  {
    Rounding rounding;
#pragma omp for schedule(static)
    for (long group = 0; group < (n + 3) / 4; ++group) {
      uint32_t words[4];
      float values[4];
      philox((uint64_t)group, key, words);
      if (normal) {
        normal_of(words[0], words[1], values, values + 1);
        normal_of(words[2], words[3], values + 2, values + 3);
      } else {
        for (int i = 0; i < 4; ++i) values[i] = uniform_of(words[i]);
      }
      for (long i = 0; i < std::min(4L, n - 4 * group); ++i) out[4 * group + i] = values[i];
    }
  }
}

// ---- scatter ------------------------------------------------------------------------------------------------------

// out[index[r]] += source[r] for r in ascending order; rows of `width` columns
extern "C" void es_index_add(float* out, const int64_t* index, const float* source, long rows, long width, int threads) {
  constexpr long STRIP = 256;
#pragma omp parallel num_threads(threads) if (threads > 1 && width > STRIP)
  {
    Rounding rounding;
#pragma omp for
    for (long s = 0; s < width; s += STRIP) {
      long there = std::min(STRIP, width - s);
      for (long r = 0; r < rows; ++r) {
        float* to = out + index[r] * width + s;
        const float* from = source + r * width + s;
        for (long i = 0; i < there; ++i) to[i] += from[i];
      }
    }
  }
}

// ---- Winograd's transforms ----------------------------------------------------------------------------------------

extern "C" void es_input_squares(const float* x, long n, long c, long h, long w, float* out, long channels, long height,
                                 long width, long pad_h, long pad_w, long rows, long columns, long start, long end,
                                 int threads) {
  input_squares({x, n, c, h, w}, out, channels, height, width, pad_h, pad_w, rows, columns, start, end, threads);
}

extern "C" void es_gradient_squares(const float* y, long n, long c, long h, long w, float* out, long channels,
                                    long height, long width, long start, long end, int threads) {
  gradient_squares({y, n, c, h, w}, out, channels, height, width, start, end, threads);
}

extern "C" void es_output_squares(const float* products, float* out, long channels, long height, long width, long start,
                                  long squares, int threads) {
  output_squares(products, out, channels, height, width, start, squares, threads);
}

extern "C" void es_weight_squares(const float* w, long r, long c, long h, long v, float* out, long rows, long columns,
                                  int threads) {
  weight_squares({w, r, c, h, v}, out, rows, columns, threads);
}

extern "C" void es_weight_gradient(const float* sums, float* out, long size, int threads) {
  weight_gradient(sums, out, size, threads);
}
