// Rows of an embedding table that is kept packed, for the head that it is tied to, and of soft prompts behind it.
#pragma once

#include "linear_grid.h"
#include "linear_short.h"

namespace whispers::WHISPERS_ISA {

// Row `id` of the matrix, as floats.
inline void unpack_row(const Packed& p, int64_t id, float* row) {
  if (p.kind == kShortWeights) return unpack_short_row(p, id, row);
  with_words(p.kind, [&](auto kind) {
    using Words = decltype(kind);
#if WHISPERS_LEVEL >= 3
    if constexpr (Words::kGroup == kGridSteps) return unpack_grid_row<Words>(p, id, row);
#endif
    const int64_t steps = steps_of<Words>(p), panel = id / kPanelOutputs;
    const int64_t width = width_of(p.outputs, panel);
    const float* words = p.words + panel * kPanelOutputs * steps + id % kPanelOutputs;
    for (int64_t step = 0; step < steps; ++step) {
      uint32_t word;
      __builtin_memcpy(&word, words + step * width, 4);
      for (int64_t i = 0; i < smaller(Words::kNumbers, p.depth - step * Words::kNumbers); ++i) {
        float* to = row + step * Words::kNumbers + i;
        if (Words::kNumbers == 1) {
          __builtin_memcpy(to, &word, 4);
        } else if (Words::kNumbers == 2) {
          const uint32_t bits = word >> 16 * i << 16;
          __builtin_memcpy(to, &bits, 4);
        } else {
          const int64_t byte = i == 0 || i == 3 ? i : 3 - i;
          *to = static_cast<float>(static_cast<int8_t>(word >> 8 * byte)) * p.scale[id];
        }
      }
    }
  });
}

template <class T, class S>
inline void unpack_or_soft_row(const UnpackRows& a, int64_t row, float* floats) {
  const int64_t id = a.ids[row], depth = a.weights.depth;
  T* out = static_cast<T*>(a.out) + row * depth;
  if (id < a.weights.outputs) {
    unpack_row(a.weights, id, floats);
    return convert_row(floats, out, depth);
  }
  convert_row(static_cast<const S*>(a.soft) + (id - a.weights.outputs) * a.soft_row, out, depth);
}

// Bytes of each thread's scratch.
inline int64_t unpack_scratch(const UnpackRows& a) { return a.weights.depth * 4; }

inline void unpack_rows(const UnpackRows& a, const Crew& crew) {
  const Share share = share_of(a.rows, crew);
  with_dtype(a.out_dtype, [&](auto kind) {
    with_dtype(a.soft_dtype, [&](auto soft_kind) {
      for (int64_t row = share.begin; row < share.end; ++row) {
        unpack_or_soft_row<decltype(kind), decltype(soft_kind)>(a, row, static_cast<float*>(crew.own()));
      }
    });
  });
}

}  // namespace whispers::WHISPERS_ISA
