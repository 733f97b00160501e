// The arguments of every operation, as the Python side packs them: fields of 8 bytes in this order. Sizes and strides count elements.
#pragma once

#include <cstdint>

namespace whispers {

struct SiluMul {
  const void* gate_up;  // [rows, 2 width], gate first
  void* out;            // [rows, width]
  int64_t rows, width, row_stride, dtype;
};

}  // namespace whispers
