// What skinny_linear.cu is made of: formats of weights, rows of x and their LayerNorm, activations.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace dalle_fast {
namespace skinny {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTile = 16, kBlock = kWarps * kTile;
constexpr int kMaxResident = 64 * 1024;  // bytes of x kept whole in shared memory
constexpr int kMaxRing = 96 * 1024;      // bytes of weights and x in flight: two kernels fit, so that one can start early

// A record is what a warp reads at a stage. kDense: 16-bit weights of either type, as nn.Linear has them; there it is 32 inputs
// of 16 outputs, gathered. DType::bfloat16 stands for both.
template <DType kW>
struct Format {
  static constexpr bool kDense = kW == DType::bfloat16, kGroups = kW == DType::int4;
  static constexpr int kInputs = kW == DType::int4 ? 128 : kW == DType::int8 ? 64 : 32;
  static constexpr int kUnits = kInputs / 32;
  static constexpr int kRecord = kGroups ? 1024 + 64 : 1024;
  static constexpr int kSlot = kGroups ? 1024 + 256 : 1024;  // in shared memory, where each lane has its own scales
};

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

// A stage of 32 to 128 inputs: its products with 16 outputs, of which those of even tiles are added to `even`. xs: this lane's
// piece of the first row. Rows that do not exist are the last one again; nobody reads their sums.
template <class T, DType kW, int kTiles>
__device__ __forceinline__ void products(const uint4 (&w)[2], shared<const uint4> xs, int rows, float (&even)[kTiles][4],
                                         float (&odd)[kTiles][4]) {
  const int group = threadIdx.x % 32 / 4;
#pragma unroll
  for (int u = 0; u < Format<kW>::kUnits; ++u) {
    uint32_t a[2][4];
    fragment<T, kW>(w, u, 0, a[0]);
    fragment<T, kW>(w, u, 1, a[1]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 b = xs[(u * rows + min(i * 8 + group, rows - 1)) * 4];
      mma_m16n8k16<T>(even[i], a[0], {b.x, b.y});
      mma_m16n8k16<T>(odd[i], a[1], {b.z, b.w});
    }
  }
}

// The same, where a stage is a group of inputs with a scale: integers are added, then scaled, in float32.
template <class T, DType kW, int kTiles>
__device__ __forceinline__ void scaled_products(const uint4 (&w)[2], const float2& scale, shared<const uint4> xs, int rows,
                                                float (&sum)[kTiles][4]) {
  constexpr int kChains = kTiles == 1 ? 2 : 1;  // one sum alone would wait for itself 8 times
  float part[kChains][kTiles][4] = {};
  products<T, kW>(w, xs, rows, part[0], part[kChains - 1]);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float total = kChains == 2 ? part[0][i][j] + part[kChains - 1][i][j] : part[0][i][j];
      sum[i][j] += total * (j < 2 ? scale.x : scale.y);
    }
}

// x in shared memory: [32 inputs][row][4 pieces of 8 inputs], so that 8 neighbouring lanes read different banks.
__device__ __forceinline__ int x_place(int piece, int row, int rows) {
  return (piece / 4 * rows + row) * 4 + piece % 4;
}

