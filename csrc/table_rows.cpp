#include "table_rows.h"

namespace normkit {
namespace {

constexpr int kLanes = 8;

double fold(const double* lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace

NORMKIT_CLONES double row_sum(int64_t n, In a) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k];
  }
  for (; i < n; ++i) lanes[0] += a[i];
  return fold(lanes);
}

NORMKIT_CLONES double row_spread(int64_t n, In m, In v, double center) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const double d = m[i + k] - center;
      lanes[k] += v[i + k] + d * d;
    }
  }
  for (; i < n; ++i) lanes[0] += v[i] + (m[i] - center) * (m[i] - center);
  return fold(lanes);
}

NORMKIT_CLONES double row_product(int64_t n, In a, In b) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) lanes[0] += a[i] * b[i];
  return fold(lanes);
}

NORMKIT_CLONES void row_add(int64_t n, In a, Out to) {
  for (int64_t i = 0; i < n; ++i) to[i] += a[i];
}

NORMKIT_CLONES void row_add_spread(int64_t n, In m, In v, In mean, Out var) {
  for (int64_t i = 0; i < n; ++i) var[i] += v[i] + (m[i] - mean[i]) * (m[i] - mean[i]);
}

NORMKIT_CLONES void row_scale(int64_t n, double factor, Out to) {
  for (int64_t i = 0; i < n; ++i) to[i] *= factor;
}

NORMKIT_CLONES void row_norm(int64_t n, const NormRow& in, Out scale, Out center) {
  In m = in.m, mean = in.mean, rstd = in.rstd, weight = in.weight, bias = in.bias;
  for (int64_t i = 0; i < n; ++i) {
    const double s = rstd[i] * weight[i];
    scale[i] = s;
    center[i] = (m[i] - mean[i]) * s + bias[i];
  }
}

NORMKIT_CLONES void row_norm_gradient(int64_t n, const NormRow& in, const NormRowGradient& grads,
                                      Out dmean, Out dvar, Out dm, Out term) {
  In m = in.m, mean = in.mean, rstd = in.rstd, weight = in.weight;
  In dscale = grads.dscale, dcenter = grads.dcenter;
  for (int64_t i = 0; i < n; ++i) {
    const double r = rstd[i], s = r * weight[i];
    const double whole = (dscale[i] + dcenter[i] * (m[i] - mean[i])) * r;
    const double direct = dcenter[i] * s;
    term[i] = whole;
    dm[i] = direct;
    dmean[i] = -direct;
    dvar[i] = -0.5 * r * s * whole;
  }
}

NORMKIT_CLONES void row_through(int64_t n, In m, In mean, In first, In second, Out dm, Out dv) {
  for (int64_t i = 0; i < n; ++i) {
    dm[i] += first[i] + 2 * second[i] * (m[i] - mean[i]);
    dv[i] += second[i];
  }
}

NORMKIT_CLONES void row_through(int64_t n, In m, double mean, double first, double second, Out dm,
                                Out dv) {
  for (int64_t i = 0; i < n; ++i) {
    dm[i] += first + 2 * second * (m[i] - mean);
    dv[i] += second;
  }
}

NORMKIT_CLONES void row_transform(int64_t n, In scale, In v, Out out) {
  for (int64_t i = 0; i < n; ++i) out[i] = scale[i] * scale[i] * v[i];
}

}  // namespace normkit
