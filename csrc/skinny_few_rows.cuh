// y = epilogue((norm(x) Wᵀ) * scale + bias) + residual for few rows of x, which are whole in shared memory. No sum leaves its
// thread block: a chain of such launches is as fast as its latencies allow, and blocks that wait for each other are some more.
//
//   work    a block computes 1 to 8 tiles of 16 outputs, one after the other; its 8 warps share out the inputs of each.
//   stream  each warp keeps its next 7 records in flight, across tiles, and waits for no other warp.
//   reduce  a warp leaves its part of a tile in shared memory. Once all have, threads add 8 parts each, in order.
//   ends    what a sum is multiplied by and added to is in registers by then.
#pragma once

#include "skinny_linear.cuh"

namespace dalle_fast {
namespace skinny {

constexpr int kFewDepth = 8;                                // slots of a warp's ring: a power of 2
constexpr int kMaxTiles = 8;                                // of a block
constexpr int kResults = kMaxTiles * kTile * 8 / kThreads;  // of a thread, at most

struct FewRowsParams {
  CudaLinearParams call;
  int32_t stages, padded_inputs, tiles, tiles_a_block;
};

template <DType kW>
int few_rows_bytes(int rows, int padded_inputs, int tiles_a_block) {
  return kMoments * 16 + tiles_a_block * kWarps * kTile * rows * 4 + kFewDepth * kWarps * Format<kW>::kSlot +
         rows * padded_inputs * 2;
}

// Of a dense weight a lane reads 8 inputs of outputs lane / 4 and 8 more (of gates: lane / 4 of the second half), which are the
// same registers in another order.
template <class T, DType kW>
struct FewRows {
  using F = Format<kW>;

  struct Result {
    int place, of;  // in y, or -1 for none; output of the tile | row << 4 | tile << 8: few registers while rows are loaded
    float scale[2], bias[2], residual;  // [1]: of the gate
  };

  const FewRowsParams& p;
  const SkinnyLinearParams& l;
  const int lane, warp, first_tile, last_tile, first_stage, last_stage;
  const bool gated;
  const int of_rows;      // 1 / rows, times 65536: divides by them
  shared<float> parts;        // [tile][warp][row][16 outputs]
  shared<uint4> ring;         // this lane's: [slot][2][32 lanes]
  shared<float2> scales;      // int4: this lane's, of outputs lane / 4 and 8 more: [slot][32 lanes]
  shared<const uint4> xs;     // x_place says where
  const unsigned char* from;  // this lane's part of the next record to fetch, or dense: its first output, and how far the other is
  int64_t other;
  int next_tile, next_stage;  // whose record that is

  __device__ FewRows(const FewRowsParams& params, shared<float> its_parts, shared<uint4> its_ring, shared<float2> its_scales,
                     shared<const uint4> its_xs)
      : p(params),
        l(params.call.linear),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        first_tile(blockIdx.x * params.tiles_a_block),
        last_tile(min(first_tile + params.tiles_a_block, params.tiles)),
        first_stage(warp * params.stages / kWarps),
        last_stage((warp + 1) * params.stages / kWarps),
        gated(l.epilogue == Epilogue::geglu),
        of_rows((65535 + l.rows) / l.rows),
        parts(its_parts),
        ring(its_ring + (warp * kFewDepth * 64 + lane)),
        scales(its_scales + (warp * kFewDepth * 32 + lane)),
        xs(its_xs) {
    seek(first_stage < last_stage ? first_tile : last_tile);
  }

  __device__ void run(shared<uint4> rows, shared<float4> moments) {
#pragma unroll 1
    for (int i = 0; i < kFewDepth - 1; ++i) {
      fetch(i);
      cp_async_commit();
    }
    start_next_kernel();
    prefetch();
    Result results[kResults];
#pragma unroll
    for (int i = 0; i < kResults; ++i) results[i] = result(i * kThreads + threadIdx.x);
    load_rows<T, true>(p.call, p.padded_inputs, rows, moments, blockIdx.x == 0);
#pragma unroll
    for (int i = 0; i < kResults; ++i) load_operands(results[i]);
    int slot = 0;
#pragma unroll 1
    for (int tile = 0; tile < last_tile - first_tile; ++tile) slot = multiply(tile, slot);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kResults && results[0].place >= 0; ++i) {
      finish(results[0]);
#pragma unroll
      for (int j = 0; j < kResults - 1; ++j) results[j] = results[j + 1];
    }
  }

  // The vectors, which the previous kernel does not make, into the second-level cache while it is still at work.
  __device__ void prefetch() const {
    const int width = F::kDense && gated ? kTile / 2 : kTile, first = first_tile * width;
    const int all = (last_tile - first_tile) * width, count = F::kDense ? min(all, l.outputs - first) : all;
    if (threadIdx.x == 0) prefetch_vector(l.bias, first, count);
    if (threadIdx.x == 32) prefetch_vector(p.call.scale, first, count);
    if (threadIdx.x == 64) prefetch_vector(l.norm_weight, 0, l.inputs);
    if (threadIdx.x == 96) prefetch_vector(l.norm_bias, 0, l.inputs);
    if (threadIdx.x == 128) prefetch_vector(p.call.branch_weight, 0, l.inputs);
    if (threadIdx.x == 160) prefetch_vector(p.call.branch_bias, 0, l.inputs);
  }

  __device__ void seek(int tile) {
    next_tile = tile, next_stage = first_stage;
    if constexpr (F::kDense) {  // outputs that do not exist are the last one again
      const int row = min(tile * (gated ? kTile / 2 : kTile) + lane / 4, l.outputs - 1);
      other = static_cast<int64_t>(gated ? l.outputs : min(row + 8, l.outputs - 1) - row) * l.inputs * 2;
      from = static_cast<const unsigned char*>(l.weight) + static_cast<int64_t>(row) * l.inputs * 2;
      return;
    }
    const int64_t record = (static_cast<int64_t>(tile / kWarps) * p.stages + first_stage) * kWarps + tile % kWarps;
    from = static_cast<const unsigned char*>(l.weight) + record * F::kRecord + lane * 16;
  }

