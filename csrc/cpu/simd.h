// Vectors of float and int32 as wide as the file is compiled for: 16 lanes with AVX-512, 8 with AVX2, else 4. The
// compiler's own vector types carry the operators; only what they lack is spelled out. Everything lives in an unnamed
// namespace, so that no function compiled for AVX-512 can stand in for its namesake on a lesser machine.
#pragma once

#include "cpu/common.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics pass a register that is left undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dalle_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

#define DF_INLINE inline __attribute__((always_inline))

DF_INLINE vf set1(float x) { return x - vf{}; }
DF_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
DF_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
DF_INLINE vu load_words(const void* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
DF_INLINE vf as_float(vu v) { return (vf)v; }
DF_INLINE vu as_words(vf v) { return (vu)v; }
DF_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
DF_INLINE vi to_int(vf v) { return __builtin_convertvector(v, vi); }  // towards zero
DF_INLINE vf load_bf16(const uint16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return as_float(__builtin_convertvector(h, vu) << 16);
}
DF_INLINE void store_bf16(uint16_t* p, vf v) {
  const vu bits = as_words(v);
  vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = ((bits >> 16) | 0x40u);
  const vu is_nan = (vu)((bits & 0x7FFFFFFFu) > (vu{} + 0x7F800000u));
  rounded = (rounded & ~is_nan) | (nan & is_nan);
  const vh h = __builtin_convertvector(rounded, vh);
  std::memcpy(p, &h, sizeof h);
}

// a * b + c, rounded once wherever the machine can: the same in every instance of a template, whatever the compiler fuses.
DF_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
DF_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
DF_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// Lanes are added in a fixed tree.
DF_INLINE float sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
DF_INLINE float largest(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// e^x = 2^n e^r, x = n ln 2 + r, |r| <= ln 2 / 2: a polynomial of degree 6 in r, within 2 ulp.
DF_INLINE vf exp_of(vf x, vf n) {
  vf r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts: the first product is exact
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return p * as_float((vu)((to_int(n) + 127) << 23));
#endif
}
DF_INLINE vf nearest(vf x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
#else
  return to_float(to_int(x + (x > 0.0f ? set1(0.5f) : set1(-0.5f))));
#endif
}
// Clamped to x in [-87, 88].
DF_INLINE vf exp(vf x) {
  x = min(max(x, set1(-87.0f)), set1(88.0f));
  return exp_of(x, nearest(x * 1.44269504088896341f));
}
// For x <= 0. 0 below -87, where floats turn denormal: vscalefps then took 110 ns on an Emerald Rapids Xeon, else 3.
DF_INLINE vf exp_below(vf x) { return x < -87.0f ? vf{} : exp(x); }

// ln x within 2 ulp for positive normal x, near 1 too: x = 2^n m, m in [sqrt 1/2, sqrt 2), ln m = 2 artanh((m-1)/(m+1)).
DF_INLINE vf log(vf x) {
  const vu shifted = as_words(x) - 0x3F3504F3u;  // sqrt(1/2)
  const vi n = (vi)shifted >> 23;
  const vf m = as_float(as_words(x) - (vu)(n << 23));
  const vf f = m - 1.0f;
  const vf s = f / (f + 2.0f), z = s * s;
  vf p = set1(2.0f / 9);
  p = fma(p, z, set1(2.0f / 7));
  p = fma(p, z, set1(2.0f / 5));
  p = fma(p, z, set1(2.0f / 3));
  const vf half = f * f * 0.5f;  // ln(1 + f) = f - f²/2 + s (f²/2 + z p): the leading term stays exact
  const vf nf = to_float(n);
  const vf tail = fma(s, fma(z, p, half), nf * 9.0580006145e-6f);
  return fma(nf, set1(0.693138122558593750f), f - (half - tail));
}

}  // namespace
}  // namespace dalle_fast::cpu
