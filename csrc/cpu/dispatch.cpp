#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef DALLE_FAST_HAS_AVX2
#define DALLE_FAST_HAS_AVX2 0
#endif
#ifndef DALLE_FAST_HAS_AVX512_VNNI
#define DALLE_FAST_HAS_AVX512_VNNI 0
#endif
#ifndef DALLE_FAST_HAS_AVX512
#define DALLE_FAST_HAS_AVX512 0
#endif
#ifndef DALLE_FAST_HAS_AMX
#define DALLE_FAST_HAS_AMX 0
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

#if DALLE_FAST_HAS_AVX512_VNNI || DALLE_FAST_HAS_AVX512
bool has_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Kernels* avx512_vnni() {
#if DALLE_FAST_HAS_AVX512_VNNI
  if (has_vnni()) return avx512_vnni_kernels();
#endif
  return nullptr;
}

const Kernels* avx512() {
#if DALLE_FAST_HAS_AVX512
  if (has_vnni() && __builtin_cpu_supports("avx512bf16")) return avx512_kernels();
#endif
  return nullptr;
}

// Linux hands out the tile registers, 8 KB for each thread, on request only, once for a process.
const Kernels* amx() {
#if DALLE_FAST_HAS_AMX && defined(__linux__)
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;  // edx of leaf 7
  constexpr long request = 0x1023, tile_data = 18;                       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & bf16) && (edx & tile) && (edx & int8) &&
      syscall(SYS_arch_prctl, request, tile_data) == 0)
    return amx_kernels();
#endif
  return nullptr;
}

const Kernels* choose() {
  const char* wanted = std::getenv("DALLE_FAST_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  const Kernels* found = nullptr;
  if (name.empty()) {
    found = amx();
    if (!found) found = avx512();
    if (!found) found = avx512_vnni();
    if (!found) found = avx2();
    return found ? found : portable_kernels();
  }
  if (name == "portable") found = portable_kernels();
  else if (name == "avx2") found = avx2();
  else if (name == "avx512_vnni") found = avx512_vnni();
  else if (name == "avx512") found = avx512();
  else if (name == "amx") found = amx();
  else
    throw std::invalid_argument("got DALLE_FAST_CPU_ISA='" + name +
                                "', expected portable, avx2, avx512_vnni, avx512 or amx");
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