// 8 inputs of a row, zero beyond the last; kWhole: inputs are a multiple of 8. Rows were written by the previous kernel: not by
// way of the L1 cache.
template <bool kWhole>
__device__ __forceinline__ uint4 load_piece(const void* rows, int inputs, int row, int piece) {
  const uint16_t* from = static_cast<const uint16_t*>(rows) + static_cast<int64_t>(row) * inputs + piece * 8;
  uint32_t pair[4] = {};
  if (kWhole || inputs % 8 == 0) {
    if (piece * 8 < inputs) return load_from_l2(reinterpret_cast<const uint4*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = piece * 8 + 2 * i;
      if (k < inputs) pair[i] = load_from_l2(from + 2 * i);
      if (k + 1 < inputs) pair[i] |= uint32_t{load_from_l2(from + 2 * i + 1)} << 16;
    }
  }
  return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

template <bool kWhole>
__device__ __forceinline__ void store_piece(void* rows, int inputs, int row, int piece, const uint4& v) {
  uint16_t* to = static_cast<uint16_t*>(rows) + static_cast<int64_t>(row) * inputs + piece * 8;
  if ((kWhole || inputs % 8 == 0) && reinterpret_cast<uintptr_t>(rows) % 16 == 0) {
    if (piece * 8 < inputs) store(reinterpret_cast<uint4*>(to), v);
  } else {
    const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (piece * 8 + i < inputs) store(to + i, static_cast<uint16_t>(pair[i / 2] >> i % 2 * 16));
  }
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

// LayerNorm. Each block of few rows normalises all of them itself, in a chain of dependent steps that its products wait for:
// loads are early, barriers few, and code is short, as much of it runs once.

constexpr int kBatch = 4;      // pieces whose loads are in flight
constexpr int kMoments = kWarps + kWarps * 8 / 2;  // float4: [warp], see take_moments; [warp][8 rows] halves, see norms_of_rows

// Its vectors, for 8 inputs: zero beyond the last.
template <bool kWhole>
struct Affine {
  float weight[8], bias[8];

  __device__ __forceinline__ void load(const float* weights, const float* biases, int inputs, int piece) {
    read(weights, inputs, piece, weight);
    read(biases, inputs, piece, bias);
  }
  __device__ static __forceinline__ void read(const float* vector, int inputs, int piece, float (&v)[8]) {
    const int first = piece * 8;
    const float* from = vector + first;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0;
    if (!vector || first >= inputs) return;
    if ((kWhole || inputs % 8 == 0) && reinterpret_cast<uintptr_t>(vector) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = dalle_fast::load(reinterpret_cast<const float4*>(from) + i);
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (kWhole || first + i < inputs) v[i] = dalle_fast::load(from + i);
    }
  }
};

// Warps share the rows out evenly: 8 rows have one each, 1 has all.
__device__ __forceinline__ int warps_a_row(int rows) {
  return rows == 1 ? kWarps : rows == 2 ? kWarps / 2 : rows <= 4 ? kWarps / 4 : 1;
}

// For each warp: how many inputs of a row are its part, their mean, and the sum of the squares of what differs from it; if
// `wanted`. Rows come from `from`, and go into xs; or they are there, if kLoads is not.
template <class T, bool kWhole, bool kLoads>
__device__ __forceinline__ void take_moments(const SkinnyLinearParams& l, const void* from, int pieces, shared<uint4> xs,
                                             shared<float4> moments, bool wanted) {
  const int step = 32 * warps_a_row(l.rows), row = threadIdx.x / step, first = threadIdx.x % step;
  if (row >= l.rows) return;
  float shift = 0, sum = 0, squares = 0;  // of a thread: less the mean of its first piece, so that little cancels
  int count = 0;
#pragma unroll 1
  for (int start = first; start < pieces; start += step * kBatch) {
    uint4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int piece = min(start + i * step, pieces - 1);
      v[i] = kLoads ? load_piece<kWhole>(from, l.inputs, row, piece) : static_cast<uint4>(xs[x_place(piece, row, l.rows)]);
    }
#pragma unroll 1
    for (int piece = start; piece < min(pieces, start + step * kBatch); piece += step) {
      const uint4 now = v[0];
#pragma unroll
      for (int i = 0; i < kBatch - 1; ++i) v[i] = v[i + 1];
      if (kLoads) xs[x_place(piece, row, l.rows)] = now;
      const int real = min(l.inputs - piece * 8, 8);
      if (!wanted || real <= 0) continue;
      float x[8];
      unpack_piece<T>(now, x);
      if (count == 0) {
        const float total = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        shift = kWhole ? total / 8 : __fdividef(total, static_cast<float>(real));
      }
      count += real;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float off = kWhole || j < real ? x[j] - shift : 0;
        sum += off, squares += off * off;
      }
    }
  }
  if (!wanted) return;
  // Chan et al.: the squares of a whole are those of its parts, and those of how the parts' means differ from its own.
  const float own = static_cast<float>(count), mine = count ? __fdividef(sum, own) : 0;
  const float inputs = warp_sum(own), total = warp_sum(own * (shift + mine)), mean = inputs > 0 ? __fdividef(total, inputs) : 0;
  const float off = shift + mine - mean;
  squares = warp_sum(squares - sum * mine + own * off * off);
  if (threadIdx.x % 32 == 0) moments[threadIdx.x / 32] = make_float4(inputs, mean, squares, 0);
}

// Each warp for itself, after a barrier: (scale, -mean * scale) of each row, whose norm is x * scale - mean * scale.
__device__ __forceinline__ shared<const float2> norms_of_rows(const SkinnyLinearParams& l, shared<float4> moments) {
  const shared<float2> norms = shared_cast<float2>(moments + kWarps) + threadIdx.x / 32 * 8;
  const int each = warps_a_row(l.rows), lane = threadIdx.x % 32;
  const float4 part = moments[lane % kWarps];
  const float share = __fdividef(part.x, static_cast<float>(l.inputs));
  float mean = share * part.y;
  for (int bit = 1; bit < each; bit *= 2) mean += __shfl_xor_sync(kFullWarp, mean, bit);
  float variance = __fdividef(part.z, static_cast<float>(l.inputs)) + share * (part.y - mean) * (part.y - mean);
  for (int bit = 1; bit < each; bit *= 2) variance += __shfl_xor_sync(kFullWarp, variance, bit);
  const float scale = rsqrtf(variance + l.norm_eps);
  if (lane < kWarps && lane % each == 0) norms[lane / each] = make_float2(scale, -mean * scale);
  __syncwarp();
  return norms;
}

