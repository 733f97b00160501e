// committee_attention: work items of one KV head, a tile of rows and key ranges, then a merge of what they leave.
//
// All rows of a tile times the query heads of their group are one matrix, so that a shared key is fetched once for all experts that see it.
// Ranges of keys and the order of merging come from the schedule and depend on key positions alone; a row is summed in the same order in
// every tile and in both ways of merging, so its bits do not depend on its neighbours.
#pragma once

#include "attention_tile.h"
#include "lines_ahead.h"
#include "share.h"

namespace whispers::WHISPERS_ISA {

// A thread's memory: cut off piece by piece, each on a line of its own. Without memory it counts what is needed.
class Pieces {
 public:
  explicit Pieces(void* memory) : at_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t number) {
    T* piece = reinterpret_cast<T*>(at_ + used_);
    used_ += ceil_div(number * static_cast<int64_t>(sizeof(T)), kLine) * kLine;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* at_;
  int64_t used_ = 0;
};

template <class Math>
struct Workspace {
  Workspace(const Shape<Math>& s, void* memory) {
    Pieces pieces(memory);
    const int64_t rows = up_to(s.rows, kUnit<Math>);  // whole tiles of them
    queries = pieces.take<float>(rows * s.depth);
    keys = pieces.take<float>(ceil_div(kKeys, kPanel) * kPanel * s.depth);
    values = pieces.take<float>(kKeys / Math::kPack * s.width);
    key_vecs = pieces.take<const float*>(kKeys / W);
    value_vecs = pieces.take<const float*>(kKeys / kLeastPage * (s.width / W));
    scores = pieces.take<float>(kStrip<Math> * kScoresRow<Math>);
    shrink = pieces.take<float>(kLanes<Math>);
    acc = pieces.take<float>(rows * s.width);
    all_acc = pieces.take<float>(s.rows * s.width);
    sums = pieces.take<Sum>(s.rows);
    all_sums = pieces.take<Sum>(s.rows);
    seen = pieces.take<Seen>(s.rows);
    at = pieces.take<Located>(1);
    ahead = pieces.take<Located>(1);
    bytes = pieces.used();
  }
  float *queries, *keys, *values, *scores, *shrink, *acc, *all_acc;
  const float **key_vecs, **value_vecs;
  Sum *sums, *all_sums;
  Seen* seen;
  Located *at, *ahead;  // this block, and the one to come
  int64_t bytes;
};

constexpr Sum kNothing = {-__builtin_inff(), 0.0f};
inline bool is_nothing(const Sum& sum) { return sum.top == -__builtin_inff() && sum.total == 0.0f; }

// Merges partial results, [lines, width] and a sum each, into those before them; one that saw nothing changes nothing. Factors are made for W
// lines at a time: one after the other, their exponentials would be waited for.
inline void fold(float* all_acc, Sum* all, const float* acc, const Sum* sums, int64_t lines, int64_t width) {
  for (int64_t begin = 0; begin < lines; begin += W) {
    const int64_t count = smaller(W, lines - begin);
    alignas(64) float top[W] = {}, total[W] = {}, all_top[W] = {}, all_total[W] = {}, left[W], right[W];
    for (int64_t i = 0; i < count; ++i) {
      top[i] = sums[begin + i].top;
      total[i] = sums[begin + i].total;
      all_top[i] = all[begin + i].top;
      all_total[i] = all[begin + i].total;
    }
    const Vec most = max(load(top), load(all_top)), base = or_zero(most);
    const Vec of_all = exp2(load(all_top) - base), of_this = exp2(load(top) - base);
    store(left, of_all);
    store(right, of_this);
    store(all_top, most);
    store(all_total, fma(load(total), of_this, load(all_total) * of_all));
    for (int64_t i = 0; i < count; ++i) {
      all[begin + i] = {all_top[i], all_total[i]};
      if (is_nothing(sums[begin + i])) continue;  // its numbers may never have been written
      const Vec l = splat(left[i]), r = splat(right[i]);
      float* to = all_acc + (begin + i) * width;
      const float* from = acc + (begin + i) * width;
      for (int64_t at = 0; at < width; at += W) store(to + at, fma(load(from + at), r, load(to + at) * l));
    }
  }
}

// The result of a row and head: zeros where it sees nothing, NaN where it sees what is not finite; and its log-sum-exp.
template <class T>
inline void finish(const float* acc, const Sum& sum, T* out, float* lse, int64_t dim) {
  const Vec divisor = splat(sum.total == 0.0f ? 1.0f : sum.total);
  for (int64_t at = 0; at < dim; at += W) {
    const Vec x = load(acc + at, dim - at) / divisor;
    const Mask finite = less(magnitude(x), splat(__builtin_inff()));
    store(out + at, select(finite, x, splat(__builtin_nanf(""))), dim - at);
  }
  if (lse != nullptr) *lse = (sum.top + __builtin_log2f(sum.total)) * 0.6931471805599453f;
}

// Where items make their partial results, in the team's memory: a tile's lines lie behind each other, as in its own `acc`.
struct Partials {
  float* acc;  // [kv_heads, slots, group, width]
  Sum* sums;   // [kv_heads, slots, group]
};
inline int64_t partials_bytes(const Attention& a) { return a.slots * a.q_heads * (padded_dim(a) + 2) * static_cast<int64_t>(sizeof(float)); }
inline Partials partials_in(const Attention& a, void* memory) {
  float* acc = static_cast<float*>(memory);
  return {acc, reinterpret_cast<Sum*>(acc + a.slots * a.q_heads * padded_dim(a))};
}

// One item and KV head. T is q's type, Page the pool's. `next`: the item (and KV head) that this thread does next, or null.
template <class Math, class T, class Page>
class Item {
 public:
  Item(const Attention& a, const Shape<Math>& shape, const Workspace<Math>& w, const int32_t* item, int64_t head, const int32_t* next,
       int64_t next_head)
      : a_(a), s_(shape), w_(w), head_(head), row_begin_(item[0]), rows_(item[1] - item[0]), tall_(rows_ * shape.group),
        last_part_(item[3] - 1), next_(next), next_head_(next_head) {
    const bool capped = a.softcap > 0, factors = a.page_dtype == kFp8;
    constexpr double log2e = 1.4426950408889634;
    how_ = {static_cast<float>(a.scale / (capped ? a.softcap : 1.0)), static_cast<float>((capped ? a.softcap : a.scale) * log2e), capped,
            factors};
    each([&](int64_t i, int64_t row, int64_t head) {
      const T* q = static_cast<const T*>(a.q) + row * a.q_row + head * a.q_head;
      for (int64_t at = 0; at < s_.depth; at += W) {
        const int64_t number = at * Math::kPack;
        store(w_.queries + i * s_.depth + at, Math::words(q + number, a.dim - number), s_.depth - at);
      }
    });
  }

