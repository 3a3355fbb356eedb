// What a kernel calls: CUDA's own functions by their names, and in namespace dalle_fast those that csrc/common.cuh writes
// in PTX. Included by cuda_on_cpu.h.
#pragma once

#define STATIC_SHARED(type, name, count) \
  const dalle_fast::shared<type> name = cuda_on_cpu::static_shared<type>(count, __FILE__, __LINE__)
#define SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SITE) { cuda_on_cpu::barrier(file, line); }
inline void __syncwarp(unsigned mask = ~0u, SITE) {
  int nothing = 0;
  cuda_on_cpu::collective("__syncwarp", nothing, mask, file, line, [](int*(&)[32]) { ++cuda_on_cpu::warp().epoch; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, SITE) {
  struct Args { T value; int from; T result; } args{value, from, value};
  cuda_on_cpu::collective("__shfl_sync", args, mask, file, line, [](Args*(&all)[32]) {
    for (Args* a : all) a->result = all[a->from & 31]->value;
  });
  return args.result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, SITE) {
  return __shfl_sync(mask, value, static_cast<int>(cuda_on_cpu::state.me ^ static_cast<unsigned>(bits)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, SITE) {
  const unsigned lane = cuda_on_cpu::state.me & 31;
  return __shfl_sync(mask, value, static_cast<int>(lane < by ? lane : lane - by), file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, SITE) {
  const unsigned lane = cuda_on_cpu::state.me & 31;
  return __shfl_sync(mask, value, static_cast<int>(lane + by > 31 ? lane : lane + by), file, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, SITE) {
  struct Args { int vote; unsigned result; } args{vote, 0};
  cuda_on_cpu::collective("__ballot_sync", args, mask, file, line, [](Args*(&all)[32]) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(all[lane]->vote != 0) << lane;
    for (Args* a : all) a->result = votes;
  });
  return args.result;
}
inline int __any_sync(unsigned mask, int vote, SITE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, SITE) { return __ballot_sync(mask, vote, file, line) == ~0u; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  cuda_on_cpu::check_global(p, sizeof(T));
  return std::exchange(*p, static_cast<T>(*p + value));
}
template <class T>
T atomicAdd(cuda_on_cpu::Shared<T> p, std::common_type_t<T> value) {
  return (*p).atomic([&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(cuda_on_cpu::Shared<T> p, std::common_type_t<T> value) {
  return (*p).atomic([&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(cuda_on_cpu::Shared<T> p, std::common_type_t<T> value) {
  return (*p).atomic([&](T old) { return std::min(old, value); });
}

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(bits_as<_Float16>(x.bits)); }
inline __half __float2half(float x) { return {bits_as<uint16_t>(static_cast<_Float16>(x))}; }

namespace dalle_fast {

template <class T>
using shared = cuda_on_cpu::Shared<T>;

template <class To, class From>
shared<To> shared_cast(shared<From> p) { return {p.at, p.begin, p.end}; }
inline shared<unsigned char> dynamic_shared() {
  unsigned char* memory = cuda_on_cpu::state.memory;
  return {memory, memory, memory + cuda_on_cpu::state.dynamic};
}
// The next `count` elements, on a multiple of 16 bytes; out of bounds beyond them.
template <class T>
shared<T> carve(shared<unsigned char>& memory, int count) {
  unsigned char* end = memory.at + static_cast<size_t>(count) * sizeof(T);
  const shared<T> array{memory.at, memory.at, end};
  if (end > memory.end) cuda_on_cpu::fail("an array exceeds the dynamic shared memory");
  memory += (static_cast<ptrdiff_t>(count * sizeof(T)) + 15) / 16 * 16;
  return array;
}

template <int Bytes>
void cp_async(shared<unsigned char> to, const void* from, int wanted = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  struct alignas(Bytes) Block { unsigned char bytes[Bytes]; };
  cuda_on_cpu::touch(typename shared<Block>::Element{shared_cast<Block>(to)}.check(), Bytes, cuda_on_cpu::Access::copy);
  if (reinterpret_cast<uintptr_t>(from) % Bytes) cuda_on_cpu::fail("misaligned cp.async");
  for (int i = 0; i < wanted; i += 1) cuda_on_cpu::check_global(static_cast<const char*>(from) + i, 1);
  cuda_on_cpu::fibre().groups.back().push_back({to.at, from, Bytes, wanted});
}
inline void cp_async_once(shared<unsigned char> to, const void* from) { cp_async<16>(to, from); }
inline void cp_async_commit() { cuda_on_cpu::fibre().groups.emplace_back(); }
template <int Left>
void cp_async_wait() { cuda_on_cpu::wait_for_copies(Left); }

// Four (or two) 8x8 matrices of 16-bit elements: lane l gives row l % 8 of matrix l / 8 and gets its elements 2 (l % 4) and
// the next of row l / 4 of each; transposed: of column l / 4.
template <bool Transposed = false, class T, int N>
void ldmatrix(uint32_t (&result)[N], shared<T> row, SITE) {
  struct Args { uint16_t row[8]; uint32_t (*result)[N]; } args{{}, &result};
  if (static_cast<int>(cuda_on_cpu::state.me % 32) < 8 * N) {
    const uint4 data = *shared_cast<uint4>(row);
    std::memcpy(args.row, &data, 16);
  }
  cuda_on_cpu::collective("ldmatrix", args, ~0u, file, line, [](Args*(&all)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < N; ++m) {
        const int a = lane / 4, b = lane % 4 * 2;
        const uint32_t low = Transposed ? all[8 * m + b]->row[a] : all[8 * m + a]->row[b];
        const uint32_t high = Transposed ? all[8 * m + b + 1]->row[a] : all[8 * m + a]->row[b + 1];
        (*all[lane]->result)[m] = high << 16 | low;
      }
  });
}

// d += a b: a 16x16 by rows, b 16x8 by columns, of T in pairs; d 16x8. Each product is exact, sums are of float32.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SITE) {
  struct Args { float* d; const uint32_t *a, *b; } args{d, a, b};
  cuda_on_cpu::collective("mma", args, ~0u, file, line, [](Args*(&all)[32]) {
    auto value = [](uint32_t pair, int i) {
      const uint16_t bits = static_cast<uint16_t>(i ? pair >> 16 : pair);
      if constexpr (std::is_same_v<T, __half>) return __half2float(__half{bits});
      else return __bfloat162float(__nv_bfloat16{bits});
    };
    float wide_a[16][16], wide_b[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 2; ++e) {
        const int g = lane / 4, t = lane % 4 * 2 + e;
        for (int r = 0; r < 4; ++r) wide_a[g + r % 2 * 8][t + r / 2 * 8] = value(all[lane]->a[r], e);
        for (int r = 0; r < 2; ++r) wide_b[t + r * 8][g] = value(all[lane]->b[r], e);
      }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += wide_a[row][k] * wide_b[k][n];
      for (int n = 0; n < 8; ++n) all[row % 8 * 4 + n / 2]->d[row / 8 * 2 + n % 2] += sum[n];
    }
  });
}

template <class T>
uint32_t subtract_pair(uint32_t a, uint32_t b) {
  auto value = [](uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__half{static_cast<uint16_t>(bits)});
    else return __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(bits)});
  };
  auto difference = [&](int shift) -> uint32_t {
    const float d = value(a >> shift) - value(b >> shift);
    if constexpr (std::is_same_v<T, __half>) return uint32_t{__float2half(d).bits} << shift;
    else return uint32_t{__float2bfloat16(d).bits} << shift;
  };
  return difference(0) | difference(16);
}

// Reads of global memory: cached, once only, and from the second-level cache (what other blocks wrote).
template <class T>
T load(const T* p) {
  cuda_on_cpu::check_global(p, sizeof(T));
  return *p;
}
template <class T>
T load_once(const T* p) { return load(p); }
template <class T>
T load_from_l2(const T* p) { return load(p); }
template <class T>
void store(T* p, std::common_type_t<T> value) {
  cuda_on_cpu::check_global(p, sizeof(T));
  *p = value;
}
inline void prefetch_to_l2(const void* p, int bytes) {
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(p) % 16) cuda_on_cpu::fail("prefetch_to_l2 of no 16 bytes");
  for (const int i : {0, bytes - 1}) cuda_on_cpu::check_global(static_cast<const char*>(p) + i, 1);
}
inline void fence() {}
inline void wait_for_previous_kernel() {}
inline void start_next_kernel() {}

}  // namespace dalle_fast

#undef SITE

// For the tests, by ctypes: memory between guard pages that ends where they begin, and the order of threads and blocks.
extern "C" {
__attribute__((weak, visibility("default"))) void* cuda_on_cpu_allocate(size_t bytes) {
  using namespace cuda_on_cpu;
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  void* map = mmap(nullptr, whole + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  unsigned char* first = static_cast<unsigned char*>(map);
  std::memset(first + kPage, kCanary, whole);
  mprotect(first, kPage, PROT_NONE), mprotect(first + kPage + whole, kPage, PROT_NONE);
  unsigned char* payload = first + kPage + whole - (bytes + 15) / 16 * 16;
  state.allocations[payload] = {first, bytes};
  return payload;
}
__attribute__((weak, visibility("default"))) void cuda_on_cpu_release() {  // everything
  using namespace cuda_on_cpu;
  for (const auto& [payload, held] : state.allocations)
    munmap(held.first, (held.second + kPage - 1) / kPage * kPage + 2 * kPage);
  state.allocations.clear();
}
__attribute__((weak, visibility("default"))) void cuda_on_cpu_backwards(int yes) { cuda_on_cpu::state.backwards = yes != 0; }
}
