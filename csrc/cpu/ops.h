// The ops of dalle_fast on a CPU, over all threads asked for. Tensors as in params.h.
#pragma once

#include <vector>

#include "cpu/pack.h"
#include "cpu/threads.h"

namespace dalle_fast::cpu {

// float32 or bfloat16, dim a multiple of 16 up to 256. Throws std::invalid_argument for others or a position outside.
void decode_attention(const DecodeAttentionParams& p, int threads);

// The same types and dims.
void sparse_attention(const SparseAttentionParams& p, int threads);

// float32 logits. Tokens of a row do not depend on the other rows, nor on the threads.
void sample(const SampleParams& p, int threads);

// sample() as the end of something larger that a team is running, and log p of what was drawn.
class Drawing {
 public:
  // own: logits [batch, vocab] that log p is taken from, at temperature 1 and uncut. given [batch]: a token that is known,
  // or -1; null: none is. log_p [batch], or null: not wanted.
  Drawing(const SampleParams& p, const float* own, const int64_t* given, double* log_p);
  long pieces() const { return static_cast<long>(pieces_.size()); }  // that threads can share
  void run(const Team& team);                                        // called by all threads of a team

 private:
  struct Piece {  // of a row
    Choice best;
    float most;  // of own
    double sum;  // Σ e^(own - most)
  };
  Piece look(int row, int first, int count, bool choose) const;
  SampleParams p_;
  const float* own_;
  const int64_t* given_;
  double* log_p_;
  bool all_;  // no token is cut
  int per_row_;
  std::vector<Piece> pieces_;
};

// p.x, p.y and p.residual are float32; p.weight is ignored, `weight` holds its bias.
void skinny_linear(const SkinnyLinearParams& p, const PackedLinear& weight, int threads);

}  // namespace dalle_fast::cpu
