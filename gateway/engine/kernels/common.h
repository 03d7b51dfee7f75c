// What all kernels share: descriptions of stored weights, work split over threads, vector loads.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int BLOCK = 16;        // rows of a weight that travel together
constexpr int PART = 128;        // activations that share one int8 scale, at most
constexpr int64_t CHUNK = 192;   // rows of activations quantized at a time: bounds the scratch
constexpr int64_t GRAIN = 1 << 20;  // int8 multiply-adds (about 8 µs) that pay for another thread

enum Feature { INT8 = 1, BF16 = 2, SPARSE = 4, NESTED = 32, KV = 64 };

struct Grouped {  // layout vnni16; see grouped.py
  const uint8_t* planes[3];
  const uint16_t* scales;  // fp16 [blocks, groups, 16]
  const void* zeros;       // [blocks, groups, 16] or null
  const int32_t* columns;  // [groups * width] or null
  const float* bias;       // [n] or null
  int64_t n, k, bits, groups, width;
  int64_t zeros_bytes;     // 1: uint8, 2: fp16 and 4: float32 relative to `zero`
  float scale, zero;
};

enum Format { BF16_ROWS = 0, FLOAT32_ROWS = 1, FLOAT16_ROWS = 2 };

struct Dense {  // row-major floats, or kept values and bitmap of a sparse weight; see sparse.py
  const uint16_t* weight;  // [n, stride] in `format`; null when the values are codes
  const Grouped* codes;    // [n, kept] or null
  const void* mask;        // uint32 [n, ceil(k / 32)] or null
  const float* bias;       // [n] or null
  int64_t n, k, stride;
  int64_t ragged;          // 0 when the bitmap keeps 16 of every 32 columns
  int64_t format;          // of dense rows; sparse values are bf16
};

template <class T>  // an element of a mapped tensor, which may lie at any address
T at(const void* base, int64_t i) {
  T value;
  memcpy(&value, (const char*)base + i * sizeof(T), sizeof(T));
  return value;
}

// body(first, last) over `count` items, each costing as much as `cost` int8 multiply-adds.
template <class F>
void parallel(int64_t count, int64_t cost, int64_t threads, F body) {
  int64_t most = 1 + count * cost / GRAIN;
  threads = threads < most ? threads : most;
  threads = threads < count ? threads : count;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
    {
      int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
      body(count * t / team, count * (t + 1) / team);
    }
    return;
  }
#endif
  body(int64_t{0}, count);
}

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

INLINE __mmask16 lanes(int64_t count) {
  return count >= 16 ? 0xffff : (__mmask16)((1u << (count > 0 ? count : 0)) - 1);
}

INLINE __m512 load(const void* from, int64_t i, bool bf16, __mmask16 keep) {
  if (!bf16) return _mm512_maskz_loadu_ps(keep, (const float*)from + i);
  __m256i half = _mm256_maskz_loadu_epi16(keep, (const uint16_t*)from + i);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void store(void* to, int64_t i, bool bf16, __mmask16 keep, __m512 v) {
  bool whole = keep == 0xffff;  // a masked store takes many times as long
  if (!bf16 && whole) return _mm512_storeu_ps((float*)to + i, v);
  if (!bf16) return _mm512_mask_storeu_ps((float*)to + i, keep, v);
  __m512i u = _mm512_castps_si512(v);  // round to nearest even; a NaN stays one
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000));
  __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
  if (whole) return _mm256_storeu_si256((__m256i*)((uint16_t*)to + i), half);
  _mm256_mask_storeu_epi16((uint16_t*)to + i, keep, half);
}

}  // namespace
#pragma GCC pop_options
#endif
