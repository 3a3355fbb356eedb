#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace dalle_fast::cpu {

// Each thread takes heads of prompts: it packs the prefix of one, appends the group's new keys and values, and attends.
// Packing reads the prefix once more than the kernel does; the engine, which keeps prefixes packed, saves that.
void decode_attention(const DecodeAttentionParams& p, int threads) {
  if (p.dim % 16 || p.dim < 16 || p.dim > 256)
    throw std::invalid_argument("got head dim " + std::to_string(p.dim) + ", expected a multiple of 16 up to 256");
  if (p.dtype != DType::float32 && p.dtype != DType::bfloat16)
    throw std::invalid_argument("got a type other than float32 and bfloat16");
  const int64_t position = *p.position;
  if (position < 0 || position + p.cells_now > p.cells)
    throw std::invalid_argument("got cells " + std::to_string(position) + " to " +
                                std::to_string(position + p.cells_now) + ", expected 0 to " + std::to_string(p.cells));
  const bool bf16 = p.dtype == DType::bfloat16;
  const int64_t element = bf16 ? 2 : 4, dim = p.dim, group = p.batch / p.prompts;
  const int64_t keys = round_up(p.prefix_len, kKeyBlock);
  run_team(threads, [&](const Team& team) {
    long begin, end;
    team.share(static_cast<long>(p.prompts) * p.heads, 1, &begin, &end);
    if (begin == end) return;
    const int64_t packed = packed_prefix_bytes(p.prefix_len, dim, p.dtype);
    Buffer prefix_k(static_cast<size_t>(packed)), prefix_v(static_cast<size_t>(packed));
    Buffer scratch(static_cast<size_t>(attend_scratch(keys, p.max_neighbours)) * 4);
    const size_t most = static_cast<size_t>(group) * p.cells_now;
    std::vector<AttentionRow> rows(most);
    std::vector<float> q(most * dim), out(most * dim);
    for (long item = begin; item < end; ++item) {
      const int64_t prompt = item / p.heads, head = item % p.heads;
      const int64_t at = (prompt * p.heads + head) * p.prefix_len * dim * element;
      pack_prefix(static_cast<const char*>(p.prefix_k) + at, static_cast<const char*>(p.prefix_v) + at, p.dtype,
                  p.prefix_len, dim, dim, p.dtype, prefix_k.as<void>(), prefix_v.as<void>());
      int count = 0;
      for (int64_t b = prompt * group; b < (prompt + 1) * group; ++b) {
        char* tails[2] = {static_cast<char*>(p.tail_k) + (b * p.heads + head) * p.slots * dim * element,
                          static_cast<char*>(p.tail_v) + (b * p.heads + head) * p.slots * dim * element};
        for (int64_t i = 0; i < p.cells_now; ++i, ++count) {
          const int64_t cell = position + i, from = ((b * p.heads + head) * p.cells_now + i) * dim;
          const int64_t slot = p.slot_of_cell[cell];
          std::memcpy(tails[0] + slot * dim * element, static_cast<const char*>(p.k) + from * element,
                      static_cast<size_t>(dim * element));
          std::memcpy(tails[1] + slot * dim * element, static_cast<const char*>(p.v) + from * element,
                      static_cast<size_t>(dim * element));
          float* query = q.data() + count * dim;
          for (int64_t d = 0; d < dim; ++d)
            query[d] = bf16 ? bf16_to_float(static_cast<const uint16_t*>(p.q)[from + d])
                            : static_cast<const float*>(p.q)[from + d];
          rows[count] = AttentionRow{query,
                                     out.data() + count * dim,
                                     tails[0],
                                     tails[1],
                                     p.neighbour_slots + cell * p.max_neighbours,
                                     p.neighbour_count[cell],
                                     p.prefix_len};
        }
      }
      kernels().attend({prefix_k.as<void>(), prefix_v.as<void>(), static_cast<int32_t>(keys)}, rows.data(), count,
                       p.dim, p.scale, p.dtype, scratch.as<float>());
      for (int r = 0; r < count; ++r) {
        const int64_t b = prompt * group + r / p.cells_now,
                      to = ((b * p.heads + head) * p.cells_now + r % p.cells_now) * dim;
        const float* from = out.data() + r * dim;
        if (bf16) kernels().to_bf16(from, p.dim, static_cast<uint16_t*>(p.out) + to);
        else std::memcpy(static_cast<float*>(p.out) + to, from, static_cast<size_t>(dim) * 4);
      }
    }
  });
}

void skinny_linear(const SkinnyLinearParams& p, const PackedLinear& weight, int threads) {
  const PackedWeight& w = weight.view();
  const int64_t width = round_up(w.inputs, kPadding);
  Encoded e;
  e.encoding = kernels().encoding(w.type);
  e.row_bytes = encoded_row_bytes(e.encoding, w.inputs);
  e.sums_per_row = static_cast<int>(width / kGroup * 2);
  Buffer data(e.row_bytes * p.rows), step(static_cast<size_t>(p.rows) * 4),
      sums(static_cast<size_t>(p.rows) * e.sums_per_row * 4);
  e.data = data.as<uint8_t>(), e.step = step.as<float>(), e.sums = sums.as<int32_t>();
  run_team(threads, [&](const Team& team) {
    long begin, end;
    team.share(p.rows, 1, &begin, &end);
    std::vector<float> line(static_cast<size_t>(w.inputs));
    for (long row = begin; row < end; ++row) {
      const float* x = static_cast<const float*>(p.x) + static_cast<size_t>(row) * w.inputs;
      if (p.norm_weight) {
        kernels().layer_norm(x, p.norm_weight, p.norm_bias, p.norm_eps, w.inputs, line.data());
        x = line.data();
      }
      kernels().encode(x, w.inputs, static_cast<int>(row), e);
    }
    team.wait();
    team.share(w.panels, p.epilogue == Epilogue::geglu ? 2 : 1, &begin, &end);
    if (begin == end) return;
    Buffer scratch(static_cast<size_t>(2) * kPanel * p.rows * 4);
    kernels().linear(w, e, p.rows, static_cast<int>(begin), static_cast<int>(end),
                     {static_cast<float*>(p.y), static_cast<const float*>(p.residual), w.outputs, p.epilogue},
                     scratch.as<float>());
  });
}

}  // namespace dalle_fast::cpu
