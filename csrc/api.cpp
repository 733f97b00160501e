// What Python calls: plain C functions over pointers and sizes. Which instruction set runs is chosen here, once.
#include <cstring>

#include "isa.h"

#if defined(WHISPERS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace whispers {
namespace {

const Kernels* g_kernels = nullptr;

#if defined(WHISPERS_X86)
struct Choice {
  const Kernels* kernels;
  bool here;
};

// Whether the processor has AMX with bf16 and int8, and the system lets this process use it: it saves 8 KB more a thread, for those who ask.
bool asks_for_tiles() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 24 | 1u << 22 | 1u << 25;  // of leaf 7's edx: tiles, their products of bf16, of int8
  constexpr long kAskForState = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) != kTiles) return false;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

constexpr int kChoices = 4;

// From the best to the plainest.
void choices(Choice (&found)[kChoices]) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  static const bool tiles = bf16 && asks_for_tiles();
  found[0] = {&kAmx, tiles};
  found[1] = {&kAvx512Bf16, bf16};
  found[2] = {&kAvx512, avx512};
  found[3] = {&kAvx2, avx2};
}
#endif

template <class Args>
int call(const void* args, bool (*Kernels::*operation)(const Args&, Team&)) {
  Turn turn;
  return (g_kernels->*operation)(*static_cast<const Args*>(args), turn.team) ? 0 : 2;
}

}  // namespace
}  // namespace whispers

using namespace whispers;

#define WHISPERS_API extern "C" __attribute__((visibility("default")))

// Writes the names of the instruction sets that this machine has, the best first, separated by spaces; nothing on other processors.
WHISPERS_API void whispers_isas(char* names, [[maybe_unused]] int64_t room) {
  names[0] = '\0';
#if defined(WHISPERS_X86)
  Choice found[kChoices];
  choices(found);
  for (const Choice& choice : found) {
    if (!choice.here || std::strlen(names) + std::strlen(choice.kernels->name) + 2 > static_cast<size_t>(room)) continue;
    if (names[0] != '\0') std::strcat(names, " ");
    std::strcat(names, choice.kernels->name);
  }
#endif
}

// Chooses one of them by name, before any operation. 0: done; 1: it is not here.
WHISPERS_API int whispers_choose([[maybe_unused]] const char* name) {
#if defined(WHISPERS_X86)
  Choice found[kChoices];
  choices(found);
  for (const Choice& choice : found) {
    if (choice.here && std::strcmp(choice.kernels->name, name) == 0) {
      g_kernels = choice.kernels;
      return 0;
    }
  }
#endif
  return 1;
}

WHISPERS_API int64_t whispers_threads() { return Team::instance().size(); }
WHISPERS_API void whispers_set_threads(int64_t threads) { Team::resize(static_cast<int>(threads)); }

// Each operation takes a struct of args.h. 0: done; 2: no memory for its scratch.
WHISPERS_API int whispers_committee_attention(const void* args) { return call(args, &Kernels::committee_attention); }
WHISPERS_API int whispers_embed_rows(const void* args) { return call(args, &Kernels::embed_rows); }
WHISPERS_API int whispers_rms_norm(const void* args) { return call(args, &Kernels::rms_norm); }
WHISPERS_API int whispers_rope_and_store(const void* args) { return call(args, &Kernels::rope_and_store); }
WHISPERS_API int whispers_silu_mul(const void* args) { return call(args, &Kernels::silu_mul); }
WHISPERS_API int whispers_pool_logits(const void* args) { return call(args, &Kernels::pool_logits); }
WHISPERS_API int whispers_likeliest(const void* args) { return call(args, &Kernels::likeliest); }
WHISPERS_API int whispers_linear(const void* args) { return call(args, &Kernels::linear); }
WHISPERS_API int whispers_shorten(const void* args) { return call(args, &Kernels::shorten); }
WHISPERS_API int whispers_fit_grid(const void* args) { return call(args, &Kernels::fit_grid); }
WHISPERS_API int whispers_unpack_rows(const void* args) { return call(args, &Kernels::unpack_rows); }
WHISPERS_API int whispers_forward(const void* args) { return call(args, &Kernels::forward); }
