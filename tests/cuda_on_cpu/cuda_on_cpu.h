// Runs CUDA C++ on a CPU: g++ compiles the very .cu sources of csrc/ against this header and executes them, to test them.
//
// Blocks run one after the other, threads as fibres that change at barriers and warp operations. Shared memory is reached
// through shared<T>, which on a GPU is T* (csrc/common.cuh); here every access is checked. A launch fails, and says where, on
//   - a race: a thread reads or writes shared bytes that another one wrote (or overwrites what another one read) since the
//     last __syncthreads, or __syncwarp within a warp; reading bytes whose cp.async was not waited for
//   - an access outside an array in shared memory, or not aligned to its size
//   - an access outside memory from cuda_on_cpu_allocate, by guard pages and exactly in the load and copy functions
//   - barriers and warp operations that not all threads reach, or that different threads reach at different lines
// Not modelled: blocks that wait for each other, orders of global memory within a launch, partial warp masks, clusters, time.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10, kPage = 4096, kSharedLimit = 227 << 10, kSharedDefault = 48 << 10;
constexpr unsigned kWarp = 32, kFull = 0xFFFFFFFFu;
constexpr uint16_t kMany = 0xFFFF, kOfWarp = 0x8000;  // several threads; several of warp (id & 0x7FFF)
constexpr unsigned char kPoison = 0xFF, kCanary = 0xA5;

struct Byte {  // what happened to a byte of shared memory last
  uint32_t written, written_in_warp, read, read_in_warp;
  uint16_t writer, reader;
  bool pending, atomic;
};
struct Copy { unsigned char* to; const void* from; int bytes, wanted; };
struct Fibre {
  void* stack_pointer;
  bool done;
  const char* file;  // where it waits
  int line;
  std::vector<std::vector<Copy>> groups;  // of cp.async; the last one is not committed
};
struct Warp {
  void* slot[kWarp];
  unsigned arrived, generation;
  uint32_t epoch;
  const char *what, *file;
  int line;
};
struct State {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  unsigned char* stacks;
  alignas(128) unsigned char memory[kSharedLimit];
  Byte bytes[kSharedLimit];
  size_t shared_used, dynamic;
  std::map<std::pair<std::string, int>, unsigned char*> statics;
  std::map<unsigned char*, std::pair<unsigned char*, size_t>> allocations;  // payload -> mapping, bytes
  std::map<void*, size_t> shared_allowed;                                  // by kernel
  unsigned me, arrived, generation, progress;
  uint32_t epoch, first_epoch;  // barriers so far, over all launches; at the start of the block
  bool failed, backwards, running;
  void *scheduler, *body;
  void (*call)(void*);
  std::string message;
  const char* barrier_file;
  int barrier_line;
  sigjmp_buf rescue;
};
inline State& state = *new State();

