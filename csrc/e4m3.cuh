// e4m3 codes by integer arithmetic, because conversion instructions exist only from compute capability 8.9.
#pragma once

#include "common.cuh"

namespace dalle_fast {

// The nearest code, ties to the even one; what lies beyond the largest finite value, 448, is cut off there.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
  const float size = fminf(fabsf(x), 448.f);
  const uint32_t bits = __float_as_uint(size);
  const uint32_t normal = ((bits + 0x7FFFFu + (bits >> 20 & 1)) >> 20) - (120u << 3);  // exponent bias 127 -> 7, 23 -> 3 bits
  // Below 2^-6 codes are multiples of 2^-9: adding 2^23 leaves the rounded multiple in the last bits.
  const uint32_t small = __float_as_uint(size * 512.f + 8388608.f) & 15;
  return (size < 0.015625f ? small : normal) | (__float_as_uint(x) >> 24 & 128);
}
__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {  // the first in the lowest byte
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
}

// The values of a word's four codes: the same fields in a float16 are the value over 2^8, subnormals included.
__device__ __forceinline__ void from_e4m3(uint32_t codes, float* x) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t high = __byte_perm(codes, 0, i ? 0x3424 : 0x1404);  // two codes, each the high byte of 16 bits
    const float2 pair = unpack<__half>((high >> 1 & 0x3F803F80u) | (high & 0x80008000u));
    x[i] = pair.x * 256.f, x[i + 1] = pair.y * 256.f;
  }
}

}  // namespace dalle_fast
