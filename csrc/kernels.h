// Everything that is compiled once for each instruction set; fills in a `Kernels` table.
#pragma once

#include "silu_mul.h"

namespace whispers::WHISPERS_ISA {

// Runs an operation's body on the team, or on the caller alone where that takes less than to wake and wait for the others: under about
// 16 thousand numbers.
template <class Args, void (*body)(const Args&, const Crew&)>
void on_team(const Args& args, Team& team, int64_t numbers) {
  team.run([](void* context, const Crew& crew) { body(*static_cast<const Args*>(context), crew); }, const_cast<Args*>(&args),
           numbers < (1 << 14));
}

inline void run_silu_mul(const SiluMul& a, Team& team) { on_team<SiluMul, silu_mul>(a, team, a.rows * a.width); }

}  // namespace whispers::WHISPERS_ISA

namespace whispers {

const Kernels WHISPERS_TABLE = {
    WHISPERS_NAME,
    WHISPERS_ISA::run_silu_mul,
};

}  // namespace whispers
