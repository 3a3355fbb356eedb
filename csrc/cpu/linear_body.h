// skinny_linear's inner loops, for any vector width. An output's sum runs over the inputs in order, in one accumulator,
// whatever the number of rows: a candidate's numbers do not depend on its batch.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace dalle_fast::cpu {
namespace {

constexpr int V = kPanel / W;    // vectors across a panel
// Bytes ahead in the stream of weights, as measured. AMX (1.3B, one row): int4 36 ms a step, with 1024 40; int8 63 and 68.
// Without bf16 instructions, on two cores of an Emerald Rapids Xeon: bf16 of 512 x 2048 for one row 39 µs, with 2048 42, with
// 1024 47; for 8 rows 60, 65, 87.
#if defined(__AMX_TILE__)
constexpr int kPrefetch = 2048;
#elif defined(__AVX512BF16__)
constexpr int kPrefetch = 1024;
#else
constexpr int kPrefetch = 4096;
#endif

struct Float32Weight {
  static constexpr int inputs = 1;
  template <int J>
  static DF_INLINE vf get(vu w) {
    return as_float(w);
  }
};
struct Bf16Weight {
  static constexpr int inputs = 2;
  template <int J>
  static DF_INLINE vf get(vu w) {
    return as_float(J ? w & 0xFFFF0000u : w << 16);
  }
};
struct Int8Weight {
  static constexpr int inputs = 4;
  template <int J>
  static DF_INLINE vf get(vu w) {
    const vu top = w << (24 - 8 * J);
    return to_float((vi)top >> 24);
  }
};
struct Int4Weight {
  static constexpr int inputs = 8;
  template <int J>
  static DF_INLINE vf get(vu w) {
    const vu nibble = (w >> (8 * (J % 4) + J / 4 * 4)) & 15u;
    return to_float((vi)nibble - 8);
  }
};

template <class Weight, int R, int J>
DF_INLINE void add_inputs(const vu* word, const float* const* x, int64_t first, vf (*sum)[V]) {
  if constexpr (J < Weight::inputs) {
    for (int v = 0; v < V; ++v) {
      const vf w = Weight::template get<J>(word[v]);
      for (int r = 0; r < R; ++r) sum[r][v] = fma(w, set1(x[r][first + J]), sum[r][v]);
    }
    add_inputs<Weight, R, J + 1>(word, x, first, sum);
  }
}

template <class Weight, int R>
void panel_float(const PackedWeight& w, const uint8_t* data, const Encoded& x, int row, float* out) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const float*>(x.data + (row + r) * x.row_bytes);
  vf total[R][V] = {};
  constexpr bool grouped = Weight::inputs == 8;
  constexpr int group_units = kGroup / 8;
  for (int64_t unit = 0; unit < w.units;) {
    const float* scales = reinterpret_cast<const float*>(data);
    if (grouped) data += kPanel * sizeof(float);
    const int64_t end = grouped ? smaller(unit + group_units, w.units) : w.units;
    vf part[R][V] = {};
    for (; unit < end; ++unit, data += kPanel * 4) {
      vu word[V];
      for (int v = 0; v < V; ++v) word[v] = load_words(data + v * W * 4);
      __builtin_prefetch(data + kPrefetch);
      __builtin_prefetch(data + kPrefetch + 64);
      add_inputs<Weight, R, 0>(word, rows, unit * Weight::inputs, part);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        total[r][v] = grouped ? fma(part[r][v], load(scales + v * W), total[r][v]) : part[r][v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * kPanel + v * W, total[r][v]);
}

// Epilogues.

DF_INLINE vf gelu_tanh(vf x) {  // x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x³)
  const vf u = x * fma(x * x, set1(0.044715f), set1(1.0f)) * -1.5957691216057308f;
  return x / (exp(u) + 1.0f);
}

// erf within 2e-7. Below 1: x times a polynomial in x²; above: 1 - e^-x² times a polynomial in 1 / (1 + x/2). Both fitted
// at Chebyshev points to the exact values.
DF_INLINE vf erf(vf x) {
  const vf a = min(x < 0.0f ? -x : x, set1(4.2f)), z = a * a;
  vf p = set1(-9.6735902844e-6f);
  p = fma(p, z, set1(1.1268252930e-4f));
  p = fma(p, z, set1(-8.4843963850e-4f));
  p = fma(p, z, set1(5.2210534923e-3f));
  p = fma(p, z, set1(-2.6865437627e-2f));
  p = fma(p, z, set1(1.1283782870e-1f));
  p = fma(p, z, set1(-3.7612637877e-1f));
  p = fma(p, z, set1(1.1283792257f));
  const vf t = 1.0f / fma(a, set1(0.5f), set1(1.0f));
  vf q = set1(-5.9800602496e-2f);
  q = fma(q, t, set1(-3.8314726204e-2f));
  q = fma(q, t, set1(3.7999704480e-1f));
  q = fma(q, t, set1(1.1703358591e-1f));
  q = fma(q, t, set1(3.2504102588e-1f));
  q = fma(q, t, set1(2.7474322915e-1f));
  q = fma(q, t, set1(5.1650905516e-4f));
  const vf y = a < 1.0f ? a * p : 1.0f - exp(-z) * q;
  return x < 0.0f ? -y : y;
}
DF_INLINE vf gelu_erf(vf x) { return x * 0.5f * (erf(x * 0.70710678118654752f) + 1.0f); }

// Columns [column, column + 32) of `rows` rows. values: the finished value half of a geglu pair, else null.
inline void write_panel(const PackedWeight& w, int panel, const float* sums, const float* values, int row, int rows,
                        const LinearOutput& out) {
  const int column = (out.epilogue == Epilogue::geglu ? panel / 2 : panel) * kPanel;
  const int width = static_cast<int>(smaller(kPanel, w.outputs - column));
  const float *scale = w.scale + panel * kPanel, *bias = w.bias + panel * kPanel;
  for (int r = 0; r < rows; ++r) {
    float line[kPanel];
    for (int v = 0; v < kPanel; v += W) {
      vf y = fma(load(sums + r * kPanel + v), load(scale + v), load(bias + v));
      if (out.epilogue == Epilogue::gelu_tanh) y = gelu_tanh(y);
      if (out.epilogue == Epilogue::gelu_erf) y = gelu_erf(y);
      if (values) y = load(values + r * kPanel + v) * gelu_erf(y);
      store(line + v, y);
    }
    const size_t at = static_cast<size_t>(row + r) * out.stride + column;
    if (width == kPanel) {
      for (int v = 0; v < kPanel; v += W)
        store(out.y + at + v, out.residual ? load(line + v) + load(out.residual + at + v) : load(line + v));
    } else {
      for (int i = 0; i < width; ++i) out.y[at + i] = out.residual ? line[i] + out.residual[at + i] : line[i];
    }
  }
}

// Value panel of a geglu pair: scale and bias only.
inline void finish_values(const PackedWeight& w, int panel, const float* sums, int rows, float* values) {
  const float *scale = w.scale + panel * kPanel, *bias = w.bias + panel * kPanel;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kPanel; v += W)
      store(values + r * kPanel + v, fma(load(sums + r * kPanel + v), load(scale + v), load(bias + v)));
}

// The finished sums of rows [row, row + count) go on to their output, or to `values` (of `row` on) for the gate panel to come.
inline void finish_panel(const PackedWeight& w, int panel, const float* sums, int row, int count,
                         const LinearOutput& out, float* values) {
  const bool gated = out.epilogue == Epilogue::geglu;
  if (gated && panel % 2 == 0) return finish_values(w, panel, sums, count, values);
  write_panel(w, panel, sums, gated ? values : nullptr, row, count, out);
}

using PanelFunction = void (*)(const PackedWeight&, const uint8_t*, const Encoded&, int row, float* out);

// Rows are taken in blocks of nearly equal size, at most `most`.
inline void linear_with(const PanelFunction* by_rows, int most, const PackedWeight& w, const Encoded& x, int rows,
                        int begin, int end, const LinearOutput& out, float* scratch) {
  const int blocks = (rows + most - 1) / most;
  float *sums = scratch, *values = scratch + static_cast<size_t>(rows) * kPanel;
  for (int panel = begin; panel < end; ++panel) {
    const uint8_t* data = w.data + panel * w.panel_bytes;
    for (int b = 0, row = 0; b < blocks; ++b) {
      const int count = (rows - row) / (blocks - b);
      by_rows[count - 1](w, data, x, row, sums);
      finish_panel(w, panel, sums, row, count, out, values + static_cast<size_t>(row) * kPanel);
      row += count;
    }
  }
}

template <class Weight>
constexpr PanelFunction float_panels[] = {
    panel_float<Weight, 1>, panel_float<Weight, 2>,
#if defined(__AVX2__)
    panel_float<Weight, 3>,
#endif
#if defined(__AVX512F__)
    panel_float<Weight, 4>, panel_float<Weight, 5>, panel_float<Weight, 6>,
    panel_float<Weight, 7>, panel_float<Weight, 8>,
#endif
};

}  // namespace
}  // namespace dalle_fast::cpu
