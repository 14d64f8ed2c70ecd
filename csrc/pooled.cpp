#include "pooled.h"

#include <algorithm>

#include "operators.h"
#include "through_ending.h"

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
  // If runs are shorter than a vector and there are many, several are computed side by side.
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

// Buffers to update: by the channels' statistics if the table has them, otherwise by the groups'.
struct Running {
  const OptionalTensor& mean;
  const OptionalTensor& var;
  const OptionalTensor& num_batches_tracked;
  double momentum;

  void follow(const FeatureMap& x, const Partition& p, const Statistics& result) const {
    if (mean && var) {
      const bool channels = result.channel_mean != nullptr;
      STD_TORCH_CHECK(channels || p.num_batches == 1,
                      "several runs of examples have running statistics only by channel");
      const int64_t size = channels ? p.num_channels : p.num_groups;
      blend_running(*mean, *var, channels ? result.channel_mean : result.mean,
                    channels ? result.channel_var : result.var, size, x.numel() / size, momentum);
    }
    if (num_batches_tracked) ++*static_cast<int64_t*>(num_batches_tracked->data_ptr());
  }
};

std::tuple<Tensor, Tensor> forward(const FeatureMap& x, const Finish& finish, const Partition& p,
                                   bool channel_statistics, const Running& running) {
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
  forward_of(x, p)(x, y, finish, p, result);
  running.follow(x, p, result);
  return {y, table};
}

// Statistics from a table that the forward pass has filled.
Statistics read_table(const Tensor& table, const Partition& p) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == 2 && table.is_contiguous() &&
                      table.size(1) >= p.num_batches * p.num_groups,
                  "the table has shape (2, ", p.num_batches * p.num_groups, " or more)");
  return parts_of(table, 0, false);
}

// Given statistics of the whole batch, as the kernels read them.
class Given {
 public:
  Given(const Tensor& mean, const Tensor& var, const Partition& p)
      : mean_(values_of(mean, p)), var_(values_of(var, p)) {}
  Statistics statistics() { return {mean_.data(), var_.data(), nullptr, nullptr, true}; }

 private:
  static std::vector<double> values_of(const Tensor& table, const Partition& p) {
    STD_TORCH_CHECK(table.numel() == p.num_groups, "mean and var have one value for each of the ",
                    p.num_groups, " groups");
    return as_doubles(table);
  }
  std::vector<double> mean_, var_;
};

struct Needs {
  bool weight, bias;
};

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const FeatureMap& x,
                                            const Tensor& dx, const Statistics& given,
                                            const Finish& finish, const Partition& p,
                                            const Needs& need) {
  ParameterGradients gradients(need.weight || need.bias ? x.num_channels : 0);
  if (x.numel() > 0) {
    backward_of(x, p)(x.matching(grad), x, dx, given, finish, p, gradients);
  }
  return {dx, gradient_tensor(gradients.dweight, need.weight, x.wide()),
          gradient_tensor(gradients.dbias, need.bias, x.wide())};
}

}  // namespace

Tensor gradient_tensor(const std::vector<double>& sums, bool wanted, bool wide) {
  const int64_t size = wanted ? int64_t(sums.size()) : 0;
  const Tensor result = fresh_table({size}, wide);
  copy_doubles(sums.data(), size, result);
  return result;
}

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
  return forward(x, {weight, bias, eps, {}}, p, channel_statistics,
                 {running_mean, running_var, num_batches_tracked, momentum});
}

std::tuple<Tensor, Tensor, Tensor> pooled_backward(const Tensor& grad, const Tensor& input,
                                                   const Tensor& table,
                                                   const OptionalTensor& weight,
                                                   int64_t num_groups, int64_t examples_per_group,
                                                   double eps, bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, examples_per_group);
  return backward(grad, x, x.fresh(), read_table(table, p), {weight, std::nullopt, eps, {}}, p,
                  {need_weight, need_bias});
}

Tensor evaluate_forward(const Tensor& input, const Tensor& mean, const Tensor& var,
                        const OptionalTensor& weight, const OptionalTensor& bias,
                        int64_t num_groups, double eps) {
  return ended_evaluate_forward(input, std::nullopt, mean, var, weight, bias, num_groups, eps, 0, 0);
}

std::tuple<Tensor, Tensor, Tensor> evaluate_backward(const Tensor& grad, const Tensor& input,
                                                     const Tensor& mean, const Tensor& var,
                                                     const OptionalTensor& weight,
                                                     int64_t num_groups, double eps,
                                                     bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, 0);
  Given given(mean, var, p);
  return backward(grad, x, x.fresh(), given.statistics(), {weight, std::nullopt, eps, {}}, p,
                  {need_weight, need_bias});
}

std::tuple<Tensor, Tensor> ended_forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, int64_t num_groups, int64_t examples_per_group, double eps,
    bool channel_statistics, int64_t activation, double slope, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, double momentum) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, examples_per_group);
  const OptionalTensor added = beside(x, residual);
  return forward(x, {weight, bias, eps, ending_of(activation, slope, added)}, p, channel_statistics,
                 {running_mean, running_var, num_batches_tracked, momentum});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ended_backward(
    const Tensor& grad, const Tensor& input, const Tensor& table, const OptionalTensor& residual,
    const OptionalTensor& result, const OptionalTensor& weight, const OptionalTensor& bias,
    int64_t num_groups, int64_t examples_per_group, double eps, int64_t activation, double slope,
    bool need_residual, bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, examples_per_group);
  const ThroughEnding through(x, residual, result, activation, slope, need_residual);
  return through.with(backward(grad, x, through.dx, read_table(table, p),
                               {weight, bias, eps, through.ending}, p, {need_weight, need_bias}));
}

Tensor ended_evaluate_forward(const Tensor& input, const OptionalTensor& residual,
                              const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                              const OptionalTensor& bias, int64_t num_groups, double eps,
                              int64_t activation, double slope) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, 0);
  const Tensor y = x.fresh();
  if (x.numel() == 0) return y;
  Given given(mean, var, p);
  const OptionalTensor added = beside(x, residual);
  forward_of(x, p)(x, y, {weight, bias, eps, ending_of(activation, slope, added)}, p,
                   given.statistics());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ended_evaluate_backward(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& result, const OptionalTensor& weight,
    const OptionalTensor& bias, int64_t num_groups, double eps, int64_t activation, double slope,
    bool need_residual, bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  const Partition p = make_partition(x, num_groups, 0);
  Given given(mean, var, p);
  const ThroughEnding through(x, residual, result, activation, slope, need_residual);
  return through.with(backward(grad, x, through.dx, given.statistics(),
                               {weight, bias, eps, through.ending}, p, {need_weight, need_bias}));
}

}  // namespace normkit
