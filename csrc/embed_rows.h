// Rows of the embedding table, and of soft prompts behind it.
#pragma once

#include "args.h"
#include "share.h"
#include "simd_math.h"

namespace whispers::WHISPERS_ISA {

template <class T, class S>
inline void embed_row(const EmbedRows& a, int64_t row) {
  T* out = static_cast<T*>(a.out) + row * a.hidden;
  const int64_t id = a.ids[row];
  if (id < a.vocabulary) {
    __builtin_memcpy(out, static_cast<const T*>(a.table) + id * a.table_row, a.hidden * sizeof(T));
    return;
  }
  const S* soft = static_cast<const S*>(a.soft) + (id - a.vocabulary) * a.soft_row;
  int64_t at = 0;
  for (; at + W <= a.hidden; at += W) store(out + at, load(soft + at));
  if (at < a.hidden) store(out + at, load(soft + at, a.hidden - at), a.hidden - at);
}

inline void embed_rows(const EmbedRows& a, const Crew& crew) {
  const Share share = share_of(a.rows, crew);
  with_dtype(a.dtype, [&](auto kind) {
    with_dtype(a.soft_dtype, [&](auto soft_kind) {
      for (int64_t row = share.begin; row < share.end; ++row) embed_row<decltype(kind), decltype(soft_kind)>(a, row);
    });
  });
}

}  // namespace whispers::WHISPERS_ISA
