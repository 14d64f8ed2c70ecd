#include "pooled.h"

#include <algorithm>

#include "operators.h"

namespace normkit {

Partition make_partition(const FeatureMap& x, int64_t num_groups, int64_t examples_per_group) {
  Partition p;
  p.num_examples = x.num_examples;
  p.num_channels = x.num_channels;
  p.plane = x.plane;
  p.example_size = x.num_channels * x.plane;
  STD_TORCH_CHECK(num_groups > 0 && p.example_size % num_groups == 0, "an example has ",
                  p.example_size, " elements, which ", num_groups, " groups do not divide");
  p.num_groups = num_groups;
  p.run = p.example_size / num_groups;
  p.examples_per_group =
      at_least_one(examples_per_group > 0 ? std::min(examples_per_group, x.num_examples)
                                          : x.num_examples);
  p.num_batches = ceil_div(x.num_examples, p.examples_per_group);
  return p;
}

bool by_columns(const FeatureMap& x, const Partition& p) {
  // Runs shorter than a vector, but many of them below each other, are better taken side by side.
  return x.layout == Layout::channels_last || (p.run < 16 && p.examples_per_group >= 4);
}

void pool_channels(const Partition& p, int64_t cells_per_channel, const double* mean,
                   const double* var, const Statistics& result) {
  const int64_t cells = p.num_channels * cells_per_channel;
  const double count = double(p.num_examples) * double(cells_per_channel);
  for (int64_t c = 0; c < p.num_channels; ++c) {
    double first = 0, second = 0;
    const auto each_cell = [&](const auto& visit) {
      for (int64_t batch = 0; batch < p.num_batches; ++batch) {
        for (int64_t k = 0; k < cells_per_channel; ++k) {
          visit(batch * cells + c * cells_per_channel + k, double(p.batch_size(batch)));
        }
      }
    };
    each_cell([&](int64_t cell, double size) { first += size * mean[cell]; });
    const double pooled = first / count;
    each_cell([&](int64_t cell, double size) {
      const double offset = mean[cell] - pooled;
      second += size * (var[cell] + offset * offset);
    });
    result.channel_mean[c] = pooled;
    result.channel_var[c] = second / count;
  }
}

namespace {

decltype(&forward_by_rows) forward_of(const FeatureMap& x, const Partition& p) {
  if (!by_columns(x, p)) return forward_by_rows;
  return by_blocks(x, p) ? forward_by_blocks : forward_by_columns;
}
decltype(&backward_by_rows) backward_of(const FeatureMap& x, const Partition& p) {
  if (!by_columns(x, p)) return backward_by_rows;
  return by_blocks(x, p) ? backward_by_blocks : backward_by_columns;
}

// The parts of a table (2, num_batches * num_groups + num_pooled): means, then variances.
Statistics parts_of(const Tensor& table, int64_t num_cells, bool channels) {
  double *const means = doubles(table), *const vars = means + table.size(1);
  return {means, vars, channels ? means + num_cells : nullptr,
          channels ? vars + num_cells : nullptr};
}

}  // namespace

std::tuple<Tensor, Tensor> pooled_forward(const Tensor& input, const OptionalTensor& weight,
                                          const OptionalTensor& bias, int64_t num_groups,
                                          int64_t examples_per_group, double eps,
                                          bool channel_statistics,
                                          const OptionalTensor& running_mean,
                                          const OptionalTensor& running_var,
                                          const OptionalTensor& num_batches_tracked,
                                          double momentum) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, examples_per_group);
  STD_TORCH_CHECK(!channel_statistics || p.run == 0 || p.run % p.plane == 0 ||
                      p.plane % p.run == 0,
                  "channel statistics need groups that lie inside a channel or cover whole ones");
  const int64_t num_cells = p.num_batches * p.num_groups;
  const Tensor y = x.fresh();
  const Tensor table =
      fresh_table({2, num_cells + (channel_statistics ? p.num_channels : 0)}, true);
  if (x.numel() == 0) {
    std::fill_n(doubles(table), table.numel(), 0.0);
    return {y, table};
  }
  const Statistics result = parts_of(table, num_cells, channel_statistics);
  forward_of(x, p)(x, y, weight, bias, p, eps, result);
  if (running_mean && running_var) {
    STD_TORCH_CHECK(channel_statistics || p.num_batches == 1,
                    "several runs of examples have running statistics only by channel");
    const double* means = channel_statistics ? result.channel_mean : result.mean;
    const double* vars = channel_statistics ? result.channel_var : result.var;
    const int64_t size = channel_statistics ? p.num_channels : p.num_groups;
    blend_running(*running_mean, *running_var, means, vars, size, x.numel() / size, momentum);
  }
  if (num_batches_tracked) ++*static_cast<int64_t*>(num_batches_tracked->data_ptr());
  return {y, table};
}

Tensor gradient_tensor(const std::vector<double>& sums, bool wanted, bool wide) {
  const int64_t size = wanted ? int64_t(sums.size()) : 0;
  const Tensor result = fresh_table({size}, wide);
  copy_doubles(sums.data(), size, result);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> pooled_backward(const Tensor& grad, const Tensor& input,
                                                   const Tensor& table,
                                                   const OptionalTensor& weight,
                                                   int64_t num_groups, int64_t examples_per_group,
                                                   double eps, bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, examples_per_group);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == 2 && table.is_contiguous() &&
                      table.size(1) >= p.num_batches * p.num_groups,
                  "the table has shape (2, ", p.num_batches * p.num_groups, " or more)");
  const Tensor g = x.matching(grad);
  const Tensor dx = x.fresh();
  ParameterGradients gradients(need_weight || need_bias ? x.num_channels : 0);
  if (x.numel() > 0) {
    const Statistics given = parts_of(table, 0, false);
    backward_of(x, p)(g, x, dx, given, weight, p, eps, gradients);
  }
  return {dx, gradient_tensor(gradients.dweight, need_weight, x.wide()),
          gradient_tensor(gradients.dbias, need_bias, x.wide())};
}

namespace {

// Whole-batch statistics that someone else computed, as the kernels read them.
std::vector<double> given_table(const Tensor& table, const Partition& p) {
  STD_TORCH_CHECK(table.numel() == p.num_groups, "mean and var have one value for each of the ",
                  p.num_groups, " groups");
  return as_doubles(table);
}

}  // namespace

Tensor evaluate_forward(const Tensor& input, const Tensor& mean, const Tensor& var,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        int64_t num_groups, double eps) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, 0);
  const Tensor y = x.fresh();
  if (x.numel() == 0) return y;
  std::vector<double> means = given_table(mean, p), vars = given_table(var, p);
  forward_of(x, p)(x, y, weight, bias, p, eps, {means.data(), vars.data(), nullptr, nullptr, true});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> evaluate_backward(const Tensor& grad, const Tensor& input,
                                                     const Tensor& mean, const Tensor& var,
                                                     const OptionalTensor& weight,
                                                     int64_t num_groups, double eps,
                                                     bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, 0);
  const Tensor g = x.matching(grad);
  const Tensor dx = x.fresh();
  ParameterGradients gradients(need_weight || need_bias ? x.num_channels : 0);
  if (x.numel() > 0) {
    std::vector<double> means = given_table(mean, p), vars = given_table(var, p);
    backward_of(x, p)(g, x, dx, {means.data(), vars.data(), nullptr, nullptr, true}, weight, p,
                      eps, gradients);
  }
  return {dx, gradient_tensor(gradients.dweight, need_weight, x.wide()),
          gradient_tensor(gradients.dbias, need_bias, x.wide())};
}

}  // namespace normkit
