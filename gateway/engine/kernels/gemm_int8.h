// Register-blocked sums of unsigned weights times signed activations, exact in 32-bit integers.
//
// A tile is two blocks of 16 weight rows times up to LOT activation rows. Activations lie in lots of
// LOT rows (the last lot in fewer), the same four columns of all rows of a lot side by side: one
// stream whatever the width, and no two rows of a power-of-two width fight for a line of the cache.
#pragma once
#include "common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

constexpr int PAIR = 2;               // blocks of weight rows in a tile
constexpr int LOT = 12;               // activation rows in a tile: 24 sums, of 32 registers
constexpr int64_t LOTS = 512 << 10;   // bytes of codes quantized at a time: half of an L2

// Rows that the kernel of a lot computes: few sizes, so that the build takes seconds.
INLINE int lot_size(int64_t rows) {
  return rows > 8 ? LOT : rows > 6 ? 8 : rows > 4 ? 6 : rows;
}

INLINE int64_t rows_at_once(int64_t stride) {
  int64_t lots = LOTS / (stride * LOT);
  return (lots > 1 ? lots : 1) * LOT;
}

struct Quantized {  // lots of int8 codes; per row and part of it: the scale and the sum of the codes
  int8_t* codes;          // per lot [stride / 4, size, 4]
  float *scales, *sums;   // per lot [parts, size]
  int64_t stride, parts;
};

struct Lot {  // one lot of them
  const int8_t* codes;
  const float *scales, *sums;
};

INLINE Lot lot_of(const Quantized& x, int64_t row) {
  return {x.codes + row * x.stride, x.scales + row * x.parts, x.sums + row * x.parts};
}

// 16 codes from column `c` (a multiple of 4) of row `r` of a lot of `size` rows.
INLINE void put_codes(int8_t* lot, int size, int r, int64_t c, __m128i codes) {
  int8_t* to = lot + c * size + 4 * r;
  if (size == 1) return _mm_storeu_si128((__m128i*)to, codes);
  int32_t four[4];
  _mm_storeu_si128((__m128i*)four, codes);
  for (int i = 0; i < 4; i++) memcpy(to + 4 * i * size, four + i, 4);
}

// Four columns of 16 weight rows, the same of one activation row. As an intrinsic, GCC 12 copies
// every sum before it adds: half the speed.
INLINE void dot4(__m512i& sum, __m512i weights, __m512i four) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(four));
}

INLINE __m512i broadcast(const int8_t* four) { return _mm512_set1_epi32(at<int32_t>(four, 0)); }

}  // namespace
#pragma GCC pop_options