  void run(const int32_t* item, const Partials& partials) {
    if (item[5] == 0) {
      const int64_t line = (head_ * a_.slots + item[4]) * s_.group;
      float* acc = partials.acc + line * s_.width;
      const bool in_place = tall_ < kUnit<Math> || tall_ % kUnit<Math> == 0;  // else products write lines behind them, others' lines
      if (in_place) w_.acc = acc;
      w_.sums = partials.sums + line;
      attend(item[2]);
      if (!in_place) __builtin_memcpy(acc, w_.acc, tall_ * s_.width * sizeof(float));
      return;
    }
    __builtin_memset(w_.all_acc, 0, tall_ * s_.width * sizeof(float));
    for (int64_t i = 0; i < tall_; ++i) w_.all_sums[i] = kNothing;
    for (int64_t part = item[2]; part < item[3]; ++part) {
      attend(part);
      fold(w_.all_acc, w_.all_sums, w_.acc, w_.sums, tall_, s_.width);
    }
    each([&](int64_t i, int64_t row, int64_t head) {
      const int64_t index = row * a_.q_heads + head;
      finish(w_.all_acc + i * s_.width, w_.all_sums[i], static_cast<T*>(a_.out) + index * a_.dim, a_.lse == nullptr ? nullptr : a_.lse + index,
             a_.dim);
    });
  }

