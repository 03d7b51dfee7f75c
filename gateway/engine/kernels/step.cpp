// Whole forward steps: plain C ABI over buffers that the caller owns; no Python and no torch.
//
// A step is a list of operations made once (native_build.py) and run in one call. Linears are the
// entries of native.cpp, called by address.
#include "common.h"
#include "flash.h"
#include "step.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__)
#define OPERATION(NAME, ARGS) \
  EXPORT void pressgate_##NAME(const ARGS* args, const Step* step) { NAME(*args, *step); }

OPERATION(embed, Embed)
OPERATION(norm, Norm)
OPERATION(angles, Angles)
OPERATION(rotate, Rotate)
OPERATION(attend, Attend)
OPERATION(gate, Gate)
OPERATION(scale, Scale)
OPERATION(add, Add)
OPERATION(pick, Pick)
OPERATION(mix, Mix)
OPERATION(linear, Linear)

EXPORT void pressgate_step(const Op* ops, int64_t count, const Step* step) {
  for (const Op* op = ops; op < ops + count; op++) op->run(op->args, step);
}

EXPORT int pressgate_step_features() {  // 1: may be called; 2: products of bf16 pairs, too
  __builtin_cpu_init();
  bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!base || !__builtin_cpu_supports("avx512vnni")) return 0;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 1;
}
#else
EXPORT int pressgate_step_features() { return 0; }
#endif

EXPORT int pressgate_step_abi() { return 2; }
