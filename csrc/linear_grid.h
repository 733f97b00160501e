// Grid weights (see linear_args.h): found among pairs of bf16 once at load. Only tiles are multiplied with them; without, none are found.
#pragma once

#include "linear_math.h"
#include "share.h"

namespace whispers::WHISPERS_ISA {

#if WHISPERS_LEVEL >= 3

constexpr int kGridSteps = GridWords::kGroup;
constexpr int kGridNumbers = kGridSteps * GridWords::kNumbers;
constexpr int kGridTop = 15;    // the largest code
constexpr int kGridReach = 16;  // how many float16 on either side of the likeliest scale are tried

// Codes, scales and minima of W outputs, a lane each.
struct Grids {
  Vec codes[kGridNumbers];
  __m256i scales = _mm256_setzero_si256(), minima = _mm256_setzero_si256();  // float16
  Mask found = 0;
};

// Looks, in lanes where none was found yet, for grids that give exactly `values` where the largest has the code `top`. What a value was before it was
// rounded to bf16 is known to half of its last bit. For each scale that may be meant, these bounds leave little room to the minimum.
inline void look_for_grids(const Vec (&values)[kGridNumbers], Vec least, Vec most, int top, Grids& grids) {
  Vec codes[kGridNumbers], room[kGridNumbers];
  const Vec range = most - least, rate = select(less(least, most), splat(static_cast<float>(top)) / range, zero());
  for (int n = 0; n < kGridNumbers; ++n) {
    codes[n] = round((values[n] - least) * rate);
    room[n] = times_power_of_2(splat(1.0f), exponent_of(values[n]) - splat(8.0f));
  }
  const __m256i likely = narrow(range / splat(static_cast<float>(top)), F16{});
  for (int i = 0; i <= 2 * kGridReach && grids.found != Mask(0xffff); ++i) {
    const __m256i scales = _mm256_add_epi16(likely, _mm256_set1_epi16(static_cast<int16_t>(i % 2 == 0 ? i / 2 : -(i + 1) / 2)));
    const Vec scale = widen(scales, F16{});
    Vec low = minus_infinity(), high = zero() - minus_infinity();
    for (int n = 0; n < kGridNumbers; ++n) {
      const Vec rest = fnma(codes[n], scale, values[n]);
      low = max(low, rest - room[n]);
      high = min(high, rest + room[n]);
    }
    const __m256i minima = narrow((low + high) * splat(0.5f), F16{});
    const Vec minimum = widen(minima, F16{});
    Mask fits = outside(Mask(0xffff), grids.found);
    for (int n = 0; n < kGridNumbers && any(fits); ++n) {
      fits = Mask(fits & equal(widen(narrow(GridWords::weight_of(codes[n], scale, minimum), Bf16{}), Bf16{}), values[n]));
    }
    grids.scales = _mm256_mask_mov_epi16(grids.scales, fits, scales);
    grids.minima = _mm256_mask_mov_epi16(grids.minima, fits, minima);
    for (int n = 0; n < kGridNumbers; ++n) grids.codes[n] = select(fits, codes[n], grids.codes[n]);
    grids.found = Mask(grids.found | fits);
  }
}

// The 16 steps of W outputs at `words`, lines `width` words apart, into `out`. False where one of its outputs is on no grid.
inline bool fit_block(const float* words, int64_t width, float* out) {
  Vec values[kGridNumbers], least = zero() - minus_infinity(), most = minus_infinity();
  for (int n = 0; n < kGridNumbers; ++n) {
    const Vec pairs = load(words + n / 2 * width);
    values[n] = n % 2 == 0 ? shift_left(pairs) : high_half(pairs);
    least = min(least, values[n]);
    most = max(most, values[n]);
  }
  Grids grids{};
  for (int top = kGridTop; top > 0 && grids.found != Mask(0xffff); --top) look_for_grids(values, least, most, top, grids);
  if (grids.found != Mask(0xffff)) return false;
  const Bits places[2] = {_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                          _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
  Bits lines[2][2] = {{splat_bits(0), splat_bits(0)}, {splat_bits(0), splat_bits(0)}};
  for (int step = 0; step < kGridSteps; ++step) {
    const Bits evens = _mm512_cvtps_epi32(grids.codes[2 * step]), odds = _mm512_cvtps_epi32(grids.codes[2 * step + 1]);
    const __m128i shift = _mm_cvtsi32_si128(4 * (step % 8));
    for (int i = 0; i < 2; ++i) {
      Bits& line = lines[i][step / 8];
      line = _mm512_or_si512(line, _mm512_sll_epi32(_mm512_permutex2var_epi32(evens, places[i], odds), shift));
    }
  }
  store(out, as_vec(_mm512_inserti64x4(_mm512_castsi256_si512(grids.scales), grids.minima, 1)));
  for (int i = 0; i < 4; ++i) store(out + (1 + i) * width, as_vec(lines[i / 2][i % 2]));
  return true;
}

inline bool fit_panel(const FitGrid& a, int64_t panel) {
  const int64_t width = width_of(a.outputs, panel), groups = a.depth / kGridNumbers;
  const float* words = reinterpret_cast<const float*>(a.words) + panel * kPanelOutputs * groups * kGridSteps;
  float* out = reinterpret_cast<float*>(a.out) + panel * kPanelOutputs * groups * GridWords::kGroupWords;
  for (int64_t group = 0; group < groups; ++group, words += kGridSteps * width, out += GridWords::kGroupWords * width) {
    for (int64_t j = 0; j < width; j += W) {
      if (!fit_block(words + j, width, out + j)) return false;
    }
  }
  return true;
}

inline void fit_grid(const FitGrid& a, const Crew& crew) {
  const Share share = share_of(ceil_div(a.outputs, kPanelOutputs), crew);
  bool fits = a.depth % kGridNumbers == 0;
  for (int64_t panel = share.begin; panel < share.end && fits; ++panel) a.fits[panel] = fits = fit_panel(a, panel);
}

// Row `id` of the matrix, as floats.
inline void unpack_grid_row(const Packed& p, int64_t id, float* row) {
  const int64_t panel = id / kPanelOutputs, output = id % kPanelOutputs, width = width_of(p.outputs, panel);
  const float* words = p.words + panel * kPanelOutputs * stored_of<GridWords>(p) + output / W * W;
  float pairs[kGridSteps * kPanelOutputs];
  for (int64_t at = 0; at < p.depth; at += kGridNumbers, words += GridWords::kGroupWords * width) {
    GridWords::unpack<false>(GridWords::Key(nullptr), words, width, pairs, 0);
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
inline void unpack_grid_row(const Packed&, int64_t, float*) {}

#endif

}  // namespace whispers::WHISPERS_ISA
