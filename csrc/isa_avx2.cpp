// The operations for avx2. Everything of the standard library comes before the instruction set is raised, so that none of it is compiled
// with instructions that the linker could spread to machines without them.
#include "isa.h"

#if defined(WHISPERS_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define WHISPERS_ISA avx2
#define WHISPERS_NAME "avx2"
#define WHISPERS_LEVEL 0
#define WHISPERS_TABLE kAvx2
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
