// What skinny_linear.cu is made of: formats of weights, rows of x and their LayerNorm, activations.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace dalle_fast {
namespace skinny {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTile = 16, kBlock = kWarps * kTile;
constexpr int kSums = 2 * 8 * kWarps;    // of a LayerNorm: two sums of 8 rows by each warp
constexpr int kMaxResident = 64 * 1024;  // bytes of x kept whole in shared memory
constexpr int kMaxRing = 96 * 1024;      // bytes of weights and x in flight: two kernels fit, so that one can start early

struct DeviceParams {
  CudaLinearParams call;
  float* partials;  // [blocks + weight blocks][warp][8 rows a tile][lane][4]
  void* prepared;   // [rows, padded inputs] or null: x is read as it is
  int32_t stages, weight_blocks, padded_inputs;
};

// A record is what a warp reads at a stage.
template <DType kW>
struct Format {
  static constexpr bool kGroups = kW == DType::int4;
  static constexpr int kInputs = kW == DType::int4 ? 128 : kW == DType::int8 ? 64 : 32;
  static constexpr int kUnits = kInputs / 32;
  static constexpr int kRecord = kGroups ? 1024 + 64 : 1024;
  static constexpr int kSlot = kGroups ? 1024 + 256 : 1024;  // in shared memory, where each lane has its own scales
};

// Stages in flight.
template <DType kW, int kTiles, bool kResident>
__host__ __device__ constexpr int depth() {
  const int stage = kWarps * Format<kW>::kSlot + (kResident ? 0 : kTiles * 8 * Format<kW>::kInputs * 2);
  return stage * 8 <= kMaxRing ? 8 : kMaxRing / stage;
}

// A register of the A operand holds two weights of one output; here from bits of a packed word.

template <class T>
__device__ __forceinline__ constexpr uint32_t magic() {  // 1024 in float16, 128 in bfloat16: the last bit is a unit
  return std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;
}

// Two signed bytes, at bits 0 and 16: (magic + low 7 bits) - (magic + sign bit), exactly.
template <class T>
__device__ __forceinline__ uint32_t from_bytes(uint32_t word) {
  return subtract_pair<T>((word & 0x007F007Fu) | magic<T>(), (word & 0x00800080u) | magic<T>());
}

// Two nibbles, at bits 0 and 16, less 8.
template <class T>
__device__ __forceinline__ uint32_t from_nibbles(uint32_t word) {
  return subtract_pair<T>((word & 0x000F000Fu) | magic<T>(), magic<T>() + 0x00080008u);
}

// The A operand of tile 0 or 1 of 32 inputs, from a lane's 32 bytes of a record.
template <class T, DType kW>
__device__ __forceinline__ void fragment(const uint4 (&w)[2], int unit, int tile, uint32_t (&a)[4]) {
  if constexpr (kW == DType::int8) {
    const uint4 v = w[unit];
    const uint32_t first = tile ? v.z : v.x, second = tile ? v.w : v.y;
    a[0] = from_bytes<T>(first), a[1] = from_bytes<T>(first >> 8);
    a[2] = from_bytes<T>(second), a[3] = from_bytes<T>(second >> 8);
  } else if constexpr (kW == DType::int4) {
    const uint4 v = w[unit / 2];
    const uint32_t word = unit % 2 ? (tile ? v.w : v.z) : (tile ? v.y : v.x);
    a[0] = from_nibbles<T>(word), a[1] = from_nibbles<T>(word >> 4);
    a[2] = from_nibbles<T>(word >> 8), a[3] = from_nibbles<T>(word >> 12);
  } else {
    const uint4 v = w[tile];
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  }
}

// x in shared memory: [32 inputs][row][4 pieces of 8 inputs], so that 8 neighbouring lanes read different banks.
__device__ __forceinline__ int x_place(int piece, int row, int rows) {
  return (piece / 4 * rows + row) * 4 + piece % 4;
}

// 8 inputs of a row, zero beyond the last input. Rows were written by the previous kernel: not by way of the L1 cache.
__device__ __forceinline__ uint4 load_piece(const void* rows, int inputs, int row, int piece) {
  const uint16_t* from = static_cast<const uint16_t*>(rows) + static_cast<int64_t>(row) * inputs + piece * 8;
  if (inputs % 8 == 0)
    return piece * 8 < inputs ? load_from_l2(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = piece * 8 + 2 * i;
    pair[i] = k < inputs ? load_from_l2(from + 2 * i) : 0u;
    if (k + 1 < inputs) pair[i] |= uint32_t{load_from_l2(from + 2 * i + 1)} << 16;
  }
  return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

template <class T>
__device__ __forceinline__ void unpack_piece(const uint4& piece, float (&x)[8]) {
  const uint32_t pair[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = unpack<T>(pair[i]);
    x[2 * i] = both.x, x[2 * i + 1] = both.y;
  }
}

__device__ __forceinline__ float sum_of_warps(shared<const float> sums) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  return total;
}

// norm(v) for rows v in shared memory, each piece of 8 replaced by what finish(row, piece, norm) makes of it. In float32: the
// mean first, then the squares of what differs from it.
template <class T, class F>
__device__ __forceinline__ void normalise(const SkinnyLinearParams& l, int pieces, shared<uint4> xs, shared<float> sums,
                                          const float* norm_weight, const float* norm_bias, F finish) {
  const int thread = threadIdx.x;
  const float inputs = static_cast<float>(l.inputs);
  float x[8];
  for (int pass = 0; pass < 2; ++pass) {
    for (int row = 0; row < l.rows; ++row) {
      const float mean = pass ? sum_of_warps(sums + row * kWarps) / inputs : 0;
      float sum = 0;
      for (int piece = thread; piece < pieces; piece += kThreads) {
        unpack_piece<T>(xs[x_place(piece, row, l.rows)], x);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (piece * 8 + i < l.inputs) sum += pass ? (x[i] - mean) * (x[i] - mean) : x[i];
      }
      sum = warp_sum(sum);
      if (thread % 32 == 0) sums[(pass * 8 + row) * kWarps + thread / 32] = sum;
    }
    __syncthreads();
  }
  for (int piece = thread; piece < pieces; piece += kThreads) {
    float weight[8], bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // zero beyond the inputs
      const int k = piece * 8 + i;
      weight[i] = k < l.inputs ? load(norm_weight + k) : 0;
      bias[i] = k < l.inputs && norm_bias ? load(norm_bias + k) : 0;
    }
    for (int row = 0; row < l.rows; ++row) {
      const float mean = sum_of_warps(sums + row * kWarps) / inputs;
      const float scale = rsqrtf(sum_of_warps(sums + (8 + row) * kWarps) / inputs + l.norm_eps);
      const int at = x_place(piece, row, l.rows);
      unpack_piece<T>(xs[at], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
      finish(row, piece, x);
      xs[at] = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
    }
  }
  __syncthreads();
}

// The rows that are multiplied, at most 8 if there is a norm, into shared memory: norm(x), or norm(x + branch_norm(branch)),
// and then x + branch_norm(branch) to `sum`, if this block is to write it.
template <class T>
__device__ void load_rows(const CudaLinearParams& call, int padded_inputs, shared<uint4> xs, shared<float> sums, bool writes) {
  constexpr int kBatch = 4;  // loads in flight
  const SkinnyLinearParams& l = call.linear;
  const int pieces = padded_inputs / 8, count = l.rows * pieces;
  for (int first = threadIdx.x; first < count; first += kThreads * kBatch) {
    uint4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = min(first + i * kThreads, count - 1);
      v[i] = load_piece(call.branch ? call.branch : l.x, l.inputs, at / pieces, at % pieces);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kThreads;
      if (at < count) xs[x_place(at % pieces, at / pieces, l.rows)] = v[i];
    }
  }
  __syncthreads();
  if (call.branch)
    normalise<T>(l, pieces, xs, sums, call.branch_weight, call.branch_bias, [&](int row, int piece, float(&v)[8]) {
      float x[8];
      unpack_piece<T>(load_piece(l.x, l.inputs, row, piece), x);
      T* to = static_cast<T*>(call.sum) + static_cast<int64_t>(row) * l.inputs + piece * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] += x[i];
        if (writes && piece * 8 + i < l.inputs) store(to + i, from_float<T>(v[i]));
      }
    });
  if (l.norm_weight)
    normalise<T>(l, pieces, xs, sums, l.norm_weight, l.norm_bias, [](int, int, float(&)[8]) {});
}

// x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2/pi) (x + 0.044715 x³)
__device__ __forceinline__ float gelu_tanh(float x) {
  return __fdividef(x, 1 + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1 + erff(x * 0.7071067812f)); }

}  // namespace skinny
}  // namespace dalle_fast
