// y = epilogue((norm(x) Wᵀ) * scale + bias) + residual for 1 to 64 rows of x, where all that costs is reading W once.
//
// W is the A operand of mma.m16n8k16 and the rows of x are its B operand, 8 rows an instruction: one row alone wastes tensor
// throughput, of which there is plenty, and no bandwidth. dalle_fast/packing.py lays W out in the order in which it is read.
// Few rows, which fit in shared memory whole, are skinny_few_rows.cuh's, and of 16-bit weights there are no others; here x is
// streamed beside W:
//
//   work    W is a line of (blocks of 128 outputs) x (stages of 32 to 128 inputs); each thread block takes an equal share of
//           it, so that every multiprocessor reads as much, whatever the shape. A warp owns 16 of the 128 outputs.
//   stream  W and x come a stage at a time, by cp.async into shared memory, several stages ahead (57 KB of W a multiprocessor;
//           3 TB/s at 1 µs of latency are 23 KB). LayerNorm is a launch of its own before.
//   reduce  where a share ends inside a sum, the parts go to `partials`, and the warp that is last adds them in the order of
//           the inputs: a result does not depend on timing.
//   launch  dependent (sm_90): the first records are under way before the kernel that makes x has ended.
#include "skinny_few_rows.cuh"

namespace dalle_fast {
namespace skinny {

struct DeviceParams {
  CudaLinearParams call;
  float* partials;  // [blocks + weight blocks][warp][8 rows a tile][lane][4]
  void* prepared;   // [rows, padded inputs] or null: x is read as it is
  int32_t stages, weight_blocks, padded_inputs;
};

// Stages in flight.
template <DType kW, int kTiles>
__host__ __device__ constexpr int depth() {
  const int stage = kWarps * Format<kW>::kSlot + kTiles * 8 * Format<kW>::kInputs * 2;
  return stage * 8 <= kMaxRing ? 8 : kMaxRing / stage;
}

// The units of work [first, last) of a thread block, of `total` that are shared out evenly. total * blocks < 2^31.
struct Share {
  int total, blocks;
  __device__ int first(int block) const { return block * total / blocks; }
  __device__ int owner(int unit) const { return ((unit + 1) * blocks - 1) / total; }
};

template <class T, DType kW, int kTiles>
struct Kernel {
  using F = Format<kW>;
  static constexpr int kDepth = depth<kW, kTiles>();

  const DeviceParams& p;
  const Share share;
  const int warp, lane, group, quad;  // group: row of the A operand, column of the B operand
  shared<uint4> ring;                 // records: [slot][warp][2][lane]
  shared<float2> scales;              // int4: [slot][warp][lane], of rows group and group + 8
  shared<uint4> xs;                   // x: a piece a slot; x_place says where
  const unsigned char* from;          // this lane's part of the next record to fetch
  int fetched_stage;                  // whose piece of x comes next
  float sum[kTiles][4];

  __device__ Kernel(const DeviceParams& params, shared<uint4> its_ring, shared<float2> its_scales, shared<uint4> its_xs)
      : p(params),
        share{params.weight_blocks * params.stages, static_cast<int>(gridDim.x)},
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        group(lane / 4),
        quad(lane % 4),
        ring(its_ring + (warp * 64 + lane)),
        scales(its_scales + (warp * 32 + lane)),
        xs(its_xs) {}

  __device__ void run() {
    const int first = share.first(blockIdx.x), last = share.first(blockIdx.x + 1);
    from = static_cast<const unsigned char*>(p.call.linear.weight) +
           (static_cast<int64_t>(first) * kWarps + warp) * F::kRecord;
    fetched_stage = first % p.stages;
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i)
      if (first + i < last) fetch_weights(i);
    start_next_kernel();
    const int outputs = first / p.stages * kBlock, count = ((last - 1) / p.stages + 1) * kBlock - outputs;
    if (first < last && threadIdx.x == 0) prefetch_vector(p.call.linear.bias, outputs, count);
    if (first < last && threadIdx.x == 32) prefetch_vector(p.call.scale, outputs, count);
    wait_for_previous_kernel();
    for (int i = 0; i < kDepth - 1; ++i) {
      if (first + i < last) fetch_x(i);
      cp_async_commit();
    }
    int tile = first / p.stages, stage = first % p.stages, slot = 0, next = kDepth - 1;
    clear();
    for (int unit = first; unit < last; ++unit) {
      cp_async_wait<kDepth - 2>();
      __syncthreads();  // x is everybody's: this piece has landed, and all are done with slot `next`
      if (unit + kDepth - 1 < last) {
        fetch_weights(next);
        fetch_x(next);
      }
      cp_async_commit();
      multiply(slot);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
      next = next + 1 == kDepth ? 0 : next + 1;
      if (++stage == p.stages || unit + 1 == last) {
        if (complete(tile)) write(tile);
        clear();
        stage = 0, ++tile;
      }
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
  }

