// One table of kernels. Each kernels_*.cpp includes this, compiled for its own instruction set.
#pragma once

#include "cpu/attention_body.h"
#include "cpu/linear_body.h"
#include "cpu/rows_body.h"
#if defined(__AMX_TILE__)
#include "cpu/attention_amx.h"
#include "cpu/linear_amx.h"
#elif defined(__AVX512VNNI__)
#include "cpu/linear_avx512.h"
#elif defined(__AVX2__)
#include "cpu/linear_avx2.h"
#endif

namespace dalle_fast::cpu {
namespace {

template <int N>
DF_INLINE void call_linear(const PanelFunction (&by_rows)[N], const PackedWeight& w, const Encoded& x, int rows,
                           int begin, int end, const LinearOutput& out, float* scratch) {
  linear_with(by_rows, N, w, x, rows, begin, end, out, scratch);
}

inline Encoding encoding(DType weight) {
#if defined(__AVX512BF16__)
  if (weight == DType::bfloat16) return Encoding::bfloat16;
#endif
#if defined(__AVX512VNNI__)
  if (weight == DType::int8 || weight == DType::int4) return Encoding::split16;
#elif defined(__AVX2__)
  if (weight == DType::int8 || weight == DType::int4) return Encoding::int16;
#else
  (void)weight;
#endif
  return Encoding::float32;
}

inline void linear(const PackedWeight& w, const Encoded& x, int rows, int begin, int end, const LinearOutput& out,
                   float* scratch) {
#if defined(__AMX_TILE__)
  if (const TileFunction tiles = tiles_for(w.type, rows))
    return linear_by_tiles(tiles, w, x, rows, begin, end, out, scratch);
#endif
#if defined(__AVX512BF16__)
  if (w.type == DType::bfloat16) return call_linear(bf16_panels, w, x, rows, begin, end, out, scratch);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // Three rows' sums beside weights to spread are more than 16 registers, and a sum that is spilled waits for itself: 43
  // GFLOP/s of a Zen 3 core, two rows' 77. Three rows alone wait for memory anyway.
  if (w.type == DType::bfloat16)
    return linear_with(float_panels<Bf16Weight>, rows == 3 ? 3 : 2, w, x, rows, begin, end, out, scratch);
#else
  if (w.type == DType::bfloat16) return call_linear(float_panels<Bf16Weight>, w, x, rows, begin, end, out, scratch);
#endif
#if defined(__AVX2__)
  if (w.type == DType::int8) return call_linear(int8_panels, w, x, rows, begin, end, out, scratch);
  if (w.type == DType::int4) return call_linear(int4_panels, w, x, rows, begin, end, out, scratch);
#else
  if (w.type == DType::int8) return call_linear(float_panels<Int8Weight>, w, x, rows, begin, end, out, scratch);
  if (w.type == DType::int4) return call_linear(float_panels<Int4Weight>, w, x, rows, begin, end, out, scratch);
#endif
  call_linear(float_panels<Float32Weight>, w, x, rows, begin, end, out, scratch);
}

inline void encode(const float* x, int n, int row, const Encoded& out) {
#if defined(__AVX512BF16__)
  if (out.encoding == Encoding::bfloat16) return encode_bf16(x, n, out.data + row * out.row_bytes);
#endif
#if defined(__AVX512VNNI__)
  if (out.encoding == Encoding::split16) return encode_split16(x, n, row, out);
#elif defined(__AVX2__)
  if (out.encoding == Encoding::int16) return encode_int16(x, n, row, out);
#endif
  encode_float(x, n, out.data + row * out.row_bytes);
}

inline void attend(const PackedPrefix& prefix, const AttentionRow* rows, int count, int dim, float scale, DType cache,
                   float* scratch) {
  const int64_t row_floats = score_floats(prefix, rows, count);
#if defined(__AMX_TILE__)
  if (cache == DType::bfloat16) return attend_by_tiles(prefix, rows, count, dim, scale, scratch, row_floats);
#endif
  (cache == DType::bfloat16 ? attend_all<true> : attend_all<false>)(prefix, rows, count, dim, scale, scratch, row_floats);
}

constexpr Kernels table(const char* name) {
  return {name,   encoding, linear,       layer_norm, encode,          rotate, to_bf16,
          attend, gumbel,   exponentials, maximum,    exponential_sum, choose};
}

}  // namespace
}  // namespace dalle_fast::cpu
