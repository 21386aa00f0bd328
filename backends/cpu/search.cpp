// HiFloat4 scales of least squared error: tahf4_compiler/scale_search.py, bit for bit.
//
// All arithmetic is float64, in the order that the reference has. Four units are worked on side by side, one a lane of a
// vector, so that sums over a unit's values add whole vectors.

#include <cmath>

#include "common.h"

using namespace tahf4;

namespace {

constexpr int kLanes = 4;
constexpr int kGroups = 16;  // of four values
constexpr int kMostCandidates = 8, kOctave = 4, kLargestCode = 0xFE;
constexpr int kMostOffsets = 2 * kMostCandidates + 2 * kOctave + 1;
constexpr double kBetter = 1.0 - 0x1p-40;

#if defined(__GNUC__)
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));
#else
struct Lanes {
  double at[kLanes];
  double& operator[](int i) { return at[i]; }
  double operator[](int i) const { return at[i]; }
};
#define TAHF4_EACH(op)                                                   \
  inline Lanes operator op(Lanes a, Lanes b) {                           \
    for (int i = 0; i < kLanes; ++i) a.at[i] = a.at[i] op b.at[i];       \
    return a;                                                            \
  }
TAHF4_EACH(+) TAHF4_EACH(-) TAHF4_EACH(*) TAHF4_EACH(/)
#undef TAHF4_EACH
#endif

template <class T>
inline T fill(double value);
template <>
inline double fill<double>(double value) {
  return value;
}
template <>
inline Lanes fill<Lanes>(double value) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result[i] = value;
  return result;
}

inline double least(double a, double b) { return std::min(a, b); }
inline Lanes least(Lanes a, Lanes b) {
#if defined(__GNUC__)
  return b < a ? b : a;
#else
  for (int i = 0; i < kLanes; ++i) a[i] = std::min(a[i], b[i]);
  return a;
#endif
}

// E6M2 / 4 of a code, also of codes that there are not.
inline double step_of(int code) {
  const int octave = code >> 2;
  return double(4 + (code & 3)) * bits_as<double>(uint64_t(octave - 48 - 4 + 1023) << 52);
}

// The squared error of each group of 4, each lane under a step of its own. weights: of the values, or null.
template <class T>
inline void measure(const T* magnitude, T step, const T* weights, T* out) {
  // What is added to the first is rounded to an integer, half to even; what is too large for that stays above 7.
  const T round = fill<T>(0x1.8p52), seven = fill<T>(7.0), inverse = fill<T>(1.0) / step;
  for (int g = 0; g < kGroups; ++g) {
    T squared[4];
    for (int j = 0; j < 4; ++j) {
      const T m = magnitude[4 * g + j];
      const T nearest = least((m * inverse + round) - round, seven);
      const T difference = nearest * step - m;
      squared[j] = difference * difference;
      if (weights) squared[j] = squared[j] * weights[4 * g + j];
    }
    out[g] = (squared[0] + squared[1]) + (squared[2] + squared[3]);
  }
}

// What is known about the units that are searched side by side.
struct Block {
  Lanes magnitude[kUnit], weights[kUnit];
  Lanes errors[kMostOffsets][kGroups];  // of groups of 4, by offset of the step's code from the lowest that is tried
  Lanes pairs[kMostOffsets][kGroups / 2];
};

inline Lanes total(Lanes* errors, int count) {
  for (int half = count / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) errors[i] = errors[i] + errors[i + half];
  return errors[0];
}

struct Unit {
  const float* x;
  int64_t width;  // values before the padding
  uint8_t* codes;
  int32_t* scale;
};

// The error of units as they are encoded.
inline Lanes encoded_errors(const Lanes* magnitude, const Lanes* weights, const Unit* units) {
  Lanes elements[kUnit], steps[kGroups], groups[kGroups];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t metadata = uint32_t(*units[l].scale);
    for (int g = 0; g < kGroups; ++g) {
      const int exponent = (metadata >> (8 + g / 2) & 1) + (metadata >> (16 + g) & 1);
      steps[g][l] = step_of(int(metadata & 0xFF) + kOctave * exponent);
    }
    for (int i = 0; i < kUnit / 2; ++i) {
      elements[2 * i][l] = units[l].codes[i] & 7;
      elements[2 * i + 1][l] = units[l].codes[i] >> 4 & 7;
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    Lanes squared[4];
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * g + j;
      const Lanes difference = elements[i] * steps[g] - magnitude[i];  // signs are the same
      squared[j] = difference * difference;
      if (weights) squared[j] = squared[j] * weights[i];
    }
    groups[g] = (squared[0] + squared[1]) + (squared[2] + squared[3]);
  }
  return total(groups, kGroups);
}

