// Weights in integer codes (layout vnni16) times activations quantized on the fly to int8.
#pragma once
#include "common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

// ---- activations -----------------------------------------------------------------------------

struct Quantized {  // rows of int8 codes; per part of a row: its scale and the sum of its codes
  int8_t* codes;
  float *scales, *sums;
  int64_t stride, parts;
};

void quantize_row(const Grouped& w, const void* x, bool bf16, const Quantized& to, int64_t row) {
  thread_local std::vector<float> scratch;
  scratch.resize(to.stride);
  float* v = scratch.data();
  if (w.columns) {
    for (int64_t p = 0; p < to.stride; p++) {
      int32_t c = at<int32_t>(w.columns, p);
      uint32_t bits = 0;
      if (c >= 0) bits = bf16 ? (uint32_t)at<uint16_t>(x, c) << 16 : at<uint32_t>(x, c);
      memcpy(v + p, &bits, 4);
    }
  } else {
    for (int64_t p = 0; p < to.stride; p += 16)
      _mm512_storeu_ps(v + p, load(x, p, bf16, lanes(w.k - p)));
  }
  int64_t part = row * to.parts;
  for (int64_t start = 0; start < to.stride; start += w.width)
    for (int64_t p = start; p < start + w.width; part++) {
      int64_t end = p + PART < start + w.width ? p + PART : start + w.width;
      __m512 top = _mm512_setzero_ps(), poison = top;  // poison: NaN if any value is not finite
      for (int64_t i = p; i < end; i += 16) {
        __m512 a = _mm512_loadu_ps(v + i);
        top = _mm512_max_ps(top, _mm512_abs_ps(a));
        poison = _mm512_fmadd_ps(a, _mm512_setzero_ps(), poison);
      }
      float most = _mm512_reduce_max_ps(top);
      __m512 inverse = _mm512_set1_ps(most > 1e-30f ? 127.f / most : 0.f);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = p; i < end; i += 16) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v + i), inverse));
        sum = _mm512_add_epi32(sum, q);
        _mm_storeu_si128((__m128i*)(to.codes + row * to.stride + i), _mm512_cvtepi32_epi8(q));
      }
      to.scales[part] = most / 127.f + _mm512_reduce_add_ps(poison);
      to.sums[part] = (float)_mm512_reduce_add_epi32(sum);
      p = end;
    }
}

// ---- weights in integer codes ----------------------------------------------------------------

// Stands where bits stand: a 4-bit plane times 8, plus another 4-bit plane; see nested.py.
constexpr int NESTED_BITS = 9;

constexpr int widest(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
constexpr int step(int bits) {
  return bits == 8 || bits == 4 || bits == 2 || bits == NESTED_BITS ? 16 : 32;
}

// Codes of 16 rows × 4 columns as unsigned bytes: operand I after column `c`, a multiple of step.
template <int BITS, int I>
INLINE __m512i operand(const uint8_t* const* planes, int64_t c) {
  constexpr int W = widest(BITS), FIELDS = 8 / W, REST = BITS - W;
  const uint8_t* at = planes[0] + (c / (4 * FIELDS) + I / FIELDS) * 64;
  __m512i v = _mm512_loadu_si512(at);
  if constexpr (W < 8) {
    v = _mm512_srli_epi16(v, W * (I % FIELDS));
    v = _mm512_and_si512(v, _mm512_set1_epi8((1 << W) - 1));
  }
  if constexpr (BITS == NESTED_BITS)
    v = _mm512_add_epi8(_mm512_slli_epi16(v, 3), operand<4, I>(planes + 1, c));
  else if constexpr (REST > 0)
    v = _mm512_or_si512(_mm512_slli_epi16(v, REST), operand<REST, I>(planes + 1, c));
  return v;
}

INLINE __m512 zero_points(const Grouped& w, int64_t i) {
  __m512 base = _mm512_set1_ps(w.zero);
  if (!w.zeros) return base;
  const char* at = (const char*)w.zeros + i * BLOCK * w.zeros_bytes;
  if (w.zeros_bytes == 1)
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)));
  if (w.zeros_bytes == 2)
    return _mm512_add_ps(base, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)));
  return _mm512_add_ps(base, _mm512_loadu_ps(at));
}

template <int BITS>  // the same in units of the codes that `operand` gives
INLINE __m512 zero_points_of(const Grouped& w, int64_t i) {
  __m512 zero = zero_points(w, i), eight = _mm512_set1_ps(8.f);
  return BITS == NESTED_BITS ? _mm512_fmadd_ps(zero, eight, eight) : zero;
}

INLINE __m512i broadcast(const int8_t* four) {
  return _mm512_set1_epi32(at<int32_t>(four, 0));
}

