// What the C++ files of this folder share: bits, types, and the description of a program.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && \
    defined(__BMI2__) && (defined(__clang__) || __GNUC__ >= 11)
#define TAHF4_X86 1
#include <immintrin.h>
#endif

namespace tahf4 {

constexpr int kUnit = 64;
constexpr int kNanScale = 0xFF;
constexpr int kFiniteEnd = 0x7F800000;  // bits of infinity: magnitudes below are finite

enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Isa { kNone = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3, kAmx = 4 };
constexpr const char* kSetNames[] = {"none", "avx2", "avx_vnni", "avx512_vnni", "amx"};

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }
inline float to_float(Float16 value) {
  // The exponent of float32 is biased by 112 more; a product with 2**112 also makes subnormal numbers normal.
  const uint32_t magnitude = value.bits & 0x7FFFu;
  uint32_t bits = bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return bits_as<float>(bits | (uint32_t(value.bits & 0x8000u) << 16));
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline int round_bits(int bits, int drop) {
  bits += ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1);
  return (bits >> drop) << drop;
}

// The level-1 scale of a unit, E6M2, from its largest magnitude.
inline int level1_scale(float unit_max) {
  const float scale = bits_as<float>(round_bits(bits_as<int>(unit_max * 0.142578125f), 16));
  const float clamped = std::min(std::max(scale, 0x1p-48f), 49152.0f);
  return (round_bits(bits_as<int>(clamped), 21) >> 21) - ((127 - 48) << 2);
}

// Its reciprocal, rounded to bfloat16.
inline float reciprocal(int code) {
  constexpr int kFraction[4] = {0, 77 << 16, 43 << 16, 18 << 16};
  const int mantissa = code & 3;
  return bits_as<float>(((127 + 48 - (code >> 2) - (mantissa > 0)) << 23) | kFraction[mantissa]);
}

// The rounding "least_error" tries so many level-1 scales: see tahf4_compiler/format/levels.py. Errors are whole numbers
// there, in 1/256 of the power of two in the first: a value times this.
constexpr int kLeastErrorScales = 4;
inline float grain_of(int code) { return bits_as<float>((127 + 56 - (code >> 2)) << 23); }

inline float scale_of(int32_t metadata) {
  const uint32_t code = metadata & 0xFF;
  return bits_as<float>(code == kNanScale ? 0x7FC00000u : ((code >> 2) + (127 - 48)) << 23 | (code & 3) << 21);
}

// Activations in 8 bits: see tahf4_compiler/format/int8.py.
constexpr float kMostCode = 127.0f, kLeastMagnitude = 0x1p-100f;

// Room for a unit's codes.
inline int64_t code_bytes(int bits) { return kUnit * bits / 8; }

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

// ---------------------------------------------------------------------------------------------------------------------
// Programs: what is computed before a quantization or after a product (programs.py writes them). Program and
// Instruction are laid out for ctypes.

enum Op : int32_t {
  kLoad,     // input a
  kProduct,  // what a product gave, in its dtype
  kReduced,  // what the reduction read, from the row kept
  kTo,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kNeg,
  kAbs,
  kExp,
  kSqrt,
  kRsqrt,
  kSigmoid,
  kRelu,
  kSilu,
  kGelu,
  kGeluTanh,
  kSquare,
  kNormalize,  // (a - mean) * factor [* b] [+ c]
  kMean,
  kMatmul,  // input a times input b: see Input, and branches.inc
};

// Slot `to` becomes op(slots a, b, c), rounded to a dtype. Slots hold 64 values.
struct Instruction {
  int32_t op, dtype, to, a, b, c;
};

enum Reduction : int32_t { kNothing, kLayerNorm, kRmsNorm, kMeanOf };

struct Program {
  const Instruction* before;  // the reduction: they end with the value that it reads
  const Instruction* after;   // it, or the whole program if there is none
  const float* constants;     // of the first slots
  int32_t before_count, after_count, constant_count, slots;
  int32_t reduced, result, reduction;  // slots; Reduction
  float epsilon;
};

// A tensor that broadcasts to [sizes..., columns]; or a factor of kMatmul, without holes: the first [sizes..., r] in
// float32, the second [r, columns].
struct Input {
  const void* data;
  int32_t dtype, column_stride;  // 0 or 1; r of a first factor
  const int64_t* strides;        // of the leading axes; none of a factor
};

struct Inputs {
  const Input* list;
  const int64_t* sizes;  // of the leading axes
  int32_t count, axes;
};

constexpr int kMostInputs = 16, kMostAxes = 16;

// What operators add to a span for another rounding: ROUNDED and SEARCHED of format/spans.py.
constexpr int kRounded = 8;    // in-group values are rounded to bfloat16 before they become elements
constexpr int kSearched = 16;  // of four level-1 scales, that of least squared error
inline int64_t units_of(int64_t form) { return form < 0 ? -1 : form % kRounded; }
inline int rounding_of(int64_t form) { return int(form - units_of(form)); }

// Where a quantization goes, and what happens before it.
struct Target {
  const float* multiplier;  // or null
  int64_t block;            // of the Hadamard transform, or 0
  float norm;
  uint8_t* codes;           // int8 with 8 bits
  int32_t* scales;          // the bits of a float32 with 8 bits
  int32_t bits;             // 4: HiF4, or 8
  int32_t rounding;         // kRounded, kSearched or 0
  int64_t span;             // units that share a level-1 scale: 2, 4, or all of a row; 0 or 1: each has its own
  // The same from a unit and its channel on.
  Target from(int64_t unit, int64_t column) const {
    return {multiplier ? multiplier + column : nullptr, block, norm, codes + unit * code_bytes(bits), scales + unit, bits,
            rounding, span};
  }
};

