// How work is divided that needs no stealing, and how a dtype known at run time chooses a type.
#pragma once

#include "simd.h"
#include "team.h"

namespace whispers::WHISPERS_ISA {

struct Share {
  int64_t begin, end;
};

// A thread's share of `total`, in whole units: so that two threads write no cache line together.
inline Share share_of(int64_t total, const Crew& crew, int64_t unit = 1) {
  const int64_t units = ceil_div(total, unit), each = units / crew.threads, more = units % crew.threads;
  const int64_t begin = crew.thread * each + smaller(crew.thread, more), end = begin + each + (crew.thread < more ? 1 : 0);
  return {smaller(begin * unit, total), smaller(end * unit, total)};
}

// Calls `f` with a value of the type that a tensor of this dtype has. The Python side has refused all others.
template <class F>
inline void with_dtype(int64_t dtype, F&& f) {
  if (dtype == kF32) {
    f(float{});
  } else if (dtype == kBf16) {
    f(Bf16{});
  } else {
    f(F16{});
  }
}

template <class F>
inline void with_page_dtype(int64_t dtype, F&& f) {
  if (dtype == kFp8) {
    f(Fp8{});
  } else {
    with_dtype(dtype, f);
  }
}

}  // namespace whispers::WHISPERS_ISA
