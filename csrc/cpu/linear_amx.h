// skinny_linear's inner loops by the tile products of AMX: up to 16 rows x 64 bytes of activations times 64 bytes x 16
// outputs in one instruction. A panel's units are already a tile's rows, 128 bytes apart. Few rows of integers are faster by
// AVX-512, with the same exact sums; bf16 adds in another order there, so that it goes through tiles whatever the rows.
#pragma once

#include "cpu/linear_avx512.h"
#include "cpu/tiles.h"

namespace dalle_fast::cpu {
namespace {

constexpr int kTileUnits = 16;                   // 32-bit words across a tile's 64 bytes
constexpr int kStep = kTileUnits * kPanel * 4;   // bytes of a panel that two tiles of weights hold
constexpr int kFewestInt8 = 2, kFewestInt4 = 5;  // rows from which tiles are faster, measured on an Emerald Rapids Xeon

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
inline Tiles linear_tiles(int rows) {
  return Tiles({rows, rows, rows, rows, rows, rows, kTileRows, kTileRows}, {64, 64, 64, 64, 64, 64, 64, 64});
}

// Rows of integers up to which their hi and lo halves stand side by side in one tile: half as many products.
constexpr int kStacked = kTileRows / 2;
inline int tile_rows(DType weight, int rows) { return weight != DType::bfloat16 && rows <= kStacked ? 2 * rows : rows; }

// The sums of `rows` rows from `row` on, with linear_tiles of their tile_rows() alive.
using TileFunction = void (*)(const PackedWeight&, const uint8_t* data, const Encoded&, int row, int rows, float* out);

struct Sums {  // what four tiles of sums are stored to
  alignas(64) int32_t at[4][kTileRows][16];
  DF_INLINE void take() {
    _tile_stored(0, at[0], 64);
    _tile_stored(1, at[1], 64);
    _tile_stored(2, at[2], 64);
    _tile_stored(3, at[3], 64);
    memory_fence();
  }
};

DF_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The last units of a panel, which do not fill tiles: zeros after them.
struct LastStep {
  alignas(64) uint8_t data[kStep] = {};
  LastStep(const uint8_t* from, int64_t units) { std::memcpy(data, from, static_cast<size_t>(units) * kPanel * 4); }
};

DF_INLINE void load_weights(const uint8_t* data) {
  memory_fence();
  _tile_loadd(6, data, kPanel * 4);
  _tile_loadd(7, data + 64, kPanel * 4);
}

// ... of a panel, whose next step is asked for meanwhile.
DF_INLINE void stream_weights(const uint8_t* data) {
  for (int line = 0; line < kStep; line += 64) __builtin_prefetch(data + kStep + line);
  load_weights(data);
}

// Products of the weights with one tile of activations; twice, since the intrinsics want tile numbers as literals.
template <bool Integers>
DF_INLINE void add_even(const uint8_t* a, size_t stride) {
  _tile_loadd(4, a, stride);
  if constexpr (Integers) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
}
template <bool Integers>
DF_INLINE void add_odd(const uint8_t* a, size_t stride) {
  _tile_loadd(5, a, stride);
  if constexpr (Integers) {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Two sums of every output, of alternate steps, to be added at the end: a product must not wait for the one before it.
template <bool Integers>
DF_INLINE void alternate(int64_t left, const uint8_t* data, const uint8_t* a, size_t stride) {
  const auto even = [&] { add_even<Integers>(a, stride), a += 64; };
  const auto odd = [&] { add_odd<Integers>(a, stride), a += 64; };
  zero_sums();
  for (; left >= 2 * kTileUnits; left -= 2 * kTileUnits, data += 2 * kStep) {
    stream_weights(data);
    even();
    stream_weights(data + kStep);
    odd();
  }
  if (left >= kTileUnits) {
    stream_weights(data);
    even();
    left -= kTileUnits, data += kStep;
  }
  if (left) {
    const LastStep last(data, left);
    load_weights(last.data);
    odd();
  }
}

inline void tiles_bf16(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, int rows, float* out) {
  alternate<false>(w.units, data, x.data + row * x.row_bytes, x.row_bytes);
  Sums sums;
  sums.take();
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < 2; ++v)
      _mm512_storeu_ps(out + r * kPanel + v * 16,
                       _mm512_add_ps(_mm512_load_ps(sums.at[v][r]), _mm512_load_ps(sums.at[v + 2][r])));
}

// Of more than kStacked rows sums 0 and 1 are of the hi bytes, 2 and 3 of the lo bytes. `a`: 64 inputs of the first row.
DF_INLINE void add_halves(const uint8_t* a, size_t row_bytes) {
  add_even<true>(a, row_bytes);
  add_odd<true>(a + row_bytes / 2, row_bytes);
}

// The sums of a row's hi and lo bytes with outputs 16 v and on, among those of `rows` rows.
DF_INLINE __m512i high_sum(const Sums& sums, int rows, int r, int v) {
  if (rows > kStacked) return _mm512_load_si512(sums.at[v][r]);
  return _mm512_add_epi32(_mm512_load_si512(sums.at[v][2 * r]), _mm512_load_si512(sums.at[v + 2][2 * r]));
}
DF_INLINE __m512i low_sum(const Sums& sums, int rows, int r, int v) {
  if (rows > kStacked) return _mm512_load_si512(sums.at[v + 2][r]);
  return _mm512_add_epi32(_mm512_load_si512(sums.at[v][2 * r + 1]), _mm512_load_si512(sums.at[v + 2][2 * r + 1]));
}

inline void tiles_int8(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, int rows, float* out) {
  const uint8_t* a = x.data + row * x.row_bytes;
  Sums sums;
  if (rows <= kStacked) {
    alternate<true>(w.units, data, a, x.row_bytes / 2);
  } else {
    zero_sums();
    int64_t left = w.units;
    for (; left >= kTileUnits; left -= kTileUnits, data += kStep, a += 64) {
      stream_weights(data);
      add_halves(a, x.row_bytes);
    }
    if (left) {
      const LastStep last(data, left);
      load_weights(last.data);
      add_halves(a, x.row_bytes);
    }
  }
  sums.take();
  for (int r = 0; r < rows; ++r) {
    const __m512 step = _mm512_set1_ps(x.step[row + r]), step256 = _mm512_set1_ps(256.0f * x.step[row + r]);
    for (int v = 0; v < 2; ++v) {
      const __m512 high = _mm512_cvtepi32_ps(high_sum(sums, rows, r, v));
      const __m512 low = _mm512_cvtepi32_ps(low_sum(sums, rows, r, v));
      _mm512_storeu_ps(out + r * kPanel + v * 16, _mm512_fmadd_ps(high, step256, _mm512_mul_ps(low, step)));
    }
  }
}

// Eight units of int4 as sixteen of int8.
DF_INLINE void unpack_int4(const uint8_t* data, uint8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  for (int i = 0; i < 8; ++i, data += kPanel * 4, to += 2 * kPanel * 4)
    for (int half = 0; half < 128; half += 64) {
      const __m512i both = _mm512_loadu_si512(data + half);
      __builtin_prefetch(data + half + kStep);
      const __m512i first = _mm512_and_si512(both, nibble);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      _mm512_store_si512(to + half, _mm512_sub_epi8(first, eight));
      _mm512_store_si512(to + kPanel * 4 + half, _mm512_sub_epi8(second, eight));
    }
}

inline void tiles_int4(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, int rows, float* out) {
  const uint8_t* a = x.data + row * x.row_bytes;
  alignas(64) uint8_t unpacked[2 * kStep];
  Sums sums;
  for (int i = 0; i < rows * kPanel; i += 16) _mm512_storeu_ps(out + i, _mm512_setzero_ps());
  for (int64_t unit = 0; unit < w.units; unit += kGroup / 8) {
    const __m512 scale[] = {_mm512_loadu_ps(data), _mm512_loadu_ps(data + 64)};
    data += kPanel * sizeof(float);
    zero_sums();
    for (int half = 0; half < 2; ++half, data += kStep / 2, a += 64) {
      unpack_int4(data, unpacked + half * kStep);
      load_weights(unpacked + half * kStep);
      if (rows > kStacked) add_halves(a, x.row_bytes);
      else if (half) add_odd<true>(a, x.row_bytes / 2);
      else add_even<true>(a, x.row_bytes / 2);
    }
    sums.take();
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < 2; ++v) {
        const __m512i high = high_sum(sums, rows, r, v), low = low_sum(sums, rows, r, v);
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        float* total = out + r * kPanel + v * 16;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(whole, scale[v], _mm512_loadu_ps(total)));
      }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kPanel; v += 16) {
      float* total = out + r * kPanel + v;
      _mm512_storeu_ps(total, _mm512_mul_ps(_mm512_loadu_ps(total), _mm512_set1_ps(x.step[row + r])));
    }
}

// Null where no tiles are used.
inline TileFunction tiles_for(DType weight, int rows) {
  if (weight == DType::bfloat16) return tiles_bf16;
  if (weight == DType::int8 && rows >= kFewestInt8) return tiles_int8;
  if (weight == DType::int4 && rows >= kFewestInt4) return tiles_int4;
  return nullptr;
}

// Blocks are of one size, which the tiles are set up for once: the last one may begin with rows of the block before it.
inline void linear_by_tiles(TileFunction by_tiles, const PackedWeight& w, const Encoded& x, int rows, int begin,
                            int end, const LinearOutput& out, float* scratch) {
  const int blocks = (rows + kTileRows - 1) / kTileRows, size = (rows + blocks - 1) / blocks;
  const Tiles tiles = linear_tiles(tile_rows(w.type, size));
  float *sums = scratch, *values = scratch + static_cast<size_t>(rows) * kPanel;
  for (int panel = begin; panel < end; ++panel)
    for (int done = 0; done < rows;) {
      const int row = static_cast<int>(smaller(done, rows - size)), again = done - row;
      by_tiles(w, w.data + panel * w.panel_bytes, x, row, size, sums);
      finish_panel(w, panel, sums + again * kPanel, done, size - again, out, values + static_cast<size_t>(done) * kPanel);
      done = row + size;
    }
}

}  // namespace
}  // namespace dalle_fast::cpu
