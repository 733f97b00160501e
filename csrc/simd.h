// The vectors of one instruction set, W floats wide. Included once for each set, in a namespace of its own (see isa.h); everything that
// depends on the set is in here, so that an operation is written once.
//
// No std:: function may be called below this line of inclusion: an inline one could be compiled with AVX-512 and shared by the linker
// with code that runs everywhere.
#pragma once

namespace whispers::WHISPERS_ISA {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t up_to(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }  // a whole number of units

template <int n>
struct Number {  // n as a type
  static constexpr int value = n;
};

#if WHISPERS_LEVEL >= 1

constexpr int W = 16;
using Vec = __m512;
using Bits = __m512i;
using Mask = __mmask16;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Bits splat_bits(int x) { return _mm512_set1_epi32(x); }
inline Vec as_vec(Bits x) { return _mm512_castsi512_ps(x); }
inline Bits as_bits(Vec x) { return _mm512_castps_si512(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }                // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round(Vec x) { return _mm512_roundscale_ps(x, 0); }

inline Mask first(int64_t n) { return n >= W ? Mask(0xffff) : n <= 0 ? Mask(0) : Mask((1u << n) - 1); }  // lanes below n
inline Mask outside(Mask a, Mask b) { return Mask(a & ~b); }                                           // a without b
inline Mask only(int64_t n) { return outside(first(n + 1), first(n)); }                                // lane n, or none
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline bool any(Mask mask) { return mask != 0; }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec widen(__m256i x, Bf16) { return as_vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Vec widen(__m256i x, F16) { return _mm512_cvtph_ps(x); }
inline Vec load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Bf16{}); }
inline Vec load(const F16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), F16{}); }
inline Bits load_bytes(const Fp8* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Vec load(const Bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p), Bf16{}); }
inline Vec load(const F16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p), F16{}); }
inline Bits load_bytes(const Fp8* p, int64_t n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }

inline __m256i narrow(Vec x, F16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m256i narrow(Vec x, Bf16) {
  // Nearest, ties to even; a NaN stays one. (The instruction of AVX512_BF16 flushes numbers below 2^-126.)
  const Bits bits = as_bits(x);
  const Bits odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), splat_bits(1));
  Bits up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, splat_bits(0x7fff)), odd), 16);
  up = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), up, splat_bits(0x7fc0));
  return _mm512_cvtepi32_epi16(up);
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, Bf16{})); }
inline void store(F16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, F16{})); }
inline void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline void store(Bf16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x, Bf16{})); }
inline void store(F16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x, F16{})); }

// Sums of products, which have lost what is below 2^-126 already where there is an instruction for bf16.
template <class T>
inline __m256i narrow_sums(Vec x, T kind) {
#if WHISPERS_LEVEL >= 2
  if constexpr (__is_same(T, Bf16)) return (__m256i)_mm512_cvtneps_pbh(x);
#endif
  return narrow(x, kind);
}
inline void store_sums(float* p, Vec x) { store(p, x); }
template <class T>
inline void store_sums(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_sums(x, T{}));
}
// The first 8 lanes and the last 8, `n` of each.
inline void store_halves(float* low, float* high, Vec x, int64_t n) {
  const Vec last = _mm512_shuffle_f32x4(x, x, 0xee);
  if (n < 8) return store(low, x, n), store(high, last, n);
  _mm256_storeu_ps(low, _mm512_castps512_ps256(x));
  _mm256_storeu_ps(high, _mm512_castps512_ps256(last));
}
template <class T>
inline void store_halves(T* low, T* high, Vec x, int64_t n) {
  if (n < 8) return store(low, x, n), store(high, _mm512_shuffle_f32x4(x, x, 0xee), n);
  const __m256i numbers = narrow_sums(x, T{});
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(numbers));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(numbers, 1));
}

inline float first_of(Vec x) { return _mm512_cvtss_f32(x); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest(Vec x) { return _mm512_reduce_max_ps(x); }

inline Vec times_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }  // x 2^n for whole n
inline Vec exponent_of(Vec x) { return _mm512_getexp_ps(x); }                 // floor(log2 x), x > 0
inline Vec mantissa_of(Vec x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }  // in [1, 2)

#else

constexpr int W = 8;
using Vec = __m256;
using Bits = __m256i;
using Mask = __m256;  // all bits of a lane, or none

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Bits splat_bits(int x) { return _mm256_set1_epi32(x); }
inline Vec as_vec(Bits x) { return _mm256_castsi256_ps(x); }
inline Bits as_bits(Vec x) { return _mm256_castps_si256(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Mask first(int64_t n) {
  const Bits lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return as_vec(_mm256_cmpgt_epi32(splat_bits(static_cast<int>(smaller(larger(n, 0), W))), lane));
}
inline Mask outside(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
inline Mask only(int64_t n) { return outside(first(n + 1), first(n)); }
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, mask); }
inline bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec widen(__m128i x, Bf16) { return as_vec(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Vec widen(__m128i x, F16) { return _mm256_cvtph_ps(x); }
inline Vec load(const Bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Bf16{}); }
inline Vec load(const F16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), F16{}); }
inline Bits load_bytes(const Fp8* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }

