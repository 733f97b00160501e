// Number formats of tensors, and the small facts that every instruction set shares. No functions: nothing here may be compiled twice.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define WHISPERS_X86 1
#endif

namespace whispers {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct Fp8 {  // e4m3fn: no infinities, one NaN a sign
  uint8_t bits;
};

// As the Python side numbers them.
enum Dtype : int64_t { kF32 = 0, kBf16 = 1, kF16 = 2, kFp8 = 3 };

constexpr int64_t kLine = 64;  // bytes of a cache line

}  // namespace whispers
