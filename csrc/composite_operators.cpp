// The operators of composite norms: moments of the map's channels, algebra on tables, apply.
#include "composites.h"
#include "operators.h"
#include "segments.h"

#include <algorithm>
#include <cmath>

namespace normkit {
namespace {

// Where the batch stage takes its statistics from, as Python names it.
enum class BatchSource : int64_t { own, estimates, given };

// Cells of a table: moments of every channel of every example; of groups that come before the batch,
// which other kernels keep and these find again; of the batch stage's channels what backward cannot
// find again: given statistics, or those measured.
struct Cells {
  Extent extent;
  int64_t num_groups, num_batch;

  Cells(const FeatureMap& x, const CompositeOptions& options)
      : extent{x.num_examples, x.num_channels},
        num_groups(options.kind == Kind::group_first ? x.num_examples * options.num_groups : 0),
        num_batch(options.num_batch_channels(x.num_channels)) {}
  int64_t count() const { return extent.size() + num_groups + num_batch; }
};

// A table (2, cells) of double.
struct KeptTable {
  Tensor tensor;
  Cells cells;
  Extent extent;
  int64_t num_batch;

  KeptTable(const Tensor& table, const Cells& c)
      : tensor(table), cells(c), extent(c.extent), num_batch(c.num_batch) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == 2 && table.is_contiguous() &&
                        table.size(1) == c.count(),
                    "the table has shape (2, ", c.count(), ")");
  }
  double* row(int which) const { return doubles(tensor) + which * cells.count(); }
  Pairs moments() const { return {row(0), row(1), extent.cols}; }
  double* groups(int which) const { return row(which) + extent.size(); }
  double* batch_mean() const { return groups(0) + cells.num_groups; }
  double* batch_var() const { return groups(1) + cells.num_groups; }
  // What the batch stage normalises by: its own statistics, or those kept here.
  TableStatistics statistics(BatchSource source, double rate) const {
    const Extent seen{extent.rows, num_batch};
    if (source == BatchSource::own) return {Source::batch, seen, 0};
    const double share = source == BatchSource::given ? rate : 0.0;
    if (share == 1) return {Source::row_groups, seen, num_batch};  // each cell by itself alone
    return TableStatistics::given(seen, batch_mean(), batch_var(), share);
  }
};

void keep(const KeptTable& table, const std::vector<double>& mean, const std::vector<double>& var) {
  std::copy_n(mean.begin(), table.num_batch, table.batch_mean());
  std::copy_n(var.begin(), table.num_batch, table.batch_var());
}

// Lets the cells that are normalised by given statistics alone be written around those: the cells'
// own means may be infinite, and nothing of them is in the result. Around 0 where the given mean is
// not finite: the gradient does not depend on it, and 0 * (x - NaN) would make it NaN.
void center_on_given(const KeptTable& table) {
  const Pairs cells = table.moments().from(table.extent.cols - table.num_batch);
  for (int64_t row = 0; row < table.extent.rows; ++row) {
    std::transform(table.batch_mean(), table.batch_mean() + table.num_batch, cells.firsts(row),
                   [](double mean) { return std::isfinite(mean) ? mean : 0.0; });
    std::copy_n(table.batch_var(), table.num_batch, cells.seconds(row));
  }
}

void require_statistics(const OptionalTensor& mean, const OptionalTensor& var, int64_t size) {
  STD_TORCH_CHECK(mean && var && mean->numel() == size && var->numel() == size,
                  "the batch stage's statistics have ", size, " values");
}

// Keeps estimates moved towards the batch, the variance about the old mean.
void estimate(const KeptTable& table, double rate, const Tensor& old_mean, const Tensor& old_var) {
  TableStatistics batch(Source::batch, table.extent, 0);
  batch.measure(table.moments(), 0.0);
  std::vector<double> mean = as_doubles(old_mean), var = as_doubles(old_var);
  for (int64_t i = 0; i < table.num_batch; ++i) {
    const double step = batch.mean[i] - mean[i];
    var[i] += rate * (step * step + batch.var[i] - var[i]);
    mean[i] += rate * step;
  }
  keep(table, mean, var);
}

CompositeOptions options_of(int64_t kind, int64_t num_groups, double batch_eps, double group_eps,
                           const FeatureMap& x) {
  STD_TORCH_CHECK(x.numel() > 0, "composites take no empty maps");
  STD_TORCH_CHECK(Kind(kind) != Kind::halves || (num_groups > 0 && num_groups < x.num_channels),
                  "halves leave both norms a channel of ", x.num_channels, "; the first has ",
                  num_groups);
  return {Kind(kind), num_groups, batch_eps, group_eps};
}

