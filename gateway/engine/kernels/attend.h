// Attention to keys and values in a paged pool: nothing is gathered, padded or masked in memory.
//
// Here: what is asked, and the lone row of a sequence, which reads its keys once for all query heads
// that share them. Several rows of a sequence: flash.h.
#pragma once
#include <algorithm>
#include <limits>

#include "common.h"
#include "step.h"

namespace {

struct Attend {
  const float* query;          // [rows, heads, dim]
  const void *keys, *values;   // [blocks, block size, kv_heads, dim]
  Out out;                     // [rows, heads, dim]
  int64_t heads, kv_heads, dim, block_size;
  int64_t window;              // newest tokens that a row sees; 0: all
  int64_t bf16;                // the pool's elements
  int64_t pairs;               // products of bf16 pairs (else of float32)
  double scale;
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx512bf16")
namespace {

constexpr int64_t AHEAD = 16;  // keys or values between a request to memory and its use
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct AttendScratch {
  std::vector<int64_t> places;  // of each seen position, its element offset in the pool
  std::vector<float> scores, out, top, sum;
  std::vector<uint32_t> query, keys, values, weights;
};

// Element offsets of positions begin..stop - 1, for head 0.
void find(const Attend& a, const Segment& s, int64_t begin, int64_t stop, std::vector<int64_t>& to) {
  to.resize(stop - begin);
  int64_t stride = a.kv_heads * a.dim;
  for (int64_t at = begin; at < stop;) {
    int64_t block = at / a.block_size, offset = at % a.block_size;
    int64_t next = std::min(stop, (block + 1) * a.block_size);
    int64_t from = (s.blocks[block] * a.block_size + offset) * stride;
    for (; at < next; at++, from += stride) to[at - begin] = from;
  }
}

// The sums of four vectors, in lanes 0 to 3.
INLINE __m512 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  return _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
}

// e^(x · scale - top) in place over x [n]; returns the sum. What is beyond n becomes 0.
INLINE float weigh(float* x, int64_t n, float scale, float top) {
  __m512 sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale), shift = _mm512_set1_ps(top);
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 keep = lanes(n - i);
    __m512 v = exp16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(keep, x + i), by, shift));
    v = _mm512_maskz_mov_ps(keep, v);
    _mm512_mask_storeu_ps(x + i, keep, v);
    sum = _mm512_add_ps(sum, v);
  }
  return _mm512_reduce_add_ps(sum);
}

// Asks for channels c .. c + 63 of a place that is needed soon.
template <bool HALF>
INLINE void expect(const void* pool, int64_t at) {
  const char* from = (const char*)pool + at * (HALF ? 2 : 4);
#pragma GCC unroll 4
  for (int line = 0; line < (HALF ? 2 : 4); line++)
    _mm_prefetch(from + 64 * line, _MM_HINT_T0);
}

// Channels c .. c + 63 of `group` queries [group, dim] times those of four keys; `first` channels
// set the scores (a distance `pitch` apart), others add to them.
template <bool HALF>
INLINE void score(const Attend& a, const float* query, int64_t group, int64_t c,
                  const int64_t (&at)[4], __mmask16 some, float* scores, int64_t pitch) {
  __mmask16 keep[4];
  __m512 key[4][4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) keep[v] = lanes(a.dim - c - 16 * v);
#pragma GCC unroll 4
  for (int t = 0; t < 4; t++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) key[t][v] = load(a.keys, at[t] + c + 16 * v, HALF, keep[v]);
  for (int64_t g = 0; g < group; g++, query += a.dim, scores += pitch) {
    __m512 sums[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) sums[t] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512 q = _mm512_maskz_loadu_ps(keep[v], query + c + 16 * v);
#pragma GCC unroll 4
      for (int t = 0; t < 4; t++) sums[t] = _mm512_fmadd_ps(q, key[t][v], sums[t]);
    }
    __m512 all = four_sums(sums[0], sums[1], sums[2], sums[3]);
    if (c) all = _mm512_add_ps(all, _mm512_maskz_loadu_ps(some, scores));
    _mm512_mask_storeu_ps(scores, some, all);
  }
}

