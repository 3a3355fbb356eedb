// What the kernels of every device take: plain structs of pointers and sizes. No torch, no Python, no CUDA header.
//
// Tensors are contiguous in the order given; sizes are in elements. Callers allocate, kernels fill.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dalle_fast {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, int4 = 4 };

enum class Epilogue : int32_t {
  none = 0,       // y = W x + bias
  gelu_tanh = 1,  // y = gelu(W x + bias), tanh form
  gelu_erf = 2,   // the same, erf form
  geglu = 3,      // y = value * gelu_erf(gate); W holds the value rows, then the gate rows: twice the outputs
};

// softmax(q k^T * scale) v over whole sequences: a text position sees the text up to itself, an image cell all text and its
// neighbours. q, k, v [batch, heads, len, dim], the last dimension contiguous.
struct SparseAttentionParams {
  const void *q, *k, *v;
  int64_t q_strides[3];            // of batch, heads and positions
  int64_t kv_strides[3];
  void* out;                       // [batch, heads, len, dim]
  float* lse;                      // [batch, heads, len]: log-sum-exp of the scaled scores
  const int32_t* neighbours;       // [cells, max_neighbours], of which a cell itself is one
  const int32_t* neighbour_count;  // [cells]
  int32_t batch, heads, len, text_len, dim, max_neighbours;
  float scale;
  DType dtype;
};

// softmax(q [prefix_k | tail_k]^T * scale) [prefix_v | tail_v], after q's own keys and values went into the tail.
struct DecodeAttentionParams {
  const void* q;            // [batch, heads, cells_now, dim]
  const void* k;            // the same
  const void* v;            // the same
  const void* prefix_k;     // [prompts, heads, prefix_len, dim]
  const void* prefix_v;     // the same
  void* tail_k;             // [batch, heads, slots, dim]
  void* tail_v;             // the same
  void* out;                // [batch, heads, cells_now, dim]
  const int64_t* position;  // one number: the first of the cells_now cells (on the device, so that a graph can be replayed)
  const int32_t* slot_of_cell;     // [cells]
  const int32_t* neighbour_slots;  // [cells, max_neighbours]
  const int32_t* neighbour_count;  // [cells]
  int32_t batch, prompts, heads, cells_now, dim, prefix_len, slots, cells, max_neighbours;
  float scale;
  DType dtype;
};

// The same by CUDA, for bfloat16 and float16 and head dims of 64 and 128. neighbour_slots holds cell | slot << 16.
struct CudaDecodeParams {
  DecodeAttentionParams call;
  float* partial;    // [tiles, heads, splits, rows, dim + 2] or null for one split; tiles of `rows` queries of a prompt
  int32_t* arrived;  // [tiles, heads] or null: zero before and after
  const float* scale_k;  // [heads]: tails hold e4m3 codes, a value being code x scale; or null
  const float* scale_v;
  int64_t candidate_stride, head_stride, cell_stride;  // of q, k and v, in elements; channels are next to each other
  int32_t rows;  // 16 or 64
  int32_t splits;
  bool dependent_launch;  // start before the previous kernel has ended: sm_90
};
// Throws std::runtime_error with the driver's words.
void launch_decode_attention(const CudaDecodeParams& call, void* stream);

// y = epilogue(layer_norm(x) W^T + bias) + residual.
struct SkinnyLinearParams {
  const void* x;             // [rows, inputs]
  const void* weight;        // device-specific: [outputs, inputs], or packed
  const float* bias;         // [outputs] or null
  const void* residual;      // [rows, outputs] or null
  const float* norm_weight;  // [inputs] or null: no LayerNorm
  const float* norm_bias;    // [inputs] or null
  void* y;                   // [rows, outputs], half of it for geglu
  int32_t rows, inputs, outputs;
  float norm_eps;
  Epilogue epilogue;
  DType dtype;
};

// The same by CUDA, for 1 to 64 rows of bfloat16 or float16 and weights as dalle_fast/packing.py lays them out; 16-bit ones, of
// the rows' type, are as nn.Linear has them and serve up to 8 rows.
struct CudaLinearParams {
  SkinnyLinearParams linear;  // bias in the weight's order; dtype is that of x, y and residual
  const float* scale;         // in the weight's order, or null: multiplies a sum before the bias
  int32_t* counters;          // [packed outputs / 16], zero before and after; none for 16-bit weights
  void* workspace;            // skinny_linear_workspace bytes
  // What joins x first, or null: x becomes x + layer_norm(branch), which is also written to `sum`.
  const void* branch;          // [rows, inputs]
  const float* branch_weight;  // [inputs]
  const float* branch_bias;    // [inputs]
  void* sum;                   // [rows, inputs]
  DType weight_dtype;
  int32_t multiprocessors;  // thread blocks to share the work
  int32_t shared_limit;     // bytes of shared memory that a block may have
  int32_t parts;            // of which y consists, one after the other: [parts, rows, outputs / parts]
  bool dependent_launch;    // start before the previous kernel has ended: sm_90
};
size_t skinny_linear_workspace(const CudaLinearParams& call);
// Throws std::runtime_error with the driver's words.
void launch_skinny_linear(const CudaLinearParams& call, void* stream);
// y [rows, inputs] = norm(x), what the linear layer would multiply, for any number of rows and inputs that are a multiple of 8.
void launch_join(const CudaLinearParams& call, void* stream);

// token = argmax(logits / temperature + gumbel noise) over the top_k tokens, of those over the top_p set.
struct SampleParams {
  const void* logits;         // [batch, vocab]
  const int64_t* candidates;  // [batch]: the random stream of each row
  const int64_t* position;    // one number
  int64_t* tokens;            // [batch]
  int32_t batch, vocab, top_k;  // top_k = 0: all
  float temperature, top_p;
  uint64_t seed;
  DType dtype;
};

// The same by CUDA, as the end of a step; logits of float32, bfloat16 or float16, tables and x of the same type.
struct CudaSampleParams {
  SampleParams call;     // of [batch, vocab] logits, or [2 batch, vocab] with guidance: the second half has no caption
  double top_p;          // in full: the cut is exact
  float guidance_scale;  // draws from without + scale (with - without); 1: no guidance
  const int64_t* given;  // [batch]: the token where it is known, -1 where it is to be drawn; or null: all are
  double* log_p;         // [batch] or null: log p of the tokens, with the caption, at temperature 1 and uncut
  // The row that the next step starts from, of every row of logits: the token's, and those of its place. Or x is null.
  void* x;              // [batch or 2 batch, dim]
  const void* table;    // [vocab, dim]
  const void* rows;     // [height, dim] or null
  const void* columns;  // [width, dim] or null
  int32_t dim, height, width;
  int32_t first_cell;     // the token's index is *position - first_cell, and keys its noise
  int32_t first_place;    // its place is its index + first_place; no x is written for one after the last
  bool dependent_launch;  // start before the previous kernel has ended: sm_90
};
// Throws std::runtime_error with the driver's words.
void launch_sample(const CudaSampleParams& call, void* stream);

}  // namespace dalle_fast