template <int BITS>
INLINE void planes_of(const Grouped& w, int64_t block, const uint8_t** planes) {
  constexpr int LAST = BITS == NESTED_BITS ? NESTED_BITS - 8 : 0;  // two planes of four
  for (int p = 0, left = BITS; left > LAST; left -= widest(left), p++)
    planes[p] = w.planes[p] + block * w.groups * w.width * 2 * widest(left);
}

INLINE void prefetch(const uint8_t* at, int bytes) {
#pragma GCC unroll 4
  for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char*)at + 2048 + i, _MM_HINT_T0);
}

// Operands I.. of one step, each with the same four columns of MT activation rows. (Recursion and
// not a loop over a lambda: a lambda does not inherit the instruction set.)
template <int BITS, int MT, int CHAINS, int I>
INLINE void multiply(const uint8_t* const* planes, int64_t c, const int8_t* codes, int64_t stride,
                     __m512i (&acc)[MT][CHAINS]) {
  __m512i v = operand<BITS, I>(planes, c);
#pragma GCC unroll 16
  for (int m = 0; m < MT; m++) {
    __m512i& sum = acc[m][I % CHAINS];
    sum = _mm512_dpbusd_epi32(sum, v, broadcast(codes + m * stride + 4 * I));
  }
  if constexpr (4 * (I + 1) < step(BITS))
    multiply<BITS, MT, CHAINS, I + 1>(planes, c, codes, stride, acc);
}

// One block of 16 weight rows times MT activation rows.
template <int BITS, int MT>
void tile(const Grouped& w, int64_t block, const Quantized& x, int64_t row, void* out, bool bf16) {
  constexpr int CHAINS = MT == 1 ? 4 : MT < 4 ? 2 : 1;  // independent sums hide vpdpbusd's latency
  const uint8_t* planes[3];
  planes_of<BITS>(w, block, planes);
  const int8_t* codes = x.codes + row * x.stride;
  const float *scales = x.scales + row * x.parts, *sums = x.sums + row * x.parts;
  __m512 total[MT];
#pragma GCC unroll 16
  for (int m = 0; m < MT; m++) total[m] = _mm512_setzero_ps();
  int64_t part = 0;
  for (int64_t g = 0; g < w.groups; g++) {
    int64_t index = block * w.groups + g, stop = (g + 1) * w.width;
    __m256i half = _mm256_loadu_si256((const __m256i*)(w.scales + index * BLOCK));
    __m512 scale = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(w.scale));
    __m512 zero = zero_points_of<BITS>(w, index);
    for (int64_t c = g * w.width; c < stop; part++) {
      int64_t end = c + PART < stop ? c + PART : stop;
      __m512i acc[MT][CHAINS];
#pragma GCC unroll 16
      for (int m = 0; m < MT; m++)
        for (int i = 0; i < CHAINS; i++) acc[m][i] = _mm512_setzero_si512();
      for (; c < end; c += step(BITS)) {
        if (MT == 1) prefetch(planes[0] + c * 2 * widest(BITS), step(BITS) * 2 * widest(BITS));
        if (MT == 1 && BITS == NESTED_BITS) prefetch(planes[1] + c * 8, step(BITS) * 8);
        multiply<BITS, MT, CHAINS, 0>(planes, c, codes + c, x.stride, acc);
      }
#pragma GCC unroll 16
      for (int m = 0; m < MT; m++) {
        for (int i = 1; i < CHAINS; i++) acc[m][0] = _mm512_add_epi32(acc[m][0], acc[m][i]);
        __m512 sum = _mm512_set1_ps(sums[m * x.parts + part]);
        __m512 dot = _mm512_fnmadd_ps(zero, sum, _mm512_cvtepi32_ps(acc[m][0]));
        __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scales[m * x.parts + part]));
        total[m] = _mm512_fmadd_ps(dot, both, total[m]);
      }
    }
  }
  __mmask16 keep = lanes(w.n - block * BLOCK);
  __m512 bias = _mm512_setzero_ps();
  if (w.bias) bias = _mm512_maskz_loadu_ps(keep, w.bias + block * BLOCK);
#pragma GCC unroll 16
  for (int m = 0; m < MT; m++)
    store(out, (row + m) * w.n + block * BLOCK, bf16, keep, _mm512_add_ps(total[m], bias));
}

// The tile after MT: few enough sizes that the build takes seconds.
constexpr int smaller(int mt) { return mt > 8 ? 8 : mt > 6 ? 6 : mt > 4 ? 4 : mt - 1; }

