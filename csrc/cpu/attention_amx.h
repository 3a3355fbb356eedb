// attend() over a bf16 prefix by the tile products of AMX, for up to 16 queries at once: a block of 16 keys is a tile of
// pairs of channels x keys already, and the values are tiles of pairs of keys x 16 channels. Tails as with AVX-512.
#pragma once

#include "cpu/attention_body.h"
#include "cpu/tiles.h"

namespace dalle_fast::cpu {
namespace {

// The intrinsics want tile numbers as literals, so that what is left at the end is written out once more, for tiles 5 and 7.
// Tiles 0 to 3 are sums; 4 and 6 hold 16 pairs of queries and of the prefix, 5 and 7 the 8 that may be left at the end.
inline Tiles attention_tiles(int rows) {
  return Tiles({rows, rows, rows, rows, rows, rows, kTileRows, kTileRows / 2}, {64, 64, 64, 64, 64, 32, 64, 64});
}

// Scores of the queries with the whole prefix. q: their bf16 pairs, q_bytes a row.
inline void prefix_scores_by_tiles(const PackedPrefix& prefix, const uint8_t* q, int64_t q_bytes, int dim, float* scores,
                                   int64_t score_bytes) {
  const uint8_t* keys = static_cast<const uint8_t*>(prefix.k);
  for (int64_t block = 0; block < prefix.keys; block += kKeyBlock) {
    _tile_zero(0);
    int d = 0;
    for (; d + 32 <= dim; d += 32, keys += 1024) {
      _tile_loadd(4, q + 2 * d, q_bytes);
      _tile_loadd(6, keys, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    if (d < dim) {
      _tile_loadd(5, q + 2 * d, q_bytes);
      _tile_loadd(7, keys, 64);
      _tile_dpbf16ps(0, 5, 7);
      keys += 512;
    }
    _tile_stored(0, scores + block, score_bytes);
  }
}

// N x 16 channels of the values weighted by p, which is in bf16 pairs.
template <int N>  // 1 or 4
DF_INLINE void prefix_values_by_tiles(const uint8_t* values, int64_t keys, int64_t pair_bytes, const uint8_t* p,
                                      int64_t p_bytes, float* out) {
  constexpr int64_t out_bytes = kMaxDim * 4;
  _tile_zero(0);
  if constexpr (N > 1) {
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t key = 0;
  for (; key + 32 <= keys; key += 32, values += 16 * pair_bytes, p += 64) {
    _tile_loadd(4, p, p_bytes);
    _tile_loadd(6, values, pair_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(6, values + 64, pair_bytes);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(6, values + 128, pair_bytes);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(6, values + 192, pair_bytes);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  if (key < keys) {
    _tile_loadd(5, p, p_bytes);
    _tile_loadd(7, values, pair_bytes);
    _tile_dpbf16ps(0, 5, 7);
    if constexpr (N > 1) {
      _tile_loadd(7, values + 64, pair_bytes);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(7, values + 128, pair_bytes);
      _tile_dpbf16ps(2, 5, 7);
      _tile_loadd(7, values + 192, pair_bytes);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (N > 1) {
    _tile_stored(1, out + 16, out_bytes);
    _tile_stored(2, out + 32, out_bytes);
    _tile_stored(3, out + 48, out_bytes);
  }
}

// Asks for the tail of a query to come: its lines lie apart, one cell here and one there.
DF_INLINE void prefetch_tail(const AttentionRow& row, int dim) {
  for (int j = 0; j < row.count; ++j) {
    const int64_t at = static_cast<int64_t>(row.slots[j]) * dim;
    for (int d = 0; d < dim; d += 32) {
      __builtin_prefetch(static_cast<const uint16_t*>(row.tail_k) + at + d);
      __builtin_prefetch(static_cast<const uint16_t*>(row.tail_v) + at + d, 0, 2);
    }
  }
}

inline void attend_by_tiles(const PackedPrefix& prefix, const AttentionRow* rows, int count, int dim, float scale,
                            float* scratch, int64_t row_floats) {
  for (int group = 0; group < count; group += kQueries, rows += kQueries) {
    const int some = static_cast<int>(smaller(kQueries, count - group));
    const Tiles tiles = attention_tiles(some);
    alignas(64) uint32_t q[kQueries][kMaxDim / 2];
    prefetch_tail(rows[0], dim);
    for (int r = 0; r < some; ++r) pair_up(rows[r].q, dim, q[r]);
    memory_fence();
    prefix_scores_by_tiles(prefix, reinterpret_cast<const uint8_t*>(q), sizeof q[0], dim, scratch, row_floats * 4);
    memory_fence();
    float inverse[kQueries];
    for (int r = 0; r < some; ++r) {
      float* scores = scratch + r * row_floats;
      if (r + 1 < some) prefetch_tail(rows[r + 1], dim);
      inverse[r] = soften<true>(rows[r], q[r], prefix.keys, dim, scale, scores);
      pair_up_in_place(scores, prefix.keys);
    }
    memory_fence();
    alignas(64) float out[kQueries][kMaxDim];
    const uint8_t* values = static_cast<const uint8_t*>(prefix.v);
    const uint8_t* p = reinterpret_cast<const uint8_t*>(scratch);
    int d = 0;
    for (; d + 64 <= dim; d += 64)
      prefix_values_by_tiles<4>(values + 4 * d, prefix.keys, 4 * dim, p, row_floats * 4, &out[0][d]);
    for (; d < dim; d += 16)
      prefix_values_by_tiles<1>(values + 4 * d, prefix.keys, 4 * dim, p, row_floats * 4, &out[0][d]);
    memory_fence();
    for (int r = 0; r < some; ++r)
      add_tail<true>(rows[r], scratch + r * row_floats + prefix.keys, out[r], inverse[r], dim);
  }
}

}  // namespace
}  // namespace dalle_fast::cpu