void count_batch(const OptionalTensor& num_batches_tracked) {
  if (num_batches_tracked) ++*static_cast<int64_t*>(num_batches_tracked->data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> composite_forward(
    const Tensor& input, int64_t kind, const OptionalTensor& first, const OptionalTensor& second,
    const OptionalTensor& third, const OptionalTensor& fourth, int64_t num_groups,
    double batch_eps, double group_eps, int64_t batch_source, double rate,
    const OptionalTensor& given_mean, const OptionalTensor& given_var,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked) {
  const FeatureMap x(input);
  const CompositeOptions options = options_of(kind, num_groups, batch_eps, group_eps, x);
  const Cells cells(x, options);
  const Extent extent = cells.extent;
  const int64_t num_batch = cells.num_batch;
  const KeptTable table(fresh_table({2, cells.count()}, true), cells);
  for (int which : {0, 1}) std::fill_n(table.groups(which), cells.num_groups, 0.0);
  const Partition p = partition_of_segments(x, x.num_channels);
  segment_moments(x, p, true, table.row(0), table.row(1));

  const BatchSource source = BatchSource(batch_source);
  const bool own = source == BatchSource::own, estimated = source == BatchSource::estimates;
  const bool given = source == BatchSource::given && num_batch > 0;
  if (given) require_statistics(given_mean, given_var, num_batch);
  const OptionalTensor& old_mean = given_mean ? given_mean : running_mean;
  const OptionalTensor& old_var = given_var ? given_var : running_var;
  if (estimated) require_statistics(old_mean, old_var, num_batch);
  if (given) keep(table, as_doubles(*given_mean), as_doubles(*given_var));
  if (given && rate == 0 && options.kind == Kind::halves) center_on_given(table);
  if (estimated) estimate(table, rate, *old_mean, *old_var);
  const auto composite = make_composite(options, extent, {&first, &second, &third, &fourth},
                                        table.statistics(source, rate));
  if (estimated && running_mean && running_var) {  // not before everything has been checked
    copy_doubles(table.batch_mean(), num_batch, *running_mean);
    copy_doubles(table.batch_var(), num_batch, *running_var);
  }
  const FreshPairs fresh(extent);
  const Pairs affine = fresh;
  composite->forward(table.moments(), affine);
  const Tensor y = x.fresh();
  segment_apply(x, p, {{table.row(0), affine.first, affine.second}, 3, extent.rows, extent.cols}, y);
  if (own && num_batch > 0) {
    keep(table, composite->batch().mean, composite->batch().var);
    if (running_mean && running_var) {
      blend_running(*running_mean, *running_var, table.batch_mean(), table.batch_var(), num_batch,
                    x.num_examples * x.plane, rate);
    }
  }
  count_batch(num_batches_tracked);
  return {y, table.tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_backward(
    const Tensor& grad, const Tensor& input, const Tensor& kept, int64_t kind,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, int64_t num_groups, double batch_eps, double group_eps,
    int64_t batch_source, double rate, int64_t wanted) {
  const FeatureMap x(input);
  const CompositeOptions options = options_of(kind, num_groups, batch_eps, group_eps, x);
  const KeptTable table(kept, Cells(x, options));
  const Extent extent = table.extent;
  const Partition p = partition_of_segments(x, x.num_channels);
  const Tensor g = x.matching(grad);
  const FreshPairs sums(extent), scales(extent), gradients(extent);
  // Of center: sum(g); of scale: sum(g (x - mean)).
  const Pairs reduced = sums, daffine{reduced.second, reduced.first, reduced.stride};
  segment_grad_sums(x, g, p, {{table.row(0)}, 1, extent.rows, extent.cols}, reduced.first,
                    reduced.second);
  const auto composite = make_composite(options, extent, {&first, &second, &third, &fourth},
                                        table.statistics(BatchSource(batch_source), rate));
  const Pairs affine = scales, dmoments = gradients;
  composite->forward(table.moments(), affine);
  composite->backward(table.moments(), daffine, dmoments);
  // dx = scale g + k2 (x - mean) + k3
  const double size = double(x.plane);
  each_table_row(extent, [&](int64_t row) {
    double *k3 = dmoments.firsts(row), *k2 = dmoments.seconds(row);
    const double *scale = affine.firsts(row), *sum = reduced.firsts(row);
    for (int64_t i = 0; i < extent.cols; ++i) {
      k3[i] = (k3[i] - scale[i] * sum[i]) / size;
      k2[i] *= 2 / size;
    }
  });
  const Tensor dx = x.fresh();
  segment_combine(x, g, p,
                  {{table.row(0), affine.first, dmoments.second, dmoments.first}, 4, extent.rows,
                   extent.cols},
                  dx);
  const ParameterGradientTensors found = composite->gradients(wanted, x.wide());
  return {dx, found[0], found[1], found[2], found[3]};
}

}  // namespace normkit
