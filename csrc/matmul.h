// The matrix product inside attention: C [M, N] = A [M, K] B [K, N], or shrink C + A B, by blocks that stay in registers.
//
// K is counted in words of 32 bits: one float, or two bf16 that meet two others (`Pairs`). Every element of C is summed in the order of K
// whatever the block it lies in, so that a row's bits do not depend on how many rows there are. `meanwhile` is called at every step of K: what
// is asked for there is spread evenly over the product.
#pragma once

#include "simd_math.h"
#include "tiles.h"

namespace whispers::WHISPERS_ISA {

#if WHISPERS_LEVEL >= 1
constexpr int kBlockRows = 6, kBlockVecs = 4;  // 24 accumulators of 32 registers, 4 of B, 1 of A
#else
constexpr int kBlockRows = 6, kBlockVecs = 2;  // 12 of 16
#endif
constexpr int64_t kPanel = int64_t{kBlockVecs} * W;  // columns of a block

// Words are floats.
struct Floats {
  static constexpr int kPack = 1;        // numbers a word
  static constexpr bool kTiled = false;  // whether tiles are multiplied, not vectors

  static Vec multiply(Vec a, Vec b, Vec c) { return fma(a, b, c); }

  // W words from `numbers` numbers, zeros behind them.
  template <class T>
  static Vec words(const T* p, int64_t numbers) {
    return load(p, numbers);
  }
  // kPack neighbours in K, interleaved along N.
  template <class T>
  static void interleave(const T* const* rows, int64_t width, float* out) {
    for (int64_t at = 0; at < width; at += W) store(out + at, load(rows[0] + at, width - at));
  }
  // kPack vectors of floats, as one row's words.
  static Vec first_number(Vec words) { return words; }  // of a word; zeros for the others
  static void store_words(float* out, const Vec* x) { store(out, x[0]); }
  static Vec exp2(Vec x) { return WHISPERS_ISA::exp2(x); }
};

#if WHISPERS_LEVEL >= 2
// Words are two bf16, multiplied with two others and summed in float32 by one instruction.
struct Pairs {
  static constexpr int kPack = 2;
  static constexpr bool kTiled = WHISPERS_LEVEL >= 3;

  static Vec multiply(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)as_bits(a), (__m512bh)as_bits(b));
  }
  static Vec words(const Bf16* p, int64_t numbers) {
    if (numbers >= 2 * W) return as_vec(_mm512_loadu_si512(p));
    return as_vec(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << larger(numbers, 0)) - 1), p));
  }
  static Vec words(const Fp8* p, int64_t numbers) {  // exact: three bits of mantissa fit seven
    return as_vec((__m512i)_mm512_cvtne2ps_pbh(load(p + W, numbers - W), load(p, numbers)));
  }
  template <class T>
  static void interleave(const T* const* rows, int64_t width, float* out) {
    // Number i of one row (index i) and number i of the other (32 + i) make word i.
    const Bits lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Bits low = _mm512_add_epi32(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), splat_bits(32 << 16));
    const Bits high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t at = 0; at < width; at += 2 * W) {
      const Bits a = as_bits(words(rows[0] + at, width - at));
      const Bits b = rows[1] == nullptr ? _mm512_setzero_si512() : as_bits(words(rows[1] + at, width - at));
      store(out + at, as_vec(_mm512_permutex2var_epi16(a, low, b)));
      if (at + W < width) store(out + at + W, as_vec(_mm512_permutex2var_epi16(a, high, b)));
    }
  }
  static Vec first_number(Vec words) { return as_vec(_mm512_and_si512(as_bits(words), splat_bits(0xffff))); }
  static void store_words(float* out, const Vec* x) { store(out, as_vec((__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]))); }
  static Vec exp2(Vec x) { return exp2_22(x); }
};
#endif

// B, by where its vectors of W columns begin: its rows come in chunks of `rows`, `row` words apart, each chunk somewhere else.
struct Right {
  const float* const* at;  // [chunks, vecs]
  int64_t vecs, rows, row;
};

