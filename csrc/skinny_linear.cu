// y = epilogue((norm(x) Wᵀ) * scale + bias) + residual for 1 to 64 rows of x, where all that costs is reading W once.
//
// W is the A operand of mma.m16n8k16 and the rows of x are its B operand, 8 rows an instruction: one row alone wastes tensor
// throughput, of which there is plenty, and no bandwidth. dalle_fast/packing.py lays W out so that a thread block's work is
// one unbroken range of memory:
//
//   work    W is a line of (blocks of 128 outputs) x (stages of 32 to 128 inputs); each thread block takes an equal share of
//           it, so that every multiprocessor reads as much, whatever the shape. A warp owns 16 of the 128 outputs.
//   stream  each warp keeps its next 7 records of 1 KB in flight, by cp.async into its own part of shared memory (57 KB a
//           multiprocessor; 3 TB/s at 1 µs of latency are 23 KB), and waits for no other warp.
//   reduce  where a share ends inside a sum, the parts go to `partials`, and the warp that is last adds them in the order of
//           the inputs: a result does not depend on timing.
//   x       little: whole in shared memory, normalised on the way in. Much: a piece a stage, beside W, and LayerNorm is a
//           launch of its own before.
//   launch  dependent (sm_90): the first records are under way before the kernel that makes x has ended.
#include "skinny_linear.cuh"

namespace dalle_fast {
namespace skinny {

// The units of work [first, last) of a thread block, of `total` that are shared out evenly. total * blocks < 2^31.
struct Share {
  int total, blocks;
  __device__ int first(int block) const { return block * total / blocks; }
  __device__ int owner(int unit) const { return ((unit + 1) * blocks - 1) / total; }
};

template <class T, DType kW, int kTiles, bool kResident>
struct Kernel {
  using F = Format<kW>;
  static constexpr int kDepth = depth<kW, kTiles, kResident>();

  const DeviceParams& p;
  const Share share;
  const int warp, lane, group, quad;  // group: row of the A operand, column of the B operand
  shared<uint4> ring;                 // records: [slot][warp][2][lane]
  shared<float2> scales;              // int4: [slot][warp][lane], of rows group and group + 8
  shared<uint4> xs;                   // x: whole, or a piece a slot; x_place says where
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

  __device__ void run(shared<float> sums) {
    const int first = share.first(blockIdx.x), last = share.first(blockIdx.x + 1);
    from = static_cast<const unsigned char*>(p.call.linear.weight) +
           (static_cast<int64_t>(first) * kWarps + warp) * F::kRecord;
    fetched_stage = first % p.stages;
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) {
      if (first + i < last) fetch_weights(i);
      if (kResident) cp_async_commit();
    }
    start_next_kernel();
    wait_for_previous_kernel();
    if constexpr (kResident) {
      load_rows<T>(p.call, p.padded_inputs, xs, sums, blockIdx.x == 0);
    } else {
      for (int i = 0; i < kDepth - 1; ++i) {
        if (first + i < last) fetch_x(i);
        cp_async_commit();
      }
    }
    int tile = first / p.stages, stage = first % p.stages, slot = 0, next = kDepth - 1;
    clear();
    for (int unit = first; unit < last; ++unit) {
      cp_async_wait<kDepth - 2>();
      if (!kResident) __syncthreads();  // x is everybody's: this piece has landed, and all are done with slot `next`
      if (unit + kDepth - 1 < last) {
        fetch_weights(next);
        if (!kResident) fetch_x(next);
      }
      cp_async_commit();
      multiply(slot, stage);
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
  __device__ void multiply(int slot, int stage) {
    const uint4 w[2] = {ring[slot * kWarps * 64], ring[slot * kWarps * 64 + 32]};
    const int x = (kResident ? stage : slot) * F::kUnits * p.call.linear.rows * 4 + quad;
    if constexpr (!F::kGroups) {
      products(w, x, sum, sum);
    } else {  // a stage is a group of inputs: integers are added, then scaled, in float32
      constexpr int kChains = kTiles == 1 ? 2 : 1;  // one sum alone would wait for itself 8 times
      float part[kChains][kTiles][4] = {};
      products(w, x, part[0], part[kChains - 1]);
      const float2 scale = scales[slot * kWarps * 32];
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float total = kChains == 2 ? part[0][i][j] + part[kChains - 1][i][j] : part[0][i][j];
          sum[i][j] += total * (j < 2 ? scale.x : scale.y);
        }
    }
  }

