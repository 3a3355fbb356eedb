#include "cpu/kernels_body.h"

namespace dalle_fast::cpu {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = table("avx512");
  return &kernels;
}

}  // namespace dalle_fast::cpu
