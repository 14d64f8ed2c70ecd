// Chooses the widest instruction set that was compiled and that this processor has.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace normkit {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)(Element);
};

InstructionSet choose() {
#if defined(NORMKIT_X86_VARIANTS)
  const char* wanted = std::getenv("NORMKIT_CPU_CAPABILITY");  // to test the narrower ones
  const bool narrow = wanted && !std::strcmp(wanted, "default");
  const bool middle = wanted && !std::strcmp(wanted, "avx2");
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !narrow && !middle) return {"avx512", avx512::kernels};
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  if (has_avx2 && !narrow) return {"avx2", avx2::kernels};
#endif
  return {"default", baseline::kernels};
}

const InstructionSet& chosen() {
  static const InstructionSet instruction_set = choose();
  return instruction_set;
}

}  // namespace

const Kernels& best_kernels(Element element) { return chosen().kernels(element); }
const char* instruction_set() { return chosen().name; }

}  // namespace normkit
