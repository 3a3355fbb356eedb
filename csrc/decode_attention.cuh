// The parts of decode_attention.cu's kernel: which rows a block takes, how prefix and tails reach shared memory, and how a stage
// of the prefix and a chunk of a tail join the online softmax.
#pragma once

#include "common.cuh"
#include "e4m3.cuh"

namespace dalle_fast {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

template <class T, int D, int Rows, bool Fp8>
struct Kernel {
  // Few rows mean few blocks, and then more warps to wait for memory; only four of them multiply the prefix.
  static constexpr int kWarps = Rows == 16 ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kRowWarps = Rows / 16, kKeyWarps = 4 / kRowWarps;
  // Of the prefix: keys a stage, stages. Fewer keys where a warp has all of a stage and twice the channels: registers run out.
  static constexpr int kKeys = D == 128 && Rows == 64 ? 32 : 64, kStages = 128 / kKeys;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;           // of a stage, for one warp
  static constexpr int kLanes = D / 8, kAtOnce = 32 / kLanes;   // lanes that share a key, 16 bytes each; keys read at once
  static constexpr int kChunk = 1024 / D;               // keys of a tail at a time, 16 or 8: 4 KiB with their values
  static constexpr int kRing = D == 64 && Rows == 64 ? 4 : 2;  // chunks under way
  static constexpr int kPerLoad = 16 / kChunk;          // steps of 16 channels that an ldmatrix of a chunk reads
  static constexpr int kFlags = (2 * kChunk + 1) * D;   // elements of a slot before the word that says which keys are no codes
  static constexpr int kSlot = kFlags + (Fp8 ? 8 : 0);  // keys, values, query
  static constexpr int kStage = 2 * kKeys * D;          // elements: keys, values
  static constexpr int kStates = kKeyWarps * Rows;      // partial states of the prefix
  static constexpr int kSharedBytes =
      kStages * kStage * 2 + kWarps * kRing * kSlot * 2 + 2 * 4 * (kStates + Rows) + 16;  // and the list of neighbours
  static constexpr int kBlocksAtOnce = kSharedBytes <= 112 * 1024 ? 2 : 1;  // that fit an H100's multiprocessor
  static_assert(kStages * kStage * 2 >= 4 * D * (kStates + Rows), "the sums take the place of the prefix");
  struct Place {          // of a row
    int64_t at, from;     // its channels in the output, and in q, k and v
    int candidate, query;
    bool valid;
  };
  // The rows of a block: consecutive ones of a prompt.
  struct Tile {
    const CudaDecodeParams& c;
    int prompt, base, rows, candidates, n;
    __device__ __forceinline__ explicit Tile(const CudaDecodeParams& params) : c(params), n(params.call.cells_now) {
      candidates = c.call.batch / c.call.prompts, rows = candidates * n;
      const int tiles = (rows + Rows - 1) / Rows;
      prompt = blockIdx.x / tiles, base = blockIdx.x % tiles * Rows;
    }
    __device__ __forceinline__ Place operator[](int row) const {
      Place r;
      const int at = base + row;
      r.valid = at < rows;
      r.candidate = r.valid ? n == 1 ? at : at / n : 0;
      r.query = r.valid && n != 1 ? at - r.candidate * n : 0;
      r.candidate += prompt * candidates;
      r.at = ((static_cast<int64_t>(r.candidate) * c.call.heads + blockIdx.y) * n + r.query) * D;
      r.from = r.candidate * c.candidate_stride + blockIdx.y * c.head_stride + r.query * c.cell_stride;
      return r;
    }
  };

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

