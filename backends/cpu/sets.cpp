// The same code for each set of instructions, and which of them the processor has.

#include <cmath>

#include "common.h"

#if TAHF4_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if TAHF4_X86

#if defined(__clang__)
#define TAHF4_BEGIN_WIDE                                                                                            \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq\"))), apply_to=function)")
#define TAHF4_END_WIDE _Pragma("clang attribute pop")
#else
#define TAHF4_BEGIN_WIDE \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512\")")
#define TAHF4_END_WIDE _Pragma("GCC pop_options")
#endif

namespace tahf4 {

namespace avx2 {
#define TAHF4_WIDE 0
#include "attention.inc"
#include "units.inc"
#include "programs.inc"
#undef TAHF4_WIDE
}  // namespace avx2

TAHF4_BEGIN_WIDE
namespace avx512 {
#define TAHF4_WIDE 1
#include "attention.inc"
#include "units.inc"
#include "programs.inc"
#undef TAHF4_WIDE
}  // namespace avx512
TAHF4_END_WIDE

namespace {

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Whether this process may use the registers of AMX; Linux wants to be asked.
bool tiles_allowed(uint64_t state) {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (state >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

int detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;  // no OSXSAVE
  const bool fma = c >> 12 & 1;
  const uint64_t state = enabled_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (state & 6) != 6 || !fma || !(b >> 5 & 1)) return 0;
  int found = 1 << kAvx2;
  const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  const bool wide = (state & 0xE0) == 0xE0 && (b & (f | dq | bw | vl)) == (f | dq | bw | vl);
  if (wide && (c >> 11 & 1)) {
    found |= 1 << kAvx512Vnni;
    if ((d >> 24 & 3) == 3 && tiles_allowed(state)) found |= 1 << kAmx;  // tiles, int8
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)) found |= 1 << kAvxVnni;
  return found;
}

}  // namespace

// Quantization is that of AVX2: it works on several units at a time, and the wide one waits for each.
const Functions wide = [] {
  Functions found = avx512::functions;
  found.quantize = avx2::quantize;
  return found;
}();

const Functions* functions_of(int isa) { return isa >= kAvx512Vnni ? &wide : isa == kNone ? nullptr : &avx2::functions; }

}  // namespace tahf4

#else

namespace tahf4 {
const Functions* functions_of(int) { return nullptr; }
}  // namespace tahf4

#endif  // TAHF4_X86

extern "C" {

// Return which sets can run: bit 1 AVX2, bit 2 AVX-VNNI, bit 3 AVX-512-VNNI, bit 4 AMX; 0 for none.
int tahf4_instruction_sets() {
#if TAHF4_X86
  static const int found = tahf4::detect();
  return found;
#else
  return 0;
#endif
}

}  // extern "C"
