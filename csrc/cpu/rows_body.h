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

inline void rotate(float* __restrict x, const float* __restrict cosines, const float* __restrict sines, int n) {
  for (int i = 0; i < n; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + 1] = b * cosines[i + 1] + a * sines[i + 1];
  }
}

inline void to_bf16(const float* x, int n, uint16_t* y) {
  int i = 0;
  for (; i + W <= n; i += W) store_bf16(y + i, load(x + i));
  for (; i < n; ++i) y[i] = float_to_bf16(x[i]);
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

inline float maximum(const float* x, int count) {
  float most = x[0];
  int i = 0;
  if (count >= W) {
    vf line = load(x);
    for (i = W; i + W <= count; i += W) line = max(load(x + i), line);
    most = largest(line);
  }
  for (; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

inline double exponential_sum(const float* x, float shift, int count) {
  double total = 0;
  for (int first = 0; first < count; first += 1024) {  // float sums of 64 addends a lane, double beyond
    const int end = static_cast<int>(smaller(first + 1024, count));
    vf part = {};
    int i = first;
    for (; i + W <= end; i += W) part = part + exp(load(x + i) - shift);
    total += sum(part);
    if (i < end) {
      float line[W];
      exponentials(x + i, shift, end - i, line);
      for (int j = 0; j < end - i; ++j) total += line[j];
    }
  }
  return total;
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

// The random words of tokens first ... first + 63 of a stream; first a multiple of 64.
inline void words64(uint64_t seed, uint64_t candidate, uint32_t position, int first, uint32_t* words) {
#if defined(__AVX512F__)
  // Element e of a register belongs to block 4 (e % 4) + e / 4, so that joining the four words of each leaves them in order.
  const __m512i block = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i c0 = _mm512_add_epi32(block, _mm512_set1_epi32(first / 4)), c1 = _mm512_set1_epi32(static_cast<int>(position)),
          c2 = _mm512_set1_epi32(static_cast<int>(candidate)), c3 = _mm512_set1_epi32(static_cast<int>(candidate >> 32));
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(0xD2511F53u)), m1 = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57u));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const auto multiply = [](__m512i x, __m512i m, __m512i* low, __m512i* high) {
    const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
    *low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  };
  for (int round = 0; round < 10; ++round) {
    __m512i a_low, a_high, b_low, b_high;
    multiply(c0, m0, &a_low, &a_high), multiply(c2, m1, &b_low, &b_high);
    c0 = _mm512_xor_si512(_mm512_xor_si512(b_high, c1), _mm512_set1_epi32(static_cast<int>(k0)));
    c2 = _mm512_xor_si512(_mm512_xor_si512(a_high, c3), _mm512_set1_epi32(static_cast<int>(k1)));
    c1 = b_low, c3 = a_low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), high01 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c2, c3), high23 = _mm512_unpackhi_epi32(c2, c3);
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(words + 32, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(words + 48, _mm512_unpackhi_epi64(high01, high23));
#else
  Philox p;
  for (int i = 0; i < Philox::lanes; ++i)
    p.c[0][i] = static_cast<uint32_t>(first / 4 + i), p.c[1][i] = position, p.c[2][i] = static_cast<uint32_t>(candidate),
    p.c[3][i] = static_cast<uint32_t>(candidate >> 32);
  p.run(seed);
  for (int i = 0; i < Philox::lanes; ++i)
    for (int word = 0; word < 4; ++word) words[4 * i + word] = p.c[word][i];
#endif
}

inline void gumbel(uint64_t seed, uint64_t candidate, uint32_t position, const int32_t* tokens, int count,
                   float* noise) {
  constexpr int lanes = Philox::lanes;
  uint32_t words[4 * lanes];
  float values[4 * lanes];
  if (!tokens) {
    for (int first = 0; first < count; first += 4 * lanes) {
      words64(seed, candidate, position, first, words);
      for (int i = 0; i < 4 * lanes; i += lanes) words_to_gumbel(words + i, values + i);
      std::memcpy(noise + first, values, static_cast<size_t>(smaller(4 * lanes, count - first)) * 4);
    }
    return;
  }
  for (int first = 0; first < count; first += lanes) {
    Philox p;
    const auto token = [&](int i) { return tokens[first + i < count ? first + i : count - 1]; };
    for (int i = 0; i < lanes; ++i)
      p.c[0][i] = static_cast<uint32_t>(token(i) / 4), p.c[1][i] = position, p.c[2][i] = static_cast<uint32_t>(candidate),
      p.c[3][i] = static_cast<uint32_t>(candidate >> 32);
    p.run(seed);
    for (int i = 0; i < lanes; ++i) words[i] = p.c[token(i) % 4][i];
    words_to_gumbel(words, values);
    std::memcpy(noise + first, values, static_cast<size_t>(smaller(lanes, count - first)) * 4);
  }
}

inline Choice choose(uint64_t seed, uint64_t candidate, uint32_t position, const float* x, float shift,
                     float temperature, int first, int count) {
  vf best = set1(-__builtin_inff());
  vi at = {}, here = {};
  for (int i = 0; i < W; ++i) here[i] = i;
  here = here + first;
  uint32_t words[64];
  float noise[64];
  for (int start = first; start < first + count; start += 64) {
    words64(seed, candidate, position, start, words);
    for (int i = 0; i < 64; i += Philox::lanes) words_to_gumbel(words + i, noise + i);
    for (int i = 0; i < 64 && start + i < first + count; i += W, here = here + W) {
      vf score;
      if (start + i + W <= first + count) {
        score = (load(x + start + i) - shift) / temperature + load(noise + i);
      } else {
        float line[W];
        for (int j = 0; j < W; ++j)
          line[j] = start + i + j < first + count ? (x[start + i + j] - shift) / temperature + noise[i + j]
                                                  : -__builtin_inff();
        score = load(line);
      }
      const vi better = (vi)(score > best);
      best = better ? score : best;
      at = better ? here : at;
    }
  }
  Choice choice{-__builtin_inff(), first};
  for (int i = 0; i < W; ++i)
    if (best[i] > choice.score || (best[i] == choice.score && best[i] > -__builtin_inff() && at[i] < choice.token))
      choice = {best[i], at[i]};
  return choice;
}

}  // namespace
}  // namespace dalle_fast::cpu
