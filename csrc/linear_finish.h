// What is left to do with sums of products: scale, bias, residual or gate, and rounding.
#pragma once

#include "linear_math.h"
#include "silu_mul.h"

namespace whispers::WHISPERS_ISA {

inline int64_t panels_of(const Packed& p) { return ceil_div(p.outputs, kPanelOutputs); }
inline int64_t columns_of(const Packed& p) { return p.gated ? p.outputs / 2 : p.outputs; }

// Weights' scale, bias: what is left to do with a row's sums of the outputs from `first` on.
inline void finish_sums(const Packed& p, float* sums, int64_t first, int64_t outputs) {
  if (p.kind != kInt8Weights && p.bias == nullptr) return;
  for (int64_t at = 0; at < outputs; at += W) {
    Vec value = load(sums + at);
    if (p.kind == kInt8Weights) value = value * load(p.scale + first + at);
    if (p.bias != nullptr) value = value + load(p.bias + first + at);
    store(sums + at, value);
  }
}

// silu(gate) * up that is about to be rounded to T.
template <class T>
inline Vec gate_up(Vec gate, Vec up) {
#if WHISPERS_LEVEL >= 1
  if (sizeof(T) == 2) return gate / (splat(1.0f) + exp2_22(gate * splat(-1.44269504f))) * up;
#endif
  return silu(gate) * up;
}

// sums [rows, kPanelOutputs] of 8 gates and 8 ups in turn: silu(gate) * up into `count` columns of the result. From registers: through memory
// a row's numbers would be read back wider than they were written, which waits.
template <class T>
inline void store_gated(const Linear& a, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t count) {
  static_assert(kOutputs == 16);
  T* out = static_cast<T*>(a.out) + row * a.out_row + column;
#if WHISPERS_LEVEL >= 1
  for (int64_t r = 0; r < rows; r += 2) {  // two rows' gates fill a vector; a last row meets itself
    const int64_t last = smaller(r + 1, rows - 1);
    const float *one = sums + r * kPanelOutputs, *other = sums + last * kPanelOutputs;
    for (int64_t at = 0; at < count; at += kOutputs / 2) {
      const Vec x = load(one + 2 * at), y = load(other + 2 * at);
      const Vec gates = _mm512_shuffle_f32x4(x, y, 0x44), ups = _mm512_shuffle_f32x4(x, y, 0xee);
      store_halves(out + r * a.out_row + at, out + last * a.out_row + at, gate_up<T>(gates, ups), count - at);
    }
  }
#else
  for (int64_t r = 0; r < rows; ++r, sums += kPanelOutputs, out += a.out_row) {
    for (int64_t at = 0; at < count; at += W) store(out + at, gate_up<T>(load(sums + 2 * at), load(sums + 2 * at + W)), count - at);
  }
#endif
}

template <class T>
inline void store_row(const Linear& a, const float* sums, int64_t row, int64_t column, int64_t count) {
  T* out = static_cast<T*>(a.out) + row * a.out_row + column;
  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + row * a.residual_row + column;
  int64_t at = 0;
  for (; at + W <= count; at += W) {
    Vec value = load(sums + at);
    if (residual != nullptr) value = value + load(residual + at);
    store_sums(out + at, value);
  }
  if (at == count) return;
  Vec value = load(sums + at, count - at);
  if (residual != nullptr) value = value + load(residual + at, count - at);
  store(out + at, value, count - at);
}

template <class T>
inline void finish_tile(const Linear& a, float* sums, int64_t row, int64_t rows, int64_t first, int64_t outputs) {
  for (int64_t r = 0; r < rows; ++r) finish_sums(a.weights, sums + r * kPanelOutputs, first, outputs);
  const int64_t share = a.weights.gated ? 2 : 1, column = first / share;
  const int64_t count = smaller(outputs / share, columns_of(a.weights) - column);
  if (a.weights.gated) return store_gated<T>(a, sums, row, rows, column, count);
  for (int64_t r = 0; r < rows; ++r) store_row<T>(a, sums + r * kPanelOutputs, row + r, column, count);
}

}  // namespace whispers::WHISPERS_ISA
