// W4A4 products on x86: exact integer dots of 64 values, each scaled once in float32.
//
// Both sides are expanded from 4 bits: the activation, a block of rows at a time, into int8; the weight, 16 columns at a
// time, into a panel that stays in the cache and serves all rows of the block. A dot product does not care for order, so
// a unit is kept as its 32 even elements, then its 32 odd ones, as the nibbles lie.
//
// The instructions multiply unsigned by signed bytes: weights are stored as v + 28 in [0, 56], and the sum starts at
// -28 * sum(activation). maddubs adds in int16: 32 products of at most 28 * 28 fit in the end, and what wraps around on
// the way cancels. Sums over units run in the order of K for each output alone: neither the number of threads nor the
// other rows change a bit.

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define TAHF4_X86 1
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

enum Isa { kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3 };

#if TAHF4_X86

constexpr int64_t kUnit = 64;
constexpr int64_t kPanel = 16;                       // columns
constexpr int64_t kPanelUnit = kPanel * kUnit;       // bytes of a panel for one unit
constexpr int64_t kBlockBytes = int64_t(4) << 20;    // of expanded activations
constexpr int kBias = 28;

#define INSTRUCTIONS(text) __attribute__((target(text)))
// On top of what the file is compiled for.
#define AVX2_CODE INSTRUCTIONS("avx2,fma")
#define AVX_VNNI_CODE INSTRUCTIONS("avx2,fma,avxvnni")
#define AVX512_CODE INSTRUCTIONS("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

inline float scale_of(int32_t metadata) {
  const uint32_t code = metadata & 0xFF;
  const uint32_t bits = code == 0xFF ? 0x7FC00000u : ((code >> 2) + (127 - 48)) << 23 | (code & 3) << 21;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

// ---------------------------------------------------------------------------------------------------------------------
// Expansion.

// The 32 even and the 32 odd elements of a unit, in quarters, plus a bias.
AVX2_CODE inline void expand(const uint8_t* codes, int32_t metadata, int bias, __m256i* even, __m256i* odd) {
  const __m256i nibble = _mm256_set1_epi8(15);
  // -7 ... 7 as 0 ... 14: sign and magnitude to offset binary
  const __m256i table = _mm256_setr_epi8(7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0,  //
                                         7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0);
  // An int16 lane is one group of four elements: two bytes of codes, one bit of E1_16; two lanes share a bit of E1_8.
  const __m256i bits16 = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  const __m256i bits8 = _mm256_setr_epi16(1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128);
  const __m256i word16 = _mm256_set1_epi16(int16_t(uint32_t(metadata) >> 16));
  const __m256i word8 = _mm256_set1_epi16(int16_t(uint32_t(metadata) >> 8 & 0xFF));
  const __m256i is16 = _mm256_cmpeq_epi16(_mm256_and_si256(word16, bits16), bits16);
  const __m256i is8 = _mm256_cmpeq_epi16(_mm256_and_si256(word8, bits8), bits8);
  const __m256i twice = _mm256_sub_epi16(_mm256_set1_epi16(1), is16);
  const __m256i factor = _mm256_add_epi16(twice, _mm256_and_si256(twice, is8));  // 2**(e8 + e16)
  // Bytes of at most 14 * 4: a product of two bytes in a lane never carries.
  const __m256i offset =
      _mm256_sub_epi8(_mm256_set1_epi8(char(bias)), _mm256_mullo_epi16(factor, _mm256_set1_epi16(0x0707)));
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i low = _mm256_and_si256(both, nibble);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
  *even = _mm256_add_epi8(_mm256_mullo_epi16(_mm256_shuffle_epi8(table, low), factor), offset);
  *odd = _mm256_add_epi8(_mm256_mullo_epi16(_mm256_shuffle_epi8(table, high), factor), offset);
}

// Rows of an activation: int8 in quarters, scales / 16, and what the integer sums start at.
AVX2_CODE void expand_row(const uint8_t* codes, const int32_t* scales, int64_t units, bool pairs, int8_t* out,
                          float* out_scales, int32_t* start) {
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t u = 0; u < units; ++u) {
    __m256i even, odd;
    expand(codes + u * (kUnit / 2), scales[u], 0, &even, &odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + u * kUnit), even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + u * kUnit + 32), odd);
    out_scales[u] = scale_of(scales[u]) * 0.0625f;
    // Sums of pairs in int16 (at most 32 values of 28), then those of the two lanes of each dword.
    __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(ones, even), _mm256_maddubs_epi16(ones, odd));
    __m128i half = _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0xB1));
    const __m128i lanes = _mm_mullo_epi16(half, _mm_set1_epi16(-kBias));
    const int32_t two = _mm_cvtsi128_si32(lanes);
    start[u] = pairs ? two : int32_t(int16_t(two & 0xFFFF)) + int32_t(int16_t(uint32_t(two) >> 16));
  }
}

