// The likeliest token of each row of logits, and its log-probability: what greedy decoding wants, without a distribution written and read.
// Nor are logits, where the product that makes them is given instead.
//
// The normaliser is `pool_logits`' own, chunk by chunk, and so is what is subtracted: the log-probability has the bits of a pool of that row
// alone, where it is a number, and is NaN where that is.
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
inline bool has_head(const Likeliest& a) { return a.head.weights.outputs != 0; }
inline int64_t likeliest_chunks(const Likeliest& a) { return ceil_div(a.vocabulary, kChunk); }
inline int64_t parts_bytes(const Likeliest& a) {
  return up_to(a.rows * likeliest_chunks(a) * static_cast<int64_t>(sizeof(LogSum) + sizeof(int64_t)), kLine);
}
// Bytes that all threads share, and of each of them.
inline int64_t likeliest_scratch(const Likeliest& a) { return parts_bytes(a) + (has_head(a) ? rows_bytes(a.head) : 0); }
inline int64_t likeliest_own(const Likeliest& a) {
  return has_head(a) ? up_to(linear_scratch(a.head), kLine) + a.rows * kChunk * static_cast<int64_t>(sizeof(float)) : 0;
}

// Numbers [begin, begin + n) of a row.
template <class T>
inline void look_at(const T* logits, int64_t row, int64_t begin, int64_t n, int64_t chunks, const LikeliestScratch& s) {
  const int64_t part = row * chunks + begin / kChunk;
  s.parts[part] = log_sum(logits, n);
  s.first[part] = begin + first_equal(logits, n, s.parts[part].top);
}

template <class T>
inline void look_at_logits(const Likeliest& a, const LikeliestScratch& s, const Crew& crew) {
  const int64_t chunks = likeliest_chunks(a);
  for (int64_t task; (task = crew.take()) < a.rows * chunks;) {
    const int64_t row = task / chunks, begin = task % chunks * kChunk;
    look_at(static_cast<const T*>(a.logits) + row * a.row_stride + begin, row, begin, smaller(kChunk, a.vocabulary - begin), chunks, s);
  }
}

// Of the head's logits each thread makes a chunk at a time in its own memory, looks at it there and forgets it.
inline void look_at_head(const Likeliest& a, const LikeliestScratch& s, const Crew& crew) {
  static_assert(kChunk % kPanelOutputs == 0);
  constexpr int64_t kPanels = kChunk / kPanelOutputs;
  const int64_t chunks = likeliest_chunks(a), all = panels_of(a.head.weights), panel_words = words_of_panel(a.head.weights);
  const LinearRows x = prepare(a.head, crew, static_cast<char*>(crew.shared()) + parts_bytes(a));
  float* own = static_cast<float*>(crew.own());
  float* logits = own + up_to(linear_scratch(a.head), kLine) / static_cast<int64_t>(sizeof(float));
  Linear head = a.head;
  head.out_row = kChunk;
  const Share share = share_of(chunks, crew);
  for (int64_t chunk = share.begin; chunk < share.end; ++chunk) {
    const int64_t begin = chunk * kChunk, after = smaller((chunk + 1) * kPanels, all);
    head.out = logits - begin;  // where the row's first number would be
    const float* next = chunk + 1 < share.end ? head.weights.words + after * panel_words : nullptr;
    multiply_part(head, x, {{0, head.rows}, {chunk * kPanels, after}, next}, own);
    for (int64_t row = 0; row < a.rows; ++row) look_at(logits + row * kChunk, row, begin, smaller(kChunk, a.vocabulary - begin), chunks, s);
  }
}

inline void likeliest(const Likeliest& a, const Crew& crew) {
  if (a.rows == 0) return;
  const int64_t chunks = likeliest_chunks(a);
  LikeliestScratch s;
  s.parts = static_cast<LogSum*>(crew.shared());
  s.first = reinterpret_cast<int64_t*>(s.parts + a.rows * chunks);
  if (has_head(a)) {
    look_at_head(a, s, crew);
  } else {
    with_dtype(a.dtype, [&](auto kind) { look_at_logits<decltype(kind)>(a, s, crew); });
  }
  crew.barrier();
  const Share share = share_of(a.rows, crew);
  for (int64_t row = share.begin; row < share.end; ++row) {
    const LogSum whole = merged(s.parts + row * chunks, chunks);
    int64_t chunk = 0;
    while (chunk + 1 < chunks && s.parts[row * chunks + chunk].top != whole.top) ++chunk;
    a.tokens[row] = s.first[row * chunks + chunk];
    // x - top + offset, of x = top and the weight 1: 0 where all the others are nothing, NaN where no number is finite.
    a.logprobs[row] = (whole.top - whole.top) + (0.0f - __builtin_logf(whole.total));
  }
}

}  // namespace whispers::WHISPERS_ISA