  __device__ void products(const uint4 (&w)[2], int x, float (&even)[kTiles][4], float (&odd)[kTiles][4]) {
    const int rows = p.call.linear.rows;
#pragma unroll
    for (int u = 0; u < F::kUnits; ++u) {
      uint32_t a[2][4];
      fragment<T, kW>(w, u, 0, a[0]);
      fragment<T, kW>(w, u, 1, a[1]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {  // rows that do not exist are the last one again; nobody reads their sums
        const uint4 b = xs[x + (u * rows + min(i * 8 + group, rows - 1)) * 4];
        mma_m16n8k16<T>(even[i], a[0], {b.x, b.y});
        mma_m16n8k16<T>(odd[i], a[1], {b.z, b.w});
      }
    }
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
        if (gated) {
          y[0] *= gelu_erf(y[1]);
        } else if (l.epilogue != Epilogue::none) {
          const bool tanh = l.epilogue == Epilogue::gelu_tanh;
          y[0] = tanh ? gelu_tanh(y[0]) : gelu_erf(y[0]), y[1] = tanh ? gelu_tanh(y[1]) : gelu_erf(y[1]);
        }
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

template <class T, DType kW, int kTiles, bool kResident>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kW, kTiles>) linear(const __grid_constant__ DeviceParams p) {
  constexpr int kDepth = depth<kW, kTiles, kResident>();
  const int inputs = kResident ? p.padded_inputs : kDepth * Format<kW>::kInputs;
  shared<unsigned char> memory = dynamic_shared();
  const shared<float> sums = carve<float>(memory, kSums);
  const shared<uint4> ring = carve<uint4>(memory, kDepth * kWarps * 64);
  const shared<float2> scales = carve<float2>(memory, Format<kW>::kGroups ? kDepth * kWarps * 32 : 0);
  const shared<uint4> xs = carve<uint4>(memory, p.call.linear.rows * inputs / 8);
  Kernel<T, kW, kTiles, kResident>(p, ring, scales, xs).run(sums);
}

// One thread block a row: p.prepared = norm(x) as load_rows says, zero beyond the inputs.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) prepare(const __grid_constant__ DeviceParams p) {
  start_next_kernel();
  wait_for_previous_kernel();
  shared<unsigned char> memory = dynamic_shared();
  const shared<float> sums = carve<float>(memory, kSums);
  const shared<uint4> xs = carve<uint4>(memory, p.padded_inputs / 8);
  CudaLinearParams one = p.call;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * one.linear.inputs;
  one.linear.rows = 1;
  one.linear.x = static_cast<const T*>(one.linear.x) + row;
  if (one.branch) one.branch = static_cast<const T*>(one.branch) + row, one.sum = static_cast<T*>(one.sum) + row;
  load_rows<T>(one, p.padded_inputs, xs, sums, true);
  uint4* to = static_cast<uint4*>(p.prepared) + static_cast<int64_t>(blockIdx.x) * (p.padded_inputs / 8);
  for (int i = threadIdx.x; i < p.padded_inputs / 8; i += kThreads) store(to + i, static_cast<uint4>(xs[i]));
}

// How a call runs, from its sizes alone.
struct Plan {
  int rows, tiles, stages, padded_inputs, weight_blocks, blocks, shared_bytes;
  bool resident, prepare;

  size_t partial_bytes() const { return sizeof(float) * (blocks + weight_blocks) * kBlock * tiles * 8; }
  size_t prepared_bytes() const { return prepare ? size_t{2} * rows * padded_inputs : 0; }
};

template <DType kW, int kTiles, bool kResident>
int shared_bytes(const Plan& plan) {
  constexpr int kDepth = depth<kW, kTiles, kResident>();
  const int inputs = kResident ? plan.padded_inputs : kDepth * Format<kW>::kInputs;
  return kSums * 4 + kDepth * kWarps * Format<kW>::kSlot + plan.rows * inputs * 2;
}

template <DType kW>
Plan plan_of(const CudaLinearParams& call) {
  const SkinnyLinearParams& l = call.linear;
  const int tile_outputs = l.epilogue == Epilogue::geglu ? kBlock / 2 : kBlock;
  Plan plan = {};
  plan.rows = l.rows;
  plan.tiles = l.rows <= 8 ? 1 : l.rows <= 16 ? 2 : l.rows <= 32 ? 4 : 8;
  plan.stages = (l.inputs + Format<kW>::kInputs - 1) / Format<kW>::kInputs;
  plan.padded_inputs = plan.stages * Format<kW>::kInputs;
  plan.weight_blocks = (l.outputs + tile_outputs - 1) / tile_outputs;
  plan.blocks = std::min(call.multiprocessors, plan.weight_blocks * plan.stages);
  plan.shared_bytes = shared_bytes<kW, 1, true>(plan);
  plan.resident = plan.tiles == 1 && plan.rows * plan.padded_inputs * 2 <= kMaxResident &&
                  plan.shared_bytes <= call.shared_limit;
  if (!plan.resident)
    plan.shared_bytes = plan.tiles == 1   ? shared_bytes<kW, 1, false>(plan)
                        : plan.tiles == 2 ? shared_bytes<kW, 2, false>(plan)
                        : plan.tiles == 4 ? shared_bytes<kW, 4, false>(plan)
                                          : shared_bytes<kW, 8, false>(plan);
  plan.prepare = !plan.resident && (l.norm_weight || call.branch || l.inputs % 8);
  return plan;
}

template <class T, DType kW>
void run(const CudaLinearParams& call, void* stream) {
  const Plan plan = plan_of<kW>(call);
  DeviceParams p{call, static_cast<float*>(call.workspace), nullptr, plan.stages, plan.weight_blocks, plan.padded_inputs};
  if (plan.prepare) {
    p.prepared = static_cast<char*>(call.workspace) + plan.partial_bytes();
    launch(prepare<T>, "skinny_linear's LayerNorm", dim3(static_cast<unsigned>(plan.rows)), dim3(kThreads),
           static_cast<size_t>(kSums * 4 + plan.padded_inputs * 2), stream, call.dependent_launch, p);
  }
  void (*kernel)(DeviceParams) = plan.resident     ? linear<T, kW, 1, true>
                                 : plan.tiles == 1 ? linear<T, kW, 1, false>
                                 : plan.tiles == 2 ? linear<T, kW, 2, false>
                                 : plan.tiles == 4 ? linear<T, kW, 4, false>
                                                   : linear<T, kW, 8, false>;
  launch(kernel, "skinny_linear", dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads),
         static_cast<size_t>(plan.shared_bytes), stream, call.dependent_launch, p);
}

}  // namespace skinny

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
