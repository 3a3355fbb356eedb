// skinny_linear's inner loops for integer weights by AVX2's vpmaddwd, which adds two products of 16 bits a lane. Weights are
// spread to 16 bits in two halves, inputs 0 and 2 and inputs 1 and 3 of every four, the order in which activations lie.
#pragma once

#include "cpu/linear_body.h"

namespace dalle_fast::cpu {
namespace {

constexpr int kExact = 512;  // inputs whose products with int8 weights add up in 32 bits: 512 * 127 * 32512 < 2^31

DF_INLINE __m256i load_lanes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
DF_INLINE __m256i add_products(__m256i sum, __m256i weights, const uint8_t* x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x))));
}

template <int R>
void panel_int8(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, float* out) {
  const uint8_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.data + (row + r) * x.row_bytes;
  vf total[R][V] = {};
  for (int64_t unit = 0; unit < w.units;) {
    __m256i sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = _mm256_setzero_si256();
    const int64_t end = smaller(unit + kExact / 4, w.units);
    for (; unit < end; ++unit, data += kPanel * 4) {
      __builtin_prefetch(data + kPrefetch);
      __builtin_prefetch(data + kPrefetch + 64);
      for (int v = 0; v < V; ++v) {
        const __m256i word = load_lanes(data + v * W * 4);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8), odd = _mm256_srai_epi16(word, 8);
        for (int r = 0; r < R; ++r) {
          const uint8_t* p = rows[r] + unit * 8;
          sum[r][v] = add_products(add_products(sum[r][v], even, p), odd, p + 4);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v] = total[r][v] + to_float((vi)sum[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * kPanel + v * W, total[r][v] * x.step[row + r]);
}

// The sum over a group of 128 inputs is an exact integer below 2^26; only then come the scales.
template <int R>
void panel_int4(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, float* out) {
  const uint8_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.data + (row + r) * x.row_bytes;
  vf total[R][V] = {};
  const __m256i nibble = _mm256_set1_epi16(15);
  const int groups = (w.units * 8 + kGroup - 1) / kGroup;
  for (int g = 0; g < groups; ++g) {
    const float* scales = reinterpret_cast<const float*>(data);
    data += kPanel * sizeof(float);
    __m256i sum[R][V];
    for (int r = 0; r < R; ++r) {
      const int32_t plus8 = 8 * x.sums[static_cast<size_t>(row + r) * x.sums_per_row + 2 * g];
      for (int v = 0; v < V; ++v) sum[r][v] = _mm256_set1_epi32(-plus8);
    }
    for (int64_t unit = g * (kGroup / 8); unit < (g + 1) * (kGroup / 8); ++unit, data += kPanel * 4) {
      __builtin_prefetch(data + kPrefetch);
      __builtin_prefetch(data + kPrefetch + 64);
      for (int v = 0; v < V; ++v) {
        const __m256i word = load_lanes(data + v * W * 4);
        const __m256i even = _mm256_and_si256(word, nibble), even4 = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(word, 8), nibble), odd4 = _mm256_srli_epi16(word, 12);
        for (int r = 0; r < R; ++r) {
          const uint8_t* p = rows[r] + unit * 16;
          sum[r][v] = add_products(add_products(sum[r][v], even, p), odd, p + 4);
          sum[r][v] = add_products(add_products(sum[r][v], even4, p + 8), odd4, p + 12);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v] = fma(to_float((vi)sum[r][v]), load(scales + v * W), total[r][v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * kPanel + v * W, total[r][v] * x.step[row + r]);
}

constexpr PanelFunction int8_panels[] = {panel_int8<1>, panel_int8<2>, panel_int8<3>};
constexpr PanelFunction int4_panels[] = {panel_int4<1>, panel_int4<2>, panel_int4<3>};

// 16 bits: the largest magnitude becomes 32512, as for split16.
inline void encode_int16(const float* x, int n, int row, const Encoded& out) {
  vf most = {};
  vi nan = {};
  for (int i = 0; i < n; i += W) {
    float line[W] = {};
    std::memcpy(line, x + i, static_cast<size_t>(smaller(W, n - i)) * 4);
    const vf value = load(line);
    nan |= (vi)(value != value);
    most = max(as_float(as_words(value) & 0x7FFFFFFFu), most);
  }
  const float peak = _mm256_testz_si256((__m256i)nan, (__m256i)nan) ? largest(most) : __builtin_nanf("");
  const float step = peak == 0 ? 1.0f : peak / 32512.0f;  // a NaN or infinity reaches the output through it
  out.step[row] = step;
  const __m256 inverse = _mm256_set1_ps(1.0f / step);
  uint8_t* data = out.data + row * out.row_bytes;
  int32_t* sums = out.sums + static_cast<size_t>(row) * out.sums_per_row;
  const auto rounded = [&](int i) {  // values i to i + 7, in each half 0 2 1 3
    float line[W] = {};
    if (i < n) std::memcpy(line, x + i, static_cast<size_t>(smaller(W, n - i)) * 4);
    return _mm256_shuffle_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(load(line), inverse)), 0xD8);
  };
  for (int g = 0; g < out.sums_per_row / 2; ++g) {
    __m256i total = _mm256_setzero_si256();
    for (int i = g * kGroup; i < (g + 1) * kGroup; i += 2 * W) {
      const __m256i first = rounded(i), second = rounded(i + W);
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(data + 2 * i), both);
      total = _mm256_add_epi32(total, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
    }
    int32_t lanes[W];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total);
    sums[2 * g] = 0, sums[2 * g + 1] = 0;
    for (int lane : lanes) sums[2 * g] += lane;
  }
}

}  // namespace
}  // namespace dalle_fast::cpu
