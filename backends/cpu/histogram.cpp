// The histogram that calibration collects: channel by channel, in one pass over an activation.

#include "common.h"

using namespace tahf4;

namespace {

constexpr int kBuckets = 98;
constexpr int64_t kAhead = 8;  // rows: a piece of the next row is far away, where no hardware looks for it

template <class T>
inline void prefetch(const T* x, int count) {
#if defined(__GNUC__)
  for (int i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(x + i);
#endif
}

// What one piece of a row adds to `width` channels; W > 0 fixes the width.
template <int W, class T>
inline int64_t histogram_piece(const T* x, int width, int32_t* counts, float* maxima, double* squares) {
  constexpr int kMost = W > 0 ? W : kUnit;
  if (W > 0) width = W;
  int32_t place[kMost];
  int32_t largest = 0;
  for (int i = 0; i < width; ++i) {
    const int32_t bits = bits_as<int32_t>(to_float(x[i])) & 0x7FFFFFFF;
    largest = std::max(largest, bits);
    const int32_t bucket = std::min(std::max((bits >> 21) - ((127 - 10) << 2) + 1, 0), kBuckets - 1);
    place[i] = bucket + i * kBuckets;
  }
  if (largest < kFiniteEnd) {
    for (int i = 0; i < width; ++i) {
      const float value = to_float(x[i]);
      const float magnitude = bits_as<float>(bits_as<int32_t>(value) & 0x7FFFFFFF);
      maxima[i] = magnitude > maxima[i] ? magnitude : maxima[i];
      squares[i] += double(value) * double(value);
    }
    for (int i = 0; i < width; ++i) ++counts[place[i]];
    return 0;
  }
  int64_t nonfinite = 0;
  for (int i = 0; i < width; ++i) {
    const float value = to_float(x[i]);
    const float magnitude = bits_as<float>(bits_as<int32_t>(value) & 0x7FFFFFFF);
    if (bits_as<int32_t>(magnitude) >= kFiniteEnd) {
      ++nonfinite;
      continue;
    }
    maxima[i] = std::max(maxima[i], magnitude);
    squares[i] += double(value) * double(value);
    ++counts[place[i]];
  }
  return nonfinite;
}

template <class T>
void histogram(const T* x, int64_t rows, int64_t channels, int64_t row_stride, int32_t* counts, float* maxima,
               double* squares, int64_t* nonfinite, int threads) {
  const int64_t pieces = (channels + kUnit - 1) / kUnit;
  int64_t found = 0;
#pragma omp parallel for schedule(static) reduction(+ : found) num_threads(team_of(rows * channels, threads))
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = piece * kUnit;
    const int width = int(std::min<int64_t>(kUnit, channels - first));
    const T* source = x + first;
    int32_t* my_counts = counts + first * kBuckets;
    for (int64_t row = 0; row < rows; ++row, source += row_stride) {
      if (row + kAhead < rows) prefetch(source + kAhead * row_stride, width);
      found += width == kUnit ? histogram_piece<kUnit>(source, width, my_counts, maxima + first, squares + first)
                              : histogram_piece<0>(source, width, my_counts, maxima + first, squares + first);
    }
  }
  *nonfinite += found;
}

}  // namespace

extern "C" {

// Add the values of rows of channels to a histogram of magnitudes, four buckets an octave, for each channel.
//
// x: [rows, channels], rows `row_stride` values apart; dtype 0 float32, 1 bfloat16, 2 float16. counts: [channels, 98]: below 2**-10, 96 buckets
// from 2**-10 to 2**14, the rest. maxima: [channels], largest magnitudes. squares: [channels], sums of squares.
// nonfinite: [1]: how many values are NaN or infinite; they count nowhere else. All are added to. A thread owns its
// channels and takes rows in their order, so that the number of threads changes nothing.
void tahf4_histogram(const void* x, int dtype, int64_t rows, int64_t channels, int64_t row_stride, int32_t* counts,
                     float* maxima, double* squares, int64_t* nonfinite, int threads) {
  const auto run = [&](auto* typed) {
    histogram(typed, rows, channels, row_stride, counts, maxima, squares, nonfinite, threads);
  };
  if (dtype == kFloat32) run(static_cast<const float*>(x));
  if (dtype == kBFloat16) run(static_cast<const BFloat16*>(x));
  if (dtype == kFloat16) run(static_cast<const Float16*>(x));
}

}  // extern "C"
