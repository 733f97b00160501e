// A committee's next-token distributions, group by group, into one each: the linear or the logarithmic opinion pool.
//
// A row's normaliser comes from chunks of the vocabulary, each with its own maximum, merged in order; so a row's bits depend neither on the
// threads nor on other groups. The second pass over the logits writes; `product` needs a third over its result, which is normalised too.
#pragma once

#include "args.h"
#include "share.h"
#include "simd_math.h"

namespace whispers::WHISPERS_ISA {

// 6 KB of float32: read for the maximum, it is still in the first cache for the sum. And 32 of a head's panels, see likeliest.h.
constexpr int64_t kChunk = 1536;

struct LogSum {
  float top, total;  // the largest x, and the sum of e^(x - top); top -inf: of e^x
};

template <class T>
inline Vec load_or_nothing(const T* x, int64_t n) {
  return select(first(n), load(x, n), minus_infinity());
}

// e^x for x up to 0. What the factor's rounding costs, |x| roundings of e^x, is little beside the sum, which is 1 at least.
inline Vec share_of_top(Vec x) { return exp2(x * splat(1.44269504f)); }

template <class T>
inline LogSum log_sum(const T* x, int64_t n) {
  // Four of each, so that one need not wait for the one before.
  Vec top[4] = {minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity()};
  Vec part[4] = {zero(), zero(), zero(), zero()};
  int64_t at = 0;
  for (; at + 4 * W <= n; at += 4 * W) {
    for (int i = 0; i < 4; ++i) top[i] = max(load(x + at + i * W), top[i]);  // `top` where x is NaN: the sum will tell
  }
  for (; at < n; at += W) top[0] = max(load_or_nothing(x + at, n - at), top[0]);
  const float found = largest(max(max(top[0], top[1]), max(top[2], top[3])));
  const Vec base = splat(found == -__builtin_inff() ? 0.0f : found);
  for (at = 0; at + 4 * W <= n; at += 4 * W) {
    for (int i = 0; i < 4; ++i) part[i] = part[i] + share_of_top(load(x + at + i * W) - base);
  }
  for (int i = 0; at < n; at += W, ++i) part[i] = part[i] + share_of_top(load_or_nothing(x + at, n - at) - base);
  return {found, sum((part[0] + part[1]) + (part[2] + part[3]))};
}

inline LogSum merged(const LogSum* parts, int64_t n) {
  float top = -__builtin_inff();
  for (int64_t i = 0; i < n; ++i) top = parts[i].top > top ? parts[i].top : top;
  const float base = top == -__builtin_inff() ? 0.0f : top;
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += parts[i].total * __builtin_expf(parts[i].top - base);
  return {top, total};
}

// What the threads share, laid out in the team's memory.
struct PoolScratch {
  LogSum* parts;   // [rows, chunks]
  LogSum* pooled;  // [groups, chunks], of a product
  float* tops;     // [rows]
  float* offsets;  // [rows] log p = x - top + offset; for `mixture` with the logarithm of the weight
};
inline int64_t pool_chunks(const PoolLogits& a) { return ceil_div(a.vocabulary, kChunk); }
inline int64_t pool_scratch(const PoolLogits& a) {  // bytes
  const int64_t floats = 2 * (a.rows + a.groups) * pool_chunks(a) + 2 * a.rows;
  return floats * static_cast<int64_t>(sizeof(float));
}
inline PoolScratch pool_layout(const PoolLogits& a, void* memory) {
  LogSum* parts = static_cast<LogSum*>(memory);
  LogSum* pooled = parts + a.rows * pool_chunks(a);
  float* tops = reinterpret_cast<float*>(pooled + a.groups * pool_chunks(a));
  return {parts, pooled, tops, tops + a.rows};
}

// Vectors of tokens [begin, end): log sum_e w_e p_e.
template <class T>
inline void mixture_chunk(const PoolLogits& a, const PoolScratch& s, int64_t from, int64_t to, int64_t begin, int64_t end, float* out) {
  const T* logits = static_cast<const T*>(a.logits);
  int64_t asked = 0, only = 0;
  for (int64_t row = from; row < to; ++row) {
    if (a.weights[row] > 0) ++asked, only = row;
  }
  const auto log_share = [&](int64_t row, int64_t at, int64_t n) {
    return (load(logits + row * a.row_stride + at, n) - splat(s.tops[row])) + splat(s.offsets[row]);
  };
  for (int64_t at = begin; at < end; at += W) {
    const int64_t n = smaller(W, end - at);
    if (asked == 1) {
      store(out + at, log_share(only, at, n), n);
      continue;
    }
    Vec top = minus_infinity();
    for (int64_t row = from; row < to; ++row) {
      if (a.weights[row] > 0) top = max(log_share(row, at, n), top);
    }
    top = select(equal(top, minus_infinity()), zero(), top);
    Vec total = zero();
    for (int64_t row = from; row < to; ++row) {
      if (a.weights[row] > 0) total = total + share_of_top(log_share(row, at, n) - top);
    }
    store(out + at, top + log(total), n);
  }
}

// sum_e w_e log p_e, not normalised yet.
template <class T>
inline void product_chunk(const PoolLogits& a, const PoolScratch& s, int64_t from, int64_t to, int64_t begin, int64_t end, float* out) {
  const T* logits = static_cast<const T*>(a.logits);
  for (int64_t at = begin; at < end; at += W) {
    const int64_t n = smaller(W, end - at);
    Vec total = zero();
    for (int64_t row = from; row < to; ++row) {
      if (!(a.weights[row] > 0)) continue;
      const Vec logp = (load(logits + row * a.row_stride + at, n) - splat(s.tops[row])) + splat(s.offsets[row]);
      total = fma(splat(a.weights[row]), logp, total);
    }
    store(out + at, total, n);
  }
}

template <class T>
inline void pool_phases(const PoolLogits& a, const Crew& crew) {
  const PoolScratch s = pool_layout(a, crew.shared());
  const int64_t chunks = pool_chunks(a);
  const bool product = a.rule == kProduct;
  for (int64_t task; (task = crew.take()) < a.rows * chunks;) {
    const int64_t row = task / chunks, begin = task % chunks * kChunk;
    if (!(a.weights[row] > 0)) continue;  // left out, whatever it holds
    const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride + begin;
    s.parts[task] = log_sum(logits, smaller(kChunk, a.vocabulary - begin));
  }
  crew.barrier();
  for (int64_t row; (row = crew.take()) < a.rows;) {
    if (!(a.weights[row] > 0)) continue;
    const LogSum whole = merged(s.parts + row * chunks, chunks);
    s.tops[row] = whole.top;  // subtracted first: a common offset of the logits costs no digits
    s.offsets[row] = (product ? 0.0f : __builtin_logf(a.weights[row])) - __builtin_logf(whole.total);
  }
  crew.barrier();
  for (int64_t task; (task = crew.take()) < a.groups * chunks;) {
    const int64_t group = task / chunks, begin = task % chunks * kChunk, end = smaller(begin + kChunk, a.vocabulary);
    const int64_t from = a.group_ptr[group], to = a.group_ptr[group + 1];
    float* out = a.out + group * a.vocabulary;
    if (product) {
      product_chunk<T>(a, s, from, to, begin, end, out);
      s.pooled[task] = log_sum(out + begin, end - begin);
    } else {
      mixture_chunk<T>(a, s, from, to, begin, end, out);
    }
  }
  if (!product) return;
  crew.barrier();
  for (int64_t task; (task = crew.take()) < a.groups * chunks;) {
    const int64_t group = task / chunks, begin = task % chunks * kChunk, end = smaller(begin + kChunk, a.vocabulary);
    const LogSum whole = merged(s.pooled + group * chunks, chunks);
    // A product that rules every token out is -inf throughout.
    const bool nothing = whole.top == -__builtin_inff() && whole.total == 0.0f;
    const Vec top = splat(nothing ? 0.0f : whole.top), rest = splat(nothing ? 0.0f : __builtin_logf(whole.total));
    float* out = a.out + group * a.vocabulary;
    for (int64_t at = begin; at < end; at += W) {
      store(out + at, (load(out + at, end - at) - top) - rest, end - at);
    }
  }
}

inline void pool_logits(const PoolLogits& a, const Crew& crew) {
  with_dtype(a.dtype, [&](auto kind) { pool_phases<decltype(kind)>(a, crew); });
}

}  // namespace whispers::WHISPERS_ISA
