// One decode step's attention over a quantized KV pool: new keys and values are stored, live blocks
// read where they lie, codes turned to floats in registers. The bytes and the arithmetic that makes
// them are those of compressors/quantize/kv.py, bit for bit; layout in engine/kv_quant.py.
#pragma once
#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <algorithm>
#include <cmath>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
#pragma GCC optimize("fp-contract=off")  // codes must not depend on who rounds
namespace {

struct Kv {  // one layer of a pool
  uint8_t* blocks;      // [num_blocks, block_bytes]
  const float* steps;   // [256], ascending
  int64_t block_bytes, key_room, key_stride, tail_stride;
  int64_t heads, group, key_dim, value_dim, bits, tail_groups, value_groups;
};

struct KvStep {  // padding rows have writes in block 0
  const float *query, *key, *value;  // [batch, heads * per_head | heads, dim]
  float* out;                        // [batch, heads * per_head, value_dim]
  const int64_t *writes, *tails, *own, *tables;  // [batch], [batch], [batch], [batch, context]
  int64_t batch, context, per_head, window;      // window 0: all tokens
  float scale, softcap;                          // softcap 0: none
};

struct KvScratch {
  std::vector<float> own, query, step, low, scores, weights;
};

INLINE int64_t kv_codes(int64_t dim, int64_t bits) { return (dim * bits + 7) / 8; }
INLINE int64_t kv_wide(int64_t n) { return (n + 15) / 16 * 16; }

struct KvRange {
  float step, offset;  // x = step * (code + offset)
  uint8_t index, zero;
};

inline KvRange kv_range(float low, float high, int64_t bits, const float* steps) {
  float top = (float)((1 << bits) - 1), unit = (float)(1 << (bits - 4));
  float reach = std::max(low / (127.0f * unit), -low / (128.0f * unit));
  float span = std::max((high - low) / (top + 1.0f - unit), reach);
  int64_t index = std::min<int64_t>(std::lower_bound(steps, steps + 256, span) - steps, 255);
  float step = steps[index];
  float zero = std::floor(low / (step * unit) + 0.5f / unit);
  zero = std::min(127.0f, std::max(-128.0f, zero));
  return {step, zero * unit, (uint8_t)index, (uint8_t)(int8_t)zero};
}

inline uint8_t kv_code(float x, const KvRange& r, int64_t bits) {
  float code = std::nearbyintf(x / r.step - r.offset);
  return (uint8_t)std::min((float)((1 << bits) - 1), std::max(0.0f, code));
}

INLINE void kv_put(uint8_t* codes, int64_t i, int64_t half, int64_t bits, uint8_t code) {
  if (bits == 8) codes[i] = code;
  else if (i < half) codes[i] = code;  // the low nibbles first: they clear the high ones
  else codes[i - half] |= code << 4;
}

inline void kv_encode_token(const float* x, int64_t dim, int64_t groups, int64_t bits,
                            const float* steps, uint8_t* to) {
  int64_t size = dim / groups, half = kv_codes(dim, 4), bytes = kv_codes(dim, bits);
  for (int64_t g = 0; g < groups; g++) {
    auto [low, high] = std::minmax_element(x + g * size, x + (g + 1) * size);
    KvRange r = kv_range(*low, *high, bits, steps);
    for (int64_t i = g * size; i < (g + 1) * size; i++)
      kv_put(to, i, half, bits, kv_code(x[i], r, bits));
    to[bytes + 2 * g] = r.index;
    to[bytes + 2 * g + 1] = r.zero;
  }
}

inline void kv_decode_tail(const uint8_t* from, int64_t dim, int64_t groups, const float* steps,
                           float* x) {
  int64_t size = dim / groups;
  for (int64_t g = 0; g < groups; g++) {
    float step = steps[from[dim + 2 * g]];
    float low = (float)(int8_t)from[dim + 2 * g + 1] * step * 16.0f;
    for (int64_t i = g * size; i < (g + 1) * size; i++) x[i] = (float)from[i] * step + low;
  }
}

inline void kv_encode_keys(const Kv& p, const float* keys, uint8_t* to) {
  int64_t bytes = kv_codes(p.key_dim, p.bits), half = kv_codes(p.key_dim, 4);
  uint8_t* parameters = to + p.group * bytes;
  for (int64_t i = 0; i < p.key_dim; i++) {
    float low = keys[i], high = keys[i];
    for (int64_t t = 1; t < p.group; t++) {
      low = std::min(low, keys[t * p.key_dim + i]);
      high = std::max(high, keys[t * p.key_dim + i]);
    }
    KvRange r = kv_range(low, high, p.bits, p.steps);
    for (int64_t t = 0; t < p.group; t++)
      kv_put(to + t * bytes, i, half, p.bits, kv_code(keys[t * p.key_dim + i], r, p.bits));
    parameters[i] = r.index;
    parameters[p.key_dim + i] = r.zero;
  }
}

// The 16 codes of one chunk as floats: `high` takes the other nibbles.
INLINE __m512 kv_load(const uint8_t* codes, __mmask16 keep, bool packed, bool high) {
  __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(keep, codes));
  if (packed) wide = high ? _mm512_srli_epi32(wide, 4) : _mm512_and_si512(wide, _mm512_set1_epi32(15));
  return _mm512_cvtepi32_ps(wide);
}

