// Weights in integer codes (layout vnni16) times activations quantized on the fly to int8.
#pragma once
#include "common.h"
#include "gemm_int8.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

// ---- activations -----------------------------------------------------------------------------

INLINE void read_row(const Grouped& w, const void* x, bool bf16, float* v, int64_t stride) {
  if (w.columns) {
    for (int64_t p = 0; p < stride; p++) {
      int32_t c = at<int32_t>(w.columns, p);
      uint32_t bits = 0;
      if (c >= 0) bits = bf16 ? (uint32_t)at<uint16_t>(x, c) << 16 : at<uint32_t>(x, c);
      memcpy(v + p, &bits, 4);
    }
    return;
  }
  for (int64_t p = 0; p < stride; p += 16)
    _mm512_storeu_ps(v + p, load(x, p, bf16, lanes(w.k - p)));
}

// Row `row` of `rows` as codes, each part of at most PART columns of a group with its own scale.
void quantize_row(const Grouped& w, const void* x, bool bf16, const Quantized& to, int64_t row,
                  int64_t rows) {
  thread_local std::vector<float> scratch;
  scratch.resize(to.stride);
  float* v = scratch.data();
  read_row(w, x, bf16, v, to.stride);
  int64_t lot = row / LOT * LOT, part = 0;
  int r = row - lot, size = lot_size(rows - lot);
  int8_t* codes = to.codes + lot * to.stride;
  float *scales = to.scales + lot * to.parts + r, *sums = to.sums + lot * to.parts + r;
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
        put_codes(codes, size, r, i, _mm512_cvtepi32_epi8(q));
      }
      scales[part * size] = most / 127.f + _mm512_reduce_add_ps(poison);
      sums[part * size] = (float)_mm512_reduce_add_epi32(sum);
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

template <int BITS>
INLINE void planes_of(const Grouped& w, int64_t block, const uint8_t** planes) {
  constexpr int LAST = BITS == NESTED_BITS ? NESTED_BITS - 8 : 0;  // two planes of four
  for (int p = 0, left = BITS; left > LAST; left -= widest(left), p++)
    planes[p] = w.planes[p] + block * w.groups * w.width * 2 * widest(left);
}

// Operands I.. of one step of B blocks, each with the same four columns of MT rows of activations.
// (Recursion and not a loop over a lambda: a lambda does not inherit the instruction set.)
template <int BITS, int B, int MT, int CHAINS, int I>
INLINE void multiply(const uint8_t* const (&planes)[B][3], int64_t c, const int8_t* codes,
                     __m512i (&acc)[CHAINS][B][MT]) {
  __m512i v[B];
#pragma GCC unroll 2
  for (int b = 0; b < B; b++) v[b] = operand<BITS, I>(planes[b], c);
#pragma GCC unroll 16
  for (int m = 0; m < MT; m++) {
    __m512i four = broadcast(codes + (c + 4 * I) * MT + 4 * m);
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) dot4(acc[I % CHAINS][b][m], v[b], four);
  }
  if constexpr (4 * (I + 1) < step(BITS))
    multiply<BITS, B, MT, CHAINS, I + 1>(planes, c, codes, acc);
}

// What the blocks' next columns are read from; past their end, the first of the blocks after them.
template <int BITS, int B>
INLINE void prefetch(const Grouped& w, const uint8_t* const (&planes)[B][3], int64_t c) {
  constexpr int AHEAD = 8192 / B, WIDE = 2 * widest(BITS);
  int64_t whole = w.groups * w.width * WIDE, at = c * WIDE + AHEAD;
  if (B > 1 && at >= whole) at += whole;
#pragma GCC unroll 2
  for (int b = 0; b < B; b++)
#pragma GCC unroll 4
    for (int i = 0; i < step(BITS) * WIDE; i += 64) {
      _mm_prefetch((const char*)planes[b][0] + at + i, _MM_HINT_T0);
      if (BITS == NESTED_BITS) _mm_prefetch((const char*)planes[b][1] + at + i, _MM_HINT_T0);
    }
}

INLINE __m512 scales_of(const Grouped& w, int64_t index) {
  __m256i half = _mm256_loadu_si256((const __m256i*)(w.scales + index * BLOCK));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(w.scale));
}

