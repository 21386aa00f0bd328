// Attention in 8 bits, as tahf4_compiler/ops/attention.py defines it, bit for bit. Keys and values are quantized into
// panels of 64 lanes once; then each thread takes rows of queries through all keys. Memory grows with the tokens alone.

#include <cmath>

#include "common.h"

using namespace tahf4;

namespace {

namespace plain {
#define TAHF4_WIDE -1
#include "attention.inc"
#undef TAHF4_WIDE
}  // namespace plain

// 64 bytes of each of `count` <= 64 rows as a panel [16][64][4]; other lanes are 0.
void make_panel(const int8_t* rows, int64_t stride, int64_t count, int8_t* panel) {
  if (count < kUnit) std::memset(panel, 0, kPanelBytes);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int word = 0; word < 16; ++word) std::memcpy(panel + word * 256 + lane * 4, rows + lane * stride + word * 4, 4);
}

// Room for the codes and scales of one piece of work.
struct Piece {
  explicit Piece(const Attention& x)
      : codes(std::max(x.units * kUnit, x.channels) * kUnit),
        scales(std::max(x.units * kUnit, x.channels) * 4),
        packed(x.units * kUnit * kUnit / 2),
        turned(x.channels * kUnit * 4) {}
  Buffer codes, scales, packed, turned;
};

const void* row_of(const Attention& x, const void* data, const int64_t* strides, int64_t heads, int64_t head, int64_t row) {
  const int64_t place = head / heads * strides[0] + head % heads * strides[1] + row * strides[2];
  return static_cast<const char*>(data) + place * (x.dtype == kFloat32 ? 4 : 2);
}

// A unit of HiF4 as whole quarters of its level-1 scale: at most 28 in magnitude.
void quarters(const uint8_t* packed, int32_t metadata, int8_t* out) {
  // Bytes that are all ones where an exponent bit doubles an element, four at a time.
  uint32_t words[2][kUnit / 4];
  for (int i = 0; i < kUnit / 4; ++i) {
    words[0][i] = 0u - (uint32_t(metadata) >> (8 + i / 2) & 1);
    words[1][i] = 0u - (uint32_t(metadata) >> (16 + i) & 1);
  }
  uint8_t nibbles[kUnit], twice[2][kUnit];
  std::memcpy(twice, words, sizeof(twice));
  for (int i = 0; i < kUnit / 2; ++i) {
    nibbles[2 * i] = packed[i] & 15;
    nibbles[2 * i + 1] = packed[i] >> 4;
  }
  for (int i = 0; i < kUnit; ++i) {
    uint8_t magnitude = nibbles[i] & 7;
    magnitude = uint8_t(magnitude + (magnitude & twice[0][i]));
    magnitude = uint8_t(magnitude + (magnitude & twice[1][i]));
    const uint8_t sign = uint8_t(0 - (nibbles[i] >> 3));
    out[i] = int8_t(uint8_t((magnitude ^ sign) - sign));
  }
}

// Units of queries or keys in 4 or 8 bits as bytes with scales in float32.
void as_bytes(const Attention& x, const uint8_t* codes, const int32_t* scales, int64_t units, const Piece& piece) {
  for (int64_t unit = 0; unit < units; ++unit) {
    int8_t* const out = piece.codes.as<int8_t>() + unit * kUnit;
    if (x.bits == 4) {
      quarters(codes + unit * code_bytes(4), scales[unit], out);
    } else if (codes != piece.codes.as<uint8_t>()) {
      std::memcpy(out, codes + unit * kUnit, kUnit);
    }
    piece.scales.as<float>()[unit] = x.bits == 4 ? scale_of(scales[unit]) * 0.25f : bits_as<float>(scales[unit]);
  }
}

// Rotated rows of queries or keys.
void quantize_rows(const Attention& x, const void* rows, int64_t stride, int64_t count, int isa, const Piece& piece) {
  uint8_t* const codes = (x.bits == 4 ? piece.packed : piece.codes).as<uint8_t>();
  const Target target = {nullptr, x.block, x.norm, codes, piece.scales.as<int32_t>(), x.bits};
  tahf4_quantize(rows, x.dtype, count, x.width, stride, &target, isa, 1);
  as_bytes(x, codes, piece.scales.as<int32_t>(), count * x.units, piece);
}

void make_keys(const Attention& x, int64_t head, int64_t tile, int isa, const Piece& piece, int8_t* panels,
               int32_t* starts, float* scales) {
  const int64_t key = tile * kUnit, count = std::min<int64_t>(kUnit, x.keys - key), stride = x.units * kUnit;
  if (x.key_codes) {
    const int64_t first = (head * x.keys + key) * x.units;
    as_bytes(x, x.key_codes + first * code_bytes(x.bits), x.key_scales + first, count * x.units, piece);
  } else {
    quantize_rows(x, row_of(x, x.k, x.k_strides, x.key_heads, head, key), x.k_strides[2], count, isa, piece);
  }
  for (int64_t unit = 0; unit < x.units; ++unit) {
    const int8_t* rows = piece.codes.as<int8_t>() + unit * kUnit;
    make_panel(rows, stride, count, panels + unit * kPanelBytes);
    for (int64_t lane = 0; lane < kUnit; ++lane) {
      int32_t sum = 0;
      for (int i = 0; lane < count && i < kUnit; ++i) sum += rows[lane * stride + i];
      starts[unit * kUnit + lane] = -128 * sum;  // codes of queries are stored plus 128
      scales[unit * kUnit + lane] = lane < count ? piece.scales.as<float>()[lane * x.units + unit] : 0.0f;
    }
  }
}

