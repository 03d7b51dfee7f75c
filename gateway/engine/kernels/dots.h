// Row-major weights times rows of activations: dot products along both, register-blocked.
//
// QUAD weight rows times up to TILE activation rows are summed at once, every sum over the lanes of a
// register and then over the lanes: one order, whatever the number of rows. Rows are taken in pieces
// of SPAN bytes, so that a tile's activations stay in the first cache.
#pragma once
#include "common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

constexpr int QUAD = 4;
constexpr int TILE = 6;                   // 24 sums, of 32 registers
constexpr int FEW = 4;                    // tiles that take turns at every quad
constexpr int64_t STREAM = 8192;          // bytes that a single stream of weights is fetched ahead
constexpr int64_t LEAD = 4096;            // and four of them, beyond the quad at work
constexpr int64_t SPAN = 4096;            // bytes of an activation row in a piece
constexpr int64_t NEAR = 512 << 10;       // bytes of weights that all activations meet in one go

INLINE __mmask32 lanes32(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << (count > 0 ? count : 0)) - 1;
}

INLINE __mmask64 lanes64(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << (count > 0 ? count : 0)) - 1;
}

// Elements: of weights (W bytes) and activations (X bytes), COLUMNS of them in a register. Products
// are assembly because GCC 12 copies every sum around the intrinsics: half the speed.
struct Bf16 {
  using Sum = __m512;
  static constexpr int W = 2, X = 2, COLUMNS = 32;
  static INLINE __m512i weights(const char* at) { return _mm512_loadu_si512(at); }
  static INLINE __m512i weights(const char* at, int64_t left) {
    return _mm512_maskz_loadu_epi16(lanes32(left), at);
  }
  static INLINE __m512i inputs(const char* at) { return weights(at); }
  static INLINE __m512i inputs(const char* at, int64_t left) { return weights(at, left); }
  static INLINE void add(__m512& sum, __m512i w, __m512i x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

struct Float32 {
  using Sum = __m512;
  static constexpr int W = 4, X = 4, COLUMNS = 16;
  static INLINE __m512 weights(const char* at) { return _mm512_loadu_ps(at); }
  static INLINE __m512 weights(const char* at, int64_t left) {
    return _mm512_maskz_loadu_ps(lanes(left), at);
  }
  static INLINE __m512 inputs(const char* at) { return weights(at); }
  static INLINE __m512 inputs(const char* at, int64_t left) { return weights(at, left); }
  static INLINE void add(__m512& sum, __m512 w, __m512 x) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

struct Float16 : Float32 {
  static constexpr int W = 2;
  static INLINE __m512 weights(const char* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
  }
  static INLINE __m512 weights(const char* at, int64_t left) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(left), at));
  }
};

struct Bytes {  // signed weights, unsigned activations
  using Sum = __m512i;
  static constexpr int W = 1, X = 1, COLUMNS = 64;
  static INLINE __m512i weights(const char* at) { return _mm512_loadu_si512(at); }
  static INLINE __m512i weights(const char* at, int64_t left) {
    return _mm512_maskz_loadu_epi8(lanes64(left), at);
  }
  static INLINE __m512i inputs(const char* at) { return weights(at); }
  static INLINE __m512i inputs(const char* at, int64_t left) { return weights(at, left); }
  static INLINE void add(__m512i& sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  }
};

// The sums of four registers, in lanes 0 to 3.
INLINE __m512 sum_each(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  return _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
}

INLINE __m512i sum_each(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  all = _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0x4e));
  return _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1));
}

INLINE void clear(__m512& sum) { sum = _mm512_setzero_ps(); }
INLINE void clear(__m512i& sum) { sum = _mm512_setzero_si512(); }
INLINE void keep_four(void* to, __m512 v) { _mm_storeu_ps((float*)to, _mm512_castps512_ps128(v)); }
INLINE void keep_four(void* to, __m512i v) {
  _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(v));
}

struct Strip {  // up to 16 weight rows
  const char* weights;
  int64_t stride, count;  // bytes from row to row; rows
  int64_t ahead, pace;    // four lines to fetch: bytes from the first row, and on for every register
};