  __device__ void fetch(int slot) {
    if (next_tile == last_tile) return;
    if constexpr (F::kDense) {  // beyond the last input x is zero, whatever the weight
      const unsigned char* piece = from + min(next_stage * F::kInputs + lane % 4 * 8, l.inputs - 8) * 2;
      cp_async_once(shared_cast<unsigned char>(ring + slot * 64), piece);
      cp_async_once(shared_cast<unsigned char>(ring + (slot * 64 + 32)), piece + other);
      if (++next_stage == last_stage) seek(next_tile + 1);
      return;
    }
    cp_async_once(shared_cast<unsigned char>(ring + slot * 64), from);
    cp_async_once(shared_cast<unsigned char>(ring + (slot * 64 + 32)), from + 512);
    if constexpr (F::kGroups)  // each lane its own copy: none waits for another
      cp_async<8>(shared_cast<unsigned char>(scales + slot * 32), from + (1024 + lane / 4 * 8 - lane * 16));
    from += kWarps * F::kRecord;
    if (++next_stage == last_stage) seek(next_tile + 1);
  }

  // This warp's part of a tile, whose first record is in `slot`. Returns the slot of the next one.
  __device__ int multiply(int tile, int slot) {
    float sum[1][4] = {}, other[1][4] = {};  // two: no product waits for the one before
    const int pitch = F::kUnits * l.rows * 4;
    shared<const uint4> x = xs + (first_stage * pitch + lane % 4);
#pragma unroll 1
    for (int stage = first_stage; stage < last_stage; ++stage) {
      cp_async_wait<kFewDepth - 2>();
      uint4 w[2] = {ring[slot * 64], ring[slot * 64 + 32]};
      if constexpr (F::kDense) {
        const uint4 a = w[0], b = w[1];
        w[0] = make_uint4(a.x, b.x, a.y, b.y), w[1] = make_uint4(a.z, b.z, a.w, b.w);
      }
      fetch((slot + kFewDepth - 1) & (kFewDepth - 1));
      cp_async_commit();
      if constexpr (F::kGroups) scaled_products<T, kW>(w, scales[slot * 32], x, l.rows, sum);
      else products<T, kW>(w, x, l.rows, sum, other);
      slot = (slot + 1) & (kFewDepth - 1);
      x += pitch;
    }
    const shared<float> own = parts + ((tile * kWarps + warp) * l.rows * kTile + lane / 4);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = lane % 4 * 2 + c;
      if (row >= l.rows) break;
      own[row * kTile] = sum[0][c] + other[0][c];
      own[row * kTile + 8] = sum[0][2 + c] + other[0][2 + c];
    }
    return slot;
  }

  // The i-th of this block. Neighbouring threads have neighbouring outputs.
  __device__ Result result(int i) const {
    Result r = {-1, 0, {1, 1}, {0, 0}, 0};
    const int width = gated ? kTile / 2 : kTile, of_row = i / width, tile = of_row * of_rows >> 16;
    const int row = of_row - tile * l.rows, part = l.outputs / p.call.parts;
    int output = (first_tile + tile) * width + i % width;
    if (tile >= last_tile - first_tile || output >= l.outputs) return r;
    r.place = row * part;
    for (; output >= part; output -= part) r.place += l.rows * part;
    r.place += output;
    r.of = i % width | row << 4 | tile << 8;
    return r;
  }

  __device__ void load_operands(Result& r) const {
    if (r.place < 0) return;
    const int at = (first_tile + (r.of >> 8)) * (F::kDense && gated ? kTile / 2 : kTile) + r.of % kTile;
    const int gate = at + (F::kDense ? l.outputs : 8);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h && !gated) break;
      if (p.call.scale) r.scale[h] = load(p.call.scale + (h ? gate : at));
      if (l.bias) r.bias[h] = load(l.bias + (h ? gate : at));
    }
    if (l.residual) r.residual = to_float(load_from_l2(static_cast<const T*>(l.residual) + r.place));
  }

  __device__ void finish(const Result& r) const {
    const int part = ((r.of >> 8) * kWarps * l.rows + (r.of >> 4 & 15)) * kTile + r.of % kTile;
    float y = total(part) * r.scale[0] + r.bias[0];
    if (gated) y *= gelu_erf(total(part + 8) * r.scale[1] + r.bias[1]);
    else y = activate(l.epilogue, y);
    store(static_cast<T*>(l.y) + r.place, from_float<T>(y + r.residual));
  }

  __device__ float total(int part) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += parts[part + i * l.rows * kTile];
    return sum;
  }
};

template <class T, DType kW>
__global__ void __launch_bounds__(kThreads, 2) few_rows(const __grid_constant__ FewRowsParams p) {
  const int rows = p.call.linear.rows;
  shared<unsigned char> memory = dynamic_shared();
  const shared<float4> moments = carve<float4>(memory, kMoments);
  const shared<float> parts = carve<float>(memory, p.tiles_a_block * kWarps * kTile * rows);
  const shared<uint4> ring = carve<uint4>(memory, kFewDepth * kWarps * 64);
  const shared<float2> scales = carve<float2>(memory, Format<kW>::kGroups ? kFewDepth * kWarps * 32 : 0);
  const shared<uint4> xs = carve<uint4>(memory, rows * p.padded_inputs / 8);
  FewRows<T, kW>(p, parts, ring, scales, xs).run(xs, moments);
}

}  // namespace skinny
}  // namespace dalle_fast
