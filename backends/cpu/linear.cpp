// W4A4 and W4A8 products on x86: exact integer dots of 64 values, each scaled once in float32.
//
// Both sides are expanded from 4 bits: the activation, a block of rows at a time, into int8; the weight, 16 columns at a
// time, into a panel that stays in the cache and serves all rows of the block. A dot product does not care for order, so
// a unit is kept as its 32 even elements, then its 32 odd ones, as the nibbles lie.
//
// The instructions multiply unsigned by signed bytes: weights are stored as v + 28 in [0, 56], and the sum starts at
// -28 * sum(activation). maddubs adds in int16: 32 products of at most 28 * 28 fit in the end, and what wraps around on
// the way cancels. Where units share their scales (a span), the integers of all of them are added before they are scaled.
// An activation in 8 bits fits into int16 no more than pair by pair. Sums over units run in the order of
// K for each output alone: neither the number of threads nor the other rows change a bit.

#include <deque>

#include "common.h"

using namespace tahf4;

#if TAHF4_X86

namespace {

constexpr int64_t kPanel = 16;                       // columns
constexpr int64_t kPanelUnit = kPanel * kUnit;       // bytes of a panel for one unit
constexpr int64_t kBlockBytes = int64_t(4) << 20;    // of expanded activations
constexpr int64_t kScratchBytes = int64_t(1) << 20;  // of products that wait for what follows
constexpr int64_t kRows = 48;                        // a multiple of every tile's
constexpr int64_t kAhead = 8;                        // rows that are fetched before they are written
constexpr int kBias = 28;

#define INSTRUCTIONS(text) __attribute__((target(text)))
// On top of what the file is compiled for.
#define AVX2_CODE INSTRUCTIONS("avx2,fma")
#define AVX_VNNI_CODE INSTRUCTIONS("avx2,fma,avxvnni")
#define AVX512_CODE INSTRUCTIONS("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define AMX_CODE INSTRUCTIONS("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")

#include "expand.inc"

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: rows x columns over the whole K. c: [rows, 32] (AVX-512) or [rows, 16], float32, rows `stride` apart.

// Rows that stand together for each unit: one (AVX-512), kShort (256 bits), kTall (AMX, which has no start).
struct Rows {
  const int8_t* values;  // [units, together, 64]
  const float* scales;   // [units, together]
  const int32_t* start;  // [units, together]
  int64_t units, span;
};

constexpr int64_t kShort = 4, kTall = 16;

inline int32_t word(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

#define STEP_MADDUBS(acc, b, a) _mm256_add_epi16(acc, _mm256_maddubs_epi16(b, a))
#define SUM_MADDUBS(acc) _mm256_madd_epi16(acc, _mm256_set1_epi16(1))
// Two products of at most 56 * 127.
#define STEP_PAIRS(acc, b, a) \
  _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(b, a), _mm256_set1_epi16(1)))
#define STEP_VNNI(acc, b, a) _mm256_dpbusd_avx_epi32(acc, b, a)
#define SUM_VNNI(acc) (acc)

// 16 registers: 8 sums, 2 of the weight, 1 or 2 for the activation. The float32 sums wait in the first-level cache.
#define TILE_256(NAME, CODE, STEP, SUM)                                                                          \
  template <int R>                                                                                               \
  CODE void NAME(const Rows& rows, const uint8_t* panel, const float* panel_scales, float* c, int64_t stride) {  \
    const int64_t units = rows.units;                                                                            \
    for (int r = 0; r < R; ++r) std::memset(c + r * stride, 0, kPanel * sizeof(float));                          \
    for (int64_t u = 0; u < units; u += rows.span) {                                                             \
      __m256i low[R], high[R];                                                                                   \
      for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_set1_epi32(rows.start[u * kShort + r]);              \
      const uint8_t* b = panel + u * kPanelUnit;                                                                 \
      const int8_t* a = rows.values + u * kShort * kUnit;                                                        \
      const uint8_t* end = b + std::min(rows.span, units - u) * kPanelUnit;                                      \
      for (; b < end; b += kPanelUnit, a += kShort * kUnit)                                                      \
      _Pragma("GCC unroll 4") for (int g = 0; g < 16; ++g) {                                                     \
        const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + g * 64));                      \
        const __m256i b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + g * 64 + 32));                 \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                                    \
          const __m256i v = _mm256_set1_epi32(word(a + r * kUnit + g * 4));                                      \
          low[r] = STEP(low[r], b0, v);                                                                          \
          high[r] = STEP(high[r], b1, v);                                                                        \
        }                                                                                                        \
      }                                                                                                          \
      const __m256 s0 = _mm256_loadu_ps(panel_scales + u * kPanel);                                              \
      const __m256 s1 = _mm256_loadu_ps(panel_scales + u * kPanel + 8);                                          \
      for (int r = 0; r < R; ++r) {                                                                              \
        const __m256 s = _mm256_set1_ps(rows.scales[u * kShort + r]);                                            \
        float* p = c + r * stride;                                                                               \
        const __m256 f0 = _mm256_mul_ps(_mm256_cvtepi32_ps(SUM(low[r])), s0);                                    \
        const __m256 f1 = _mm256_mul_ps(_mm256_cvtepi32_ps(SUM(high[r])), s1);                                   \
        _mm256_storeu_ps(p, _mm256_fmadd_ps(f0, s, _mm256_loadu_ps(p)));                                         \
        _mm256_storeu_ps(p + 8, _mm256_fmadd_ps(f1, s, _mm256_loadu_ps(p + 8)));                                 \
      }                                                                                                          \
    }                                                                                                            \
  }