  // Stages begin to end of a head's keys or values into the second-level cache.
  static __device__ __forceinline__ void prefetch(const void* from, const DecodeAttentionParams& p, int prompt, int begin, int end) {
    const int64_t head = (static_cast<int64_t>(prompt) * p.heads + blockIdx.y) * p.prefix_len;
    const int keys = min(end * kKeys, p.prefix_len) - begin * kKeys;
    prefetch_to_l2(static_cast<const T*>(from) + (head + begin * kKeys) * D, keys * D * static_cast<int>(sizeof(T)));
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

  // A warp's way through the chunks of its rows' tails that this block takes: of every kWarps-th row.
  struct Cursor {
    int row, chunk, count, cell;
    Place place;
    __device__ __forceinline__ void find(const DecodeAttentionParams& p, const Tile& tile, int first, int only_count) {
      for (; row < Rows; row += kWarps, chunk = blockIdx.z) {
        place = tile[row];
        cell = min(first + place.query, p.cells - 1);
        count = !place.valid ? 0 : tile.n == 1 ? only_count : load(p.neighbour_count + cell);
        if (chunk * kChunk < count) return;
      }
    }
  };
  static __device__ __forceinline__ void copy_codes(shared<T> row, int part, const void* from, int64_t at, bool exists) {
    cp_async<8>(shared_cast<unsigned char>(row) + part, static_cast<const unsigned char*>(from) + at, exists ? 8 : 0);
  }
  // Copies one chunk, zeros where it has no more keys; neighbours hold cell | slot << 16, `near` is the list of them. The
  // first chunk of a row brings its query. Codes take the first half of a row of the slot; keys and values that are no codes lie
  // as those of the prefix do.
  static __device__ __forceinline__ void copy_tail(const CudaDecodeParams& c, const Cursor& at, int first,
                                                   shared<const int> near, shared<T> slot) {
    const DecodeAttentionParams& p = c.call;
    const int lane = threadIdx.x % 32, part = lane % kLanes, start = at.chunk * kChunk, left = at.count - start;
    const int64_t tail = (static_cast<int64_t>(at.place.candidate) * p.heads + blockIdx.y) * p.slots * D + part * 8;
    const int64_t input = at.place.from - at.place.query * c.cell_stride + part * 8;
    const T *tail_k = static_cast<const T*>(p.tail_k) + tail, *tail_v = static_cast<const T*>(p.tail_v) + tail;
    const T *input_k = static_cast<const T*>(p.k) + input, *input_v = static_cast<const T*>(p.v) + input;
    int offset = 0;  // of the lane's key in its tail, or below zero in the input
    if (lane < kChunk && lane < left) {
      int entry;
      if (p.cells_now == 1) entry = near[start + lane];
      else entry = load(p.neighbour_slots + static_cast<int64_t>(at.cell) * p.max_neighbours + start + lane);
      const int ahead = (entry & 0xFFFF) - first;
      offset = ahead < 0 ? (entry >> 16) * D : ~(ahead * static_cast<int>(c.cell_stride));
    }
    if constexpr (Fp8) {
      const unsigned flags = __ballot_sync(kFullWarp, offset < 0);
      if (lane == 0) shared_cast<unsigned>(slot + kFlags)[0] = flags;
    }
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kLanes, found = __shfl_sync(kFullWarp, offset, key);
      const bool exists = key < left, fresh = found < 0;
      if (Fp8 && !fresh) {
        copy_codes(slot + key * D, part * 8, p.tail_k, tail + found, exists);
        copy_codes(slot + (kChunk + key) * D, part * 8, p.tail_v, tail + found, exists);
        continue;
      }
      const int from = fresh ? ~found : found, to = key * D + (Fp8 ? part : part ^ key % 8) * 8;
      copy(slot + to, fresh ? input_k : tail_k, from, exists);
      copy(slot + (kChunk * D + to), fresh ? input_v : tail_v, from, exists);
    }
    if ((Fp8 || at.chunk == static_cast<int>(blockIdx.z)) && lane < kLanes)
      copy(slot + (2 * kChunk * D + part * 8), p.q, at.place.from + part * 8, true);
  }

  static __device__ __forceinline__ void widen(const uint4 words, float (&x)[8]) {
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y, x[4] = c.x, x[5] = c.y, x[6] = d.x, x[7] = d.y;
  }
  static __device__ __forceinline__ uint2 narrow(const uint4 words, float scale) {  // to codes
    float x[8];
    widen(words, x);
    return make_uint2(to_e4m3(x[0] / scale, x[1] / scale, x[2] / scale, x[3] / scale),
                      to_e4m3(x[4] / scale, x[5] / scale, x[6] / scale, x[7] / scale));
  }
  // 8 channels of a row of a slot; of codes what they stand for without their scale.
  static __device__ __forceinline__ void read(shared<T> row, int part, bool codes, float (&x)[8]) {
    if (codes) {
      const uint2 words = *shared_cast<const uint2>(shared_cast<unsigned char>(row) + part);
      from_e4m3(words.x, x), from_e4m3(words.y, x + 4);
    } else {
      widen(*shared_cast<const uint4>(row + part), x);
    }
  }
  // (top, total, sum) of one row over its tail. Few keys are no work for tensor cores, but the fewest instructions: the query is
  // all 16 rows of the product, and two of a lane's four sums are the other two again.
  struct Tail {
    float top = -INFINITY, total = 0, sum[D / 8][4] = {};
    uint32_t q[D / 16][2];