// A piece of x in rows first, first + 1 … as far as they exist.
template <bool kWhole>
__device__ __forceinline__ void load_ahead(const SkinnyLinearParams& l, int first, int piece, uint4 (&v)[kBatch]) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i)
    if (first + i < l.rows) v[i] = load_piece<kWhole>(l.x, l.inputs, first + i, piece);
}

// norm(v) in the place of rows v in shared memory; kJoins: x + norm(v), which one block also writes to call.sum.
// affine: of this thread's first piece; ahead: of x, for the first rows.
template <class T, bool kWhole, bool kJoins>
__device__ __forceinline__ void normalise(const CudaLinearParams& call, int pieces, shared<uint4> xs, shared<float4> moments,
                                          Affine<kWhole>& affine, uint4 (&ahead)[kBatch], bool writes) {
  const SkinnyLinearParams& l = call.linear;
  const shared<const float2> norms = norms_of_rows(l, moments);
#pragma unroll 1
  for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {
    if (piece >= kThreads)
      affine.load(kJoins ? call.branch_weight : l.norm_weight, kJoins ? call.branch_bias : l.norm_bias, l.inputs, piece);
#pragma unroll 1
    for (int row = 0; row < l.rows; ++row) {
      if (kJoins && row % kBatch == 0 && (piece >= kThreads || row)) load_ahead<kWhole>(l, row, piece, ahead);
      const int at = x_place(piece, row, l.rows);
      const float2 norm = norms[row];
      float v[8], x[8];
      unpack_piece<T>(xs[at], v);
      if constexpr (kJoins) unpack_piece<T>(ahead[0], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = (v[j] * norm.x + norm.y) * affine.weight[j] + affine.bias[j];
        if constexpr (kJoins) v[j] += x[j];
      }
      const uint4 packed = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
      xs[at] = packed;
      if constexpr (kJoins) {
        if (writes) store_piece<kWhole>(call.sum, l.inputs, row, piece, packed);
#pragma unroll
        for (int i = 0; i < kBatch - 1; ++i) ahead[i] = ahead[i + 1];
      }
    }
  }
}

// The rows that are multiplied, at most 8 if there is a norm, into shared memory: norm(x), or norm(x + branch_norm(branch)),
// and then x + branch_norm(branch) to `sum`, if this block is to write it. Waits for the previous kernel.
template <class T, bool kWhole>
__device__ __forceinline__ void load_rows(const CudaLinearParams& call, int padded_inputs, shared<uint4> xs,
                                          shared<float4> moments, bool writes) {
  const SkinnyLinearParams& l = call.linear;
  const int pieces = padded_inputs / 8;
  Affine<kWhole> affine;
  uint4 ahead[kBatch] = {};
  wait_for_previous_kernel();
  if (call.branch) {
    affine.load(call.branch_weight, call.branch_bias, l.inputs, threadIdx.x);
    load_ahead<kWhole>(l, 0, threadIdx.x, ahead);
  } else if (l.norm_weight) {
    affine.load(l.norm_weight, l.norm_bias, l.inputs, threadIdx.x);
  }
  take_moments<T, kWhole, true>(l, call.branch ? call.branch : l.x, pieces, xs, moments, call.branch || l.norm_weight);
  __syncthreads();
  if (call.branch) {
    normalise<T, kWhole, true>(call, pieces, xs, moments, affine, ahead, writes);
    if (l.norm_weight) affine.load(l.norm_weight, l.norm_bias, l.inputs, threadIdx.x);
    __syncthreads();
  }
  if (!l.norm_weight) return;
  if (call.branch) {
    take_moments<T, kWhole, false>(l, nullptr, pieces, xs, moments, true);
    __syncthreads();
  }
  normalise<T, kWhole, false>(call, pieces, xs, moments, affine, ahead, false);
  __syncthreads();
}

// x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2/pi) (x + 0.044715 x³)
__device__ __forceinline__ float gelu_tanh(float x) {
  return __fdividef(x, 1 + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1 + erff(x * 0.7071067812f)); }

__device__ __forceinline__ float activate(Epilogue epilogue, float x) {
  return epilogue == Epilogue::none ? x : epilogue == Epilogue::gelu_tanh ? gelu_tanh(x) : gelu_erf(x);
}

// A vector that is read at the end of a chain of loads, or part of it, into the second-level cache.
__device__ __forceinline__ void prefetch_vector(const float* vector, int first, int count) {
  if (vector && count >= 4 && reinterpret_cast<uintptr_t>(vector + first) % 16 == 0)
    prefetch_to_l2(vector + first, count / 4 * 16);
}

}  // namespace skinny
}  // namespace dalle_fast
