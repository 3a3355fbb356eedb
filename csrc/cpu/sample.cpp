// logits -> token: exact top-k, exact top-p, Gumbel-max. Selection works on order-preserving integer keys by histograms of
// their high bits, so that only one bin is ever sorted: V = 8192 takes microseconds where a sort takes half a millisecond.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace dalle_fast::cpu {
namespace {

constexpr int kBinBits = 12;
constexpr int kPiece = 2048;  // tokens of a row that a thread looks at by itself: about 3 µs; a multiple of 64

// Larger float, larger key; -0 and 0 are one key, as they compare equal.
uint32_t ordered(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Item {
  uint32_t key;
  int32_t token;
  bool operator<(const Item& o) const { return key != o.key ? key > o.key : token < o.token; }  // most probable first
};

struct Scratch {
  std::vector<float> probability, noise;
  std::vector<uint32_t> keys;
  std::vector<int32_t> kept;
  std::vector<Item> bin;
  std::vector<int32_t> counts;
  std::vector<double> mass;
};

// Keeps exactly the k most probable of all tokens; kept stays in ascending order.
void keep_top_k(int k, Scratch& s) {
  const int vocab = static_cast<int>(s.keys.size());
  s.counts.assign(1 << kBinBits, 0);
  for (const uint32_t key : s.keys) ++s.counts[key >> (32 - kBinBits)];
  int bin = (1 << kBinBits) - 1, before = 0;
  while (before + s.counts[bin] < k) before += s.counts[bin--];
  s.bin.clear();
  for (int t = 0; t < vocab; ++t)
    if (static_cast<int>(s.keys[t] >> (32 - kBinBits)) == bin) s.bin.push_back({s.keys[t], t});
  std::nth_element(s.bin.begin(), s.bin.begin() + (k - before - 1), s.bin.end());
  const Item last = s.bin[k - before - 1];
  s.kept.clear();
  for (int t = 0; t < vocab; ++t)
    if (!(last < Item{s.keys[t], t})) s.kept.push_back(t);
}

// Of the kept tokens, the smallest set of the most probable whose probability reaches p; at least one.
void keep_top_p(const float* logits, float largest, float temperature, float top_p, Scratch& s) {
  const int count = static_cast<int>(s.kept.size());
  s.probability.resize(count);
  for (int i = 0; i < count; ++i) s.probability[i] = (logits[s.kept[i]] - largest) / temperature;
  kernels().exponentials(s.probability.data(), 0, count, s.probability.data());
  double total = 0;
  s.mass.assign(1 << kBinBits, 0.0);
  for (int i = 0; i < count; ++i) {
    total += s.probability[i];
    s.mass[s.keys[s.kept[i]] >> (32 - kBinBits)] += s.probability[i];
  }
  const double target = static_cast<double>(top_p) * total;
  int top = (1 << kBinBits) - 1;
  while (s.mass[top] == 0) --top;
  int bin = top;
  double before = 0;
  while (bin > 0 && before + s.mass[bin] < target) before += s.mass[bin--];
  s.bin.clear();
  for (int i = 0; i < count; ++i)
    if (static_cast<int>(s.keys[s.kept[i]] >> (32 - kBinBits)) == bin) s.bin.push_back({s.keys[s.kept[i]], i});
  std::sort(s.bin.begin(), s.bin.end());
  size_t take = 0;
  while (take < s.bin.size() && (before < target || (bin == top && take == 0)))
    before += s.probability[s.bin[take++].token];
  const Item last = s.bin[take - 1];  // its token is a place in kept
  size_t stays = 0;
  for (int i = 0; i < count; ++i)
    if (!(last < Item{s.keys[s.kept[i]], i})) s.kept[stays++] = s.kept[i];
  s.kept.resize(stays);
}

// Where top_k or top_p cuts tokens.
int64_t draw_kept(const SampleParams& p, const float* logits, float largest, uint64_t candidate, uint32_t position,
                  Scratch& s) {
  s.keys.resize(p.vocab);
  for (int t = 0; t < p.vocab; ++t) s.keys[t] = ordered(logits[t]);
  if (p.top_k > 0 && p.top_k < p.vocab) {
    keep_top_k(p.top_k, s);
  } else {
    s.kept.resize(p.vocab);
    for (int t = 0; t < p.vocab; ++t) s.kept[t] = t;
  }
  if (p.top_p < 1) keep_top_p(logits, largest, p.temperature, p.top_p, s);
  // One block of four random words serves four neighbouring tokens: for many of them all noise is the cheaper way.
  const int count = static_cast<int>(s.kept.size());
  const bool whole = count > p.vocab / 4;
  s.noise.resize(static_cast<size_t>(whole ? p.vocab : count));
  kernels().gumbel(p.seed, candidate, position, whole ? nullptr : s.kept.data(), static_cast<int>(s.noise.size()),
                   s.noise.data());
  int best = 0;
  float most = -__builtin_inff();
  for (int i = 0; i < count; ++i) {  // ascending tokens: the first of equals stays
    const float score = (logits[s.kept[i]] - largest) / p.temperature + s.noise[whole ? s.kept[i] : i];
    if (score > most) most = score, best = i;
  }
  return s.kept[best];
}

}  // namespace

Drawing::Drawing(const SampleParams& p, const float* own, const int64_t* given, double* log_p)
    : p_(p),
      own_(own),
      given_(given),
      log_p_(log_p),
      all_((p.top_k <= 0 || p.top_k >= p.vocab) && p.top_p >= 1),
      per_row_((p.vocab + kPiece - 1) / kPiece),
      pieces_(static_cast<size_t>(p.batch) * per_row_) {}

// Scores are relative to the row's largest logit: neither choice nor probabilities change, and no temperature overflows.
Drawing::Piece Drawing::look(int row, int first, int count, bool choose) const {
  const size_t at = static_cast<size_t>(row) * p_.vocab;
  const float *logits = static_cast<const float*>(p_.logits) + at, *own = own_ ? own_ + at : logits;
  Piece piece{{0, 0}, 0, 0};
  const float most = kernels().maximum(logits, p_.vocab);
  if (choose)
    piece.best = kernels().choose(p_.seed, static_cast<uint64_t>(p_.candidates[row]),
                                  static_cast<uint32_t>(*p_.position), logits, most, p_.temperature, first, count);
  if (log_p_) {
    piece.most = own == logits ? most : kernels().maximum(own, p_.vocab);
    piece.sum = kernels().exponential_sum(own + first, piece.most, count);
  }
  return piece;
}

void Drawing::run(const Team& team) {
  static thread_local Scratch scratch;
  long begin, end;
  team.share(pieces(), 1, &begin, &end);
  for (long i = begin; i < end; ++i) {
    const int row = static_cast<int>(i / per_row_), first = static_cast<int>(i % per_row_) * kPiece;
    pieces_[i] = look(row, first, static_cast<int>(smaller(kPiece, p_.vocab - first)),
                      all_ && !(given_ && given_[row] >= 0));
  }
  team.wait();
  team.share(p_.batch, 1, &begin, &end);
  for (long row = begin; row < end; ++row) {
    const float* logits = static_cast<const float*>(p_.logits) + static_cast<size_t>(row) * p_.vocab;
    const Piece* pieces = pieces_.data() + row * per_row_;
    int64_t token = pieces[0].best.token;
    float best = pieces[0].best.score;
    double sum = 0;
    for (int i = 0; i < per_row_; ++i) {
      sum += pieces[i].sum;
      if (pieces[i].best.score > best) best = pieces[i].best.score, token = pieces[i].best.token;
    }
    if (given_ && given_[row] >= 0)
      token = given_[row];
    else if (!all_)
      token = draw_kept(p_, logits, kernels().maximum(logits, p_.vocab), static_cast<uint64_t>(p_.candidates[row]),
                        static_cast<uint32_t>(*p_.position), scratch);
    p_.tokens[row] = token;
    if (log_p_) {
      const float* own = own_ ? own_ + static_cast<size_t>(row) * p_.vocab : logits;
      log_p_[row] = static_cast<double>(own[token]) - pieces[0].most - std::log(sum);
    }
  }
}

void sample(const SampleParams& p, int threads) {
  Drawing drawing(p, nullptr, nullptr, nullptr);
  run_team(static_cast<int>(smaller(threads, drawing.pieces())), [&](const Team& team) { drawing.run(team); });
}

}  // namespace dalle_fast::cpu
