// bf16 products: dense rows, sparse rows, and sparse rows whose values are integer codes.
#pragma once
#include "common.h"
#include "grouped.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx512bf16,avx512vbmi2")
namespace {

constexpr int QUAD = 4;  // weight rows that share a load of the activations

INLINE __mmask32 lanes32(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << (count > 0 ? count : 0)) - 1;
}

// EVEN: of every 32 columns 16 are kept, so their values lie at half the column. RAGGED: any number,
// so a cursor runs along.
enum Kind { FULL, EVEN, RAGGED };

// Columns c .. c + 31 of a row. `cursor` counts a RAGGED row's values so far; none is read beyond
// the row's, whatever the bitmap says.
template <Kind KIND>
INLINE __m512i columns32(const Dense& w, int64_t row, int64_t c, __mmask32 keep, int64_t& cursor) {
  const uint16_t* from = w.weight + row * w.stride;
  if constexpr (KIND == FULL) return _mm512_maskz_loadu_epi16(keep, from + c);
  uint32_t kept = at<uint32_t>(w.mask, row * ((w.k + 31) / 32) + c / 32);
  if constexpr (KIND == EVEN) {
    __m256i values = _mm256_loadu_si256((const __m256i*)(from + c / 2));
    return _mm512_maskz_expand_epi16(kept, _mm512_castsi256_si512(values));
  }
  int64_t count = __builtin_popcount(kept), left = w.stride - cursor;
  __mmask32 some = lanes32(count < left ? count : left);
  __m512i values = _mm512_maskz_loadu_epi16(some, from + cursor);
  cursor += count;
  return _mm512_maskz_expand_epi16(kept, values);
}

// The sums of four vectors, in lanes 0 to 3.
INLINE __m512 sum_each(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  return _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
}

// QUAD weight rows (from `n`; the last may repeat) times MT activation rows.
template <Kind KIND, int MT>
void dots(const Dense& w, int64_t n, const uint16_t* x, int64_t row, void* out, bool bf16) {
  __m512 acc[QUAD][MT];
#pragma GCC unroll 4
  for (int r = 0; r < QUAD; r++)
#pragma GCC unroll 16
    for (int m = 0; m < MT; m++) acc[r][m] = _mm512_setzero_ps();
  int64_t count = w.n - n < QUAD ? w.n - n : QUAD, cursor[QUAD] = {};
  for (int64_t c = 0; c < w.k; c += 32) {
    __mmask32 keep = lanes32(w.k - c);
    __m512bh v[QUAD];
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++) {
      v[r] = (__m512bh)columns32<KIND>(w, n + (r < count ? r : 0), c, keep, cursor[r]);
      const uint16_t* next = w.weight + (n + QUAD + r) * w.stride + (KIND == FULL ? c : c / 2);
      if (row == 0) _mm_prefetch((const char*)next, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MT; m++) {
      __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(keep, x + (row + m) * w.k + c);
#pragma GCC unroll 4
      for (int r = 0; r < QUAD; r++) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], v[r], a);
    }
  }
  __mmask16 keep = lanes(count);
  __m512 bias = _mm512_setzero_ps();
  if (w.bias) bias = _mm512_maskz_loadu_ps(keep, w.bias + n);
#pragma GCC unroll 16
  for (int m = 0; m < MT; m++) {
    __m512 sums = _mm512_add_ps(sum_each(acc[0][m], acc[1][m], acc[2][m], acc[3][m]), bias);
    store(out, (row + m) * w.pitch + n, bf16, keep, sums);
  }
}

template <Kind KIND, int MT>
void rows_of(const Dense& w, int64_t n, const uint16_t* x, int64_t rows, int64_t row, void* out,
             bool bf16) {
  for (; row + MT <= rows; row += MT) dots<KIND, MT>(w, n, x, row, out, bf16);
  if constexpr (MT > 1) rows_of<KIND, MT - 1>(w, n, x, rows, row, out, bf16);
}

// Block of 16 rows of a sparse weight in codes, its values as bf16 in this thread's scratch.
Dense decoded(const Dense& w, int64_t block) {
  thread_local std::vector<uint16_t> scratch;
  int64_t stride = w.codes->groups * w.codes->width, first = block * BLOCK;
  if ((int64_t)scratch.size() < BLOCK * stride) scratch.resize(BLOCK * stride);
  decode(*w.codes, block, scratch.data());
  const char* mask = (const char*)w.mask + first * ((w.k + 31) / 32) * 4;
  int64_t rows = w.n - first < BLOCK ? w.n - first : BLOCK;
  const float* bias = w.bias ? w.bias + first : nullptr;
  return {scratch.data(), nullptr, mask, bias, rows, w.k, stride, w.pitch, w.ragged};
}

void rows_of(const Dense& w, int64_t n, const uint16_t* x, int64_t rows, void* out, bool bf16) {
  if (!w.mask) rows_of<FULL, 6>(w, n, x, rows, 0, out, bf16);
  else if (w.ragged) rows_of<RAGGED, 6>(w, n, x, rows, 0, out, bf16);
  else rows_of<EVEN, 6>(w, n, x, rows, 0, out, bf16);
}

// x [rows, k] in bf16; out [rows, n] in bf16 or float32.
void dense(const Dense& w, const uint16_t* x, char* out, int64_t rows, bool bf16, int64_t threads) {
  int64_t blocks = (w.n + BLOCK - 1) / BLOCK;
  parallel(blocks, BLOCK * w.k * (rows + 1) * 2, threads, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; block++) {
      int64_t first = block * BLOCK, last = first + BLOCK < w.n ? first + BLOCK : w.n;
      if (w.codes) {
        Dense part = decoded(w, block);
        for (int64_t n = 0; n < part.n; n += QUAD)
          rows_of(part, n, x, rows, out + first * (bf16 ? 2 : 4), bf16);
        continue;
      }
      for (int64_t n = first; n < last; n += QUAD) rows_of(w, n, x, rows, out, bf16);
    }
  });
}

template <Kind KIND>
void expand_row(const Dense& w, int64_t row, uint16_t* out) {
  int64_t cursor = 0;
  for (int64_t c = 0; c < w.k; c += 32)
    _mm512_mask_storeu_epi16(out + c, lanes32(w.k - c), columns32<KIND>(w, row, c, 0, cursor));
}

// Rows start..stop of a sparse weight as dense bf16, [stop - start, k]; start is a multiple of 16.
void expand(const Dense& w, int64_t start, int64_t stop, uint16_t* out, int64_t threads) {
  int64_t blocks = (stop - start + BLOCK - 1) / BLOCK;
  parallel(blocks, BLOCK * w.k * 4, threads, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; block++) {
      int64_t first = start + block * BLOCK, last = first + BLOCK < stop ? first + BLOCK : stop;
      Dense part = w.codes ? decoded(w, first / BLOCK) : w;
      auto expand_one = w.ragged ? expand_row<RAGGED> : expand_row<EVEN>;
      for (int64_t r = first; r < last; r++)
        expand_one(part, w.codes ? r - first : r, out + (r - start) * w.k);
    }
  });
}

}  // namespace
#pragma GCC pop_options