// Room for the slots of a program, or of none; its constants are in place.
struct Slots {
  explicit Slots(const Program* program) : memory((program ? program->slots : 1) * kUnit * 4) {
    for (int slot = 0; program && slot < program->constant_count; ++slot)
      std::fill_n(values() + slot * kUnit, kUnit, program->constants[slot]);
  }
  float* values() const { return memory.as<float>(); }
  Buffer memory;
};

// ---------------------------------------------------------------------------------------------------------------------
// Attention in 8 bits: see tahf4_compiler/ops/attention.py.

struct Attention {
  const void *q, *k, *v;  // [B, heads, rows, width], [B, key_heads, keys, width], [B, key_heads, keys, channels]
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of batch, head and row, in values; channels are contiguous
  const float* mask;         // what is added to the scores of a softmax to the base of 2, or null
  int64_t mask_strides[4];   // of batch, head, row and key
  float* out;                // [B, heads, rows, channels]
  int64_t out_strides[4];
  float* lse;                // [B, heads, rows]: the logarithm of a row's sum of exponentials, or null
  int64_t batch, heads, key_heads, rows, keys, width, channels;
  int64_t block, units;      // of the rotation; of 64 in the width
  float norm, factor;        // of the rotation; of the scores
  int32_t dtype, causal;
  int32_t bits;              // of queries and keys: 8, or 4 (HiF4)
  // Keys and values that come quantized, in place of k and v, or null: [B, key_heads, keys, units * code_bytes(bits)] with
  // [.., units], and [B, key_heads, keys, channels] with [B, key_heads, tiles, channels].
  const uint8_t* key_codes;
  const int32_t* key_scales;
  const int8_t* value_codes;
  const float* value_scales;
};

// Keys and values for dots with 64 keys, or channels, at a time.
struct Panels {
  const int8_t* keys;       // [B * key_heads, tiles, units, 16, 64 keys, 4]
  const int32_t* starts;    // [B * key_heads, tiles, units, 64]: -128 times the sum of a key's codes
  const float* key_scales;  // [B * key_heads, tiles, units, 64]
  const int8_t* values;     // [B * key_heads, tiles, parts, 16, 64 channels, 4]
  const float* value_scales;
  int64_t tiles, parts;
};

constexpr int64_t kPanelBytes = kUnit * kUnit;

// What is compiled for each set of instructions.
struct Functions {
  // Rows are pieces of `count` values, a multiple of the block and of the span, unless the row ends before. wide: room
  // for a block, at least 64 values, and a span behind it.
  void (*quantize)(const void* x, int dtype, int64_t count, const Target& target, float* wide);
  // One row of an activation through a program into units. row_values: room for the row, as whole units, and with a span
  // for a block behind it.
  void (*quantize_program)(const Program& program, const Inputs& inputs, int64_t row, int64_t columns,
                           const Target& target, float* slots, float* row_values);
  // One row of a product, `count` <= 64 columns from `column`, plus bias, rounded, through a program (or null), in place.
  void (*finish)(const Program* program, const Inputs& inputs, int64_t row, int64_t column, int64_t count,
                 const float* bias, int dtype, float* slots, float* values);
  void (*store)(const float* values, int64_t count, int dtype, void* out);
  // Rows of r values times [r, 64], to rows `stride` apart.
  void (*multiply)(const float* left, int64_t rows, int64_t r, const float* right, float* out, int64_t stride);
  // See attention.inc.
  void (*attend)(const Attention& x, const Panels& panels, int64_t head, int64_t first, int64_t count,
                 const uint8_t* rows, const float* factors, float* sums);
};

// ---------------------------------------------------------------------------------------------------------------------
// Products.

struct Operands {
  const uint8_t* codes;  // [m, units * 32]; with 8 bits int8 [m, units * 64]
  const int32_t* scales;  // [m, units]; with 8 bits float32
  const uint8_t* weight_codes;  // [n, units * 32]
  const int32_t* weight_scales;  // [n, units]
  const float* bias;  // [n] or null
  int64_t m, n, units;
  int32_t dtype;  // that the product, bias included, is rounded to
  int32_t bits;   // of the activation
  int64_t span;   // units that share their level-1 scales on both sides, at least 1
};

// What becomes of a product: a tensor, or units if target.codes is not null.
struct Result {
  const Program* program;  // or null
  const Inputs* inputs;
  void* out;  // [m, n]
  int32_t dtype;
  Target target;
};

// Null for kNone.
const Functions* functions_of(int isa);

// Fewer values than this are not worth a thread: a few microseconds.
constexpr int64_t kValuesPerThread = 1 << 14, kQuantizedPerThread = 1 << 12;

inline int team_of(int64_t values, int threads, int64_t least = kValuesPerThread) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, values / least)));
}

}  // namespace tahf4

// What other files call, Python too. They say what it does where they define it.
extern "C" {
int tahf4_instruction_sets();
void tahf4_quantize(const void* x, int dtype, int64_t rows, int64_t k, int64_t row_stride, const tahf4::Target* target,
                    int isa, int threads);
void tahf4_fused_quantize(const tahf4::Program* program, const tahf4::Inputs* inputs, int64_t rows, int64_t columns,
                          const tahf4::Target* target, int isa, int threads);
void tahf4_dequantize(const uint8_t* codes, const int32_t* scales, int64_t rows, int64_t units, float* out, int threads);
void tahf4_linear(const tahf4::Operands* operands, const tahf4::Result* result, int isa, int threads);
void tahf4_attention(const tahf4::Attention* given, int isa, int threads);
}