 private:
  // The tile's lines: i = 0, 1, ... are the grouped heads of the first row, then those of the next.
  template <class F>
  void each(F&& f) const {
    int64_t i = 0;
    for (int64_t row = row_begin_; row < row_begin_ + rows_; ++row) {
      for (int64_t head = head_ * s_.group; head < (head_ + 1) * s_.group; ++head) f(i++, row, head);
    }
  }

  // The tile over one part's keys: weighted values in `acc` of rows that saw any, and `sums`.
  void attend(int64_t number) {
    const int32_t* part = a_.parts + 3 * number;
    const int64_t segment = part[0], first_key = a_.key_begin[segment];
    for (int64_t i = 0; i < tall_; ++i) w_.sums[i] = kNothing;
    int64_t least = a_.position[row_begin_], most = least;
    for (int64_t row = row_begin_; row < row_begin_ + rows_; ++row) {
      least = smaller(least, a_.position[row]);
      most = larger(most, a_.position[row]);
    }
    int64_t begin = part[1];
    const int64_t end = smaller(smaller(part[2], a_.length[segment]), most - first_key + 1);  // no row sees the keys after it
    if (a_.window > 0) {  // nor the blocks before this one
      const int64_t skipped = smaller(least - a_.window + 1 - first_key, end) - begin;
      if (skipped > 0) begin += skipped / kKeys * kKeys;
    }
    const int32_t* pages = a_.pages + a_.page_ptr[segment];
    if (begin < end) locate(a_, pages, head_, begin, smaller(begin + kKeys, end), *w_.ahead);
    for (int64_t key = begin; key < end; key += kKeys) {
      Located* here = w_.ahead;
      w_.ahead = w_.at;
      w_.at = here;
      if (key + kKeys < end) {
        locate(a_, pages, head_, key + kKeys, smaller(key + 2 * kKeys, end), *w_.ahead);
      } else {
        locate_next(number);
      }
      fetch_ = Fetch<Page>(a_, *w_.ahead, Math::kTiled && tall_ < kUnit<Math> ? 8 : 1);
      block(first_key, key, smaller(key + kKeys, end));
    }
  }

  // The first block of the part, or of the item, that comes after this part.
  void locate_next(int64_t number) {
    w_.ahead->keys = 0;
    const bool here = number < last_part_;
    if (!here && next_ == nullptr) return;
    const int32_t* part = a_.parts + 3 * (here ? number + 1 : next_[2]);
    const int64_t end = smaller(smaller(part[2], a_.length[part[0]]), part[1] + kKeys);
    if (part[1] < end) locate(a_, a_.pages + a_.page_ptr[part[0]], here ? head_ : next_head_, part[1], end, *w_.ahead);
  }

