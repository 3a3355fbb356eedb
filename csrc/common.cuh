// What the CUDA kernels share: shared memory by shared<T>, copies and matrix instructions (PTX), types, reductions.
//
// Every kernel is compiled twice: by nvcc, and by g++ against tests/cuda_on_cpu, which runs it on a CPU and checks each access.
// Hence no __shared__ arrays but carve and STATIC_SHARED, launches by launch() below, and PTX only in this file.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define STATIC_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace dalle_fast {

template <class T>
using shared = T*;  // in tests: a pointer that checks

template <class To, class From>
__device__ __forceinline__ shared<To> shared_cast(shared<From> p) {
  return reinterpret_cast<To*>(p);
}
__device__ __forceinline__ shared<unsigned char> dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
// The next `count` elements, on a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ shared<T> carve(shared<unsigned char>& memory, int count) {
  const shared<T> array = reinterpret_cast<T*>(memory);
  memory += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
  return array;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies Bytes to shared memory, the last Bytes - wanted of them zeros, without waiting.
template <int Bytes>
__device__ __forceinline__ void cp_async(shared<unsigned char> to, const void* from, int wanted = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(wanted)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(Bytes), "r"(wanted)
                 : "memory");
  }
}
// 16 bytes that will not be read again: the first to leave the second-level cache.
__device__ __forceinline__ void cp_async_once(shared<unsigned char> to, const void* from) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, policy;\n}" ::"r"(shared_address(to)),
      "l"(from)
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most Left of this thread's groups are under way; other threads' copies need a barrier after it.
template <int Left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Four (or two) 8x8 matrices of 16-bit elements: lane l gives row l % 8 of matrix l / 8 and gets its elements 2 (l % 4) and
// the next of row l / 4 of each; transposed: of column l / 4.
template <bool Transposed = false, class T, int N>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const T* row) {
  static_assert(N == 2 || N == 4);
  const uint32_t at = shared_address(row);
  if constexpr (N == 4 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (N == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

// d += a b: a 16x16 by rows, b 16x8 by columns, of T in pairs; d 16x8 float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define DF_MMA(type)                                                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                      \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) DF_MMA("f16");
  else DF_MMA("bf16");
#undef DF_MMA
}

// a - b for two elements of T each.
template <class T>
__device__ __forceinline__ uint32_t subtract_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (std::is_same_v<T, __half>) asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80u), "r"(a));  // -1 b + a: no sub on sm_80
  return d;
}

// Reads of global memory: cached (not __ldg, which the compiler may move to before wait_for_previous_kernel); of weights, read
// once only (16 bytes: evicted first); of what other blocks wrote.
template <class T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ T load_once(const T* p) {
  if constexpr (sizeof(T) == 16) {
    T v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::evict_first.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
  } else {
    return __ldcs(p);
  }
}
template <class T>
__device__ __forceinline__ T load_from_l2(const T* p) {
  return __ldcg(p);
}
template <class T>
__device__ __forceinline__ void store(T* p, std::common_type_t<T> value) {
  *p = value;
}
// Starts to bring `bytes`, a multiple of 16 from a multiple of 16, into the second-level cache. Harmless where another kernel still
// writes them. Without effect before sm_90.
__device__ __forceinline__ void prefetch_to_l2(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// What this thread wrote or has seen of others, by a barrier, comes before what it does next, for all of the device. Cheaper than
// __threadfence, which orders more.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Programmatic dependent launch: until the previous kernel's results are there; the next kernel may be started.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dalle_fast
#else
#include <cuda_on_cpu.h>
#endif

#include "params.h"

namespace dalle_fast {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// float from and to T; two of them as the 32-bit word that matrix instructions take, the first in the low half.
template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(x);
  else return x;
}
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(x);
  else return x;
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, 4);
  return word;
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  T pair[2];
  memcpy(pair, &word, 4);
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}

// Over the lanes whose numbers differ in the bits below Width.
template <int Width = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bit = Width / 2; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, bit));
  return x;
}
template <int Width = 32, class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int bit = Width / 2; bit; bit /= 2) x += __shfl_xor_sync(kFullWarp, x, bit);
  return x;
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// One launch on `stream`. dependent: it may start before the previous kernel ends, and calls wait_for_previous_kernel.
// Throws std::runtime_error with the driver's words.
template <class... P, class... A>
void launch(void (*kernel)(P...), const char* name, dim3 grid, dim3 block, size_t shared_bytes, void* stream, bool dependent,
            A&&... args) {
  if (shared_bytes > (48u << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = dependent ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...), name);
}

}  // namespace dalle_fast
