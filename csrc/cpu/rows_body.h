// What happens to one row at a time: LayerNorm, the random numbers, exponentials. For any vector width.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace dalle_fast::cpu {
namespace {

// (x - mean) / sqrt(variance + eps) * weight + bias; the variance from the centred values, in a second pass.
inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, int n, float* y) {
  vf total = {};
  int i = 0;
  for (; i + W <= n; i += W) total = total + load(x + i);
  float mean = sum(total);
  for (; i < n; ++i) mean += x[i];
  mean /= static_cast<float>(n);
  vf squares = {};
  for (i = 0; i + W <= n; i += W) {
    const vf d = load(x + i) - mean;
    squares = fma(d, d, squares);
  }
  float variance = sum(squares);
  for (; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(variance / static_cast<float>(n) + eps);
  for (i = 0; i + W <= n; i += W) store(y + i, fma((load(x + i) - mean) * scale, load(weight + i), load(bias + i)));
  for (; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

inline void encode_float(const float* x, int n, uint8_t* out) { std::memcpy(out, x, static_cast<size_t>(n) * 4); }

inline void exponentials(const float* x, float shift, int count, float* y) {
  int i = 0;
  for (; i + W <= count; i += W) store(y + i, exp(load(x + i) - shift));
  if (i < count) {
    float line[W] = {};
    std::memcpy(line, x + i, static_cast<size_t>(count - i) * 4);
    store(line, exp(load(line) - shift));
    std::memcpy(y + i, line, static_cast<size_t>(count - i) * 4);
  }
}

// Philox4x32-10 (Salmon et al. 2011), sixteen counters side by side; plain loops, which the compiler vectorises.
struct Philox {
  static constexpr int lanes = 16;
  uint32_t c[4][lanes];

  DF_INLINE void run(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < lanes; ++i) {
        const uint64_t a = static_cast<uint64_t>(c[0][i]) * 0xD2511F53u,
                       b = static_cast<uint64_t>(c[2][i]) * 0xCD9E8D57u;
        c[0][i] = static_cast<uint32_t>(b >> 32) ^ c[1][i] ^ k0;
        c[1][i] = static_cast<uint32_t>(b);
        c[2][i] = static_cast<uint32_t>(a >> 32) ^ c[3][i] ^ k1;
        c[3][i] = static_cast<uint32_t>(a);
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }
};

// -ln(-ln u), u = ((word >> 9) + 1/2) / 2^23: strictly inside (0, 1), exact in float32.
DF_INLINE void words_to_gumbel(const uint32_t* words, float* noise) {
  for (int i = 0; i < Philox::lanes; i += W) {
    const vu word = load_words(words + i) >> 9;
    const vf u = (to_float((vi)word) + 0.5f) * 1.1920928955078125e-7f;
    store(noise + i, -log(-log(u)));
  }
}

// noise[i]: the Gumbel noise of token tokens[i], or of token i where tokens is null.
inline void gumbel(uint64_t seed, uint64_t candidate, uint32_t position, const int32_t* tokens, int count,
                   float* noise) {
  constexpr int lanes = Philox::lanes;
  const uint32_t low = static_cast<uint32_t>(candidate), high = static_cast<uint32_t>(candidate >> 32);
  const int step = tokens ? lanes : 4 * lanes;  // without a list all four words of a block are used
  for (int first = 0; first < count; first += step) {
    Philox p;
    for (int i = 0; i < lanes; ++i) {
      const int at = first + i < count ? first + i : count - 1;
      p.c[0][i] = static_cast<uint32_t>(tokens ? tokens[at] / 4 : first / 4 + i);
      p.c[1][i] = position, p.c[2][i] = low, p.c[3][i] = high;
    }
    p.run(seed);
    float values[4 * lanes];
    uint32_t words[4 * lanes];
    if (tokens) {
      for (int i = 0; i < lanes; ++i) words[i] = p.c[tokens[first + i < count ? first + i : count - 1] % 4][i];
    } else {
      for (int i = 0; i < lanes; ++i)
        for (int word = 0; word < 4; ++word) words[4 * i + word] = p.c[word][i];
    }
    for (int i = 0; i < step; i += lanes) words_to_gumbel(words + i, values + i);
    std::memcpy(noise + first, values, static_cast<size_t>(smaller(step, count - first)) * 4);
  }
}

}  // namespace
}  // namespace dalle_fast::cpu