AVX2_CODE inline void transpose(const __m256i* rows, uint8_t* out, int64_t stride) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride), _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 4) * stride),
                        _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
  }
}

// A panel: for each unit 16 groups of 4 values of K, 16 columns each. Columns from `count` on are zero.
AVX2_CODE void expand_panel(const uint8_t* codes, const int32_t* scales, int64_t units, int64_t count, uint8_t* out,
                            float* out_scales) {
  for (int64_t half = 0; half < kPanel; half += 8) {
    for (int64_t u = 0; u < units; ++u) {
      __m256i even[8], odd[8];
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t column = half + i;
        if (column < count) {
          const int32_t metadata = scales[column * units + u];
          expand(codes + (column * units + u) * (kUnit / 2), metadata, kBias, &even[i], &odd[i]);
          out_scales[u * kPanel + column] = scale_of(metadata);
        } else {
          even[i] = odd[i] = _mm256_set1_epi8(kBias);
          out_scales[u * kPanel + column] = 0.0f;
        }
      }
      uint8_t* place = out + u * kPanelUnit + half * 4;
      transpose(even, place, kPanel * 4);
      transpose(odd, place + 8 * kPanel * 4, kPanel * 4);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: rows x columns over the whole K. c: [rows, 32] (AVX-512) or [rows, 16], float32.

struct Rows {
  const int8_t* values;  // [rows, units, 64]
  const float* scales;   // [rows, units]
  const int32_t* start;  // [rows, units]
  int64_t units;
};

inline int32_t word(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

#define STEP_MADDUBS(acc, b, a) _mm256_add_epi16(acc, _mm256_maddubs_epi16(b, a))
#define SUM_MADDUBS(acc) _mm256_madd_epi16(acc, _mm256_set1_epi16(1))
#define STEP_VNNI(acc, b, a) _mm256_dpbusd_avx_epi32(acc, b, a)
#define SUM_VNNI(acc) (acc)

// 16 registers: 8 sums, 2 of the weight, 1 or 2 for the activation. The float32 sums wait in the first-level cache.
#define TILE_256(NAME, CODE, STEP, SUM)                                                                          \
  template <int R>                                                                                               \
  CODE void NAME(const Rows& rows, const uint8_t* panel, const float* panel_scales, float* c) {                  \
    const int64_t units = rows.units;                                                                            \
    std::memset(c, 0, R * kPanel * sizeof(float));                                                               \
    for (int64_t u = 0; u < units; ++u) {                                                                        \
      __m256i low[R], high[R];                                                                                   \
      for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_set1_epi32(rows.start[r * units + u]);               \
      const uint8_t* b = panel + u * kPanelUnit;                                                                 \
      const int8_t* a = rows.values + u * kUnit;                                                                 \
      _Pragma("GCC unroll 4") for (int g = 0; g < 16; ++g) {                                                     \
        const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + g * 64));                      \
        const __m256i b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + g * 64 + 32));                 \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {                                                    \
          const __m256i v = _mm256_set1_epi32(word(a + r * units * kUnit + g * 4));                              \
          low[r] = STEP(low[r], b0, v);                                                                          \
          high[r] = STEP(high[r], b1, v);                                                                        \
        }                                                                                                        \
      }                                                                                                          \
      const __m256 s0 = _mm256_loadu_ps(panel_scales + u * kPanel);                                              \
      const __m256 s1 = _mm256_loadu_ps(panel_scales + u * kPanel + 8);                                          \
      for (int r = 0; r < R; ++r) {                                                                              \
        const __m256 s = _mm256_set1_ps(rows.scales[r * units + u]);                                             \
        float* p = c + r * kPanel;                                                                               \
        const __m256 f0 = _mm256_mul_ps(_mm256_cvtepi32_ps(SUM(low[r])), s0);                                    \
        const __m256 f1 = _mm256_mul_ps(_mm256_cvtepi32_ps(SUM(high[r])), s1);                                   \
        _mm256_storeu_ps(p, _mm256_fmadd_ps(f0, s, _mm256_loadu_ps(p)));                                         \
        _mm256_storeu_ps(p + 8, _mm256_fmadd_ps(f1, s, _mm256_loadu_ps(p + 8)));                                 \
      }                                                                                                          \
    }                                                                                                            \
  }

