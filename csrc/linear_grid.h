// Grid weights (see linear_args.h): found among pairs of bf16 once at load. Only tiles are multiplied with them; without, none are found.
#pragma once

#include "linear_math.h"
#include "share.h"

namespace whispers::WHISPERS_ISA {

#if WHISPERS_LEVEL >= 3

constexpr int kGridSteps = GridWords<4>::kGroup;
constexpr int kGridNumbers = 2 * kGridSteps;
// How many float16 on either side of the likeliest scale are tried: all that can be meant where numbers are up to 5 times as large as they are apart.
constexpr int kGridReach = 40;
constexpr Mask kAllLanes = 0xffff;

// What W outputs' numbers are, a lane each, and the grids that were found.
template <class Words>
class GridSearch {
 public:
  // The 16 steps of pairs at `words`, lines `width` words apart.
  GridSearch(const float* words, int64_t width) {
    for (int n = 0; n < kGridNumbers; ++n) {
      const Vec pairs = load(words + n / 2 * width);
      values_[n] = n % 2 == 0 ? shift_left(pairs) : high_half(pairs);
      least_ = min(least_, values_[n]);
      most_ = max(most_, values_[n]);
    }
  }

  // Whether all of them lie on grids.
  bool found() {
    const Vec extreme = select(less(most_, zero() - least_), least_, most_);
    if (Words::kBits == 4) {
      search<false>((most_ - least_) / splat(15.0f));  // Q4_1: both ends have a code
      const Vec scale = extreme / splat(-8.0f);        // Q4_0: the end that is farther from 0; where both are as far, either
      search<true>(scale);
      search<true>(zero() - scale);
    } else {
      search<true>(extreme / splat(127.0f));  // Q8_0
    }
    return found_ == kAllLanes;
  }