struct Exponents {
  uint32_t e8 = 0, e16 = 0;
};

// The best bits for one level-1 scale; 0 where equal. Errors of groups of 4 under its step, twice and four times it.
inline Exponents exponents(const double* fine, const double* middle, const double* coarse, const bool* counts) {
  Exponents found;
  for (int p = 0; p < kGroups / 2; ++p) {
    double low[2], high[2];
    for (int j = 0; j < 2; ++j) {
      const int g = 2 * p + j;
      low[j] = counts[g] ? std::min(fine[g], middle[g]) : 0.0;
      high[j] = counts[g] ? std::min(middle[g], coarse[g]) : 0.0;
    }
    const bool e8 = high[0] + high[1] < low[0] + low[1];
    found.e8 |= uint32_t(e8) << p;
    for (int g = 2 * p; g < 2 * p + 2; ++g)
      found.e16 |= uint32_t(e8 ? coarse[g] < middle[g] : middle[g] < fine[g]) << g;
  }
  return found;
}

inline Exponents best_exponents(const Block& block, bool weighted, int lane, int code, int at) {
  double errors[3][kGroups];
  bool counts[kGroups];
  bool dead = false;
  for (int g = 0; g < kGroups; ++g) {
    counts[g] = true;
    for (int level = 0; level < 3; ++level) errors[level][g] = block.errors[at + kOctave * level][g][lane];
  }
  if (weighted) {
    bool live[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      live[g] = false;
      for (int j = 0; j < 4; ++j) live[g] = live[g] || block.weights[4 * g + j][lane] > 0;
      dead = dead || !live[g];
    }
    if (dead) {  // what has no weight decides among equals: a group of 4 by itself, of 8 only where both have none
      double magnitude[kUnit], weights[kUnit];
      for (int i = 0; i < kUnit; ++i) {
        magnitude[i] = block.magnitude[i][lane];
        weights[i] = live[i / 4] ? block.weights[i][lane] : 1.0;
      }
      for (int level = 0; level < 3; ++level)
        measure(magnitude, step_of(code + kOctave * level), weights, errors[level]);
      for (int g = 0; g < kGroups; ++g) counts[g] = live[g] || !(live[g & ~1] || live[g | 1]);
    }
  }
  return exponents(errors[0], errors[1], errors[2], counts);
}

// Encode those units that `wanted` names.
inline void encode(const Lanes* magnitude, const int* code, const Exponents* bits, const bool* wanted,
                   const Unit* units) {
  Lanes rounded[kUnit];
  for (int g = 0; g < kGroups; ++g) {
    Lanes step;
    for (int l = 0; l < kLanes; ++l)
      step[l] = step_of(code[l] + kOctave * int((bits[l].e8 >> (g / 2) & 1) + (bits[l].e16 >> g & 1)));
    for (int i = 4 * g; i < 4 * g + 4; ++i) rounded[i] = least(magnitude[i] / step + fill<Lanes>(0.5), fill<Lanes>(7.0));
  }
  for (int l = 0; l < kLanes; ++l) {
    if (!wanted[l]) continue;
    int32_t nibbles[kUnit];
    for (int i = 0; i < kUnit; ++i) nibbles[i] = int32_t(rounded[i][l]);  // not negative: it is cut as floor does
    for (int64_t i = 0; i < units[l].width; ++i) nibbles[i] |= int32_t(bits_as<uint32_t>(units[l].x[i]) >> 28 & 8);
    for (int i = 0; i < kUnit / 2; ++i) units[l].codes[i] = uint8_t(nibbles[2 * i] | nibbles[2 * i + 1] << 4);
    *units[l].scale = int32_t(uint32_t(code[l]) | bits[l].e8 << 8 | bits[l].e16 << 16);
  }
}

struct Search {
  const float* x;
  int64_t k, row_stride, units;
  const double* weights;
  int candidates;
  uint8_t* codes;
  int32_t* scales;