#if defined(__x86_64__)
__attribute__((naked, noinline, noipa)) inline void change_stack(void**, void*) {
  asm volatile(
      "pushq %%rbp; pushq %%rbx; pushq %%r12; pushq %%r13; pushq %%r14; pushq %%r15; movq %%rsp, (%%rdi); movq %%rsi, %%rsp;"
      "popq %%r15; popq %%r14; popq %%r13; popq %%r12; popq %%rbx; popq %%rbp; ret" ::: "memory");
}
inline void* new_stack(unsigned char* top, void (*entry)()) {
  void** p = reinterpret_cast<void**>(top) - 2;  // a function starts with its stack 8 bytes off a multiple of 16
  *p = reinterpret_cast<void*>(entry);
  return std::fill_n(p - 6, 6, nullptr) - 6;
}
#else  // ucontext: slower, for any processor
__attribute__((noinline)) inline void change_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
inline void* new_stack(unsigned char* top, void (*entry)()) {
  ucontext_t* context = new (top - kStack) ucontext_t;
  getcontext(context);
  const size_t head = (sizeof(ucontext_t) + 63) / 64 * 64;
  context->uc_stack.ss_sp = top - kStack + head, context->uc_stack.ss_size = kStack - head, context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

inline Fibre& fibre() { return state.fibres[state.me]; }
inline Warp& warp() { return state.warps[state.me / kWarp]; }
inline void yield() { change_stack(&fibre().stack_pointer, state.scheduler); }

[[noreturn]] inline void fail(const std::string& what) {
  if (!state.failed)
    state.message = what + " (thread " + std::to_string(state.me) + " of block " + std::to_string(blockIdx.x) + ", " +
                    std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
  state.failed = true;
  for (;;) yield();
}
inline std::string place(const char* file, int line) {
  return std::string(file ? std::max(file, std::strrchr(file, '/') + 1) : "?") + ":" + std::to_string(line);
}

// Shared memory.

enum class Access { read, write, atomic, copy };

inline bool in_my_warp(uint16_t who) {
  return who != kMany && (who & kOfWarp ? who & 0x7FFFu : who / kWarp) == state.me / kWarp;
}
inline bool ordered(uint16_t who, uint32_t epoch) { return in_my_warp(who) && epoch < warp().epoch; }  // by a __syncwarp
inline void touch(const unsigned char* at, size_t count, Access access) {
  const uint16_t me = static_cast<uint16_t>(state.me);
  Byte* byte = state.bytes + (at - state.memory);
  for (const Byte* end = byte + count; byte < end; ++byte) {
    const bool read = byte->read == state.epoch && byte->reader != me && !ordered(byte->reader, byte->read_in_warp);
    const bool written = byte->written == state.epoch && byte->writer != me && !ordered(byte->writer, byte->written_in_warp);
    const char* race = nullptr;
    if (written && !(access == Access::atomic && byte->atomic))
      race = access == Access::read ? "reads what another thread wrote" : "overwrites what another thread wrote";
    if (read && access != Access::read) race = "overwrites what another thread read";
    if (race) fail(std::string("race: ") + race + " since the last barrier, byte " + std::to_string(byte - state.bytes));
    if (byte->pending && byte->written >= state.first_epoch) fail("race: touches bytes of a cp.async before waiting for it");
    if (access == Access::read) {
      byte->reader = !read ? me : in_my_warp(byte->reader) ? static_cast<uint16_t>(kOfWarp | me / kWarp) : kMany;
      byte->read = state.epoch, byte->read_in_warp = warp().epoch;
    } else {
      byte->writer = written ? kMany : me;
      byte->written = state.epoch, byte->written_in_warp = warp().epoch;
      byte->atomic = access == Access::atomic, byte->pending = access == Access::copy;
    }
  }
}

template <class T>
struct Shared {  // a pointer that knows its array
  unsigned char *at, *begin, *end;

  struct Element {
    Shared where;
    explicit Element(const Shared& pointer) : where(pointer) {}
    Element(const Element&) = delete;  // a template must not take it for a T
    unsigned char* check() const {
      if (where.at < where.begin || where.at + sizeof(T) > where.end)
        fail("out-of-bounds access of shared memory: byte " + std::to_string(where.at - where.begin) + " of an array of " +
             std::to_string(where.end - where.begin));
      if (reinterpret_cast<uintptr_t>(where.at) % sizeof(T)) fail("misaligned access of shared memory");
      return where.at;
    }
    operator std::remove_const_t<T>() const {
      std::remove_const_t<T> value;
      touch(check(), sizeof(T), Access::read);
      std::memcpy(&value, where.at, sizeof(T));
      return value;
    }
    const Element& operator=(const T& value) const {
      touch(check(), sizeof(T), Access::write);
      std::memcpy(where.at, &value, sizeof(T));
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
    const Element& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }
    template <class F>
    T atomic(F change) const {
      touch(check(), sizeof(T), Access::atomic);
      T old;
      std::memcpy(&old, where.at, sizeof(T));
      const T next = change(old);
      std::memcpy(where.at, &next, sizeof(T));
      return old;
    }
  };
  Element operator[](ptrdiff_t i) const { return Element(*this + i); }
  Element operator*() const { return Element(*this); }
  Shared operator+(ptrdiff_t i) const { return {at + i * static_cast<ptrdiff_t>(sizeof(T)), begin, end}; }
  Shared operator-(ptrdiff_t i) const { return *this + -i; }
  Shared& operator+=(ptrdiff_t i) { return *this = *this + i; }
  operator Shared<const T>() const { return {at, begin, end}; }
};

template <class T>
Shared<T> static_shared(size_t count, const char* file, int line) {
  unsigned char*& at = state.statics[{file, line}];
  if (!at) at = state.memory + (state.shared_used + 127) / 128 * 128, state.shared_used = at + count * sizeof(T) - state.memory;
  if (state.shared_used > kSharedLimit) fail("more than 227 KiB of shared memory");
  return {at, at, at + count * sizeof(T)};
}

// Barriers and warp operations.

inline void wait_while(const unsigned& counter, unsigned value, const char* file, int line) {
  fibre().file = file, fibre().line = line;
  while (counter == value) yield();
  fibre().file = nullptr;
}
inline void same_place(const char* what, const char* file, int line, const char* other_file, int other_line) {
  if (line != other_line || std::strcmp(file, other_file))
    fail(std::string("divergent ") + what + ": threads wait at " + place(file, line) + " and " + place(other_file, other_line));
}
inline void barrier(const char* file, int line) {
  if (state.arrived) same_place("__syncthreads", file, line, state.barrier_file, state.barrier_line);
  state.barrier_file = file, state.barrier_line = line, ++state.progress;
  if (++state.arrived == state.fibres.size()) state.arrived = 0, ++state.epoch, ++state.generation;
  else wait_while(state.generation, state.generation, file, line);
}
// The last lane to come computes for all: compute(Args* (&of_lane)[32]).
template <class Args, class F>
void collective(const char* what, Args& args, unsigned mask, const char* file, int line, F compute) {
  Warp& w = warp();
  if (mask != kFull) fail(std::string(what) + " with a partial mask, which cuda_on_cpu does not model");
  if (w.arrived) same_place(what, file, line, w.file, w.line);
  w.file = file, w.line = line, w.slot[state.me % kWarp] = &args, ++state.progress;
  if (++w.arrived == kWarp) {
    compute(reinterpret_cast<Args*(&)[kWarp]>(w.slot));
    w.arrived = 0, ++w.generation;
  } else {
    wait_while(w.generation, w.generation, file, line);
  }
}
// Memory of the device.

inline void check_global(const void* address, size_t count) {
  unsigned char* p = static_cast<unsigned char*>(const_cast<void*>(address));
  if (reinterpret_cast<uintptr_t>(p) % count) fail("misaligned access of global memory");
  auto next = state.allocations.upper_bound(p + 2 * kPage);
  for (int tries = 0; tries < 3 && next != state.allocations.begin(); ++tries) {
    --next;
    const size_t bytes = next->second.second, whole = (bytes + kPage - 1) / kPage * kPage + 2 * kPage;
    if (p < next->second.first || p >= next->second.first + whole) continue;
    if (p < next->first || p + count > next->first + bytes)
      fail("out-of-bounds access of global memory: byte " + std::to_string(p - next->first) + " of " + std::to_string(bytes));
    return;
  }
}
inline void copy_now(const Copy& c) {
  std::memset(c.to, 0, static_cast<size_t>(c.bytes));
  std::memcpy(c.to, c.from, static_cast<size_t>(c.wanted));
  for (int i = 0; i < c.bytes; ++i) state.bytes[c.to - state.memory + i].pending = false;
}
inline void wait_for_copies(size_t left) {
  auto& groups = fibre().groups;
  for (; groups.size() > left + 1; groups.erase(groups.begin()))
    for (const Copy& c : groups.front()) copy_now(c);
}

// Launches.

inline void run_fibre() {
  state.call(state.body);
  wait_for_copies(0);
  if (!fibre().groups[0].empty()) fail("a thread ends before its cp.async is committed");
  fibre().done = true, ++state.progress;
  for (;;) yield();
}
inline void run_block() {
  const unsigned threads = static_cast<unsigned>(state.fibres.size());
  state.first_epoch = ++state.epoch, state.shared_used = state.dynamic, state.statics.clear(), state.arrived = 0;
  std::memset(state.memory, kPoison, kSharedLimit);
  for (Warp& w : state.warps) w = Warp{};
  for (unsigned t = 0; t < threads; ++t)
    state.fibres[t] = Fibre{new_stack(state.stacks + (t + 1) * kStack, run_fibre), false, nullptr, 0, {{}}};
  for (unsigned done = 0; done < threads && !state.failed;) {
    const unsigned before = state.progress;
    done = 0;
    for (unsigned i = 0; i < threads && !state.failed; ++i) {
      state.me = state.backwards ? threads - 1 - i : i;
      threadIdx = dim3(state.me % blockDim.x, state.me / blockDim.x % blockDim.y, state.me / blockDim.x / blockDim.y);
      if (!fibre().done) change_stack(&state.scheduler, fibre().stack_pointer);
      done += fibre().done;
    }
    if (state.failed || done == threads || state.progress != before) continue;
    state.failed = true;  // a whole round changed nothing
    state.message = "divergent barrier: " + std::to_string(done) + " threads ended, others wait at";
    std::map<std::string, int> waiting;
    for (const Fibre& f : state.fibres)
      if (!f.done) ++waiting[place(f.file, f.line)];
    for (const auto& [where, count] : waiting) state.message += " " + where + " (" + std::to_string(count) + ")";
  }
}
inline void on_fault(int, siginfo_t* info, void*) {
  const unsigned char* p = static_cast<unsigned char*>(info->si_addr);
  state.failed = true, state.message = "access of memory that is not there";
  for (const auto& [payload, held] : state.allocations)
    if (p >= held.first && p < payload + (held.second + kPage - 1) / kPage * kPage + kPage)
      state.message = "out-of-bounds access of global memory: byte " + std::to_string(p - payload) + " of " +
                      std::to_string(held.second);
  siglongjmp(state.rescue, 1);
}
inline void check_canaries() {
  for (const auto& [payload, held] : state.allocations) {
    const auto damaged = [](unsigned char c) { return c != kCanary; };
    if (std::any_of(held.first + kPage, payload, damaged) ||
        std::any_of(payload + held.second, payload + (held.second + 15) / 16 * 16, damaged))
      state.failed = true, state.message = "out-of-bounds write beside global memory of " + std::to_string(held.second);
  }
}
inline cudaError_t launch(const cudaLaunchConfig_t& c, void* kernel, void (*call)(void*), void* body) {
  const unsigned threads = c.blockDim.x * c.blockDim.y * c.blockDim.z;
  state.failed = false;
  state.message = threads % kWarp || threads > 1024 || !threads ? "a block must have full warps, at most 32"
                  : !c.gridDim.x || !c.gridDim.y || !c.gridDim.z ? "an empty grid"
                  : c.gridDim.y > 65535 || c.gridDim.z > 65535   ? "a grid of more than 65535 blocks in y or z"
                                                                 : "";
  if (c.dynamicSmemBytes > std::max(kSharedDefault, state.shared_allowed[kernel]))
    state.message = "more shared memory than cudaFuncSetAttribute allowed";
  if (!state.message.empty()) return cudaErrorInvalidValue;
  if (!state.stacks)
    state.stacks = static_cast<unsigned char*>(
        mmap(nullptr, 1025 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  state.fibres.resize(threads), state.warps.resize(threads / kWarp), state.dynamic = c.dynamicSmemBytes;
  state.call = call, state.body = body, gridDim = c.gridDim, blockDim = c.blockDim;
  stack_t handler_stack{}, old_stack;
  handler_stack.ss_sp = state.stacks + 1024 * kStack, handler_stack.ss_size = kStack;
  sigaltstack(&handler_stack, &old_stack);
  struct sigaction action {}, old_segv, old_bus;
  action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv), sigaction(SIGBUS, &action, &old_bus);
  if (!sigsetjmp(state.rescue, 1)) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    for (unsigned i = 0; i < blocks && !state.failed; ++i) {
      const unsigned b = state.backwards ? blocks - 1 - i : i;
      blockIdx = dim3(b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y);
      run_block();
    }
  }
  sigaction(SIGSEGV, &old_segv, nullptr), sigaction(SIGBUS, &old_bus, nullptr), sigaltstack(&old_stack, nullptr);
  if (!state.failed) check_canaries();
  return state.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace cuda_on_cpu

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... given) {
  std::tuple<P...> values(std::forward<A>(given)...);
  auto body = [&] { std::apply(kernel, values); };
  auto call = [](void* b) { (*static_cast<decltype(body)*>(b))(); };
  return cuda_on_cpu::launch(*config, reinterpret_cast<void*>(kernel), call, &body);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(cuda_on_cpu::kSharedLimit)) return cudaErrorInvalidValue;
  cuda_on_cpu::state.shared_allowed[reinterpret_cast<void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::state.message.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

#include "device_functions.h"
