// HiFloat4 scales of least squared error: tahf4_compiler/scale_search.py, bit for bit.
//
// All arithmetic is float64, in the order that the reference has. Four units are worked on side by side, one a lane of a
// vector, so that sums over a unit's values add whole vectors.

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
  // What is added to the first is rounded to an integer, half to even.
  const T round = fill<T>(0x1.8p52), seven = fill<T>(7.0), eight = fill<T>(8.0), inverse = fill<T>(1.0) / step;
  for (int g = 0; g < kGroups; ++g) {
    T squared[4];
    for (int j = 0; j < 4; ++j) {
      const T m = magnitude[4 * g + j];
      const T nearest = least((least(m * inverse, eight) + round) - round, seven);
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

inline double total(double* errors, int count) {
  for (; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) errors[i] = errors[i] + errors[i + count / 2];
  return errors[0];
}

// The error of a unit as it is encoded.
inline double encoded_error(const Lanes* magnitude, const Lanes* weights, int lane, const uint8_t* codes,
                            uint32_t metadata) {
  double groups[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    const int exponent = (metadata >> (8 + g / 2) & 1) + (metadata >> (16 + g) & 1);
    const double step = step_of(int(metadata & 0xFF) + kOctave * exponent);
    double squared[4];
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * g + j;
      const int nibble = codes[i / 2] >> (4 * (i & 1)) & 7;
      const double difference = nibble * step - magnitude[i][lane];  // signs are the same
      squared[j] = difference * difference;
      if (weights) squared[j] *= weights[i][lane];
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

inline void encode(const Block& block, int lane, const float* x, int64_t count, int code, Exponents bits,
                   uint8_t* codes, int32_t* scale) {
  for (int i = 0; i < kUnit; i += 2) {
    const int exponent = int(bits.e8 >> (i / 8) & 1) + int(bits.e16 >> (i / 4) & 1);
    const double step = step_of(code + kOctave * exponent);
    int pair = 0;
    for (int j = 0; j < 2; ++j) {
      // Not negative: the conversion cuts as floor does.
      const int rounded = int(std::min(block.magnitude[i + j][lane] / step + 0.5, 7.0));
      const int sign = i + j < count && bits_as<int32_t>(x[i + j]) < 0;
      pair |= (rounded | sign << 3) << (4 * j);
    }
    codes[i / 2] = uint8_t(pair);
  }
  *scale = int32_t(uint32_t(code) | bits.e8 << 8 | bits.e16 << 16);
}

struct Search {
  const float* x;
  int64_t k, row_stride, units;
  const double* weights;
  int candidates;
  uint8_t* codes;
  int32_t* scales;

  // Search up to four units from a number on.
  void operator()(int64_t first, int count, Block& block) const {
    int code[kLanes], found[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t unit = first + std::min(l, count - 1), place = unit % units;
      const float* values = x + unit / units * row_stride + place * kUnit;
      const int64_t width = std::min<int64_t>(kUnit, k - place * kUnit);
      code[l] = scales[unit] & 0xFF;
      const bool finite = code[l] != kNanScale;
      if (!finite) code[l] = 0;
      for (int i = 0; i < kUnit; ++i) {
        block.magnitude[i][l] = finite && i < width ? std::abs(double(values[i])) : 0.0;
        if (weights) block.weights[i][l] = weights[place * kUnit + i];
      }
      found[l] = 0;
    }
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
    const auto cost = [&](int offset) {
      const Lanes *fine = block.pairs[candidates + offset], *coarse = block.pairs[candidates + offset + kOctave];
      Lanes sums[kGroups / 2];
      for (int p = 0; p < kGroups / 2; ++p) sums[p] = least(fine[p], coarse[p]);
      for (int half = kGroups / 4; half; half /= 2)
        for (int p = 0; p < half; ++p) sums[p] = sums[p] + sums[p + half];
      return sums[0];
    };
    Lanes best = cost(0);
    for (int near = 1; near <= candidates; ++near) {  // from the default outwards: of equal scales the nearest is taken
      for (const int tried : {near, -near}) {
        const Lanes costs = cost(tried);
        for (int l = 0; l < kLanes; ++l) {
          if (!(costs[l] < best[l]) || code[l] + tried < 0 || code[l] + tried > kLargestCode) continue;
          best[l] = costs[l];
          found[l] = tried;
        }
      }
    }
    for (int l = 0; l < count; ++l) {
      const int64_t unit = first + l, place = unit % units;
      if ((scales[unit] & 0xFF) == kNanScale) continue;
      uint8_t* out = codes + unit * (kUnit / 2);
      if (!(best[l] < encoded_error(block.magnitude, factors, l, out, uint32_t(scales[unit])) * kBetter)) continue;
      const int chosen = code[l] + found[l];
      const Exponents bits = best_exponents(block, weights != nullptr, l, chosen, candidates + found[l]);
      encode(block, l, x + unit / units * row_stride + place * kUnit, k - place * kUnit, chosen, bits, out,
             scales + unit);
    }
  }
};

}  // namespace

extern "C" {

// Replace units by encodings of less squared error where there are any.
//
// x: float32 [rows, k], rows `row_stride` values apart. weights: float64 [units * 64], factors of the squared errors, or
// null. candidates: level-1 scales tried on either side, 0 to 8. codes: [rows, units * 32] and scales: [rows, units], as
// tahf4_quantize gave them for x.
void tahf4_search(const float* x, int64_t rows, int64_t k, int64_t row_stride, const double* weights, int candidates,
                  uint8_t* codes, int32_t* scales, int threads) {
  const int64_t units = (k + kUnit - 1) / kUnit;
  const Search search{x, k, row_stride, units, weights, candidates, codes, scales};
  const int64_t blocks = (rows * units + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(team_of(rows * units * kUnit, threads))
  {
    const Buffer buffer(sizeof(Block));
    Block& block = *new (buffer.data) Block;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i)
      search(i * kLanes, int(std::min<int64_t>(kLanes, rows * units - i * kLanes)), block);
  }
}

}  // extern "C"