// Values lie token by token and are quantized channel by channel.
template <class Bits>
void turn(const Attention& x, const Bits* values, int64_t stride, int64_t count, Bits* out) {
  for (int64_t channel = 0; channel < x.channels; ++channel)
    for (int64_t token = 0; token < kUnit; ++token)
      out[channel * kUnit + token] = token < count ? values[token * stride + channel] : 0;
}

// Codes and scales of 64 tokens of values, channel by channel.
void quantize_values(const Attention& x, int64_t head, int64_t tile, int64_t count, int isa, const Piece& piece) {
  if (x.value_codes) {
    const int64_t tiles = (x.keys + kUnit - 1) / kUnit;
    const int8_t* codes = x.value_codes + (head * x.keys + tile * kUnit) * x.channels;
    turn(x, codes, x.channels, count, piece.codes.as<int8_t>());
    std::memcpy(piece.scales.data, x.value_scales + (head * tiles + tile) * x.channels, size_t(x.channels) * 4);
    return;
  }
  const void* values = row_of(x, x.v, x.v_strides, x.key_heads, head, tile * kUnit);
  if (x.dtype == kFloat32) {
    turn(x, static_cast<const uint32_t*>(values), x.v_strides[2], count, piece.turned.as<uint32_t>());
  } else {
    turn(x, static_cast<const uint16_t*>(values), x.v_strides[2], count, piece.turned.as<uint16_t>());
  }
  const Target target = {nullptr, 0, 1.0f, piece.codes.as<uint8_t>(), piece.scales.as<int32_t>(), 8};
  tahf4_quantize(piece.turned.data, x.dtype, x.channels, kUnit, kUnit, &target, isa, 1);
}

void make_values(const Attention& x, int64_t head, int64_t tile, int isa, const Piece& piece, int8_t* panels,
                 float* scales) {
  quantize_values(x, head, tile, std::min<int64_t>(kUnit, x.keys - tile * kUnit), isa, piece);
  for (int64_t channel = 0; channel < x.channels; channel += kUnit) {
    const int64_t lanes = std::min<int64_t>(kUnit, x.channels - channel);
    make_panel(piece.codes.as<int8_t>() + channel * kUnit, kUnit, lanes, panels + channel / kUnit * kPanelBytes);
    for (int64_t lane = 0; lane < kUnit; ++lane)
      scales[channel + lane] = lane < lanes ? piece.scales.as<float>()[channel + lane] : 0.0f;
  }
}

}  // namespace

extern "C" {

// isa: a set of instructions that tahf4_instruction_sets allows, or 0.
void tahf4_attention(const Attention* given, int isa, int threads) {
  const Attention& x = *given;
  const int64_t tiles = (x.keys + kUnit - 1) / kUnit, parts = (x.channels + kUnit - 1) / kUnit;
  const int64_t count = x.batch * x.key_heads * tiles, shared = x.heads / x.key_heads;
  const Buffer keys(count * x.units * kPanelBytes), starts(count * x.units * kUnit * 4);
  const Buffer key_scales(count * x.units * kUnit * 4), value_scales(count * parts * kUnit * 4);
  const Buffer values(count * parts * kPanelBytes);
  const Panels panels = {keys.as<int8_t>(), starts.as<int32_t>(), key_scales.as<float>(), values.as<int8_t>(),
                         value_scales.as<float>(), tiles, parts};
  const Functions* functions = functions_of(isa);
  const auto attend = functions ? functions->attend : plain::attend;
  // As many rows as keep the panels of a block of keys in the cache.
  const int64_t blocks = (x.rows + kUnit - 1) / kUnit, width = x.units * kUnit;
#pragma omp parallel num_threads(team_of(x.batch * x.heads * x.rows * x.keys, threads))
  {
    const Piece piece(x);
    const Buffer rows(kUnit * width), factors(kUnit * x.units * 4), sums(kUnit * parts * kUnit * 4);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = i / tiles, tile = i % tiles, k = i * x.units, v = i * parts;
      make_keys(x, head, tile, isa, piece, keys.as<int8_t>() + k * kPanelBytes, starts.as<int32_t>() + k * kUnit,
                key_scales.as<float>() + k * kUnit);
      make_values(x, head, tile, isa, piece, values.as<int8_t>() + v * kPanelBytes,
                  value_scales.as<float>() + v * kUnit);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < x.batch * x.heads * blocks; ++i) {
      const int64_t head = i / blocks, row = i % blocks * kUnit, height = std::min<int64_t>(kUnit, x.rows - row);
      quantize_rows(x, row_of(x, x.q, x.q_strides, x.heads, head, row), x.q_strides[2], height, isa, piece);
      std::fill_n(rows.as<uint8_t>(), kUnit * width, uint8_t(0));
      std::fill_n(factors.as<float>(), kUnit * x.units, 0.0f);
      for (int64_t r = 0; r < height * width; ++r) rows.as<uint8_t>()[r] = uint8_t(piece.codes.as<int8_t>()[r] + 128);
      for (int64_t r = 0; r < height * x.units; ++r) factors.as<float>()[r] = piece.scales.as<float>()[r] * x.factor;
      const int64_t key_head = head / x.heads * x.key_heads + head % x.heads / shared;
      attend(x, panels, key_head, head * x.rows + row, height, rows.as<uint8_t>(), factors.as<float>(),
             sums.as<float>());
    }
  }
}

}  // extern "C"