template <bool PACKED>
inline float kv_dot(const uint8_t* codes, const float* query, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  int64_t wide = kv_wide(count);
  for (int64_t j = 0; j < count; j += 16) {
    __mmask16 keep = lanes(count - j);
    sum = _mm512_fmadd_ps(kv_load(codes + j, keep, PACKED, false), _mm512_loadu_ps(query + j), sum);
    if (PACKED)
      sum = _mm512_fmadd_ps(kv_load(codes + j, keep, true, true),
                            _mm512_loadu_ps(query + wide + j), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

INLINE __m512 kv_exp(__m512 x) {  // for x <= 0; below -87 it is 0
  __mmask16 live = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(live, y, n);
}

// Scores in place to weights that add up to 1.
inline void kv_softmax(float* scores, int64_t count) {
  float top = *std::max_element(scores, scores + count);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 keep = lanes(count - i);
    __m512 e = kv_exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(keep, scores + i), _mm512_set1_ps(top)));
    e = _mm512_maskz_mov_ps(keep, e);
    sum = _mm512_add_ps(sum, e);
    _mm512_mask_storeu_ps(scores + i, keep, e);
  }
  float scale = 1.0f / _mm512_reduce_add_ps(sum);
  for (int64_t i = 0; i < count; i++) scores[i] *= scale;
}

// Σ weights · values of tokens [begin, stop) of one head, for one query.
template <bool PACKED>
inline void kv_values(const Kv& p, const int64_t* table, int64_t head, int64_t begin, int64_t stop,
                      const float* weights, KvScratch& m, float* out) {
  int64_t count = stop - begin, groups = p.value_groups, size = p.value_dim / groups;
  int64_t bytes = kv_codes(p.value_dim, p.bits), stride = bytes + 2 * groups;
  float unit = (float)(1 << (p.bits - 4));
  auto token = [&](int64_t t) {
    return p.blocks + table[t / p.group] * p.block_bytes + p.key_room +
           (head * p.group + t % p.group) * stride;
  };
  m.weights.resize(groups * count);
  m.low.assign(std::max<int64_t>(groups, m.low.size()), 0.0f);
  for (int64_t t = begin; t < stop; t++) {
    const uint8_t* parameters = token(t) + bytes;
    for (int64_t g = 0; g < groups; g++) {
      float scaled = weights[t - begin] * p.steps[parameters[2 * g]];
      m.weights[g * count + t - begin] = scaled;
      m.low[g] += scaled * ((float)(int8_t)parameters[2 * g + 1] * unit);
    }
  }
  for (int64_t j = 0; j < bytes; j += 16) {
    __mmask16 keep = lanes(bytes - j);
    int64_t g0 = j / size, g1 = PACKED ? std::min((bytes + j) / size, groups - 1) : 0;
    __m512 low = _mm512_set1_ps(m.low[g0]), high = _mm512_set1_ps(m.low[g1]);
    const float *w0 = &m.weights[g0 * count], *w1 = &m.weights[g1 * count];
    for (int64_t t = begin; t < stop;) {
      const uint8_t* codes = token(t) + j;
      int64_t end = std::min(stop, (t / p.group + 1) * p.group);
      for (; t < end; t++, codes += stride) {
        low = _mm512_fmadd_ps(kv_load(codes, keep, PACKED, false), _mm512_set1_ps(w0[t - begin]), low);
        if (PACKED)
          high = _mm512_fmadd_ps(kv_load(codes, keep, true, true), _mm512_set1_ps(w1[t - begin]), high);
      }
    }
    _mm512_mask_storeu_ps(out + j, keep, low);
    if (PACKED) _mm512_mask_storeu_ps(out + bytes + j, lanes(p.value_dim - bytes - j), high);
  }
}

