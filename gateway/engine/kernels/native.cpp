// CPU kernels over the storage layouts of this package: plain C ABI, no Python and no torch.
//
// The caller owns every pointer; nothing is kept between calls but per-thread scratch. Instruction
// sets are chosen per function, and pressgate_features() says what this CPU may call. Every output is
// summed in one fixed order whatever the number of rows or threads: batching changes no bit.
#include "common.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__)
#include "bf16.h"
#include "float8.h"
#include "grouped.h"
#include "int8.h"
#include "kv.h"

EXPORT int pressgate_features() {
  __builtin_cpu_init();
  bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!base) return 0;
  if (!__builtin_cpu_supports("avx512vnni")) return 0;
  int found = INT8 | NESTED | KV;
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2"))
    found |= BF16 | SPARSE;
  return found;
}

EXPORT void pressgate_grouped(const Grouped* w, const void* x, void* out, int64_t rows, int bf16,
                              int64_t threads) {
  using Kernel = void (*)(const Grouped&, const char*, char*, int64_t, bool, int64_t);
  static const Kernel by_bits[] = {grouped<2>, grouped<3>, grouped<4>, grouped<5>,
                                   grouped<6>, grouped<7>, grouped<8>, grouped<NESTED_BITS>};
  by_bits[w->bits - 2](*w, (const char*)x, (char*)out, rows, bf16 != 0, threads);
}

EXPORT void pressgate_dense(const Dense* w, const void* x, void* out, int64_t rows, int bf16,
                            int64_t threads) {
  dense(*w, (const char*)x, (char*)out, rows, bf16 != 0, threads);
}

EXPORT void pressgate_int8(const Int8* w, const void* x, void* out, int64_t rows, int bf16,
                           int64_t threads) {
  int8_linear(*w, (const char*)x, (char*)out, rows, bf16 != 0, threads);
}

EXPORT void pressgate_float8(const Float8* w, const void* x, void* out, int64_t rows, int bf16,
                             int64_t threads) {
  float8_linear(*w, (const char*)x, (char*)out, rows, bf16 != 0, threads);
}

EXPORT void pressgate_float8_expand(const Float8* w, int64_t start, int64_t stop, void* out,
                                    int64_t threads) {
  float8_expand(*w, start, stop, (uint16_t*)out, threads);
}

EXPORT void pressgate_kv(const Kv* layer, const KvStep* step, int64_t threads) {
  kv_decode(*layer, *step, threads);
}

EXPORT void pressgate_expand(const Dense* w, int64_t start, int64_t stop, void* out,
                             int64_t threads) {
  expand(*w, start, stop, (uint16_t*)out, threads);
}
#else
EXPORT int pressgate_features() { return 0; }
#endif

EXPORT int pressgate_abi() { return 6; }
