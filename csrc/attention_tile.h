// What attention does with one tile of rows and one block of keys: fetches keys and values as the matrix product wants them, and turns
// scores into weights.
#pragma once

#include "args.h"
#include "matmul.h"

namespace whispers::WHISPERS_ISA {

// Keys of a block: one step of the online softmax, and the shortest range of keys there is. It is part of the order in which a row is summed.
// Measured on Zen 5, 32 rows of 3 heads over 2048 keys, D = 64: 128 keys 6 % slower, 64 keys 18 %.
constexpr int64_t kKeys = 256;
constexpr int64_t kLeastPage = 16;  // in panels
// Rows whose scores are made, weighed and used before the next, so that they stay in the first cache beside the keys: 12 KB. Of tiles, as many as a
// product takes at a time.
template <class Math>
constexpr int64_t kStrip = Math::kTiled ? 32 : 12;
template <class Math>
constexpr int64_t kLanes = up_to(kStrip<Math>, 16);  // as many, up to whole vectors
// Words from one row of scores to the next. Tiles have a line more, so that their rows do not all fall into a few sets of that cache.
template <class Math>
constexpr int64_t kScoresRow = kKeys + (Math::kTiled ? 16 : 0);

// Words of depth that a product takes at a time, and rows that it writes together.
template <class Math>
constexpr int64_t kUnit = Math::kTiled ? 16 : 1;

// Numbers of a value, whole vectors of them.
inline int64_t padded_dim(const Attention& a) { return ceil_div(a.dim, W) * W; }

// Sizes of an attention's scratch, in words.
template <class Math>
struct Shape {
  explicit Shape(const Attention& a)
      : group(a.q_heads / a.kv_heads),
        rows(a.tile_rows * group),
        dim(a.dim),
        depth(up_to(ceil_div(a.dim, Math::kPack), kUnit<Math>)),
        width(padded_dim(a)) {}
  int64_t group;  // query heads a KV head
  int64_t rows;   // of a tile: rows times grouped heads
  int64_t dim;
  int64_t depth;  // words of a query
  int64_t width;  // of a value
};

// The block's keys in the pool: element offsets, and factors of fp8 keys and values. Of pages in panels: the offsets of the head's panels.
struct Located {
  int64_t keys;
  int64_t key_at[kKeys], value_at[kKeys];
  float key_factor[kKeys], value_factor[kKeys];
};

inline void locate(const Attention& a, const int32_t* pages, int64_t head, int64_t begin, int64_t end, Located& found) {
  int64_t page = begin / a.page_size, token = begin % a.page_size;
  found.keys = end - begin;
  if (a.in_panels) {  // `begin` is a multiple of 64, and a page begins there
    for (int64_t i = 0; i * a.page_size < found.keys; ++i, ++page) {
      found.key_at[i] = pages[page] * a.k_layout.page + head * a.k_layout.head;
      found.value_at[i] = pages[page] * a.v_layout.page + head * a.v_layout.head;
    }
    return;
  }
  for (int64_t i = 0; i < found.keys; ++page, token = 0) {
    const int64_t number = pages[page], run = smaller(a.page_size - token, found.keys - i);
    const int64_t key = number * a.k_layout.page + head * a.k_layout.head + token * a.k_layout.token;
    const int64_t value = number * a.v_layout.page + head * a.v_layout.head + token * a.v_layout.token;
    for (int64_t j = 0; j < run; ++j) {
      found.key_at[i + j] = key + j * a.k_layout.token;
      found.value_at[i + j] = value + j * a.v_layout.token;
    }
    if (a.page_dtype == kFp8) {
      const int64_t scale = (number * a.page_size + token) * a.kv_heads + head;
      for (int64_t j = 0; j < run; ++j) {
        found.key_factor[i + j] = a.k_scale[scale + j * a.kv_heads];
        found.value_factor[i + j] = a.v_scale[scale + j * a.kv_heads];
      }
    }
    i += run;
  }
  if (a.page_dtype == kFp8) {
    for (int64_t i = found.keys; i < kKeys; ++i) found.key_factor[i] = found.value_factor[i] = 1.0f;
  }
}

// Fetches a block's keys and then its values into the second cache, some lines at a time; or one of `every` lines: a processor
// follows by itself where a few lead, and has fewer than all of them on their way (one row over 6000 keys on a Xeon with AMX: 9.3 -> 7.4 ms).
template <class Page>
class Fetch {
 public:
  Fetch() = default;
  Fetch(const Attention& a, const Located& block, int64_t every)
      : pool_(static_cast<const char*>(a.k_pages)),
        values_(static_cast<const char*>(a.v_pages)),
        places_(block.key_at),
        values_at_(block.value_at),
        count_(a.in_panels ? ceil_div(block.keys, a.page_size) : block.keys),
        stride_(every * kLine),
        of_place_(ceil_div(a.dim * (a.in_panels ? a.page_size : 1) * static_cast<int64_t>(sizeof(Page)), stride_)) {
    to_place();
  }

