// The ops of dalle_fast on a CPU, over all threads asked for. Tensors as in params.h.
#pragma once

#include "cpu/pack.h"

namespace dalle_fast::cpu {

// float32 or bfloat16, dim a multiple of 16 up to 256. Throws std::invalid_argument for others or a position outside.
void decode_attention(const DecodeAttentionParams& p, int threads);

// float32 logits. Tokens of a row do not depend on the other rows.
void sample(const SampleParams& p, int threads);

// p.x, p.y and p.residual are float32; p.weight is ignored, `weight` holds its bias.
void skinny_linear(const SkinnyLinearParams& p, const PackedLinear& weight, int threads);

}  // namespace dalle_fast::cpu
