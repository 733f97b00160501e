// Rows of x in the words that packed weights meet: as they lie, where that is the same, else converted once a call.
#pragma once

#include "linear_math.h"
#include "lines_ahead.h"
#include "share.h"

namespace whispers::WHISPERS_ISA {

struct LinearRows {
  const float* words;  // row r begins at words + r * row
  int64_t row;
};

// Steps of a row, zeros behind those of the weights: whole tiles of them.
template <class Words>
inline int64_t steps_of_row(const Packed& p) {
  return up_to(steps_of<Words>(p), Words::kTiled ? 16 : 1);
}

template <class Words>
inline int64_t row_words(const Packed& p) {
  const int64_t steps = steps_of_row<Words>(p);
  return steps * Words::kLeft + (Words::kMarks == 0 ? 0 : ceil_div(steps, Words::kSpan) * Words::kMarks);
}

// Whether the weights meet x as it lies: floats for floats; pairs of bf16 for a depth of whole words, or groups or tiles of them.
inline bool reads_in_place(const Linear& a) {
  const int64_t kind = a.weights.kind;
  if (kind == kFloatWeights) return a.x_dtype == kF32;
  const bool pairs = kind != kInt8Weights;
  const int64_t group = kind == kShortWeights ? ShortWords::kGroup : 1, whole = PairWords::kNumbers * (PairWords::kTiled ? 16 : group);
  return WHISPERS_LEVEL >= 2 && pairs && a.x_dtype == kBf16 && a.weights.depth % whole == 0 && a.x_row % 2 == 0;
}

// Bytes of the room that `prepare_rows` writes.
inline int64_t rows_bytes(const Linear& a) {
  if (reads_in_place(a)) return 0;
  int64_t words = 0;
  with_words(a.weights.kind, [&](auto kind) { words = row_words<decltype(kind)>(a.weights); });
  return a.rows * words * 4;
}

// Each: `depth` numbers of a row, zeros behind them up to `padded`.
template <class T>
inline void prepare_row(FloatWords, const T* x, int64_t depth, int64_t, float* words) {
  int64_t at = 0;
  for (; at + W <= depth; at += W) store(words + at, load(x + at));
  if (at < depth) store(words + at, load(x + at, depth - at), depth - at);
}

template <class T>
inline void prepare_row(PairWords, const T* x, int64_t depth, int64_t padded, float* words) {
#if WHISPERS_LEVEL >= 2
  Bf16* out = reinterpret_cast<Bf16*>(words);
  for (int64_t at = 0; at < depth; at += W) store(out + at, load(x + at, depth - at), depth - at);
  for (int64_t at = depth; at < padded; ++at) out[at].bits = 0;
#else
  for (int64_t at = 0; at < depth; at += W) store(words + at, widen(narrow(load(x + at, depth - at), Bf16{}), Bf16{}), depth - at);
  for (int64_t at = depth; at < padded; ++at) words[at] = 0;
#endif
}

inline void store_whole(int16_t* to, Vec numbers, int64_t count) {
#if WHISPERS_LEVEL >= 1
  _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(numbers)));
#else
  float number[W];
  store(number, numbers);
  for (int64_t i = 0; i < smaller(W, count); ++i) to[i] = static_cast<int16_t>(number[i]);
#endif
}

// Numbers at..at + W of a row of `padded`.
inline void store_quads(float* words, int64_t at, [[maybe_unused]] int64_t padded, Vec numbers, [[maybe_unused]] int64_t count) {
#if WHISPERS_LEVEL >= 3  // their high bytes, and behind a row's the low ones, as the weights' lie: see linear_args.h
  const Bits whole = _mm512_cvtps_epi32(numbers);
  const __m128i places = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words) + at;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)), places));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + padded), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole), places));
#else
  store_whole(reinterpret_cast<int16_t*>(words) + at, numbers, count);
#endif
}

// x = number * scale, with a span's largest magnitude at 32767. One with an infinity or a NaN gets the scale NaN.
template <class T>
inline void prepare_row(QuadWords, const T* x, int64_t depth, int64_t padded, float* words) {
  constexpr int64_t kGroup = QuadWords::kSpan * QuadWords::kNumbers;
  float* marks = words + padded / QuadWords::kNumbers * QuadWords::kLeft;
  for (int64_t begin = 0; begin < depth; begin += kGroup, marks += QuadWords::kMarks) {
    const int64_t end = smaller(begin + kGroup, padded);
    Vec most = zero(), spoilt = zero();
    for (int64_t at = begin; at < end; at += W) {
      const Vec value = load(x + at, depth - at);
      most = max(magnitude(value), most);
      spoilt = fma(value, zero(), spoilt);  // NaN from then on
    }
    const float top = largest(most);
    const Vec factor = splat(top > 0x1p-110f ? 32767.0f / top : 0.0f), bound = splat(3e38f);
    for (int64_t at = begin; at < end; at += W) {
      const Vec value = min(max(load(x + at, depth - at), zero() - bound), bound);  // not infinite: that times 0 would be NaN
      store_quads(words, at, padded, round(value * factor), end - at);
    }
    *marks = top * (1.0f / 32767.0f) + sum(spoilt);
  }
}

// Rows [begin, end) into the room.
inline void prepare_rows(const Linear& a, void* room, int64_t begin, int64_t end) {
  with_words(a.weights.kind, [&](auto kind) {
    with_dtype(a.x_dtype, [&](auto x_kind) {
      using T = decltype(x_kind);
      float* words = static_cast<float*>(room);
      const int64_t row = row_words<decltype(kind)>(a.weights), padded = steps_of_row<decltype(kind)>(a.weights) * kind.kNumbers;
      for (int64_t r = begin; r < end; ++r) {
        prepare_row(kind, static_cast<const T*>(a.x) + r * a.x_row, a.weights.depth, padded, words + r * row);
      }
    });
  });
}

// A thread's part of the product.
struct LinearPart {
  Share rows, panels;
  const float* next;             // what it reads after them, or null
  LinesAhead* others = nullptr;  // what other operations read later, fetched meanwhile where tiles are multiplied
};

// The rows that `linear_panels` takes: of x itself or of a room that was prepared.
inline LinearRows rows_of(const Linear& a, void* room) {
  if (reads_in_place(a)) {
    const int64_t words = a.x_dtype == kF32 ? a.x_row : a.x_row / 2;
    return {static_cast<const float*>(a.x), words};
  }
  LinearRows rows{static_cast<const float*>(room), 0};
  with_words(a.weights.kind, [&](auto kind) { rows.row = row_words<decltype(kind)>(a.weights); });
  return rows;
}

}  // namespace whispers::WHISPERS_ISA
