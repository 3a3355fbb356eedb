#include "cpu/kernels_body.h"

namespace dalle_fast::cpu {

const Kernels* portable_kernels() {
  static constexpr Kernels kernels = table("portable");
  return &kernels;
}

}  // namespace dalle_fast::cpu
