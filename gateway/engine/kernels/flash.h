// Attention of several rows of a sequence, and of all rows of a step.
//
// The way of FlashAttention (arXiv:2205.14135): a tile of keys and values is packed for a tile of
// rows, and softmax is corrected as larger scores come.
#pragma once
#include <atomic>

#include "attend.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma,avx512bf16")
namespace {

constexpr int ROWS = 6;         // query rows that share a load of packed keys
constexpr int64_t SPAN = 256;   // keys packed at a time
constexpr int64_t TILE = 192;   // query rows that share the packing, about
constexpr int64_t WEIGHT = 24;  // a multiply-add here in those of `GRAIN`: keys come from memory

struct Tile {  // rows [first, first + count) of a segment
  const Segment* segment;
  int64_t first, count;
};

// c [ROWS, 16·V] (+)= a [ROWS, depth] · b [depth, 16·V]; an element is a float32 or a bf16 pair.
// Not inlined: among other code the compiler keeps the sums in memory.
template <bool PAIRS, int V>
__attribute__((noinline)) void product(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
             int64_t depth, bool add) {
  __m512 acc[ROWS][V];
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      acc[m][v] = add ? _mm512_loadu_ps(c + m * ldc + 16 * v) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k++) {
    __m512i right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = _mm512_loadu_si512(b + k * ldb + 16 * v);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++) {
      __m512i left = _mm512_set1_epi32((int)a[m * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++)
        if constexpr (PAIRS)  // see int8.h for why not the intrinsic
          asm("vdpbf16ps %2, %1, %0" : "+v"(acc[m][v]) : "v"(left), "v"(right[v]));
        else
          acc[m][v] = _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right[v]), acc[m][v]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_ps(c + m * ldc + 16 * v, acc[m][v]);
}

template <bool PAIRS>
void products(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
              int64_t depth, int64_t columns, bool add) {
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) product<PAIRS, 4>(a, lda, b + i, ldb, c + i, ldc, depth, add);
  if (columns - i == 48) product<PAIRS, 3>(a, lda, b + i, ldb, c + i, ldc, depth, add);
  if (columns - i == 32) product<PAIRS, 2>(a, lda, b + i, ldb, c + i, ldc, depth, add);
  if (columns - i == 16) product<PAIRS, 1>(a, lda, b + i, ldb, c + i, ldc, depth, add);
}

INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Keys as columns: to [depth, SPAN], zero beyond the n there are (up to a multiple of 16).
template <bool PAIRS>
void pack_keys(const Attend& a, const int64_t* places, int64_t head, int64_t n, uint32_t* to) {
  int64_t depth = PAIRS ? a.dim / 2 : a.dim;
  for (int64_t j = 0; j < n; j += 16)
    for (int64_t c = 0; c < depth; c += 16) {
      __mmask16 keep = lanes(depth - c);
      __m512i rows[16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; t++) {
        rows[t] = _mm512_setzero_si512();
        if (j + t >= n) continue;
        int64_t at = places[j + t] + head * a.dim + (PAIRS ? 2 * c : c);
        if constexpr (PAIRS) rows[t] = _mm512_maskz_loadu_epi32(keep, (const uint16_t*)a.keys + at);
        else rows[t] = _mm512_castps_si512(load(a.keys, at, a.bf16, keep));
      }
      transpose16(rows);
      int64_t most = std::min<int64_t>(16, depth - c);
      for (int64_t t = 0; t < most; t++) _mm512_storeu_si512(to + (c + t) * SPAN + j, rows[t]);
    }
}

// Values as rows, or as rows of pairs of neighbours: to [n or n / 2, wide], zero beyond the n there
// are (up to a multiple of 16).
template <bool PAIRS>
void pack_values(const Attend& a, const int64_t* places, int64_t head, int64_t n, int64_t wide,
                 uint32_t* to) {
  int64_t all = (n + 15) / 16 * 16;
  for (int64_t j = 0; j < all; j += PAIRS ? 2 : 1)
    for (int64_t c = 0; c < wide; c += 16) {
      __mmask16 keep = lanes(a.dim - c);
      __m512i v[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int t = 0; t < (PAIRS ? 2 : 1); t++) {
        if (j + t >= n) break;
        int64_t at = places[j + t] + head * a.dim + c;
        if constexpr (PAIRS) {
          __m256i half = _mm256_maskz_loadu_epi16(keep, (const uint16_t*)a.values + at);
          v[t] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16 * t);
        } else {
          v[t] = _mm512_castps_si512(load(a.values, at, a.bf16, keep));
        }
      }
      _mm512_storeu_si512(to + (PAIRS ? j / 2 : j) * wide + c, _mm512_or_si512(v[0], v[1]));
    }
}

struct Tiling {  // a tile of rows against keys [at, at + n)
  int64_t head, group, wide, depth, at, n;
};

