// Attention in 8 bits, as tahf4_compiler/ops/attention.py defines it, bit for bit. Keys and values are laid out as panels
// of 64 lanes once; then each thread takes rows of queries through all keys. Memory grows with the tokens alone.

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

void make_keys(const Attention& x, int64_t head, int64_t tile, int8_t* panels, int32_t* starts, float* scales) {
  const int64_t key = tile * kUnit, count = std::min<int64_t>(kUnit, x.keys - key);
  for (int64_t unit = 0; unit < x.units; ++unit) {
    const int8_t* rows = x.k + ((head * x.keys + key) * x.units + unit) * kUnit;
    make_panel(rows, x.units * kUnit, count, panels + unit * kPanelBytes);
    for (int64_t lane = 0; lane < kUnit; ++lane) {
      int32_t sum = 0;
      for (int i = 0; lane < count && i < kUnit; ++i) sum += rows[lane * x.units * kUnit + i];
      starts[unit * kUnit + lane] = -128 * sum;  // codes of queries are stored plus 128
      scales[unit * kUnit + lane] = lane < count ? x.k_scales[(head * x.keys + key + lane) * x.units + unit] : 0.0f;
    }
  }
}

void make_values(const Attention& x, int64_t head, int64_t tile, int64_t tiles, int8_t* panels, float* scales) {
  for (int64_t channel = 0; channel < x.channels; channel += kUnit) {
    const int64_t count = std::min<int64_t>(kUnit, x.channels - channel), row = head * x.channels + channel;
    make_panel(x.v + (row * tiles + tile) * kUnit, tiles * kUnit, count, panels + channel / kUnit * kPanelBytes);
    for (int64_t lane = 0; lane < kUnit; ++lane)
      scales[channel + lane] = lane < count ? x.v_scales[(row + lane) * tiles + tile] : 0.0f;
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
  const int64_t blocks = (x.rows + kUnit - 1) / kUnit;
#pragma omp parallel num_threads(team_of(x.batch * x.heads * x.rows * x.keys, threads))
  {
    const Buffer rows(kUnit * x.units * kUnit), factors(kUnit * x.units * 4), sums(kUnit * parts * kUnit * 4);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = i / tiles, tile = i % tiles, k = i * x.units, v = i * parts;
      make_keys(x, head, tile, keys.as<int8_t>() + k * kPanelBytes, starts.as<int32_t>() + k * kUnit,
                key_scales.as<float>() + k * kUnit);
      make_values(x, head, tile, tiles, values.as<int8_t>() + v * kPanelBytes, value_scales.as<float>() + v * kUnit);
    }
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < x.batch * x.heads * blocks; ++piece) {
      const int64_t head = piece / blocks, row = piece % blocks * kUnit, first = head * x.rows + row;
      const int64_t height = std::min<int64_t>(kUnit, x.rows - row), width = x.units * kUnit;
      // Rows that are not there are like the last one.
      for (int64_t r = 0; r < kUnit; ++r) {
        const int64_t source = first + std::min(r, height - 1);
        for (int64_t i = 0; i < width; ++i) rows.as<uint8_t>()[r * width + i] = uint8_t(x.q[source * width + i] + 128);
        for (int64_t i = 0; i < x.units; ++i)
          factors.as<float>()[r * x.units + i] = x.q_scales[source * x.units + i] * x.factor;
      }
      const int64_t batch = head / x.heads, key_head = batch * x.key_heads + head % x.heads / shared;
      attend(x, panels, key_head, first, height, rows.as<uint8_t>(), factors.as<float>(), sums.as<float>());
    }
  }
}

}  // extern "C"
