// One token a row: argmax of logit / temperature + Gumbel noise over the top-k tokens, of those over the top-p set. As the end
// of a step also what comes before and after: guidance, tokens that are known, log p, and the row that the next step starts from.
//
// A block holds a row's logits in shared memory. Both cuts are exact and come down to (level, last): a token stays if the
// ordered integer image of its logit lies above the level, or equals it and the token is not after `last`. The level is found
// by radix select over weights: 1 for top-k, the probability in fixed point for top-p, whose sums depend on no order. Noise is
// -log(-log u) with u from Philox4x32-10 (Salmon et al. 2011): token t has word t % 4 of counter (t // 4, position, candidate).
#include "common.cuh"

namespace dalle_fast {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kDigit = 11, kBins = 1 << kDigit, kBinsEach = kBins / kThreads;
constexpr float kOne = 1099511627776.f;  // 2^40: the largest probability in fixed point; 65536 of them fit 64 bits

// Larger float, larger number; -0 and 0 are one, as they compare equal. And back.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

struct Scratch {
  shared<uint32_t> low, high;  // [kBins]: weight of each digit, in two halves
  shared<uint64_t> sums;       // [kWarps + 3]
};

// The largest of all threads' numbers.
__device__ __forceinline__ uint64_t block_max(uint64_t x, const Scratch& s) {
#pragma unroll
  for (int bit = 16; bit; bit /= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, bit));
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint64_t other = s.sums[w];
    x = max(x, other);
  }
  return x;
}

__device__ __forceinline__ uint64_t block_sum(uint64_t x, const Scratch& s) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint64_t part = s.sums[w];
    x += part;
  }
  return x;
}

struct Selected {
  uint32_t level;
  uint64_t above, at;  // weight of what is above the level, and at it
};

// The largest level that items of at least `target` weight reach, 1 <= target <= their sum: digit by digit from the top.
// For each item of this thread, visit calls its argument with (key, weight).
template <class Visit>
__device__ __forceinline__ Selected select(const Scratch& s, uint64_t target, const Visit& visit) {
  Selected found{0, 0, 0};
#pragma unroll 1
  for (int shift = 32 - kDigit; shift > -kDigit; shift -= kDigit) {
    const int move = max(shift, 0), bits = kDigit + min(shift, 0);  // the last digit is short
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) s.low[i * kThreads + threadIdx.x] = 0, s.high[i * kThreads + threadIdx.x] = 0;
    __syncthreads();
    visit([&](uint32_t key, uint64_t weight) {
      if (!weight || (uint64_t{key} ^ found.level) >> (move + bits)) return;
      const int bin = static_cast<int>(key >> move & ((1u << bits) - 1));
      const uint32_t low = static_cast<uint32_t>(weight), old = atomicAdd(s.low + bin, low);
      const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old + low < old ? 1 : 0);
      if (high) atomicAdd(s.high + bin, high);
    });
    __syncthreads();
    uint64_t weight[kBinsEach], mine = 0;  // a thread takes bins from the top down
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      const int bin = kBins - 1 - (static_cast<int>(threadIdx.x) * kBinsEach + i);
      const uint32_t low = s.low[bin], high = s.high[bin];
      mine += weight[i] = uint64_t{high} << 32 | low;
    }
    uint64_t before = mine;  // with those of lower lanes, then of lower warps, then without its own
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const uint64_t lower = __shfl_up_sync(kFullWarp, before, by);
      if (static_cast<int>(threadIdx.x % 32) >= by) before += lower;
    }
    if (threadIdx.x % 32 == 31) s.sums[threadIdx.x / 32] = before;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint64_t lower = s.sums[w];
      if (w < static_cast<int>(threadIdx.x) / 32) before += lower;
    }
    before += found.above - mine;
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      if (before < target && target <= before + weight[i]) {  // in one bin of one thread
        s.sums[kWarps] = kBins - 1 - (static_cast<int>(threadIdx.x) * kBinsEach + i);
        s.sums[kWarps + 1] = before, s.sums[kWarps + 2] = weight[i];
      }
      before += weight[i];
    }
    __syncthreads();
    const uint64_t bin = s.sums[kWarps], above = s.sums[kWarps + 1], at = s.sums[kWarps + 2];
    found = {found.level | static_cast<uint32_t>(bin) << move, above, at};
  }
  return found;
}