TILE_256(tile_avx2, AVX2_CODE, STEP_MADDUBS, SUM_MADDUBS)
#include "tile_avx2.inc"
TILE_256(tile_avx2_8bit, AVX2_CODE, STEP_PAIRS, SUM_VNNI)
TILE_256(tile_avx_vnni, AVX_VNNI_CODE, STEP_VNNI, SUM_VNNI)

// 32 registers: for each row two sums in int32 and two in float32. Two panels side by side.
template <int R>
AVX512_CODE void tile_avx512(const Rows& rows, const uint8_t* panel, const float* panel_scales, float* c,
                             int64_t stride) {
  const int64_t units = rows.units;
  const uint8_t* other = panel + units * kPanelUnit;
  const float* other_scales = panel_scales + units * kPanel;
  __m512 f0[R], f1[R];
  for (int r = 0; r < R; ++r) f0[r] = f1[r] = _mm512_setzero_ps();
  for (int64_t u = 0; u < units; u += rows.span) {
    __m512i i0[R], i1[R];
    for (int r = 0; r < R; ++r) i0[r] = i1[r] = _mm512_set1_epi32(rows.start[r * units + u]);
    const uint8_t* b = panel + u * kPanelUnit;
    const uint8_t* d = other + u * kPanelUnit;
    const int8_t* a = rows.values + u * kUnit;
    const uint8_t* end = b + std::min(rows.span, units - u) * kPanelUnit;
    for (; b < end; b += kPanelUnit, d += kPanelUnit, a += kUnit) {
#pragma GCC unroll 4
      for (int g = 0; g < 16; ++g) {
        const __m512i b0 = _mm512_load_si512(b + g * 64);
        const __m512i b1 = _mm512_load_si512(d + g * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i v = _mm512_set1_epi32(word(a + r * units * kUnit + g * 4));
          i0[r] = _mm512_dpbusd_epi32(i0[r], b0, v);
          i1[r] = _mm512_dpbusd_epi32(i1[r], b1, v);
        }
      }
    }
    const __m512 s0 = _mm512_load_ps(panel_scales + u * kPanel);
    const __m512 s1 = _mm512_load_ps(other_scales + u * kPanel);
    for (int r = 0; r < R; ++r) {
      const __m512 s = _mm512_set1_ps(rows.scales[r * units + u]);
      f0[r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(i0[r]), s0), s, f0[r]);
      f1[r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(i1[r]), s1), s, f1[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(c + r * stride, f0[r]);
    _mm512_storeu_ps(c + r * stride + kPanel, f1[r]);
  }
}

#include "tile_amx.inc"
#include "tile_span.inc"

using Tile = void (*)(const Rows&, const uint8_t*, const float*, float*, int64_t);

struct Variant {
  int panels;   // side by side
  int most;     // rows of the largest tile
  bool pairs;   // sums in int16
  int64_t together;  // rows
  Tile tiles[kTall + 1];  // by number of rows
  bool amx = false;
};

const Variant* variant_of(int isa, int64_t m, int bits, bool joint) {
  static const Variant amx = {kAmxPanels, kTall, false, kTall,
                              {nullptr, tile_amx<1>, tile_amx<2>, tile_amx<3>, tile_amx<4>, tile_amx<5>, tile_amx<6>,
                               tile_amx<7>, tile_amx<8>, tile_amx<9>, tile_amx<10>, tile_amx<11>, tile_amx<12>,
                               tile_amx<13>, tile_amx<14>, tile_amx<15>, tile_amx<16>}, true};
  static const Variant amx_span = {
      kAmxPanels, kTall, false, kTall,
      {nullptr, tile_amx_span<1>, tile_amx_span<2>, tile_amx_span<3>, tile_amx_span<4>, tile_amx_span<5>,
       tile_amx_span<6>, tile_amx_span<7>, tile_amx_span<8>, tile_amx_span<9>, tile_amx_span<10>, tile_amx_span<11>,
       tile_amx_span<12>, tile_amx_span<13>, tile_amx_span<14>, tile_amx_span<15>, tile_amx_span<16>}, true};
  static const Variant avx2_span = {
      1, kShort, true, kShort, {nullptr, tile_avx2_span<1>, tile_avx2_span<2>, tile_avx2_span<3>, tile_avx2_span<4>}};
  static const Variant avx2 = {1, kShort, true, kShort, {nullptr, tile_avx2<1>, tile_avx2<2>, tile_avx2<3>, tile_avx2<4>}};
  static const Variant avx2_8bit = {
      1, kShort, false, kShort, {nullptr, tile_avx2_8bit<1>, tile_avx2_8bit<2>, tile_avx2_8bit<3>, tile_avx2_8bit<4>}};
  static const Variant avx_vnni = {
      1, kShort, false, kShort, {nullptr, tile_avx_vnni<1>, tile_avx_vnni<2>, tile_avx_vnni<3>, tile_avx_vnni<4>}};
  static const Variant avx512 = {2, 6, false, 1,
                                 {nullptr, tile_avx512<1>, tile_avx512<2>, tile_avx512<3>, tile_avx512<4>,
                                  tile_avx512<5>, tile_avx512<6>}};
  constexpr int64_t kFewRows = 8;  // are not worth a tile of sixteen
  if (isa == kAmx && m > kFewRows) return joint ? &amx_span : &amx;
  if (isa >= kAvxVnni) return isa == kAvxVnni ? &avx_vnni : &avx512;
  return bits == 8 ? &avx2_8bit : joint ? &avx2_span : &avx2;
}

// ---------------------------------------------------------------------------------------------------------------------
// The product.

#include "branches.inc"

// One row of a group to its place.
void write(const Operands& x, const Result& result, const Inputs& inputs, const Functions& functions, int64_t row,
           int64_t column, int64_t count, float* slots, float* values) {
  if (!result.target.codes) {
    // Rows lie far apart: without this each write would wait for memory.
    const int64_t size = result.dtype == kFloat32 ? 4 : 2;
    const char* ahead = static_cast<const char*>(result.out) + ((row + kAhead) * x.n + column) * size;
    for (int64_t line = 0; line < count * size; line += 64) __builtin_prefetch(ahead + line, 1);
  }
  if (!result.program && !result.target.codes && x.dtype == kFloat32 && result.dtype == kFloat32) {
    float* out = static_cast<float*>(result.out) + row * x.n + column;
    if (x.bias) {
      for (int64_t i = 0; i < count; ++i) out[i] = values[i] + x.bias[column + i];
    } else {
      std::memcpy(out, values, count * sizeof(float));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kUnit) {
    const int64_t part = std::min<int64_t>(kUnit, count - i), at = column + i;
    functions.finish(result.program, inputs, row, at, part, x.bias ? x.bias + at : nullptr, x.dtype, slots,
                     values + i);
    if (!result.target.codes) {
      char* out = static_cast<char*>(result.out) + (row * x.n + at) * (result.dtype == kFloat32 ? 4 : 2);
      functions.store(values + i, part, result.dtype, out);
    }
  }
  if (!result.target.codes) return;
  const int64_t unit = row * ((x.n + kUnit - 1) / kUnit) + column / kUnit;
  functions.quantize(values, kFloat32, count, result.target.from(unit, column), values);
}

// Columns are taken in groups of a unit or a Hadamard block: what follows a product wants them whole.
void product(const Operands& x, const Result& result, int isa, int threads) {
  const Variant& variant = *variant_of(isa, x.m, x.bits, x.span > 1);
  const Functions& functions = *functions_of(isa);
  const int64_t m = x.m, n = x.n, units = x.units;
  const int64_t width = variant.panels * kPanel;
  const int64_t group = std::max<int64_t>(kUnit, result.target.codes ? result.target.block : 0);
  const int64_t groups = (n + group - 1) / group;
  // Rows in multiples of every tile: 4, 6 or 16.
  int64_t block = std::min(kBlockBytes / (units * kUnit), kScratchBytes / (group * 4)) / kRows * kRows;
  block = std::min((m + kRows - 1) / kRows * kRows, std::max<int64_t>(kRows, std::min<int64_t>(1536, block)));
  const int64_t together = variant.together;
  const Buffer values(block * units * kUnit), row_scales(block * units * 4);
  const Buffer starts(variant.amx ? 1 : block * units * 4);
  const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, m * n * units / (1 << 12))));
  // Few groups for many threads: rows are shared out as well. A panel is then expanded more than once.
  const int64_t parts = groups >= 2 * team ? 1 : std::min((2 * team + groups - 1) / groups, (block + 191) / 192);
  const int64_t share = ((block + parts - 1) / parts + kRows - 1) / kRows * kRows;
