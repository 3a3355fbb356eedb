// One decoding step, one launch: appends n keys and values to each candidate's tail and attends to prefix and tail.
//
//   out = softmax(q [prefix_k | tail_k]^T scale) [prefix_v | tail_v]
//
// A block takes one head and Rows rows of one prompt, a row being one query of one candidate, so that the prefix is read once
// for all of them and multiplied by tensor cores with the rows as M (Juravsky et al. 2024, arXiv 2402.05099). The tails differ
// by row: each warp copies those of its rows, a chunk of keys at a time, into its own ring in shared memory, starting before
// the prefix is multiplied, and multiplies them by tensor cores too, its one row filling up all 16 of a product: arithmetic is
// plenty, and instructions are few. Prefix and tail give (top, total, sum) each, joined as online softmax joins blocks of keys.
// Keys of the cells being appended come from the input, never from the tail, so no block waits for another's write; a ring of
// reach + n slots guarantees that no write hits a slot still read. Few rows: Splits blocks share prefix and tail out, and the
// last one to arrive joins what they left in memory. Tails may hold e4m3 codes, a value being code x scale of its head.
#include "decode_attention.cuh"

namespace dalle_fast {
namespace {

// grid (tiles of Rows rows · prompts, heads, splits). partial [blocks, Rows, D + 2] float32; arrived [blocks / splits].
template <class T, int D, int Rows, bool Fp8>
__global__ void __launch_bounds__(Kernel<T, D, Rows, Fp8>::kThreads, Kernel<T, D, Rows, Fp8>::kBlocksAtOnce)
    decode_attention_kernel(const __grid_constant__ CudaDecodeParams c) {
  using K = Kernel<T, D, Rows, Fp8>;
  constexpr int kThreads = K::kThreads, kKeys = K::kKeys, kStages = K::kStages;
  const DecodeAttentionParams& p = c.call;
  const typename K::Tile rows(c);
  shared<unsigned char> memory = dynamic_shared();
  const shared<T> stages = carve<T>(memory, kStages * K::kStage), rings = carve<T>(memory, K::kWarps * K::kRing * K::kSlot);
  const shared<float> tops = carve<float>(memory, K::kStates + Rows), totals = carve<float>(memory, K::kStates + Rows);
  const shared<int> ticket = carve<int>(memory, 4), near = carve<int>(memory, p.cells_now == 1 ? p.max_neighbours : 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.z, splits = gridDim.z;
  const int blocks = (p.prefix_len + kKeys - 1) / kKeys, per_split = (blocks + splits - 1) / splits;
  const int begin = split * per_split, end = min(begin + per_split, blocks);
  start_next_kernel();
  if (threadIdx.x < 2 && begin < end) K::prefetch(threadIdx.x ? p.prefix_v : p.prefix_k, p, rows.prompt, begin, end);
  wait_for_previous_kernel();
  const int first = max(0, static_cast<int>(load(p.position)));
  float2 scales = make_float2(1, 1);  // of codes
  if constexpr (Fp8) scales = make_float2(load(c.scale_k + blockIdx.y), load(c.scale_v + blockIdx.y));
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (begin + i < end) K::copy_prefix(p, rows.prompt, begin + i, stages + i * K::kStage);
    cp_async_commit();
  }
  int only_count = 0;  // a single cell's neighbours are read once for all rows
  if (p.cells_now == 1) {
    const int cell = min(first, p.cells - 1);
    only_count = load(p.neighbour_count + cell);
    for (int i = threadIdx.x; i < p.max_neighbours; i += kThreads)
      near[i] = load(p.neighbour_slots + static_cast<int64_t>(cell) * p.max_neighbours + i);
    __syncthreads();
  }
  const shared<T> ring = rings + warp * K::kRing * K::kSlot;
  typename K::Cursor ahead{warp, split, 0, 0, {}}, here = ahead;
  ahead.find(p, rows, first, only_count);
  auto copy_next = [&](int slot) {
    if (ahead.row < Rows) {
      K::copy_tail(c, ahead, first, near, ring + slot * K::kSlot);
      ahead.chunk += splits;
      ahead.find(p, rows, first, only_count);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < K::kRing; ++i) copy_next(i);

  if (split == 0)  // append
    for (int i = threadIdx.x; i < Rows * K::kLanes; i += kThreads) {
      const auto row = rows[i / K::kLanes];
      if (!row.valid) continue;
      const int slot = load(p.slot_of_cell + min(first + row.query, p.cells - 1)), part = i % K::kLanes * 8;
      const int64_t from = row.from + part;
      const int64_t to = ((static_cast<int64_t>(row.candidate) * p.heads + blockIdx.y) * p.slots + slot) * D + part;
      const uint4 k = load(reinterpret_cast<const uint4*>(static_cast<const T*>(p.k) + from));
      const uint4 v = load(reinterpret_cast<const uint4*>(static_cast<const T*>(p.v) + from));
      if constexpr (Fp8) {
        store(reinterpret_cast<uint2*>(static_cast<unsigned char*>(p.tail_k) + to), K::narrow(k, scales.x));
        store(reinterpret_cast<uint2*>(static_cast<unsigned char*>(p.tail_v) + to), K::narrow(v, scales.y));
      } else {
        store(reinterpret_cast<uint4*>(static_cast<T*>(p.tail_k) + to), k);
        store(reinterpret_cast<uint4*>(static_cast<T*>(p.tail_v) + to), v);
      }
    }

  // The prefix: this warp's 16 rows and its keys of each stage.
  const int row_warp = warp % K::kRowWarps, key_warp = warp / K::kRowWarps;
  uint32_t q[D / 16][4];
  float sum[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto row = rows[row_warp * 16 + half * 8 + lane / 4];
    const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.q) + row.from) + lane % 4;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) q[d][half] = load(from + 8 * d), q[d][half + 2] = load(from + 8 * d + 4);
  }
  for (int block = begin; block < end; ++block) {
    // Copies complete in order: until the second stage is multiplied, the tails may still be under way.
    if (block < begin + kStages) cp_async_wait<K::kRing + kStages - 1>();
    else cp_async_wait<kStages - 1>();
    __syncthreads();
    const shared<T> stage = stages + (block - begin) % kStages * K::kStage;
    if (key_warp < K::kKeyWarps)
      K::multiply(stage, key_warp * K::kWarpKeys, p.prefix_len - block * kKeys, p.scale * kLog2E, q, top, total, sum);
    __syncthreads();
    if (block + kStages < end) K::copy_prefix(p, rows.prompt, block + kStages, stage);
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages become sums [states + rows, D]: of the prefix by key warp and row, then of the tails
  const shared<float> sums = shared_cast<float>(stages);
  if (key_warp < K::kKeyWarps) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int state = (key_warp * K::kRowWarps + row_warp) * 16 + half * 8 + lane / 4;
      total[half] = warp_sum<4>(total[half]);
      if (lane % 4 == 0) tops[state] = top[half], totals[state] = total[half];
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        shared_cast<float2>(sums)[(state * D + 8 * d + lane % 4 * 2) / 2] = make_float2(sum[d][2 * half], sum[d][2 * half + 1]);
    }
  }

  // The tails: this warp's rows one after the other.
  if (lane < Rows / K::kWarps) tops[K::kStates + warp + lane * K::kWarps] = -INFINITY;
  __syncwarp();
  here.find(p, rows, first, only_count);
  for (int item = 0; here.row < Rows;) {
    std::conditional_t<Fp8, typename K::TailOfCodes, typename K::Tail> tail;
    const int row = here.row;
    do {
      cp_async_wait<K::kRing - 1>();
      __syncwarp();
      const shared<T> slot = ring + item % K::kRing * K::kSlot;
      if (here.chunk == split) tail.start(slot);
      tail.join(slot, here.count - here.chunk * K::kChunk, p.scale * kLog2E, scales);
      __syncwarp();
      copy_next(item++ % K::kRing);
      here.chunk += splits;
      here.find(p, rows, first, only_count);
    } while (here.row == row);
    const int state = K::kStates + row;
    tail.finish(tops + state, totals + state, sums + state * D);
  }
  __syncthreads();

  // Join the states of each row; if the work is split, first here and then, by the last block, over the splits.
  const int64_t program = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const auto at_of = [&](int s, int row) { return c.partial + ((program * splits + s) * Rows + row) * (D + 2); };
  const auto finish = [&](const typename K::Place& row, int part, float all, const float (&x)[8]) {
    const float share = 1 / all;
    const auto pair = [&](int i) { return pack<T>(x[i] * share, x[i + 1] * share); };
    const uint4 words = make_uint4(pair(0), pair(2), pair(4), pair(6));
    store(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row.at + part * 8), words);
  };
  for (int i = threadIdx.x; i < Rows * K::kLanes; i += kThreads) {
    const int row = i / K::kLanes, part = i % K::kLanes;
    const auto place = rows[row];
    if (!place.valid) continue;
    float most = tops[K::kStates + row], all = 0, x[8] = {};
#pragma unroll
    for (int s = 0; s < K::kKeyWarps; ++s) most = fmaxf(most, tops[s * Rows + row]);
#pragma unroll
    for (int s = 0; s <= K::kKeyWarps; ++s) {
      const int state = s * Rows + row;
      const float state_top = tops[state];
      if (state_top == -INFINITY) continue;
      const float share = exp2f(state_top - most);
      all += share * totals[state];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] += share * sums[state * D + part * 8 + e];
    }
    if (splits == 1) {
      finish(place, part, all, x);
    } else {
      float* to = at_of(split, row);
      if (part == 0) store(to + D, most), store(to + D + 1, all);
#pragma unroll
      for (int e = 0; e < 8; ++e) store(to + part * 8 + e, x[e]);
    }
  }
  if (splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    ticket[0] = atomicAdd(c.arrived + program, 1);
    fence();
  }
  __syncthreads();
  if (ticket[0] != splits - 1) return;
  if (threadIdx.x == 0) store(c.arrived + program, 0);  // for the next launch
  for (int i = threadIdx.x; i < Rows * K::kLanes; i += kThreads) {
    const int row = i / K::kLanes, part = i % K::kLanes;
    const auto place = rows[row];
    if (!place.valid) continue;
    float most = -INFINITY, all = 0, x[8] = {};
    for (int s = 0; s < splits; ++s) most = fmaxf(most, load_from_l2(at_of(s, row) + D));
    for (int s = 0; s < splits; ++s) {
      const float* from = at_of(s, row);
      const float share = exp2f(load_from_l2(from + D) - most);
      all += share * load_from_l2(from + D + 1);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] += share * load_from_l2(from + part * 8 + e);
    }
    finish(place, part, all, x);
  }
}

