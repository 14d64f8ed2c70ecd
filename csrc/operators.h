// The operators as torch sees them; library.cpp registers them and says what each argument is.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace normkit {

std::tuple<Tensor, Tensor> pooled_forward(const Tensor& x, const OptionalTensor& weight,
                                          const OptionalTensor& bias, int64_t num_groups,
                                          int64_t examples_per_group, double eps,
                                          bool channel_statistics,
                                          const OptionalTensor& running_mean,
                                          const OptionalTensor& running_var,
                                          const OptionalTensor& num_batches_tracked,
                                          double momentum);
std::tuple<Tensor, Tensor, Tensor> pooled_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& table,
                                                   const OptionalTensor& weight,
                                                   int64_t num_groups, int64_t examples_per_group,
                                                   double eps, bool need_weight, bool need_bias);

Tensor evaluate_forward(const Tensor& x, const Tensor& mean, const Tensor& var,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        int64_t num_groups, double eps);
std::tuple<Tensor, Tensor, Tensor> evaluate_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& mean, const Tensor& var,
                                                     const OptionalTensor& weight,
                                                     int64_t num_groups, double eps,
                                                     bool need_weight, bool need_bias);

// The same with an ending, y = act(norm(x) + residual).
std::tuple<Tensor, Tensor> ended_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, int64_t num_groups, int64_t examples_per_group, double eps,
    bool channel_statistics, int64_t activation, double slope, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, double momentum);
std::tuple<Tensor, Tensor, Tensor, Tensor> ended_backward(
    const Tensor& grad, const Tensor& x, const Tensor& table, const OptionalTensor& residual,
    const OptionalTensor& result, const OptionalTensor& weight, const OptionalTensor& bias,
    int64_t num_groups, int64_t examples_per_group, double eps, int64_t activation, double slope,
    bool need_residual, bool need_weight, bool need_bias);
Tensor ended_evaluate_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& mean,
                              const Tensor& var, const OptionalTensor& weight,
                              const OptionalTensor& bias, int64_t num_groups, double eps,
                              int64_t activation, double slope);
std::tuple<Tensor, Tensor, Tensor, Tensor> ended_evaluate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& result, const OptionalTensor& weight,
    const OptionalTensor& bias, int64_t num_groups, double eps, int64_t activation, double slope,
    bool need_residual, bool need_weight, bool need_bias);

std::tuple<Tensor, Tensor> positional_forward(const Tensor& x, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> positional_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& table,
                                                       const OptionalTensor& weight, double eps,
                                                       bool need_weight, bool need_bias);

// The same with an ending.
std::tuple<Tensor, Tensor> ended_positional_forward(const Tensor& x, const OptionalTensor& residual,
                                                    const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps,
                                                    int64_t activation, double slope);
std::tuple<Tensor, Tensor, Tensor, Tensor> ended_positional_backward(
    const Tensor& grad, const Tensor& x, const Tensor& table, const OptionalTensor& residual,
    const OptionalTensor& result, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, int64_t activation, double slope, bool need_residual, bool need_weight,
    bool need_bias);

std::tuple<Tensor, Tensor> composite_forward(
    const Tensor& x, const std::string& program, const OptionalTensor& first,
    const OptionalTensor& second, const OptionalTensor& third, const OptionalTensor& fourth,
    double share, const OptionalTensor& given_mean, const OptionalTensor& given_var,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_backward(
    const Tensor& grad, const Tensor& x, const Tensor& table, const std::string& program,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, double share, int64_t wanted);

// The same with an ending; forward also returns scale and center of every cell, for backward.
std::tuple<Tensor, Tensor, Tensor> ended_composite_forward(
    const Tensor& x, const OptionalTensor& residual, const std::string& program,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, double share, int64_t activation, double slope,
    const OptionalTensor& given_mean, const OptionalTensor& given_var,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ended_composite_backward(
    const Tensor& grad, const Tensor& x, const Tensor& table, const Tensor& factors,
    const OptionalTensor& residual, const OptionalTensor& result, const std::string& program,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, double share, int64_t activation, double slope,
    bool need_residual, int64_t wanted);

std::tuple<Tensor, Tensor> moments(const Tensor& x, int64_t segment_size, bool wide);
Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& center);
std::tuple<Tensor, Tensor> reduce_grad(const Tensor& grad, const Tensor& x, const Tensor& mean);
Tensor combine_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& k1,
                    const Tensor& k2, const Tensor& k3);

}  // namespace normkit
