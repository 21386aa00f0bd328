// HiFloat4 on the CPU: conversion both ways.
//
// Every function works on raw pointers and is bit for bit what format/hif4.py and ops/reference.py do. It relies on
// IEEE float32 arithmetic without contraction into fused multiply-adds and without value-changing optimizations
// (-ffp-contract=off, no -ffast-math). Loops of fixed length over one unit are left to the compiler's
// vectorizer; only the exchange of neighbouring lanes is spelled out.

#include <tuple>
#include <vector>

#include "common.h"

using namespace tahf4;

namespace {

constexpr int kExponent = 1 << 23;  // 1 in the exponent of a float32
constexpr int kOne = 127 << 23;     // bits of 1.0f
constexpr int kFour = 129 << 23;    // and of 4.0f

// ---------------------------------------------------------------------------------------------------------------------
// Exchange of lanes: out[i] = in[i ^ S] over 64 values.

#if defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 12)
// No wider than what the vectorizer stores: a load across two stores would wait for both.
#if defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef int32_t Lanes __attribute__((vector_size(kLanes * 4)));

template <int S>
inline Lanes exchange_lanes(Lanes v) {
#define LANE(i) (((i) ^ S) & (kLanes - 1))
#if defined(__AVX__)
  return __builtin_shufflevector(v, v, LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7));
#else
  return __builtin_shufflevector(v, v, LANE(0), LANE(1), LANE(2), LANE(3));
#endif
#undef LANE
}

