#include "table_rows.h"

#include <algorithm>
#include <cmath>

namespace normkit {
namespace {

constexpr int kLanes = 8;

inline double fold(const double* lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace

NORMKIT_CLONES void row_add(int64_t n, In a, In b, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

NORMKIT_CLONES void row_add(int64_t n, In a, double b, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b;
}

NORMKIT_CLONES void row_subtract(int64_t n, In a, In b, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

NORMKIT_CLONES void row_subtract(int64_t n, double a, In b, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a - b[i];
}

NORMKIT_CLONES void row_multiply(int64_t n, In a, In b, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

NORMKIT_CLONES void row_multiply(int64_t n, In a, double b, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b;
}

NORMKIT_CLONES void row_rsqrt(int64_t n, In a, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 1.0 / std::sqrt(a[i]);
}

void row_sigmoid(int64_t n, In a, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 1.0 / (1.0 + std::exp(-a[i]));
}

void row_softmax(int64_t n, In a, Out out) {
  const double largest = *std::max_element(a, a + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp(a[i] - largest);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

NORMKIT_CLONES void row_accumulate(int64_t n, In a, Out sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += a[i];
}

NORMKIT_CLONES void row_accumulate_spread(int64_t n, In v, In m, double share, Out mean, Out sums) {
  for (int64_t i = 0; i < n; ++i) {
    const double apart = m[i] - mean[i];
    mean[i] += share * apart;
    sums[i] += v[i] + apart * (m[i] - mean[i]);
  }
}

NORMKIT_CLONES void runs_repeat(int64_t count, int64_t width, In a, Out out) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < width; ++j) out[i * width + j] = a[i];
  }
}

NORMKIT_CLONES void runs_sum(int64_t count, int64_t width, In a, double factor, Out out) {
  for (int64_t run = 0; run < count; ++run, a += width) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k];
    }
    for (; i < width; ++i) lanes[0] += a[i];
    out[run] = factor * fold(lanes);
  }
}

NORMKIT_CLONES void runs_spread(int64_t count, int64_t width, In v, In m, In center, Out out) {
  const double factor = 1.0 / double(width);
  for (int64_t run = 0; run < count; ++run, v += width, m += width) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        const double apart = m[i + k] - center[run];
        lanes[k] += v[i + k] + apart * apart;
      }
    }
    for (; i < width; ++i) lanes[0] += v[i] + (m[i] - center[run]) * (m[i] - center[run]);
    out[run] = factor * fold(lanes);
  }
}

}  // namespace normkit
