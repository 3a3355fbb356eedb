#include "cpu/pack.h"

#include <vector>

#include <stdexcept>
#include <string>

#include "cpu/threads.h"

namespace dalle_fast::cpu {
namespace {

int inputs_per_word(DType type) {
  switch (type) {
    case DType::float32:
      return 1;
    case DType::bfloat16:
      return 2;
    case DType::int8:
      return 4;
    case DType::int4:
      return 8;
    default:
      return 0;
  }
}

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float source_float(const WeightSource& s, int64_t row, int64_t input) {
  const int64_t at = row * s.inputs + input;
  return s.type == DType::bfloat16 ? bf16_to_float(static_cast<const uint16_t*>(s.data)[at])
                                   : static_cast<const float*>(s.data)[at];
}

uint32_t source_bf16(const WeightSource& s, int64_t row, int64_t input) {
  const int64_t at = row * s.inputs + input;
  return s.type == DType::bfloat16 ? static_cast<const uint16_t*>(s.data)[at]
                                   : float_to_bf16(static_cast<const float*>(s.data)[at]);
}

// The word of `row` whose first input is `first`; inputs beyond the last are zero.
uint32_t word(DType type, const WeightSource& s, int64_t row, int64_t first) {
  const int64_t end = smaller(first + inputs_per_word(type), s.inputs);
  if (type == DType::float32) return float_bits(source_float(s, row, first));
  uint32_t bits = type == DType::int4 ? 0x88888888u : 0;  // nibbles hold the weight plus 8
  for (int64_t i = first; i < end; ++i) {
    const int j = static_cast<int>(i - first);
    if (type == DType::bfloat16) bits |= source_bf16(s, row, i) << (16 * j);
    if (type == DType::int8)
      bits |= static_cast<uint32_t>(static_cast<const uint8_t*>(s.data)[row * s.inputs + i]) << (8 * j);
    if (type == DType::int4) {
      const uint8_t both = static_cast<const uint8_t*>(s.data)[row * ((s.inputs + 1) / 2) + i / 2];
      const int shift = 8 * (j % 4) + j / 4 * 4;
      bits = (bits & ~(15u << shift)) | static_cast<uint32_t>(i % 2 ? both >> 4 : both & 15) << shift;
    }
  }
  return bits;
}

}  // namespace

PackedLinear::PackedLinear(DType type, const WeightSource& s, int threads) {
  const bool floats = type == DType::float32 || type == DType::bfloat16;
  const bool from_floats = s.type == DType::float32 || s.type == DType::bfloat16;
  if (!(floats && from_floats) && !((type == DType::int8 || type == DType::int4) && s.type == type))
    throw std::invalid_argument("got a weight of type " + std::to_string(static_cast<int>(s.type)) +
                                " to pack as type " + std::to_string(static_cast<int>(type)) +
                                ", expected floats as floats, int8 as int8, int4 as int4");
  if (s.rows < 1 || s.inputs < 1 || (s.geglu && s.rows % 2))
    throw std::invalid_argument("got a weight of " + std::to_string(s.rows) + " x " + std::to_string(s.inputs) +
                                ", expected at least 1 x 1" + (s.geglu ? " and an even number of rows" : ""));
  if (!floats && !s.scale) throw std::invalid_argument("got an integer weight without scales");
  const int outputs = s.geglu ? s.rows / 2 : s.rows;
  const int column_panels = (outputs + kPanel - 1) / kPanel;
  const bool grouped = type == DType::int4;
  const int groups = (s.inputs + kGroup - 1) / kGroup;
  view_.type = type, view_.outputs = outputs, view_.inputs = s.inputs;
  view_.panels = s.geglu ? 2 * column_panels : column_panels;
  view_.units = grouped ? groups * (kGroup / 8) : (s.inputs + inputs_per_word(type) - 1) / inputs_per_word(type);
  view_.panel_bytes =
      static_cast<size_t>(view_.units) * kPanel * 4 + (grouped ? static_cast<size_t>(groups) * kPanel * 4 : 0);
  data_ = Buffer(view_.panel_bytes * view_.panels);
  scale_ = Buffer(static_cast<size_t>(view_.panels) * kPanel * 4);
  bias_ = Buffer(static_cast<size_t>(view_.panels) * kPanel * 4);
  view_.data = data_.as<uint8_t>(), view_.scale = scale_.as<float>(), view_.bias = bias_.as<float>();
  const bool large = data_.bytes() > (1 << 20);
  run_team(large ? threads : 1, [&](const Team& team) {
    long begin, end;
    team.share(view_.panels, 1, &begin, &end);
    for (long panel = begin; panel < end; ++panel) {
      const long column = s.geglu ? panel / 2 : panel;
      const int64_t first_row = column * kPanel + (s.geglu && panel % 2 ? outputs : 0);
      const int64_t live = smaller(kPanel, outputs - column * kPanel);
      uint8_t* to = data_.as<uint8_t>() + panel * view_.panel_bytes;
      for (int64_t unit = 0; unit < view_.units; ++unit) {
        if (grouped && unit % (kGroup / 8) == 0) {
          for (int64_t o = 0; o < live; ++o)
            std::memcpy(to + 4 * o, s.scale + (first_row + o) * groups + unit / (kGroup / 8), 4);
          to += kPanel * 4;
        }
        for (int64_t o = 0; o < live; ++o) {
          const uint32_t bits = word(type, s, first_row + o, unit * inputs_per_word(type));
          std::memcpy(to + 4 * o, &bits, 4);
        }
        to += kPanel * 4;
      }
      for (int64_t o = 0; o < live; ++o) {
        const float layer_scale = s.output_scale ? s.output_scale[first_row + o] : 1.0f;
        scale_.as<float>()[panel * kPanel + o] = layer_scale * (type == DType::int8 ? s.scale[first_row + o] : 1.0f);
        bias_.as<float>()[panel * kPanel + o] = s.bias ? layer_scale * s.bias[first_row + o] : 0.0f;
      }
    }
  });
}

int64_t packed_prefix_bytes(int64_t len, int64_t dim, DType cache) {
  return round_up(len, kKeyBlock) * dim * (cache == DType::bfloat16 ? 2 : 4);
}

namespace {

// Of bf16 into bf16: words and pairs change places, nothing is converted.
void pack_prefix_bf16(const uint16_t* k, const uint16_t* v, int64_t len, int64_t row_stride, int64_t dim, uint16_t* to_k,
                      uint16_t* to_v) {
  const int64_t keys = round_up(len, kKeyBlock);
  const std::vector<uint16_t> nothing(static_cast<size_t>(dim));
  const auto row = [&](const uint16_t* x, int64_t key) { return key < len ? x + key * row_stride : nothing.data(); };
  for (int64_t key = 0; key < keys; ++key) {
    const uint16_t* from = row(k, key);
    uint16_t* to = to_k + key / kKeyBlock * kKeyBlock * dim + 2 * (key % kKeyBlock);
    for (int64_t d = 0; d < dim; d += 2) std::memcpy(to + d * kKeyBlock, from + d, 4);
  }
  for (int64_t key = 0; key < keys; key += 2) {
    const uint16_t *first = row(v, key), *second = row(v, key + 1);
    uint16_t* to = to_v + key * dim;
    for (int64_t d = 0; d < dim; ++d) to[2 * d] = first[d], to[2 * d + 1] = second[d];
  }
}

}  // namespace

void pack_prefix(const void* k, const void* v, DType from, int64_t len, int64_t row_stride, int64_t dim, DType cache,
                 void* to_k, void* to_v) {
  if (from == DType::bfloat16 && cache == DType::bfloat16)
    return pack_prefix_bf16(static_cast<const uint16_t*>(k), static_cast<const uint16_t*>(v), len, row_stride, dim,
                            static_cast<uint16_t*>(to_k), static_cast<uint16_t*>(to_v));
  const bool wide = from != DType::bfloat16;
  std::vector<float> line(static_cast<size_t>(dim));
  const auto row = [&](const void* x, int64_t key) -> const float* {  // zeros beyond the end
    if (key < len && wide) return static_cast<const float*>(x) + key * row_stride;
    for (int64_t d = 0; d < dim; ++d)
      line[d] = key < len ? bf16_to_float(static_cast<const uint16_t*>(x)[key * row_stride + d]) : 0.0f;
    return line.data();
  };
  const int64_t keys = round_up(len, kKeyBlock);
  for (int64_t key = 0; key < keys; ++key) {
    const int64_t block = key / kKeyBlock * kKeyBlock * dim, lane = key % kKeyBlock;
    const float* from_k = row(k, key);
    if (cache == DType::bfloat16) {
      uint16_t* to = static_cast<uint16_t*>(to_k) + block + 2 * lane;
      for (int64_t d = 0; d < dim; d += 2)
        for (int64_t j = 0; j < 2; ++j) to[d * kKeyBlock + j] = float_to_bf16(from_k[d + j]);
    } else {
      float* to = static_cast<float*>(to_k) + block + lane;
      for (int64_t d = 0; d < dim; ++d) to[d * kKeyBlock] = from_k[d];
    }
    const float* from_v = row(v, key);
    if (cache == DType::bfloat16) {
      uint16_t* to = static_cast<uint16_t*>(to_v) + key / 2 * 2 * dim + key % 2;
      for (int64_t d = 0; d < dim; ++d) to[2 * d] = float_to_bf16(from_v[d]);
    } else {
      std::memcpy(static_cast<float*>(to_v) + key * dim, from_v, static_cast<size_t>(dim) * 4);
    }
  }
}

}  // namespace dalle_fast::cpu
