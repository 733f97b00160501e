// The operations for amx. Everything of the standard library comes before the instruction set is raised, so that none of it is compiled
// with instructions that the linker could spread to machines without them.
#include "isa.h"

#if defined(WHISPERS_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")
#endif

#define WHISPERS_ISA amx
#define WHISPERS_NAME "amx"
#define WHISPERS_LEVEL 3
#define WHISPERS_TABLE kAmx
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
