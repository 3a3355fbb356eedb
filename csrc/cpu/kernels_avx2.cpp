#include "cpu/kernels_body.h"

namespace dalle_fast::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = table("avx2");
  return &kernels;
}

}  // namespace dalle_fast::cpu
