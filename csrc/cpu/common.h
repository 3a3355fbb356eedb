// What every file of the CPU kernels needs: the platform they assume, small helpers, aligned memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the CPU kernels read packed weights as little-endian words: big-endian machines are not supported"
#endif
#if UINTPTR_MAX < 0xFFFFFFFFFFFFFFFFu
#error "the CPU kernels map weights of many gigabytes: 32-bit machines are not supported"
#endif

namespace dalle_fast::cpu {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float bf16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

// Zeroed memory on a 64-byte line; on huge pages from 2 MiB, without which streaming weights misses the TLB every 4 KiB.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr, other.bytes_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    void* data = data_;
    const size_t bytes = bytes_;
    data_ = other.data_, bytes_ = other.bytes_;
    other.data_ = data, other.bytes_ = bytes;
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace dalle_fast::cpu
