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
// last one to arrive joins what they left in memory.
#include "common.cuh"

namespace dalle_fast {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kKeys = 64, kStages = 2;  // of the prefix: keys a stage, stages
constexpr float kLog2E = 1.4426950408889634f;

template <class T, int D, int Rows>
struct Kernel {
  static constexpr int kRowWarps = Rows / 16, kKeyWarps = kWarps / kRowWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;           // of a stage, for one warp
  static constexpr int kWarpRows = Rows / kWarps;               // whose tails a warp reads
  static constexpr int kLanes = D / 8, kAtOnce = 32 / kLanes;   // lanes that share a key, 16 bytes each; keys read at once
  static constexpr int kChunk = 1024 / D;               // keys of a tail at a time: 4 KiB with their values
  static constexpr int kRing = D == 64 ? 4 : 2;         // chunks under way: two blocks of 113 KiB fit an H100's multiprocessor
  static constexpr int kSlot = (2 * kChunk + 1) * D;    // elements: keys, values, query
  static constexpr int kStage = 2 * kKeys * D;          // elements: keys, values
  static constexpr int kStates = kWarps * 16;           // partial states of the prefix: kKeyWarps for each row
  static constexpr int kSharedBytes =
      kStages * kStage * 2 + kWarps * kRing * kSlot * 2 + 2 * 4 * (kStates + Rows) + 16;
  static_assert(kStages * kStage * 2 >= 4 * D * (kStates + Rows), "the sums take the place of the prefix");
  struct Place {  // of a row
    int64_t at;   // [batch, heads, n]
    int candidate, query;
    bool valid;
  };
  static __device__ __forceinline__ Place place(const DecodeAttentionParams& p, int row) {
    const int group = p.batch / p.prompts, tiles = (group * p.cells_now + Rows - 1) / Rows;
    const int prompt = blockIdx.x / tiles, in_prompt = blockIdx.x % tiles * Rows + row;
    Place r;
    r.valid = in_prompt < group * p.cells_now;
    r.candidate = prompt * group + (r.valid ? in_prompt / p.cells_now : 0);
    r.query = r.valid ? in_prompt % p.cells_now : 0;
    r.at = (static_cast<int64_t>(r.candidate) * p.heads + blockIdx.y) * p.cells_now + r.query;
    return r;
  }

  static __device__ __forceinline__ void copy(shared<T> to, const void* from, int64_t at, bool exists) {  // or zeros
    cp_async<16>(shared_cast<unsigned char>(to), static_cast<const T*>(from) + at, exists ? 16 : 0);
  }
  // Copies a stage of the prefix's keys and values; 16 bytes c of key j lie at c ^ (j % 8), so that ldmatrix meets no conflict.
  static __device__ __forceinline__ void copy_prefix(const DecodeAttentionParams& p, int prompt, int block, shared<T> stage) {
    const int64_t head = (static_cast<int64_t>(prompt) * p.heads + blockIdx.y) * p.prefix_len * D;
#pragma unroll
    for (int i = threadIdx.x; i < kKeys * kLanes; i += kThreads) {
      const int key = i / kLanes, part = i % kLanes, from = block * kKeys + key;
      const bool exists = from < p.prefix_len;
      const int64_t at = head + (exists ? from : 0) * static_cast<int64_t>(D) + part * 8;
      const int to = key * D + (part ^ key % 8) * 8;
      copy(stage + to, p.prefix_k, at, exists);
      copy(stage + (kKeys * D + to), p.prefix_v, at, exists);
    }
  }

