// One forward step as a list of operations over the caller's buffers: everything but the attention.
//
// A row of activations is float32 until a linear wants it in bf16. Each row is computed by itself,
// in one fixed order: neither the other rows nor the number of threads change a bit of it.
#pragma once
#include <cmath>

#include "common.h"

namespace {

struct Segment {  // rows [begin, end) are neighbours of one sequence, the first at `start`
  int64_t begin, end, start;
  const int32_t* blocks;  // the sequence's block table
};

struct Step {  // what changes from step to step
  const int64_t* ids;        // [rows]
  const int64_t* positions;  // [rows]
  const int64_t* slots;      // [rows] block · block size + offset of the new key and value
  const int64_t* kept;       // [outputs] rows whose logits are wanted
  const Segment* segments;
  int64_t rows, outputs, count;  // count: of segments
  int64_t threads;
};

struct Op {
  void (*run)(const void* args, const Step* step);
  const void* args;
};

// A row is given as float32, as bf16, or as both; null: not asked for.
struct Out {
  float* full;
  uint16_t* half;
};

struct Embed {
  const void* table;  // [vocabulary, n]
  float* out;
  int64_t n, bf16;
};

struct Norm {  // x += add; out = x / √(mean(x²) + eps) · weight
  float* x;
  const float* add;     // or null
  const float* weight;  // [n]
  Out out;
  int64_t n, kept;  // kept: of the kept rows only
  double eps;
};

struct Linear {  // an entry of native.cpp
  void (*run)(const void* weight, const void* x, void* out, int64_t rows, int bf16, int64_t threads);
  const void* weight;
  const void* x;
  float* out;
  int64_t kept;
};

struct Angles {  // cosines, then sines of a row's position: [rows, 2 · half]
  const float* frequency;
  float* out;
  int64_t half;
  double scale;
};

struct Rotate {  // norms of heads, rotation of halves, new keys and values into the pool
  float *query, *key, *value;             // [rows, heads or kv_heads, dim]
  const float *query_norm, *key_norm;     // [dim] or null
  const float* angles;
  void *keys, *values;                    // [slots, kv_heads, dim], or null: not written
  int64_t heads, kv_heads, dim, bf16;
  double eps;
};

struct Gate {  // act(gate) · up
  const float *gate, *up;
  Out out;
  int64_t n, gelu;
};

struct Scale {  // x · by per column, or x in other forms
  const float *x, *by;  // [rows, n], [n] or null
  Out out;
  int64_t n, kept;
};

struct Add {  // x += add
  float* x;
  const float* add;
  int64_t n;
};

struct Pick {  // some columns of x
  const float* x;          // [rows, k]
  const int32_t* columns;  // [n]
  Out out;                 // [rows, n]
  int64_t k, n;
};

struct Mix {  // x · signs, then Sylvester's orthonormal matrix [block, block] on every block
  const float* x;
  const float* signs;  // [n]
  float* full;         // [rows, n], always
  uint16_t* half;      // or null
  int64_t n, block;    // block: a power of two that divides n
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")
namespace {

// One element of a row here in multiply-adds of `GRAIN`: measured, what another core wrote included.
constexpr int64_t ELEMENT = 110;

INLINE void put(const Out& out, int64_t i, __mmask16 keep, __m512 v) {
  if (out.full) store(out.full, i, false, keep, v);
  if (out.half) store(out.half, i, true, keep, v);
}

// e^x within 2 units in the last place; 0 below -87.3.
INLINE __m512 exp16(__m512 x) {
  __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), x);  // a NaN in the second place stays
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // Cephes' expf
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps((__mmask16)~tiny, p, n);
}

void embed(const Embed& a, const Step& s) {
  for (int64_t row = 0; row < s.rows; row++)
    for (int64_t i = 0; i < a.n; i += 16) {
      __mmask16 keep = lanes(a.n - i);
      store(a.out, row * a.n + i, false, keep, load(a.table, s.ids[row] * a.n + i, a.bf16, keep));
    }
}

// 1 / √(mean(x²) + eps) of x [n], which becomes x + add.
INLINE float inverse_root(float* x, const float* add, int64_t n, double eps) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 keep = lanes(n - i);
    __m512 v = _mm512_maskz_loadu_ps(keep, x + i);
    if (add) {
      v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(keep, add + i));
      _mm512_mask_storeu_ps(x + i, keep, v);
    }
    sums[i / 16 % 2] = _mm512_fmadd_ps(v, v, sums[i / 16 % 2]);
  }
  double sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  return (float)(1.0 / std::sqrt(sum / (double)n + eps));
}

