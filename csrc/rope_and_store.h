// Rotates q and k by their positions and writes k and v into pages.
#pragma once

#include "args.h"
#include "fp8.h"
#include "share.h"
#include "simd_math.h"

namespace whispers::WHISPERS_ISA {

// One head, in the half-split layout. `out` may be `x`.
template <class T, class Out>
inline void rotate(const T* x, const float* cos, const float* sin, Out* out, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t at = 0; at < half; at += W) {
    const int64_t n = smaller(W, half - at);
    const Vec a = load(x + at, n), b = load(x + half + at, n), c = load(cos + at, n), s = load(sin + at, n);
    store(out + at, fnma(b, s, a * c), n);
    store(out + half + at, fma(a, s, b * c), n);
  }
}

template <class T, class Page>
inline void store_head(const T* x, Page* page, float*, int64_t dim) {
  for (int64_t at = 0; at < dim; at += W) store(page + at, load(x + at, dim - at), dim - at);
}
// Copied bit for bit where nothing is to be rounded.
template <class T>
inline void store_head(const T* x, T* page, float*, int64_t dim) {
  __builtin_memcpy(page, x, dim * sizeof(T));
}
// Scaled, so that the largest number of the head becomes the largest of e4m3. As the definition: an infinity gives an infinite scale; a
// NaN, or numbers so small that the scale would be 0, a scale of 1.
template <class T>
inline void store_head(const T* x, Fp8* page, float* scale, int64_t dim) {
  Vec most = zero(), nan = zero();
  for (int64_t at = 0; at < dim; at += W) {
    const Vec v = load(x + at, dim - at);
    most = max(magnitude(v), most);  // `most` where v is NaN
    nan = select(equal(v, v), nan, v);
  }
  const float found = largest(most) / 448.0f, any = sum(nan);
  *scale = found > 0 && any == any ? found : 1.0f;
  const Vec divisor = splat(*scale);
  for (int64_t at = 0; at < dim; at += W) {
    float quotient[W];
    store(quotient, load(x + at, dim - at) / divisor);
    for (int64_t i = 0; i < smaller(W, dim - at); ++i) page[at + i] = to_fp8(quotient[i]);
  }
}

// Where a row's key or value of one KV head is kept.
struct Place {
  int64_t element, scale;
};
inline Place place_of(const PageLayout& layout, int64_t slot, int64_t head, int64_t page_size, int64_t heads) {
  return {slot / page_size * layout.page + slot % page_size * layout.token + head * layout.head, slot * heads + head};
}

// Into panels: a key's words lie page_size words apart, a value's numbers a word apart.
template <class T>
inline void store_key_in_panel(const T* x, T* panel, int64_t token, int64_t page_size, int64_t dim) {
  constexpr int64_t kWord = 4 / static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < dim; at += kWord) __builtin_memcpy(panel + at * page_size + token * kWord, x + at, 4);
}
template <class T>
inline void store_value_in_panel(const T* x, T* panel, int64_t token, int64_t dim) {
  constexpr int64_t kWord = 4 / static_cast<int64_t>(sizeof(T));
  panel += token / kWord * dim * kWord + token % kWord;
  for (int64_t at = 0; at < dim; ++at) panel[at * kWord] = x[at];
}

// Heads [begin, end) of all rows' q, k and v, counted through. `room` holds a head's numbers.
template <class T, class Page>
inline void rope_part(const RopeAndStore& a, int64_t begin, int64_t end, T* room) {
  const int64_t heads = a.q_heads + 2 * a.kv_heads;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / heads, head = index % heads, kv = head - a.q_heads;
    const float *cos = a.cos + row * a.angle_row, *sin = a.sin + row * a.angle_row;
    if (kv < 0) {
      const T* q = static_cast<const T*>(a.q) + row * a.q_row + head * a.q_head;
      rotate(q, cos, sin, static_cast<T*>(a.out) + (row * a.q_heads + head) * a.dim, a.dim);
    } else if (a.slots[row] >= 0 && kv < a.kv_heads) {
      const Place place = place_of(a.k_layout, a.slots[row], kv, a.page_size, a.kv_heads);
      rotate(static_cast<const T*>(a.k) + row * a.k_row + kv * a.k_head, cos, sin, room, a.dim);  // rounded to T first
      if (a.in_panels) {
        store_key_in_panel(room, static_cast<T*>(a.k_pages) + place.element, a.slots[row] % a.page_size, a.page_size, a.dim);
        continue;
      }
      store_head(room, static_cast<Page*>(a.k_pages) + place.element, a.k_scale + place.scale, a.dim);
    } else if (a.slots[row] >= 0) {
      const Place place = place_of(a.v_layout, a.slots[row], kv - a.kv_heads, a.page_size, a.kv_heads);
      const T* v = static_cast<const T*>(a.v) + row * a.v_row + (kv - a.kv_heads) * a.v_head;
      if (a.in_panels) {
        store_value_in_panel(v, static_cast<T*>(a.v_pages) + place.element, a.slots[row] % a.page_size, a.dim);
        continue;
      }
      store_head(v, static_cast<Page*>(a.v_pages) + place.element, a.v_scale + place.scale, a.dim);
    }
  }
}

inline int64_t rope_scratch(const RopeAndStore& a) { return a.dim * static_cast<int64_t>(sizeof(float)); }  // bytes of each thread

inline void rope_and_store(const RopeAndStore& a, const Crew& crew) {
  const Share share = share_of(a.rows * (a.q_heads + 2 * a.kv_heads), crew);
  with_dtype(a.dtype, [&](auto kind) {
    using T = decltype(kind);
    with_page_dtype(a.page_dtype, [&](auto page_kind) {
      rope_part<T, decltype(page_kind)>(a, share.begin, share.end, static_cast<T*>(crew.own()));
    });
  });
}

}  // namespace whispers::WHISPERS_ISA
