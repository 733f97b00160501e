// The table of operations that each instruction set fills in. Whoever calls an operation's entry holds the team; it
// runs to its end. `whispers_*` in api.cpp are what others call.
#pragma once

#include "args.h"
#include "forward_args.h"
#include "linear_args.h"
#include "team.h"

namespace whispers {

struct Kernels {
  const char* name;
  // False: no memory for scratch.
  bool (*committee_attention)(const Attention&, Team&);
  bool (*embed_rows)(const EmbedRows&, Team&);
  bool (*rms_norm)(const RmsNorm&, Team&);
  bool (*rope_and_store)(const RopeAndStore&, Team&);
  bool (*silu_mul)(const SiluMul&, Team&);
  bool (*pool_logits)(const PoolLogits&, Team&);
  bool (*likeliest)(const Likeliest&, Team&);
  bool (*linear)(const Linear&, Team&);
  bool (*shorten)(const Shorten&, Team&);
  bool (*fit_grid)(const FitGrid&, Team&);
  bool (*unpack_rows)(const UnpackRows&, Team&);
  bool (*forward)(const Forward&, Team&);
};

#if defined(WHISPERS_X86)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmx;
#endif

}  // namespace whispers
