#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#ifndef DALLE_FAST_HAS_AVX2
#define DALLE_FAST_HAS_AVX2 0
#endif
#ifndef DALLE_FAST_HAS_AVX512
#define DALLE_FAST_HAS_AVX512 0
#endif

namespace dalle_fast::cpu {
namespace {

const Kernels* avx2() {
#if DALLE_FAST_HAS_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return nullptr;
}

const Kernels* avx512() {
#if DALLE_FAST_HAS_AVX512
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni"))
    return avx512_kernels();
#endif
  return nullptr;
}

const Kernels* choose() {
  const char* wanted = std::getenv("DALLE_FAST_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  const Kernels* found = nullptr;
  if (name.empty()) {
    if (!found) found = avx512();
    if (!found) found = avx2();
    return found ? found : portable_kernels();
  }
  if (name == "portable") found = portable_kernels();
  else if (name == "avx2") found = avx2();
  else if (name == "avx512") found = avx512();
  else throw std::invalid_argument("got DALLE_FAST_CPU_ISA='" + name + "', expected portable, avx2 or avx512");
  if (!found)
    throw std::invalid_argument("DALLE_FAST_CPU_ISA=" + name + ", which this machine or this build does not have");
  return found;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

}  // namespace dalle_fast::cpu