  // Take up to four units in, from a number on.
  void load(int64_t first, int count, Block& block, int* code, Unit* mine) const {
    for (int l = 0; l < kLanes; ++l) {
      const int64_t unit = first + std::min(l, count - 1), place = unit % units;
      const float* values = x + unit / units * row_stride + place * kUnit;
      const int64_t width = std::min<int64_t>(kUnit, k - place * kUnit);
      mine[l] = Unit{values, width, codes + unit * (kUnit / 2), scales + unit};
      code[l] = scales[unit] & 0xFF;
      const bool finite = code[l] != kNanScale;
      if (!finite) code[l] = 0;
      for (int i = 0; i < kUnit; ++i) block.magnitude[i][l] = finite && i < width ? std::abs(double(values[i])) : 0.0;
      if (weights)
        for (int i = 0; i < kUnit; ++i) block.weights[i][l] = weights[place * kUnit + i];
    }
  }

  // The errors of groups under every scale that is tried.
  void measure_all(const int* code, Block& block) const {
    const Lanes* factors = weights ? block.weights : nullptr;
    const int offsets = 2 * candidates + 2 * kOctave + 1;
    for (int at = 0; at < offsets; ++at) {
      Lanes step;
      for (int l = 0; l < kLanes; ++l) step[l] = step_of(code[l] + at - candidates);
      measure(block.magnitude, step, factors, block.errors[at]);
    }
    for (int at = 0; at < offsets - kOctave; ++at) {
      const Lanes *fine = block.errors[at], *coarse = block.errors[at + kOctave];
      for (int p = 0; p < kGroups / 2; ++p)
        block.pairs[at][p] = least(fine[2 * p], coarse[2 * p]) + least(fine[2 * p + 1], coarse[2 * p + 1]);
    }
  }

  // The least error of units under a scale so far from the default one.
  Lanes cost(const Block& block, int offset) const {
    const Lanes *fine = block.pairs[candidates + offset], *coarse = block.pairs[candidates + offset + kOctave];
    Lanes sums[kGroups / 2];
    for (int p = 0; p < kGroups / 2; ++p) sums[p] = least(fine[p], coarse[p]);
    return total(sums, kGroups / 2);
  }

  // Search the scale of a span, from a unit on: its errors are added in the order of K. Two passes over the units.
  void joint(int64_t first, int64_t count, Block& block) const {
    const Lanes* factors = weights ? block.weights : nullptr;
    int code[kLanes];
    Unit mine[kLanes];
    double costs[2 * kMostCandidates + 1] = {}, before = 0.0;
    if ((scales[first] & 0xFF) == kNanScale) return;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int width = int(std::min<int64_t>(kLanes, count - i));
      load(first + i, width, block, code, mine);
      measure_all(code, block);
      const Lanes encoded = encoded_errors(block.magnitude, factors, mine);
      for (int l = 0; l < width; ++l) before += encoded[l];
      for (int offset = -candidates; offset <= candidates; ++offset) {
        const Lanes found = cost(block, offset);
        for (int l = 0; l < width; ++l) costs[candidates + offset] += found[l];
      }
    }
    int found = 0;
    for (int near = 1; near <= candidates; ++near)
      for (const int tried : {near, -near})
        if (costs[candidates + tried] < costs[candidates + found] && code[0] + tried >= 0 &&
            code[0] + tried <= kLargestCode)
          found = tried;
    if (!(costs[candidates + found] < before * kBetter)) return;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int width = int(std::min<int64_t>(kLanes, count - i));
      load(first + i, width, block, code, mine);
      measure_all(code, block);
      bool wanted[kLanes];
      Exponents bits[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        wanted[l] = l < width;
        code[l] += found;
        bits[l] = best_exponents(block, weights != nullptr, l, code[l], candidates + found);
      }
      encode(block.magnitude, code, bits, wanted, mine);
    }
  }

  // Search up to four units from a number on.
  void operator()(int64_t first, int count, Block& block) const {
    int code[kLanes], found[kLanes] = {};
    Unit mine[kLanes];
    load(first, count, block, code, mine);
    measure_all(code, block);
    const Lanes* factors = weights ? block.weights : nullptr;
    Lanes best = cost(block, 0);
    for (int near = 1; near <= candidates; ++near) {  // from the default outwards: of equal scales the nearest is taken
      for (const int tried : {near, -near}) {
        const Lanes costs = cost(block, tried);
        for (int l = 0; l < kLanes; ++l) {
          if (!(costs[l] < best[l]) || code[l] + tried < 0 || code[l] + tried > kLargestCode) continue;
          best[l] = costs[l];
          found[l] = tried;
        }
      }
    }
    const Lanes before = encoded_errors(block.magnitude, factors, mine);
    bool better[kLanes];
    Exponents bits[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      better[l] = l < count && (*mine[l].scale & 0xFF) != kNanScale && best[l] < before[l] * kBetter;
      code[l] += found[l];
      if (better[l]) bits[l] = best_exponents(block, weights != nullptr, l, code[l], candidates + found[l]);
    }
    encode(block.magnitude, code, bits, better, mine);
  }
};

}  // namespace

