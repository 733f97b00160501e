// The likeliest token of each row of logits, and its log-probability: what greedy decoding wants, without a distribution written and read.
// The product that makes the logits can go before it in the same call.
//
// The normaliser is `pool_logits`' own, chunk by chunk, so the log-probability has the bits of a pool of that row alone.
#pragma once

#include "linear.h"
#include "pool_logits.h"

namespace whispers::WHISPERS_ISA {

// The first index of x [n] that is `value`; 0 where there is none, as in a row that is not a number throughout.
template <class T>
inline int64_t first_equal(const T* x, int64_t n, float value) {
  int64_t at = 0;
  const Vec wanted = splat(value);
  for (; at + W <= n && !any(equal(load(x + at), wanted)); at += W) {
  }
  for (; at < n; ++at) {
    if (first_of(load(x + at, 1)) == value) return at;
  }
  return 0;
}

struct LikeliestScratch {
  LogSum* parts;   // [rows, chunks]
  int64_t* first;  // [rows, chunks] where in the row a chunk's largest stands
};
inline int64_t likeliest_chunks(const Likeliest& a) { return ceil_div(a.vocabulary, kChunk); }
inline int64_t likeliest_scratch(const Likeliest& a) {  // bytes
  const int64_t own = a.rows * likeliest_chunks(a) * static_cast<int64_t>(sizeof(LogSum) + sizeof(int64_t));
  return a.head.weights.outputs == 0 ? own : larger(own, rows_bytes(a.head));
}

template <class T>
inline void likeliest_phases(const Likeliest& a, const Crew& crew) {
  const int64_t chunks = likeliest_chunks(a);
  LikeliestScratch s;
  s.parts = static_cast<LogSum*>(crew.shared());
  s.first = reinterpret_cast<int64_t*>(s.parts + a.rows * chunks);
  for (int64_t task; (task = crew.take()) < a.rows * chunks;) {
    const int64_t begin = task % chunks * kChunk, n = smaller(kChunk, a.vocabulary - begin);
    const T* logits = static_cast<const T*>(a.logits) + task / chunks * a.row_stride + begin;
    s.parts[task] = log_sum(logits, n);
    s.first[task] = begin + first_equal(logits, n, s.parts[task].top);
  }
  crew.barrier();
  const Share share = share_of(a.rows, crew);
  for (int64_t row = share.begin; row < share.end; ++row) {
    const LogSum whole = merged(s.parts + row * chunks, chunks);
    int64_t chunk = 0;
    while (chunk + 1 < chunks && s.parts[row * chunks + chunk].top != whole.top) ++chunk;
    a.tokens[row] = s.first[row * chunks + chunk];
    a.logprobs[row] = -__builtin_logf(whole.total);
  }
}

inline int64_t likeliest_own(const Likeliest& a) { return a.head.weights.outputs == 0 ? 0 : linear_scratch(a.head); }  // bytes, of each thread

inline void likeliest(const Likeliest& a, const Crew& crew) {
  if (a.head.weights.outputs != 0) {
    linear(a.head, crew);
    crew.barrier();
  }
  with_dtype(a.dtype, [&](auto kind) { likeliest_phases<decltype(kind)>(a, crew); });
}

}  // namespace whispers::WHISPERS_ISA
