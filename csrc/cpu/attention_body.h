// The inner loop of attention, for any vector width: queries of one head and prompt against the shared prefix, each
// then against its own tail. Scores first, then softmax, then values: every key and value is read once, and several
// queries share each read of the prefix. A query's sums run in an order that does not depend on its neighbours in the batch.
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace dalle_fast::cpu {
namespace {

constexpr int KV = kKeyBlock / W;  // vectors across a block of keys
constexpr int kMaxDim = 256;

template <bool Bf16>
DF_INLINE vf load_cached(const void* p, int64_t i) {
  if constexpr (Bf16) return load_bf16(static_cast<const uint16_t*>(p) + i);
  else return load(static_cast<const float*>(p) + i);
}

// Scores of R queries with all keys of the prefix, BLOCKS blocks of 16 at a time. q is bf16 pairs or float32.
template <bool Bf16, int R, int BLOCKS>
DF_INLINE void prefix_scores(const void* keys, int64_t block, const float* const* q, const uint32_t* const* pairs,
                             int dim, float* const* scores) {
  vf sum[R][BLOCKS][KV] = {};
  const uint8_t* base = static_cast<const uint8_t*>(keys) + block * dim * kKeyBlock * (Bf16 ? 2 : 4);
  const int64_t block_bytes = static_cast<int64_t>(dim) * kKeyBlock * (Bf16 ? 2 : 4);
  if constexpr (Bf16) {
    for (int d = 0; d < dim / 2; ++d)
      for (int b = 0; b < BLOCKS; ++b)
        for (int v = 0; v < KV; ++v) {
          const vu word = load_words(base + b * block_bytes + (d * kKeyBlock + v * W) * 4);
          for (int r = 0; r < R; ++r) {
#if defined(__AVX512BF16__)
            sum[r][b][v] = _mm512_dpbf16_ps(sum[r][b][v], (__m512bh)word,
                                            (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r][d])));
#else
            sum[r][b][v] = fma(as_float(word << 16), set1(q[r][2 * d]), sum[r][b][v]);
            sum[r][b][v] = fma(as_float(word & 0xFFFF0000u), set1(q[r][2 * d + 1]), sum[r][b][v]);
#endif
          }
        }
  } else {
    for (int d = 0; d < dim; d += 16) {  // sums of 16 products each: a single long one rounds three times as much
      vf part[R][BLOCKS][KV] = {};
      for (int i = d; i < d + 16; ++i)
        for (int b = 0; b < BLOCKS; ++b)
          for (int v = 0; v < KV; ++v) {
            const vf key = load(reinterpret_cast<const float*>(base + b * block_bytes) + i * kKeyBlock + v * W);
            for (int r = 0; r < R; ++r) part[r][b][v] = fma(key, set1(q[r][i]), part[r][b][v]);
          }
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < BLOCKS; ++b)
          for (int v = 0; v < KV; ++v) sum[r][b][v] = sum[r][b][v] + part[r][b][v];
    }
  }
  (void)q, (void)pairs;
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < BLOCKS; ++b)
      for (int v = 0; v < KV; ++v) store(scores[r] + (block + b) * kKeyBlock + v * W, sum[r][b][v]);
}