template <class Math, int kRows, int kVecs, bool kAdd, class Meanwhile>
inline void multiply_block(const float* a, int64_t a_row, const Right& b, int64_t vec, float* c, int64_t c_row, int64_t depth,
                           const float* shrink, Meanwhile& meanwhile) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sums[i][j] = kAdd ? load(c + i * c_row + j * W) * splat(shrink[i]) : zero();
  }
  const float* const* at = b.at + vec;
  for (int64_t k = 0; k < depth; at += b.vecs) {
    const float* from[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) from[j] = at[j];
    const int64_t stop = smaller(k + b.rows, depth);
    for (int64_t word = 0; k < stop; ++k, word += b.row) {
      meanwhile();
      Vec right[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) right[j] = load(from[j] + word);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec left = splat(a[i * a_row + k]);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sums[i][j] = Math::multiply(left, right[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) store(c + i * c_row + j * W, sums[i][j]);
  }
}

// All rows of kVecs vectors of columns, from vector `vec` on.
template <class Math, int kVecs, bool kAdd, class Meanwhile>
__attribute__((noinline)) void multiply_vecs(int64_t rows, const float* a, int64_t a_row, const Right& b, int64_t vec, float* c, int64_t c_row,
                                             int64_t depth, const float* shrink, Meanwhile& meanwhile) {
  int64_t row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) {
    multiply_block<Math, kBlockRows, kVecs, kAdd>(a + row * a_row, a_row, b, vec, c + row * c_row, c_row, depth, shrink + row, meanwhile);
  }
  a += row * a_row, c += row * c_row, shrink += row;
  switch (rows - row) {
    case 1: return multiply_block<Math, 1, kVecs, kAdd>(a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
    case 2: return multiply_block<Math, 2, kVecs, kAdd>(a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
    case 3: return multiply_block<Math, 3, kVecs, kAdd>(a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
    case 4: return multiply_block<Math, 4, kVecs, kAdd>(a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
    case 5: return multiply_block<Math, 5, kVecs, kAdd>(a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
  }
}

#if WHISPERS_LEVEL >= 3
// Up to 16 kTall rows by 16 kWide columns of C.
template <int kTall, int kWide, bool kAdd, class Meanwhile>
inline void multiply_block_of_tiles(const float* a, int64_t a_row, const Right& b, int64_t vec, float* c, int64_t c_row, int64_t depth,
                                    Meanwhile& meanwhile) {
  const int64_t a_bytes = a_row * 4, b_bytes = b.row * 4, c_bytes = c_row * 4;
  each_tile<kTall, kWide>([&](auto i, auto j, auto tile) {
    if constexpr (kAdd) {
      load_tile<tile.value>(c + i.value * kTile * c_row + j.value * kTile, c_bytes);
    } else {
      clear_tile<tile.value>();
    }
  });
  const float* const* at = b.at + vec;
  for (int64_t k = 0; k < depth; at += b.vecs) {
    const float* columns[kWide];
    for (int j = 0; j < kWide; ++j) columns[j] = at[j];
    for (const int64_t stop = smaller(k + b.rows, depth); k < stop; k += kTile) {
      meanwhile();
      const float* const rows[] = {a + k, a + k + kTile * a_row};
      multiply_tiles<kTall, kWide>(rows, a_bytes, columns, b_bytes);
      for (int j = 0; j < kWide; ++j) columns[j] += kTile * b.row;
    }
  }
  each_tile<kTall, kWide>([&](auto i, auto j, auto tile) { store_tile<tile.value>(c + i.value * kTile * c_row + j.value * kTile, c_bytes); });
}

// As `multiply`. `a` and `c` have room for whole tiles of rows, and rows of `b` and words of `a` are there, or zeros, for whole tiles of depth.
template <bool kAdd, class Meanwhile>
inline void multiply_by_tiles(int64_t rows, int64_t vecs, const float* a, int64_t a_row, const Right& b, float* c, int64_t c_row, int64_t depth,
                              const float* shrink, Meanwhile& meanwhile) {
  static_assert(W == kTile);
  if constexpr (kAdd) {
    for (int64_t i = 0; i < rows; ++i) {
      const Vec factor = splat(shrink[i]);
      for (int64_t at = 0; at < vecs * W; at += W) store(c + i * c_row + at, load(c + i * c_row + at) * factor);
    }
  }
  for (int64_t row = 0; row < rows; row += 2 * kTile, a += 2 * kTile * a_row, c += 2 * kTile * c_row) {
    int64_t vec = 0;
    if (rows - row > kTile) {
      for (; vec + 2 <= vecs; vec += 2) multiply_block_of_tiles<2, 2, kAdd>(a, a_row, b, vec, c + vec * W, c_row, depth, meanwhile);
      if (vec < vecs) multiply_block_of_tiles<2, 1, kAdd>(a, a_row, b, vec, c + vec * W, c_row, depth, meanwhile);
      continue;
    }
    for (; vec + 4 <= vecs; vec += 4) multiply_block_of_tiles<1, 4, kAdd>(a, a_row, b, vec, c + vec * W, c_row, depth, meanwhile);
    if (vec + 2 <= vecs) multiply_block_of_tiles<1, 2, kAdd>(a, a_row, b, vec, c + vec * W, c_row, depth, meanwhile), vec += 2;
    if (vec < vecs) multiply_block_of_tiles<1, 1, kAdd>(a, a_row, b, vec, c + vec * W, c_row, depth, meanwhile);
  }
}
#endif

// C of `vecs` vectors of columns.
template <class Math, bool kAdd, class Meanwhile>
inline void multiply(int64_t rows, int64_t vecs, const float* a, int64_t a_row, const Right& b, float* c, int64_t c_row, int64_t depth,
                     const float* shrink, Meanwhile& meanwhile) {
#if WHISPERS_LEVEL >= 3
  if constexpr (Math::kTiled) return multiply_by_tiles<kAdd>(rows, vecs, a, a_row, b, c, c_row, depth, shrink, meanwhile);
#endif
  int64_t vec = 0;
  for (; vec + kBlockVecs <= vecs; vec += kBlockVecs, c += kPanel) {
    multiply_vecs<Math, kBlockVecs, kAdd>(rows, a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
  }
  switch (vecs - vec) {
    case 1: return multiply_vecs<Math, 1, kAdd>(rows, a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
#if WHISPERS_LEVEL >= 1
    case 2: return multiply_vecs<Math, 2, kAdd>(rows, a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
    case 3: return multiply_vecs<Math, 3, kAdd>(rows, a, a_row, b, vec, c, c_row, depth, shrink, meanwhile);
#endif
  }
}

// How often `multiply` calls `meanwhile`, at least.
template <class Math>
inline int64_t steps_of_product(int64_t rows, int64_t vecs, int64_t depth) {
#if WHISPERS_LEVEL >= 3
  if constexpr (Math::kTiled) {
    const int64_t rest = rows % (2 * kTile), blocks = rows / (2 * kTile) * ceil_div(vecs, 2);
    return (blocks + (rest == 0 ? 0 : ceil_div(vecs, rest > kTile ? 2 : 4))) * ceil_div(depth, kTile);
  }
#endif
  return ceil_div(rows, kBlockRows) * ceil_div(vecs, kBlockVecs) * depth;
}

}  // namespace whispers::WHISPERS_ISA