TILE_256(tile_avx2, AVX2_CODE, STEP_MADDUBS, SUM_MADDUBS)
TILE_256(tile_avx_vnni, AVX_VNNI_CODE, STEP_VNNI, SUM_VNNI)

// 32 registers: for each row two sums in int32 and two in float32. Two panels side by side.
template <int R>
AVX512_CODE void tile_avx512(const Rows& rows, const uint8_t* panel, const float* panel_scales, float* c) {
  const int64_t units = rows.units;
  const uint8_t* other = panel + units * kPanelUnit;
  const float* other_scales = panel_scales + units * kPanel;
  __m512 f0[R], f1[R];
  for (int r = 0; r < R; ++r) f0[r] = f1[r] = _mm512_setzero_ps();
  for (int64_t u = 0; u < units; ++u) {
    __m512i i0[R], i1[R];
    for (int r = 0; r < R; ++r) i0[r] = i1[r] = _mm512_set1_epi32(rows.start[r * units + u]);
    const uint8_t* b = panel + u * kPanelUnit;
    const uint8_t* d = other + u * kPanelUnit;
    const int8_t* a = rows.values + u * kUnit;
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
    const __m512 s0 = _mm512_load_ps(panel_scales + u * kPanel);
    const __m512 s1 = _mm512_load_ps(other_scales + u * kPanel);
    for (int r = 0; r < R; ++r) {
      const __m512 s = _mm512_set1_ps(rows.scales[r * units + u]);
      f0[r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(i0[r]), s0), s, f0[r]);
      f1[r] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(i1[r]), s1), s, f1[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(c + r * 2 * kPanel, f0[r]);
    _mm512_storeu_ps(c + r * 2 * kPanel + kPanel, f1[r]);
  }
}

using Tile = void (*)(const Rows&, const uint8_t*, const float*, float*);

struct Variant {
  int panels;   // side by side
  int most;     // rows of the largest tile
  bool pairs;   // sums in int16
  Tile tiles[7];  // by number of rows
};

const Variant* variant_of(int isa) {
  static const Variant avx2 = {1, 4, true, {nullptr, tile_avx2<1>, tile_avx2<2>, tile_avx2<3>, tile_avx2<4>}};
  static const Variant avx_vnni = {
      1, 4, false, {nullptr, tile_avx_vnni<1>, tile_avx_vnni<2>, tile_avx_vnni<3>, tile_avx_vnni<4>}};
  static const Variant avx512 = {2, 6, false,
                                 {nullptr, tile_avx512<1>, tile_avx512<2>, tile_avx512<3>, tile_avx512<4>,
                                  tile_avx512<5>, tile_avx512<6>}};
  return isa == kAvx512Vnni ? &avx512 : isa == kAvxVnni ? &avx_vnni : &avx2;
}

// ---------------------------------------------------------------------------------------------------------------------
// The product.

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7FC0;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Columns of a tile to their place: plus bias, cast.
template <class Out>
void write(const float* c, int64_t width, int64_t rows, int64_t count, const float* bias, Out* out, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = bias ? c[r * width + i] + bias[i] : c[r * width + i];
      if constexpr (sizeof(Out) == 4) {
        out[r * n + i] = value;
      } else {
        out[r * n + i] = to_bfloat16(value);
      }
    }
  }
}