  __device__ void fetch_weights(int slot) {
    const int at = slot * kWarps * 64;
    cp_async_once(shared_cast<unsigned char>(ring + at), from + lane * 16);
    cp_async_once(shared_cast<unsigned char>(ring + at + 32), from + 512 + lane * 16);
    if constexpr (F::kGroups)  // each lane its own copy: none waits for another
      cp_async<8>(shared_cast<unsigned char>(scales + slot * kWarps * 32), from + 1024 + group * 8);
    from += kWarps * F::kRecord;
  }

  __device__ void fetch_x(int slot) {
    constexpr int kPieces = F::kInputs / 8;
    const int rows = p.call.linear.rows, pitch = p.prepared ? p.padded_inputs : p.call.linear.inputs;
    const uint16_t* x = static_cast<const uint16_t*>(p.prepared ? p.prepared : p.call.linear.x);
    for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces, k = fetched_stage * F::kInputs + piece * 8;
      const bool real = k < pitch;
      cp_async<16>(shared_cast<unsigned char>(xs + (slot * rows * kPieces + x_place(piece, row, rows))),
                   real ? x + static_cast<int64_t>(row) * pitch + k : x, real ? 16 : 0);
    }
    fetched_stage = fetched_stage + 1 == p.stages ? 0 : fetched_stage + 1;
  }

  // One stage: 16 outputs, F::kInputs inputs, all rows.
  __device__ void multiply(int slot) {
    const uint4 w[2] = {ring[slot * kWarps * 64], ring[slot * kWarps * 64 + 32]};
    const int rows = p.call.linear.rows;
    const shared<const uint4> x = xs + (slot * F::kUnits * rows * 4 + quad);
    if constexpr (F::kGroups) scaled_products<T, kW>(w, scales[slot * kWarps * 32], x, rows, sum);
    else products<T, kW>(w, x, rows, sum, sum);
  }

  // Whether `sum` now holds the whole sums of this warp's outputs: alone, or together with the shares of other blocks.
  __device__ bool complete(int tile) {
    const int first = share.owner(tile * p.stages), last = share.owner((tile + 1) * p.stages - 1);
    if (first == last) return true;
    float4* own = share_of(blockIdx.x, tile);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) store(own + i * 32, make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
    __threadfence();
    __syncwarp();
    int* counter = p.call.counters + tile * kWarps + warp;
    int done = 0;
    if (lane == 0) done = atomicAdd(counter, 1);
    if (__shfl_sync(kFullWarp, done, 0) != last - first) return false;
    __threadfence();
    if (lane == 0) store(counter, 0);  // for the next call
    clear();
    constexpr int kBatch = 8 / kTiles;  // loads in flight
    for (int block = first; block <= last; block += kBatch) {
      float4 part[kBatch][kTiles];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int i = 0; i < kTiles; ++i) part[b][i] = load_from_l2(share_of(min(block + b, last), tile) + i * 32);
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (block + b <= last) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            sum[i][0] += part[b][i].x, sum[i][1] += part[b][i].y;
            sum[i][2] += part[b][i].z, sum[i][3] += part[b][i].w;
          }
        }
    }
    return true;
  }

  // Blocks and tiles both ascend along the line of work, so that block + tile names a block's share of a tile.
  __device__ float4* share_of(int block, int tile) const {
    return reinterpret_cast<float4*>(p.partials) + ((block + tile) * kWarps + warp) * kTiles * 32 + lane;
  }

  __device__ void write(int tile) {
    const SkinnyLinearParams& l = p.call.linear;
    const int packed = tile * kBlock + warp * kTile + group;  // and + 8
    const bool gated = l.epilogue == Epilogue::geglu;
    const int output = gated ? tile * (kBlock / 2) + warp * 8 + group : packed;
    const int part = l.outputs / p.call.parts;
    const int64_t place[2] = {static_cast<int64_t>(output / part) * l.rows * part + output % part,
                              static_cast<int64_t>((output + 8) / part) * l.rows * part + (output + 8) % part};
    float scale[2] = {1, 1}, bias[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (p.call.scale) scale[h] = load(p.call.scale + packed + 8 * h);
      if (l.bias) bias[h] = load(l.bias + packed + 8 * h);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = i * 8 + 2 * quad + c;
        float y[2] = {sum[i][c] * scale[0] + bias[0], sum[i][2 + c] * scale[1] + bias[1]};
        if (gated) y[0] *= gelu_erf(y[1]);
        else y[0] = activate(l.epilogue, y[0]), y[1] = activate(l.epilogue, y[1]);
        if (row < l.rows && output < l.outputs) write(place[0] + static_cast<int64_t>(row) * part, y[0]);
        if (row < l.rows && output + 8 < l.outputs && !gated) write(place[1] + static_cast<int64_t>(row) * part, y[1]);
      }
  }

  __device__ void write(int64_t at, float y) {
    const SkinnyLinearParams& l = p.call.linear;
    if (l.residual) y += to_float(load_from_l2(static_cast<const T*>(l.residual) + at));
    store(static_cast<T*>(l.y) + at, from_float<T>(y));
  }
};