    __device__ __forceinline__ void start(const shared<T> slot) {
      const shared<const uint32_t> from = shared_cast<const uint32_t>(slot + 2 * kChunk * D);
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half) q[d][half] = from[8 * d + 4 * half + threadIdx.x % 4];
    }
    __device__ __forceinline__ void join(const shared<T> slot, int left, float scale, float2) {
      const int lane = threadIdx.x % 32, matrix = lane / 8;
      float s[kChunk / 8][4] = {}, most = top;
#pragma unroll
      for (int d = 0; d < D / 16; d += kPerLoad) {  // 16 keys of 16 channels at a time, or 8 of 32
        const int key = (kChunk == 16 ? matrix / 2 * 8 : 0) + lane % 8, part = 2 * d + (kChunk == 16 ? matrix % 2 : matrix);
        uint32_t k[4];
        ldmatrix(k, slot + (key * D + (part ^ key % 8) * 8));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int of = kChunk == 16 ? d : d + i;
          mma_m16n8k16<T>(s[kChunk == 16 ? i : 0], {q[of][0], q[of][0], q[of][1], q[of][1]}, {k[2 * i], k[2 * i + 1]});
        }
      }
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[j][e] = 8 * j + lane % 4 * 2 + e < left ? s[j][e] * scale : -INFINITY;
          most = fmaxf(most, s[j][e]);
        }
      most = warp_max<4>(most);
      const float shrink = exp2f(top - most);  // a chunk has a key at least: most is finite
      top = most, total *= shrink;
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[d][e] *= shrink;
      uint32_t weights[2] = {};
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const float low = exp2f(s[j][0] - most), high = exp2f(s[j][1] - most);
        total += low + high, weights[j] = pack<T>(low, high);
      }
#pragma unroll
      for (int d = 0; d < D / 16; d += kPerLoad) {
        const int key = (kChunk == 16 ? matrix % 2 * 8 : 0) + lane % 8, part = 2 * d + (kChunk == 16 ? matrix / 2 : matrix);
        uint32_t v[4];
        ldmatrix<true>(v, slot + (kChunk * D + key * D + (part ^ key % 8) * 8));
#pragma unroll
        for (int i = 0; i < 2 * kPerLoad; ++i) {
          const uint32_t low = kChunk == 16 ? v[2 * i] : v[i], high = kChunk == 16 ? v[2 * i + 1] : 0;
          mma_m16n8k16<T>(sum[2 * d + i], {weights[0], weights[0], weights[1], weights[1]}, {low, high});
        }
      }
    }
    // To the states in shared memory.
    __device__ __forceinline__ void finish(shared<float> its_top, shared<float> its_total, shared<float> to) {
      const int lane = threadIdx.x % 32;
      total = warp_sum<4>(total);
      if (lane == 0) *its_top = top, *its_total = total;
      if (lane >= 4) return;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) shared_cast<float2>(to)[4 * d + lane] = make_float2(sum[d][0], sum[d][1]);
    }
  };

  // The same where keys may be codes, each with its scale: a lane holds 8 channels of the keys that it reads.
  struct TailOfCodes {
    float top = -INFINITY, total = 0, sum[8] = {};

    __device__ __forceinline__ void start(const shared<T>) {}
    __device__ __forceinline__ void join(const shared<T> slot, int left, float scale, float2 scales) {
      const int lane = threadIdx.x % 32, part = lane % kLanes * 8;
      const unsigned fresh = shared_cast<const unsigned>(slot + kFlags)[0];
      float q[8], x[8], s[kChunk / kAtOnce], most = top;
      widen(*shared_cast<const uint4>(slot + (2 * kChunk * D + part)), q);
#pragma unroll
      for (int i = 0; i < kChunk / kAtOnce; ++i) {
        const int key = i * kAtOnce + lane / kLanes;
        const bool codes = !(fresh >> key & 1);
        read(slot + key * D, part, codes, x);
        float dot = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) dot += q[e] * x[e];
        dot = warp_sum<kLanes>(dot);
        if (codes) dot *= scales.x;
        s[i] = key < left ? dot * scale : -INFINITY;
        most = fmaxf(most, s[i]);
      }
#pragma unroll
      for (int bit = kLanes; bit < 32; bit *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, bit));
      const float shrink = exp2f(top - most);
      top = most, total *= shrink;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] *= shrink;
#pragma unroll
      for (int i = 0; i < kChunk / kAtOnce; ++i) {
        const int key = i * kAtOnce + lane / kLanes;
        const bool codes = !(fresh >> key & 1);
        float weight = exp2f(s[i] - most);
        read(slot + (kChunk + key) * D, part, codes, x);
        total += weight;
        if (codes) weight *= scales.y;
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += weight * x[e];
      }
    }
    __device__ __forceinline__ void finish(shared<float> its_top, shared<float> its_total, shared<float> to) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int bit = kLanes; bit < 32; bit *= 2) {
        total += __shfl_xor_sync(kFullWarp, total, bit);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], bit);
      }
      if (lane == 0) *its_top = top, *its_total = total;
      if (lane >= kLanes) return;
      const shared<float4> half = shared_cast<float4>(to + lane * 8);
      half[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      half[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
  };
};

}  // namespace
}  // namespace dalle_fast