template <bool PACKED>
void kv_head(const Kv& p, const KvStep& s, int64_t row, int64_t head, KvScratch& m) {
  int64_t size = p.group, dim = p.key_dim, at = s.writes[row] % size, own = s.own[row];
  uint8_t* block = p.blocks + s.writes[row] / size * p.block_bytes;
  uint8_t* tail = p.blocks + s.tails[row] * p.block_bytes + head * p.tail_stride;
  int64_t tail_bytes = dim + 2 * p.tail_groups;
  int64_t value_bytes = kv_codes(p.value_dim, p.bits) + 2 * p.value_groups;
  kv_encode_token(s.value + (row * p.heads + head) * p.value_dim, p.value_dim, p.value_groups,
                  p.bits, p.steps, block + p.key_room + (head * size + at) * value_bytes);
  kv_encode_token(s.key + (row * p.heads + head) * dim, dim, p.tail_groups, 8, p.steps,
                  tail + at * tail_bytes);
  m.own.resize(size * dim);
  for (int64_t t = 0; t <= at; t++)
    kv_decode_tail(tail + t * tail_bytes, dim, p.tail_groups, p.steps, &m.own[t * dim]);

  int64_t stop = own * size + at + 1, begin = s.window ? std::max<int64_t>(0, stop - s.window) : 0;
  int64_t count = stop - begin, codes = kv_codes(dim, p.bits), wide = kv_wide(codes);
  const int64_t* table = s.tables + row * s.context;
  const float* query = s.query + (row * p.heads + head) * s.per_head * dim;
  float* out = s.out + (row * p.heads + head) * s.per_head * p.value_dim;
  m.scores.resize(s.per_head * count);
  m.query.assign(2 * wide, 0.0f);
  m.step.resize(dim);
  m.low.resize(std::max(dim, p.value_groups));
  float unit = (float)(1 << (p.bits - 4));
  for (int64_t i = begin / size; i < own; i++) {
    const uint8_t* keys = p.blocks + table[i] * p.block_bytes + head * p.key_stride;
    const uint8_t* parameters = keys + size * codes;
    for (int64_t c = 0; c < dim; c++) {
      m.step[c] = p.steps[parameters[c]];
      m.low[c] = (float)(int8_t)parameters[dim + c] * m.step[c] * unit;
    }
    for (int64_t r = 0; r < s.per_head; r++) {
      float offset = 0.0f;
      for (int64_t c = 0; c < dim; c++) {
        float q = query[r * dim + c];
        m.query[PACKED && c >= codes ? wide + c - codes : c] = q * m.step[c];
        offset += q * m.low[c];
      }
      for (int64_t t = std::max(begin, i * size); t < (i + 1) * size; t++)
        m.scores[r * count + t - begin] =
            kv_dot<PACKED>(keys + (t - i * size) * codes, m.query.data(), codes) + offset;
    }
  }
  for (int64_t r = 0; r < s.per_head; r++) {
    float* scores = &m.scores[r * count];
    for (int64_t t = std::max(begin, own * size); t < stop; t++) {
      const float* key = &m.own[(t - own * size) * dim];
      float sum = 0.0f;
      for (int64_t c = 0; c < dim; c++) sum += query[r * dim + c] * key[c];
      scores[t - begin] = sum;
    }
    for (int64_t i = 0; i < count; i++) {
      scores[i] *= s.scale;
      if (s.softcap != 0.0f) scores[i] = std::tanh(scores[i] / s.softcap) * s.softcap;
    }
    kv_softmax(scores, count);
    kv_values<PACKED>(p, table, head, begin, stop, scores, m, out + r * p.value_dim);
  }
  if (at == size - 1) kv_encode_keys(p, m.own.data(), block + head * p.key_stride);
}

void kv_decode(const Kv& p, const KvStep& s, int64_t threads) {
  int64_t cost = s.context * p.group * s.per_head * (p.key_dim + p.value_dim);
  parallel(s.batch * p.heads, cost, threads, [&](int64_t first, int64_t last) {
    KvScratch scratch;
    for (int64_t i = first; i < last; i++) {
      int64_t row = i / p.heads, head = i % p.heads;
      if (s.writes[row] < p.group) {
        float* out = s.out + i * s.per_head * p.value_dim;
        std::fill(out, out + s.per_head * p.value_dim, 0.0f);
      } else if (p.bits == 4) {
        kv_head<true>(p, s, row, head, scratch);
      } else {
        kv_head<false>(p, s, row, head, scratch);
      }
    }
  });
}

}  // namespace
#pragma GCC pop_options
#endif