  int64_t lines() const { return 2 * count_ * of_place_; }

  void next(int64_t lines) {
    while (left_ > 0) {
      const int64_t now = smaller(lines, left_);
      for (int64_t i = 0; i < now; ++i, at_ += stride_) __builtin_prefetch(at_, 0, 2);
      left_ -= now;
      lines -= now;
      if (left_ > 0) return;
      ++place_;
      to_place();
    }
  }

 private:
  void to_place() {
    if (place_ == count_ && values_ != nullptr) {
      pool_ = values_;
      places_ = values_at_;
      values_ = nullptr;
      place_ = 0;
    }
    if (place_ == count_) return;
    at_ = pool_ + places_[place_] * static_cast<int64_t>(sizeof(Page));
    left_ = of_place_;
  }

  const char *pool_ = nullptr, *values_ = nullptr;  // values_: null when it is their turn
  const int64_t *places_ = nullptr, *values_at_ = nullptr;
  int64_t count_ = 0, stride_ = kLine, of_place_ = 0;
  int64_t place_ = 0, left_ = 0;  // where it is, and how many lines of that are left
  const char* at_ = nullptr;
};

// Keys, transposed: panels [depth, kPanel] of words, zeros behind the last key up to a whole vector. `pause` is called after every 16 keys.
template <class Math, class Page, class Pause>
void pack_keys(const Attention& a, const Located& at, int64_t depth, float* out, Pause&& pause) {
  const Page* pool = static_cast<const Page*>(a.k_pages);
  const int64_t whole = a.dim / (W * Math::kPack) * W;  // words that need no mask
  for (int64_t key = 0; key < at.keys; key += W) {
    float* panel = out + key / kPanel * kPanel * depth + key % kPanel;
    const int64_t* from = at.key_at + key;
    const bool all = key + W <= at.keys;
    for (int64_t word = 0; word < depth; word += W) {
      const int64_t number = word * Math::kPack;
      Vec x[W];
      if (all && word < whole) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = Math::words(pool + from[i] + number, int64_t{W} * Math::kPack);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = key + i < at.keys ? Math::words(pool + from[i] + number, a.dim - number) : zero();
      }
      transpose(x);
      const int64_t words = smaller(W, depth - word);
      if (words == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(panel + (word + i) * kPanel, x[i]);
      } else {
        for (int64_t i = 0; i < words; ++i) store(panel + (word + i) * kPanel, x[i]);
      }
    }
    pause();
  }
}

// Values: [keys / kPack, width] words, zeros up to a whole step of the product.
template <class Math, class Page, class Pause>
void pack_values(const Attention& a, const Located& at, int64_t width, float* out, Pause&& pause) {
  const Page* pool = static_cast<const Page*>(a.v_pages);
  for (int64_t key = 0; key < at.keys; key += Math::kPack) {
    const Page* rows[2] = {pool + at.value_at[key], key + 1 < at.keys ? pool + at.value_at[key + 1] : nullptr};
    Math::interleave(rows, a.dim, out + key / Math::kPack * width);
    if (key % W == 0) pause();
  }
  for (int64_t i = ceil_div(at.keys, Math::kPack) * width; i % (kUnit<Math> * width) != 0; i += W) store(out + i, zero());
}