  // Keys [begin, end) of a segment, at most kKeys.
  void block(int64_t first_key, int64_t begin, int64_t end) {
    const int64_t keys = end - begin;
    bool any = false;
    Seen* of_row = w_.seen;
    for (int64_t row = row_begin_; row < row_begin_ + rows_; ++row) {
      const int64_t last = a_.position[row] - first_key - begin;  // the last key it may see
      const int64_t from = a_.window > 0 ? larger(last - a_.window + 1, 0) : 0, to = smaller(last + 1, keys);
      const Seen seen = from < to ? Seen{from, to} : Seen{0, 0};
      any = any || from < to;
      for (int64_t j = 0; j < s_.group; ++j) *of_row++ = seen;
    }
    if (!any) return;
    // The block to come is fetched at every step of the products, as evenly as can be: a core has some 20 lines on their way, and who asks for
    // more waits. (8 rows over 2048 keys, 30 layers on Zen 4: 4.3 ms; 0.3 ms more with bursts between the products, 1.3 without any, and 0.3
    // less with everything in the cache.) Packing takes about as long as few rows' products: it asks for what those leave over.
    // Tiles multiply in a third of the time that the weighing takes, and wait for lines of this block: who multiplies in them asks while weighing, too.
    const int64_t steps = steps_of_product<Math>(tall_, ceil_div(keys, W), s_.depth) +
                          steps_of_product<Math>(tall_, s_.width / W, ceil_div(keys, Math::kPack)) + (Math::kTiled ? 2 * tall_ : 0);
    const int64_t rest = a_.in_panels ? 0 : larger(fetch_.lines() - steps, 0), pace = ceil_div(rest, 2 * ceil_div(keys, W));
    lines_a_step_ = ceil_div(fetch_.lines() - rest, steps);
    const auto pause = [&] { fetch_.next(pace); };
    if (!a_.in_panels) {
      pack_keys<Math, Page>(a_, *w_.at, s_.depth, w_.keys, pause);
      pack_values<Math, Page>(a_, *w_.at, s_.width, w_.values, pause);
    }
    keys_ = point_at_keys<Math>(a_, *w_.at, s_.depth, w_.keys, w_.key_vecs);
    values_ = point_at_values<Math>(a_, *w_.at, s_.width, w_.values, w_.value_vecs);
    for (int64_t row = 0; row < tall_; row += kStrip<Math>) strip(row, smaller(row + kStrip<Math>, tall_));
  }

  void strip(int64_t begin, int64_t end) {
    constexpr int64_t unit = kUnit<Math>;  // a product writes whole tiles of rows
    const auto blind = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        if (w_.seen[i].end != 0) return false;
      }
      return true;
    };
    while (begin < end && blind(begin, smaller(begin + unit, end))) begin += unit;  // rows before these keys
    while (begin < end && blind((end - 1) / unit * unit, end)) end = (end - 1) / unit * unit;
    if (begin >= end) return;
    int64_t keys = 0;  // up to the last that any of them sees: on a prefill's diagonal that is half a block
    for (int64_t i = begin; i < end; ++i) keys = larger(keys, w_.seen[i].end);
    const auto fetch = [&] { fetch_.next(lines_a_step_); };
    const auto weighing = [&] {
      if (Math::kTiled) fetch();
    };
    multiply<Math, false>(end - begin, ceil_div(keys, W), w_.queries + begin * s_.depth, s_.depth, keys_, w_.scores, kScoresRow<Math>, s_.depth,
                          w_.shrink, fetch);
    bool all_fresh = true;  // fresh: a row whose `acc` holds nothing yet, not even zeros
    for (int64_t i = begin; i < end; ++i) all_fresh = all_fresh && is_nothing(w_.sums[i]);
    for (int64_t i = begin; !all_fresh && i < end; ++i) {
      if (is_nothing(w_.sums[i])) __builtin_memset(w_.acc + i * s_.width, 0, s_.width * sizeof(float));
    }
    weigh<Math>(w_.scores, w_.seen + begin, end - begin, keys, how_, *w_.at, w_.sums + begin, w_.shrink, weighing);
    const auto add_values = all_fresh ? multiply<Math, false, decltype(fetch)> : multiply<Math, true, decltype(fetch)>;
    add_values(end - begin, s_.width / W, w_.scores, kScoresRow<Math>, values_, w_.acc + begin * s_.width, s_.width, ceil_div(keys, Math::kPack),
               w_.shrink, fetch);
  }

  const Attention& a_;
  const Shape<Math>& s_;
  Workspace<Math> w_;
  const int64_t head_, row_begin_, rows_, tall_;
  const int64_t last_part_;
  const int32_t* next_;
  const int64_t next_head_;
  Fetch<Page> fetch_;    // of the block to come
  int64_t lines_a_step_ = 0;
  Right keys_, values_;  // of this one
  Scaling how_;
};

