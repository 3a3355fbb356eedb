// One decoding step, one launch: appends n keys and values to each candidate's tail and attends to prefix and tail.
//
//   out = softmax(q [prefix_k | tail_k]^T scale) [prefix_v | tail_v]
//
// A block takes one head and Rows rows of one prompt, a row being one query of one candidate, so that the prefix is read once
// for all of them and multiplied by tensor cores with the rows as M (Juravsky et al. 2024, arXiv 2402.05099). The tails differ
// by row: each warp copies those of its rows, a chunk of keys at a time, into its own ring in shared memory, starting before
// the prefix is multiplied. Prefix and tail give (top, total, sum) each, joined as online softmax joins blocks of keys.
// Keys of the cells being appended come from the input, never from the tail, so no block waits for another's write; a ring of
// reach + n slots guarantees that no write hits a slot still read. Few rows: Splits blocks share prefix and tail out, and the
// last one to arrive joins what they left in memory. Tails may hold e4m3 codes, a value being code x scale of its head.
#include "decode_attention.cuh"

namespace dalle_fast {
namespace {

// grid (tiles of Rows rows · prompts, heads, splits). partial [blocks, Rows, D + 2] float32; arrived [blocks / splits].
template <class T, int D, int Rows, bool Fp8>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const __grid_constant__ CudaDecodeParams c) {
  using K = Kernel<T, D, Rows, Fp8>;
  const DecodeAttentionParams& p = c.call;
  shared<unsigned char> memory = dynamic_shared();
  const shared<T> stages = carve<T>(memory, kStages * K::kStage), rings = carve<T>(memory, kWarps * K::kRing * K::kSlot);
  const shared<float> tops = carve<float>(memory, K::kStates + Rows), totals = carve<float>(memory, K::kStates + Rows);
  const shared<int> ticket = carve<int>(memory, 4);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.z, splits = gridDim.z;
  wait_for_previous_kernel();
  start_next_kernel();
  const int first = max(0, static_cast<int>(load(p.position)));
  float2 scales = make_float2(1, 1);  // of codes
  if constexpr (Fp8) scales = make_float2(load(c.scale_k + blockIdx.y), load(c.scale_v + blockIdx.y));
  const int prompt = K::place(p, 0).candidate / (p.batch / p.prompts);
  const int blocks = (p.prefix_len + kKeys - 1) / kKeys, per_split = (blocks + splits - 1) / splits;
  const int begin = split * per_split, end = min(begin + per_split, blocks);
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (begin + i < end) K::copy_prefix(p, prompt, begin + i, stages + i * K::kStage);
    cp_async_commit();
  }
  const shared<T> ring = rings + warp * K::kRing * K::kSlot;
  const int last_row = (warp + 1) * K::kWarpRows;
  typename K::Cursor ahead{warp * K::kWarpRows, split, 0, 0, {}}, here = ahead;
  ahead.find(p, last_row, first);
  auto copy_next = [&](int slot) {
    if (ahead.row < last_row) {
      K::copy_tail(p, ahead, first, ring + slot * K::kSlot);
      ahead.chunk += splits;
      ahead.find(p, last_row, first);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < K::kRing; ++i) copy_next(i);

  if (split == 0)  // append
    for (int i = threadIdx.x; i < Rows * K::kLanes; i += kThreads) {
      const auto row = K::place(p, i / K::kLanes);
      if (!row.valid) continue;
      const int slot = load(p.slot_of_cell + min(first + row.query, p.cells - 1)), part = i % K::kLanes * 8;
      const int64_t from = row.at * D + part;
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
    const auto row = K::place(p, row_warp * 16 + half * 8 + lane / 4);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.q) + row.at * D) + lane % 4;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) q[d][half] = load(from + 8 * d), q[d][half + 2] = load(from + 8 * d + 4);
  }
  for (int block = begin; block < end; ++block) {
    // Copies complete in order: until the second stage is multiplied, the tails may still be under way.
    if (block < begin + kStages) cp_async_wait<K::kRing + kStages - 1>();
    else cp_async_wait<kStages - 1>();
    __syncthreads();
    const shared<T> stage = stages + (block - begin) % kStages * K::kStage;
    K::multiply(stage, key_warp * K::kWarpKeys, p.prefix_len - block * kKeys, p.scale * kLog2E, q, top, total, sum);
    __syncthreads();
    if (block + kStages < end) K::copy_prefix(p, prompt, block + kStages, stage);
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages become sums [states + rows, D]: of the prefix by key warp and row, then of the tails
  const shared<float> sums = shared_cast<float>(stages);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int state = (key_warp * K::kRowWarps + row_warp) * 16 + half * 8 + lane / 4;
    total[half] = warp_sum<4>(total[half]);
    if (lane % 4 == 0) tops[state] = top[half], totals[state] = total[half];
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      shared_cast<float2>(sums)[(state * D + 8 * d + lane % 4 * 2) / 2] = make_float2(sum[d][2 * half], sum[d][2 * half + 1]);
  }

  // The tails: this warp's rows one after the other.
  if (lane < K::kWarpRows) tops[K::kStates + warp * K::kWarpRows + lane] = -INFINITY;
  here.find(p, last_row, first);
  for (int item = 0; here.row < last_row;) {
    float tail_top = -INFINITY, tail_total = 0, tail_sum[8] = {};
    const int row = here.row;
    do {
      cp_async_wait<K::kRing - 1>();
      __syncwarp();
      const int left = here.count - here.chunk * K::kChunk;
      K::attend_tail(ring + item % K::kRing * K::kSlot, left, p.scale * kLog2E, scales, tail_top, tail_total, tail_sum);
      __syncwarp();
      copy_next(item++ % K::kRing);
      here.chunk += splits;
      here.find(p, last_row, first);
    } while (here.row == row);
#pragma unroll
    for (int bit = K::kLanes; bit < 32; bit *= 2) {
      tail_total += __shfl_xor_sync(kFullWarp, tail_total, bit);
#pragma unroll
      for (int e = 0; e < 8; ++e) tail_sum[e] += __shfl_xor_sync(kFullWarp, tail_sum[e], bit);
    }
    const int state = K::kStates + row;
    if (lane == 0) tops[state] = tail_top, totals[state] = tail_total;
    if (lane < K::kLanes) {
      const shared<float4> to = shared_cast<float4>(sums) + (state * D + lane * 8) / 4;
      to[0] = make_float4(tail_sum[0], tail_sum[1], tail_sum[2], tail_sum[3]);
      to[1] = make_float4(tail_sum[4], tail_sum[5], tail_sum[6], tail_sum[7]);
    }
  }
  __syncthreads();

  // Join the states of each row; if the work is split, first here and then, by the last block, over the splits.
  const int64_t program = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const auto at_of = [&](int s, int row) { return c.partial + ((program * splits + s) * Rows + row) * (D + 2); };
  const auto finish = [&](const typename K::Place& row, int part, float all, const float (&x)[8]) {
    const auto pair = [&](int i) { return pack<T>(x[i] / all, x[i + 1] / all); };
    const uint4 words = make_uint4(pair(0), pair(2), pair(4), pair(6));
    store(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row.at * D + part * 8), words);
  };
  for (int i = threadIdx.x; i < Rows * K::kLanes; i += kThreads) {
    const int row = i / K::kLanes, part = i % K::kLanes;
    const auto place = K::place(p, row);
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
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ticket[0] = atomicAdd(c.arrived + program, 1);
  __syncthreads();
  if (ticket[0] != splits - 1) return;
  __threadfence();
  if (threadIdx.x == 0) store(c.arrived + program, 0);  // for the next launch
  for (int i = threadIdx.x; i < Rows * K::kLanes; i += kThreads) {
    const int row = i / K::kLanes, part = i % K::kLanes;
    const auto place = K::place(p, row);
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
  launch(decode_attention_kernel<T, D, Rows, Fp8>, "decode_attention", grid, kThreads, Kernel<T, D, Rows, Fp8>::kSharedBytes,
         stream, c.dependent_launch, c);
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