#pragma omp parallel num_threads(team)
  {
    const Buffer panel(width * units * kUnit), panel_scales(width * units * 4), scratch(share * group * 4);
    const Slots slots(result.program);
    Branches branches(result.program, *result.inputs, n, group);
    if (variant.amx) begin_tiles();
    for (int64_t first = 0; first < m; first += block) {
      const int64_t height = std::min(block, m - first);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < height; ++r) {
        const int64_t row = (first + r) * units;
        const int64_t place = r / together * together * units + r % together;
        int8_t* out = values.as<int8_t>() + place * kUnit;
        float* out_scales = row_scales.as<float>() + place;
        int32_t* start = variant.amx ? nullptr : starts.as<int32_t>() + place;
        if (x.bits == 8) {
          expand_row8(reinterpret_cast<const int8_t*>(x.codes) + row * kUnit,
                      reinterpret_cast<const float*>(x.scales) + row, units, together, out, out_scales, start);
        } else {
          expand_row(x.codes + row * (kUnit / 2), x.scales + row, units, x.span, together, variant.pairs, out, out_scales,
                     start);
        }
      }
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < groups * parts; ++piece) {
        const int64_t column = piece / parts * group, begin = piece % parts * share;
        const int64_t end = std::min(height, begin + share);
        if (begin >= end) continue;
        for (int64_t i = 0; i < group && column + i < n; i += width) {
          for (int p = 0; p < variant.panels; ++p) {
            const int64_t at = std::min(n, column + i + p * kPanel);
            expand_panel(x.weight_codes + at * units * (kUnit / 2), x.weight_scales + at * units, units,
                         std::min(kPanel, n - at), variant.amx ? 0 : kBias, panel.as<uint8_t>() + p * units * kPanelUnit,
                         panel_scales.as<float>() + p * units * kPanel);
          }
          for (int64_t r = begin; r < end; r += variant.most) {
            const Rows rows = {values.as<int8_t>() + r * units * kUnit, row_scales.as<float>() + r * units,
                               starts.as<int32_t>() + r * units, units, x.span};
            variant.tiles[std::min<int64_t>(variant.most, end - r)](rows, panel.as<uint8_t>(), panel_scales.as<float>(),
                                                                    scratch.as<float>() + (r - begin) * group + i,
                                                                    group);
          }
        }
        const int64_t count = std::min(group, n - column);
        branches.take_columns(column, count);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t behind = (r - begin) % Branches::kRows;
          if (!behind) branches.multiply(functions, first + r, std::min(Branches::kRows, end - r), column, count);
          branches.show(behind);
          write(x, result, branches.inputs, functions, first + r, column, count, slots.values(),
                scratch.as<float>() + (r - begin) * group);
        }
      }
    }
    if (variant.amx) end_tiles();
  }
}

}  // namespace

#endif  // TAHF4_X86

extern "C" {

// A W4A4 or W4A8 product and what follows it, as tahf4_compiler/ops.py and fused_ops.py define it. isa: a set of instructions
// that tahf4_instruction_sets allows, not 0.
void tahf4_linear(const Operands* operands, const Result* result, int isa, int threads) {
#if TAHF4_X86
  product(*operands, *result, isa, threads);
#endif
}

}  // extern "C"