void norm(const Norm& a, const Step& s) {
  parallel(a.kept ? s.outputs : s.rows, a.n * ELEMENT, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      int64_t from = (a.kept ? s.kept[row] : row) * a.n;
      float* x = a.x + from;
      __m512 by = _mm512_set1_ps(inverse_root(x, a.add ? a.add + from : nullptr, a.n, a.eps));
      for (int64_t i = 0; i < a.n; i += 16) {
        __mmask16 keep = lanes(a.n - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(keep, x + i), by);
        put(a.out, row * a.n + i, keep, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(keep, a.weight + i)));
      }
    }
  });
}

void angles(const Angles& a, const Step& s) {
  parallel(s.rows, a.half * 2000, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      for (int64_t i = 0; i < a.half; i++) {
        float angle = (float)s.positions[row] * a.frequency[i];  // rounded, as transformers does
        float* out = a.out + row * 2 * a.half + i;
        out[0] = std::cos(angle) * (float)a.scale;
        out[a.half] = std::sin(angle) * (float)a.scale;
      }
  });
}

// One head: x · weight / root mean square if there is a weight, then turned, in place.
INLINE void turn(float* x, const float* weight, const float* turns, int64_t dim, double eps) {
  int64_t half = dim / 2;
  __m512 by = _mm512_set1_ps(weight ? inverse_root(x, nullptr, dim, eps) : 1.0f);
  for (int64_t i = 0; i < half; i += 16) {
    __mmask16 keep = lanes(half - i);
    __m512 low = _mm512_maskz_loadu_ps(keep, x + i);
    __m512 high = _mm512_maskz_loadu_ps(keep, x + half + i);
    if (weight) {
      low = _mm512_mul_ps(_mm512_mul_ps(low, by), _mm512_maskz_loadu_ps(keep, weight + i));
      __m512 other = _mm512_maskz_loadu_ps(keep, weight + half + i);
      high = _mm512_mul_ps(_mm512_mul_ps(high, by), other);
    }
    __m512 cosine = _mm512_maskz_loadu_ps(keep, turns + i);
    __m512 sine = _mm512_maskz_loadu_ps(keep, turns + half + i);
    __m512 first = _mm512_fmsub_ps(low, cosine, _mm512_mul_ps(high, sine));
    __m512 second = _mm512_fmadd_ps(high, cosine, _mm512_mul_ps(low, sine));
    _mm512_mask_storeu_ps(x + i, keep, first);
    _mm512_mask_storeu_ps(x + half + i, keep, second);
  }
}

INLINE void copy_row(const float* from, void* to, int64_t at, int64_t n, bool bf16) {
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 keep = lanes(n - i);
    store(to, at + i, bf16, keep, _mm512_maskz_loadu_ps(keep, from + i));
  }
}

void rotate(const Rotate& a, const Step& s) {
  int64_t wide = a.kv_heads * a.dim;
  int64_t cost = (a.heads + a.kv_heads) * a.dim * ELEMENT;
  parallel(s.rows, cost, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* turns = a.angles + row * a.dim;
      for (int64_t h = 0; h < a.heads; h++)
        turn(a.query + (row * a.heads + h) * a.dim, a.query_norm, turns, a.dim, a.eps);
      for (int64_t h = 0; h < a.kv_heads; h++)
        turn(a.key + row * wide + h * a.dim, a.key_norm, turns, a.dim, a.eps);
      if (!a.keys) continue;
      copy_row(a.key + row * wide, a.keys, s.slots[row] * wide, wide, a.bf16);
      copy_row(a.value + row * wide, a.values, s.slots[row] * wide, wide, a.bf16);
    }
  });
}

