// Loops over one row of a table: C doubles. Compiled once for each vector width; the processor
// chooses when the library is loaded.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define NORMKIT_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define NORMKIT_CLONES
#endif

namespace normkit {

using In = const double* __restrict;
using Out = double* __restrict;

// sum(a), and sum(v + (m - center)^2)
double row_sum(int64_t n, In a);
double row_spread(int64_t n, In m, In v, double center);
// sum(a * b)
double row_product(int64_t n, In a, In b);

// to += a; var += v + (m - mean)^2; to *= factor
void row_add(int64_t n, In a, Out to);
void row_add_spread(int64_t n, In m, In v, In mean, Out var);
void row_scale(int64_t n, double factor, Out to);

// scale = rstd * weight, center = (m - mean) * scale + bias
struct NormRow {
  const double *m, *mean, *rstd, *weight, *bias;
};
void row_norm(int64_t n, const NormRow& in, Out scale, Out center);

// The transpose, as far as one cell goes: gradients of mean and var as the cell sees them, the
// direct part of the gradient of m, and the cell's term of the gradient of weight.
struct NormRowGradient {
  const double *dscale, *dcenter;
};
void row_norm_gradient(int64_t n, const NormRow& in, const NormRowGradient& grads, Out dmean,
                       Out dvar, Out dm, Out term);

// dm += first + 2 second (m - mean), dv += second: what comes through a group's statistics
void row_through(int64_t n, In m, In mean, In first, In second, Out dm, Out dv);
void row_through(int64_t n, In m, double mean, double first, double second, Out dm, Out dv);

// out = scale^2 * v
void row_transform(int64_t n, In scale, In v, Out out);

}  // namespace normkit