struct Inputs {  // rows of activations
  const char* at;
  int64_t stride, columns;  // bytes from row to row; columns of a row
};

template <class E, int MT, bool TAIL>
INLINE void add_columns(const char* const (&w)[QUAD], const Inputs& x, int64_t c, int64_t left,
                        int64_t ahead, typename E::Sum (&sum)[QUAD][MT]) {
  decltype(E::weights(x.at)) v[QUAD];
#pragma GCC unroll 4
  for (int r = 0; r < QUAD; r++) {
    v[r] = TAIL ? E::weights(w[r] + c * E::W, left) : E::weights(w[r] + c * E::W);
    _mm_prefetch(w[0] + ahead + 64 * r, _MM_HINT_T0);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; m++) {
    const char* at = x.at + m * x.stride + c * E::X;
    auto a = TAIL ? E::inputs(at, left) : E::inputs(at);
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++) E::add(sum[r][m], v[r], a);
  }
}

// Whole registers of a single activation row: weight rows one after the other, a single stream.
template <class E>
INLINE void add_row(const char* const (&w)[QUAD], const Inputs& x, int64_t c, int64_t end,
                    typename E::Sum (&sum)[QUAD][1]) {
#pragma GCC unroll 4
  for (int r = 0; r < QUAD; r++)
    for (int64_t i = c; i < end; i += E::COLUMNS) {
      _mm_prefetch(w[r] + i * E::W + STREAM, _MM_HINT_T0);
      E::add(sum[r][0], E::weights(w[r] + i * E::W), E::inputs(x.at + i * E::X));
    }
}

// Columns c .. end of a quad of weight rows times MT activation rows, added to the sums in `kept`
// (none yet when c is 0) and left there, or, at the end of the rows, to `out`: four sums a row.
template <class E, int MT>
INLINE void add_piece(const Strip& strip, const char* const (&w)[QUAD], const Inputs& x, int64_t c,
                      int64_t end, typename E::Sum (&kept)[QUAD][TILE], int32_t* out) {
  typename E::Sum sum[QUAD][MT];
#pragma GCC unroll 4
  for (int r = 0; r < QUAD; r++)
#pragma GCC unroll 8
    for (int m = 0; m < MT; m++)
      if (c) sum[r][m] = kept[r][m];
      else clear(sum[r][m]);
  int64_t whole = c + (end - c) / E::COLUMNS * E::COLUMNS;
  if constexpr (MT == 1) {
    add_row<E>(w, x, c, whole, sum);
  } else {
    int64_t ahead = strip.ahead + c / E::COLUMNS * strip.pace;
    for (; c < whole; c += E::COLUMNS, ahead += strip.pace)
      add_columns<E, MT, false>(w, x, c, 0, ahead, sum);
  }
  if (whole < end) add_columns<E, MT, true>(w, x, whole, end - whole, 0, sum);
  if (end < x.columns) {
#pragma GCC unroll 4
    for (int r = 0; r < QUAD; r++)
#pragma GCC unroll 8
      for (int m = 0; m < MT; m++) kept[r][m] = sum[r][m];
    return;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; m++)
    keep_four(out + m * BLOCK, sum_each(sum[0][m], sum[1][m], sum[2][m], sum[3][m]));
}

// Row r of the strip times row m of MT activation rows, at 16·m + r (in the type of E's sums).
template <class E, int MT>
void strip_sums(const Strip& strip, const Inputs& x, int32_t* sums) {
  typename E::Sum kept[BLOCK / QUAD][QUAD][TILE];
  int64_t span = x.columns * E::X > SPAN * 3 / 2 ? SPAN / E::X : x.columns;
  for (int64_t c = 0; c < x.columns; c += span) {
    int64_t end = c + span < x.columns ? c + span : x.columns;
    for (int64_t n = 0; n < strip.count; n += QUAD) {
      const char* w[QUAD];
      for (int r = 0; r < QUAD; r++)  // the last row stands in for those that are not there
        w[r] = strip.weights + (n + r < strip.count ? n + r : strip.count - 1) * strip.stride;
      add_piece<E, MT>(strip, w, x, c, end, kept[n / QUAD], sums + n);
    }
  }
}