// Blocks a multiprocessor that registers must leave room for: this launch's one, and one of the next, which fetches weights
// meanwhile. Groups of 4-bit weights at 64 rows hold 64 sums a thread and would spill (28 to 52 bytes on sm_90a).
template <DType kW, int kTiles>
constexpr int kBlocksAtOnce = Format<kW>::kGroups && kTiles == 8 ? 1 : 2;

template <class T, DType kW, int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kW, kTiles>) linear(const __grid_constant__ DeviceParams p) {
  constexpr int kDepth = depth<kW, kTiles>();
  shared<unsigned char> memory = dynamic_shared();
  const shared<uint4> ring = carve<uint4>(memory, kDepth * kWarps * 64);
  const shared<float2> scales = carve<float2>(memory, Format<kW>::kGroups ? kDepth * kWarps * 32 : 0);
  const shared<uint4> xs = carve<uint4>(memory, p.call.linear.rows * kDepth * Format<kW>::kInputs / 8);
  Kernel<T, kW, kTiles>(p, ring, scales, xs).run();
}

// One thread block a row: p.prepared = norm(x) as load_rows says, zero beyond the inputs.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) prepare(const __grid_constant__ DeviceParams p) {
  start_next_kernel();
  shared<unsigned char> memory = dynamic_shared();
  const shared<float4> moments = carve<float4>(memory, kMoments);
  const shared<uint4> xs = carve<uint4>(memory, p.padded_inputs / 8);
  CudaLinearParams one = p.call;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * one.linear.inputs;
  one.linear.rows = 1;
  one.linear.x = static_cast<const T*>(one.linear.x) + row;
  if (one.branch) one.branch = static_cast<const T*>(one.branch) + row, one.sum = static_cast<T*>(one.sum) + row;
  load_rows<T, false>(one, p.padded_inputs, xs, moments, true);
  uint4* to = static_cast<uint4*>(p.prepared) + static_cast<int64_t>(blockIdx.x) * (p.padded_inputs / 8);
  for (int i = threadIdx.x; i < p.padded_inputs / 8; i += kThreads) store(to + i, static_cast<uint4>(xs[i]));
}

// How a call runs, from its sizes alone. Throws std::runtime_error for a dense weight and more rows than it is read for.
struct Plan {
  int rows, stages, padded_inputs, weight_blocks, blocks, shared_bytes;
  int tiles, tiles_a_block;  // of 16 outputs, for few rows; a block's tiles are 0 where x is streamed
  int row_tiles;             // of 8 rows
  bool prepare;

  size_t partial_bytes() const { return tiles_a_block ? 0 : sizeof(float) * (blocks + weight_blocks) * kBlock * row_tiles * 8; }
  size_t prepared_bytes() const { return prepare ? size_t{2} * rows * padded_inputs : 0; }
};

template <DType kW, int kTiles>
int streamed_bytes(int rows) {
  return depth<kW, kTiles>() * (kWarps * Format<kW>::kSlot + rows * Format<kW>::kInputs * 2);
}

// Tiles of a thread block, or 0 if few_rows is not for this call.
template <DType kW>
int tiles_a_block(const Plan& plan, const CudaLinearParams& call) {
  if (plan.rows > 8 || call.linear.inputs % 8 || plan.rows * plan.padded_inputs * 2 > kMaxResident) return 0;
  int tiles = std::min((plan.tiles + call.multiprocessors - 1) / call.multiprocessors, kMaxTiles);
  while (tiles && few_rows_bytes<kW>(plan.rows, plan.padded_inputs, tiles) > call.shared_limit) --tiles;
  return tiles;
}