// B blocks of 16 weight rows times a lot of MT activation rows, of which `rows` are stored. Where
// there is no second block the first stands in for it.
template <int BITS, int B, int MT>
void tile(const Grouped& w, int64_t block, const Lot& x, void* out, int64_t rows, bool bf16) {
  constexpr int CHAINS = B * MT > 4 ? 1 : B * MT > 1 ? 2 : 4;  // they hide vpdpbusd's latency
  int64_t next = (block + 1) * BLOCK < w.n, part = 0;
  const uint8_t* planes[B][3];
  for (int b = 0; b < B; b++) planes_of<BITS>(w, block + b * next, planes[b]);
  __m512 total[B][MT];
#pragma GCC unroll 2
  for (int b = 0; b < B; b++)
#pragma GCC unroll 16
    for (int m = 0; m < MT; m++) total[b][m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; g++) {
    int64_t stop = (g + 1) * w.width;
    for (int64_t c = g * w.width; c < stop; part++) {
      int64_t end = c + PART < stop ? c + PART : stop;
      __m512i acc[CHAINS][B][MT];
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS * B * MT; i++)
        acc[i / (B * MT)][i / MT % B][i % MT] = _mm512_setzero_si512();
      for (; c < end; c += step(BITS)) {
        prefetch<BITS>(w, planes, c);
        multiply<BITS, B, MT, CHAINS, 0>(planes, c, x.codes, acc);
      }
#pragma GCC unroll 2
      for (int b = 0; b < B; b++) {
        int64_t index = (block + b * next) * w.groups + g;
        __m512 scale = scales_of(w, index), zero = zero_points_of<BITS>(w, index);
#pragma GCC unroll 16
        for (int m = 0; m < MT; m++) {
          for (int i = 1; i < CHAINS; i++)
            acc[0][b][m] = _mm512_add_epi32(acc[0][b][m], acc[i][b][m]);
          __m512 sum = _mm512_set1_ps(x.sums[part * MT + m]);
          __m512 dot = _mm512_fnmadd_ps(zero, sum, _mm512_cvtepi32_ps(acc[0][b][m]));
          __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[part * MT + m]));
          total[b][m] = _mm512_fmadd_ps(dot, both, total[b][m]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; b++) {
    int64_t first = (block + b * next) * BLOCK;
    __mmask16 keep = lanes(w.n - first);
    __m512 bias = _mm512_setzero_ps();
    if (w.bias) bias = _mm512_maskz_loadu_ps(keep, w.bias + first);
#pragma GCC unroll 16
    for (int m = 0; m < MT; m++)
      if (m < rows) store(out, m * w.n + first, bf16, keep, _mm512_add_ps(total[b][m], bias));
  }
}

template <int BITS>
void lots(const Grouped& w, int64_t block, const Quantized& x, int64_t rows, char* out, bool bf16) {
  if (rows == 1) {  // a single stream of weights per thread
    tile<BITS, 1, 1>(w, block, lot_of(x, 0), out, 1, bf16);
    if ((block + 1) * BLOCK < w.n) tile<BITS, 1, 1>(w, block + 1, lot_of(x, 0), out, 1, bf16);
    return;
  }
  using Kernel = void (*)(const Grouped&, int64_t, const Lot&, void*, int64_t, bool);
  static constexpr Kernel of_size[] = {
      nullptr, tile<BITS, 2, 1>, tile<BITS, 2, 2>, tile<BITS, 2, 3>, tile<BITS, 2, 4>, nullptr,
      tile<BITS, 2, 6>, nullptr, tile<BITS, 2, 8>, nullptr, nullptr, nullptr, tile<BITS, 2, LOT>};
  for (int64_t row = 0; row < rows; row += LOT) {
    char* to = out + row * w.n * (bf16 ? 2 : 4);
    of_size[lot_size(rows - row)](w, block, lot_of(x, row), to, rows - row, bf16);
  }
}

template <int BITS>
void grouped(const Grouped& w, const char* x, char* out, int64_t rows, bool bf16, int64_t threads) {
  thread_local std::vector<int8_t> codes;
  thread_local std::vector<float> floats;
  int64_t size = bf16 ? 2 : 4, stride = w.groups * w.width, chunk = rows_at_once(stride);
  int64_t parts = w.groups * ((w.width + PART - 1) / PART), most = rows < chunk ? rows : chunk;
  most = (most + LOT - 1) / LOT * LOT;
  if ((int64_t)codes.size() < most * stride) codes.resize(most * stride);
  if ((int64_t)floats.size() < most * parts * 2) floats.resize(most * parts * 2);
  Quantized q{codes.data(), floats.data(), floats.data() + most * parts, stride, parts};
  int64_t pairs = (w.n + PAIR * BLOCK - 1) / (PAIR * BLOCK);
  for (int64_t start = 0; start < rows; start += chunk) {
    int64_t count = rows - start < chunk ? rows - start : chunk;
    const char* from = x + start * w.k * size;
    char* to = out + start * w.n * size;
    parallel(count, stride * 16, threads, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; m++) quantize_row(w, from + m * w.k * size, bf16, q, m, count);
    });
    parallel(pairs, PAIR * BLOCK * stride * count, threads, [&](int64_t a, int64_t b) {
      for (int64_t pair = a; pair < b; pair++) lots<BITS>(w, PAIR * pair, q, count, to, bf16);
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