// Four words of the stream of (seed, candidate, position).
__device__ __forceinline__ void philox(uint64_t seed, uint64_t candidate, uint32_t position, uint32_t block, uint32_t (&c)[4]) {
  c[0] = block, c[1] = position, c[2] = static_cast<uint32_t>(candidate), c[3] = static_cast<uint32_t>(candidate >> 32);
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a = c[0] * 0xD2511F53u, b = c[2] * 0xCD9E8D57u;
    const uint32_t high_a = __umulhi(c[0], 0xD2511F53u), high_b = __umulhi(c[2], 0xCD9E8D57u);
    c[0] = high_b ^ c[1] ^ key[0], c[1] = b, c[2] = high_a ^ c[3] ^ key[1], c[3] = a;
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
}

// The token of this block's row, of logits in shared memory of which `largest` is the largest: the same in all threads.
__device__ __forceinline__ uint32_t draw(const CudaSampleParams& c, const shared<float>& logits, float largest, uint32_t position,
                                         const Scratch& scratch) {
  const SampleParams& p = c.call;
  // Relative to the largest: neither choice nor probabilities change, and no temperature overflows.
  const auto scaled = [&](float x) { return (x - largest) / p.temperature; };
  const auto mass = [&](float x) { return static_cast<uint64_t>(expf(scaled(x)) * kOne); };
  const auto each = [&](const auto& use) {
    for (int t = threadIdx.x; t < p.vocab; t += kThreads) {
      const float x = logits[t];
      use(t, x, ordered(x));
    }
  };

  uint32_t level = 0;
  int last = p.vocab;
  const auto stays = [&](int t, uint32_t key) { return key > level || (key == level && t <= last); };
  // Of the tokens that stay and are at the new level, only the first `room` do.
  const auto cut = [&](uint32_t new_level, uint64_t room, uint64_t equal) {
    if (room < equal) {
      const Selected first = select(scratch, room, [&](const auto& take) {
        each([&](int t, float, uint32_t key) { take(~static_cast<uint32_t>(t), uint64_t{key == new_level && stays(t, key)}); });
      });
      last = static_cast<int>(~first.level);
    } else if (new_level != level) {
      last = p.vocab;
    }
    level = new_level;
  };
  if (p.top_k > 0 && p.top_k < p.vocab) {
    const uint64_t k = static_cast<uint64_t>(p.top_k);
    const Selected found = select(scratch, k, [&](const auto& take) {
      each([&](int, float, uint32_t key) { take(key, uint64_t{1}); });
    });
    cut(found.level, k - found.above, found.at);
  }
  if (c.top_p < 1) {
    uint64_t total = 0;
    each([&](int t, float x, uint32_t key) { total += stays(t, key) ? mass(x) : 0; });
    total = block_sum(total, scratch);
    const uint64_t target = min(total, max(uint64_t{1}, static_cast<uint64_t>(ceil(c.top_p * static_cast<double>(total)))));
    const Selected found = select(scratch, target, [&](const auto& take) {
      each([&](int t, float x, uint32_t key) { take(key, stays(t, key) ? mass(x) : 0); });
    });
    const uint64_t one = max(uint64_t{1}, mass(from_ordered(found.level)));
    cut(found.level, (target - found.above + one - 1) / one, found.at / one);
  }

  const uint64_t candidate = static_cast<uint64_t>(load(p.candidates + blockIdx.x));
  uint64_t best = 0;
  for (int block = threadIdx.x; 4 * block < p.vocab; block += kThreads) {
    uint32_t words[4];
    bool drawn = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = 4 * block + i;
      if (t >= p.vocab) break;
      const float x = logits[t];
      if (!stays(t, ordered(x))) continue;
      if (!drawn) philox(p.seed, candidate, position, static_cast<uint32_t>(block), words);
      drawn = true;
      const float u = (static_cast<float>(words[i] >> 9) + 0.5f) * 0x1p-23f;  // strictly inside (0, 1)
      const float score = scaled(x) - logf(-logf(u));  // of equal scores the lower token
      best = max(best, uint64_t{ordered(score)} << 32 | ~static_cast<uint32_t>(t));
    }
  }
  best = block_max(best, scratch);
  return best ? ~static_cast<uint32_t>(best) : 0;
}