extern "C" {

// Replace units by encodings of less squared error where there are any.
//
// x: float32 [rows, k], rows `row_stride` values apart. weights: float64 [units * 64], factors of the squared errors, or
// null. candidates: level-1 scales tried on either side, 0 to 8. codes: [rows, units * 32] and scales: [rows, units], as
// tahf4_quantize gave them for x. span: units that share a level-1 scale, 0 for a row.
void tahf4_search(const float* x, int64_t rows, int64_t k, int64_t row_stride, const double* weights, int candidates,
                  int64_t span, uint8_t* codes, int32_t* scales, int threads) {
  const int64_t units = (k + kUnit - 1) / kUnit;
  const Search search{x, k, row_stride, units, weights, candidates, codes, scales};
  const int64_t together = span ? span : units, groups = (units + together - 1) / together;
  const int64_t blocks = together == 1 ? (rows * units + kLanes - 1) / kLanes : rows * groups;
#pragma omp parallel num_threads(team_of(rows * units * kUnit, threads))
  {
    const Buffer buffer(sizeof(Block));
    Block& block = *new (buffer.data) Block;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      if (together > 1) {
        const int64_t first = i % groups * together;
        search.joint(i / groups * units + first, std::min(together, units - first), block);
        continue;
      }
      search(i * kLanes, int(std::min<int64_t>(kLanes, rows * units - i * kLanes)), block);
    }
  }
}

// One unit of a reconstructed weight: round_unit of tahf4_compiler/format/reconstruct.py, bit for bit. Rows do not meet.
void tahf4_round_unit(float* values, int64_t rows, const float* steps, const float* factor, uint8_t* codes,
                      float* errors, int threads) {
#pragma omp parallel for schedule(static) num_threads(team_of(rows * kUnit * kUnit, threads))
  for (int64_t row = 0; row < rows; ++row) {
    float* value = values + row * kUnit;
    const float* step = steps + row * kUnit;
    for (int j = 0; j < kUnit; ++j) {
      const float* moves = factor + j * kUnit;
      const float magnitude = std::min(std::floor(std::fabs(value[j]) / step[j] + 0.5f), 7.0f);
      const float error = (value[j] - std::copysign(magnitude, value[j]) * step[j]) / moves[j];
      errors[row * kUnit + j] = error;
      for (int i = j + 1; i < kUnit; ++i) value[i] -= error * moves[i];
      const uint8_t nibble = uint8_t(uint8_t(magnitude) | (std::signbit(value[j]) ? 8 : 0));
      uint8_t& code = codes[(row * kUnit + j) / 2];
      code = j % 2 ? uint8_t(code | nibble << 4) : nibble;
    }
  }
}

// descend_unit of the same file, bit for bit.
void tahf4_descend_unit(float* rounded, int64_t rows, float* slopes, const float* steps, const float* moments,
                        int threads) {
#pragma omp parallel for schedule(static) num_threads(team_of(rows * kUnit * kUnit, threads))
  for (int64_t row = 0; row < rows; ++row) {
    float* value = rounded + row * kUnit;
    float* slope = slopes + row * kUnit;
    const float* step = steps + row * kUnit;
    for (int j = 0; j < kUnit; ++j) {
      const float* mine = moments + j * kUnit;
      const float wanted = value[j] - slope[j] / mine[j];
      const float magnitude = std::min(std::floor(std::fabs(wanted) / step[j] + 0.5f), 7.0f);
      const float moved = std::copysign(magnitude * step[j], wanted) - value[j];
      if (!(moved * (2.0f * slope[j] + moved * mine[j]) < 0.0f)) continue;
      value[j] += moved;
      for (int i = 0; i < kUnit; ++i) slope[i] += moved * mine[i];
    }
  }
}

}  // extern "C"
