// y = x W^T (+ bias) (+ residual), or silu(gate) * up, over packed weights: what a decoder's time goes into.
//
// A thread reads its own panels, one after the other, once for all rows: with few rows the weights come from memory as fast as it gives
// them; with many rows a panel stays in the cache until every row has met it, and the next one is fetched meanwhile.
#pragma once

#include "linear_rows.h"
#include "linear_short.h"
#include "linear_tile.h"
#include "silu_mul.h"

namespace whispers::WHISPERS_ISA {

constexpr int64_t kMostRows = 8;  // of a tile, in any kind of words
constexpr int64_t kFirstLines = 64;  // of a stream, fetched before it begins

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

// sums [rows, kPanelOutputs] of 8 gates and 8 ups in turn become silu(gate) * up, `outputs / 2` a row.
inline void gate_sums(float* sums, int64_t rows, int64_t outputs) {
  static_assert(kOutputs == 16);
#if WHISPERS_LEVEL >= 1
  for (int64_t row = 0; row < rows; row += 2) {  // two rows' gates fill a vector; a last row meets itself
    float *one = sums + row * kPanelOutputs, *other = row + 1 < rows ? one + kPanelOutputs : one;
    for (int64_t at = 0; at < outputs; at += kOutputs) {
      const Vec a = load(one + at), b = load(other + at);
      const Vec gates = _mm512_shuffle_f32x4(a, b, 0x44), ups = _mm512_shuffle_f32x4(a, b, 0xee), gated = silu(gates) * ups;
      _mm256_storeu_ps(one + at / 2, _mm512_castps512_ps256(gated));
      _mm256_storeu_ps(other + at / 2, _mm512_extractf32x8_ps(gated, 1));
    }
  }
#else
  for (int64_t row = 0; row < rows; ++row, sums += kPanelOutputs) {
    for (int64_t at = 0; at < outputs; at += kOutputs) store(sums + at / 2, silu(load(sums + at)) * load(sums + at + W));
  }
#endif
}

template <class T>
inline void store_sums(const Linear& a, const float* sums, int64_t row, int64_t column, int64_t count) {
  T* out = static_cast<T*>(a.out) + row * a.out_row + column;
  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + row * a.residual_row + column;
  for (int64_t at = 0; at < count; at += W) {
    Vec value = load(sums + at, count - at);
    if (residual != nullptr) value = value + load(residual + at, count - at);
    store(out + at, value, count - at);
  }
}

template <class T>
inline void finish_tile(const Linear& a, float* sums, int64_t row, int64_t rows, int64_t first, int64_t outputs) {
  for (int64_t r = 0; r < rows; ++r) finish_sums(a.weights, sums + r * kPanelOutputs, first, outputs);
  const int64_t share = a.weights.gated ? 2 : 1, column = first / share;
  if (a.weights.gated) gate_sums(sums, rows, outputs);
  const int64_t count = smaller(outputs / share, columns_of(a.weights) - column);
  for (int64_t r = 0; r < rows; ++r) store_sums<T>(a, sums + r * kPanelOutputs, row + r, column, count);
}

// Whether the first of several tiles leaves a panel of short weights as pairs for the others. Decoding costs a tile 3 % on Zen 4 (15 % where
// somebody else computes on the same cores), leaving pairs costs as much as decoding for 4 tiles.
inline bool keeps_pairs(const Linear& a) { return a.weights.kind == kShortWeights && a.rows > 4 * ShortWords::kRows; }

// Bytes of each thread's scratch.
inline int64_t linear_scratch(const Linear& a) { return keeps_pairs(a) ? kPanelOutputs * steps_of<ShortWords>(a.weights) * 4 : 0; }

// Panels [begin, end) of all rows. `next`: what this thread reads after them, or null. `pairs`: this thread's scratch.
template <class Words, class T>
inline void linear_panels(const Linear& a, const LinearRows& x, int64_t begin, int64_t end, const float* next, float* pairs) {
  constexpr bool is_short = Words::kGroup > 1;
  const bool keeps = is_short && keeps_pairs(a);
  const int64_t steps = steps_of<Words>(a.weights), stored = stored_of<Words>(a.weights);
  const int64_t tiles = ceil_div(a.rows, Words::kRows), chunks = ceil_div(steps, kFetchSteps);
  const int64_t each = a.rows / tiles, more = a.rows % tiles;  // rows of a tile: as equal as can be
  alignas(64) float sums[kMostRows * kPanelOutputs];
  for (int64_t number = begin; number < end; ++number) {
    Panel panel{a.weights.words + number * kPanelOutputs * stored, width_of(a.weights.outputs, number), a.weights.highs, pairs};
    const float* after = number + 1 < end ? panel.words + kPanelOutputs * stored : next;
    // Rows of one tile read panels as a stream, which a processor fetches by itself, and faster than it is told to (on Zen 4, 30 layers:
    // 8.3 -> 5.9 ms for 8 rows, 6.3 -> 5.6 for one). It only can't know where the next stream begins. Of several tiles the first one waits
    // for memory and the others don't: the next panel's lines, in equal parts over all of them (12 rows: 8.0 -> 6.3 ms). Short weights'
    // lines are not read once each in the order of memory, which the processor does not follow: with one tile, too (8 rows, beside pairs: 1.12
    // of their time, so 0.83).
    const int64_t panel_lines = ceil_div(stored * kPanelOutputs * 4, kLine);
    const int64_t lines = tiles > 1 || is_short ? panel_lines : number + 1 == end ? smaller(panel_lines, kFirstLines) : 0;
    const int64_t a_chunk = ceil_div(lines, tiles * chunks);
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t rows = each + (tile < more ? 1 : 0), fetched = tile * chunks * a_chunk;
      const bool fetch = after != nullptr && fetched < lines;
      const Ahead ahead{reinterpret_cast<const char*>(after) + fetched * kLine, fetch ? a_chunk : 0};
      const float* of_x = x.words + row * x.row;
      if (!keeps) {
        panel_of_rows<Words>(rows, panel, of_x, x.row, steps, sums, ahead);
      } else if (tile == 0) {
        panel_of_rows<KeptWords>(rows, panel, of_x, x.row, steps, sums, ahead);
        panel.words = pairs;
      } else {
        panel_of_rows<PairWords>(rows, panel, of_x, x.row, steps, sums, ahead);
      }
      if (is_short) add_rare(a.weights, number, of_x, x.row, rows, sums);
      finish_tile<T>(a, sums, row, rows, number * kPanelOutputs, panel.width);
      row += rows;
    }
  }
}

