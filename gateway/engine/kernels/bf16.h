// Products in floating point: dense rows, and sparse rows of bf16 values or integer codes.
#pragma once
#include "common.h"
#include "dots.h"
#include "grouped.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx512bf16,avx512vbmi2")
namespace {

template <class E>
struct DenseRows {
  using Element = E;
  static constexpr bool MAPPED = true;
  const Dense& w;
  char* out;
  bool bf16;

  Strip strip(int64_t block) const {
    int64_t first = block * BLOCK, left = w.n - first;
    const char* at = (const char*)w.weight + first * w.stride * E::W;
    return {at, w.stride * E::W, left < BLOCK ? left : BLOCK, 0, 0};
  }

  void finish(int64_t block, int64_t row, int64_t count, const int32_t* sums) const {
    int64_t first = block * BLOCK, size = bf16 ? 2 : 4;
    put_sums(sums, count, w.bias ? w.bias + first : nullptr, lanes(w.n - first),
             out + (row * w.n + first) * size, w.n, bf16);
  }
};

// EVEN: of every 32 columns 16 are kept, so their values lie at half the column. RAGGED: any number,
// so a cursor runs along.
enum Kind { EVEN, RAGGED };

// Columns c .. c + 31 of a row. `cursor` counts a RAGGED row's values so far; none is read beyond
// the row's, whatever the bitmap says.
template <Kind KIND>
INLINE __m512i columns32(const Dense& w, int64_t row, int64_t c, int64_t& cursor) {
  const uint16_t* from = w.weight + row * w.stride;
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

template <Kind KIND>
void expand_row(const Dense& w, int64_t row, uint16_t* out) {
  int64_t cursor = 0, c = 0;
  for (; c + 32 <= w.k; c += 32)
    _mm512_storeu_si512(out + c, columns32<KIND>(w, row, c, cursor));
  if (c < w.k)
    _mm512_mask_storeu_epi16(out + c, lanes32(w.k - c), columns32<KIND>(w, row, c, cursor));
}

// Block of 16 rows of a sparse weight in codes, its values as bf16 in this thread's scratch.
Dense decoded(const Dense& w, int64_t block) {
  thread_local std::vector<uint16_t> scratch;
  int64_t stride = w.codes->groups * w.codes->width, first = block * BLOCK;
  if ((int64_t)scratch.size() < BLOCK * stride) scratch.resize(BLOCK * stride);
  decode(*w.codes, block, scratch.data());
  Dense part = w;
  part.weight = scratch.data();
  part.codes = nullptr;
  part.mask = (const char*)w.mask + first * ((w.k + 31) / 32) * 4;
  part.stride = stride;
  return part;
}

// Rows first .. last, of one block, of a sparse weight as dense bf16, [last - first, k].
void expand_rows(const Dense& w, int64_t first, int64_t last, uint16_t* out) {
  Dense part = w.codes ? decoded(w, first / BLOCK) : w;
  auto expand_one = w.ragged ? expand_row<RAGGED> : expand_row<EVEN>;
  for (int64_t r = first; r < last; r++)
    expand_one(part, w.codes ? r % BLOCK : r, out + (r - first) * w.k);
}

struct SparseRows : DenseRows<Bf16> {
  static constexpr bool MAPPED = false;

  Strip strip(int64_t block) const {
    thread_local std::vector<uint16_t> scratch;
    if ((int64_t)scratch.size() < BLOCK * w.k) scratch.resize(BLOCK * w.k);
    int64_t first = block * BLOCK, last = first + BLOCK < w.n ? first + BLOCK : w.n;
    expand_rows(w, first, last, scratch.data());
    return {(const char*)scratch.data(), w.k * 2, last - first, 0, 0};
  }
};

// bf16 rows as float32 in this thread's scratch.
const char* widened(const char* x, int64_t count) {
  thread_local std::vector<float> scratch;
  if ((int64_t)scratch.size() < count) scratch.resize(count);
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 keep = lanes(count - i);
    _mm512_mask_storeu_ps(scratch.data() + i, keep, load(x, i, true, keep));
  }
  return (const char*)scratch.data();
}

// out [rows, n] in bf16 or float32; x [rows, k] in the same where weights are floats, else in bf16.
void dense(const Dense& w, const char* x, char* out, int64_t rows, bool bf16, int64_t threads) {
  if (w.mask) return times(SparseRows{{w, out, bf16}}, w.n, {x, w.k * 2, w.k}, rows, threads);
  if (w.format == BF16_ROWS)
    return times(DenseRows<Bf16>{w, out, bf16}, w.n, {x, w.k * 2, w.k}, rows, threads);
  for (int64_t start = 0; start < rows; start += CHUNK) {
    int64_t count = rows - start < CHUNK ? rows - start : CHUNK, size = bf16 ? 2 : 4;
    const char* part = x + start * w.k * size;
    Inputs inputs{bf16 ? widened(part, count * w.k) : part, w.k * 4, w.k};
    char* to = out + start * w.n * size;
    if (w.format == FLOAT32_ROWS)
      times(DenseRows<Float32>{w, to, bf16}, w.n, inputs, count, threads);
    else times(DenseRows<Float16>{w, to, bf16}, w.n, inputs, count, threads);
  }
}

// Rows start..stop of a sparse weight as dense bf16, [stop - start, k]; start is a multiple of 16.
void expand(const Dense& w, int64_t start, int64_t stop, uint16_t* out, int64_t threads) {
  int64_t blocks = (stop - start + BLOCK - 1) / BLOCK;
  parallel(blocks, BLOCK * w.k * 4, threads, [&](int64_t a, int64_t b) {
    for (int64_t block = a; block < b; block++) {
      int64_t first = start + block * BLOCK, last = first + BLOCK < stop ? first + BLOCK : stop;
      expand_rows(w, first, last, out + (first - start) * w.k);
    }
  });
}

}  // namespace
#pragma GCC pop_options
