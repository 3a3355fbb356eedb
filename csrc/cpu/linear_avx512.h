// skinny_linear's inner loops by the AVX-512 dot-product instructions: vdpbf16ps adds 2 products a lane, vpdpbusd 4.
// Cascade Lake and Ice Lake have the latter only: there bf16 weights meet float32 activations, as with AVX2.
// Panels of 32 outputs are 2 registers of weights; every row adds 2 (bf16) or 4 (split16) accumulators.
#pragma once

#include "cpu/linear_body.h"

namespace dalle_fast::cpu {
namespace {

#if defined(__AVX512BF16__)
template <int R>
void panel_bf16(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, float* out) {
  const uint8_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.data + (row + r) * x.row_bytes;
  __m512 sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t unit = 0; unit < w.units; ++unit, data += 128) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(data), w1 = (__m512bh)_mm512_loadu_si512(data + 64);
    __builtin_prefetch(data + kPrefetch);
    __builtin_prefetch(data + kPrefetch + 64);
    for (int r = 0; r < R; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(rows[r] + unit * 4));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], pair, w0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], pair, w1);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out + r * kPanel + v * 16, sum[r][v]);
}

constexpr PanelFunction bf16_panels[] = {panel_bf16<1>, panel_bf16<2>, panel_bf16<3>, panel_bf16<4>,
                                         panel_bf16<5>, panel_bf16<6>, panel_bf16<7>, panel_bf16<8>};

inline void encode_bf16(const float* x, int n, uint8_t* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256bh h = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(out + 2 * i, &h, sizeof h);
  }
  for (; i < n; ++i) reinterpret_cast<uint16_t*>(out)[i] = float_to_bf16(x[i]);
}
#endif

DF_INLINE __m512i bytes4(const uint8_t* p) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }

// Weights become unsigned by adding 128, as vpdpbusd wants; 128 times the sum of the activations is taken off again.
template <int R>
void panel_int8(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, float* out) {
  const uint8_t *highs[R], *lows[R];
  for (int r = 0; r < R; ++r) highs[r] = x.data + (row + r) * x.row_bytes, lows[r] = highs[r] + x.row_bytes / 2;
  __m512i sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_setzero_si512();
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t unit = 0; unit < w.units; ++unit, data += 128) {
    const __m512i w0 = _mm512_xor_si512(_mm512_loadu_si512(data), flip);
    const __m512i w1 = _mm512_xor_si512(_mm512_loadu_si512(data + 64), flip);
    const int64_t at = 4 * unit;
    __builtin_prefetch(data + kPrefetch);
    __builtin_prefetch(data + kPrefetch + 64);
    for (int r = 0; r < R; ++r) {
      const __m512i high = bytes4(highs[r] + at), low = bytes4(lows[r] + at);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, high);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, high);
      sum[r][2] = _mm512_dpbusd_epi32(sum[r][2], w0, low);
      sum[r][3] = _mm512_dpbusd_epi32(sum[r][3], w1, low);
    }
  }
  for (int r = 0; r < R; ++r) {
    int32_t high = 0, low = 0;
    const int32_t* sums = x.sums + static_cast<size_t>(row + r) * x.sums_per_row;
    for (int i = 0; i < x.sums_per_row; i += 2) high += sums[i], low += sums[i + 1];
    const __m512i off_high = _mm512_set1_epi32(128 * high), off_low = _mm512_set1_epi32(128 * low);
    const __m512 step = _mm512_set1_ps(x.step[row + r]), step256 = _mm512_set1_ps(256.0f * x.step[row + r]);
    for (int v = 0; v < 2; ++v) {
      const __m512 h = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][v], off_high));
      const __m512 l = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][v + 2], off_low));
      _mm512_storeu_ps(out + r * kPanel + v * 16, _mm512_fmadd_ps(h, step256, _mm512_mul_ps(l, step)));
    }
  }
}

