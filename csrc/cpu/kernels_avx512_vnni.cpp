#include "cpu/kernels_body.h"

namespace dalle_fast::cpu {

const Kernels* avx512_vnni_kernels() {
  static constexpr Kernels kernels = table("avx512_vnni");
  return &kernels;
}

}  // namespace dalle_fast::cpu