template <int S>
inline void exchange(const void* in, void* out) {
  constexpr int kVectors = kUnit / kLanes;
  Lanes v[kVectors], w[kVectors];
  std::memcpy(v, in, sizeof(v));
  if constexpr (S < kLanes) {
    for (int i = 0; i < kVectors; ++i) w[i] = exchange_lanes<S>(v[i]);
  } else {
    for (int i = 0; i < kVectors; ++i) w[i] = v[i ^ (S / kLanes)];
  }
  std::memcpy(out, w, sizeof(w));
}
#else
template <int S>
inline void exchange(const void* in, void* out) {
  int32_t v[kUnit], w[kUnit];
  std::memcpy(v, in, sizeof(v));
  for (int i = 0; i < kUnit; ++i) w[i] = v[i ^ S];
  std::memcpy(out, w, sizeof(w));
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Transform.

// One stage of the Walsh-Hadamard transform inside 64 values: (low + high, low - high) at a distance of S.
template <int S>
inline void butterfly(float* x) {
  float other[kUnit];
  exchange<S>(x, other);
  // The upper lane holds `high` itself: low - high is low + (-high), bit for bit.
  for (int i = 0; i < kUnit; ++i) x[i] = other[i] + ((i & S) ? -x[i] : x[i]);
}

inline void hadamard_unit(float* x, int64_t block) {
  if (block > 1) butterfly<1>(x);
  if (block > 2) butterfly<2>(x);
  if (block > 4) butterfly<4>(x);
  if (block > 8) butterfly<8>(x);
  if (block > 16) butterfly<16>(x);
  if (block > 32) butterfly<32>(x);
}

// Transform `count` values (a multiple of 64 and of `block`), strides ascending, the normalization last.
inline void hadamard(float* x, int64_t count, int64_t block, float norm) {
  for (int64_t i = 0; i < count; i += kUnit) hadamard_unit(x + i, block);
  for (int64_t stride = kUnit; stride < block; stride *= 2) {
    for (int64_t first = 0; first < count; first += 2 * stride) {
      float* low = x + first;
      float* high = low + stride;
      for (int64_t i = 0; i < stride; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) x[i] *= norm;
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversion.

struct Metadata {
  int32_t e8[kUnit];   // for each lane: the bit of its group of 8
  int32_t e16[kUnit];  // and of its group of 4
  constexpr Metadata() : e8(), e16() {
    for (int i = 0; i < kUnit; ++i) {
      e8[i] = 1 << (8 + i / 8);
      e16[i] = 1 << (16 + i / 4);
    }
  }
};
constexpr Metadata kMetadata;

// Of four level-1 scales, the one of least squared error: see tahf4_compiler/format/levels.py.
inline int least_error_scale(const int32_t* magnitude, const int32_t* max4, const int32_t* max8, int first) {
  const float grain = grain_of(first);
  int best = first, least = 0;
  for (int more = 0; more < kLeastErrorScales; ++more) {
    const int code = std::min(first + more, kNanScale - 1), size = bits_as<int>(scale_of(code) * grain * 0.25f);
    const float factor = reciprocal(code);
    int error = 0;
    for (int i = 0; i < kUnit; ++i) {
      const int32_t e8 = -int32_t(bits_as<float>(max8[i]) * factor >= 4.0f);
      const float half8 = bits_as<float>(kOne - (e8 & kExponent));
      const int32_t e16 = -int32_t(bits_as<float>(max4[i]) * factor * half8 >= 2.0f);
      const int32_t exponents = (e8 & kExponent) + (e16 & kExponent);
      const float value = bits_as<float>(magnitude[i]), scaled = value * factor * bits_as<float>(kFour - exponents) + 0.5f;
      const float wanted = value * grain + 0.5f;  // large where there is no other scale
      const int element = int(scaled < 7.0f ? scaled : 7.0f), off = int(wanted < 5000.0f ? wanted : 5000.0f) - element * int(bits_as<float>(size + exponents));
      error += off * off;
    }
    if (!more || error < least) {
      best = code;
      least = error;
    }
  }
  return best;
}

// shared: bits of the largest magnitude of all units that share the level-1 scale, or -1 for its own. Rounding: 0,
// kRounded or kSearched.
template <int Rounding>
inline void quantize_unit(const float* x, uint8_t* codes, int32_t* scale, int shared) {
  int32_t bits[kUnit], magnitude[kUnit], max4[kUnit], max8[kUnit], other[kUnit];
  std::memcpy(bits, x, sizeof(bits));
  for (int i = 0; i < kUnit; ++i) magnitude[i] = bits[i] & 0x7FFFFFFF;
  // Bits of magnitudes are ordered as the magnitudes are. Every lane gets the maximum of its group.
  exchange<1>(magnitude, other);
  for (int i = 0; i < kUnit; ++i) max4[i] = std::max(magnitude[i], other[i]);
  exchange<2>(max4, other);
  for (int i = 0; i < kUnit; ++i) max4[i] = std::max(max4[i], other[i]);
  exchange<4>(max4, other);
  for (int i = 0; i < kUnit; ++i) max8[i] = std::max(max4[i], other[i]);
  int unit_max = shared;
  for (int i = 0; shared < 0 && i < kUnit; ++i) unit_max = std::max(unit_max, max8[i]);
  if (unit_max >= kFiniteEnd) {  // an infinity or NaN
    std::memset(codes, 0, kUnit / 2);
    *scale = kNanScale;
    return;
  }
  int code = level1_scale(bits_as<float>(unit_max));
  if (Rounding == kSearched) code = least_error_scale(magnitude, max4, max8, code);
  const float factor = reciprocal(code);
  // Conditions are masks (0 or -1): the exponent of a float32 changes with an addition to its bits.
  int32_t nibbles[kUnit];
  int32_t metadata = code;
  for (int i = 0; i < kUnit; ++i) {
    const int32_t e8 = -int32_t(bits_as<float>(max8[i]) * factor >= 4.0f);
    const float half8 = bits_as<float>(kOne - (e8 & kExponent));  // 2**-e8
    const int32_t e16 = -int32_t(bits_as<float>(max4[i]) * factor * half8 >= 2.0f);
    metadata |= (e8 & kMetadata.e8[i]) | (e16 & kMetadata.e16[i]);
    const float quarters = bits_as<float>(kFour - (e8 & kExponent) - (e16 & kExponent));  // 4 * 2**-(e8 + e16)
    float scaled = bits_as<float>(magnitude[i]) * factor * quarters;
    if (Rounding == kRounded) scaled = bits_as<float>(round_bits(bits_as<int32_t>(scaled), 16));
    const float rounded = scaled + 0.5f;  // >= 0: truncation is floor
    nibbles[i] = int32_t(rounded < 7.0f ? rounded : 7.0f) | int32_t(uint32_t(bits[i]) >> 31 << 3);
  }
  for (int i = 0; i < kUnit / 2; ++i) codes[i] = uint8_t(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
  *scale = metadata;
}

// To 8 bits. The sum with 1.5 * 2**23 rounds to a whole number, half to even, as all sums are rounded.
inline void quantize_unit8(const float* x, uint8_t* codes, int32_t* scale) {
  int32_t bits[kUnit];
  std::memcpy(bits, x, sizeof(bits));
  int unit_max = 0;
  for (int i = 0; i < kUnit; ++i) unit_max = std::max(unit_max, bits[i] & 0x7FFFFFFF);
  if (unit_max >= kFiniteEnd) {  // an infinity or NaN
    std::memset(codes, 0, kUnit);
    *scale = 0x7FC00000;
    return;
  }
  const float most = std::max(bits_as<float>(unit_max), kLeastMagnitude), factor = kMostCode / most;
  for (int i = 0; i < kUnit; ++i) codes[i] = uint8_t(int32_t(x[i] * factor + 12582912.0f - 12582912.0f));
  *scale = bits_as<int32_t>(most * (1 / kMostCode));
}

inline void to_units(const float* x, const Target& target, int shared = -1) {
  if (target.bits == 8) {
    quantize_unit8(x, target.codes, target.scales);
  } else {
    const auto quantize = target.rounding == kRounded    ? quantize_unit<kRounded>
                          : target.rounding == kSearched ? quantize_unit<kSearched>
                                                         : quantize_unit<0>;
    quantize(x, target.codes, target.scales, shared);
  }
}

inline int largest_magnitude(const float* x, int64_t count) {
  int most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, bits_as<int>(x[i]) & 0x7FFFFFFF);
  return most;
}

template <class T>
inline void load(const T* x, int64_t count, int64_t padded, const float* multiplier, float* out) {
  if (multiplier) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]) * multiplier[i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
  }
  for (int64_t i = count; i < padded; ++i) out[i] = 0.0f;
}

template <class T>
void quantize(const T* x, int64_t rows, int64_t k, int64_t row_stride, const Target& target, int threads) {
  const auto [multiplier, block, norm] = std::tie(target.multiplier, target.block, target.norm);
  const int64_t units = (k + kUnit - 1) / kUnit, span = std::max<int64_t>(1, target.span);
  const int64_t width = std::max(span * kUnit, block);  // values that one piece of work transforms
  const int64_t pieces = (units * kUnit + width - 1) / width;
#pragma omp parallel num_threads(team_of(rows * units * kUnit, threads, kQuantizedPerThread))
  {
    std::vector<float> wide(width > kUnit ? width : 0);
    alignas(64) float narrow[kUnit];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows * pieces; ++row) {
      const int64_t r = row / pieces, first = row % pieces * width;
      const T* source = x + r * row_stride + first;
      const float* factors = multiplier ? multiplier + first : nullptr;
      const int64_t unit = r * units + first / kUnit;
      if (width == kUnit) {
        // Two calls, so that the common one has a fixed length.
        if (first + kUnit <= k) {
          load(source, kUnit, kUnit, factors, narrow);
        } else {
          load(source, k - first, kUnit, factors, narrow);
        }
        if (block) {
          hadamard_unit(narrow, block);
          for (int i = 0; i < kUnit; ++i) narrow[i] *= norm;
        }
        to_units(narrow, target.from(unit, 0));
        continue;
      }
      const int64_t held = std::min(width, units * kUnit - first);
      load(source, std::max<int64_t>(0, std::min(width, k - first)), held, factors, wide.data());
      if (block) hadamard(wide.data(), held, block, norm);
      int shared = -1;
      for (int64_t i = 0; i < held / kUnit; ++i) {
        const float* values = wide.data() + i * kUnit;
        if (span > 1 && i % span == 0) shared = largest_magnitude(values, std::min(span * kUnit, held - i * kUnit));
        to_units(values, target.from(unit + i, 0), shared);
      }
    }
  }
}

template <class T>
void transform(const T* x, int64_t rows, int64_t k, int64_t row_stride, const float* multiplier, int64_t block,
               float norm, float* out, int threads) {
  const int64_t columns = (k + kUnit - 1) / kUnit * kUnit, width = std::max<int64_t>(kUnit, block);
  const int64_t pieces = columns / width;
#pragma omp parallel for schedule(static) num_threads(team_of(rows * columns, threads))
  for (int64_t piece = 0; piece < rows * pieces; ++piece) {
    const int64_t row = piece / pieces, first = piece % pieces * width;
    float* values = out + row * columns + first;
    load(x + row * row_stride + first, std::max<int64_t>(0, std::min(width, k - first)), width,
         multiplier ? multiplier + first : nullptr, values);
    if (block) hadamard(values, width, block, norm);
  }
}

// Rows in pieces of several units, by the code for a set of instructions.
void in_pieces(const Functions& functions, const char* x, int dtype, int64_t rows, int64_t k, int64_t row_stride,
               const Target& target, int threads) {
  const int64_t units = (k + kUnit - 1) / kUnit, size = dtype == kFloat32 ? 4 : 2;
  const int64_t span = std::max<int64_t>(1, target.span);
  // 4096 is a multiple of every span but a row's, which ends with it.
  const int64_t width = std::max<int64_t>({4096, target.block, span * kUnit});
  const int64_t pieces = (k + width - 1) / width;
#pragma omp parallel num_threads(team_of(rows * units * kUnit, threads, kQuantizedPerThread))
  {
    const Buffer wide((std::max<int64_t>(kUnit, target.block) + span * kUnit) * 4);
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < rows * pieces; ++piece) {
      const int64_t row = piece / pieces, first = piece % pieces * width;
      const Target part = target.from(row * units + first / kUnit, first);
      functions.quantize(x + (row * row_stride + first) * size, dtype, std::min(width, k - first), part,
                         wide.as<float>());
    }
  }
}

}  // namespace

