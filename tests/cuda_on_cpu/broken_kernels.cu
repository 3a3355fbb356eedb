// Kernels for tests/test_cuda_on_cpu.py: some with one deliberate fault each, some that look alike and are right.
#include "common.cuh"

using namespace dalle_fast;

struct Arrays {
  const float* in;  // [64]
  float* out;       // [64]
};
constexpr int kThreads = 64;

#define THREAD static_cast<int>(threadIdx.x)
#define KERNEL(name) __global__ void __launch_bounds__(kThreads) name([[maybe_unused]] const __grid_constant__ Arrays p)
// Every kernel has one array in dynamic shared memory, and another one behind it.
#define TWO_ARRAYS                                 \
  shared<unsigned char> memory = dynamic_shared(); \
  [[maybe_unused]] const shared<float> a = carve<float>(memory, 64), b = carve<float>(memory, 64)

KERNEL(right) {
  TWO_ARRAYS;
  STATIC_SHARED(float, total, 2);
  a[THREAD] = load(p.in + THREAD);
  __syncthreads();
  b[THREAD] = a[63 - THREAD];
  __syncthreads();
  const float x = b[63 - THREAD] + a[THREAD];
  if (THREAD == 0) total[0] = total[1] = 0;
  __syncthreads();
  atomicAdd(total + 1, 1.f);
  a[THREAD] = x;  // nobody else reads it any more
  __syncthreads();
  store(p.out + THREAD, a[THREAD] + total[1]);
}
KERNEL(right_in_a_warp) {
  TWO_ARRAYS;
  for (int round = 0; round < 3; ++round) {
    a[THREAD] = load(p.in + THREAD);
    __syncwarp();
    const float x = a[THREAD ^ 31];
    __syncwarp();
    b[THREAD ^ 1] = x;
    __syncwarp();
  }
  store(p.out + THREAD, b[THREAD]);
}
KERNEL(reads_too_early) {
  TWO_ARRAYS;
  a[THREAD] = load(p.in + THREAD);
  store(p.out + THREAD, a[63 - THREAD]);
}
KERNEL(a_warp_is_not_the_block) {
  TWO_ARRAYS;
  a[THREAD] = load(p.in + THREAD);
  __syncwarp();
  store(p.out + THREAD, a[63 - THREAD]);
}
KERNEL(lanes_need_a_barrier_too) {
  TWO_ARRAYS;
  a[THREAD] = load(p.in + THREAD);
  store(p.out + THREAD, a[THREAD ^ 1]);
}
KERNEL(overwrites_too_early) {
  TWO_ARRAYS;
  a[THREAD] = load(p.in + THREAD);
  __syncthreads();
  const float x = a[63 - THREAD];
  a[THREAD] = x;
  __syncthreads();
  store(p.out + THREAD, a[THREAD]);
}
KERNEL(several_readers_then_a_write) {
  TWO_ARRAYS;
  if (THREAD == 0) a[0] = 1;
  __syncthreads();
  const float x = a[0];
  if (THREAD == 63) a[0] = x + 1;
  store(p.out + THREAD, x);
}
KERNEL(two_write_one) {
  TWO_ARRAYS;
  a[THREAD / 2] = 1;
  __syncthreads();
  store(p.out + THREAD, a[THREAD / 2]);
}
KERNEL(one_byte_of_a_word) {
  TWO_ARRAYS;
  const shared<unsigned char> bytes = shared_cast<unsigned char>(a);
  bytes[4 * THREAD + 3] = 1;
  const float x = THREAD ? a[THREAD - 1] : 0.f;
  store(p.out + THREAD, x);
}
KERNEL(atomic_and_not) {
  TWO_ARRAYS;
  if (THREAD == 0) a[0] = 0;
  __syncthreads();
  atomicAdd(a, 1.f);
  store(p.out + THREAD, a[0]);
}
KERNEL(copy_not_waited_for) {
  TWO_ARRAYS;
  cp_async<4>(shared_cast<unsigned char>(a + THREAD), p.in + THREAD);
  cp_async_commit();
  cp_async_wait<1>();
  store(p.out + THREAD, a[THREAD]);
}
KERNEL(copy_of_another_thread) {
  TWO_ARRAYS;
  cp_async<4>(shared_cast<unsigned char>(a + THREAD), p.in + THREAD);
  cp_async_commit();
  cp_async_wait<0>();
  store(p.out + THREAD, a[63 - THREAD]);
}
KERNEL(copy_over_what_is_read) {
  TWO_ARRAYS;
  a[THREAD] = 1;
  __syncthreads();
  const float x = a[63 - THREAD];
  cp_async<4>(shared_cast<unsigned char>(a + THREAD), p.in + THREAD);
  cp_async_commit();
  cp_async_wait<0>();
  store(p.out + THREAD, x);
}
KERNEL(copy_right) {
  TWO_ARRAYS;
  if (THREAD < 16) cp_async<16>(shared_cast<unsigned char>(a + 4 * THREAD), p.in + 4 * THREAD, THREAD == 15 ? 8 : 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  store(p.out + THREAD, a[63 - THREAD]);
}
KERNEL(copy_forgotten) {
  TWO_ARRAYS;
  cp_async<4>(shared_cast<unsigned char>(a + THREAD), p.in + THREAD);
}
KERNEL(shared_array_overrun) {
  TWO_ARRAYS;
  a[THREAD + 1] = 1;  // into b: within the block's memory, but outside the array
}
KERNEL(shared_array_underrun) {
  TWO_ARRAYS;
  store(p.out + THREAD, b[THREAD - 1]);
}
KERNEL(static_array_overrun) {
  STATIC_SHARED(float, few, 63);
  few[THREAD] = 1;
}
KERNEL(shared_memory_too_small) {
  TWO_ARRAYS;
  const shared<float> c = carve<float>(memory, 64);
  c[THREAD] = 1;
}
KERNEL(shared_misaligned) {
  TWO_ARRAYS;
  shared_cast<float2>(a + 1)[0] = make_float2(1, 1);
}
KERNEL(global_read_overrun) { store(p.out + THREAD, load(p.in + THREAD + 1)); }
KERNEL(global_read_underrun) { store(p.out + THREAD, load(p.in + THREAD - 1)); }
KERNEL(global_plain_read_overrun) { store(p.out + THREAD, p.in[THREAD + 1]); }
KERNEL(global_plain_write_overrun) { p.out[THREAD + 1] = p.in[THREAD]; }
KERNEL(global_plain_write_underrun) { p.out[THREAD - 1] = p.in[THREAD]; }
KERNEL(global_copy_overrun) {
  TWO_ARRAYS;
  cp_async<4>(shared_cast<unsigned char>(a + THREAD), p.in + THREAD + 1);
  cp_async_commit();
}
KERNEL(global_misaligned) { store(p.out + THREAD, load(reinterpret_cast<const float2*>(p.in + 1)).x); }
KERNEL(null_pointer) { store(p.out + THREAD, *static_cast<const float*>(nullptr)); }
KERNEL(barrier_in_a_branch) {
  if (THREAD < 32) __syncthreads();
}
KERNEL(barrier_after_an_exit) {
  if (THREAD == 5) return;
  __syncthreads();
}
KERNEL(barriers_on_two_lines) {
  if (THREAD < 32)
    __syncthreads();
  else
    __syncthreads();
}
KERNEL(shuffle_in_a_branch) {
  if (THREAD % 32 < 31) store(p.out + THREAD, __shfl_sync(~0u, 1.f, 0));
}
KERNEL(shuffle_against_vote) {
  if (THREAD % 2) __syncwarp();
  else store(p.out + THREAD, static_cast<float>(__any_sync(~0u, 1)));
}
KERNEL(some_lanes_only) {
  if (THREAD < 16) store(p.out + THREAD, __shfl_sync(0xFFFFu, 1.f, 0));
}

extern "C" __attribute__((visibility("default"))) const char* run(const char* name, const float* in, float* out, int threads,
                                                                  int shared_bytes) {
  static std::string message;
#define CASE(kernel) \
  if (std::string(name) == #kernel)    \
  launch(kernel, "", 1, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), nullptr, false, Arrays{in, out})
  try {
    message = "";
    CASE(right);
    else CASE(right_in_a_warp);
    else CASE(reads_too_early);
    else CASE(a_warp_is_not_the_block);
    else CASE(lanes_need_a_barrier_too);
    else CASE(overwrites_too_early);
    else CASE(several_readers_then_a_write);
    else CASE(two_write_one);
    else CASE(one_byte_of_a_word);
    else CASE(atomic_and_not);
    else CASE(copy_not_waited_for);
    else CASE(copy_of_another_thread);
    else CASE(copy_over_what_is_read);
    else CASE(copy_right);
    else CASE(copy_forgotten);
    else CASE(shared_array_overrun);
    else CASE(shared_array_underrun);
    else CASE(static_array_overrun);
    else CASE(shared_memory_too_small);
    else CASE(shared_misaligned);
    else CASE(global_read_overrun);
    else CASE(global_read_underrun);
    else CASE(global_plain_read_overrun);
    else CASE(global_plain_write_overrun);
    else CASE(global_plain_write_underrun);
    else CASE(global_copy_overrun);
    else CASE(global_misaligned);
    else CASE(null_pointer);
    else CASE(barrier_in_a_branch);
    else CASE(barrier_after_an_exit);
    else CASE(barriers_on_two_lines);
    else CASE(shuffle_in_a_branch);
    else CASE(shuffle_against_vote);
    else CASE(some_lanes_only);
    else message = "no such kernel";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// One warp: d [16, 8] = a [16, 16] b [16, 8], with a by ldmatrix and b by its transposed form; then what warp functions give.
template <class T>
__global__ void __launch_bounds__(32) product(const uint16_t* a, const uint16_t* b, float* d, uint32_t* votes) {
  shared<unsigned char> memory = dynamic_shared();
  const shared<uint16_t> rows = carve<uint16_t>(memory, 256), columns = carve<uint16_t>(memory, 128);
  const int lane = THREAD;
  for (int i = lane; i < 256; i += 32) rows[i] = load(a + i);
  for (int i = lane; i < 128; i += 32) columns[i] = load(b + i);
  __syncthreads();
  uint32_t left[4], right[2];
  ldmatrix(left, rows + (lane % 16 * 16 + lane / 16 * 8));
  ldmatrix<true>(right, columns + lane % 16 * 8);
  float sum[4] = {};
  mma_m16n8k16<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) store(d + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, sum[i]);
  store(votes + lane, __ballot_sync(~0u, lane % 3 == 0));
  store(votes + 32 + lane, __shfl_up_sync(~0u, static_cast<uint32_t>(lane), 3));
  store(votes + 64 + lane, __shfl_down_sync(~0u, static_cast<uint32_t>(lane), 3));
  store(votes + 96 + lane, warp_sum<8>(static_cast<uint32_t>(lane)));
}
extern "C" __attribute__((visibility("default"))) void multiply(int half, const uint16_t* a, const uint16_t* b, float* d,
                                                                uint32_t* votes) {
  launch(half ? product<__half> : product<__nv_bfloat16>, "", 1, 32, 768, nullptr, false, a, b, d, votes);
}
extern "C" __attribute__((visibility("default"))) void convert(int half, int count, const float* x, uint16_t* rounded,
                                                               float* back) {
  for (int i = 0; i < count; ++i) {
    rounded[i] = half ? __float2half(x[i]).bits : __float2bfloat16(x[i]).bits;
    back[i] = half ? __half2float(__half{rounded[i]}) : __bfloat162float(__nv_bfloat16{rounded[i]});
  }
}
