// Winograd's transforms for F(2x2, 3x3), as winograd_transforms.py has them. One row of squares at a time.
#pragma once
#include <algorithm>
#include <vector>

struct Image { const float* data; long n, c, h, w; };  // with its strides

static inline void taken(float a, float b, float c, float d, float* out) {
  out[0] = a - c, out[1] = b + c, out[2] = c - b, out[3] = b - d;
}
static inline void spread(float a, float b, float c, float* out) {
  float ends = a + c;
  out[0] = a, out[1] = (ends + b) * 0.5f, out[2] = (ends - b) * 0.5f, out[3] = c;
}
static inline void collected(float a, float b, float c, float d, float* out) {
  float middle = (b + c) * 0.5f;
  out[0] = a + middle, out[1] = (b - c) * 0.5f, out[2] = middle + d;
}

// `length` values of row y of an image from column z on, zeros where there are none
static void row_of(const float* x, long h, long w, long height, long width, long y, long z, long length, float* out) {
  std::fill(out, out + length, 0.0f);
  if (y < 0 || y >= height) return;
  long first = std::max(0L, -z), behind = std::min(length, width - z);
  const float* from = x + y * h + z * w;
  if (w == 1)
    for (long i = first; i < behind; ++i) out[i] = from[i];
  else
    for (long i = first; i < behind; ++i) out[i] = from[i * w];
}

// out[16][channels][end - start]
static void input_squares(Image x, float* out, long channels, long height, long width, long pad_h, long pad_w, long rows,
                          long columns, long start, long end, int threads) {
  long first = start / columns, behind = (end + columns - 1) / columns, n = end - start, length = 2 * columns + 2;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
    std::vector<float> d(4 * length), t(4 * length);
#pragma omp for collapse(2)
    for (long c = 0; c < channels; ++c)
      for (long row = first; row < behind; ++row) {
        for (long k = 0; k < 4; ++k)
          row_of(x.data + row / rows * x.n + c * x.c, x.h, x.w, height, width, 2 * (row % rows) - pad_h + k, -pad_w, length,
                 d.data() + k * length);
        const float *a = d.data(), *b = a + length, *e = b + length, *f = e + length;
        for (long i = 0; i < length; ++i) {
          t[i] = a[i] - e[i];
          t[length + i] = b[i] + e[i];
          t[2 * length + i] = e[i] - b[i];
          t[3 * length + i] = b[i] - f[i];
        }
        long from = std::max(0L, start - row * columns), to = std::min(columns, end - row * columns);
        for (long k = 0; k < 4; ++k) {
          const float* s = t.data() + k * length;
          float* at = out + (4 * k * channels + c) * n + row * columns - start;
          for (long j = from; j < to; ++j) {
            float v[4];
            taken(s[2 * j], s[2 * j + 1], s[2 * j + 2], s[2 * j + 3], v);
            for (long q = 0; q < 4; ++q) at[q * channels * n + j] = v[q];
          }
        }
      }
  }
}

// out[16][channels][end - start]
static void gradient_squares(Image y, float* out, long channels, long height, long width, long start, long end,
                             int threads) {
  long rows = (height + 1) / 2, columns = (width + 1) / 2;
  long first = start / columns, behind = (end + columns - 1) / columns, n = end - start, length = 2 * columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
    std::vector<float> d(2 * length), t(4 * length);
#pragma omp for collapse(2)
    for (long c = 0; c < channels; ++c)
      for (long row = first; row < behind; ++row) {
        for (long k = 0; k < 2; ++k)
          row_of(y.data + row / rows * y.n + c * y.c, y.h, y.w, height, width, 2 * (row % rows) + k, 0, length,
                 d.data() + k * length);
        const float *a = d.data(), *b = a + length;
        for (long i = 0; i < length; ++i) {
          t[i] = a[i];
          t[length + i] = a[i] + b[i];
          t[2 * length + i] = a[i] - b[i];
          t[3 * length + i] = 0.0f - b[i];
        }
        long from = std::max(0L, start - row * columns), to = std::min(columns, end - row * columns);
        for (long k = 0; k < 4; ++k) {
          const float* s = t.data() + k * length;
          float* at = out + (4 * k * channels + c) * n + row * columns - start;
          for (long j = from; j < to; ++j) {
            float u = s[2 * j], v = s[2 * j + 1];
            at[j] = u;
            at[channels * n + j] = u + v;
            at[2 * channels * n + j] = u - v;
            at[3 * channels * n + j] = 0.0f - v;
          }
        }
      }
  }
}

// Squares from `start` on of the contiguous out[][channels][height][width], of products[16][channels][n]
static void output_squares(const float* products, float* out, long channels, long height, long width, long start, long n,
                           int threads) {
  long rows = (height + 1) / 2, columns = (width + 1) / 2, end = start + n;
  long first = start / columns, behind = (end + columns - 1) / columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
#pragma omp for collapse(2)
    for (long c = 0; c < channels; ++c)
      for (long row = first; row < behind; ++row) {
        const float* m = products + c * n + row * columns - start;
        float* at = out + ((row / rows * channels + c) * height + 2 * (row % rows)) * width;
        bool down = 2 * (row % rows) + 1 < height;
        for (long j = std::max(0L, start - row * columns); j < std::min(columns, end - row * columns); ++j) {
          float upper[4], lower[4];
          for (long q = 0; q < 4; ++q) {
            const float* p = m + q * channels * n + j;
            float a = p[0], b = p[4 * channels * n], e = p[8 * channels * n], f = p[12 * channels * n];
            upper[q] = (a + b) + e;
            lower[q] = (b - e) - f;
          }
          bool right = 2 * j + 1 < width;
          at[2 * j] = (upper[0] + upper[1]) + upper[2];
          if (right) at[2 * j + 1] = (upper[1] - upper[2]) - upper[3];
          if (down) at[width + 2 * j] = (lower[0] + lower[1]) + lower[2];
          if (down && right) at[width + 2 * j + 1] = (lower[1] - lower[2]) - lower[3];
        }
      }
  }
}

// out[16][rows][columns] of w[rows][columns][3][3] with these strides
static void weight_squares(Image w, float* out, long rows, long columns, int threads) {
  long size = rows * columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
#pragma omp for
    for (long r = 0; r < rows; ++r)
      for (long c = 0; c < columns; ++c) {
        const float* g = w.data + r * w.n + c * w.c;
        float t[3][4], u[4];
        for (long k = 0; k < 3; ++k) spread(g[k * w.w], g[w.h + k * w.w], g[2 * w.h + k * w.w], t[k]);
        for (long i = 0; i < 4; ++i) {
          spread(t[0][i], t[1][i], t[2][i], u);
          for (long j = 0; j < 4; ++j) out[(4 * i + j) * size + r * columns + c] = u[j];
        }
      }
  }
}

// out[size][3][3] of sums[16][size]
static void weight_gradient(const float* sums, float* out, long size, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Rounding rounding;
#pragma omp for
    for (long p = 0; p < size; ++p) {
      const float* s = sums + p;
      float t[4][4];
      for (long j = 0; j < 4; ++j)
        collected(s[j * size], s[(4 + j) * size], s[(8 + j) * size], s[(12 + j) * size], t[j]);
      for (long i = 0; i < 3; ++i) collected(t[0][i], t[1][i], t[2][i], t[3][i], out + 9 * p + 3 * i);
    }
  }
}
