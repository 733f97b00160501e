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
inline Bits repeat_bytes(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Bits shift_nibbles(Bits x) { return _mm512_srli_epi16(x, 4); }
inline Bits look_up(Bits table, Bits codes) { return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, splat_bits(0x0f0f0f0f))); }
inline Bits low_bytes(Bits a, Bits b) { return _mm512_unpacklo_epi8(a, b); }  // in turn, of each 128 bits
inline Bits high_bytes(Bits a, Bits b) { return _mm512_unpackhi_epi8(a, b); }
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
inline Bits repeat_bytes(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Bits shift_nibbles(Bits x) { return _mm256_srli_epi16(x, 4); }
inline Bits look_up(Bits table, Bits codes) { return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, splat_bits(0x0f0f0f0f))); }
inline Bits low_bytes(Bits a, Bits b) { return _mm256_unpacklo_epi8(a, b); }
inline Bits high_bytes(Bits a, Bits b) { return _mm256_unpackhi_epi8(a, b); }
#endif

constexpr int64_t kWhole = int64_t{1} << 62;

// Words that lie as they are multiplied, one step after the other.
struct AsStored {
  static constexpr int kGroup = 1;       // steps that lie together,
  static constexpr int kGroupWords = 1;  // in so many words an output,
  static constexpr int kTogether = 1;    // read so many at a time
  struct Key {
    explicit Key(const uint8_t*) {}
  };
  static void read(const Key&, const float* w, int64_t, int, Vec* words, float*) { words[0] = load(w); }
};

// Sums of a span that are what they are.
struct PlainSpans {
  static constexpr int kMarks = 0;
  using Sum = Vec;
  static Vec begin() { return zero(); }
  static Vec end(Vec sum, const float*) { return sum; }
};

struct FloatWords : PlainSpans, AsStored {
  static constexpr bool kTiled = false;  // whether tiles are multiplied (see tiles.h), not vectors
  static constexpr int kNumbers = 1, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = 64;  // in one go, 1001 float32 lost 4 times what torch loses; so, less than torch
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return fma(x, w, sum); }
};

