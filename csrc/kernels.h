// Everything that is compiled once for each instruction set; fills in a `Kernels` table.
#pragma once

#include "attention.h"
#include "embed_rows.h"
#include "forward.h"
#include "isa.h"
#include "likeliest.h"
#include "linear.h"
#include "linear_unpack.h"
#include "pool_logits.h"
#include "rms_norm.h"
#include "rope_and_store.h"
#include "silu_mul.h"

namespace whispers::WHISPERS_ISA {

// Runs an operation's body on the team, or on the caller alone where that takes less than to wake and wait for the others: under about
// 16 thousand numbers.
// `each` and `shared`: bytes of scratch. False where there is no memory for them.
template <class Args, void (*body)(const Args&, const Crew&)>
bool on_team(const Args& args, Team& team, int64_t numbers, int64_t each = 0, int64_t shared = 0) {
  if (!team.reserve(each, shared)) return false;
  team.run([](void* context, const Crew& crew) { body(*static_cast<const Args*>(context), crew); }, const_cast<Args*>(&args),
           numbers < (1 << 14));
  return true;
}

inline bool run_attention(const Attention& a, Team& team) {
  const int64_t tasks = a.header[0] * a.kv_heads;
  return on_team<Attention, committee_attention>(a, team, tasks < 2 ? 0 : 1 << 14, attention_scratch(a), partials_bytes(a));
}
inline bool run_embed_rows(const EmbedRows& a, Team& team) { return on_team<EmbedRows, embed_rows>(a, team, a.rows * a.hidden); }
inline bool run_rms_norm(const RmsNorm& a, Team& team) { return on_team<RmsNorm, rms_norm>(a, team, a.rows * a.width); }
inline bool run_silu_mul(const SiluMul& a, Team& team) { return on_team<SiluMul, silu_mul>(a, team, a.rows * a.width); }
inline bool run_rope_and_store(const RopeAndStore& a, Team& team) {
  return on_team<RopeAndStore, rope_and_store>(a, team, a.rows * (a.q_heads + 2 * a.kv_heads) * a.dim, rope_scratch(a));
}
inline bool run_pool_logits(const PoolLogits& a, Team& team) {
  return on_team<PoolLogits, pool_logits>(a, team, a.rows * a.vocabulary, 0, pool_scratch(a));
}
inline bool run_likeliest(const Likeliest& a, Team& team) {
  return on_team<Likeliest, likeliest>(a, team, a.rows * a.vocabulary, likeliest_own(a), likeliest_scratch(a));
}

inline bool run_linear(const Linear& a, Team& team) {
  return on_team<Linear, linear>(a, team, a.rows * a.weights.outputs * a.weights.depth, linear_scratch(a), rows_bytes(a));
}
inline bool run_shorten(const Shorten& a, Team& team) { return on_team<Shorten, shorten>(a, team, a.outputs * a.depth); }
inline bool run_fit_grid(const FitGrid& a, Team& team) { return on_team<FitGrid, fit_grid>(a, team, a.outputs * a.depth); }
inline bool run_unpack_rows(const UnpackRows& a, Team& team) {
  return on_team<UnpackRows, unpack_rows>(a, team, a.rows * a.weights.depth, unpack_scratch(a));
}
inline bool run_forward(const Forward& a, Team& team) {
  const Scratch most = forward_scratch(a);
  return on_team<Forward, forward>(a, team, 1 << 14, most.each, most.shared);
}

}  // namespace whispers::WHISPERS_ISA

namespace whispers {

const Kernels WHISPERS_TABLE = {
    WHISPERS_NAME,
    WHISPERS_ISA::run_attention,
    WHISPERS_ISA::run_embed_rows,
    WHISPERS_ISA::run_rms_norm,
    WHISPERS_ISA::run_rope_and_store,
    WHISPERS_ISA::run_silu_mul,
    WHISPERS_ISA::run_pool_logits,
    WHISPERS_ISA::run_likeliest,
    WHISPERS_ISA::run_linear,
    WHISPERS_ISA::run_shorten,
    WHISPERS_ISA::run_fit_grid,
    WHISPERS_ISA::run_unpack_rows,
    WHISPERS_ISA::run_forward,
};

}  // namespace whispers
