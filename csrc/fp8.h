// float32 to e4m3: what is stored in fp8 pages.
#pragma once

#include "types.h"
#include "simd.h"

namespace whispers::WHISPERS_ISA {

// The nearest number, ties to even, which beyond the largest is 448 itself; NaN for an infinity, which the format has not, and for NaN.
inline Fp8 to_fp8(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  bits &= 0x7fffffff;
  float size;
  __builtin_memcpy(&size, &bits, sizeof size);
  uint32_t code;
  if (size < 0x1p-6f) {
    code = static_cast<uint32_t>(__builtin_rintf(size * 512.0f));  // a multiple of 2^-9; 8 is the smallest normal number
  } else if (size < 448.0f) {
    code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  } else {
    code = size < __builtin_inff() ? 0x7e : 0x7f;
  }
  return {static_cast<uint8_t>(sign | code)};
}

}  // namespace whispers::WHISPERS_ISA
