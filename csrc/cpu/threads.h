// Running one function on several threads, and the barrier between the phases of that function.
#pragma once

#include <atomic>
#include <functional>

namespace dalle_fast::cpu {

// All `count` threads of a team call wait(); none goes on before the last has come. Spins, then sleeps: phases last
// microseconds, but where another process holds the core of a thread that everyone waits for, a sleeper's core takes it over.
class Barrier {
 public:
  void wait(int count);
  int sleeps() const { return sleeps_.load(std::memory_order_relaxed); }  // waits so far that outlasted the spinning

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
  std::atomic<int> sleepers_{0}, sleeps_{0};
};

struct Team {
  int index;
  int count;
  Barrier* barrier;
  void wait() const {
    if (count > 1) barrier->wait(count);
  }
  // This thread's share [begin, end) of `items`, in whole units.
  void share(long items, long unit, long* begin, long* end) const {
    const long units = (items + unit - 1) / unit;
    *begin = units * index / count * unit;
    *end = units * (index + 1) / count * unit;
    if (*end > items) *end = items;
    if (*begin > items) *begin = items;
  }
};

// Calls body once on each of up to `threads` threads, the caller's among them, and returns when all are done. The body
// must not throw. Where libgomp is already loaded (torch brings it), its threads are used: two pools on the same cores
// would each spin while the other has work. DALLE_FAST_CPU_POOL=own or openmp forces the choice.
void run_team(int threads, const std::function<void(const Team&)>& body);

// "openmp" or "own": what run_team uses in this process.
const char* pool_name();

}  // namespace dalle_fast::cpu
