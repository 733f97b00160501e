// The inner product in tiles: up to 32 rows of x times a panel of bf16 weights, as they are, short or of grids, or 16 rows times one of int8.
//
// Packed ones become pairs on the way, for one tile's depth at a time; short ones without a code are put back among them, so that all of them give
// what bf16 ones do, bit for bit.
#pragma once

#include <type_traits>

#include "linear_finish.h"
#include "linear_rows.h"
#include "linear_tile.h"
#include "tiles.h"

#if WHISPERS_LEVEL >= 3

namespace whispers::WHISPERS_ISA {

constexpr int64_t kTallRows = 2 * kTile;  // of two rows of tiles

// Weights of `count` steps, whole groups of them at `w`, as pairs [count, width] at `to`; with each vector, where `fetches`, the line `ahead` words
// behind it is fetched.
template <int kWide, bool fetches>
inline void unpack_steps(const ShortWords&, const ShortWords::Key& key, const float* w, int64_t count, float* to, int64_t ahead) {
  constexpr int64_t width = kWide * kOutputs;
  for (int64_t step = 0; step < count; step += ShortWords::kGroup, w += ShortWords::kGroupWords * width) {
#pragma GCC unroll 3
    for (int j = 0; j < kWide; ++j) {
      if (fetches) __builtin_prefetch(w + j * W + ahead, 0, 1);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if (fetches) __builtin_prefetch(w + (1 + half) * width + j * W + ahead, 0, 1);
        Vec words[ShortWords::kTogether];
        ShortWords::read(key, w + j * W, width, half, words, nullptr);
        for (int s = 0; s < ShortWords::kTogether; ++s) store(to + (step + half * ShortWords::kTogether + s) * width + j * W, words[s]);
      }
    }
  }
}

// Likewise.
template <int kWide, bool fetches, class Words>
inline void unpack_steps(const Words&, const typename Words::Key& key, const float* w, int64_t count, float* to, int64_t ahead) {
  constexpr int64_t width = kWide * kOutputs;
  for (int64_t step = 0; step < count; step += Words::kGroup, w += Words::kGroupWords * width, to += Words::kGroup * width) {
#pragma GCC unroll 3
    for (int j = 0; j < kWide; ++j) Words::template unpack<fetches>(key, w + j * W, width, to + j * W, ahead);
  }
}

// Puts a weight without a code where it belongs in a block's steps from `begin` on, where 0 is.
inline void put_rare(const Rare& rare, int64_t begin, float* to, int64_t to_row) {
  float* word = to + (rare.step - begin) * to_row + rare.output;
  uint32_t bits;
  __builtin_memcpy(&bits, word, 4);
  bits |= rare.word;
  __builtin_memcpy(word, &bits, 4);
}

// The weights without a code of a panel's blocks, if there are any, put where they belong in steps [begin, end), in the order of steps.
template <int kWide>
class RareInOrder {
 public:
  explicit RareInOrder(const Panel& panel) : rare_(panel.rare) {
    if (rare_ == nullptr) return;
    for (int j = 0; j < kWide; ++j) at_[j] = panel.rare_begin[j], end_[j] = panel.rare_begin[j + 1];
  }
  void put(int64_t begin, int64_t end, float* to) {
    for (int j = 0; j < kWide; ++j) {
      for (; at_[j] < end_[j] && rare_[at_[j]].step < end; ++at_[j]) {
        put_rare(rare_[at_[j]], begin, to + j * kOutputs, kWide * kOutputs);
      }
    }
  }

 private:
  const Rare* rare_;
  int32_t at_[kWide] = {}, end_[kWide] = {};
};

// Where a tile's depth of a panel's words lies: as it is stored.
template <class Words, int kWide, bool packed = (Words::kGroup > 1)>
class TilesOf {
 public:
  static constexpr int64_t kRow = kWide * kOutputs;
  explicit TilesOf(const Panel& panel) : words_(panel.words) {}
  const float* take(int64_t step, int64_t steps) {
    const float* from = words_ + step * kRow;
    if (step + kTile <= steps) return from;
    __builtin_memset(end_, 0, sizeof(end_));
    __builtin_memcpy(end_, from, (steps - step) * kRow * sizeof(float));
    return end_;
  }

