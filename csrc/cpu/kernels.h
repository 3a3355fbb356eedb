// The inner loops that exist once per instruction set, and the formats that they read. dispatch.cpp picks the set.
#pragma once

#include "cpu/common.h"
#include "params.h"

namespace dalle_fast::cpu {

constexpr int kPanel = 32;     // outputs of a weight that lie side by side
constexpr int kGroup = 128;    // inputs that share an int4 scale
constexpr int kKeyBlock = 16;  // keys of a packed prefix that lie side by side
constexpr int kQueries = 16;   // at most, that share a read of a prefix
constexpr int kPadding = 128;  // encoded rows are zero up to a multiple of this many inputs

// A weight in the order in which it is read. Panel after panel of 32 outputs; in a panel, unit after unit of one 32-bit
// word per output: 1 float32, 2 bf16, 4 int8 or 8 int4 consecutive inputs. int4: word byte j holds input j in its low and
// input j + 4 in its high half, each plus 8, and every 16 units (128 inputs) are preceded by 32 float scales.
struct PackedWeight {
  DType type;
  int outputs;  // of the layer: for geglu half of the weight's rows
  int inputs;
  int panels;  // geglu: value and gate panels alternate
  int units;   // per panel
  size_t panel_bytes;
  const uint8_t* data;
  const float* scale;  // [panels * 32], multiplies the sum: int8 scale and layer scale
  const float* bias;   // [panels * 32], already times the layer scale
};

// How rows of activations are handed to a weight of some type.
enum class Encoding { float32, bfloat16, split16, int16 };

// int8 and int4 weights meet 16-bit activations in exact integer arithmetic.
// split16: x = step * (256 hi + lo), both int8; of every row first all hi, then all lo bytes, each half as far from the next
// as a row would be: to a tile, hi and lo of a few rows are twice as many rows.
// int16: x = step * q; of every 4 inputs q 0, 2, 1, 3, for products of pairs.
struct Encoded {
  Encoding encoding;
  uint8_t* data;  // [rows, row_bytes]
  size_t row_bytes;
  float* step;    // [rows], of the integers
  int32_t* sums;  // [rows, sums_per_row], per group of 128 inputs: split16 (sum of hi, sum of lo), int16 (sum of q, 0)
  int sums_per_row;
};

// The distance of two rows (halves of split16) is an odd multiple of 64 bytes: a power of two would put the same inputs of
// all rows into one set of the first cache.
inline size_t encoded_row_bytes(Encoding encoding, int inputs) {
  const size_t width = static_cast<size_t>(round_up(inputs, kPadding));
  if (encoding == Encoding::split16) return 2 * (width + 64);
  return width * (encoding == Encoding::float32 ? 4 : 2) + 64;
}

struct LinearOutput {
  float* y;               // [rows, stride]
  const float* residual;  // same shape, may be y itself; or null
  int stride;
  Epilogue epilogue;
};

struct AttentionRow {  // one query of one head
  const float* q;      // [dim]
  float* out;          // [dim]
  const void* tail_k;  // [slots, dim]
  const void* tail_v;
  const int32_t* slots;  // [count]
  int32_t count;
  int32_t prefix_len;    // how many of the prefix's keys it sees
  float* lse = nullptr;  // log-sum-exp of the scaled scores, if it is asked for
};

// One head of a prefix, by 16 keys. float32: k [blocks][dim][16], v [keys][dim]. bf16: k [blocks][dim / 2][16][2],
// v [keys / 2][dim][2]. Keys are padded with zeros to a multiple of 16.
struct PackedPrefix {
  const void* k;
  const void* v;
  int32_t keys;  // padded
};

// The best of some tokens by (x - shift) / temperature + Gumbel noise; the lower token of equals.
struct Choice {
  float score;
  int32_t token;
};

struct Kernels {
  const char* name;
  Encoding (*encoding)(DType weight);
  // y = epilogue(x W^T) for panels [begin, end), an even number of them for geglu; scratch: 4 * kPanel * rows floats.
  void (*linear)(const PackedWeight& w, const Encoded& x, int rows, int begin, int end, const LinearOutput& out,
                 float* scratch);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int n, float* y);  // y may be x
  void (*encode)(const float* x, int n, int row, const Encoded& out);
  // Turns pairs (0, 1), (2, 3), … of x by as many pairs of equal angles.
  void (*rotate)(float* x, const float* cosines, const float* sines, int n);
  void (*to_bf16)(const float* x, int n, uint16_t* y);
  // scratch: attend_scratch() floats.
  void (*attend)(const PackedPrefix& prefix, const AttentionRow* rows, int count, int dim, float scale, DType cache,
                 float* scratch);
  // noise[i]: the Gumbel noise of tokens[i], or where tokens is null of token i.
  void (*gumbel)(uint64_t seed, uint64_t candidate, uint32_t position, const int32_t* tokens, int count, float* noise);
  void (*exponentials)(const float* x, float shift, int count, float* y);  // y = exp(x - shift)
  float (*maximum)(const float* x, int count);                             // count >= 1
  double (*exponential_sum)(const float* x, float shift, int count);       // Σ exp(x - shift)
  // Of tokens first ... first + count - 1; first a multiple of 64.
  Choice (*choose)(uint64_t seed, uint64_t candidate, uint32_t position, const float* x, float shift, float temperature,
                   int first, int count);
};

// Floats of scratch that attend() wants: a row of scores for each query of a group.
inline int64_t attend_scratch(int64_t prefix_keys, int64_t most_slots) {
  return kQueries * (prefix_keys + round_up(most_slots, kKeyBlock) + kKeyBlock);
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();

// The best set that this machine and this build have; DALLE_FAST_CPU_ISA=portable|avx2|avx512_vnni|avx512|amx
// forces one. Throws std::invalid_argument if the one asked for is not there.
const Kernels& kernels();

}  // namespace dalle_fast::cpu
