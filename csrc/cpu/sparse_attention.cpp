#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace dalle_fast::cpu {
namespace {

constexpr int64_t kRun = 32;  // queries of a head that a thread takes at a time

// What a thread keeps of the head at hand: its text as a prefix, the keys and values of its image as a tail.
class Head {
 public:
  explicit Head(const SparseAttentionParams& p)
      : p_(p),
        element_(p.dtype == DType::bfloat16 ? 2 : 4),
        cells_(p.len - p.text_len),
        prefix_k_(static_cast<size_t>(packed_prefix_bytes(p.text_len, p.dim, p.dtype))),
        prefix_v_(static_cast<size_t>(packed_prefix_bytes(p.text_len, p.dim, p.dtype))),
        tail_k_(static_cast<size_t>(cells_ * p.dim * element_)),
        tail_v_(static_cast<size_t>(cells_ * p.dim * element_)),
        scratch_(static_cast<size_t>(attend_scratch(round_up(p.text_len, kKeyBlock), p.max_neighbours)) * 4),
        q_(static_cast<size_t>(kRun * p.dim)),
        out_(q_.size()) {}

  // Queries [first, last) of head number `index` = batch * heads + head.
  void attend(int64_t index, int64_t first, int64_t last) {
    if (index != index_) take(index);
    const int64_t text = smaller(last, p_.text_len);
    // Causal text: of a few queries at a time the keys up to the last of them.
    for (int64_t end; first < text; first = end) {
      end = smaller(first + kQueries, text);
      run(first, end, round_up(end, kKeyBlock));
    }
    if (first < last) run(first, last, round_up(p_.text_len, kKeyBlock));
  }

 private:
  const char* row(const void* x, const int64_t (&strides)[3], int64_t position) const {
    return static_cast<const char*>(x) +
           (index_ / p_.heads * strides[0] + index_ % p_.heads * strides[1] + position * strides[2]) * element_;
  }

  void take(int64_t index) {
    index_ = index;
    pack_prefix(row(p_.k, p_.kv_strides, 0), row(p_.v, p_.kv_strides, 0), p_.dtype, p_.text_len, p_.kv_strides[2], p_.dim,
                p_.dtype, prefix_k_.as<void>(), prefix_v_.as<void>());
    const int64_t bytes = p_.dim * element_;
    for (int64_t cell = 0; cell < cells_; ++cell) {
      std::memcpy(tail_k_.as<char>() + cell * bytes, row(p_.k, p_.kv_strides, p_.text_len + cell),
                  static_cast<size_t>(bytes));
      std::memcpy(tail_v_.as<char>() + cell * bytes, row(p_.v, p_.kv_strides, p_.text_len + cell),
                  static_cast<size_t>(bytes));
    }
  }

  void run(int64_t first, int64_t last, int64_t keys) {
    const int64_t dim = p_.dim, at = index_ * p_.len;
    AttentionRow rows[kRun];
    int count = 0;
    for (int64_t i = first; i < last; ++i, ++count) {
      const char* query = row(p_.q, p_.q_strides, i);
      AttentionRow& a = rows[count];
      a = AttentionRow{reinterpret_cast<const float*>(query),
                       static_cast<float*>(p_.out) + (at + i) * dim,
                       tail_k_.as<void>(),
                       tail_v_.as<void>(),
                       nullptr,
                       0,
                       static_cast<int32_t>(i < p_.text_len ? i + 1 : p_.text_len),
                       p_.lse + at + i};
      if (p_.dtype == DType::bfloat16) {
        float* wide = q_.data() + count * dim;
        for (int64_t d = 0; d < dim; ++d) wide[d] = bf16_to_float(reinterpret_cast<const uint16_t*>(query)[d]);
        a.q = wide, a.out = out_.data() + count * dim;
      }
      if (i < p_.text_len) continue;
      const int64_t cell = i - p_.text_len;
      a.slots = p_.neighbours + cell * p_.max_neighbours, a.count = p_.neighbour_count[cell];
    }
    kernels().attend({prefix_k_.as<void>(), prefix_v_.as<void>(), static_cast<int32_t>(keys)}, rows, count, p_.dim,
                     p_.scale, p_.dtype, scratch_.as<float>());
    if (p_.dtype == DType::bfloat16)
      kernels().to_bf16(out_.data(), static_cast<int>(count * dim), static_cast<uint16_t*>(p_.out) + (at + first) * dim);
  }

  const SparseAttentionParams& p_;
  int64_t element_, cells_, index_ = -1;
  Buffer prefix_k_, prefix_v_, tail_k_, tail_v_, scratch_;
  std::vector<float> q_, out_;
};

}  // namespace

void sparse_attention(const SparseAttentionParams& p, int threads) {
  if (p.dim % 16 || p.dim < 16 || p.dim > 256)
    throw std::invalid_argument("got head dim " + std::to_string(p.dim) + ", expected a multiple of 16 up to 256");
  if (p.dtype != DType::float32 && p.dtype != DType::bfloat16)
    throw std::invalid_argument("got a type other than float32 and bfloat16");
  const int64_t runs = (p.len + kRun - 1) / kRun;
  run_team(threads, [&](const Team& team) {
    long begin, end;
    team.share(static_cast<long>(p.batch * p.heads * runs), 1, &begin, &end);
    if (begin == end) return;
    Head head(p);
    for (long item = begin; item < end; ++item)
      head.attend(item / runs, item % runs * kRun, smaller(p.len, (item % runs + 1) * kRun));
  });
}

}  // namespace dalle_fast::cpu