void gate(const Gate& a, const Step& s) {
  parallel(s.rows, a.n * ELEMENT, s.threads, [&](int64_t first, int64_t last) {
    __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t row = first; row < last; row++)
      for (int64_t i = 0; i < a.n; i += 16) {
        __mmask16 keep = lanes(a.n - i);
        __m512 x = _mm512_maskz_loadu_ps(keep, a.gate + row * a.n + i), inner = x;
        if (a.gelu) {  // tanh(u) = 2 / (1 + e^(-2u)) - 1, u = √(2/π) (x + 0.044715 x³)
          __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
          inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
          inner = _mm512_mul_ps(inner, _mm512_set1_ps(1.5957691216f));
        }
        __m512 below = _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), inner)));
        __m512 up = _mm512_maskz_loadu_ps(keep, a.up + row * a.n + i);
        put(a.out, row * a.n + i, keep, _mm512_mul_ps(_mm512_div_ps(x, below), up));
      }
  });
}

void scale(const Scale& a, const Step& s) {
  parallel(a.kept ? s.outputs : s.rows, a.n * ELEMENT, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      for (int64_t i = 0; i < a.n; i += 16) {
        __mmask16 keep = lanes(a.n - i);
        __m512 x = _mm512_maskz_loadu_ps(keep, a.x + row * a.n + i);
        if (a.by) x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(keep, a.by + i));
        put(a.out, row * a.n + i, keep, x);
      }
  });
}

void add(const Add& a, const Step& s) {
  parallel(s.rows, a.n * ELEMENT, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first * a.n; i < last * a.n; i += 16) {
      __mmask16 keep = lanes(last * a.n - i);
      __m512 x = _mm512_maskz_loadu_ps(keep, a.x + i);
      store(a.x, i, false, keep, _mm512_add_ps(x, _mm512_maskz_loadu_ps(keep, a.add + i)));
    }
  });
}

void pick(const Pick& a, const Step& s) {
  parallel(s.rows, a.n * ELEMENT, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      for (int64_t i = 0; i < a.n; i += 16) {
        __mmask16 keep = lanes(a.n - i);
        __m512i at = _mm512_maskz_loadu_epi32(keep, a.columns + i);
        __m512 zero = _mm512_setzero_ps();
        put(a.out, row * a.n + i, keep, _mm512_mask_i32gather_ps(zero, keep, at, a.x + row * a.k, 4));
      }
  });
}

// Lane i becomes x[i] + x[i + size] or x[i - size] - x[i].
INLINE __m512 butterfly(__m512 x, int size) {
  alignas(64) static const int lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static const __mmask16 second[9] = {0, 0xaaaa, 0xcccc, 0, 0xf0f0, 0, 0, 0, 0xff00};
  __m512i other = _mm512_xor_si512(_mm512_load_si512(lane), _mm512_set1_epi32(size));
  __m512 y = _mm512_permutexvar_ps(other, x);
  return _mm512_mask_sub_ps(_mm512_add_ps(y, x), second[size], y, x);
}

// The fast Walsh-Hadamard transform.
void mix(const Mix& a, const Step& s) {
  __m512 by = _mm512_set1_ps((float)(1.0 / std::sqrt((double)a.block)));
  parallel(s.rows, a.n * ELEMENT, s.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      float* out = a.full + row * a.n;
      for (int64_t i = 0; i < a.n; i += 16) {
        __mmask16 keep = lanes(a.n - i);
        __m512 x = _mm512_maskz_loadu_ps(keep, a.x + row * a.n + i);
        x = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_maskz_loadu_ps(keep, a.signs + i)), by);
        for (int size = 1; size < 16 && size < a.block; size *= 2) x = butterfly(x, size);
        _mm512_mask_storeu_ps(out + i, keep, x);
      }
      for (int64_t size = 16; size < a.block; size *= 2)
        for (int64_t i = 0; i < a.n; i += 16) {
          if (i & size) continue;
          __m512 x = _mm512_loadu_ps(out + i), y = _mm512_loadu_ps(out + i + size);
          _mm512_storeu_ps(out + i, _mm512_add_ps(x, y));
          _mm512_storeu_ps(out + i + size, _mm512_sub_ps(x, y));
        }
      if (a.half)
        for (int64_t i = 0; i < a.n; i += 16)
          store(a.half, row * a.n + i, true, lanes(a.n - i), _mm512_maskz_loadu_ps(lanes(a.n - i), out + i));
    }
  });
}

void linear(const Linear& a, const Step& s) {
  a.run(a.weight, a.x, a.out, a.kept ? s.outputs : s.rows, 0, s.threads);
}

}  // namespace
#pragma GCC pop_options
#endif
