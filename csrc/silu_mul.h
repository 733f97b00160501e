// silu(gate) * up.
#pragma once

#include "args.h"
#include "share.h"
#include "simd_math.h"
#include "team.h"

namespace whispers::WHISPERS_ISA {

inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(zero() - x)); }

// Columns [begin, end) of one row.
template <class T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + W <= end; at += W) store(out + at, silu(load(gate + at)) * load(up + at));
  if (at < end) store(out + at, silu(load(gate + at, end - at)) * load(up + at, end - at), end - at);
}

template <class T>
inline void silu_mul_part(const SiluMul& a, int64_t begin, int64_t end) {  // of all rows' columns, counted through
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / a.width, column = at % a.width, stop = smaller(a.width, column + end - at);
    const T* gate = static_cast<const T*>(a.gate_up) + row * a.row_stride;
    silu_mul_row(gate, gate + a.width, static_cast<T*>(a.out) + row * a.width, column, stop);
    at += stop - column;
  }
}

// One thread's share; every column is computed alone, so that shares change no bits.
inline void silu_mul(const SiluMul& a, const Crew& crew) {
  const Share share = share_of(a.rows * a.width, crew, 64);
  with_dtype(a.dtype, [&](auto kind) { silu_mul_part<decltype(kind)>(a, share.begin, share.end); });
}

}  // namespace whispers::WHISPERS_ISA