// 2^x to 1 part in 10⁴ (COARSE, enough for weights in bf16) or 10⁷; 0 far below.
template <bool COARSE>
INLINE __m512 exp2_16(__m512 x) {
  __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n), p;
  if constexpr (COARSE) {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.05517166f), r, _mm512_set1_ps(0.24261112f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69326099f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992807f));
  } else {  // Taylor's: (ln 2)ⁱ / i!
    p = _mm512_fmadd_ps(_mm512_set1_ps(1.5403530e-4f), r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  }
  return _mm512_scalef_ps(p, n);
}

// Weights of one row's scores [columns], of which [begin, stop) count; `top` and `sum` are the
// row's so far, scores in powers of two. Returns what former sums are to be multiplied with.
template <bool PAIRS>
INLINE float soften(const float* scores, uint32_t* weights, int64_t begin, int64_t stop,
                    int64_t columns, float scale, float& top, float& sum) {
  auto counts = [&](int64_t c) { return (__mmask16)(lanes(stop - c) & ~lanes(begin - c)); };
  int64_t plain = begin > 0 ? 0 : std::max<int64_t>(0, stop) / 16 * 16;  // all of a vector counts
  __m512 most = _mm512_set1_ps(LOWEST), by = _mm512_set1_ps(scale), total = _mm512_setzero_ps();
  for (int64_t c = 0; c < plain; c += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + c));
  for (int64_t c = plain; c < columns; c += 16)
    most = _mm512_mask_max_ps(most, counts(c), most, _mm512_loadu_ps(scores + c));
  float now = std::max(top, _mm512_reduce_max_ps(most) * scale);
  float fade = now == top ? 1.0f : std::exp2(top - now);
  __m512 shift = _mm512_set1_ps(now == LOWEST ? 0.0f : now);  // LOWEST: nothing seen yet
  auto take = [&](int64_t c, __mmask16 keep) {
    __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + c), by, shift);
    __m512 w = _mm512_maskz_mov_ps(keep, exp2_16<PAIRS>(x));
    total = _mm512_add_ps(total, w);
    if constexpr (PAIRS)
      _mm256_storeu_si256((__m256i*)((uint16_t*)weights + c), (__m256i)_mm512_cvtneps_pbh(w));
    else
      _mm512_storeu_ps((float*)weights + c, w);
  };
  for (int64_t c = 0; c < plain; c += 16) take(c, 0xffff);
  for (int64_t c = plain; c < columns; c += 16) take(c, counts(c));
  top = now;
  sum = sum * fade + _mm512_reduce_add_ps(total);
  return fade;
}

// Keys at..at + n - 1 of ROWS rows from `row` on: scores, softmax so far, values.
template <bool PAIRS>
void six_rows(const Attend& a, const Tile& tile, const Tiling& t, int64_t row, AttendScratch& m) {
  int64_t rows = tile.count * t.group, start = tile.segment->start + tile.first;
  int64_t low = start + row / t.group, high = start + (std::min(row + ROWS, rows) - 1) / t.group;
  int64_t n = std::min(t.n, high - t.at + 1);
  if (n <= 0 || (a.window && t.at + t.n <= low - a.window + 1)) return;
  int64_t columns = (n + 15) / 16 * 16;
  float* scores = m.scores.data();
  products<PAIRS>(&m.query[row * t.depth], t.depth, m.keys.data(), SPAN, scores, SPAN, t.depth,
                  columns, false);
  float scale = (float)(a.scale * 1.4426950408889634);  // e^x = 2^(x · log₂ e)
  for (int64_t i = 0; i < ROWS; i++) {
    int64_t at = start + std::min(row + i, rows - 1) / t.group - t.at;
    int64_t begin = a.window ? at - a.window + 1 : 0;
    float fade = soften<PAIRS>(scores + i * SPAN, &m.weights[i * SPAN], begin, std::min(n, at + 1),
                               columns, scale, m.top[row + i], m.sum[row + i]);
    if (fade == 1.0f) continue;
    float* out = &m.out[(row + i) * t.wide];
    for (int64_t c = 0; c < t.wide; c += 16)
      _mm512_storeu_ps(out + c, _mm512_mul_ps(_mm512_loadu_ps(out + c), _mm512_set1_ps(fade)));
  }
  products<PAIRS>(m.weights.data(), SPAN, m.values.data(), t.wide, &m.out[row * t.wide], t.wide,
                  PAIRS ? columns / 2 : columns, t.wide, true);
}