// The sum over a group of 128 inputs is an exact integer below 2^26; only then come the scales.
template <int R>
void panel_int4(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, float* out) {
  const uint8_t *highs[R], *lows[R];
  for (int r = 0; r < R; ++r) highs[r] = x.data + (row + r) * x.row_bytes, lows[r] = highs[r] + x.row_bytes / 2;
  __m512 total[R][2];
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  const __m512i nibble = _mm512_set1_epi8(15);
  const int groups = (w.units * 8 + kGroup - 1) / kGroup;
  for (int g = 0; g < groups; ++g) {
    const __m512 scale0 = _mm512_loadu_ps(data), scale1 = _mm512_loadu_ps(data + 64);
    data += kPanel * sizeof(float);
    __m512i sum[R][4];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_setzero_si512();
    for (int64_t unit = g * (kGroup / 8); unit < (g + 1) * (kGroup / 8); ++unit, data += 128) {
      const __m512i p0 = _mm512_loadu_si512(data), p1 = _mm512_loadu_si512(data + 64);
      __builtin_prefetch(data + kPrefetch);
      __builtin_prefetch(data + kPrefetch + 64);
      const __m512i a0 = _mm512_and_si512(p0, nibble), b0 = _mm512_and_si512(_mm512_srli_epi16(p0, 4), nibble);
      const __m512i a1 = _mm512_and_si512(p1, nibble), b1 = _mm512_and_si512(_mm512_srli_epi16(p1, 4), nibble);
      const int64_t at = 8 * unit;
      for (int r = 0; r < R; ++r) {
        const __m512i high_a = bytes4(highs[r] + at), low_a = bytes4(lows[r] + at);
        const __m512i high_b = bytes4(highs[r] + at + 4), low_b = bytes4(lows[r] + at + 4);
        sum[r][0] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[r][0], a0, high_a), b0, high_b);
        sum[r][1] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[r][1], a1, high_a), b1, high_b);
        sum[r][2] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[r][2], a0, low_a), b0, low_b);
        sum[r][3] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[r][3], a1, low_a), b1, low_b);
      }
    }
    for (int r = 0; r < R; ++r) {
      const int32_t* sums = x.sums + static_cast<size_t>(row + r) * x.sums_per_row + 2 * g;
      const __m512i offset = _mm512_set1_epi32(8 * (256 * sums[0] + sums[1]));
      for (int v = 0; v < 2; ++v) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(sum[r][v], 8), sum[r][v + 2]);
        total[r][v] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(whole, offset)), v ? scale1 : scale0, total[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v)
      _mm512_storeu_ps(out + r * kPanel + v * 16, _mm512_mul_ps(total[r][v], _mm512_set1_ps(x.step[row + r])));
}

constexpr PanelFunction int8_panels[] = {panel_int8<1>, panel_int8<2>, panel_int8<3>, panel_int8<4>};
constexpr PanelFunction int4_panels[] = {panel_int4<1>, panel_int4<2>, panel_int4<3>, panel_int4<4>};

// 16 bits: the largest magnitude becomes 32512 = 127 * 256, so that hi stays within int8.
inline void encode_split16(const float* x, int n, int row, const Encoded& out) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 nan = 0;
  int i = 0;
  for (; i < n; i += 16) {
    const __mmask16 live = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512 value = _mm512_maskz_loadu_ps(live, x + i);
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, _mm512_abs_ps(value));
  }
  const float peak = nan ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
  const float step = peak == 0 ? 1.0f : peak / 32512.0f;  // a NaN or infinity reaches the output through it
  out.step[row] = step;
  const __m512 inverse = _mm512_set1_ps(1.0f / step);
  uint8_t* data = out.data + row * out.row_bytes;
  int32_t* sums = out.sums + static_cast<size_t>(row) * out.sums_per_row;
  const __m128i ones = _mm_set1_epi8(1);
  for (int g = 0; g < out.sums_per_row / 2; ++g) {
    __m128i total_high = _mm_setzero_si128(), total_low = _mm_setzero_si128();
    for (i = g * kGroup; i < (g + 1) * kGroup; i += 16) {
      const __mmask16 live = n - i >= 16 ? 0xFFFF : n > i ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0;
      const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(live, x + i), inverse));
      const __m512i whole = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      const __m128i high = _mm512_cvtepi32_epi8(whole), low = _mm512_cvtepi32_epi8(value);  // lo = value mod 256, signed
      _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i), high);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(data + out.row_bytes / 2 + i), low);
      total_high = _mm_dpbusd_epi32(total_high, ones, high);
      total_low = _mm_dpbusd_epi32(total_low, ones, low);
    }
    int32_t lanes[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), total_high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes + 4), total_low);
    sums[2 * g] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    sums[2 * g + 1] = lanes[4] + lanes[5] + lanes[6] + lanes[7];
  }
}

}  // namespace
}  // namespace dalle_fast::cpu