// Keys as B of the first product: where their vectors lie, packed or in the pool.
template <class Math>
inline Right point_at_keys(const Attention& a, const Located& at, int64_t depth, const float* keys, const float** vecs) {
  const int64_t count = ceil_div(at.keys, W);
  if (!a.in_panels) {
    for (int64_t i = 0; i < count; ++i) vecs[i] = keys + i / kBlockVecs * kPanel * depth + i % kBlockVecs * W;
    return {vecs, count, depth, kPanel};
  }
  const float* pool = static_cast<const float*>(a.k_pages);
  for (int64_t i = 0; i < count; ++i) {
    vecs[i] = pool + at.key_at[i * W / a.page_size] / Math::kPack + i * W % a.page_size;
  }
  return {vecs, count, depth, a.page_size};
}

// Values as B of the second one.
template <class Math>
inline Right point_at_values(const Attention& a, const Located& at, int64_t width, float* values, const float** vecs) {
  const int64_t count = width / W;
  const auto point = [&](int64_t chunk, const float* from) {
    for (int64_t i = 0; i < count; ++i) vecs[chunk * count + i] = from + i * W;
  };
  if (!a.in_panels) {
    point(0, values);
    return {vecs, count, kKeys / Math::kPack, width};
  }
  const int64_t chunks = ceil_div(at.keys, a.page_size), rows = a.page_size / Math::kPack;
  const float* pool = static_cast<const float*>(a.v_pages);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) point(chunk, pool + at.value_at[chunk] / Math::kPack);
  if (at.keys % (Math::kPack * kUnit<Math>) != 0) {  // nobody may have written the rest of the last step: it can be NaN
    const int64_t keys = at.keys % a.page_size, whole = keys / Math::kPack * width;
    const float* from = vecs[(chunks - 1) * count];
    __builtin_memcpy(values, from, whole * sizeof(float));
    int64_t i = whole;
    if (keys % Math::kPack != 0) {
      for (; i < whole + width; i += W) store(values + i, Math::first_number(load(from + i)));
    }
    for (; i % (kUnit<Math> * width) != 0; i += W) store(values + i, zero());
    point(chunks - 1, values);
  }
  return {vecs, count, rows, width};
}

// A row's keys in a block: it sees [begin, end).
struct Seen {
  int64_t begin, end;
};

// How scores become exponents of base 2: outer * score, or with a softcap outer * tanh(inner * score).
struct Scaling {
  float inner, outer;
  bool capped, factors;
};

// What a row has come to: the largest exponent and the sum of the weights.
struct Sum {
  float top, total;
};

// The largest exponent as what others are relative to: 2^(-inf - 0) = 0, where 2^(-inf - -inf) would be NaN.
inline Vec or_zero(Vec top) { return select(equal(top, minus_infinity()), zero(), top); }

// What a step of the softmax passes over of a row's scores: whole steps from the first key that it sees to the last.
template <class Math>
struct Passed {
  static constexpr int64_t kStep = int64_t{W} * Math::kPack;
  explicit Passed(const Seen& seen)
      : seen(seen),
        begin(seen.begin / kStep * kStep),
        end(seen.begin < seen.end ? ceil_div(seen.end, kStep) * kStep : begin) {}
  // Applied after the arithmetic: a row is rounded alike whatever it sees. Masks are made for the vectors alone that the row sees in part: on a
  // prefill's diagonal no row is whole steps long (0.97 of its attention's time, 2048 tokens).
  template <bool whole>
  Vec or_else(int64_t i, Vec x, Vec masked) const {
    if (whole || (seen.begin <= i && i + W <= seen.end)) return x;
    return select(outside(first(seen.end - i), first(seen.begin - i)), x, masked);
  }
  // Calls `f` with a type that says whether the row sees all that is passed over: most rows do.
  template <class F>
  void in_whole_or_part(F&& f) const {
    seen.begin == begin && seen.end == end ? f(Number<1>{}) : f(Number<0>{});
  }
  const Seen& seen;
  int64_t begin, end;
};

