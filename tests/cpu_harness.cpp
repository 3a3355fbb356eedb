// Runs the CPU kernels on awkward sizes under a sanitizer (tests/test_cpu_sanitizers.py): what it computes is checked
// elsewhere, here only that memory and threads are used as they should be. Inputs are exactly as large as they may be read.
#include <cmath>
#include <cstdio>
#include <random>

#include "cpu/engine.h"
#include "cpu/ops.h"

using namespace dalle_fast;
using namespace dalle_fast::cpu;

static std::mt19937 generator(1);

static std::vector<float> random(size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(generator);
  return x;
}

static std::unique_ptr<PackedLinear> packed(DType type, int rows, int inputs, bool geglu, int threads) {
  const size_t r = static_cast<size_t>(rows);
  const std::vector<float> weight = random(r * inputs), bias = random(r), scale(r * ((inputs + 127) / 128), 0.01f);
  std::vector<uint8_t> bytes(r * inputs);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator());
  const bool integer = type == DType::int8 || type == DType::int4;
  bytes.resize(type == DType::int4 ? r * ((inputs + 1) / 2) : bytes.size());
  bytes.shrink_to_fit();
  const void* data = integer ? static_cast<const void*>(bytes.data()) : weight.data();
  return std::make_unique<PackedLinear>(
      type,
      WeightSource{integer ? type : DType::float32, data, integer ? scale.data() : nullptr, bias.data(), nullptr, rows,
                   inputs, geglu},
      threads);
}

static void linears(DType type, int threads) {
  for (int inputs : {1, 17, 129})
    for (int rows : {1, 5, 19}) {
      for (Epilogue epilogue : {Epilogue::none, Epilogue::gelu_erf, Epilogue::geglu}) {
        const int outputs = 33;
        const bool geglu = epilogue == Epilogue::geglu;
        const auto weight = packed(type, geglu ? 2 * outputs : outputs, inputs, geglu, threads);
        const size_t n = static_cast<size_t>(rows);
        const std::vector<float> x = random(n * inputs), residual = random(n * outputs),
                                 norm = random(static_cast<size_t>(inputs));
        std::vector<float> y(n * outputs);
        skinny_linear({x.data(), nullptr, nullptr, residual.data(), norm.data(), norm.data(), y.data(), rows, inputs,
                       outputs, 1e-5f, epilogue, type},
                      *weight, threads);
      }
    }
}

static void engine(DType type, DType cache, int threads) {
  EngineShape s{};
  s.dim = 20, s.hidden = 36, s.heads = 3, s.head_dim = 16, s.text_len = 7, s.height = 3, s.width = 4,
  s.image_vocab = 37;
  s.rotary_dim = 6, s.final_norms = 2, s.sandwich_norm = true, s.token_shift = true, s.activation = Epilogue::geglu;
  s.norm_eps = 1e-5f, s.cache = cache, s.chunk = 3;
  const int cells = s.height * s.width;
  Engine e(s, random(static_cast<size_t>(s.text_len + cells) * s.rotary_dim));
  const auto norm = [&] { return Norm{random(20), random(20)}; };
  for (int layer = 0; layer < 2; ++layer) {
    LayerWeights w;
    w.attention_norm = norm(), w.mlp_norm = norm(), w.attention_norm_out = norm(), w.mlp_norm_out = norm();
    w.qkv = packed(type, 3 * 48, 20, false, threads), w.out = packed(type, 20, 48, false, threads);
    w.up = packed(type, 72, 20, true, threads), w.down = packed(type, 20, 36, false, threads);
    w.tail = {cells, cells, {}, std::vector<int32_t>(static_cast<size_t>(cells) * cells), {}};
    for (int c = 0; c < cells; ++c) {  // every earlier cell
      w.tail.slot_of_cell.push_back(c), w.tail.neighbour_count.push_back(c + 1);
      for (int i = 0; i <= c; ++i) w.tail.neighbour_slots[static_cast<size_t>(c) * cells + i] = i;
    }
    e.add_layer(std::move(w));
  }
  Buffer tokens(static_cast<size_t>(s.image_vocab) * s.dim * 4);
  e.set_embedding({DType::float32, std::move(tokens), random(3 * 20), random(4 * 20)});
  e.set_head({norm(), norm()}, packed(type, s.image_vocab, 20, false, threads));
  const std::vector<float> text = random(2 * 7 * 20);
  std::vector<float> logits(2 * 37);
  e.prefill(text.data(), nullptr, 2, 1, threads, logits.data());
  const std::vector<int64_t> first(2 * 3, 36);
  e.feed(first.data(), 3, threads, logits.data());
  e.fork(3);
  logits.assign(6 * 37, 0);
  const std::vector<int64_t> next(6, 0), candidates{0, 1, 2, -1, int64_t{1} << 40, 5};
  std::vector<int64_t> drawn(6);
  std::vector<double> log_p(6);
  const std::vector<int64_t> given{-1, 4, -1};
  for (int64_t step = 3; step < cells; ++step) {
    if (step % 2) e.feed(next.data(), 1, threads, logits.data());
    else if (step % 4)
      e.sample(next.data(), {candidates.data(), nullptr, 6, 1.0f, 1.0f, 1.0f, 0, 7, drawn.data(), log_p.data()}, threads,
               logits.data());
    else
      e.sample(next.data(), {candidates.data(), given.data(), 3, 0.5f, 0.9f, 2.0f, 5, 7, drawn.data(), log_p.data()},
               threads, logits.data());
    for (int top_k : {0, 1, 5})
      for (float top_p : {1.0f, 0.3f})
        sample({logits.data(), candidates.data(), &step, drawn.data(), 6, 37, top_k, 1.0f, top_p, 7, DType::float32},
               threads);
  }
  for (float x : logits)
    if (!std::isfinite(x)) std::printf("not finite\n");
}

