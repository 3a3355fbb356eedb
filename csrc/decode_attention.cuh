// The parts of decode_attention.cu's kernel: which rows a block takes, how prefix and tails reach shared memory, and how a stage
// of the prefix and a chunk of a tail join the online softmax.
#pragma once

#include "common.cuh"
#include "e4m3.cuh"

namespace dalle_fast {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kKeys = 64, kStages = 2;  // of the prefix: keys a stage, stages
constexpr float kLog2E = 1.4426950408889634f;

template <class T, int D, int Rows, bool Fp8>
struct Kernel {
  static constexpr int kRowWarps = Rows / 16, kKeyWarps = kWarps / kRowWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;           // of a stage, for one warp
  static constexpr int kWarpRows = Rows / kWarps;               // whose tails a warp reads
  static constexpr int kLanes = D / 8, kAtOnce = 32 / kLanes;   // lanes that share a key, 16 bytes each; keys read at once
  static constexpr int kChunk = 1024 / D;               // keys of a tail at a time: 4 KiB with their values
  static constexpr int kRing = D == 64 ? 4 : 2;         // chunks under way: two blocks of 113 KiB fit an H100's multiprocessor
  static constexpr int kFlags = (2 * kChunk + 1) * D;   // elements of a slot before the word that says which keys are no codes
  static constexpr int kSlot = kFlags + (Fp8 ? 8 : 0);  // keys, values, query
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
  static __device__ __forceinline__ void copy_codes(shared<T> row, int part, const void* from, int64_t at, bool exists) {
    cp_async<8>(shared_cast<unsigned char>(row) + part, static_cast<const unsigned char*>(from) + at, exists ? 8 : 0);
  }
  // Copies one chunk; neighbours hold cell | slot << 16. Codes take the first half of a row of the slot.
  static __device__ __forceinline__ void copy_tail(const DecodeAttentionParams& p, const Cursor& c, int first, shared<T> slot) {
    const int lane = threadIdx.x % 32, part = lane % kLanes * 8;
    const int64_t tail = (static_cast<int64_t>(c.place.candidate) * p.heads + blockIdx.y) * p.slots * D;
    const int64_t input = (c.place.at - c.place.query) * D;
    int entry = 0;
    if (lane < kChunk && c.chunk * kChunk + lane < c.count)
      entry = load(p.neighbour_slots + static_cast<int64_t>(c.cell) * p.max_neighbours + c.chunk * kChunk + lane);
    if constexpr (Fp8) {
      const bool fresh = lane < kChunk && c.chunk * kChunk + lane < c.count && (entry & 0xFFFF) >= first;
      const unsigned flags = __ballot_sync(kFullWarp, fresh);
      if (lane == 0) shared_cast<unsigned>(slot + kFlags)[0] = flags;
    }
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kLanes, from = __shfl_sync(kFullWarp, entry, key);
      const bool exists = c.chunk * kChunk + key < c.count;
      const int cell = from & 0xFFFF;
      const bool fresh = exists && cell >= first;
      if (Fp8 && !fresh) {
        const int64_t at = tail + static_cast<int64_t>(from >> 16) * D + part;
        copy_codes(slot + key * D, part, p.tail_k, at, exists);
        copy_codes(slot + (kChunk + key) * D, part, p.tail_v, at, exists);
        continue;
      }
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
  // One chunk joins a row's (top, total, sum); a lane holds 8 channels of the keys it reads. scales: of codes, keys and values.
  static __device__ __forceinline__ void attend_tail(shared<T> slot, int left, float scale, float2 scales, float& top,
                                                     float& total, float (&sum)[8]) {
    const int lane = threadIdx.x % 32, part = lane % kLanes * 8;
    float q[8], x[8], s[kChunk / kAtOnce], most = top;
    widen(*shared_cast<const uint4>(slot + (2 * kChunk * D + part)), q);
    unsigned fresh = kFullWarp;
    if constexpr (Fp8) fresh = shared_cast<const unsigned>(slot + kFlags)[0];
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kLanes;
      const bool codes = Fp8 && !(fresh >> key & 1);
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
    const float shrink = exp2f(top - most);  // a chunk has a key at least: most is finite
    top = most, total *= shrink;
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] *= shrink;
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const int key = i * kAtOnce + lane / kLanes;
      const bool codes = Fp8 && !(fresh >> key & 1);
      float weight = exp2f(s[i] - most);
      read(slot + (kChunk + key) * D, part, codes, x);
      total += weight;
      if (codes) weight *= scales.y;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += weight * x[e];
    }
  }
};

}  // namespace
}  // namespace dalle_fast
