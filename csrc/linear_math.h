// What a word of packed weights means to one instruction set: how many words of x meet it, and how they are multiplied.
//
// Each kind has `kNumbers` (numbers a word), `kLeft` (words of x a step), `kSpan` (steps that are summed in one go; a row's spans are then
// added up, which keeps the error of a long sum of float32 small: 4 times at a depth of 1001), and multiply-accumulate of one vector of weights. Without an
// instruction for pairs or quads, a word is widened to two vectors and x is prepared as two words.
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
constexpr int kTwoWordRows = 6;  // 18 accumulators, 6 weights, 2 of x, a mask
inline Vec shift_left(Vec x) { return as_vec(_mm512_slli_epi32(as_bits(x), 16)); }
inline Vec high_half(Vec x) { return as_vec(_mm512_and_si512(as_bits(x), splat_bits(-65536))); }
inline Vec even_bytes(Vec x) { return as_vec(_mm512_srai_epi16(_mm512_slli_epi16(as_bits(x), 8), 8)); }
inline Vec odd_bytes(Vec x) { return as_vec(_mm512_srai_epi16(as_bits(x), 8)); }
inline Vec add_pairs(Vec a, Vec b, Vec sum) { return as_vec(_mm512_add_epi32(as_bits(sum), _mm512_madd_epi16(as_bits(a), as_bits(b)))); }
inline Vec floats_of(Vec integers, const int32_t* minus) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(as_bits(integers), _mm512_loadu_si512(minus))); }
#else
constexpr int kTileVecs = 2;     // one block
constexpr int kOneWordRows = 5;  // 10 accumulators, 2 weights, 1 of x, of 16 registers
constexpr int kTwoWordRows = 4;  // 8 accumulators, 4 weights, 2 of x
inline Vec shift_left(Vec x) { return as_vec(_mm256_slli_epi32(as_bits(x), 16)); }
inline Vec high_half(Vec x) { return as_vec(_mm256_and_si256(as_bits(x), splat_bits(-65536))); }
inline Vec even_bytes(Vec x) { return as_vec(_mm256_srai_epi16(_mm256_slli_epi16(as_bits(x), 8), 8)); }
inline Vec odd_bytes(Vec x) { return as_vec(_mm256_srai_epi16(as_bits(x), 8)); }
inline Vec add_pairs(Vec a, Vec b, Vec sum) { return as_vec(_mm256_add_epi32(as_bits(sum), _mm256_madd_epi16(as_bits(a), as_bits(b)))); }
inline Vec floats_of(Vec integers, const int32_t* minus) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(as_bits(integers), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(minus))));
}
#endif

constexpr int64_t kWhole = int64_t{1} << 62;

struct FloatWords {
  static constexpr int kNumbers = 1, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = 64;
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return fma(x, w, sum); }
};

#if WHISPERS_LEVEL >= 2
struct PairWords {
  static constexpr int kNumbers = 2, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)as_bits(x), (__m512bh)as_bits(w)); }
};

struct QuadWords {  // x as unsigned bytes
  static constexpr int kNumbers = 4, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return as_vec(_mm512_dpbusd_epi32(as_bits(sum), as_bits(x), as_bits(w))); }
};
#else
struct PairWords {  // x as two floats
  static constexpr int kNumbers = 2, kLeft = 2, kRows = kTwoWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Two;
  static Wide weight(Vec words) { return {shift_left(words), high_half(words)}; }
  static Wide left(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static Vec multiply(const Wide& x, const Wide& w, Vec sum) { return fma(x.b, w.b, fma(x.a, w.a, sum)); }
};

struct QuadWords {  // x as int16: numbers 0 and 2, then 1 and 3
  static constexpr int kNumbers = 4, kLeft = 2, kRows = kTwoWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Two;
  static Wide weight(Vec words) { return {even_bytes(words), odd_bytes(words)}; }
  static Wide left(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static Vec multiply(const Wide& x, const Wide& w, Vec sum) { return add_pairs(x.b, w.b, add_pairs(x.a, w.a, sum)); }
};
#endif

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
