#include "cpu/threads.h"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dalle_fast::cpu {
namespace {

constexpr int kBarrierSpins = 2000;  // about 20 µs

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// libgomp's entry points, if the process has loaded one: torch loads its own with global symbols.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool complete() const { return parallel && thread_num && num_threads && in_parallel; }
};

OpenMP find_openmp() {
  OpenMP found;
#if defined(__linux__)
  const auto symbol = [](const char* name) { return dlsym(RTLD_DEFAULT, name); };
  found.parallel = reinterpret_cast<decltype(found.parallel)>(symbol("GOMP_parallel"));
  found.thread_num = reinterpret_cast<decltype(found.thread_num)>(symbol("omp_get_thread_num"));
  found.num_threads = reinterpret_cast<decltype(found.num_threads)>(symbol("omp_get_num_threads"));
  found.in_parallel = reinterpret_cast<decltype(found.in_parallel)>(symbol("omp_in_parallel"));
#endif
  return found;
}

// A pool of our own: workers spin for about 50 µs after a job, as long as the gap between two steps, then sleep.
class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this, i] { work(i + 1); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int size() const { return static_cast<int>(threads_.size()) + 1; }

  void run(int count, const std::function<void(const Team&)>& body) {
    Barrier barrier;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body, barrier_ = &barrier, count_ = count;
      running_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(Team{0, count, &barrier});
    for (int spins = 0; running_.load(std::memory_order_acquire); ++spins) {
      if (spins < 4000) relax();
      else std::this_thread::yield();
    }
  }

 private:
  void work(int index) {
    unsigned seen = 0;
    for (;;) {
      for (int spins = 0; spins < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spins) relax();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        seen = generation_.load(std::memory_order_acquire);
        if (stop_) return;
      }
      if (index < count_) (*body_)(Team{index, count_, barrier_});
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> running_{0};
  const std::function<void(const Team&)>* body_ = nullptr;
  Barrier* barrier_ = nullptr;
  int count_ = 0;
  bool stop_ = false;
};

bool use_openmp() {
  const char* wanted = std::getenv("DALLE_FAST_CPU_POOL");
  const std::string name = wanted ? wanted : "";
  if (!name.empty() && name != "own" && name != "openmp")
    throw std::invalid_argument("got DALLE_FAST_CPU_POOL='" + name + "', expected own or openmp");
  if (name == "own") return false;
  const bool found = find_openmp().complete();
  if (name == "openmp" && !found) throw std::invalid_argument("DALLE_FAST_CPU_POOL=openmp, but no libgomp is loaded");
  return found;
}

void run_openmp(int threads, const std::function<void(const Team&)>& body) {
  static const OpenMP omp = find_openmp();
  struct Job {
    const std::function<void(const Team&)>* body;
    Barrier barrier;
  } job{&body, {}};
  omp.parallel(
      [](void* data) {
        Job* j = static_cast<Job*>(data);
        (*j->body)(Team{omp.thread_num(), omp.num_threads(), &j->barrier});  // the team may be smaller than asked for
      },
      &job, static_cast<unsigned>(threads), 0);
}

void run_own(int threads, const std::function<void(const Team&)>& body) {
  // One job at a time; callers from several Python threads take turns. Never destroyed: at exit the workers may be gone.
  static std::mutex turn;
  static Pool* pool = nullptr;
  static long owner = 0;
  std::lock_guard<std::mutex> lock(turn);
#if defined(__unix__) || defined(__APPLE__)
  if (pool && owner != getpid()) pool = nullptr;  // after fork() the child has no workers; the old object is left alone
  owner = getpid();
#endif
  if (!pool || pool->size() < threads) {
    delete pool;
    pool = new Pool(threads - 1);
  }
  pool->run(threads, body);
}

}  // namespace

void Barrier::wait(int count) {
  const unsigned phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_seq_cst);
#if defined(__linux__)
    if (sleepers_.load(std::memory_order_seq_cst))
      syscall(SYS_futex, reinterpret_cast<unsigned*>(&phase_), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#endif
    return;
  }
  for (int spins = 0; spins < kBarrierSpins; ++spins, relax())
    if (phase_.load(std::memory_order_acquire) != phase) return;
  sleeps_.fetch_add(1, std::memory_order_relaxed);
#if defined(__linux__)
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (phase_.load(std::memory_order_seq_cst) == phase)
    syscall(SYS_futex, reinterpret_cast<unsigned*>(&phase_), FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
#else
  while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
#endif
}

const char* pool_name() { return use_openmp() ? "openmp" : "own"; }

void run_team(int threads, const std::function<void(const Team&)>& body) {
  static const bool openmp = use_openmp();
  if (threads <= 1) {
    Barrier barrier;
    body(Team{0, 1, &barrier});
  } else if (openmp) {
    run_openmp(threads, body);
  } else {
    run_own(threads, body);
  }
}

}  // namespace dalle_fast::cpu