inline int64_t words_of_panel(const Packed& p) {
  int64_t words = 0;
  with_words(p.kind, [&](auto kind) { words = kPanelOutputs * stored_of<decltype(kind)>(p); });
  return words;
}

// This thread's panels, of rows that are ready: for callers that prepare them otherwise.
inline void linear_share(const Linear& a, const LinearRows& x, const Crew& crew) {
  const Share share = share_of(panels_of(a.weights), crew);
  const float* next = a.next == nullptr ? nullptr : a.next->words + share_of(panels_of(*a.next), crew).begin * words_of_panel(*a.next);
  with_words(a.weights.kind, [&](auto kind) {
    with_dtype(a.out_dtype, [&](auto out_kind) {
      linear_panels<decltype(kind), decltype(out_kind)>(a, x, share.begin, share.end, next, static_cast<float*>(crew.own()));
    });
  });
}

// `room`: rows_bytes(a) bytes that all threads share.
inline void linear(const Linear& a, const Crew& crew, void* room) {
  if (a.rows == 0) return;
  if (!reads_in_place(a)) {
    const Share share = share_of(a.rows, crew);
    prepare_rows(a, room, share.begin, share.end);
    crew.barrier();
  }
  linear_share(a, rows_of(a, room), crew);
}

inline void linear(const Linear& a, const Crew& crew) { linear(a, crew, crew.shared()); }

}  // namespace whispers::WHISPERS_ISA