static void sequences(DType type, int threads) {
  const int batch = 2, heads = 3, dim = 48, text = 5, cells = 40;
  const size_t element = type == DType::float32 ? 4 : 2;
  std::vector<int32_t> neighbours(cells * 2), count(cells, 2);
  for (int c = 0; c < cells; ++c) neighbours[2 * c] = c ? c - 1 : 0, neighbours[2 * c + 1] = c, count[0] = 1;
  for (int len : {text, text + 1, text + cells}) {
    const std::vector<char> x(static_cast<size_t>(batch) * heads * len * dim * element);
    std::vector<char> out(x.size());
    std::vector<float> lse(static_cast<size_t>(batch) * heads * len);
    const int64_t head = static_cast<int64_t>(len) * dim, all = head * heads;
    sparse_attention({x.data(), x.data(), x.data(), {all, head, dim}, {all, head, dim}, out.data(), lse.data(),
                      neighbours.data(), count.data(), batch, heads, len, text, dim, 2, 0.1f, type},
                     threads);
  }
}

static void attention(DType type, int threads) {
  const int prompts = 2, batch = 6, heads = 1, n = 2, dim = 48, text = 5, slots = 4, cells = 8;
  const size_t element = type == DType::float32 ? 4 : 2;
  const auto zeros = [&](size_t count) { return std::vector<char>(count * element); };
  const std::vector<char> q = zeros(batch * heads * n * dim), prefix = zeros(prompts * heads * text * dim);
  std::vector<char> tail_k = zeros(batch * heads * slots * dim), tail_v = tail_k, out = q;
  std::vector<int32_t> slot(cells), neighbours(cells * 2), count(cells, 2);
  for (int c = 0; c < cells; ++c)
    slot[c] = c % slots, neighbours[2 * c] = (c + slots - 1) % slots, neighbours[2 * c + 1] = c % slots;
  for (int64_t position = 0; position + n <= cells; position += n)
    decode_attention({q.data(),
                      q.data(),
                      q.data(),
                      prefix.data(),
                      prefix.data(),
                      tail_k.data(),
                      tail_v.data(),
                      out.data(),
                      &position,
                      slot.data(),
                      neighbours.data(),
                      count.data(),
                      batch,
                      prompts,
                      heads,
                      n,
                      dim,
                      text,
                      slots,
                      cells,
                      2,
                      0.1f,
                      type},
                     threads);
}

int main() {
  for (int threads : {1, 3}) {
    for (DType type : {DType::float32, DType::bfloat16, DType::int8, DType::int4}) linears(type, threads);
    engine(DType::int8, DType::bfloat16, threads), engine(DType::int4, DType::float32, threads);
    engine(DType::float32, DType::float32, threads), engine(DType::bfloat16, DType::bfloat16, threads);
    attention(DType::float32, threads), attention(DType::bfloat16, threads);
    sequences(DType::float32, threads), sequences(DType::bfloat16, threads);
  }
  std::printf("done %s %s\n", kernels().name, pool_name());
}