// One line's partial results, as many as a vector has lanes, merged one after the other as `fold` does, bit for bit, but for all of their factors
// being made at once.
class Merging {
 public:
  // `acc`: where the line comes to lie, [width].
  Merging(float* acc, int64_t width) : acc_(acc), width_(width) { __builtin_memset(acc, 0, width * sizeof(float)); }
  void add(const float* acc, const Sum& sum) {
    if (is_nothing(sum)) return;
    before_[count_] = all_.top;
    if (sum.top > all_.top) all_.top = sum.top;
    after_[count_] = all_.top;
    parts_[count_] = acc, top_[count_] = sum.top, total_[count_] = sum.total;
    if (++count_ == W) merge();
  }
  // The rest of them.
  Sum end() {
    merge();
    return all_;
  }

 private:
  void merge() {
    const Vec base = or_zero(load(after_));
    store(before_, exp2(load(before_) - base));
    store(top_, exp2(load(top_) - base));
    for (int64_t i = 0; i < count_; ++i) all_.total = __builtin_fmaf(total_[i], top_[i], all_.total * before_[i]);
    for (int64_t at = 0; at < width_; at += W) {
      Vec sum = load(acc_ + at);
      for (int64_t i = 0; i < count_; ++i) sum = fma(load(parts_[i] + at), splat(top_[i]), sum * splat(before_[i]));
      store(acc_ + at, sum);
    }
    count_ = 0;
  }

  float* acc_;
  int64_t width_, count_ = 0;
  Sum all_ = kNothing;
  const float* parts_[W];
  // Largest exponents: a part's own, of all before it, of all with it. `merge` makes the first two factors, of the part and of what was there.
  alignas(64) float top_[W] = {}, before_[W] = {}, after_[W] = {};
  float total_[W];
};

template <class T>
void merge_rows(const Attention& a, const Partials& partials, const Crew& crew) {
  const int64_t group = a.q_heads / a.kv_heads, width = padded_dim(a);
  const Share share = share_of(a.header[1] * a.kv_heads, crew);
  Pieces pieces(crew.own());
  float* acc = pieces.take<float>(width);
  for (int64_t task = share.begin; task < share.end; ++task) {
    const int64_t index = task / a.kv_heads, kv_head = task % a.kv_heads;
    for (int64_t i = 0; i < group; ++i) {
      Merging merging(acc, width);
      for (int64_t at = a.merge_ptr[index]; at < a.merge_ptr[index + 1]; ++at) {
        const int64_t line = (kv_head * a.slots + a.merge_slots[at]) * group + i;
        merging.add(partials.acc + line * width, partials.sums[line]);
      }
      const int64_t to = a.merge_rows[index] * a.q_heads + kv_head * group + i;
      finish(acc, merging.end(), static_cast<T*>(a.out) + to * a.dim, a.lse == nullptr ? nullptr : a.lse + to, a.dim);
    }
  }
}

// `fetched`: of so many tasks, the first, the thread that does them has fetched the keys: every `threads`th is its own.
template <class Math, class T, class Page>
void attend_items(const Attention& a, const Crew& crew, int64_t fetched) {
#if WHISPERS_LEVEL >= 3
  Tiles tiles;
#endif
  const Shape<Math> shape(a);
  const Workspace<Math> workspace(shape, crew.own());
  const Partials partials = partials_in(a, crew.shared());
  const int64_t tasks = a.header[0] * a.kv_heads;
  int64_t own = crew.thread;
  const auto take = [&] {
    if (own >= fetched) return fetched + crew.take();
    own += crew.threads;
    return own - crew.threads;
  };
  // The next task is taken before this one is begun: its keys are fetched meanwhile, by who will want them.
  for (int64_t task = take(), later; task < tasks; task = later) {
    later = take();
    const bool fetches = fetched <= later && later < tasks;
    const int32_t *item = a.items + 6 * (task / a.kv_heads), *next = fetches ? a.items + 6 * (later / a.kv_heads) : nullptr;
#if WHISPERS_LEVEL >= 3
    tiles.set((item[1] - item[0]) * shape.group);
#endif
    Item<Math, T, Page>(a, shape, workspace, item, task % a.kv_heads, next, later % a.kv_heads).run(item, partials);
  }
  if (a.header[1] == 0) return;
  crew.barrier();
  merge_rows<T>(a, partials, crew);
}

