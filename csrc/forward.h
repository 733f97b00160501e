// A decoder's forward over ragged rows in one call: the operations one after the other, a barrier where threads must meet.
//
// The residual stream is float32 whatever the weights are, where the plain composition rounds it after every product: a bf16 one of 256
// loses all that is below 1. It is added to in the products' epilogues. Between two barriers every thread has its share of rows, heads or
// panels; ten barriers a layer cost 1 % of a step of one row.
#pragma once

#include "attention.h"
#include "embed_rows.h"
#include "forward_args.h"
#include "linear.h"
#include "linear_unpack.h"
#include "rms_norm.h"
#include "rope_and_store.h"

namespace whispers::WHISPERS_ISA {

inline void normalise(const Forward& a, const void* weight, void* out, const Crew& crew) {
  const Share share = share_of(a.rows, crew);
  with_dtype(a.rope.dtype, [&](auto kind) {
    using T = decltype(kind);
    with_dtype(a.weight_dtype, [&](auto weight_kind) {
      using Weight = decltype(weight_kind);
      for (int64_t row = share.begin; row < share.end; ++row) {
        rms_norm_row<float, Weight, T>(a.hidden + row * a.width, nullptr, static_cast<const Weight*>(weight),
                                       static_cast<T*>(out) + row * a.width, nullptr, a.width, static_cast<float>(a.eps));
      }
    });
  });
}

// Rows of the hidden states to where somebody wants them.
template <class From>
inline void tap(const Forward& a, int64_t layer, const From* from, const Crew& crew) {
  if (a.taps[layer] == nullptr) return;
  const Share share = share_of(a.rows, crew);
  with_dtype(a.rope.dtype, [&](auto kind) {
    auto* to = static_cast<decltype(kind)*>(a.taps[layer]);
    convert_row(from + share.begin * a.width, to + share.begin * a.width, (share.end - share.begin) * a.width);
  });
}

inline Linear product(const Forward& a, const Packed& weights, const void* x, int64_t x_row, void* out, int64_t out_row, const Packed* next) {
  return {weights, x, nullptr, out, next, a.rows, x_row, out_row, out_row, a.rope.dtype, a.rope.dtype};
}

// x W^T (+ bias), added to the hidden states.
inline Linear addition(const Forward& a, const Packed& weights, const void* x, int64_t x_row, const Packed* next) {
  return {weights, x, a.hidden, a.hidden, next, a.rows, x_row, a.width, a.width, a.rope.dtype, kF32};
}

// Normalises the heads of q and k in place.
inline void norm_heads(const Forward& a, const ForwardLayer& layer, const Crew& crew) {
  const RopeAndStore& r = a.rope;
  const int64_t heads = r.q_heads + r.kv_heads;
  const Share share = share_of(a.rows * heads, crew);
  with_dtype(r.dtype, [&](auto kind) {
    using T = decltype(kind);
    with_dtype(a.weight_dtype, [&](auto weight_kind) {
      using Weight = decltype(weight_kind);
      for (int64_t index = share.begin; index < share.end; ++index) {
        const int64_t head = index % heads;
        T* x = static_cast<T*>(a.qkv) + index / heads * r.q_row + head * r.dim;
        const void* weight = head < r.q_heads ? layer.q_norm : layer.k_norm;
        rms_norm_row<T, Weight, T>(x, nullptr, static_cast<const Weight*>(weight), x, nullptr, r.dim, static_cast<float>(a.eps));
      }
    });
  });
}

// Cosines and sines of all rows' rotary angles, once for all layers.
inline void turn(const Forward& a, const Crew& crew) {
  const int64_t half = a.rope.dim / 2;
  const Share share = share_of(a.rows, crew);
  for (int64_t row = share.begin; row < share.end; ++row) {
    float *cos = a.angles + row * half, *sin = cos + a.rows * half;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(a.attention.position[row]) * a.inverse[i];
      cos[i] = __builtin_cosf(angle);
      sin[i] = __builtin_sinf(angle);
    }
  }
}

// Keeps the wanted rows of some, in place: a thread moves its part of every row, the first row first.
template <class T>
inline void keep_rows(T* x, int64_t width, const Wanted& wanted, const Crew& crew) {
  const Share share = share_of(width, crew, kLine / static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < wanted.count; ++i) {
    const int64_t row = wanted.rows[i];
    if (row != i) __builtin_memcpy(x + i * width + share.begin, x + row * width + share.begin, (share.end - share.begin) * sizeof(T));
  }
}

// The attention of the wanted rows.
inline Attention attention_of(Attention attention, const Wanted& wanted) {
  attention.position = wanted.position;
  attention.header = wanted.header;
  attention.items = wanted.items;
  attention.parts = wanted.parts;
  attention.merge_rows = wanted.merge_rows;
  attention.merge_ptr = wanted.merge_ptr;
  attention.merge_slots = wanted.merge_slots;
  attention.slots = wanted.slots;
  return attention;
}

