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
constexpr int64_t kRowsApart = 64;   // of each thread, from which on rows are divided and not panels

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

// Whether the first of several tiles leaves a panel of short weights as pairs for the others. Decoding costs a tile 3 % on Zen 4 (15 % where
// somebody else computes on the same cores), leaving pairs costs as much as decoding for 4 tiles.
inline bool keeps_pairs(const Linear& a) { return a.weights.kind == kShortWeights && a.rows > 4 * ShortWords::kRows; }

// Bytes of each thread's scratch.
inline int64_t linear_scratch(const Linear& a) { return keeps_pairs(a) ? kPanelOutputs * steps_of<ShortWords>(a.weights) * 4 : 0; }

// A thread's part of the product.
struct LinearPart {
  Share rows, panels;
  const float* next;  // what it reads after them, or null
};

// `pairs`: this thread's scratch.
template <class Words, class T>
inline void linear_panels(const Linear& a, const LinearRows& x, const LinearPart& part, float* pairs) {
  constexpr bool is_short = Words::kGroup > 1;
  const bool keeps = is_short && keeps_pairs(a);
  const int64_t steps = steps_of<Words>(a.weights), stored = stored_of<Words>(a.weights);
  const int64_t all_rows = part.rows.end - part.rows.begin, end = part.panels.end;
  const int64_t tiles = ceil_div(all_rows, Words::kRows), chunks = ceil_div(steps, kFetchSteps);
  const int64_t each = all_rows / tiles, more = all_rows % tiles;  // rows of a tile: as equal as can be
  alignas(64) float sums[kMostRows * kPanelOutputs];
  for (int64_t number = part.panels.begin; number < end; ++number) {
    Panel panel{a.weights.words + number * kPanelOutputs * stored, width_of(a.weights.outputs, number), a.weights.highs, pairs};
    if (is_short) panel.rare = a.weights.rare, panel.rare_begin = a.weights.rare_begin + number * kPanelBlocks;
    const float* after = number + 1 < end ? panel.words + kPanelOutputs * stored : part.next;
    // Rows of one tile read panels as a stream, which a processor fetches by itself, and faster than it is told to (on Zen 4, 30 layers:
    // 8.3 -> 5.9 ms for 8 rows, 6.3 -> 5.6 for one). It only can't know where the next stream begins. Of several tiles the first one waits
    // for memory and the others don't: the next panel's lines, in equal parts over all of them (12 rows: 8.0 -> 6.3 ms). Short weights'
    // lines are not read once each in the order of memory, which the processor does not follow: with one tile, too (8 rows, beside pairs: 1.12
    // of their time, so 0.83).
    const int64_t panel_lines = ceil_div(stored * kPanelOutputs * 4, kLine);
    const int64_t lines = tiles > 1 || is_short ? panel_lines : number + 1 == end ? smaller(panel_lines, kFirstLines) : 0;
    const int64_t a_chunk = ceil_div(lines, tiles * chunks);
    int64_t row = part.rows.begin;
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

// Few rows: all of them, and the thread's own panels, so that weights are read once. Many: its own rows, and all panels: what a thread goes
// on with, from the norm before to the one behind, it has written itself. (512 rows on Zen 4: 0.97 of the time while its two cores share no
// cache, else 1.)
inline LinearPart part_of(const Linear& a, const Crew& crew) {
  const bool by_rows = a.rows >= kRowsApart * crew.threads;
  const auto panels = [&](const Packed& weights) {
    const int64_t all = panels_of(weights);
    return by_rows ? Share{0, all} : share_of(all, crew);
  };
  const float* next = a.next == nullptr ? nullptr : a.next->words + panels(*a.next).begin * words_of_panel(*a.next);
  return {by_rows ? share_of(a.rows, crew) : Share{0, a.rows}, panels(a.weights), next};
}

// `room`: rows_bytes(a) bytes that all threads share.
inline void linear(const Linear& a, const Crew& crew, void* room) {
  if (a.rows == 0) return;
  if (!reads_in_place(a)) {
    const Share share = share_of(a.rows, crew);
    prepare_rows(a, room, share.begin, share.end);
    crew.barrier();
  }
  const LinearRows x = rows_of(a, room);
  const LinearPart part = part_of(a, crew);
  with_words(a.weights.kind, [&](auto kind) {
    with_dtype(a.out_dtype, [&](auto out_kind) {
      linear_panels<decltype(kind), decltype(out_kind)>(a, x, part, static_cast<float*>(crew.own()));
    });
  });
}

inline void linear(const Linear& a, const Crew& crew) { linear(a, crew, crew.shared()); }

}  // namespace whispers::WHISPERS_ISA