  // (top, total, sum) of 16 rows and this warp's keys of one stage: top in log2, sum not divided by total.
  static __device__ __forceinline__ void multiply(const shared<T> stage, int first_key, int keys, float scale,
                                                  const uint32_t (&q)[D / 16][4], float (&top)[2], float (&total)[2],
                                                  float (&sum)[D / 8][4]) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    float s[kWarpKeys / 8][4];
#pragma unroll
    for (int j = 0; j < kWarpKeys / 16; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[2 * j][e] = s[2 * j + 1][e] = 0;
      const int key = first_key + 16 * j + matrix / 2 * 8 + lane % 8;
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t k[4];
        ldmatrix(k, stage + (key * D + ((2 * d + matrix % 2) ^ key % 8) * 8));
        const uint32_t low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
        mma_m16n8k16<T>(s[2 * j], q[d], low);
        mma_m16n8k16<T>(s[2 * j + 1], q[d], high);
      }
    }
    float most[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = first_key + 8 * j + lane % 4 * 2 + e % 2;
        s[j][e] = key < keys ? s[j][e] * scale : -INFINITY;
        most[e / 2] = fmaxf(most[e / 2], s[j][e]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = warp_max<4>(most[half]);
      const float base = most[half] == -INFINITY ? 0.f : most[half];  // no key so far: nothing minus nothing would be NaN
      const float shrink = exp2f(top[half] - base);
      top[half] = most[half], total[half] *= shrink;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) sum[d][2 * half] *= shrink, sum[d][2 * half + 1] *= shrink;
#pragma unroll
      for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) total[half] += s[j][e] = exp2f(s[j][e] - base);
    }
#pragma unroll
    for (int j = 0; j < kWarpKeys / 16; ++j) {
      uint32_t weights[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) weights[r] = pack<T>(s[2 * j + r / 2][r % 2 * 2], s[2 * j + r / 2][r % 2 * 2 + 1]);
      const int key = first_key + 16 * j + matrix % 2 * 8 + lane % 8;
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t v[4];
        ldmatrix<true>(v, stage + (kKeys * D + key * D + ((2 * d + matrix / 2) ^ key % 8) * 8));
        const uint32_t low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
        mma_m16n8k16<T>(sum[2 * d], weights, low);
        mma_m16n8k16<T>(sum[2 * d + 1], weights, high);
      }
    }
  }

  // A warp's way through the chunks of its rows' tails that this block takes.
  struct Cursor {
    int row, chunk, count, cell;
    Place place;
    __device__ __forceinline__ void find(const DecodeAttentionParams& p, int end, int first) {
      for (; row < end; ++row, chunk = blockIdx.z) {
        place = Kernel::place(p, row);
        cell = min(first + place.query, p.cells - 1);
        count = place.valid ? load(p.neighbour_count + cell) : 0;
        if (chunk * kChunk < count) return;
      }
    }
  };
  // Copies one chunk; neighbours hold cell | slot << 16.
  static __device__ __forceinline__ void copy_tail(const DecodeAttentionParams& p, const Cursor& c, int first, shared<T> slot) {
    const int lane = threadIdx.x % 32, part = lane % kLanes * 8;
    const int64_t tail = (static_cast<int64_t>(c.place.candidate) * p.heads + blockIdx.y) * p.slots * D;
    const int64_t input = (c.place.at - c.place.query) * D;
    int entry = 0;
    if (lane < kChunk && c.chunk * kChunk + lane < c.count)
      entry = load(p.neighbour_slots + static_cast<int64_t>(c.cell) * p.max_neighbours + c.chunk * kChunk + lane);
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kLanes, from = __shfl_sync(kFullWarp, entry, key);
      const bool exists = c.chunk * kChunk + key < c.count;
      const int cell = from & 0xFFFF;
      const bool fresh = exists && cell >= first;
      const int64_t at = fresh ? input + static_cast<int64_t>(cell - first) * D : tail + static_cast<int64_t>(from >> 16) * D;
      copy(slot + (key * D + part), fresh ? p.k : p.tail_k, at + part, exists);
      copy(slot + ((kChunk + key) * D + part), fresh ? p.v : p.tail_v, at + part, exists);
    }
    if (lane < kLanes) copy(slot + (2 * kChunk * D + part), p.q, c.place.at * D + part, true);
  }

  static __device__ __forceinline__ void widen(const uint4 words, float (&x)[8]) {
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y, x[4] = c.x, x[5] = c.y, x[6] = d.x, x[7] = d.y;
  }
  // One chunk joins a row's (top, total, sum); a lane holds 8 channels of the keys it reads.
  static __device__ __forceinline__ void attend_tail(shared<T> slot, int left, float scale, float& top, float& total,
                                                     float (&sum)[8]) {
    const int lane = threadIdx.x % 32, part = lane % kLanes * 8;
    float q[8], x[8], s[kChunk / kAtOnce], most = top;
    widen(*shared_cast<const uint4>(slot + (2 * kChunk * D + part)), q);
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kLanes;
      widen(*shared_cast<const uint4>(slot + (key * D + part)), x);
      float dot = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) dot += q[e] * x[e];
      dot = warp_sum<kLanes>(dot);
      s[i] = key < left ? dot * scale : -INFINITY;
      most = fmaxf(most, s[i]);
    }
