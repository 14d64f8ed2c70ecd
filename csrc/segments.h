// The four primitives on whole maps, for the operators to build on: tables (N, K) or (1, K) of
// double, K segments of an example's flattened (C, *S) axis.
#pragma once

#include "pooled.h"

namespace normkit {

// mean, scale, center for apply; mean, k1, k2, k3 for combine; mean for the sums, with scale and
// center where they are through an ending.
struct SegmentTables {
  const double* values[4];
  int64_t count;
  int64_t num_rows;  // N, or 1 where every example has the same row
  int64_t num_segments;
};

Partition partition_of_segments(const FeatureMap& x, int64_t num_segments);

// Writes tables (N, K), of double where `wide`, else of float.
void segment_moments(const FeatureMap& x, const Partition& p, bool wide, void* mean, void* var);
// y = scale * (x - mean) + center, then the ending
void segment_apply(const FeatureMap& x, const Partition& p, const SegmentTables& tables,
                   const Tensor& y, const Ending& ending = {});
// sum(g) and sum(g * (x - mean)) of every segment, (N, K) each; g being that of u, which is written
// where the ending says, if there is one.
void segment_grad_sums(const FeatureMap& x, const Tensor& g, const Partition& p,
                       const SegmentTables& tables, double* first, double* second,
                       const Ending& ending = {});
// dx = k1 * g + k2 * (x - mean) + k3
void segment_combine(const FeatureMap& x, const Tensor& g, const Partition& p,
                     const SegmentTables& tables, const Tensor& dx);

}  // namespace normkit
