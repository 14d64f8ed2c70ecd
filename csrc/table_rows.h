// Loops over rows of tables of double. Compiled once for each vector width; the processor chooses
// when the library is loaded.
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

void row_add(int64_t n, In a, In b, Out out);
void row_add(int64_t n, In a, double b, Out out);
void row_subtract(int64_t n, In a, In b, Out out);
void row_subtract(int64_t n, double a, In b, Out out);
void row_multiply(int64_t n, In a, In b, Out out);
void row_multiply(int64_t n, In a, double b, Out out);
// 1 / sqrt(a), 1 / (1 + exp(-a)), exp(a) / sum(exp(a))
void row_rsqrt(int64_t n, In a, Out out);
void row_sigmoid(int64_t n, In a, Out out);
void row_softmax(int64_t n, In a, Out out);

// sums += a
void row_accumulate(int64_t n, In a, Out sums);
// One more row of m, whose `share` is 1 / rows: its mean, and sums of v + (m - mean)^2.
void row_accumulate_spread(int64_t n, In v, In m, double share, Out mean, Out sums);

// Of `count` runs of `width` values: each value `width` times; factor * sum(a);
// mean(v + (m - center)^2).
void runs_repeat(int64_t count, int64_t width, In a, Out out);
void runs_sum(int64_t count, int64_t width, In a, double factor, Out out);
void runs_spread(int64_t count, int64_t width, In v, In m, In center, Out out);

}  // namespace normkit