struct Buffer {
  explicit Buffer(int64_t bytes) : data(::operator new(size_t(bytes), std::align_val_t(64))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  void* data;
};

template <class Out>
void product(const uint8_t* codes, const int32_t* scales, int64_t m, const uint8_t* weight_codes,
             const int32_t* weight_scales, int64_t n, int64_t units, const float* bias, Out* out, int isa,
             int threads) {
  const Variant& variant = *variant_of(isa);
  const int64_t width = variant.panels * kPanel;
  const int64_t strips = (n + width - 1) / width;
  int64_t block = kBlockBytes / (units * kUnit) / 12 * 12;
  block = block < 48 ? 48 : block > 1536 ? 1536 : block;
  if (block > m) block = m;
  const Buffer values(block * units * kUnit), row_scales(block * units * 4), starts(block * units * 4);
  const int64_t work = m * n * units;
  const int64_t useful = work / (1 << 12) + 1 < strips ? work / (1 << 12) + 1 : strips;
  const int team = int(useful < threads ? useful : threads);
#pragma omp parallel num_threads(team)
  {
    const Buffer panel(width * units * kUnit), panel_scales(width * units * 4);
    alignas(64) float c[6 * 32];
    for (int64_t first = 0; first < m; first += block) {
      const int64_t height = m - first < block ? m - first : block;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < height; ++r) {
        const int64_t row = (first + r) * units;
        expand_row(codes + row * (kUnit / 2), scales + row, units, variant.pairs,
                   values.as<int8_t>() + r * units * kUnit, row_scales.as<float>() + r * units,
                   starts.as<int32_t>() + r * units);
      }
#pragma omp for schedule(static)
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t column = strip * width;
        const int64_t count = n - column < width ? n - column : width;
        for (int p = 0; p < variant.panels; ++p) {
          const int64_t left = count - p * kPanel;
          const int64_t begin = left > 0 ? (column + p * kPanel) * units : 0;
          expand_panel(weight_codes + begin * (kUnit / 2), weight_scales + begin, units,
                       left < 0 ? 0 : left < kPanel ? left : kPanel, panel.as<uint8_t>() + p * units * kPanelUnit,
                       panel_scales.as<float>() + p * units * kPanel);
        }
        for (int64_t r = 0; r < height; r += variant.most) {
          const int64_t tall = height - r < variant.most ? height - r : variant.most;
          const Rows rows = {values.as<int8_t>() + r * units * kUnit, row_scales.as<float>() + r * units,
                             starts.as<int32_t>() + r * units, units};
          variant.tiles[tall](rows, panel.as<uint8_t>(), panel_scales.as<float>(), c);
          write(c, width, tall, count, bias ? bias + column : nullptr, out + (first + r) * n + column, n);
        }
      }
    }
  }
}

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
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
  if (wide && (c >> 11 & 1)) found |= 1 << kAvx512Vnni;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)) found |= 1 << kAvxVnni;
  return found;
}

#endif  // TAHF4_X86

}  // namespace

extern "C" {

// Return which products can run: bit 1 AVX2, bit 2 AVX-VNNI, bit 3 AVX-512-VNNI; 0 for none.
int tahf4_instruction_sets() {
#if TAHF4_X86
  static const int found = detect();
  return found;
#else
  return 0;
#endif
}

// The W4A4 product, as tahf4_compiler.ops.linear does.
//
// codes: [m, units * 32]; scales: [m, units]; the weight's: [n, ...]. bias: [n] or null. out: [m, n], float32 (out_dtype
// 0) or bfloat16 (1). isa: one of the numbers above that tahf4_instruction_sets allows.
void tahf4_linear(const uint8_t* codes, const int32_t* scales, int64_t m, const uint8_t* weight_codes,
                  const int32_t* weight_scales, int64_t n, int64_t units, const float* bias, void* out, int out_dtype,
                  int isa, int threads) {
#if TAHF4_X86
  if (out_dtype == 0) {
    product(codes, scales, m, weight_codes, weight_scales, n, units, bias, static_cast<float*>(out), isa, threads);
  } else {
    product(codes, scales, m, weight_codes, weight_scales, n, units, bias, static_cast<uint16_t*>(out), isa, threads);
  }
#endif
}

}  // extern "C"
