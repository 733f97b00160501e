// Root-mean-square normalisation, after adding a residual where there is one.
#pragma once

#include "args.h"
#include "share.h"
#include "simd_math.h"

namespace whispers::WHISPERS_ISA {

// Calls f(offset, lanes) for a row's vectors; the last may be partial.
template <class F>
inline void each_vector(int64_t width, F&& f) {
  int64_t at = 0;
  for (; at + W <= width; at += W) f(at, int64_t{W});
  if (at < width) f(at, width - at);
}

// The sum of squares, in an order that depends on the width alone: four partial sums, so that additions need not wait for each other.
template <class T>
inline float sum_of_squares(const T* x, int64_t width) {
  Vec part[4] = {zero(), zero(), zero(), zero()};
  int64_t at = 0;
  for (; at + 4 * W <= width; at += 4 * W) {
    for (int i = 0; i < 4; ++i) {
      const Vec v = load(x + at + i * W);
      part[i] = fma(v, v, part[i]);
    }
  }
  for (int i = 0; at < width; at += W, ++i) {
    const Vec v = load(x + at, width - at);
    part[i] = fma(v, v, part[i]);
  }
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// One row. `out` may be `x`. The sum of x and a residual is rounded to T, kept in `total` (which may be `residual`), and normalised as kept.
template <class T, class Weight, class Out>
inline void rms_norm_row(const T* x, const T* residual, const Weight* weight, Out* out, T* total, int64_t width, float eps) {
  if (residual != nullptr) {
    each_vector(width, [&](int64_t at, int64_t n) { store(total + at, load(x + at, n) + load(residual + at, n), n); });
    x = total;
  }
  const Vec factor = splat(1.0f / __builtin_sqrtf(sum_of_squares(x, width) / static_cast<float>(width) + eps));
  each_vector(width, [&](int64_t at, int64_t n) { store(out + at, load(x + at, n) * factor * load(weight + at, n), n); });
}

inline void rms_norm(const RmsNorm& a, const Crew& crew) {
  const Share share = share_of(a.rows, crew);
  with_dtype(a.dtype, [&](auto kind) {
    using T = decltype(kind);
    with_dtype(a.weight_dtype, [&](auto weight_kind) {
      const auto* weight = static_cast<const decltype(weight_kind)*>(a.weight);
      for (int64_t row = share.begin; row < share.end; ++row) {
        const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + row * a.residual_row;
        T* total = a.residual == nullptr ? nullptr : static_cast<T*>(a.total) + row * a.width;
        rms_norm_row(static_cast<const T*>(a.x) + row * a.x_row, residual, weight, static_cast<T*>(a.out) + row * a.width, total,
                     a.width, static_cast<float>(a.eps));
      }
    });
  });
}

}  // namespace whispers::WHISPERS_ISA