  // What was found, as it lies in memory: lines `width` words apart.
  void pack(float* out, int64_t width) const {
    const Bits places[2] = {_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                            _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
    store(out, as_vec(_mm512_inserti64x4(_mm512_castsi256_si512(scales_), minima_, 1)));
    for (int i = 0; i < 2; ++i) {
      for (int begin = 0; begin < kGridSteps; begin += Words::kSteps) {
        Bits line = splat_bits(0);
        for (int step = 0; step < Words::kSteps; ++step) {
          const int number = 2 * (begin + step);
          const Bits both = _mm512_permutex2var_epi32(_mm512_cvtps_epi32(codes_[number]), places[i], _mm512_cvtps_epi32(codes_[number + 1]));
          line = _mm512_or_si512(line, _mm512_sll_epi32(both, _mm_cvtsi32_si128(Words::kBits * step)));
        }
        out += width;
        store(out, as_vec(line));
      }
    }
  }

 private:
  // Looks, in lanes where none was found yet, for grids of about this scale that give exactly these numbers. They have a minimum of their own, and
  // the least number has code 0; or, `centred`, 0 has the code in the middle.
  template <bool centred>
  void search(Vec likely_scale) {
    const Vec middle = splat(centred ? Words::kLevels / 2 : 0), top = splat(Words::kLevels - 1), origin = centred ? zero() : least_;
    const __m256i likely = narrow(likely_scale, F16{});
    for (int i = 0; i <= 2 * kGridReach && found_ != kAllLanes; ++i) {
      const __m256i scales = _mm256_add_epi16(likely, _mm256_set1_epi16(static_cast<int16_t>(i % 2 == 0 ? i / 2 : -(i + 1) / 2)));
      const Vec scale = widen(scales, F16{}), rate = select(equal(scale, zero()), zero(), splat(1.0f) / scale);
      Vec codes[kGridNumbers];
      for (int n = 0; n < kGridNumbers; ++n) codes[n] = min(max(round((values_[n] - origin) * rate) + middle, zero()), top);
      if (centred) {
        keep_where_exact(codes, scales, zero() - middle * scale);
        continue;
      }
      const Bounds bounds = minimum_of(codes, scale);
      keep_where_exact(codes, scales, (bounds.low + bounds.high) * splat(0.5f));
      keep_where_exact(codes, scales, bounds.low);  // a number that was half way between two of bf16 can leave either bound alone
      keep_where_exact(codes, scales, bounds.high);
    }
  }

  void keep_where_exact(const Vec (&codes)[kGridNumbers], __m256i scales, Vec minimum) {
    const __m256i minima = narrow(minimum, F16{});
    const typename Words::Grid grid(widen(scales, F16{}), widen(minima, F16{}));
    Mask fits = outside(kAllLanes, found_);
    for (int n = 0; n < kGridNumbers && any(fits); ++n) {
      fits = Mask(fits & equal(widen(narrow(grid.weight(Words::as_unpacked(codes[n])), Bf16{}), Bf16{}), values_[n]));
    }
    if (!any(fits)) return;
    scales_ = _mm256_mask_mov_epi16(scales_, fits, scales);
    minima_ = _mm256_mask_mov_epi16(minima_, fits, minima);
    for (int n = 0; n < kGridNumbers; ++n) codes_[n] = select(fits, codes[n], codes_[n]);
    found_ = Mask(found_ | fits);
  }

  // Of bf16.
  static Vec half_a_bit(Vec x) { return times_power_of_2(splat(1.0f), exponent_of(x) - splat(8.0f)); }

  struct Bounds {
    Vec low, high;
  };
  // What a minimum can be, given the scale: what a number was before it was rounded to bf16 is known to half of its last bit, a quarter on the side
  // of 0 of a power of two.
  Bounds minimum_of(const Vec (&codes)[kGridNumbers], Vec scale) const {
    Bounds bounds{minus_infinity(), zero() - minus_infinity()};
    for (int n = 0; n < kGridNumbers; ++n) {
      const Vec rest = fnma(codes[n], scale, values_[n]), away = half_a_bit(values_[n]), towards = half_a_bit(values_[n] * splat(1 - 0x1p-12f));
      const Mask negative = less(values_[n], zero());
      bounds.low = max(bounds.low, rest - select(negative, away, towards));
      bounds.high = min(bounds.high, rest + select(negative, towards, away));
    }
    return bounds;
  }

  Vec values_[kGridNumbers], codes_[kGridNumbers] = {}, least_ = zero() - minus_infinity(), most_ = minus_infinity();
  __m256i scales_ = _mm256_setzero_si256(), minima_ = _mm256_setzero_si256();  // float16
  Mask found_ = 0;
};

template <class Words>
inline bool fit_panel(const FitGrid& a, int64_t panel) {
  const int64_t width = width_of(a.outputs, panel), groups = a.depth / kGridNumbers;
  const float* words = reinterpret_cast<const float*>(a.words) + panel * kPanelOutputs * groups * kGridSteps;
  float* out = reinterpret_cast<float*>(a.out) + panel * kPanelOutputs * groups * Words::kGroupWords;
  for (int64_t group = 0; group < groups; ++group, words += kGridSteps * width, out += Words::kGroupWords * width) {
    for (int64_t j = 0; j < width; j += W) {
      GridSearch<Words> search(words + j, width);
      if (!search.found()) return false;
      search.pack(out + j, width);
    }
  }
  return true;
}

inline void fit_grid(const FitGrid& a, const Crew& crew) {
  const Share share = share_of(ceil_div(a.outputs, kPanelOutputs), crew);
  bool fits = a.depth % kGridNumbers == 0;
  for (int64_t panel = share.begin; panel < share.end && fits; ++panel) {
    a.fits[panel] = fits = a.bits == 4 ? fit_panel<GridWords<4>>(a, panel) : fit_panel<GridWords<8>>(a, panel);
  }
}

// Row `id` of the matrix, as floats.
template <class Words>
inline void unpack_grid_row(const Packed& p, int64_t id, float* row) {
  const int64_t panel = id / kPanelOutputs, output = id % kPanelOutputs, width = width_of(p.outputs, panel);
  const float* words = p.words + panel * kPanelOutputs * stored_of<Words>(p) + output / W * W;
  float pairs[kGridSteps * kPanelOutputs];
  for (int64_t at = 0; at < p.depth; at += kGridNumbers, words += Words::kGroupWords * width) {
    Words::template unpack<false>(typename Words::Key(nullptr), words, width, pairs, 0);
    for (int n = 0; n < kGridNumbers; ++n) {
      uint32_t bits;
      __builtin_memcpy(&bits, pairs + n / 2 * width + output % W, 4);
      bits = n % 2 == 0 ? bits << 16 : bits & 0xffff0000;
      __builtin_memcpy(row + at + n, &bits, 4);
    }
  }
}

#else

inline void fit_grid(const FitGrid&, const Crew&) {}

#endif

}  // namespace whispers::WHISPERS_ISA