template <class T, int D, int Rows, bool Fp8>
void launch_tile(const CudaDecodeParams& c, void* stream) {
  const DecodeAttentionParams& p = c.call;
  const int tiles = (p.batch / p.prompts * p.cells_now + Rows - 1) / Rows;
  const dim3 grid(static_cast<unsigned>(tiles * p.prompts), static_cast<unsigned>(p.heads), static_cast<unsigned>(c.splits));
  using K = Kernel<T, D, Rows, Fp8>;
  const int near = p.cells_now == 1 ? (p.max_neighbours + 3) / 4 * 16 : 0;
  launch(decode_attention_kernel<T, D, Rows, Fp8>, "decode_attention", grid, K::kThreads,
         static_cast<size_t>(K::kSharedBytes + near), stream, c.dependent_launch, c);
}
template <class T, bool Fp8>
void launch_type(const CudaDecodeParams& c, void* stream) {
  if (c.call.dim == 64) return c.rows == 64 ? launch_tile<T, 64, 64, Fp8>(c, stream) : launch_tile<T, 64, 16, Fp8>(c, stream);
  return c.rows == 64 ? launch_tile<T, 128, 64, Fp8>(c, stream) : launch_tile<T, 128, 16, Fp8>(c, stream);
}

}  // namespace

void launch_decode_attention(const CudaDecodeParams& c, void* stream) {
  if ((c.call.dim != 64 && c.call.dim != 128) || (c.rows != 16 && c.rows != 64))
    throw std::runtime_error("decode_attention: got head dim " + std::to_string(c.call.dim) + " and tiles of " +
                             std::to_string(c.rows) + " rows, expected 64 or 128, and 16 or 64");
  const bool fp8 = c.scale_k;
  if (c.call.dtype == DType::bfloat16)
    fp8 ? launch_type<__nv_bfloat16, true>(c, stream) : launch_type<__nv_bfloat16, false>(c, stream);
  else if (c.call.dtype == DType::float16) fp8 ? launch_type<__half, true>(c, stream) : launch_type<__half, false>(c, stream);
  else throw std::runtime_error("decode_attention: got a type other than bfloat16 and float16");
}

}  // namespace dalle_fast
