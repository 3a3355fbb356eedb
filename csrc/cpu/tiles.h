// AMX: eight registers of up to 16 rows x 64 bytes, set up before use, and products of them.
#pragma once

#include "cpu/simd.h"

namespace dalle_fast::cpu {
namespace {

constexpr int kTileRows = 16;

// GCC 12's tile intrinsics do not tell the compiler what memory they read or write: a fence wherever it is our own.
DF_INLINE void memory_fence() { __asm__ volatile("" ::: "memory"); }

// The shape of this thread's tile registers, zero until loaded, while it lives.
class Tiles {
 public:
  Tiles(const int (&rows)[8], const int (&bytes)[8]) {
    alignas(64) Config config{};
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(rows[tile]);
      config.bytes[tile] = static_cast<uint16_t>(bytes[tile]);
    }
    memory_fence();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

}  // namespace
}  // namespace dalle_fast::cpu