#if defined(__AVX512F__)
// Lane i becomes the sum of t[i]'s lanes: 45 operations for 16 sums, where one sum by itself takes 20.
DF_INLINE vf sums(const vf* t) {
  __m512 u[8], v[4];
  for (int i = 0; i < 8; ++i)
    u[i] = _mm512_add_ps(_mm512_unpacklo_ps(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_ps(t[2 * i], t[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(u[2 * i]), b = _mm512_castps_pd(u[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto join = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  return join(join(v[0], v[1]), join(v[2], v[3]));
}
#endif

// Scores of one query with its tail: scores[0 ... count), and perhaps up to 16 more that mean nothing.
template <bool Bf16>
DF_INLINE void tail_scores(const AttentionRow& row, const uint32_t* pairs, int dim, float* scores) {
  const auto key = [&](int j) { return static_cast<int64_t>(row.slots[j]) * dim; };
#if defined(__AVX512F__)
  for (int first = 0; first < row.count; first += W) {  // 16 keys at a time: sums that do not wait for each other
    vf total[W];
    int64_t at[W];
    for (int i = 0; i < W; ++i) total[i] = vf{}, at[i] = key(first + i < row.count ? first + i : row.count - 1);
    int d = 0;
#if defined(__AVX512BF16__)
    if constexpr (Bf16)
      for (; d + 32 <= dim; d += 32)
        for (int i = 0; i < W; ++i)
          total[i] = _mm512_dpbf16_ps(total[i],
                                      (__m512bh)load_words(static_cast<const uint16_t*>(row.tail_k) + at[i] + d),
                                      (__m512bh)load_words(pairs + d / 2));
#endif
    for (; d < dim; d += W)
      for (int i = 0; i < W; ++i)
        total[i] = fma(load(row.q + d), load_cached<Bf16>(row.tail_k, at[i] + d), total[i]);
    store(scores + first, sums(total));
  }
#else
  for (int j = 0; j < row.count; ++j) {
    vf total = {};
    for (int d = 0; d < dim; d += W) total = fma(load(row.q + d), load_cached<Bf16>(row.tail_k, key(j) + d), total);
    scores[j] = sum(total);
  }
#endif
  (void)pairs;
}

// out = (prefix's part + the tail's values weighted by p) * inverse, N vectors of channels at a time.
template <bool Bf16, int N>
DF_INLINE void tail_values(const AttentionRow& row, const float* p, const float* prefix, float inverse, int dim, int d) {
  vf total[N];
  for (int n = 0; n < N; ++n) total[n] = load(prefix + d + n * W);
  for (int j = 0; j < row.count; ++j) {
    const int64_t at = static_cast<int64_t>(row.slots[j]) * dim + d;
    for (int n = 0; n < N; ++n) total[n] = fma(load_cached<Bf16>(row.tail_v, at + n * W), set1(p[j]), total[n]);
  }
  for (int n = 0; n < N; ++n) store(row.out + d + n * W, total[n] * inverse);
}

template <bool Bf16>
inline void add_tail(const AttentionRow& row, const float* p, const float* prefix, float inverse, int dim) {
  int d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) tail_values<Bf16, 4>(row, p, prefix, inverse, dim, d);
  for (; d < dim; d += W) tail_values<Bf16, 1>(row, p, prefix, inverse, dim, d);
}

// out[first ... first + N * W) += the prefix's values weighted by p; keys in two interleaved sums, joined at the end.
template <bool Bf16, int R, int N>
DF_INLINE void prefix_values(const void* values, int64_t keys, int dim, int first, float* const* p,
                             const uint32_t* const* pairs, float (*out)[kMaxDim]) {
  vf sum[R][2][N] = {};
  for (int64_t key = 0; key < keys; key += 4)
    for (int half = 0; half < 2; ++half)
      for (int n = 0; n < N; ++n) {
        const int64_t at = key + 2 * half;
        if constexpr (Bf16) {
          const vu word = load_words(static_cast<const uint16_t*>(values) + at * dim + 2 * (first + n * W));
          for (int r = 0; r < R; ++r) {
#if defined(__AVX512BF16__)
            sum[r][half][n] = _mm512_dpbf16_ps(sum[r][half][n], (__m512bh)word,
                                               (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r][at / 2])));
#else
            sum[r][half][n] = fma(as_float(word << 16), set1(p[r][at]), sum[r][half][n]);
            sum[r][half][n] = fma(as_float(word & 0xFFFF0000u), set1(p[r][at + 1]), sum[r][half][n]);
#endif
          }
        } else {
          for (int j = 0; j < 2; ++j) {
            const vf value = load(static_cast<const float*>(values) + (at + j) * dim + first + n * W);
            for (int r = 0; r < R; ++r) sum[r][half][n] = fma(value, set1(p[r][at + j]), sum[r][half][n]);
          }
        }
      }
  (void)p, (void)pairs;
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(out[r] + first + n * W, sum[r][0][n] + sum[r][1][n]);
}

#if defined(__AVX512BF16__)
inline void pair_up(const float* x, int64_t n, uint32_t* pairs) {  // n: a multiple of 16
  for (int64_t i = 0; i < n; i += 16) {
    const __m256bh h = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(reinterpret_cast<uint16_t*>(pairs) + i, &h, sizeof h);
  }
}

// n floats, a multiple of 16, become bf16 pairs in the first half of their place.
inline uint32_t* pair_up_in_place(float* x, int64_t n) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(x);
  float line[16];
  for (int64_t i = 0; i < n; i += 16) {  // 16 floats become 8 words, never ahead of the reads
    std::memcpy(line, x + i, sizeof line);
    pair_up(line, 16, pairs + i / 2);
  }
  return pairs;
}
#endif

// From a query's scores with the `keys` of the prefix: those with its tail after them, and all of them exponentiated.
// Returns 1 / their sum.
template <bool Bf16>
inline float soften(const AttentionRow& row, const uint32_t* q_pairs, int64_t keys, int dim, float scale, float* s) {
  const int64_t end = keys + row.count, padded = round_up(end, kKeyBlock);
  for (int64_t i = row.prefix_len; i < keys; ++i) s[i] = -__builtin_inff();
  tail_scores<Bf16>(row, q_pairs, dim, s + keys);
  for (int64_t i = end; i < padded; ++i) s[i] = -__builtin_inff();
  vf most = load(s);
  for (int64_t i = W; i < padded; i += W) most = max(load(s + i), most);
  const float shift = largest(most) * scale;
  vf total = {};
  for (int64_t i = 0; i < padded; i += W) {
    const vf e = exp_below(fma(load(s + i), set1(scale), set1(-shift)));
    store(s + i, e);
    total = total + e;
  }
  const float all = sum(total);
  if (row.lse) *row.lse = static_cast<float>(shift + ::log(static_cast<double>(all)));
  return 1.0f / all;
}

template <bool Bf16, int R>
void attend_rows(const PackedPrefix& prefix, const AttentionRow* rows, int dim, float scale, float* scratch,
                 int64_t row_floats) {
  const float* q[R];
  float* scores[R];
  const uint32_t *q_pairs[R] = {}, *p_pairs[R] = {};
  [[maybe_unused]] uint32_t pairs[R][kMaxDim / 2];
  float inverse[R];
  for (int r = 0; r < R; ++r) q[r] = rows[r].q, scores[r] = scratch + r * row_floats;
#if defined(__AVX512BF16__)
  if constexpr (Bf16)
    for (int r = 0; r < R; ++r) pair_up(q[r], dim, pairs[r]), q_pairs[r] = pairs[r];
#endif
  const int64_t blocks = prefix.keys / kKeyBlock;
  // Enough sums at a time to hide an addition's latency, and no more than there are registers.
  constexpr int together = W == 16 ? (R == 1 ? 8 : R == 8 ? 2 : 4) : W == 8 ? 4 / R : 1;
  int64_t block = 0;
  for (; block + together <= blocks; block += together)
    prefix_scores<Bf16, R, together>(prefix.k, block, q, q_pairs, dim, scores);
  for (; block < blocks; ++block) prefix_scores<Bf16, R, 1>(prefix.k, block, q, q_pairs, dim, scores);
  for (int r = 0; r < R; ++r) inverse[r] = soften<Bf16>(rows[r], q_pairs[r], prefix.keys, dim, scale, scores[r]);
#if defined(__AVX512BF16__)
  if constexpr (Bf16)
    for (int r = 0; r < R; ++r) p_pairs[r] = pair_up_in_place(scores[r], prefix.keys);
#endif
  float out[R][kMaxDim];
  int d = 0;
  constexpr int wide = W == 16 ? (R < 4 ? 4 : R == 8 ? 1 : 2) : W == 8 ? 4 / R : 2;
  for (; d + wide * W <= dim; d += wide * W)
    prefix_values<Bf16, R, wide>(prefix.v, prefix.keys, dim, d, scores, p_pairs, out);
  for (; d < dim; d += W) prefix_values<Bf16, R, 1>(prefix.v, prefix.keys, dim, d, scores, p_pairs, out);
  for (int r = 0; r < R; ++r) add_tail<Bf16>(rows[r], scores[r] + prefix.keys, out[r], inverse[r], dim);
}

template <bool Bf16>
void attend_all(const PackedPrefix& prefix, const AttentionRow* rows, int count, int dim, float scale, float* scratch,
                int64_t row_floats) {
  int r = 0;
  if constexpr (W == 16)
    for (; r + 8 <= count; r += 8) attend_rows<Bf16, 8>(prefix, rows + r, dim, scale, scratch, row_floats);
  if constexpr (W == 16 || (W == 8 && !Bf16))
    for (; r + 4 <= count; r += 4) attend_rows<Bf16, 4>(prefix, rows + r, dim, scale, scratch, row_floats);
  for (; r + 2 <= count; r += 2) attend_rows<Bf16, 2>(prefix, rows + r, dim, scale, scratch, row_floats);
  if (r < count) attend_rows<Bf16, 1>(prefix, rows + r, dim, scale, scratch, row_floats);
}

// Floats of a row of scores, which attend_scratch() has room for kQueries of.
inline int64_t score_floats(const PackedPrefix& prefix, const AttentionRow* rows, int count) {
  int most = 0;
  for (int r = 0; r < count; ++r) most = rows[r].count > most ? rows[r].count : most;
  return round_up(prefix.keys + most, kKeyBlock) + kKeyBlock;
}

}  // namespace
}  // namespace dalle_fast::cpu