extern "C" {

// Transform and convert rows of k values to HiF4, as tahf4_compiler.ops.quantize does.
//
// x: [rows, k], rows `row_stride` values apart; dtype 0 float32, 1 bfloat16, 2 float16. target: multiplier [k] or null;
// block: a power of two that divides k rounded up to a multiple of 64, or 0; norm: block ** -0.5; codes [rows, units * 32];
// scales [rows, units]; bits; span. isa: a set of instructions that tahf4_instruction_sets allows, or 0.
void tahf4_quantize(const void* x, int dtype, int64_t rows, int64_t k, int64_t row_stride, const Target* target, int isa,
                    int threads) {
  if (const Functions* functions = functions_of(isa)) {
    in_pieces(*functions, static_cast<const char*>(x), dtype, rows, k, row_stride, *target, threads);
    return;
  }
  const auto run = [&](auto* typed) { quantize(typed, rows, k, row_stride, *target, threads); };
  if (dtype == kFloat32) run(static_cast<const float*>(x));
  if (dtype == kBFloat16) run(static_cast<const BFloat16*>(x));
  if (dtype == kFloat16) run(static_cast<const Float16*>(x));
}

// Transform rows of k values as tahf4_quantize does before it converts them. out: [rows, units * 64].
void tahf4_transform(const void* x, int dtype, int64_t rows, int64_t k, int64_t row_stride, const float* multiplier,
                     int64_t hadamard_block, float norm, float* out, int threads) {
  const auto run = [&](auto* typed) {
    transform(typed, rows, k, row_stride, multiplier, hadamard_block, norm, out, threads);
  };
  if (dtype == kFloat32) run(static_cast<const float*>(x));
  if (dtype == kBFloat16) run(static_cast<const BFloat16*>(x));
  if (dtype == kFloat16) run(static_cast<const Float16*>(x));
}

// Run a program on broadcast inputs, row by row, and convert its result. Not for isa 0.
void tahf4_fused_quantize(const Program* program, const Inputs* inputs, int64_t rows, int64_t columns,
                          const Target* target, int isa, int threads) {
  const Functions* functions = functions_of(isa);
  const int64_t units = (columns + kUnit - 1) / kUnit;
#pragma omp parallel num_threads(team_of(rows * units * kUnit, threads, kQuantizedPerThread))
  {
    const Slots slots(program);
    const Buffer kept((std::max<int64_t>(units * kUnit, kUnit) + target->block) * 4);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const Target part = target->from(row * units, 0);
      functions->quantize_program(*program, *inputs, row, columns, part, slots.values(), kept.as<float>());
    }
  }
}

