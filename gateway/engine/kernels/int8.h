// int8 weights, row-major, times activations quantized on the fly to int8, one scale per row.
#pragma once
#include "common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

constexpr int W8_QUAD = 4;  // weight rows that share a load of the activations
constexpr int W8_TILE = 6;  // activation rows that share a load of the weights

INLINE __mmask64 lanes64(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << (count > 0 ? count : 0)) - 1;
}

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

// The sums of four vectors, in lanes 0 to 3.
INLINE __m512i sum_each_epi32(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  all = _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0x4e));
  return _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1));
}

// Columns c.. c + 63 of W8_QUAD weight rows times MT activation rows; those not kept count as zero.
template <int MT>
INLINE void int8_step(const int8_t* const* weights, const uint8_t* codes, int64_t stride, int64_t c,
                      __mmask64 keep, int64_t ahead, __m512i (&acc)[W8_QUAD][MT]) {
  __m512i v[W8_QUAD];
#pragma GCC unroll 4
  for (int r = 0; r < W8_QUAD; r++) {
    v[r] = _mm512_maskz_loadu_epi8(keep, weights[r] + c);
    if (ahead) _mm_prefetch((const char*)weights[r] + ahead + c, _MM_HINT_T0);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; m++) {
    __m512i a = _mm512_loadu_si512(codes + m * stride + c);
#pragma GCC unroll 4
    for (int r = 0; r < W8_QUAD; r++)  // around the intrinsic, GCC 12 copies every sum: half speed
      asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][m]) : "v"(a), "v"(v[r]));
  }
}

// W8_QUAD weight rows (from `n`; the last may repeat) times MT activation rows.
template <int MT>
void int8_dots(const Int8& w, int64_t n, const Rows& x, int64_t row, void* out, bool bf16) {
  int64_t count = w.n - n < W8_QUAD ? w.n - n : W8_QUAD;
  const int8_t* weights[W8_QUAD];
  for (int r = 0; r < W8_QUAD; r++) weights[r] = w.codes + (n + (r < count ? r : 0)) * w.k;
  const uint8_t* codes = x.codes + row * x.stride;
  __m512i acc[W8_QUAD][MT];
#pragma GCC unroll 4
  for (int r = 0; r < W8_QUAD; r++)
#pragma GCC unroll 8
    for (int m = 0; m < MT; m++) acc[r][m] = _mm512_setzero_si512();
  int64_t whole = w.k / 64 * 64;
  for (int64_t c = 0; c < whole; c += 64)
    int8_step<MT>(weights, codes, x.stride, c, ~0ull, MT == 1 ? W8_QUAD * w.k : 0, acc);
  if (whole < w.k) int8_step<MT>(weights, codes, x.stride, whole, lanes64(w.k - whole), 0, acc);
  __mmask16 keep = lanes(count);
  __m512 scale = _mm512_maskz_loadu_ps(keep, w.scales + n), bias = _mm512_setzero_ps();
  __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(keep, w.sums + n), 7);
  if (w.bias) bias = _mm512_maskz_loadu_ps(keep, w.bias + n);
#pragma GCC unroll 8
  for (int m = 0; m < MT; m++) {
    __m512i sums = sum_each_epi32(acc[0][m], acc[1][m], acc[2][m], acc[3][m]);
    __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, shift));
    dot = _mm512_mul_ps(dot, _mm512_set1_ps(x.scales[row + m]));
    store(out, (row + m) * w.n + n, bf16, keep, _mm512_fmadd_ps(dot, scale, bias));
  }
}

template <int MT>
void int8_rows(const Int8& w, int64_t first, int64_t last, const Rows& x, int64_t rows, int64_t row,
               void* out, bool bf16) {
  for (; row + MT <= rows; row += MT)
    for (int64_t n = first; n < last; n += W8_QUAD) int8_dots<MT>(w, n, x, row, out, bf16);
  if constexpr (MT > 1) int8_rows<MT - 1>(w, first, last, x, rows, row, out, bf16);
}

// x [rows, k] and out [rows, n] in bf16 or float32.
void int8_linear(const Int8& w, const char* x, char* out, int64_t rows, bool bf16,
                 int64_t threads) {
  thread_local std::vector<uint8_t> codes;
  thread_local std::vector<float> scales;
  int64_t size = bf16 ? 2 : 4, stride = (w.k + 63) / 64 * 64;
  int64_t most = rows < CHUNK ? rows : CHUNK;
  if ((int64_t)codes.size() < most * stride) codes.resize(most * stride);
  if ((int64_t)scales.size() < most) scales.resize(most);
  Rows q{codes.data(), scales.data(), stride};
  for (int64_t start = 0; start < rows; start += CHUNK) {
    int64_t count = rows - start < CHUNK ? rows - start : CHUNK;
    const char* from = x + start * w.k * size;
    char* to = out + start * w.n * size;
    parallel(count, stride * 16, threads, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; m++) quantize_token(w, from + m * w.k * size, bf16, q, m);
    });
    parallel((w.n + BLOCK - 1) / BLOCK, BLOCK * stride * count, threads, [&](int64_t a, int64_t b) {
      for (int64_t block = a; block < b; block++) {
        int64_t first = block * BLOCK, last = first + BLOCK < w.n ? first + BLOCK : w.n;
        int8_rows<W8_TILE>(w, first, last, q, count, 0, to, bf16);
      }
    });
  }
}

}  // namespace
#pragma GCC pop_options
