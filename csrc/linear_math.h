// What a word of packed weights means to one instruction set: how many words of x meet it, and how they are multiplied.
//
// Each kind has `kNumbers` (numbers a word), `kLeft` (words of x a step), `kSpan` (steps that are summed in registers; the spans' sums are
// added up behind them) and the multiply-accumulate of one vector of weights. Four int8, and two bf16 without an instruction for them, are
// widened to two vectors, and x is prepared as two words.
#pragma once

#include "linear_args.h"
#include "simd_math.h"

namespace whispers::WHISPERS_ISA {

struct Two {
  Vec a, b;
};

#if WHISPERS_LEVEL >= 1
constexpr int kTileVecs = 3;
constexpr int kOneWordRows = 8;  // see kPanelBlocks
constexpr int kTwoWordRows = 6;  // 18 accumulators, 6 weights, 2 of x, a mask or a shift's temporary
inline Vec shift_left(Vec x) { return as_vec(_mm512_slli_epi32(as_bits(x), 16)); }
inline Vec high_half(Vec x) { return as_vec(_mm512_and_si512(as_bits(x), splat_bits(-65536))); }
inline Vec even_bytes(Vec x) { return as_vec(_mm512_srai_epi16(_mm512_slli_epi16(as_bits(x), 8), 8)); }
inline Vec odd_bytes(Vec x) { return as_vec(_mm512_srai_epi16(as_bits(x), 8)); }
inline Vec floats_of(Bits integers) { return _mm512_cvtepi32_ps(integers); }
#if WHISPERS_LEVEL >= 2
inline Bits add_pairs(Vec a, Vec b, Bits sum) { return _mm512_dpwssd_epi32(sum, as_bits(a), as_bits(b)); }
#else
inline Bits add_pairs(Vec a, Vec b, Bits sum) { return _mm512_add_epi32(sum, _mm512_madd_epi16(as_bits(a), as_bits(b))); }
#endif
#else
constexpr int kTileVecs = 2;     // one block
constexpr int kOneWordRows = 5;  // 10 accumulators, 2 weights, 1 of x, of 16 registers
constexpr int kTwoWordRows = 4;  // 8 accumulators, 4 weights, 2 of x
inline Vec shift_left(Vec x) { return as_vec(_mm256_slli_epi32(as_bits(x), 16)); }
inline Vec high_half(Vec x) { return as_vec(_mm256_and_si256(as_bits(x), splat_bits(-65536))); }
inline Vec even_bytes(Vec x) { return as_vec(_mm256_srai_epi16(_mm256_slli_epi16(as_bits(x), 8), 8)); }
inline Vec odd_bytes(Vec x) { return as_vec(_mm256_srai_epi16(as_bits(x), 8)); }
inline Bits add_pairs(Vec a, Vec b, Bits sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(as_bits(a), as_bits(b))); }
inline Vec floats_of(Bits integers) { return _mm256_cvtepi32_ps(integers); }
#endif

constexpr int64_t kWhole = int64_t{1} << 62;

// Sums of a span that are what they are.
struct PlainSpans {
  static constexpr int kMarks = 0;
  using Sum = Vec;
  static Vec begin() { return zero(); }
  static Vec end(Vec sum, const float*) { return sum; }
};

struct FloatWords : PlainSpans {
  static constexpr int kNumbers = 1, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = 64;  // in one go, 1001 float32 lost 4 times what torch loses; so, less than torch
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return fma(x, w, sum); }
};

#if WHISPERS_LEVEL >= 2
struct PairWords : PlainSpans {
  static constexpr int kNumbers = 2, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)as_bits(x), (__m512bh)as_bits(w)); }
};
#else
struct PairWords : PlainSpans {  // x as two floats
  static constexpr int kNumbers = 2, kLeft = 2, kRows = kTwoWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Two;
  static Wide weight(Vec words) { return {shift_left(words), high_half(words)}; }
  static Wide left(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static Vec multiply(const Wide& x, const Wide& w, Vec sum) { return fma(x.b, w.b, fma(x.a, w.a, sum)); }
};
#endif

// x as int16: as int8 it would lose more than the weights do. A row has a word for each span behind its numbers, the scale of them.
struct QuadWords {
  static constexpr int kNumbers = 4, kLeft = 2, kRows = kTwoWordRows, kMarks = 1;
  static constexpr int64_t kSpan = 64;  // 256 numbers: their products' sum is below 256 * 127 * 32767 < 2^31
  using Wide = Two;
  using Sum = Bits;
  static Wide weight(Vec words) { return {even_bytes(words), odd_bytes(words)}; }
  static Wide left(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static Bits begin() { return splat_bits(0); }
  static Bits multiply(const Wide& x, const Wide& w, Bits sum) { return add_pairs(x.b, w.b, add_pairs(x.a, w.a, sum)); }
  static Vec end(Bits sum, const float* marks) { return floats_of(sum) * splat(marks[0]); }
};

// Calls `f` with the words of a kind of weights.
template <class F>
inline void with_words(int64_t kind, F&& f) {
  if (kind == kFloatWeights) {
    f(FloatWords{});
  } else if (kind == kBf16Weights) {
    f(PairWords{});
  } else {
    f(QuadWords{});
  }
}

template <class Words>
inline int64_t steps_of(const Packed& p) {
  return ceil_div(p.depth, Words::kNumbers);
}

}  // namespace whispers::WHISPERS_ISA