// Query rows of a tile, position by position and within it head by head: m.query [rows, depth].
template <bool PAIRS>
void take_query(const Attend& a, const Tile& tile, const Tiling& t, int64_t padded, AttendScratch& m) {
  m.query.assign(padded * t.depth + 16, 0);
  int64_t step = a.heads * a.dim / t.group;
  for (int64_t r = 0; r < tile.count * t.group; r++) {
    int64_t row = tile.segment->begin + tile.first + r / t.group;
    const float* from = a.query + (row * a.heads + t.head + r % t.group) * a.dim;
    for (int64_t c = 0; c < a.dim; c += 16) _mm_prefetch((const char*)(from + 8 * step + c), _MM_HINT_T0);
    for (int64_t c = 0; c < a.dim; c += 16)
      store(&m.query[r * t.depth], c, PAIRS, lanes(a.dim - c), load(from, c, false, lanes(a.dim - c)));
  }
}

template <bool PAIRS>
void many_rows(const Attend& a, const Tile& tile, int64_t head, int64_t group, AttendScratch& m) {
  const Segment& s = *tile.segment;
  int64_t rows = tile.count * group, padded = (rows + ROWS - 1) / ROWS * ROWS;
  int64_t stop = s.start + tile.first + tile.count, own = head / (a.heads / a.kv_heads);
  int64_t begin = a.window ? std::max<int64_t>(0, s.start + tile.first - a.window + 1) : 0;
  Tiling t{head, group, (a.dim + 15) / 16 * 16, PAIRS ? a.dim / 2 : a.dim, 0, 0};
  take_query<PAIRS>(a, tile, t, padded, m);
  find(a, s, begin, stop, m.places);
  m.keys.resize(t.depth * SPAN);
  m.values.resize((PAIRS ? SPAN / 2 : SPAN) * t.wide);
  m.scores.resize(ROWS * SPAN);
  m.weights.resize(ROWS * SPAN);
  m.out.assign(padded * t.wide, 0.0f);
  m.top.assign(padded, LOWEST);
  m.sum.assign(padded, 0.0f);
  for (t.at = begin; t.at < stop; t.at += SPAN) {
    t.n = std::min(SPAN, stop - t.at);
    pack_keys<PAIRS>(a, &m.places[t.at - begin], own, t.n, m.keys.data());
    pack_values<PAIRS>(a, &m.places[t.at - begin], own, t.n, t.wide, m.values.data());
    for (int64_t row = 0; row < rows; row += ROWS) six_rows<PAIRS>(a, tile, t, row, m);
  }
  for (int64_t r = 0; r < rows; r++) {
    int64_t to = ((s.begin + tile.first + r / group) * a.heads + head + r % group) * a.dim;
    __m512 by = _mm512_set1_ps(1.0f / m.sum[r]);
    for (int64_t c = 0; c < a.dim; c += 16)
      put(a.out, to + c, lanes(a.dim - c), _mm512_mul_ps(_mm512_loadu_ps(&m.out[r * t.wide + c]), by));
  }
}

void attend(const Attend& a, const Step& s) {
  thread_local std::vector<Tile> tiles;
  std::vector<Tile>& all = tiles;  // a thread_local named in the body below would be each thread's
  int64_t group = a.heads / a.kv_heads, cost = 0;
  int64_t most = std::max<int64_t>(1, TILE / group);
  all.clear();
  for (const Segment* g = s.segments; g < s.segments + s.count; g++)
    for (int64_t first = 0; first < g->end - g->begin; first += most) {
      int64_t count = std::min(most, g->end - g->begin - first), seen = g->start + first + count;
      all.push_back({g, first, count});
      cost += count * (a.window ? std::min(a.window, seen) : seen);
    }
  if (all.empty()) return;
  // Rows alone are shared out by heads only where they are too few for the threads; tiles always.
  bool lone = s.count == s.rows;
  int64_t parts = !lone ? a.kv_heads : s.count >= 4 * s.threads ? 1 : std::min(s.threads, a.kv_heads);
  if (parts * (int64_t)all.size() < s.threads) parts = a.heads;
  int64_t items = (int64_t)all.size() * parts, unit = parts == a.heads ? 1 : group;
  std::atomic<int64_t> next{0};
  parallel(items, cost * a.heads * a.dim * WEIGHT / items, s.threads, [&](int64_t, int64_t) {
    thread_local AttendScratch scratch;
    for (int64_t i; (i = next.fetch_add(1)) < items;) {
      const Tile& tile = all[all.size() - 1 - i / parts];  // the longest rows first
      int64_t part = i % parts, units = a.heads / unit;
      int64_t head = units * part / parts * unit, stop = units * (part + 1) / parts * unit;
      if (tile.segment->end - tile.segment->begin == 1) {
        auto run = a.bf16 ? one_row<true> : one_row<false>;
        run(a, *tile.segment, head, stop - head, scratch);
      } else {
        auto run = a.pairs ? many_rows<true> : many_rows<false>;
        run(a, tile, head, stop - head, scratch);
      }
    }
  });
}

}  // namespace
#pragma GCC pop_options
#endif