// A row's largest exponents, one of each lane. Scores get their factors and softcap.
template <class Math>
inline Vec top_exponents(float* scores, const Passed<Math>& keys, const Scaling& how, const Located& at) {
  if (how.factors || how.capped) {
    for (int64_t i = keys.begin; i < keys.end; i += W) {
      Vec x = load(scores + i);
      if (how.factors) x = x * load(at.key_factor + i);
      if (how.capped) x = tanh(x * splat(how.inner));
      store(scores + i, x);
    }
  }
  const Vec outer = splat(how.outer);
  Vec most = minus_infinity();
  keys.in_whole_or_part([&](auto whole) {
    for (int64_t i = keys.begin; i < keys.end; i += W) {  // `most` where a score is NaN: the sum will tell
      most = max(keys.template or_else<whole.value>(i, load(scores + i) * outer, minus_infinity()), most);
    }
  });
  return most;
}

// A row's weights 2^(exponent - base) in place of its scores; zeros up to `last` where it sees no keys. Returns their sums, one of each lane.
template <class Math>
inline Vec weigh_row(float* scores, const Passed<Math>& keys, int64_t last, float base, const Scaling& how, const Located& at) {
  float* weights = scores;  // a word holds kPack of them: none is written before its scores are read
  const auto clear = [&](int64_t from, int64_t to) {
    for (int64_t i = from / Math::kPack; i < to / Math::kPack; i += W) store(weights + i, zero());
  };
  clear(0, keys.begin);
  const Vec outer = splat(how.outer), less_base = splat(-base);
  Vec part[2] = {zero(), zero()};
  keys.in_whole_or_part([&](auto whole) {
    for (int64_t i = keys.begin; i < keys.end; i += keys.kStep) {
      Vec weight[Math::kPack];
#pragma GCC unroll 2
      for (int j = 0; j < Math::kPack; ++j) {
        weight[j] = keys.template or_else<whole.value>(i + j * W, Math::exp2(fma(load(scores + i + j * W), outer, less_base)), zero());
        part[j] = part[j] + weight[j];
        if (how.factors) weight[j] = weight[j] * load(at.value_factor + i + j * W);
      }
      Math::store_words(weights + i / Math::kPack, weight);
    }
  });
  clear(keys.end, last);
  return part[0] + part[1];
}

// Weighs the scores of a strip's rows, and sets `shrink` to what everything before is to be multiplied by. `keys` of the block's kKeys have
// scores. All rows' lanes are taken together at once: one row after the other, their chains of shuffles would be waited for.
template <class Math, class Meanwhile>
inline void weigh(float* scores, const Seen* seen, int64_t rows, int64_t keys, const Scaling& how, const Located& at, Sum* sums, float* shrink,
                  Meanwhile&& meanwhile) {
  constexpr int64_t step = Passed<Math>::kStep;
  const int64_t last = ceil_div(keys, step) * step;
  constexpr int64_t all = kLanes<Math>;
  alignas(64) float lanes[all * W], top[all], total[all], base[all];
  for (int64_t i = 0; i < rows; ++i) {
    top[i] = sums[i].top;
    total[i] = sums[i].total;
    store(lanes + i * W, top_exponents(scores + i * kScoresRow<Math>, Passed<Math>(seen[i]), how, at));
    meanwhile();
  }
  for (int64_t i = rows; i < up_to(rows, W); ++i) {
    top[i] = total[i] = 0.0f;
    store(lanes + i * W, zero());
  }
  for (int64_t i = 0; i < rows; i += W) {
    const Vec before = load(top + i), now = max(across<max>(lanes + i * W), before);
    const Vec from = or_zero(now);
    store(top + i, now);
    store(base + i, from);
    store(shrink + i, exp2(before - from));
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Passed<Math> passed(seen[i]);
    store(lanes + i * W, weigh_row(scores + i * kScoresRow<Math>, passed, last, base[i], how, at));
    meanwhile();
  }
  for (int64_t i = 0; i < rows; i += W) store(total + i, fma(load(total + i), load(shrink + i), across<add>(lanes + i * W)));
  for (int64_t i = 0; i < rows; ++i) sums[i] = {top[i], total[i]};
}

}  // namespace whispers::WHISPERS_ISA
