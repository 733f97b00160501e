// The inner product: a few rows of x times a panel of packed weights, sums in registers.
#pragma once

#include "linear_math.h"

namespace whispers::WHISPERS_ISA {

// What is fetched into the second cache while a tile is computed: from here on, so many lines every kFetchSteps steps. Not into the first,
// which is no larger than a panel: what is used now would leave it (12 rows, 30 layers on Zen 4: 6.3 ms, and 9.5 that way).
struct Ahead {
  const char* at;
  int64_t lines;
};
constexpr int64_t kFetchSteps = 8;

// Weights that a tile reads: a panel of `width` outputs, or from some block of it on. Of short weights: `highs`, where KeptWords leave pairs, and
// those without a code, of each block; of others `rare` is null.
struct Panel {
  const float* words;
  int64_t width;
  const uint8_t* highs;
  float* pairs;
  const Rare* rare;
  const int32_t* rare_begin;  // [blocks + 1]
  int64_t ahead;              // where tiles are multiplied: how far behind these words those lie that are read next
};

// Adds what weights without a code contribute, after all others: a row's bits do not depend on its neighbours. A vector at a time, zeros for its
// other lanes: what is stored number by number is waited for when it is read as a vector (a prefill's products: 0.98 of the time).
template <class Words, int kTileRows, int kVecs>
inline void add_rare(const Panel& panel, const float* x, int64_t x_row, Vec (&total)[kTileRows][kVecs]) {
  constexpr int kBlockVecs = kOutputs / W;
#pragma GCC unroll 3
  for (int block = 0; block < kVecs / kBlockVecs; ++block) {
    for (int32_t at = panel.rare_begin[block]; at < panel.rare_begin[block + 1]; ++at) {
      const Rare& rare = panel.rare[at];
#pragma GCC unroll 2
      for (int j = 0; j < kBlockVecs; ++j) {
        const Vec word = select(only(rare.output - j * W), as_vec(splat_bits(static_cast<int>(rare.word))), zero());
        const typename Words::Wide right = Words::weight(word);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
          Vec& sum = total[i][block * kBlockVecs + j];
          sum = Words::multiply(Words::left(x + i * x_row + rare.step * Words::kLeft), right, sum);
        }
      }
    }
  }
}

// sums [kTileRows, kPanelOutputs]: rows of x times kVecs vectors of outputs. Each is summed over the depth in order, one number (pair, quad)
// after the other in spans, whatever the shape of the tile: a row's bits do not depend on its neighbours.
template <class Words, int kTileRows, int kVecs>
__attribute__((noinline)) void linear_tile(const Panel& panel, const float* x, int64_t x_row, int64_t steps, float* sums, Ahead ahead) {
  const typename Words::Key key(panel.highs);
  const float* w = panel.words;
  float* pairs = panel.pairs;
  const float* const first_x = x;
  const int64_t width = panel.width;
  const float* marks = x + steps * Words::kLeft;
  for (int64_t begin = 0; begin < steps; begin += Words::kSpan, marks += Words::kMarks) {
    const int64_t end = smaller(steps, begin + Words::kSpan);
    typename Words::Sum total[kTileRows][kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) total[i][j] = Words::begin();
    }
    for (int64_t step = begin; step < end;) {
      const int64_t stop = smaller(step + kFetchSteps, end);
      for (int64_t i = 0; i < ahead.lines; ++i, ahead.at += kLine) __builtin_prefetch(ahead.at, 0, 2);
      for (; step < stop; step += Words::kGroup, w += Words::kGroupWords * width, pairs += Words::kGroup * width) {
#pragma GCC unroll 2
        for (int part = 0; part < Words::kGroup / Words::kTogether; ++part) {
          Vec words[kVecs][Words::kTogether];
#pragma GCC unroll 4
          for (int j = 0; j < kVecs; ++j) Words::read(key, w + j * W, width, part, words[j], pairs + j * W);
#pragma GCC unroll 2
          for (int s = 0; s < Words::kTogether; ++s, x += Words::kLeft) {
            typename Words::Wide right[kVecs];
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) right[j] = Words::weight(words[j][s]);
#pragma GCC unroll 8
            for (int i = 0; i < kTileRows; ++i) {
              const typename Words::Wide left = Words::left(x + i * x_row);
#pragma GCC unroll 4
              for (int j = 0; j < kVecs; ++j) total[i][j] = Words::multiply(left, right[j], total[i][j]);
            }
          }
        }
      }
    }
    if constexpr (Words::kNumbers == 2) {
      if (panel.rare != nullptr) add_rare<Words>(panel, first_x, x_row, total);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* to = sums + i * kPanelOutputs + j * W;
        asm("" : "+v"(total[i][j]));  // in a register, still: gcc 12 would store it at every step, which made int8 2 times slower
        const Vec sum = Words::end(total[i][j], marks + i * x_row);
        store(to, begin == 0 ? sum : load(to) + sum);
      }
    }
  }
}

template <class Words, int kVecs, int kMost = Words::kRows>
inline void tile_of_rows(int64_t rows, const Panel& panel, const float* x, int64_t x_row, int64_t steps, float* sums, Ahead ahead) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return tile_of_rows<Words, kVecs, kMost - 1>(rows, panel, x, x_row, steps, sums, ahead);
  }
  linear_tile<Words, kMost, kVecs>(panel, x, x_row, steps, sums, ahead);
}

// A whole panel, at most Words::kRows rows.
template <class Words>
inline void panel_of_rows(int64_t rows, const Panel& panel, const float* x, int64_t x_row, int64_t steps, float* sums, Ahead ahead) {
#if WHISPERS_LEVEL >= 1
  if (panel.width == 3 * kOutputs) return tile_of_rows<Words, 3>(rows, panel, x, x_row, steps, sums, ahead);
  if (panel.width == 2 * kOutputs) return tile_of_rows<Words, 2>(rows, panel, x, x_row, steps, sums, ahead);
  tile_of_rows<Words, 1>(rows, panel, x, x_row, steps, sums, ahead);
#else
  for (int64_t at = 0; at < panel.width; at += kOutputs) {
    const int32_t* rare_begin = panel.rare == nullptr ? nullptr : panel.rare_begin + at / kOutputs;
    const Panel block{panel.words + at, panel.width, panel.highs, panel.pairs + at, panel.rare, rare_begin};
    tile_of_rows<Words, 2>(rows, block, x, x_row, steps, sums + at, ahead);
    ahead.lines = 0;
  }
#endif
}

}  // namespace whispers::WHISPERS_ISA
