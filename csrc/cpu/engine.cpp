#include "cpu/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"

namespace dalle_fast::cpu {

Engine::Engine(const EngineShape& shape, const std::vector<float>& angles)
    : shape_(shape), inner_(shape.heads * shape.head_dim) {
  const auto refuse = [](const char* what, int got, const std::string& expected) {
    throw std::invalid_argument(std::string("got ") + what + "=" + std::to_string(got) + ", expected " + expected);
  };
  if (shape.head_dim % 16 || shape.head_dim < 16 || shape.head_dim > 256)
    refuse("head_dim", shape.head_dim, "a multiple of 16 up to 256");
  if (shape.cache != DType::float32 && shape.cache != DType::bfloat16)
    refuse("cache", static_cast<int>(shape.cache), "float32 or bfloat16");
  if (shape.rotary_dim % 2 || shape.rotary_dim > shape.head_dim)
    refuse("rotary_dim", shape.rotary_dim, "an even number up to head_dim");
  if (angles.size() != static_cast<size_t>(shape.text_len + cells()) * shape.rotary_dim)
    refuse("angles", static_cast<int>(angles.size()), "(text_len + cells) * rotary_dim");
  for (const float angle : angles) cosines_.push_back(std::cos(angle)), sines_.push_back(std::sin(angle));
}

void Engine::prefill(const float* x, const float* start, int prompts, int candidates, int threads, float* logits) {
  if (prompts < 1 || candidates < 1)
    throw std::invalid_argument("got " + std::to_string(prompts) + " prompts x " + std::to_string(candidates) +
                                " candidates, expected at least 1 x 1");
  const int element = shape_.cache == DType::bfloat16 ? 2 : 4;
  const size_t head_bytes = static_cast<size_t>(packed_prefix_bytes(shape_.text_len, shape_.head_dim, shape_.cache));
  if (prompts != prompts_ || prompts * candidates != batch_) {
    cache_.clear();
    prompts_ = prompts, batch_ = prompts * candidates;
    const size_t ring = static_cast<size_t>(smaller(cells(), shape_.width + shape_.chunk));
    for (const LayerWeights& layer : layers_) {
      LayerCache c;
      c.prefix_k = Buffer(head_bytes * prompts * shape_.heads),
      c.prefix_v = Buffer(head_bytes * prompts * shape_.heads);
      const size_t tail = static_cast<size_t>(batch_) * layer.tail.slots * inner_ * element;
      c.tail_k = Buffer(tail), c.tail_v = Buffer(tail);
      if (shape_.token_shift)
        for (Buffer& b : c.shift) b = Buffer(static_cast<size_t>(batch_) * ring * (shape_.dim / 2) * 4);
      cache_.push_back(std::move(c));
    }
  }
  position_ = 0;
  std::vector<float> last(static_cast<size_t>(prompts) * shape_.image_vocab);
  for (int prompt = 0; prompt < prompts; ++prompt) {
    reserve(shape_.text_len, threads);
    std::memcpy(a_.as<float>(), x + static_cast<size_t>(prompt) * shape_.text_len * shape_.dim,
                static_cast<size_t>(shape_.text_len) * shape_.dim * 4);
    Rows rows{shape_.text_len, shape_.text_len, prompt, 1, true};
    run(rows, threads, start ? nullptr : last.data() + static_cast<size_t>(prompt) * shape_.image_vocab);
  }
  if (!start) {
    for (int b = 0; b < batch_; ++b)
      std::memcpy(logits + static_cast<size_t>(b) * shape_.image_vocab,
                  last.data() + static_cast<size_t>(b / candidates) * shape_.image_vocab,
                  static_cast<size_t>(shape_.image_vocab) * 4);
    return;
  }
  reserve(batch_, threads);
  for (int b = 0; b < batch_; ++b)
    std::memcpy(a_.as<float>() + static_cast<size_t>(b) * shape_.dim,
                start + static_cast<size_t>(b / candidates) * shape_.dim, static_cast<size_t>(shape_.dim) * 4);
  Rows rows{batch_, 1, 0, prompts_, false};
  run(rows, threads, logits);
  position_ = 1;
}

void Engine::feed(const int64_t* tokens, int count, int threads, float* logits) {
  advance(tokens, count, threads, logits, nullptr);
}

void Engine::sample(const int64_t* tokens, const Draw& draw, int threads, float* logits) {
  const bool guided = draw.guidance_scale != 1;
  if (draw.count * (guided ? 2 : 1) != batch_)
    throw std::invalid_argument("got " + std::to_string(draw.count) + " candidates" + (guided ? " with guidance" : "") +
                                " for a batch of " + std::to_string(batch_));
  const int vocab = shape_.image_vocab;
  const int64_t place = position_ + 1 - shape_.first_cell;  // of the token that the logits predict
  const size_t size = static_cast<size_t>(draw.count) * vocab;
  if (guided && mixed_.bytes() < size * 4) mixed_ = Buffer(size * 4);
  float* mixed = guided ? mixed_.as<float>() : logits;
  Drawing drawing({mixed, draw.candidates, &place, draw.tokens, draw.count, vocab, draw.top_k, draw.temperature,
                   draw.top_p, draw.seed, DType::float32},
                  logits, draw.given, draw.log_p);
  const Then then = [&](const Team& team) {
    if (guided) {
      long begin, end;
      team.share(static_cast<long>(size), 1024, &begin, &end);
      for (long i = begin; i < end; ++i) {
        const float without = logits[size + i];
        mixed[i] = without + draw.guidance_scale * (logits[i] - without);
      }
      team.wait();
    }
    drawing.run(team);
  };
  advance(tokens, 1, threads, logits, &then);
}

void Engine::advance(const int64_t* tokens, int count, int threads, float* logits, const Then* then) {
  if (!batch_) throw std::invalid_argument("got tokens before a prompt, expected prefill first");
  if (count < 1 || count > shape_.chunk || position_ + count > cells())
    throw std::invalid_argument("got " + std::to_string(count) + " tokens at cell " + std::to_string(position_) +
                                " of " + std::to_string(cells()) + ", expected at most " +
                                std::to_string(shape_.chunk) + " within the picture");
  for (int64_t i = 0; i < static_cast<int64_t>(batch_) * count; ++i)
    if (tokens[i] < 0 || tokens[i] >= shape_.image_vocab)
      throw std::invalid_argument("got image token " + std::to_string(tokens[i]) + ", expected 0 to " +
                                  std::to_string(shape_.image_vocab - 1));
  reserve(batch_ * count, threads);
  embed(tokens, count);
  Rows rows{batch_ * count, count, 0, prompts_, false};
  const int team = pick_team(rows.count, threads);
  const auto start = std::chrono::steady_clock::now();
  run(rows, team, logits, then);
  if (threads > 1)
    record_pace(team > 1, sleeps_, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  position_ += count;
}

int Engine::pick_team(int rows, int threads) {
  if (rows != pace_.rows) pace_ = Pace(), pace_.rows = rows;
  if (pace_.alone_left > 0) {
    --pace_.alone_left;
    return 1;
  }
  return threads;
}

void Engine::record_pace(bool team, int sleeps, double seconds) {
  (team ? pace_.team : pace_.alone) = seconds;
  if (!team || sleeps <= 2) return;
  if (pace_.alone == 0) pace_.alone_left = 1;  // time it
  else if (pace_.alone < pace_.team) pace_.alone_left = 64;
}

void Engine::embed(const int64_t* tokens, int count) {
  const int dim = shape_.dim;
  for (int row = 0; row < batch_ * count; ++row) {
    float* x = a_.as<float>() + static_cast<size_t>(row) * dim;
    const size_t at = static_cast<size_t>(tokens[row]) * dim;
    if (embedding_.type == DType::bfloat16) {
      for (int i = 0; i < dim; ++i) x[i] = bf16_to_float(embedding_.tokens.as<uint16_t>()[at + i]);
    } else {
      std::memcpy(x, embedding_.tokens.as<float>() + at, static_cast<size_t>(dim) * 4);
    }
    if (embedding_.rows.empty()) continue;
    const int place = position_ - shape_.first_cell + row % count + shape_.first_place;
    const float* r = embedding_.rows.data() + static_cast<size_t>(place / shape_.width) * dim;
    const float* c = embedding_.columns.data() + static_cast<size_t>(place % shape_.width) * dim;
    for (int i = 0; i < dim; ++i) x[i] = x[i] + r[i] + c[i];
  }
}

void Engine::fork(int candidates) {
  if (candidates < 1)
    throw std::invalid_argument("got " + std::to_string(candidates) + " candidates, expected at least 1");
  const auto repeat = [&](Buffer& buffer) {
    if (!buffer.bytes()) return;
    const size_t each = buffer.bytes() / batch_;
    Buffer wide(buffer.bytes() * candidates);
    for (int b = 0; b < batch_ * candidates; ++b)
      std::memcpy(wide.as<char>() + b * each, buffer.as<char>() + b / candidates * each, each);
    buffer = std::move(wide);
  };
  for (LayerCache& c : cache_) repeat(c.tail_k), repeat(c.tail_v), repeat(c.shift[0]), repeat(c.shift[1]);
  batch_ *= candidates;
}

int64_t Engine::weight_bytes() const {
  size_t total = embedding_.tokens.bytes() + (head_ ? head_->bytes() : 0);
  for (const LayerWeights& l : layers_) total += l.qkv->bytes() + l.out->bytes() + l.up->bytes() + l.down->bytes();
  return static_cast<int64_t>(total);
}

int64_t Engine::cache_bytes() const {
  size_t total = 0;
  for (const LayerCache& c : cache_)
    total += c.prefix_k.bytes() + c.prefix_v.bytes() + c.tail_k.bytes() + c.tail_v.bytes() + c.shift[0].bytes() +
             c.shift[1].bytes();
  return static_cast<int64_t>(total);
}

void Engine::reserve(int rows, int threads) {
  if (rows > row_capacity_) {
    const size_t n = static_cast<size_t>(rows);
    const int widest = std::max({shape_.dim, inner_, shape_.hidden});
    const size_t groups = static_cast<size_t>(round_up(widest, kPadding) / kGroup);
    a_ = Buffer(n * shape_.dim * 4), b_ = Buffer(shape_.reversible ? n * shape_.dim * 4 : 0),
    branch_ = Buffer(n * shape_.dim * 4);
    qkv_ = Buffer(n * 3 * inner_ * 4), attended_ = Buffer(n * inner_ * 4), hidden_ = Buffer(n * shape_.hidden * 4);
    encoded_ = Buffer(n * encoded_row_bytes(Encoding::float32, widest)), step_ = Buffer(n * 4);
    sums_ = Buffer(n * groups * 8);
    row_capacity_ = rows;
    workers_.clear();
  }
  int64_t slots = 0;
  for (const LayerWeights& l : layers_) slots = std::max<int64_t>(slots, l.tail.max_neighbours);
  if (static_cast<int>(workers_.size()) < threads) workers_.resize(static_cast<size_t>(threads));
  for (Worker& w : workers_)
    if (!w.floats.bytes())
      w.floats =
          Buffer(static_cast<size_t>(std::max<int64_t>(attend_scratch(round_up(shape_.text_len, kKeyBlock), slots),
                                                       2 * kPanel * row_capacity_) +
                                     2 * shape_.dim) *
                 4),
      w.attention.resize(static_cast<size_t>(row_capacity_));
}

}  // namespace dalle_fast::cpu