#pragma unroll
    for (int bit = kLanes; bit < 32; bit *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, bit));
    const float shrink = exp2f(top - most);  // a chunk has a key at least: most is finite
    top = most, total *= shrink;
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] *= shrink;
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const float weight = exp2f(s[i] - most);
      widen(*shared_cast<const uint4>(slot + ((kChunk + i * kAtOnce + lane / kLanes) * D + part)), x);
      total += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += weight * x[e];
    }
  }
};

// grid (tiles of Rows rows · prompts, heads, splits). partial [blocks, Rows, D + 2] float32; arrived [blocks / splits].
template <class T, int D, int Rows>
__global__ void __launch_bounds__(kThreads)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p, float* partial, int32_t* arrived) {
  using K = Kernel<T, D, Rows>;
  shared<unsigned char> memory = dynamic_shared();
  const shared<T> stages = carve<T>(memory, kStages * K::kStage), rings = carve<T>(memory, kWarps * K::kRing * K::kSlot);
  const shared<float> tops = carve<float>(memory, K::kStates + Rows), totals = carve<float>(memory, K::kStates + Rows);
  const shared<int> ticket = carve<int>(memory, 4);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.z, splits = gridDim.z;
  wait_for_previous_kernel();
  start_next_kernel();
  const int first = max(0, static_cast<int>(load(p.position)));
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
      store(reinterpret_cast<uint4*>(static_cast<T*>(p.tail_k) + to), k);
      store(reinterpret_cast<uint4*>(static_cast<T*>(p.tail_v) + to), v);
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
      K::attend_tail(ring + item % K::kRing * K::kSlot, left, p.scale * kLog2E, tail_top, tail_total, tail_sum);
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
  const auto at_of = [&](int s, int row) { return partial + ((program * splits + s) * Rows + row) * (D + 2); };
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
  if (threadIdx.x == 0) ticket[0] = atomicAdd(arrived + program, 1);
  __syncthreads();
  if (ticket[0] != splits - 1) return;
  __threadfence();
  if (threadIdx.x == 0) store(arrived + program, 0);  // for the next launch
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

template <class T, int D, int Rows>
void launch_tile(const CudaDecodeParams& c, void* stream) {
  const DecodeAttentionParams& p = c.call;
  const int tiles = (p.batch / p.prompts * p.cells_now + Rows - 1) / Rows;
  const dim3 grid(static_cast<unsigned>(tiles * p.prompts), static_cast<unsigned>(p.heads), static_cast<unsigned>(c.splits));
  launch(decode_attention_kernel<T, D, Rows>, "decode_attention", grid, kThreads, Kernel<T, D, Rows>::kSharedBytes, stream,
         c.dependent_launch, p, c.partial, c.arrived);
}
template <class T>
void launch_type(const CudaDecodeParams& c, void* stream) {
  if (c.call.dim == 64) return c.rows == 64 ? launch_tile<T, 64, 64>(c, stream) : launch_tile<T, 64, 16>(c, stream);
  return c.rows == 64 ? launch_tile<T, 128, 64>(c, stream) : launch_tile<T, 128, 16>(c, stream);
}

}  // namespace

void launch_decode_attention(const CudaDecodeParams& c, void* stream) {
  if ((c.call.dim != 64 && c.call.dim != 128) || (c.rows != 16 && c.rows != 64))
    throw std::runtime_error("decode_attention: got head dim " + std::to_string(c.call.dim) + " and tiles of " +
                             std::to_string(c.rows) + " rows, expected 64 or 128, and 16 or 64");
  if (c.call.dtype == DType::bfloat16) launch_type<__nv_bfloat16>(c, stream);
  else if (c.call.dtype == DType::float16) launch_type<__half>(c, stream);
  else throw std::runtime_error("decode_attention: got a type other than bfloat16 and float16");
}

}  // namespace dalle_fast
