// Functions of vectors, each to about one unit in float32's last place.
#pragma once

#include "simd.h"

namespace whispers::WHISPERS_ISA {

// 2^f for f in [-1/2, 1/2], and exactly 1 at 0: a minimax polynomial, off by 2e-9.
inline Vec exp2_of_fraction(Vec f) {
  Vec p = splat(1.5345811967e-04f);
  p = fma(p, f, splat(1.3399931390e-03f));
  p = fma(p, f, splat(9.6184889587e-03f));
  p = fma(p, f, splat(5.5503287765e-02f));
  p = fma(p, f, splat(2.4022646891e-01f));
  p = fma(p, f, splat(6.9314720574e-01f));
  return fma(p, f, splat(1.0f));
}

// 2^x for x that are finite or -inf and at most 127, 0 where that is no normal number: those Intel's processors make in microcode, which was nearly
// half of the time of merging. NaN gives NaN.
inline Vec exp2(Vec x) {
  const Vec least = splat(-126.0f), limited = max(least, x);  // the second argument where it is NaN; -inf - -inf would be NaN below
  const Vec n = round(limited);
  return select(less(x, least), zero(), times_power_of_2(exp2_of_fraction(limited - n), n));
}

#if WHISPERS_LEVEL >= 1
// 2^x in 7 instructions instead of 12, off by 1.5e-7 at most, and exactly 1 at 0. One factor less would be off by 3e-6: little beside a
// rounding to bf16, but not beside float32's of the log-sum-exp. -inf has fraction 0, and 1 times 2^-inf is 0; NaN stays NaN.
inline Vec exp2_22(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Vec p = splat(1.867130515e-03f);
  p = fma(p, f, splat(9.017029777e-03f));
  p = fma(p, f, splat(5.579991266e-02f));
  p = fma(p, f, splat(2.401644439e-01f));
  p = fma(p, f, splat(6.931512952e-01f));
  return _mm512_scalef_ps(fma(p, f, splat(1.0f)), x);  // scales by 2^floor(x)
}
#endif

// e^x for any x.
inline Vec exp(Vec x) {
  x = min(splat(150.0f), max(splat(-150.0f), x));  // e^±150 is infinity and 0
  const Vec n = round(x * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), x);  // exact: the constant has 9 bits
  r = fma(n, splat(2.12194440e-4f), r);
  return times_power_of_2(exp2_of_fraction(r * splat(1.44269504f)), n);
}

// Natural logarithm of x that are normal numbers, 0 (-inf), or NaN.
inline Vec log(Vec x) {
  Vec mantissa = mantissa_of(x), exponent = exponent_of(x);
  const Mask high = less(splat(1.41421356f), mantissa);  // so that u below is in [-0.293, 0.414]
  mantissa = select(high, mantissa * splat(0.5f), mantissa);
  exponent = select(high, exponent + splat(1.0f), exponent);
  const Vec u = mantissa - splat(1.0f);
  // log(1 + u) = u - u^2 / 2 + u^3 p(u): the first terms are exact, or nearly.
  Vec p = splat(-7.6211209455e-02f);
  p = fma(p, u, splat(1.2904668166e-01f));
  p = fma(p, u, splat(-1.3243463134e-01f));
  p = fma(p, u, splat(1.4181833991e-01f));
  p = fma(p, u, splat(-1.6609012490e-01f));
  p = fma(p, u, splat(2.0001968553e-01f));
  p = fma(p, u, splat(-2.5001586568e-01f));
  p = fma(p, u, splat(3.3333325993e-01f));
  const Vec square = u * u;
  Vec result = fma(p * square, u, exponent * splat(2.12194440e-4f * -1.0f));
  result = fma(square, splat(-0.5f), result);
  result = fma(exponent, splat(0.693359375f), u + result);
  result = select(equal(x, zero()), minus_infinity(), result);
  return select(equal(x, x), result, x);
}

// tanh, without cancellation near 0.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec series = fma(square, splat(0.021869488f), splat(-0.05396825f));
  series = fma(square, series, splat(0.13333334f));
  series = fma(square, series, splat(-0.33333334f));
  series = fma(square * series, x, x);
  const Vec far = splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f));
  return select(less(magnitude(x), splat(0.3f)), series, far);
}

// e4m3 bytes, one a lane, as float32: exact.
inline Vec widen_fp8(Bits bytes) {
#if WHISPERS_LEVEL >= 1
  const Bits low = _mm512_and_si512(bytes, splat_bits(0x7f)), sign = _mm512_slli_epi32(_mm512_and_si512(bytes, splat_bits(0x80)), 24);
  const Vec normal = as_vec(_mm512_add_epi32(_mm512_slli_epi32(low, 20), splat_bits(120 << 23)));
  const Vec small = _mm512_cvtepi32_ps(low) * splat(0x1p-9f);  // exponent field 0: a multiple of 2^-9
  Vec value = _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(low, splat_bits(8)), normal, small);
  value = _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(low, splat_bits(0x7f)), value, splat(__builtin_nanf("")));
  return as_vec(_mm512_or_si512(as_bits(value), sign));
#else
  const Bits low = _mm256_and_si256(bytes, splat_bits(0x7f)), sign = _mm256_slli_epi32(_mm256_and_si256(bytes, splat_bits(0x80)), 24);
  const Vec normal = as_vec(_mm256_add_epi32(_mm256_slli_epi32(low, 20), splat_bits(120 << 23)));
  const Vec small = _mm256_cvtepi32_ps(low) * splat(0x1p-9f);
  Vec value = select(as_vec(_mm256_cmpgt_epi32(splat_bits(8), low)), small, normal);
  value = select(as_vec(_mm256_cmpeq_epi32(low, splat_bits(0x7f))), splat(__builtin_nanf("")), value);
  return as_vec(_mm256_or_si256(as_bits(value), sign));
#endif
}
inline Vec load(const Fp8* p) { return widen_fp8(load_bytes(p)); }
inline Vec load(const Fp8* p, int64_t n) { return widen_fp8(load_bytes(p, n)); }

}  // namespace whispers::WHISPERS_ISA