 private:
  const float* words_;
  alignas(64) float end_[kTile * kRow];
};
// Or, of packed weights, as pairs: two of them in turn, so that the next is made while this one is multiplied.
template <class Words, int kWide>
class TilesOf<Words, kWide, true> {
 public:
  static constexpr int64_t kRow = kWide * kOutputs;
  explicit TilesOf(const Panel& panel) : key_(panel.highs), rare_(panel), words_(panel.words), ahead_(panel.ahead) {}
  const float* take(int64_t step, int64_t steps) {
    float* to = pairs_ + (turn_ = !turn_) * kTile * kRow;
    const int64_t count = smaller(kTile, steps - step);
    if (count < kTile) __builtin_memset(to, 0, kTile * kRow * sizeof(float));
    unpack_steps<kWide, true>(Words{}, key_, words_, count, to, ahead_);
    rare_.put(step, step + count, to);
    words_ += kTile / Words::kGroup * Words::kGroupWords * kRow;
    return to;
  }

 private:
  const typename Words::Key key_;
  RareInOrder<kWide> rare_;
  const float* words_;
  int64_t ahead_;
  bool turn_ = false;
  alignas(64) float pairs_[2 * kTile * kRow];
};

// sums [rows, kPanelOutputs]: rows of x, at most kTallRows, times a panel. The second of two rows of tiles ends with the last row. At every tile's
// depth `fetch` is called, with how many such calls together are to fetch a depth's lines, and `meanwhile`: vectors work beside tiles.
template <class Words, int kTall, int kWide, class Fetching, class Meanwhile>
__attribute__((noinline)) void linear_by_tiles(int64_t rows, const Panel& panel, const float* x, int64_t x_row, int64_t steps, float* sums,
                                               Fetching& fetch, Meanwhile& meanwhile) {
  TilesOf<Words, kWide> weights(panel);
  const int64_t below = kTall == 2 ? rows - kTile : 0;
  each_tile<kTall, kWide>([](auto, auto, auto tile) { clear_tile<tile.value>(); });
  const float* next = weights.take(0, steps);
  for (int64_t step = 0; step < steps; step += kTile) {
    const float* const columns[] = {next, next + kOutputs, next + 2 * kOutputs};
    if (step + kTile < steps) next = weights.take(step + kTile, steps);
    const float* const of_x[] = {x + step, x + below * x_row + step};
    multiply_tiles<kTall, kWide>(of_x, x_row * 4, columns, TilesOf<Words, kWide>::kRow * 4);
    fetch(Number<1>{});
    meanwhile();
  }
  each_tile<kTall, kWide>([&](auto i, auto j, auto tile) {
    store_tile<tile.value>(sums + i.value * below * kPanelOutputs + j.value * kOutputs, kPanelOutputs * 4);
  });
}

// As `linear_by_tiles`, of int8: x = 256 high + low, each of which meets the weights in a product of its own.
template <int kWide, class Fetching, class Meanwhile>
__attribute__((noinline)) void quads_by_tiles(int64_t rows, const Panel& panel, const float* x, int64_t x_row, int64_t steps, float* sums,
                                              Fetching& fetch, Meanwhile& meanwhile) {
  TilesOf<QuadWords, kWide> weights(panel);
  const int64_t padded = up_to(steps, kTile);
  const float *low = x + padded, *marks = low + padded;
  alignas(64) float parts[2 * kTile * kPanelOutputs];  // int32: of the high bytes, of the low ones
  float* const lows = parts + kTile * kPanelOutputs;
  for (int64_t begin = 0; begin < padded; begin += QuadWords::kSpan, marks += QuadWords::kMarks) {
    each_tile<2, kWide>([](auto, auto, auto tile) { clear_tile<tile.value>(); });
    for (int64_t step = begin; step < smaller(begin + QuadWords::kSpan, padded); step += kTile) {
      multiply_bytes<kWide>(x + step, low + step, x_row * 4, weights.take(step, steps), kWide * kOutputs * 4, [&] { fetch(Number<2 * kWide>{}); });
      meanwhile();
    }
    each_tile<2, kWide>([&](auto i, auto j, auto tile) {
      store_tile<tile.value>((i.value == 0 ? parts : lows) + j.value * kOutputs, kPanelOutputs * 4);
    });
    for (int64_t row = 0; row < rows; ++row) {
      const Vec mark = splat(marks[row * x_row]);
      for (int64_t at = row * kPanelOutputs; at < row * kPanelOutputs + kWide * kOutputs; at += W) {
        const Bits whole = _mm512_add_epi32(_mm512_slli_epi32(as_bits(load(parts + at)), 8), as_bits(load(lows + at)));
        const Vec sum = floats_of(whole) * mark;
        store(sums + at, begin == 0 ? sum : load(sums + at) + sum);
      }
    }
  }
}