template <class E>
INLINE void sums_of(const Strip& strip, const Inputs& x, int64_t row, int64_t count, int32_t* sums) {
  using Kernel = void (*)(const Strip&, const Inputs&, int32_t*);
  static constexpr Kernel of_size[] = {nullptr,          strip_sums<E, 1>, strip_sums<E, 2>,
                                       strip_sums<E, 3>, strip_sums<E, 4>, strip_sums<E, 5>,
                                       strip_sums<E, TILE>};
  of_size[count](strip, {x.at + row * x.stride, x.stride, x.columns}, sums);
}

// Few rows: all of them meet a quad of weight rows, and each tile fetches a share of the next quad.
template <class W>
void times_few(const W& w, int64_t first, int64_t last, const Inputs& x, int64_t rows) {
  using E = typename W::Element;
  alignas(64) int32_t sums[FEW * TILE * BLOCK];
  int64_t tiles = (rows + TILE - 1) / TILE;
  for (int64_t block = first; block < last; block++) {
    Strip strip = w.strip(block), quad = strip;
    int64_t lead = QUAD * strip.stride + LEAD;
    quad.pace = QUAD * E::COLUMNS * E::W / tiles;
    for (int64_t n = 0; n < strip.count; n += QUAD) {
      quad.weights = strip.weights + n * strip.stride;
      quad.count = strip.count - n < QUAD ? strip.count - n : QUAD;
      for (int64_t t = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
        quad.ahead = lead + QUAD * strip.stride * t / tiles;
        sums_of<E>(quad, x, row, end - row, sums + row * BLOCK + n);
      }
    }
    w.finish(block, 0, rows, sums);
  }
}

// Many rows: weights stay near while all of them pass, a tile at a time.
template <class W>
void times_many(const W& w, int64_t first, int64_t last, const Inputs& x, int64_t rows) {
  using E = typename W::Element;
  alignas(64) int32_t sums[TILE * BLOCK];
  int64_t tiles = (rows + TILE - 1) / TILE, near = 1;
  if (W::MAPPED) near += NEAR / (BLOCK * x.columns * E::W);
  for (; first < last; first += near) {
    int64_t stop = first + near < last ? first + near : last;
    Strip strip = w.strip(first);
    for (int64_t t = 0; t < tiles; t++) {
      int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
      for (int64_t block = first; block < stop; block++) {
        if (W::MAPPED) strip = w.strip(block);
        strip.ahead = QUAD * strip.stride;
        strip.pace = QUAD * E::COLUMNS * E::W;
        sums_of<E>(strip, x, row, end - row, sums);
        w.finish(block, row, end - row, sums);
      }
    }
  }
}

// All products of a weight of n rows. `W` says what its elements are, gives a strip of 16 rows at a
// time (in scratch of the thread, unless MAPPED), and takes the sums of some rows of activations.
template <class W>
void times(const W& w, int64_t n, const Inputs& x, int64_t rows, int64_t threads) {
  int64_t cost = BLOCK * x.columns * (rows + 1) * W::Element::W;
  parallel((n + BLOCK - 1) / BLOCK, cost, threads, [&](int64_t a, int64_t b) {
    if (rows <= FEW * TILE) times_few(w, a, b, x, rows);
    else times_many(w, a, b, x, rows);
  });
}

// Sums plus bias, to `out` [rows, pitch] in bf16 or float32.
INLINE void put_sums(const int32_t* sums, int64_t rows, const float* bias, __mmask16 keep, void* out,
                     int64_t pitch, bool bf16) {
  __m512 add = bias ? _mm512_maskz_loadu_ps(keep, bias) : _mm512_setzero_ps();
  for (int64_t m = 0; m < rows; m++)
    store(out, m * pitch, bf16, keep, _mm512_add_ps(_mm512_load_ps(sums + m * BLOCK), add));
}

}  // namespace
#pragma GCC pop_options
