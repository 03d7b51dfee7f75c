// CPU kernels over the storage layouts of this package: plain C ABI, no Python and no torch.
//
// A caller owns every pointer; nothing is kept between calls but per-thread scratch. Instruction sets
// are chosen per function, and features() says which functions this CPU may call. Every output element
// is summed in one fixed order whatever the number of rows or threads, so batching changes no bit.
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int BLOCK = 16;        // rows of a weight that travel together
constexpr int PART = 128;        // activations that share one int8 scale, at most
constexpr int64_t CHUNK = 192;   // rows of activations quantized at a time: bounds the scratch
constexpr int64_t GRAIN = 1 << 17;  // multiply-adds below which a second thread costs more than it saves

enum Feature { INT8 = 1, BF16 = 2, SPARSE = 4 };

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

struct Dense {  // row-major bf16, or kept values and bitmap of a 2:4 sparse weight; see sparse24.py
  const uint16_t* weight;
  const uint32_t* mask;  // [n, kp / 32] or null
  const float* bias;
  int64_t n, k;
};

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

INLINE __m512 load(const void* at, int64_t i, bool bf16, __mmask16 keep) {
  if (!bf16) return _mm512_maskz_loadu_ps(keep, (const float*)at + i);
  __m256i half = _mm256_maskz_loadu_epi16(keep, (const uint16_t*)at + i);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void store(void* at, int64_t i, bool bf16, __mmask16 keep, __m512 v) {
  if (!bf16) return _mm512_mask_storeu_ps((float*)at + i, keep, v);
  __m512i u = _mm512_castps_si512(v);  // round to nearest even; a NaN stays one
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000));
  __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
  _mm256_mask_storeu_epi16((uint16_t*)at + i, keep, half);
}

// ---- activations -------------------------------------------------------------------------------

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
      int64_t c = w.columns[p];
      uint32_t bits = 0;
      if (c >= 0 && bf16) bits = (uint32_t)((const uint16_t*)x)[c] << 16;
      if (c >= 0 && !bf16) memcpy(&bits, (const float*)x + c, 4);
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

// ---- weights in integer codes --------------------------------------------------------------------