#if WHISPERS_LEVEL >= 2
struct PairWords : PlainSpans, AsStored {
  static constexpr bool kTiled = WHISPERS_LEVEL >= 3;
  static constexpr int kNumbers = 2, kLeft = 1, kRows = kOneWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Vec;
  static Wide weight(Vec words) { return words; }
  static Wide left(const float* x) { return splat(*x); }
  static Vec multiply(Wide x, Wide w, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)as_bits(x), (__m512bh)as_bits(w)); }
};
#else
struct PairWords : PlainSpans, AsStored {  // x as two floats
  static constexpr bool kTiled = false;
  static constexpr int kNumbers = 2, kLeft = 2, kRows = kTwoWordRows;
  static constexpr int64_t kSpan = kWhole;
  using Wide = Two;
  static Wide weight(Vec words) { return {shift_left(words), high_half(words)}; }
  static Wide left(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static Vec multiply(const Wide& x, const Wide& w, Vec sum) { return fma(x.b, w.b, fma(x.a, w.a, sum)); }
};
#endif

// Pairs in 24 bits: see linear_args.h. Two steps of W outputs are six instructions, which on Zen 4 run beside the products.
struct ShortWords : PairWords {
  static constexpr int kGroup = 4, kGroupWords = 3, kTogether = 2;
  struct Key {
    explicit Key(const uint8_t* highs) : highs(repeat_bytes(highs)) {}
    Bits highs;
  };
  // The first (0) or second (1) half of the group at `w`.
  static void read(const Key& key, const float* w, int64_t width, int half, Vec* words, float*) {
    const Bits codes = as_bits(load(w)), low = as_bits(load(w + (1 + half) * width));
    const Bits high = look_up(key.highs, half == 0 ? codes : shift_nibbles(codes));
    words[0] = as_vec(low_bytes(low, high));
    words[1] = as_vec(high_bytes(low, high));
  }
};

// Short ones that are left as pairs [steps, width] for the tiles to come.
struct KeptWords : ShortWords {
  static void read(const Key& key, const float* w, int64_t width, int half, Vec* words, float* pairs) {
    ShortWords::read(key, w, width, half, words, pairs);
    for (int s = 0; s < kTogether; ++s) store(pairs + (half * kTogether + s) * width, words[s]);
  }
};

#if WHISPERS_LEVEL >= 3
// Pairs of weights on grids, in 5 or 9 bits a weight: see linear_args.h. A step of W outputs takes six cycles, three times what it takes from 12
// bits: too long beside products by vectors, but less than memory takes for 12 bits where tiles multiply.
template <int kCodeBits>
struct GridWords : PairWords {
  static constexpr int kBits = kCodeBits, kLevels = 1 << kBits;
  static constexpr int kGroup = 16, kGroupWords = 1 + kBits;
  static constexpr int kLines = kBits / 2, kSteps = 32 / kBits;  // lines of codes of half of the outputs, steps of a line
  struct Key {
    explicit Key(const uint8_t*) {}
    Vec levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Bits twice[2] = {_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                     _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)};
  };
  // What a code is multiplied with and added to. Of 8 bits codes become the upper mantissas of 1 + code / 256: two instructions, not three.
  struct Grid {
    Grid(Vec scale, Vec minimum)
        : scale(kBits == 4 ? scale : scale * splat(kLevels)), minimum(kBits == 4 ? minimum : fnma(scale, splat(kLevels), minimum)) {}
    Vec scale, minimum;
    Vec weight(Vec code) const { return fma(code, scale, minimum); }
  };
  static Vec as_unpacked(Vec code) { return kBits == 4 ? code : fma(code, splat(1.0f / kLevels), splat(1.0f)); }
  // The codes of step `step` of a line, as grids take them.
  static Vec codes(const Key& key, Bits line, int step) {
    if (kBits == 4) return _mm512_permutexvar_ps(_mm512_srli_epi32(line, 4 * step), key.levels);  // by the lowest 4 bits of a lane
    const int up = 23 - kBits - kBits * step;
    const Bits there = up >= 0 ? _mm512_slli_epi32(line, up >= 0 ? up : 0) : _mm512_srli_epi32(line, up >= 0 ? 0 : -up);
    return as_vec(_mm512_ternarylogic_epi32(there, splat_bits((kLevels - 1) << (23 - kBits)), splat_bits(127 << 23), 0xea));  // a & b | c
  }
  // The 16 steps of W outputs at `w` into `to`; lines are `width` words apart, in both. With each line, where `fetches`, that `ahead` words behind
  // it is fetched.
  template <bool fetches>
  static void unpack(const Key& key, const float* w, int64_t width, float* to, int64_t ahead) {
    const auto line = [&](int64_t number) {
      if (fetches) __builtin_prefetch(w + number * width + ahead, 0, 1);
      return as_bits(load(w + number * width));
    };
    const Bits head = line(0);
    const Grid grid(_mm512_cvtph_ps(_mm512_castsi512_si256(head)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(head, 1)));
    Vec scales[2], minima[2];
    for (int i = 0; i < 2; ++i) {
      scales[i] = _mm512_permutexvar_ps(key.twice[i], grid.scale);
      minima[i] = _mm512_permutexvar_ps(key.twice[i], grid.minimum);
    }
#pragma GCC unroll 4
    for (int part = 0; part < kLines; ++part) {
      const Bits lines[2] = {line(1 + part), line(1 + kLines + part)};
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step, to += width) {
        Vec value[2];
        for (int i = 0; i < 2; ++i) value[i] = fma(codes(key, lines[i], step), scales[i], minima[i]);
        store(to, as_vec((Bits)_mm512_cvtne2ps_pbh(value[1], value[0])));
      }
    }
  }
};
#endif

// x as int16: as int8 it would lose more than the weights do. A row has a word for each span behind its numbers, the scale of them.
struct QuadWords : AsStored {
  static constexpr bool kTiled = WHISPERS_LEVEL >= 3;
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
  } else if (kind == kShortWeights) {
    f(ShortWords{});
#if WHISPERS_LEVEL >= 3
  } else if (kind == kGrid4Weights) {
    f(GridWords<4>{});
  } else if (kind == kGrid8Weights) {
    f(GridWords<8>{});
#endif
  } else {
    f(QuadWords{});
  }
}

// The outputs of panel `panel`.
inline int64_t width_of(int64_t outputs, int64_t panel) {
  return smaller(kPanelOutputs, ceil_div(outputs, kOutputs) * kOutputs - panel * kPanelOutputs);
}

template <class Words>
inline int64_t steps_of(const Packed& p) {
  return ceil_div(p.depth, Words::kNumbers * Words::kGroup) * Words::kGroup;
}

// Words that an output takes.
template <class Words>
inline int64_t stored_of(const Packed& p) {
  return steps_of<Words>(p) / Words::kGroup * Words::kGroupWords;
}

}  // namespace whispers::WHISPERS_ISA