template <DType kW>
Plan plan_of(const CudaLinearParams& call) {
  const SkinnyLinearParams& l = call.linear;
  const int halves = l.epilogue == Epilogue::geglu ? 2 : 1;
  Plan plan = {};
  plan.rows = l.rows;
  plan.stages = (l.inputs + Format<kW>::kInputs - 1) / Format<kW>::kInputs;
  plan.padded_inputs = plan.stages * Format<kW>::kInputs;
  plan.weight_blocks = (l.outputs * halves + kBlock - 1) / kBlock;
  plan.tiles = (l.outputs * halves + kTile - 1) / kTile;
  plan.tiles_a_block = tiles_a_block<kW>(plan, call);
  if (plan.tiles_a_block) {
    plan.blocks = (plan.tiles + plan.tiles_a_block - 1) / plan.tiles_a_block;
    plan.shared_bytes = few_rows_bytes<kW>(plan.rows, plan.padded_inputs, plan.tiles_a_block);
    return plan;
  }
  if (Format<kW>::kDense)
    throw std::runtime_error("skinny_linear: got " + std::to_string(plan.rows) + " rows of " + std::to_string(l.inputs) +
                             " inputs for a dense weight, expected few enough for shared memory");
  plan.row_tiles = l.rows <= 8 ? 1 : l.rows <= 16 ? 2 : l.rows <= 32 ? 4 : 8;
  plan.blocks = std::min(call.multiprocessors, plan.weight_blocks * plan.stages);
  plan.shared_bytes = plan.row_tiles == 1   ? streamed_bytes<kW, 1>(plan.rows)
                      : plan.row_tiles == 2 ? streamed_bytes<kW, 2>(plan.rows)
                      : plan.row_tiles == 4 ? streamed_bytes<kW, 4>(plan.rows)
                                            : streamed_bytes<kW, 8>(plan.rows);
  plan.prepare = l.norm_weight || call.branch || l.inputs % 8;
  return plan;
}

template <class T, DType kW>
void run_streamed(const Plan& plan, const CudaLinearParams& call, void* stream) {
  const dim3 block(kThreads);
  DeviceParams p{call, static_cast<float*>(call.workspace), nullptr, plan.stages, plan.weight_blocks, plan.padded_inputs};
  if (plan.prepare) {
    p.prepared = static_cast<char*>(call.workspace) + plan.partial_bytes();
    launch(prepare<T>, "skinny_linear's LayerNorm", dim3(static_cast<unsigned>(plan.rows)), block,
           static_cast<size_t>(kMoments * 16 + plan.padded_inputs * 2), stream, call.dependent_launch, p);
  }
  void (*kernel)(DeviceParams) = plan.row_tiles == 1   ? linear<T, kW, 1>
                                 : plan.row_tiles == 2 ? linear<T, kW, 2>
                                 : plan.row_tiles == 4 ? linear<T, kW, 4>
                                                       : linear<T, kW, 8>;
  launch(kernel, "skinny_linear", dim3(static_cast<unsigned>(plan.blocks)), block, static_cast<size_t>(plan.shared_bytes), stream,
         call.dependent_launch, p);
}

template <class T, DType kW>
void run(const CudaLinearParams& call, void* stream) {
  const Plan plan = plan_of<kW>(call);
  if (plan.tiles_a_block) {
    const FewRowsParams few{call, plan.stages, plan.padded_inputs, plan.tiles, plan.tiles_a_block};
    launch(few_rows<T, kW>, "skinny_linear", dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads),
           static_cast<size_t>(plan.shared_bytes), stream, call.dependent_launch, few);
  } else if constexpr (!Format<kW>::kDense) {
    run_streamed<T, kW>(plan, call, stream);
  }
}

template <class T>
void run_join(const CudaLinearParams& call, void* stream) {
  DeviceParams p{};
  p.call = call, p.prepared = call.linear.y, p.padded_inputs = call.linear.inputs;
  launch(prepare<T>, "join", dim3(static_cast<unsigned>(call.linear.rows)), dim3(kThreads),
         static_cast<size_t>(kMoments * 16 + call.linear.inputs * 2), stream, call.dependent_launch, p);
}

}  // namespace skinny

void launch_join(const CudaLinearParams& call, void* stream) {
  call.linear.dtype == DType::float16 ? skinny::run_join<__half>(call, stream) : skinny::run_join<__nv_bfloat16>(call, stream);
}

size_t skinny_linear_workspace(const CudaLinearParams& call) {
  const skinny::Plan plan = call.weight_dtype == DType::int4   ? skinny::plan_of<DType::int4>(call)
                            : call.weight_dtype == DType::int8 ? skinny::plan_of<DType::int8>(call)
                                                               : skinny::plan_of<DType::bfloat16>(call);
  return plan.partial_bytes() + plan.prepared_bytes();
}

void launch_skinny_linear(const CudaLinearParams& call, void* stream) {
  const bool half = call.linear.dtype == DType::float16;
  if (call.weight_dtype == DType::int4)
    half ? skinny::run<__half, DType::int4>(call, stream) : skinny::run<__nv_bfloat16, DType::int4>(call, stream);
  else if (call.weight_dtype == DType::int8)
    half ? skinny::run<__half, DType::int8>(call, stream) : skinny::run<__nv_bfloat16, DType::int8>(call, stream);
  else
    half ? skinny::run<__half, DType::bfloat16>(call, stream) : skinny::run<__nv_bfloat16, DType::bfloat16>(call, stream);
}

}  // namespace dalle_fast
