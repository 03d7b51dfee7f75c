// int8 weights, row-major, times activations quantized on the fly to int8, one scale per row.
#pragma once
#include "common.h"
#include "dots.h"
#include "gemm_int8.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

struct Int8 {  // row-major int8; see int8.py
  const int8_t* codes;   // [n, k]
  const float* scales;   // [n]
  const int32_t* sums;   // [n], of a row's codes
  const float* inputs;   // [k] or null: what inputs are multiplied with
  const float* bias;     // [n] or null
  int64_t n, k;
};

// Rows of codes + 128 as unsigned bytes, padded to whole vectors, and their scales. One scale per
// row: the sum of a dot product stays in integers from the first column to the last.
struct Rows {
  uint8_t* codes;
  float* scales;
  int64_t stride;
};

void quantize_token(const Int8& w, const void* x, bool bf16, const Rows& to, int64_t row) {
  thread_local std::vector<float> scratch;
  scratch.resize(to.stride);
  float* v = scratch.data();
  __m512 top = _mm512_setzero_ps(), poison = top;  // poison: NaN if any value is not finite
  for (int64_t i = 0; i < to.stride; i += 16) {
    __m512 a = load(x, i, bf16, lanes(w.k - i));
    if (w.inputs) a = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(lanes(w.k - i), w.inputs + i));
    _mm512_storeu_ps(v + i, a);
    top = _mm512_max_ps(top, _mm512_abs_ps(a));
    poison = _mm512_fmadd_ps(a, _mm512_setzero_ps(), poison);
  }
  float most = _mm512_reduce_max_ps(top);
  __m512 inverse = _mm512_set1_ps(most > 1e-30f ? 127.f / most : 0.f);
  for (int64_t i = 0; i < to.stride; i += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v + i), inverse));
    q = _mm512_add_epi32(q, _mm512_set1_epi32(128));
    _mm_storeu_si128((__m128i*)(to.codes + row * to.stride + i), _mm512_cvtepi32_epi8(q));
  }
  to.scales[row] = most / 127.f + _mm512_reduce_add_ps(poison);
}

struct Int8Rows {
  using Element = Bytes;
  static constexpr bool MAPPED = true;
  const Int8& w;
  const float* steps;  // of every row of activations
  char* out;
  bool bf16;

  Strip strip(int64_t block) const {
    int64_t first = block * BLOCK, left = w.n - first;
    return {(const char*)w.codes + first * w.k, w.k, left < BLOCK ? left : BLOCK, 0, 0};
  }

  void finish(int64_t block, int64_t row, int64_t count, const int32_t* sums) const {
    int64_t n = block * BLOCK;
    __mmask16 keep = lanes(w.n - n);
    __m512 scale = _mm512_maskz_loadu_ps(keep, w.scales + n), bias = _mm512_setzero_ps();
    __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(keep, w.sums + n), 7);
    if (w.bias) bias = _mm512_maskz_loadu_ps(keep, w.bias + n);
    for (int64_t m = 0; m < count; m++) {
      __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + m * BLOCK), shift);
      __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(steps[row + m]));
      store(out, (row + m) * w.n + n, bf16, keep, _mm512_fmadd_ps(dot, scale, bias));
    }
  }
};

// x [rows, k] and out [rows, n] in bf16 or float32.
void int8_linear(const Int8& w, const char* x, char* out, int64_t rows, bool bf16,
                 int64_t threads) {
  thread_local std::vector<uint8_t> codes;
  thread_local std::vector<float> scales;
  int64_t size = bf16 ? 2 : 4, stride = (w.k + 63) / 64 * 64, chunk = 1 + LOTS / stride;
  int64_t most = rows < chunk ? rows : chunk;
  if ((int64_t)codes.size() < most * stride) codes.resize(most * stride);
  if ((int64_t)scales.size() < most) scales.resize(most);
  Rows q{codes.data(), scales.data(), stride};
  for (int64_t start = 0; start < rows; start += chunk) {
    int64_t count = rows - start < chunk ? rows - start : chunk;
    const char* from = x + start * w.k * size;
    parallel(count, stride * 16, threads, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; m++) quantize_token(w, from + m * w.k * size, bf16, q, m);
    });
    times(Int8Rows{w, q.scales, out + start * w.n * size, bf16}, w.n,
          {(const char*)q.codes, stride, w.k}, count, threads);
  }
}

}  // namespace
#pragma GCC pop_options