// The next step's input: the token's row and those of its place, each sum rounded, as the model adds them.
template <class T>
__device__ __forceinline__ void embed(const CudaSampleParams& c, uint32_t token, int64_t place, bool guided) {
  const bool placed = c.rows != nullptr;
  if (placed && place >= int64_t{c.height} * c.width) return;
  const T* of_token = static_cast<const T*>(c.table) + int64_t{token} * c.dim;
  const T* of_row = static_cast<const T*>(c.rows) + (placed ? place / c.width * c.dim : 0);
  const T* of_column = static_cast<const T*>(c.columns) + (placed ? place % c.width * c.dim : 0);
  T* x = static_cast<T*>(c.x) + int64_t{blockIdx.x} * c.dim;
  for (int i = threadIdx.x; i < c.dim; i += kThreads) {
    T value = load(of_token + i);
    if (placed) {
      value = from_float<T>(to_float(value) + to_float(load(of_row + i)));
      value = from_float<T>(to_float(value) + to_float(load(of_column + i)));
    }
    store(x + i, value);
    if (guided) store(x + int64_t{c.call.batch} * c.dim + i, value);
  }
}

// grid (batch). One block a multiprocessor is enough: registers are not to be saved.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ CudaSampleParams c) {
  const SampleParams& p = c.call;
  shared<unsigned char> memory = dynamic_shared();
  const shared<float> logits = carve<float>(memory, p.vocab);
  const Scratch scratch{carve<uint32_t>(memory, kBins), carve<uint32_t>(memory, kBins), carve<uint64_t>(memory, kWarps + 3)};
  wait_for_previous_kernel();
  start_next_kernel();
  const bool guided = c.guidance_scale != 1;
  const T* row = static_cast<const T*>(p.logits) + static_cast<int64_t>(blockIdx.x) * p.vocab;
  const T* uncaptioned = row + static_cast<int64_t>(p.batch) * p.vocab;
  uint32_t most = 0, most_own = 0;
  for (int t = threadIdx.x; t < p.vocab; t += kThreads) {
    float x = to_float(load(row + t));
    most_own = max(most_own, ordered(x));
    if (guided) {
      const float without = to_float(load(uncaptioned + t));
      x = without + c.guidance_scale * (x - without);
    }
    logits[t] = x;
    most = max(most, ordered(x));
  }
  const float largest = from_ordered(static_cast<uint32_t>(block_max(most, scratch)));

  const int64_t index = load(p.position) - c.first_cell;
  const int64_t given = c.given == nullptr ? -1 : load(c.given + blockIdx.x);
  const uint32_t token =
      given >= 0 ? static_cast<uint32_t>(given) : draw(c, logits, largest, static_cast<uint32_t>(index), scratch);
  if (threadIdx.x == 0) store(p.tokens + blockIdx.x, int64_t{token});
  if (c.log_p != nullptr) {
    const float largest_own = from_ordered(static_cast<uint32_t>(block_max(most_own, scratch)));
    uint64_t total = 0;
    for (int t = threadIdx.x; t < p.vocab; t += kThreads)
      total += static_cast<uint64_t>(expf(to_float(load(row + t)) - largest_own) * kOne);
    total = block_sum(total, scratch);
    const double own = static_cast<double>(to_float(load(row + token))) - static_cast<double>(largest_own);
    if (threadIdx.x == 0) store(c.log_p + blockIdx.x, own - log(static_cast<double>(total) * 0x1p-40));
  }
  if (c.x != nullptr) embed<T>(c, token, index + c.first_place, guided);
}

template <class T>
void launch_type(const CudaSampleParams& c, void* stream) {
  const size_t bytes = (static_cast<size_t>(c.call.vocab) * 4 + 15) / 16 * 16 + 8 * kBins + 8 * (kWarps + 4);
  launch(sample_kernel<T>, "sample", static_cast<unsigned>(c.call.batch), kThreads, bytes, stream, c.dependent_launch, c);
}

}  // namespace

void launch_sample(const CudaSampleParams& c, void* stream) {
  if (c.call.dtype == DType::bfloat16) launch_type<__nv_bfloat16>(c, stream);
  else if (c.call.dtype == DType::float16) launch_type<__half>(c, stream);
  else if (c.call.dtype == DType::float32) launch_type<float>(c, stream);
  else throw std::runtime_error("sample: got a type other than float32, bfloat16 and float16");
}

}  // namespace dalle_fast