template <class Words, int kTall, class Fetching, class Meanwhile>
inline void panel_by_tiles(int64_t rows, const Panel& panel, const float* x, int64_t x_row, int64_t steps, float* sums, Fetching& fetch,
                           Meanwhile& meanwhile) {
  if constexpr (Words::kNumbers == 4) {
    if (panel.width == 3 * kOutputs) return quads_by_tiles<3>(rows, panel, x, x_row, steps, sums, fetch, meanwhile);
    if (panel.width == 2 * kOutputs) return quads_by_tiles<2>(rows, panel, x, x_row, steps, sums, fetch, meanwhile);
    quads_by_tiles<1>(rows, panel, x, x_row, steps, sums, fetch, meanwhile);
  } else {
    if (panel.width == 3 * kOutputs) return linear_by_tiles<Words, kTall, 3>(rows, panel, x, x_row, steps, sums, fetch, meanwhile);
    if (panel.width == 2 * kOutputs) return linear_by_tiles<Words, kTall, 2>(rows, panel, x, x_row, steps, sums, fetch, meanwhile);
    linear_by_tiles<Words, kTall, 1>(rows, panel, x, x_row, steps, sums, fetch, meanwhile);
  }
}

template <class Words>
inline const float* words_of(const Packed& p, int64_t panel) { return p.words + panel * kPanelOutputs * stored_of<Words>(p); }

// How far behind a panel's words those lie that this thread reads `later` panels after it, at most the first of its next product; 0 where it reads
// no more.
template <class Words>
inline int64_t words_after(const Packed& p, const LinearPart& part, int64_t panel, int64_t later) {
  if (panel + later < part.panels.end) return later * kPanelOutputs * stored_of<Words>(p);
  return part.next == nullptr ? 0 : part.next - words_of<Words>(p, panel);
}

// The panels of packed weights as pairs, one after the other, each while the one before is multiplied by several tiles of rows.
template <class Words>
class PairsAhead {
 public:
  // `room`: two panels of `padded` steps.
  PairsAhead(const Packed& p, Share panels, int64_t padded, float* room)
      : p_(p), next_(panels.begin), end_(panels.end), steps_(steps_of<Words>(p)), padded_(padded), room_(room) {
    begin();
  }
  // A group of the panel to come.
  void some() {
    if (step_ >= steps_) return;
    const float* from = words_ + step_ / Words::kGroup * Words::kGroupWords * width_;
    float* to = this->to() + step_ * width_;
    const typename Words::Key key(p_.highs);
    if (width_ == 3 * kOutputs) {
      unpack_steps<3, false>(Words{}, key, from, Words::kGroup, to, 0);
    } else if (width_ == 2 * kOutputs) {
      unpack_steps<2, false>(Words{}, key, from, Words::kGroup, to, 0);
    } else {
      unpack_steps<1, false>(Words{}, key, from, Words::kGroup, to, 0);
    }
    step_ += Words::kGroup;
  }
  // The panel that was to come, whole: [padded, width]. From now on the one after it is made.
  const float* take() {
    while (step_ < steps_) some();
    float* pairs = to();
    __builtin_memset(pairs + steps_ * width_, 0, (padded_ - steps_) * width_ * sizeof(float));
    const int64_t block = next_ * kPanelBlocks;
    for (int64_t j = 0; j < width_ / kOutputs && p_.rare != nullptr; ++j) {
      for (int32_t at = p_.rare_begin[block + j]; at < p_.rare_begin[block + j + 1]; ++at) put_rare(p_.rare[at], 0, pairs + j * kOutputs, width_);
    }
    ++next_;
    begin();
    return pairs;
  }

 private:
  float* to() const { return room_ + next_ % 2 * padded_ * kPanelOutputs; }
  void begin() {
    step_ = next_ < end_ ? 0 : steps_;
    words_ = words_of<Words>(p_, next_);
    width_ = next_ < end_ ? width_of(p_.outputs, next_) : 0;
  }

  const Packed& p_;
  int64_t next_, end_, steps_, padded_, step_ = 0, width_ = 0;
  float* room_;
  const float* words_ = nullptr;
};

// Finishes a tile's sums row by row, while the next tile is multiplied.
template <class T>
class Finishing {
 public:
  explicit Finishing(const Linear& a) : a_(a) {}
  float* sums() { return room_ + turn_ * kTallRows * kPanelOutputs; }  // of the tile to come
  // The tile at `sums()` is there: `rows` of it from `skipped` on.
  void begin(int64_t row, int64_t rows, int64_t skipped, int64_t first, int64_t outputs) {
    some(left_);
    at_ = sums() + skipped * kPanelOutputs;
    row_ = row, left_ = rows, first_ = first, outputs_ = outputs;
    turn_ = !turn_;
  }
  void some(int64_t rows) {
    rows = smaller(rows, left_);
    if (rows == 0) return;
    finish_tile<T>(a_, at_, row_, rows, first_, outputs_);
    at_ += rows * kPanelOutputs, row_ += rows, left_ -= rows;
  }
  int64_t left() const { return left_; }

