// logits -> token: exact top-k, exact top-p, Gumbel-max. Selection works on order-preserving integer keys by histograms of
// their high bits, so that only one bin is ever sorted: V = 8192 takes microseconds where a sort takes half a millisecond.
#include <algorithm>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace dalle_fast::cpu {
namespace {

constexpr int kBinBits = 12;

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
  std::vector<float> scaled, probability, noise;
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
void keep_top_p(float top_p, Scratch& s) {
  const int count = static_cast<int>(s.kept.size());
  s.probability.resize(count);
  float most = s.scaled[s.kept[0]];
  for (const int32_t t : s.kept) most = std::max(most, s.scaled[t]);
  for (int i = 0; i < count; ++i) s.probability[i] = s.scaled[s.kept[i]];
  kernels().exponentials(s.probability.data(), most, count, s.probability.data());
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
  std::vector<int32_t> kept;
  for (int i = 0; i < count; ++i)
    if (static_cast<int>(s.keys[s.kept[i]] >> (32 - kBinBits)) > bin) kept.push_back(s.kept[i]);
  for (size_t i = 0; i < take; ++i) kept.push_back(s.kept[s.bin[i].token]);
  std::sort(kept.begin(), kept.end());
  s.kept.swap(kept);
}

int64_t draw(const SampleParams& p, int row, Scratch& s) {
  const float* logits = static_cast<const float*>(p.logits) + static_cast<size_t>(row) * p.vocab;
  s.scaled.resize(p.vocab);
  // Relative to the largest: neither choice nor probabilities change, and no temperature overflows.
  const float largest = *std::max_element(logits, logits + p.vocab);
  for (int t = 0; t < p.vocab; ++t) s.scaled[t] = (logits[t] - largest) / p.temperature;
  const uint64_t candidate = static_cast<uint64_t>(p.candidates[row]);
  const uint32_t position = static_cast<uint32_t>(*p.position);
  const bool all = (p.top_k <= 0 || p.top_k >= p.vocab) && p.top_p >= 1;
  if (!all) {
    s.keys.resize(p.vocab);
    for (int t = 0; t < p.vocab; ++t) s.keys[t] = ordered(logits[t]);
    if (p.top_k > 0 && p.top_k < p.vocab) {
      keep_top_k(p.top_k, s);
    } else {
      s.kept.resize(p.vocab);
      for (int t = 0; t < p.vocab; ++t) s.kept[t] = t;
    }
    if (p.top_p < 1) keep_top_p(p.top_p, s);
  }
  const int count = all ? p.vocab : static_cast<int>(s.kept.size());
  s.noise.resize(static_cast<size_t>(count));
  kernels().gumbel(p.seed, candidate, position, all ? nullptr : s.kept.data(), count, s.noise.data());
  int best = 0;
  float most = -__builtin_inff();
  for (int i = 0; i < count; ++i) {  // ascending tokens: the first of equals stays
    const float score = s.scaled[all ? i : s.kept[i]] + s.noise[i];
    if (score > most) most = score, best = i;
  }
  return all ? best : s.kept[best];
}

}  // namespace

void sample(const SampleParams& p, int threads) {
  run_team(static_cast<int>(smaller(threads, p.batch)), [&](const Team& team) {
    static thread_local Scratch scratch;
    long begin, end;
    team.share(p.batch, 1, &begin, &end);
    for (long row = begin; row < end; ++row) p.tokens[row] = draw(p, static_cast<int>(row), scratch);
  });
}

}  // namespace dalle_fast::cpu
