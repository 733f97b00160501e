// Memory that this thread will want later: fetched into its second cache, some lines at a time, while it computes what leaves the memory idle.
#pragma once

#include "share.h"

namespace whispers::WHISPERS_ISA {

class LinesAhead {
 public:
  static constexpr int64_t kMost = 1024;  // places
  void add(const void* place, int64_t bytes) { places_[count_++] = {static_cast<const char*>(place), bytes}; }
  // From now on fetches all of them, `moved` bytes behind where they were, in so many calls of `some`.
  void begin(int64_t moved, int64_t calls) {
    int64_t lines = 0;
    for (int64_t i = 0; i < count_; ++i) lines += ceil_div(places_[i].bytes, kLine);
    pace_ = ceil_div(lines, larger(calls, 1));
    moved_ = moved;
    next_ = 0;
    to_place();
  }
  void some() {
    for (int64_t lines = 0; lines < pace_ && at_ != end_; ++lines) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ >= end_) to_place();
    }
  }

 private:
  struct Place {
    const char* begin;
    int64_t bytes;
  };
  void to_place() {
    if (next_ == count_) {
      at_ = end_;
      return;
    }
    at_ = places_[next_].begin + moved_;
    end_ = at_ + places_[next_++].bytes;
  }

  Place places_[kMost];
  int64_t count_ = 0, next_ = 0, moved_ = 0, pace_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace whispers::WHISPERS_ISA