// out [G, 64] += weights [G, n] (`pitch` apart) · channels c .. c + 63 of the values.
template <bool HALF, int G>
void mix(const Attend& a, const float* weights, int64_t pitch, const int64_t* places, int64_t n,
         int64_t at, float* out, int64_t wide) {
  __m512 sums[G][4];
  __mmask16 keep[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    keep[v] = lanes(a.dim - at % a.dim - 16 * v);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) sums[g][v] = _mm512_loadu_ps(out + g * wide + 16 * v);
  }
  for (int64_t j = 0; j < n; j++) {
    expect<HALF>(a.values, places[j + AHEAD] + at);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      __m512 value = load(a.values, places[j] + at + 16 * v, HALF, keep[v]);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++)
        sums[g][v] = _mm512_fmadd_ps(value, _mm512_set1_ps(weights[g * pitch + j]), sums[g][v]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_storeu_ps(out + g * wide + 16 * v, sums[g][v]);
}

// Scores in m.scores [count, n] of heads `head` to `head + count` - 1. Token by token, so that the
// pool is read in the order it lies in memory; what comes next is asked for in time.
template <bool HALF>
void scores_of(const Attend& a, const float* query, int64_t n, int64_t head, int64_t count,
               int64_t group, AttendScratch& m) {
  int64_t per = a.heads / a.kv_heads;
  for (int64_t j = 0; j < n; j += 4)
    for (int64_t h = 0; h < count; h += group)
      for (int64_t c = 0; c < a.dim; c += 64) {
        int64_t own = (head + h) / per * a.dim, at[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
          at[t] = m.places[j + t] + own;
          expect<HALF>(a.keys, m.places[j + t + AHEAD] + own + c);
        }
        score<HALF>(a, query + h * a.dim, group, c, at, lanes(n - j) & 0xf, &m.scores[h * n + j], n);
      }
}

template <bool HALF>
void values_of(const Attend& a, int64_t n, int64_t head, int64_t count, int64_t group, int64_t wide,
               AttendScratch& m) {
  int64_t per = a.heads / a.kv_heads;
  m.out.assign(count * wide, 0.0f);
  for (int64_t j = 0; j < n; j += AHEAD)
    for (int64_t h = 0; h < count; h += group)
      for (int64_t c = 0; c < a.dim; c += 64) {
        int64_t at = (head + h) / per * a.dim + c, some = std::min(AHEAD, n - j);
        for (int64_t g = h; g < h + group;) {
          auto run = h + group - g >= 4 ? mix<HALF, 4> : h + group - g >= 2 ? mix<HALF, 2> : mix<HALF, 1>;
          run(a, &m.scores[g * n + j], n, &m.places[j], some, at, &m.out[g * wide + c], wide);
          g += h + group - g >= 4 ? 4 : h + group - g >= 2 ? 2 : 1;
        }
      }
}

// Query heads `head` to `head + count` - 1 of a segment's only row: whole groups, or part of one.
template <bool HALF>
void one_row(const Attend& a, const Segment& s, int64_t head, int64_t count, AttendScratch& m) {
  int64_t stop = s.start + 1, begin = a.window ? std::max<int64_t>(0, stop - a.window) : 0;
  int64_t n = stop - begin, first = (s.begin * a.heads + head) * a.dim;
  int64_t group = std::min(count, a.heads / a.kv_heads), wide = (a.dim + 63) / 64 * 64;
  find(a, s, begin, stop, m.places);
  m.places.resize(n + 2 * AHEAD, m.places[n - 1]);  // what is read ahead is there, too
  m.scores.resize(count * n + 16);
  scores_of<HALF>(a, a.query + first, n, head, count, group, m);
  m.sum.resize(count);
  for (int64_t h = 0; h < count; h++) {
    float *scores = &m.scores[h * n], scale = (float)a.scale;
    __m512 top = _mm512_set1_ps(LOWEST);
    for (int64_t i = 0; i < n; i += 16)
      top = _mm512_mask_max_ps(top, lanes(n - i), top, _mm512_maskz_loadu_ps(lanes(n - i), scores + i));
    m.sum[h] = 1.0f / weigh(scores, n, scale, _mm512_reduce_max_ps(top) * scale);
  }
  values_of<HALF>(a, n, head, count, group, wide, m);
  for (int64_t h = 0; h < count; h++)
    for (int64_t c = 0; c < a.dim; c += 16) {
      __m512 out = _mm512_mul_ps(_mm512_loadu_ps(&m.out[h * wide + c]), _mm512_set1_ps(m.sum[h]));
      put(a.out, first + h * a.dim + c, lanes(a.dim - c), out);
    }
}

}  // namespace
#pragma GCC pop_options
#endif
