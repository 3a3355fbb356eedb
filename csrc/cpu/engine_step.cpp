// One pass through the blocks. Threads meet at a barrier wherever one needs what another has written; between barriers
// each has its own rows, panels of a weight, or heads.
#include <cmath>

#include "cpu/engine.h"

namespace dalle_fast::cpu {
namespace {

void store_cached(const float* x, int n, DType cache, void* base, int64_t at) {
  if (cache == DType::float32) std::memcpy(static_cast<float*>(base) + at, x, static_cast<size_t>(n) * 4);
  else kernels().to_bf16(x, n, static_cast<uint16_t*>(base) + at);
}

}  // namespace

Encoded Engine::encoded(const PackedLinear& weight) const {
  Encoded e;
  const int64_t width = round_up(weight.view().inputs, kPadding);
  e.encoding = kernels().encoding(weight.view().type);
  e.data = encoded_.as<uint8_t>(), e.step = step_.as<float>(), e.sums = sums_.as<int32_t>();
  e.row_bytes = encoded_row_bytes(e.encoding, weight.view().inputs);
  e.sums_per_row = static_cast<int>(width / kGroup * 2);
  return e;
}

void Engine::encode(const PackedLinear& weight, const float* x, long begin, long end) const {
  const Encoded e = encoded(weight);
  const int n = weight.view().inputs;
  for (long row = begin; row < end; ++row) {
    const int64_t width = round_up(n, kPadding);
    const bool integers = e.encoding == Encoding::split16 || e.encoding == Encoding::int16;  // write zeros themselves
    if (n < width && !integers) {  // the padding may hold another layer's numbers
      const size_t size = e.encoding == Encoding::float32 ? 4 : 2;
      std::memset(e.data + row * e.row_bytes + n * size, 0, static_cast<size_t>(width - n) * size);
    }
    kernels().encode(x + static_cast<size_t>(row) * n, n, static_cast<int>(row), e);
  }
}

void Engine::linear(const PackedLinear& weight, int rows, const Team& team, const LinearOutput& out,
                    Worker& worker) const {
  long begin, end;
  team.share(weight.view().panels, out.epilogue == Epilogue::geglu ? 2 : 1, &begin, &end);
  if (begin < end)
    kernels().linear(weight.view(), encoded(weight), rows, static_cast<int>(begin), static_cast<int>(end), out,
                     worker.floats.as<float>());
}

// DALLE-pytorch's token shift of a normalised row: half of the channels come from earlier positions. A text row is
// shifted from the last row to the first, in place; a cell's own channels go into a ring for those that come.
void Engine::shift(const Rows& rows, int branch, int row, float* h) {
  const int dim = shape_.dim, quarter = dim / 4, half = 2 * quarter;
  const int sequence = row / rows.per_sequence, cell = position_ + row % rows.per_sequence;
  const int ring = static_cast<int>(smaller(cells(), shape_.width + shape_.chunk));
  float* line = cache_[branch / 2].shift[branch % 2].as<float>() + static_cast<size_t>(sequence) * ring * half;
  std::memcpy(line + static_cast<size_t>(cell % ring) * half, h, static_cast<size_t>(half) * 4);
  const float* above = cell >= shape_.width ? line + static_cast<size_t>((cell - shape_.width) % ring) * half : nullptr;
  const float* left = cell % shape_.width ? line + static_cast<size_t>((cell - 1) % ring) * half : nullptr;
  for (int i = 0; i < quarter; ++i) {
    h[i] = above ? above[i] : 0.0f;
    h[quarter + i] = left ? left[quarter + i] : 0.0f;
  }
}

// Rows [begin, end) of norm(x), shifted, into branch_. Whole sequences where rows are shifted.
void Engine::encode_norm(const Rows& rows, const Norm& norm, int branch, const float* x, long begin, long end,
                         Worker& worker) {
  const int dim = shape_.dim;
  float* h = branch_.as<float>();
  (void)worker;
  for (long row = begin; row < end; ++row) {
    kernels().layer_norm(x + static_cast<size_t>(row) * dim, norm.weight.data(), norm.bias.data(), shape_.norm_eps, dim,
                         h + static_cast<size_t>(row) * dim);
    if (shape_.token_shift && !rows.text)
      shift(rows, branch, static_cast<int>(row), h + static_cast<size_t>(row) * dim);
  }
  if (shape_.token_shift && rows.text) {
    const size_t half = static_cast<size_t>(dim / 2);
    for (long row = end - 1; row > begin; --row)
      std::memcpy(h + static_cast<size_t>(row) * dim, h + static_cast<size_t>(row - 1) * dim, half * 4);
    if (begin < end) std::memset(h + static_cast<size_t>(begin) * dim, 0, half * 4);
  }
}

void Engine::attend(const Rows& rows, int layer, const Team& team, Worker& worker) {
  const int heads = shape_.heads, dim = shape_.head_dim, per = rows.per_sequence;
  LayerCache& cache = cache_[layer];
  const TailTables& tail = layers_[layer].tail;
  const int64_t head_bytes = packed_prefix_bytes(shape_.text_len, dim, shape_.cache);
  const int sequences = rows.count / per, group = sequences / rows.prompts;
  // A head of a prompt is one piece of work; where those are too few for the threads, its candidates are split.
  const int whole = rows.prompts * heads;
  const int parts = rows.text || whole % team.count == 0 || whole >= 4 * team.count
                        ? 1
                        : static_cast<int>(smaller(group, (4 * team.count + whole - 1) / whole));
  long begin, end;
  team.share(static_cast<long>(whole) * parts, 1, &begin, &end);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  float* qkv = qkv_.as<float>();
  for (long item = begin; item < end; ++item) {
    const int part = static_cast<int>(item % parts), head = static_cast<int>(item / parts % heads),
              in_pass = static_cast<int>(item / parts / heads);
    const int prompt = rows.text ? rows.prompt : in_pass;
    PackedPrefix prefix{cache.prefix_k.as<char>() + (static_cast<int64_t>(prompt) * heads + head) * head_bytes,
                        cache.prefix_v.as<char>() + (static_cast<int64_t>(prompt) * heads + head) * head_bytes,
                        static_cast<int32_t>(round_up(shape_.text_len, kKeyBlock))};
    const int first = in_pass * group + group * part / parts,
              last = in_pass * group + group * (part + 1) / parts;  // sequences
    int count = 0;
    for (int row = first * per; row < last * per; ++row) {
      float* q = qkv + static_cast<size_t>(row) * 3 * inner_ + static_cast<size_t>(head) * dim;
      float *k = q + inner_, *v = k + inner_;
      const int place = rows.text ? row : shape_.text_len + position_ + row % per;
      if (shape_.rotary_dim)
        for (float* x : {q, k, v})
          kernels().rotate(x, cosines_.data() + static_cast<size_t>(place) * shape_.rotary_dim,
                           sines_.data() + static_cast<size_t>(place) * shape_.rotary_dim, shape_.rotary_dim);
      AttentionRow& a = worker.attention[count++];
      a = AttentionRow{q,
                       attended_.as<float>() + static_cast<size_t>(row) * inner_ + static_cast<size_t>(head) * dim,
                       nullptr,
                       nullptr,
                       nullptr,
                       0,
                       shape_.text_len};
      if (rows.text) {
        a.prefix_len = row + 1;
        continue;
      }
      const int cell = position_ + row % per;
      const int64_t base = (static_cast<int64_t>(row / per) * heads + head) * tail.slots * dim;
      const int64_t at = base + static_cast<int64_t>(tail.slot_of_cell[cell]) * dim;
      store_cached(k, dim, shape_.cache, cache.tail_k.as<char>(), at);
      store_cached(v, dim, shape_.cache, cache.tail_v.as<char>(), at);
      const int64_t element = shape_.cache == DType::float32 ? 4 : 2;
      a.tail_k = cache.tail_k.as<char>() + base * element, a.tail_v = cache.tail_v.as<char>() + base * element;
      a.slots = tail.neighbour_slots.data() + static_cast<size_t>(cell) * tail.max_neighbours;
      a.count = tail.neighbour_count[cell];
    }
    if (!rows.text) {
      kernels().attend(prefix, worker.attention.data(), count, dim, scale, shape_.cache, worker.floats.as<float>());
      continue;
    }
    const float* k = qkv + inner_ + static_cast<size_t>(head) * dim;
    pack_prefix(k, k + inner_, DType::float32, shape_.text_len, 3 * inner_, dim, shape_.cache,
                const_cast<void*>(prefix.k), const_cast<void*>(prefix.v));
    for (int row = 0; row < count; row += kQueries) {  // a text position needs only the keys up to its own
      const int some = static_cast<int>(smaller(kQueries, count - row));
      prefix.keys = static_cast<int32_t>(round_up(row + some, kKeyBlock));
      kernels().attend(prefix, worker.attention.data() + row, some, dim, scale, shape_.cache,
                       worker.floats.as<float>());
    }
  }
}

void Engine::run(Rows& rows, int threads, float* logits, const Then* then) {
  const int dim = shape_.dim;
  const bool sandwich = shape_.sandwich_norm;
  float* a = a_.as<float>();                          // attention adds to this stream and reads the other,
  float* b = shape_.reversible ? b_.as<float>() : a;  // the MLP the other way round; one stream unless reversible
  if (shape_.reversible) std::memcpy(b, a, static_cast<size_t>(rows.count) * dim * 4);
  // Shifted rows look at their neighbours: a thread then takes whole sequences.
  const int unit = shape_.token_shift ? rows.per_sequence : 1;
  const int last_rows = rows.count / rows.per_sequence;
  sleeps_ = 0;
  run_team(threads, [&](const Team& team) {
    Worker& worker = workers_[team.index];
    long begin, end;
    team.share(rows.count, unit, &begin, &end);
    const auto add_normed = [&](const Norm& norm, float* stream) {  // stream += norm(branch)
      float* line = worker.floats.as<float>();
      for (long row = begin; row < end; ++row) {
        kernels().layer_norm(branch_.as<float>() + static_cast<size_t>(row) * dim, norm.weight.data(), norm.bias.data(),
                             shape_.norm_eps, dim, line);
        float* x = stream + static_cast<size_t>(row) * dim;
        for (int i = 0; i < dim; ++i) x[i] += line[i];
      }
    };
    for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
      const LayerWeights& w = layers_[layer];
      if (sandwich && layer) add_normed(layers_[layer - 1].mlp_norm_out, b);
      encode_norm(rows, w.attention_norm, 2 * layer, b, begin, end, worker);
      encode(*w.qkv, branch_.as<float>(), begin, end);
      team.wait();
      linear(*w.qkv, rows.count, team, {qkv_.as<float>(), nullptr, 3 * inner_, Epilogue::none}, worker);
      team.wait();
      attend(rows, layer, team, worker);
      team.wait();
      encode(*w.out, attended_.as<float>(), begin, end);
      team.wait();
      if (sandwich) linear(*w.out, rows.count, team, {branch_.as<float>(), nullptr, dim, Epilogue::none}, worker);
      else linear(*w.out, rows.count, team, {a, a, dim, Epilogue::none}, worker);
      team.wait();
      if (sandwich) add_normed(w.attention_norm_out, a);
      encode_norm(rows, w.mlp_norm, 2 * layer + 1, a, begin, end, worker);
      encode(*w.up, branch_.as<float>(), begin, end);
      team.wait();
      linear(*w.up, rows.count, team, {hidden_.as<float>(), nullptr, shape_.hidden, shape_.activation}, worker);
      team.wait();
      encode(*w.down, hidden_.as<float>(), begin, end);
      team.wait();
      if (sandwich) linear(*w.down, rows.count, team, {branch_.as<float>(), nullptr, dim, Epilogue::none}, worker);
      else linear(*w.down, rows.count, team, {b, b, dim, Epilogue::none}, worker);
      team.wait();
    }
    if (!logits) return;  // a text pass
    if (sandwich) add_normed(layers_.back().mlp_norm_out, b);
    team.wait();
    // The last position of every sequence goes on to the head.
    team.share(last_rows, 1, &begin, &end);
    for (long s = begin; s < end; ++s) {
      const size_t from = (static_cast<size_t>(s + 1) * rows.per_sequence - 1) * dim;
      float* line = worker.floats.as<float>();
      for (int i = 0; i < dim; ++i) line[i] = shape_.reversible ? (a[from + i] + b[from + i]) / 2 : a[from + i];
      for (const Norm& norm : final_norms_)
        kernels().layer_norm(line, norm.weight.data(), norm.bias.data(), shape_.norm_eps, dim, line);
      std::memcpy(branch_.as<float>() + static_cast<size_t>(s) * dim, line, static_cast<size_t>(dim) * 4);
    }
    encode(*head_, branch_.as<float>(), begin, end);
    team.wait();
    linear(*head_, last_rows, team, {logits, nullptr, shape_.image_vocab, Epilogue::none}, worker);
    if (then) {
      team.wait();
      (*then)(team);
    }
    if (team.index == 0) sleeps_ = team.barrier->sleeps();
  });
}

}  // namespace dalle_fast::cpu
