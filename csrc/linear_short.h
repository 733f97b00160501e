// Short weights (see linear_args.h): made from pairs of bf16 once at load.
#pragma once

#include "linear_math.h"
#include "share.h"

namespace whispers::WHISPERS_ISA {

constexpr int64_t kShortNumbers = int64_t{ShortWords::kGroup} * ShortWords::kNumbers;  // of a group
constexpr uint8_t kNoCode = 16;

// The byte of codes, or of a half's low bytes, that number `number` of a group has for output `output` of a panel.
inline int64_t short_byte(int64_t output, int64_t number) { return output / 4 * 16 + number / 2 % 2 * 8 + output % 4 * 2 + number % 2; }

inline void shorten_panel(const Shorten& a, int64_t panel) {
  const int64_t width = width_of(a.outputs, panel), steps = ceil_div(a.depth, ShortWords::kNumbers), groups = ceil_div(a.depth, kShortNumbers);
  const uint32_t* words = a.words + panel * kPanelOutputs * steps;
  uint8_t* group = a.out + panel * kPanelOutputs * groups * ShortWords::kGroupWords * 4;
  int32_t* counts = a.count + panel * kPanelBlocks;
  for (int64_t block = 0; block < width / kOutputs; ++block) counts[block] = 0;
  for (int64_t begin = 0; begin < groups * kShortNumbers; begin += kShortNumbers, group += 4 * ShortWords::kGroupWords * width) {
    __builtin_memset(group, 0, 4 * width);
    for (int64_t number = 0; number < kShortNumbers; ++number) {
      const int64_t step = (begin + number) / ShortWords::kNumbers, half = number / 4;
      for (int64_t output = 0; output < width; ++output) {
        uint32_t bits = step < steps ? words[step * width + output] >> 16 * (number % 2) & 0xffff : 0;
        if (a.codes[bits >> 8] == kNoCode) {
          const int64_t block = panel * kPanelBlocks + output / kOutputs, count = a.count[block]++;
          if (count < a.room) {
            a.rare[block * a.room + count] = {static_cast<int32_t>(output % kOutputs), static_cast<int32_t>(step), bits << 16 * (number % 2)};
          }
          bits = 0;
        }
        const int64_t byte = short_byte(output, number);
        group[byte] = static_cast<uint8_t>(group[byte] | a.codes[bits >> 8] << 4 * half);
        group[4 * (1 + half) * width + byte] = static_cast<uint8_t>(bits);
      }
    }
  }
}

inline void shorten(const Shorten& a, const Crew& crew) {
  const Share share = share_of(ceil_div(a.outputs, kPanelOutputs), crew);
  for (int64_t panel = share.begin; panel < share.end; ++panel) shorten_panel(a, panel);
}

// Row `id` of the matrix, as floats.
inline void unpack_short_row(const Packed& p, int64_t id, float* row) {
  const int64_t panel = id / kPanelOutputs, output = id % kPanelOutputs, width = width_of(p.outputs, panel);
  const uint8_t* group = reinterpret_cast<const uint8_t*>(p.words + panel * kPanelOutputs * stored_of<ShortWords>(p));
  for (int64_t at = 0; at < p.depth; ++at) {
    const int64_t number = at % kShortNumbers, half = number / 4, byte = short_byte(output, number);
    const uint32_t high = p.highs[group[byte] >> 4 * half & 15], low = group[4 * (1 + half) * width + byte], bits = high << 24 | low << 16;
    __builtin_memcpy(row + at, &bits, 4);
    if (number == kShortNumbers - 1) group += 4 * ShortWords::kGroupWords * width;
  }
  for (int32_t at = p.rare_begin[id / kOutputs]; at < p.rare_begin[id / kOutputs + 1]; ++at) {
    const Rare& rare = p.rare[at];
    if (rare.output != id % kOutputs) continue;
    const bool second = rare.word >> 16 != 0;
    const uint32_t bits = second ? rare.word : rare.word << 16;
    __builtin_memcpy(row + rare.step * ShortWords::kNumbers + second, &bits, 4);
  }
}

}  // namespace whispers::WHISPERS_ISA
