// The checksum by which a changed weight is noticed.

#include "common.h"

using namespace tahf4;

extern "C" {

// Return the checksum of words that weights/checksum.py defines. factors: [4096], of the lanes of a row.
uint64_t tahf4_checksum(const int32_t* words, int64_t count, const uint64_t* factors, int threads) {
  constexpr int64_t kLanes = 4096;
  uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(team_of(count, threads))
  for (int64_t row = 0; row < (count + kLanes - 1) / kLanes; ++row) {
    const int32_t* x = words + row * kLanes;
    const int64_t width = std::min(kLanes, count - row * kLanes);
    uint64_t sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += uint64_t(int64_t(x[i])) * factors[i];
    uint64_t factor = uint64_t(row + 1) * 0x9E3779B97F4A7C15u;
    factor = (factor ^ uint64_t(int64_t(factor) >> 29)) * 0xBF58476D1CE4E5B9u;
    total += sum * ((factor ^ uint64_t(int64_t(factor) >> 32)) | 1);
  }
  return total;
}

}  // extern "C"