template <int BITS, int MT>
void tiles(const Grouped& w, int64_t block, const Quantized& x, int64_t rows, int64_t row,
           void* out, bool bf16) {
  for (; row + MT <= rows; row += MT) tile<BITS, MT>(w, block, x, row, out, bf16);
  if constexpr (MT > 1) tiles<BITS, smaller(MT)>(w, block, x, rows, row, out, bf16);
}

template <int BITS>
void grouped(const Grouped& w, const char* x, char* out, int64_t rows, bool bf16, int64_t threads) {
  thread_local std::vector<int8_t> codes;
  thread_local std::vector<float> floats;
  int64_t size = bf16 ? 2 : 4, stride = w.groups * w.width;
  int64_t parts = w.groups * ((w.width + PART - 1) / PART), most = rows < CHUNK ? rows : CHUNK;
  if ((int64_t)codes.size() < most * stride) codes.resize(most * stride);
  if ((int64_t)floats.size() < most * parts * 2) floats.resize(most * parts * 2);
  Quantized q{codes.data(), floats.data(), floats.data() + most * parts, stride, parts};
  for (int64_t start = 0; start < rows; start += CHUNK) {
    int64_t count = rows - start < CHUNK ? rows - start : CHUNK;
    const char* from = x + start * w.k * size;
    char* to = out + start * w.n * size;
    parallel(count, stride * 16, threads, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; m++) quantize_row(w, from + m * w.k * size, bf16, q, m);
    });
    parallel((w.n + BLOCK - 1) / BLOCK, BLOCK * stride * count, threads, [&](int64_t a, int64_t b) {
      for (int64_t block = a; block < b; block++) tiles<BITS, 12>(w, block, q, count, 0, to, bf16);
    });
  }
}

// ---- weights in integer codes, expanded ------------------------------------------------------

// Columns c + 4·I .. c + 4·I + 15 of a block, as one row of 16 bytes per weight row.
template <int BITS, int I>
INLINE void transpose(const uint8_t* const* planes, int64_t c, uint8_t (&bytes)[BLOCK][16]) {
  __m512i v0 = operand<BITS, I>(planes, c), v1 = operand<BITS, I + 1>(planes, c);
  __m512i v2 = operand<BITS, I + 2>(planes, c), v3 = operand<BITS, I + 3>(planes, c);
  __m512i low01 = _mm512_unpacklo_epi32(v0, v1), low23 = _mm512_unpacklo_epi32(v2, v3);
  __m512i high01 = _mm512_unpackhi_epi32(v0, v1), high23 = _mm512_unpackhi_epi32(v2, v3);
  __m512i quarter[4] = {
      _mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
      _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  for (int q = 0; q < 4; q++) {  // lane l of quarter q belongs to row 4·l + q
    alignas(64) uint8_t lanes[4][16];
    _mm512_store_si512(lanes, quarter[q]);
    for (int l = 0; l < 4; l++) memcpy(bytes[4 * l + q], lanes[l], 16);
  }
}

// One block of 16 weight rows as bf16, [16, groups * width].
template <int BITS>
void decode(const Grouped& w, int64_t block, uint16_t* out) {
  const uint8_t* planes[3];
  planes_of<BITS>(w, block, planes);
  for (int64_t g = 0; g < w.groups; g++) {
    int64_t index = block * w.groups + g;
    float scale[BLOCK], zero[BLOCK];
    __m256i half = _mm256_loadu_si256((const __m256i*)(w.scales + index * BLOCK));
    _mm512_storeu_ps(scale, _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(w.scale)));
    _mm512_storeu_ps(zero, zero_points(w, index));
    for (int64_t c = g * w.width; c < (g + 1) * w.width; c += step(BITS)) {
      uint8_t bytes[step(BITS) / 16][BLOCK][16];
      transpose<BITS, 0>(planes, c, bytes[0]);
      if constexpr (step(BITS) == 32) transpose<BITS, 4>(planes, c, bytes[1]);
      for (int part = 0; part < step(BITS) / 16; part++)
        for (int r = 0; r < BLOCK; r++) {
          __m128i codes = _mm_loadu_si128((const __m128i*)bytes[part][r]);
          __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
          v = _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(zero[r])), _mm512_set1_ps(scale[r]));
          store(out, r * w.groups * w.width + c + 16 * part, true, 0xffff, v);
        }
    }
  }
}

void decode(const Grouped& w, int64_t block, uint16_t* out) {
  static constexpr decltype(&decode<8>) by_bits[] = {decode<2>, decode<3>, decode<4>, decode<5>,
                                                     decode<6>, decode<7>, decode<8>};
  by_bits[w.bits - 2](w, block, out);
}

}  // namespace
#pragma GCC pop_options
