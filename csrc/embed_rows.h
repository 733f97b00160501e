// Rows of the embedding table, and of soft prompts behind it.
#pragma once

#include "args.h"
#include "share.h"
#include "simd_math.h"

namespace whispers::WHISPERS_ISA {

template <class T>
inline void embed_row(const EmbedRows& a, int64_t row, T* out) {
  const int64_t id = a.ids[row], behind = id - a.vocabulary;
  const bool soft = behind >= 0;
  with_dtype(soft ? a.soft_dtype : a.dtype, [&](auto kind) {
    using From = decltype(kind);
    const From* from = soft ? static_cast<const From*>(a.soft) + behind * a.soft_row : static_cast<const From*>(a.table) + id * a.table_row;
    convert_row(from, out, a.hidden);
  });
}

inline void embed_rows(const EmbedRows& a, const Crew& crew) {
  const Share share = share_of(a.rows, crew);
  with_dtype(a.out_dtype, [&](auto kind) {
    for (int64_t row = share.begin; row < share.end; ++row) embed_row(a, row, static_cast<decltype(kind)*>(a.out) + row * a.hidden);
  });
}

}  // namespace whispers::WHISPERS_ISA
