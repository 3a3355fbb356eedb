// The whole decoding step of a model, and the prefill of its prompts, in one call each: no Python between the layers.
#pragma once

#include <memory>
#include <vector>

#include "cpu/pack.h"
#include "cpu/threads.h"

namespace dalle_fast::cpu {

struct EngineShape {
  int dim, hidden, heads, head_dim, text_len, height, width, image_vocab;
  int first_cell;   // of image token 0: 1 if a start cell precedes it
  int first_place;  // whose row and column vectors image token 0 takes: 1 if the start is learned
  int rotary_dim;   // channels of a head that turn; 0: none
  int final_norms;
  bool sandwich_norm, token_shift, reversible;
  Epilogue activation;
  float norm_eps;
  DType cache;  // float32 or bfloat16
  int chunk;    // most cells appended at a time
};

struct Norm {
  std::vector<float> weight, bias;  // [dim]
};

// What one layer reads of the image (masks.DecodeTables).
struct TailTables {
  int slots, max_neighbours;
  std::vector<int32_t> slot_of_cell, neighbour_slots, neighbour_count;
};

struct LayerWeights {
  Norm attention_norm, mlp_norm, attention_norm_out,
      mlp_norm_out;  // the last two with sandwich_norm, LayerScale inside
  std::unique_ptr<PackedLinear> qkv, out, up, down;
  TailTables tail;
};

struct ImageEmbedding {
  DType type;                        // float32 or bfloat16
  Buffer tokens;                     // [image_vocab, dim]
  std::vector<float> rows, columns;  // [height, dim], [width, dim]; empty: none
};

// How the next token is drawn (dalle_fast/sampling.py). Guided: the second half of the batch has no caption.
struct Draw {
  const int64_t *candidates, *given;  // [count]; given: -1 where a token is to be drawn
  int count;                          // batch, or half of it if guided
  float temperature, top_p, guidance_scale;
  int top_k;
  uint64_t seed;
  int64_t* tokens;  // [count]
  double* log_p;    // [count]
};

class Engine {
 public:
  // angles: [text_len + cells, rotary_dim] or empty. Throws std::invalid_argument for a shape it cannot run.
  Engine(const EngineShape& shape, const std::vector<float>& angles);
  void add_layer(LayerWeights layer) { layers_.push_back(std::move(layer)); }
  void set_embedding(ImageEmbedding embedding) { embedding_ = std::move(embedding); }
  void set_head(std::vector<Norm> norms, std::unique_ptr<PackedLinear> head) {
    final_norms_ = std::move(norms), head_ = std::move(head);
  }

  // x [prompts, text_len, dim]: the embedded text. start [prompts, dim]: the embedded start cell, or null.
  // Writes the logits of image token 0, [prompts * candidates, image_vocab].
  void prefill(const float* x, const float* start, int prompts, int candidates, int threads, float* logits);
  // tokens [batch, count], count <= chunk; writes the logits of the token after them, [batch, image_vocab].
  void feed(const int64_t* tokens, int count, int threads, float* logits);
  // Feeds a token of every sequence, as feed() does, and draws the next of every candidate. logits [batch, image_vocab].
  void sample(const int64_t* tokens, const Draw& draw, int threads, float* logits);
  void fork(int candidates);

  int batch() const { return batch_; }
  int position() const { return position_; }  // the next cell
  int cells() const { return shape_.height * shape_.width; }
  const EngineShape& shape() const { return shape_; }
  int64_t weight_bytes() const;
  int64_t cache_bytes() const;

 private:
  // What one pass works on. Row r is position r % per_sequence of sequence r / per_sequence: text positions of one prompt,
  // or cells from position_ on of every candidate.
  struct Rows {
    int count;
    int per_sequence;
    int prompt;   // of a text pass
    int prompts;  // that the sequences belong to
    bool text;
  };
  struct Worker {  // a thread's own scratch
    Buffer floats;
    std::vector<AttentionRow> attention;
  };
  using Then = std::function<void(const Team&)>;  // what a team does with the logits
  void advance(const int64_t* tokens, int count, int threads, float* logits, const Then* then);
  void run(Rows& rows, int threads, float* logits, const Then* then = nullptr);
  void encode_norm(const Rows& rows, const Norm& norm, int branch, const float* x, long begin, long end,
                   Worker& worker);
  void shift(const Rows& rows, int branch, int row, float* h);
  void attend(const Rows& rows, int layer, const Team& team, Worker& worker);
  void linear(const PackedLinear& weight, int rows, const Team& team, const LinearOutput& out, Worker& worker) const;
  Encoded encoded(const PackedLinear& weight) const;
  void encode(const PackedLinear& weight, const float* x, long begin, long end) const;
  void reserve(int rows, int threads);
  void embed(const int64_t* tokens, int count);

  EngineShape shape_;
  int inner_;
  std::vector<float> cosines_, sines_;  // [text_len + cells, rotary_dim]
  std::vector<LayerWeights> layers_;
  ImageEmbedding embedding_;
  std::vector<Norm> final_norms_;
  std::unique_ptr<PackedLinear> head_;

  int prompts_ = 0, batch_ = 0, position_ = 0;
  struct LayerCache {
    Buffer prefix_k, prefix_v;  // [prompts, heads] packed heads
    Buffer tail_k, tail_v;      // [batch, heads, slots, head_dim]
    Buffer shift[2];            // [batch, ring, dim / 2]
  };
  std::vector<LayerCache> cache_;

  // Where another process holds a core, a team waits for its slowest thread at every barrier, a scheduler's slice each:
  // one thread alone is then faster (measured with one busy neighbour on 2 cores: 0.9 instead of 12 ms a step). After a
  // disturbed step both are timed, and the faster runs the next ones. The numbers do not depend on it.
  struct Pace {
    double alone = 0, team = 0;  // seconds of the last such step
    int alone_left = 0;          // steps until the team is tried again
    int rows = 0;
  } pace_;
  int pick_team(int rows, int threads);
  void record_pace(bool team, int sleeps, double seconds);
  int sleeps_ = 0;  // of the last pass

  int row_capacity_ = 0;
  Buffer a_, b_, qkv_, attended_, hidden_, branch_, encoded_, step_, sums_, mixed_;
  std::vector<Worker> workers_;
};

}  // namespace dalle_fast::cpu
