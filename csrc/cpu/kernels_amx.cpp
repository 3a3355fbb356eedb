#include "cpu/kernels_body.h"

namespace dalle_fast::cpu {

const Kernels* amx_kernels() {
  static constexpr Kernels kernels = table("amx");
  return &kernels;
}

}  // namespace dalle_fast::cpu