// AVX2 masks neither 16-bit loads nor bytes: a row's end goes by way of a buffer.
template <class T>
struct Edge {
  T at[W] = {};
  Edge() = default;
  Edge(const T* p, int64_t n) {
    for (int64_t i = 0; i < smaller(n, W); ++i) at[i] = p[i];
  }
  void write(T* p, int64_t n) const {
    for (int64_t i = 0; i < smaller(n, W); ++i) p[i] = at[i];
  }
};
template <class T>
inline Vec load(const T* p, int64_t n) {
  return n >= W ? load(p) : load(Edge<T>(p, n).at);
}
inline Bits load_bytes(const Fp8* p, int64_t n) { return n >= W ? load_bytes(p) : load_bytes(Edge<Fp8>(p, n).at); }

inline __m128i narrow(Vec x, F16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m128i narrow(Vec x, Bf16) {
  const Bits bits = as_bits(x);
  const Bits odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), splat_bits(1));
  Bits up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, splat_bits(0x7fff)), odd), 16);
  up = as_bits(select(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), as_vec(splat_bits(0x7fc0)), as_vec(up)));
  return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(Bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, Bf16{})); }
inline void store(F16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, F16{})); }
template <class T>
inline void store(T* p, Vec x, int64_t n) {
  if (n >= W) return store(p, x);
  Edge<T> edge;
  store(edge.at, x);
  edge.write(p, n);
}

template <class T>
inline void store_sums(T* p, Vec x) {
  store(p, x);
}

inline float first_of(Vec x) { return _mm256_cvtss_f32(x); }
inline float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline Vec power_of_2(Bits n) { return as_vec(_mm256_slli_epi32(_mm256_add_epi32(n, splat_bits(127)), 23)); }
inline Vec times_power_of_2(Vec x, Vec n) {
  // In two steps, so that results below 2^-126 come out rounded and those above 2^128 infinite. NaN passes through x.
  n = min(max(n, splat(-252.0f)), splat(254.0f));
  const Bits whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return x * power_of_2(half) * power_of_2(_mm256_sub_epi32(whole, half));
}
inline Vec exponent_of(Vec x) {  // of normal numbers: `log` is asked for no others
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(as_bits(x), 23), splat_bits(127)));
}
inline Vec mantissa_of(Vec x) {
  return as_vec(_mm256_or_si256(_mm256_and_si256(as_bits(x), splat_bits(0x7fffff)), splat_bits(0x3f800000)));
}

#endif

// Transposes W vectors of W words: lane i of vector j becomes lane j of vector i.
#if WHISPERS_LEVEL >= 1
inline void transpose(Vec (&x)[W]) {
  Vec t[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 4) {  // 4 by 4 within each 128 bits
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {  // 4 by 4 of those quarters
    const Vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#else
inline void transpose(Vec (&x)[W]) {
  Vec t[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[i], x[i + 1])), b = _mm256_castps_pd(_mm256_unpackhi_ps(x[i], x[i + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[i + 2], x[i + 3])), d = _mm256_castps_pd(_mm256_unpackhi_ps(x[i + 2], x[i + 3]));
    t[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    t[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    t[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    t[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#endif

inline Vec add(Vec a, Vec b) { return a + b; }
// Of W vectors behind each other, each one's lanes taken together: lane i of the result is vector i's.
template <Vec (&two)(Vec, Vec)>
inline Vec across(const float* vecs) {
  Vec x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(vecs + i * W);
  transpose(x);
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) x[i] = two(x[i], x[i + half]);
  }
  return x[0];
}

inline Vec zero() { return splat(0.0f); }
inline Vec minus_infinity() { return splat(-__builtin_inff()); }
inline Vec magnitude(Vec x) { return max(x, zero() - x); }

// `count` numbers in another format; in the same one, their very bits.
template <class From, class To>
inline void convert_row(const From* from, To* to, int64_t count) {
  if constexpr (__is_same(From, To)) {
    __builtin_memcpy(to, from, count * sizeof(To));
  } else {
    int64_t at = 0;
    for (; at + W <= count; at += W) store(to + at, load(from + at));
    if (at < count) store(to + at, load(from + at, count - at), count - at);
  }
}

}  // namespace whispers::WHISPERS_ISA