// Whether bf16 meets bf16 (or fp8, which fits it) in the instruction for that.
inline bool in_pairs(const Attention& a) {
  return WHISPERS_LEVEL >= 2 && a.dtype == kBf16 && (a.page_dtype == kBf16 || a.page_dtype == kFp8);
}

inline int64_t attention_scratch(const Attention& a) {  // bytes of each thread; `partials_bytes`: of all together
#if WHISPERS_LEVEL >= 2
  if (in_pairs(a)) return Workspace<Pairs>(Shape<Pairs>(a), nullptr).bytes;
#endif
  return Workspace<Floats>(Shape<Floats>(a), nullptr).bytes;
}

// How many tasks, the first ones, have keys that are worth fetching before the attention begins: where tiles are multiplied, those of so few rows
// that their products wait for memory. What this thread reads for its part of them is added to `lines`.
inline int64_t add_keys(const Attention& a, const Crew& crew, LinesAhead& lines) {
  int64_t task = 0;
#if WHISPERS_LEVEL >= 3
  constexpr int64_t kMostBytes = 1 << 20;  // of each thread: half of the second cache of a processor with AMX
  if (!in_pairs(a) || !a.in_panels) return 0;
  const int64_t of_page = a.dim * a.page_size * static_cast<int64_t>(sizeof(Bf16));
  int64_t places = 0;  // of all threads together, since each must come to the same number of tasks
  for (; task < a.header[0] * a.kv_heads; ++task) {
    const int32_t *item = a.items + 6 * (task / a.kv_heads), *part = a.parts + 3 * item[2];
    const int64_t begin = part[1] / a.page_size, keys_end = smaller(part[2], a.length[part[0]]);  // a part may be room for keys to come
    const int64_t end = larger(ceil_div(keys_end, a.page_size), begin);
    places += 2 * (end - begin);
    if (item[5] != 0 || (item[1] - item[0]) * (a.q_heads / a.kv_heads) > kTile) break;
    if (places > LinesAhead::kMost || places * of_page > kMostBytes * crew.threads) break;
    if (task % crew.threads != crew.thread) continue;
    const int32_t* pages = a.pages + a.page_ptr[part[0]];
    const int64_t head = task % a.kv_heads;
    for (int64_t i = begin; i < end; ++i) {
      lines.add(static_cast<const Bf16*>(a.k_pages) + pages[i] * a.k_layout.page + head * a.k_layout.head, of_page);
      lines.add(static_cast<const Bf16*>(a.v_pages) + pages[i] * a.v_layout.page + head * a.v_layout.head, of_page);
    }
  }
#endif
  return task;
}

// `fetched`: as `add_keys` returns it, once what it adds has been fetched; else 0.
inline void committee_attention(const Attention& a, const Crew& crew, int64_t fetched) {
#if WHISPERS_LEVEL >= 2
  if (in_pairs(a)) {
    return a.page_dtype == kFp8 ? attend_items<Pairs, Bf16, Fp8>(a, crew, fetched) : attend_items<Pairs, Bf16, Bf16>(a, crew, fetched);
  }
#endif
  with_dtype(a.dtype, [&](auto kind) {
    with_page_dtype(a.page_dtype, [&](auto page_kind) { attend_items<Floats, decltype(kind), decltype(page_kind)>(a, crew, fetched); });
  });
}
inline void committee_attention(const Attention& a, const Crew& crew) { committee_attention(a, crew, 0); }

}  // namespace whispers::WHISPERS_ISA