 private:
  const Linear& a_;
  float* at_ = nullptr;
  int64_t row_ = 0, left_ = 0, first_ = 0, outputs_ = 0;
  bool turn_ = false;
  alignas(64) float room_[2 * kTallRows * kPanelOutputs];
};

inline bool in_tiles(const Linear& a) { return a.weights.kind != kFloatWeights; }
inline bool unpacks_ahead(const Linear& a) { return a.weights.kind >= kShortWeights && a.rows > kTallRows; }

// Bytes of each thread's scratch.
inline int64_t tiles_scratch(const Linear& a) {
  return unpacks_ahead(a) ? 2 * kPanelOutputs * up_to(steps_of<ShortWords>(a.weights), kTile) * 4 : 0;
}

// How often a thread's part calls for what others read.
template <class Words>
inline int64_t calls_for_others(const Linear& a, const LinearPart& part) {
  const int64_t rows = part.rows.end - part.rows.begin, tall = Words::kNumbers == 4 ? kTile : kTallRows;
  return (part.panels.end - part.panels.begin) * ceil_div(rows, tall) * ceil_div(steps_of<Words>(a.weights), kTile);
}

// A thread's part. What it reads next is fetched in equal parts: where packed weights become pairs just before they are multiplied, a line with each
// vector of them (all lines of a step at once had to be waited for: 32 rows 0.9 of the time), else some at every step or, of int8, product.
template <class Words, class T>
inline void panels_by_tiles(const Linear& a, const LinearRows& x, const LinearPart& part, float* room) {
  constexpr bool packed = Words::kGroup > 1, in_bytes = Words::kNumbers == 4;
  constexpr int64_t tall = in_bytes ? kTile : kTallRows;
  const bool ahead = packed && unpacks_ahead(a);
  const int64_t steps = steps_of<Words>(a.weights), padded = up_to(steps, kTile);
  const int64_t all_rows = part.rows.end - part.rows.begin, calls = ceil_div(all_rows, tall) * padded / kTile;
  const int64_t lines = packed && !ahead ? 0 : ceil_div(ceil_div(kPanelOutputs * stored_of<Words>(a.weights) * 4, kLine), calls);
  const int64_t groups = ahead ? ceil_div(steps / Words::kGroup, calls) : 0;
  const Tiles shape(all_rows, in_bytes ? 7 : 5);
  Finishing<T> finishing(a);
  PairsAhead<std::conditional_t<packed, Words, ShortWords>> pairs(a.weights, ahead ? part.panels : Share{0, 0}, padded, room);
  for (int64_t number = part.panels.begin; number < part.panels.end; ++number) {
    Panel panel{words_of<Words>(a.weights, number), width_of(a.weights.outputs, number), a.weights.highs};
    panel.ahead = words_after<Words>(a.weights, part, number, ahead ? 2 : 1);
    if (a.weights.rare != nullptr) panel.rare = a.weights.rare, panel.rare_begin = a.weights.rare_begin + number * kPanelBlocks;
    const char* line = reinterpret_cast<const char*>(panel.words + panel.ahead);
    if (ahead) panel.words = pairs.take();
    for (int64_t row = part.rows.begin; row < part.rows.end; row += tall) {
      const int64_t rows = smaller(tall, part.rows.end - row);
      const int64_t again = smaller(larger(kTile - rows, 0), row - part.rows.begin);  // rows before these: tiles are whole
      const int64_t pace = up_to(ceil_div(finishing.left() * kTile, padded), 2);
      const auto fetch = [&](auto parts) {
        for (int64_t i = 0; i < ceil_div(lines, parts.value); ++i, line += kLine) __builtin_prefetch(line, 0, 2);
      };
      const auto meanwhile = [&] {
        if (part.others != nullptr) part.others->some();
        for (int64_t i = 0; i < groups; ++i) pairs.some();
        finishing.some(pace);
      };
      const float* of_x = x.words + (row - again) * x.row;
      const auto multiply = [&](auto kind, auto height) {
        panel_by_tiles<decltype(kind), decltype(height)::value>(rows + again, panel, of_x, x.row, ahead ? padded : steps, finishing.sums(), fetch,
                                                                meanwhile);
      };
      const auto multiply_all = [&](auto height) {
        if constexpr (packed) {
          if (ahead) return multiply(PairWords{}, height);
        }
        multiply(Words{}, height);
      };
      rows + again > kTile ? multiply_all(Number<2>{}) : multiply_all(Number<1>{});
      finishing.begin(row, rows, again, number * kPanelOutputs, panel.width);
    }
  }
  finishing.some(kTallRows);
}

}  // namespace whispers::WHISPERS_ISA

#endif
