#include <cstdlib>
#include <new>

#include "cpu/common.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dalle_fast::cpu {

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (!bytes) return;
  constexpr size_t huge = size_t{2} << 20;
  const size_t alignment = bytes >= huge ? huge : 64;
  data_ = std::aligned_alloc(
      alignment, static_cast<size_t>(round_up(static_cast<int64_t>(bytes), static_cast<int64_t>(alignment))));
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == huge) madvise(data_, bytes / huge * huge, MADV_HUGEPAGE);  // advice: a refusal costs speed only
#endif
  std::memset(data_, 0, bytes);
}

Buffer::~Buffer() { std::free(data_); }

}  // namespace dalle_fast::cpu
