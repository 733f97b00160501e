// y = x W^T (+ bias) (+ residual), or silu(gate) * up, over packed weights: what a decoder's time goes into.
//
// A thread reads its own panels, one after the other, once for all rows: with few rows the weights come from memory as fast as it gives
// them; with many rows a panel stays in the cache until every row has met it, and the next one is fetched meanwhile.
#pragma once

#include "linear_finish.h"
#include "linear_grid.h"
#include "linear_rows.h"
#include "linear_short.h"
#include "linear_tile.h"
#include "linear_tiles.h"

namespace whispers::WHISPERS_ISA {

constexpr int64_t kMostRows = 8;  // of a tile, in any kind of words
constexpr int64_t kFirstLines = 64;  // of a stream, fetched before it begins
constexpr int64_t kRowsApart = 64;   // of each thread, from which on rows are divided and not panels

// Whether the first of several tiles leaves a panel of short weights as pairs for the others. Decoding costs a tile 3 % on Zen 4 (15 % where
// somebody else computes on the same cores), leaving pairs costs as much as decoding for 4 tiles.
inline bool keeps_pairs(const Linear& a) { return a.weights.kind == kShortWeights && a.rows > 4 * ShortWords::kRows; }

// Bytes of each thread's scratch.
inline int64_t linear_scratch(const Linear& a) {
#if WHISPERS_LEVEL >= 3
  if (in_tiles(a)) return tiles_scratch(a);
#endif
  return keeps_pairs(a) ? kPanelOutputs * steps_of<ShortWords>(a.weights) * 4 : 0;
}

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

// Rows as the weights meet them. `room`: rows_bytes(a) bytes that all threads share.
inline LinearRows prepare(const Linear& a, const Crew& crew, void* room) {
  if (!reads_in_place(a)) {
    const Share share = share_of(a.rows, crew);
    prepare_rows(a, room, share.begin, share.end);
    crew.barrier();
  }
  return rows_of(a, room);
}

// A thread's part. `own`: linear_scratch(a) bytes of its own.
inline void multiply_part(const Linear& a, const LinearRows& x, const LinearPart& part, float* own) {
  with_words(a.weights.kind, [&](auto kind) {
    with_dtype(a.out_dtype, [&](auto out_kind) {
      using Words = decltype(kind);
      using T = decltype(out_kind);
#if WHISPERS_LEVEL >= 3
      if constexpr (Words::kTiled) {
        panels_by_tiles<Words, T>(a, x, part, own);
      } else
#endif
        linear_panels<Words, T>(a, x, part, own);
    });
  });
}

// How often this thread's part calls for what others read: once for every tile's depth.
inline int64_t calls_for_others(const Linear& a, const Crew& crew) {
  int64_t calls = 0;
#if WHISPERS_LEVEL >= 3
  with_words(a.weights.kind, [&](auto kind) {
    if constexpr (decltype(kind)::kTiled) calls = calls_for_others<decltype(kind)>(a, part_of(a, crew));
  });
#endif
  return calls;
}

inline void linear(const Linear& a, const Crew& crew, LinesAhead* others) {
  if (a.rows == 0) return;
  const LinearRows x = prepare(a, crew, crew.shared());
  LinearPart part = part_of(a, crew);
  part.others = others;
  multiply_part(a, x, part, static_cast<float*>(crew.own()));
}
inline void linear(const Linear& a, const Crew& crew) { linear(a, crew, nullptr); }

}  // namespace whispers::WHISPERS_ISA