constexpr int widest(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
constexpr int step(int bits) { return bits == 8 || bits == 4 || bits == 2 ? 16 : 32; }

// Codes of 16 rows × 4 columns, as unsigned bytes: operand I after column `c` (a multiple of step).
template <int BITS, int I>
INLINE __m512i operand(const uint8_t* const* planes, int64_t c) {
  constexpr int W = widest(BITS), FIELDS = 8 / W, REST = BITS - W;
  const uint8_t* at = planes[0] + (c / (4 * FIELDS) + I / FIELDS) * 64;
  __m512i v = _mm512_loadu_si512(at);
  if constexpr (W < 8) {
    v = _mm512_srli_epi16(v, W * (I % FIELDS));
    v = _mm512_and_si512(v, _mm512_set1_epi8((1 << W) - 1));
  }
  if constexpr (REST > 0)
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

INLINE __m512i broadcast(const int8_t* at) {
  int32_t four;
  memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

template <int BITS>
INLINE void planes_of(const Grouped& w, int64_t block, const uint8_t** planes) {
  for (int p = 0, left = BITS; left > 0; left -= widest(left), p++)
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
  if constexpr (4 * (I + 1) < step(BITS)) multiply<BITS, MT, CHAINS, I + 1>(planes, c, codes, stride, acc);
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
    __m512 zero = zero_points(w, index);
    for (int64_t c = g * w.width; c < stop; part++) {
      int64_t end = c + PART < stop ? c + PART : stop;
      __m512i acc[MT][CHAINS];
#pragma GCC unroll 16
      for (int m = 0; m < MT; m++)
        for (int i = 0; i < CHAINS; i++) acc[m][i] = _mm512_setzero_si512();
      for (; c < end; c += step(BITS)) {
        if (MT == 1) prefetch(planes[0] + c * 2 * widest(BITS), step(BITS) * 2 * widest(BITS));
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

template <int BITS, int MT>
void tiles(const Grouped& w, int64_t block, const Quantized& x, int64_t rows, int64_t row, void* out,
           bool bf16) {
  for (; row + MT <= rows; row += MT) tile<BITS, MT>(w, block, x, row, out, bf16);
  if constexpr (MT > 1) tiles<BITS, MT - 1>(w, block, x, rows, row, out, bf16);
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
    parallel(count, stride * 8, threads, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; m++) quantize_row(w, from + m * w.k * size, bf16, q, m);
    });
    parallel((w.n + BLOCK - 1) / BLOCK, BLOCK * stride * count, threads, [&](int64_t a, int64_t b) {
      for (int64_t block = a; block < b; block++) tiles<BITS, 12>(w, block, q, count, 0, to, bf16);
    });
  }
}

}  // namespace
#pragma GCC pop_options

// ---- bf16 weights, dense or 2:4 sparse -------------------------------------------------------------

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx512bf16,avx512vbmi2")
namespace {

constexpr int QUAD = 4;  // weight rows that share a load of the activations

INLINE __mmask32 lanes32(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << (count > 0 ? count : 0)) - 1;
}

template <bool IS_SPARSE>
INLINE __m512i columns32(const Dense& w, int64_t row, int64_t c, __mmask32 keep) {
  if constexpr (IS_SPARSE) {
    int64_t runs = (w.k + 31) / 32;
    __m256i kept = _mm256_loadu_si256((const __m256i*)(w.weight + row * runs * 16 + c / 2));
    return _mm512_maskz_expand_epi16(w.mask[row * runs + c / 32], _mm512_castsi256_si512(kept));
  }
  return _mm512_maskz_loadu_epi16(keep, w.weight + row * w.k + c);
}

template <bool IS_SPARSE>
INLINE void prefetch_row(const Dense& w, int64_t row, int64_t c) {
  int64_t pitch = IS_SPARSE ? (w.k + 31) / 32 * 16 : w.k;
  _mm_prefetch((const char*)(w.weight + row * pitch + (IS_SPARSE ? c / 2 : c)), _MM_HINT_T0);
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
template <bool IS_SPARSE, int MT>
void dots(const Dense& w, int64_t n, const uint16_t* x, int64_t row, void* out, bool bf16) {
  __m512 acc[QUAD][MT];
#pragma GCC unroll 4
  for (int r = 0; r < QUAD; r++)
#pragma GCC unroll 16
    for (int m = 0; m < MT; m++) acc[r][m] = _mm512_setzero_ps();
  int64_t count = w.n - n < QUAD ? w.n - n : QUAD;
  for (int64_t c = 0; c < w.k; c += 32) {
    __mmask32 keep = lanes32(w.k - c);
    __m512bh v[QUAD];
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++) {
      v[r] = (__m512bh)columns32<IS_SPARSE>(w, n + (r < count ? r : 0), c, keep);
      if (row == 0) prefetch_row<IS_SPARSE>(w, n + QUAD + r, c);
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
    store(out, (row + m) * w.n + n, bf16, keep, sums);
  }
}

template <bool IS_SPARSE, int MT>
void rows_of(const Dense& w, int64_t n, const uint16_t* x, int64_t rows, int64_t row, void* out,
             bool bf16) {
  for (; row + MT <= rows; row += MT) dots<IS_SPARSE, MT>(w, n, x, row, out, bf16);
  if constexpr (MT > 1) rows_of<IS_SPARSE, MT - 1>(w, n, x, rows, row, out, bf16);
}

template <bool IS_SPARSE>
void dense(const Dense& w, const uint16_t* x, void* out, int64_t rows, bool bf16, int64_t threads) {
  parallel((w.n + QUAD - 1) / QUAD, QUAD * w.k * (rows + 1), threads, [&](int64_t a, int64_t b) {
    for (int64_t n = a * QUAD; n < b * QUAD; n += QUAD)
      rows_of<IS_SPARSE, 6>(w, n, x, rows, 0, out, bf16);
  });
}

void expand_row(const Dense& w, int64_t row, uint16_t* out) {
  for (int64_t c = 0; c < w.k; c += 32)
    _mm512_mask_storeu_epi16(out + c, lanes32(w.k - c), columns32<true>(w, row, c, 0));
}

// Rows start..stop of a sparse weight as dense bf16, [stop - start, k].
void expand(const Dense& w, int64_t start, int64_t stop, uint16_t* out, int64_t threads) {
  parallel(stop - start, w.k, threads, [&](int64_t a, int64_t b) {
    for (int64_t r = a; r < b; r++) expand_row(w, start + r, out + r * w.k);
  });
}

}  // namespace
#pragma GCC pop_options

EXPORT int pressgate_features() {
  __builtin_cpu_init();
  bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!base) return 0;
  int found = __builtin_cpu_supports("avx512vnni") ? INT8 : 0;
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2"))
    found |= BF16 | SPARSE;
  return found;
}

EXPORT void pressgate_grouped(const Grouped* w, const void* x, void* out, int64_t rows, int bf16,
                              int64_t threads) {
  using Kernel = void (*)(const Grouped&, const char*, char*, int64_t, bool, int64_t);
  static const Kernel by_bits[] = {grouped<2>, grouped<3>, grouped<4>, grouped<5>,
                                   grouped<6>, grouped<7>, grouped<8>};
  by_bits[w->bits - 2](*w, (const char*)x, (char*)out, rows, bf16 != 0, threads);
}

EXPORT void pressgate_dense(const Dense* w, const void* x, void* out, int64_t rows, int bf16,
                            int64_t threads) {
  auto run = w->mask ? dense<true> : dense<false>;
  run(*w, (const uint16_t*)x, out, rows, bf16 != 0, threads);
}

EXPORT void pressgate_expand(const Dense* w, int64_t start, int64_t stop, void* out,
                             int64_t threads) {
  expand(*w, start, stop, (uint16_t*)out, threads);
}
#else
EXPORT int pressgate_features() { return 0; }
#endif

EXPORT int pressgate_abi() { return 1; }
