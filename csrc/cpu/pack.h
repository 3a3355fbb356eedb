// Weights in the order in which the kernels read them (PackedWeight in kernels.h), and prefixes likewise.
#pragma once

#include "cpu/kernels.h"

namespace dalle_fast::cpu {

// A weight [rows, inputs] as PyTorch holds it.
struct WeightSource {
  DType type;          // float32, bfloat16, int8, or int4: two a byte, the even input in the low half, each plus 8
  const void* data;    // int4: [rows, ceil(inputs / 2)] bytes
  const float* scale;  // int8: [rows]; int4: [rows, ceil(inputs / 128)]; else null
  const float* bias;   // [rows] or null
  const float* output_scale;  // [rows] or null: multiplies result and bias (LayerScale)
  int rows, inputs;
  bool geglu;  // rows are values, then gates
};

class PackedLinear {
 public:
  // type: float32 or bfloat16 (from either), or the source's own int8 or int4.
  // Throws std::invalid_argument for another pair of types or sizes below 1.
  PackedLinear(DType type, const WeightSource& source, int threads);
  const PackedWeight& view() const { return view_; }
  size_t bytes() const { return data_.bytes() + scale_.bytes() + bias_.bytes(); }

 private:
  PackedWeight view_;
  Buffer data_, scale_, bias_;
};

// Keys and values [len, dim] with any row stride, float32 or bf16, of which the last keys pad to a multiple of 16.
int64_t packed_prefix_bytes(int64_t len, int64_t dim, DType cache);  // of the keys, and again of the values
void pack_prefix(const void* k, const void* v, DType from, int64_t len, int64_t row_stride, int64_t dim, DType cache,
                 void* to_k, void* to_v);

}  // namespace dalle_fast::cpu
