// The table of operations that each instruction set fills in. An operation's entry holds the team already, is not reentrant, and runs to
// its end: `whispers_*` in api.cpp are what others call.
#pragma once

#include "args.h"
#include "team.h"

namespace whispers {

struct Kernels {
  const char* name;
  void (*silu_mul)(const SiluMul&, Team&);
};

#if defined(WHISPERS_X86)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif

}  // namespace whispers