// Convert rows of units back to float32, as tahf4_compiler.hif4.dequantize does.
//
// codes: [rows, units * 32]; scales: [rows, units]; out: [rows, units * 64].
void tahf4_dequantize(const uint8_t* codes, const int32_t* scales, int64_t rows, int64_t units, float* out,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(team_of(rows * units * kUnit, threads))
  for (int64_t unit = 0; unit < rows * units; ++unit) {
    const int32_t metadata = scales[unit];
    const int code = metadata & 0xFF;
    const int scale_bits = code == kNanScale ? 0x7FC00000 : ((code >> 2) + (127 - 48)) << 23 | (code & 3) << 21;
    const float quarter = bits_as<float>(scale_bits) * 0.25f;
    const uint8_t* bytes = codes + unit * (kUnit / 2);
    int32_t nibbles[kUnit];
    for (int i = 0; i < kUnit / 2; ++i) {
      nibbles[2 * i] = bytes[i] & 15;
      nibbles[2 * i + 1] = bytes[i] >> 4;
    }
    float* values = out + unit * kUnit;
    for (int i = 0; i < kUnit; ++i) {
      const float e8 = (metadata & kMetadata.e8[i]) ? 2.0f : 1.0f;
      const float e16 = (metadata & kMetadata.e16[i]) ? 2.0f : 1.0f;
      const float magnitude = float(nibbles[i] & 7);
      // Powers of two and at most 3 bits: exact in any order.
      const float element = bits_as<float>(bits_as<int32_t>(magnitude) | (nibbles[i] & 8) << 28);
      values[i] = element * (e8 * e16 * quarter);
    }
  }
}

}  // extern "C"