// How often this thread's linears between two attentions call for the next one's keys.
inline int64_t calls_for_keys(const Forward& a, const Crew& crew) {
  const ForwardLayer& layer = a.layers[0];
  const auto calls = [&](const Packed& weights) { return calls_for_others(product(a, weights, nullptr, 0, nullptr, 0, nullptr), crew); };
  return calls(layer.out) + calls(layer.gate_up) + calls(layer.down) + calls(layer.qkv);
}

inline void forward(const Forward& all, const Crew& crew) {
  Forward a = all;
  const int64_t attended = a.attention.q_heads * a.attention.dim;
  RopeAndStore rope = a.rope;
  rope.cos = a.angles;
  rope.sin = a.angles + a.rows * (rope.dim / 2);
  rope.angle_row = rope.dim / 2;
  turn(a, crew);
  Attention attention = a.attention;
  LinesAhead keys;  // of the attention to come, fetched while linears compute: the weights are few bytes where tiles are multiplied
  const int64_t tasks = a.count > 1 ? add_keys(attention, crew, keys) : 0, calls = tasks > 0 ? calls_for_keys(a, crew) : 0;
  int64_t fetched = 0;  // tasks of it
  if (a.embed.table != nullptr) {
    embed_rows(a.embed, crew);
  } else {
    unpack_rows(a.unpack, crew);
  }
  for (int64_t index = 0; index < a.count; ++index) {
    const ForwardLayer& layer = a.layers[index];
    tap(a, index, a.hidden, crew);  // of rows that this thread has written itself, or behind a barrier
    normalise(a, layer.attn_norm, a.normed, crew);
    crew.barrier();
    linear(product(a, layer.qkv, a.normed, a.width, a.qkv, rope.q_row, &layer.out), crew, &keys);
    crew.barrier();
    if (layer.q_norm != nullptr) {
      norm_heads(a, layer, crew);
      crew.barrier();
    }
    rope_and_store(rope, crew);
    crew.barrier();
    if (index + 1 == a.count && a.wanted.count >= 0) {  // of a prefill's chunk this is all but a layer less: 3 % of 30 layers
      if (a.wanted.count == 0) return;
      keep_rows(a.hidden, a.width, a.wanted, crew);
      with_dtype(rope.dtype, [&](auto kind) { keep_rows(static_cast<decltype(kind)*>(a.q), attended, a.wanted, crew); });
      crew.barrier();
      attention = attention_of(attention, a.wanted);
      a.rows = a.wanted.count;
      fetched = 0;
    }
    committee_attention(attention, crew, fetched);
    crew.barrier();
    if (index + 1 < a.count) {
      keys.begin((index + 1) * a.layer_stride, calls);
      fetched = tasks;
    }
    linear(addition(a, layer.out, a.attended, attended, &layer.gate_up), crew, &keys);
    crew.barrier();
    normalise(a, layer.mlp_norm, a.normed, crew);
    crew.barrier();
    linear(product(a, layer.gate_up, a.normed, a.width, a.gated, a.intermediate, &layer.down), crew, &keys);
    crew.barrier();
    const Packed* next = index + 1 < a.count ? &a.layers[index + 1].qkv : nullptr;
    linear(addition(a, layer.down, a.gated, a.intermediate, next), crew, &keys);
    crew.barrier();
    rope.k_pages = static_cast<char*>(rope.k_pages) + a.layer_stride;
    rope.v_pages = static_cast<char*>(rope.v_pages) + a.layer_stride;
    attention.k_pages = rope.k_pages;
    attention.v_pages = rope.v_pages;
  }
  normalise(a, a.norm, a.out, crew);
  with_dtype(a.rope.dtype, [&](auto kind) { tap(a, a.count, static_cast<const decltype(kind)*>(a.out), crew); });
}

// The most that a phase wants: of each thread, and of all together.
struct Scratch {
  int64_t each, shared;
};

inline Scratch forward_scratch(const Forward& a) {
  const int64_t first = a.embed.table == nullptr ? unpack_scratch(a.unpack) : 0;
  int64_t partials = partials_bytes(a.attention);
  if (a.wanted.count >= 0) partials = larger(partials, partials_bytes(attention_of(a.attention, a.wanted)));
  Scratch most{larger(larger(first, rope_scratch(a.rope)), attention_scratch(a.attention)), partials};
  for (int64_t index = 0; index < a.count; ++index) {
    const ForwardLayer& layer = a.layers[index];
    const Linear products[] = {
        product(a, layer.qkv, a.normed, a.width, a.qkv, a.rope.q_row, nullptr),
        addition(a, layer.out, a.attended, a.attention.q_heads * a.attention.dim, nullptr),
        product(a, layer.gate_up, a.normed, a.width, a.gated, a.intermediate, nullptr),
        addition(a, layer.down, a.gated, a.intermediate, nullptr),
    };
    for (const Linear& one : products) most = {larger(most.each, linear_scratch(one)), larger(most.shared, rows_bytes(one))};
  }
  return most;
}

}  // namespace whispers::WHISPERS_ISA
