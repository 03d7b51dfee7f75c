// E4M3 weights: widened to bf16 a block of rows at a time, in scratch that stays in the cache.
#pragma once
#include "common.h"
#include "dots.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx512bf16,avx512vbmi2")
namespace {

struct Float8 {  // row-major E4M3; see float8.py
  const uint8_t* codes;  // [n, k]
  const float* scales;   // [n]
  const float* bias;     // [n] or null
  int64_t n, k;
};

// Rows first..last of the weight in bf16, [last - first, k].
void widen(const Float8& w, int64_t first, int64_t last, uint16_t* out) {
  // Sign, exponent and mantissa move to their places in a float, whose exponent is then 120 short.
  __m512 shift = _mm512_set1_ps(0x1p120f);
  for (int64_t n = first; n < last; n++) {
    const uint8_t* from = w.codes + n * w.k;
    uint16_t* to = out + (n - first) * w.k;
    __m512 scale = _mm512_set1_ps(w.scales[n]);
    for (int64_t c = 0; c < w.k; c += 16) {
      __mmask16 keep = lanes(w.k - c);
      if (c % 64 == 0) _mm_prefetch((const char*)from + c + 4096, _MM_HINT_T0);
      __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(keep, from + c));
      __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
      __m512i size = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 20);
      __m512 v = _mm512_castsi512_ps(_mm512_or_si512(sign, size));
      v = _mm512_mul_ps(_mm512_mul_ps(v, shift), scale);
      _mm256_mask_storeu_epi16(to + c, keep, (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
}

struct Float8Rows {
  using Element = Bf16;
  static constexpr bool MAPPED = false;
  const Float8& w;
  char* out;
  bool bf16;

  Strip strip(int64_t block) const {
    thread_local std::vector<uint16_t> scratch;
    if ((int64_t)scratch.size() < BLOCK * w.k) scratch.resize(BLOCK * w.k);
    int64_t first = block * BLOCK, last = first + BLOCK < w.n ? first + BLOCK : w.n;
    widen(w, first, last, scratch.data());
    return {(const char*)scratch.data(), w.k * 2, last - first, 0, 0};
  }

  void finish(int64_t block, int64_t row, int64_t count, const int32_t* sums) const {
    int64_t first = block * BLOCK, size = bf16 ? 2 : 4;
    put_sums(sums, count, w.bias ? w.bias + first : nullptr, lanes(w.n - first),
             out + (row * w.n + first) * size, w.n, bf16);
  }
};

// x [rows, k] in bf16; out [rows, n] in bf16 or float32.
void float8_linear(const Float8& w, const char* x, char* out, int64_t rows, bool bf16,
                   int64_t threads) {
  times(Float8Rows{w, out, bf16}, w.n, {x, w.k * 2, w.k}, rows, threads);
}

// Rows start..stop of the weight in bf16, [stop - start, k].
void float8_expand(const Float8& w, int64_t start, int64_t stop, uint16_t* out, int64_t threads) {
  parallel(stop - start, w.k * 8, threads, [&](int64_t a, int64_t b) {
    widen(w, start + a, start + b, out + a * w.k);
  });
}

}  // namespace
#pragma GCC pop_options
