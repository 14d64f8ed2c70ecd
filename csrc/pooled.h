// The pooled operators: statistics over groups, normalisation and its gradient in one call.
#pragma once

#include <cmath>

#include "tensors.h"

namespace normkit {

Partition make_partition(const FeatureMap& x, int64_t num_groups, int64_t examples_per_group);

// Whether columns of a matrix carry the statistics rather than runs of memory.
bool by_columns(const FeatureMap& x, const Partition& p);

// Everything that the pooled operators compute besides y and dx. A null table is not wanted.
struct Statistics {
  double* mean;
  double* var;
  double* channel_mean;
  double* channel_var;
  bool constant = false;  // mean and var are given and do not depend on x: evaluation
};
// How a result is computed from the statistics: y = act(weight * xhat + bias + residual).
struct Finish {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
  Ending ending;
};
struct ParameterGradients {
  std::vector<double> dbias, dweight;  // (C,), empty when not wanted
  explicit ParameterGradients(int64_t size) : dbias(size, 0.0), dweight(size, 0.0) {}
  bool wanted() const { return !dbias.empty(); }
};

// A parameter's gradient as the tensor an operator returns, empty when not wanted.
Tensor gradient_tensor(const std::vector<double>& sums, bool wanted, bool wide);

void forward_by_rows(const FeatureMap& x, const Tensor& y, const Finish& finish,
                     const Partition& p, const Statistics& result);
void backward_by_rows(const Tensor& g, const FeatureMap& x, const Tensor& dx,
                      const Statistics& given, const Finish& finish, const Partition& p,
                      ParameterGradients& gradients);
// Whether threads take whole runs of examples of a channels_last map.
bool by_blocks(const FeatureMap& x, const Partition& p);
void forward_by_blocks(const FeatureMap& x, const Tensor& y, const Finish& finish,
                       const Partition& p, const Statistics& result);
void backward_by_blocks(const Tensor& g, const FeatureMap& x, const Tensor& dx,
                        const Statistics& given, const Finish& finish, const Partition& p,
                        ParameterGradients& gradients);
void forward_by_columns(const FeatureMap& x, const Tensor& y, const Finish& finish,
                        const Partition& p, const Statistics& result);
void backward_by_columns(const Tensor& g, const FeatureMap& x, const Tensor& dx,
                         const Statistics& given, const Finish& finish, const Partition& p,
                         ParameterGradients& gradients);

// Whole-batch statistics of each channel from those of `cells_per_channel` cells in each batch:
// mean, var are (num_batches, num_channels * cells_per_channel).
void pool_channels(const Partition& p, int64_t cells_per_channel, const double* mean,
                   const double* var, const Statistics& result);

// Updates `size` running statistics by those of a batch, each of which is of `count` elements.
void blend_running(const Tensor& running_mean, const Tensor& running_var, const double* mean,
                   const double* var, int64_t size, int64_t count, double momentum);

}  // namespace normkit
