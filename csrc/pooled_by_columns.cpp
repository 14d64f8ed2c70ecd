// The pooled operators where statistics run down the columns of a matrix: channels_last maps, read
// in place, and dense inputs.
#include "column_plan.h"

namespace normkit {
namespace {

template <class A>
void pool_groups(const Plan& plan, const Cells<A>& cells, const Statistics& result) {
  const Partition& p = plan.p;
  const bool whole = plan.cells_per_group == 1 && plan.slices == 1;
  const int64_t grain = at_least_one(4096 / at_least_one(plan.cells_per_group));
  parallel(p.num_batches * p.num_groups, grain, [&](int64_t begin, int64_t end) {
    if (whole) {
      std::copy(&cells.first[begin], &cells.first[begin] + (end - begin), result.mean + begin);
      std::copy(&cells.second[begin], &cells.second[begin] + (end - begin), result.var + begin);
      return;
    }
    for (int64_t group = begin; group < end; ++group) {
      double sum = 0, spread = 0;
      int64_t count = 0;
      plan.each_cell(group, [&](int64_t cell, int64_t) {
        sum += cells.first[cell];
        ++count;
      });
      const double mean = sum / double(count);
      plan.each_cell(group, [&](int64_t cell, int64_t) {
        const double offset = cells.first[cell] - mean;
        spread += cells.second[cell] + offset * offset;
      });
      result.mean[group] = mean;
      result.var[group] = spread / double(count);
    }
  });
}

std::vector<double> reciprocal_deviations(const Partition& p, const Statistics& given, double eps) {
  std::vector<double> rstd(p.num_batches * p.num_groups);
  parallel(int64_t(rstd.size()), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rstd[i] = 1.0 / std::sqrt(given.var[i] + eps);
  });
  return rstd;
}

// Calls line(cell, pivot, scale, center) for all cells: u = scale * (x - pivot) + center.
template <class A, class F>
void each_line(const Plan& plan, const Statistics& statistics, const Parameter& weight,
               const Parameter& bias, const std::vector<double>& rstd, const F& line) {
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    const Plan::Groups groups = plan.groups_of(block);
    for (int64_t col = begin; col < end; ++col) {
      const int64_t group = groups[col], channel = plan.channel_of(col);
      const double mean = statistics.mean[group];
      const double scale = weight ? weight.at(channel) * rstd[group] : rstd[group];
      const A pivot = A(mean);
      const double center = (bias ? bias.at(channel) : 0.0) + (double(pivot) - mean) * scale;
      line(block * plan.cols + col, pivot, scale, center);
    }
  });
}

template <class A>
void forward(const FeatureMap& x, const Tensor& y, const Finish& finish, const Partition& p,
             const Statistics& result) {
  const Parameter weight(finish.weight, x), bias(finish.bias, x);
  const Kernels& kernels = best_kernels(x.element);
  const Plan plan(x, p);
  Cells<A> cells(plan);
  if (!result.constant) {
    cell_moments(plan, x, kernels, cells);
    pool_groups(plan, cells, result);
  }
  const std::vector<double> rstd = reciprocal_deviations(p, result, finish.eps);
  each_line<A>(plan, result, weight, bias, rstd, [&](int64_t cell, A pivot, double scale, double center) {
    cells.pivot[cell] = pivot;
    cells.scale[cell] = A(scale);
    cells.center[cell] = A(center);
  });
  each_chunk_backwards(plan, [&](const Chunk& chunk) {
    Columns columns = columns_of(plan, x, cells, chunk.block);
    columns.out = y.data_ptr();
    columns.ending = finish.ending;
    kernels.column_apply(columns, chunk.begin, chunk.end);
  });
  if (!result.channel_mean) return;
  if (p.plane % p.run == 0) {
    pool_channels(p, p.plane / p.run, result.mean, result.var, result);
  } else {
    pool_channels(p, plan.columns_per_channel, cells.first.data(), cells.second.data(), result);
  }
}

template <class A>
void backward(const Tensor& g, const FeatureMap& x, const Tensor& dx, const Statistics& given,
              const Finish& finish, const Partition& p, ParameterGradients& gradients) {
  const Kernels& kernels = best_kernels(x.element);
  const Parameter weight(finish.weight, x), bias(finish.bias, x);
  const Plan plan(x, p);
  Cells<A> cells(plan);
  const int64_t num_groups = p.num_batches * p.num_groups;
  const std::vector<double> rstd = reciprocal_deviations(p, given, finish.eps);
  if (finish.ending.follows()) {
    cells.y_scale.resize(plan.num_cells());
    cells.y_center.resize(plan.num_cells());
    each_line<A>(plan, given, weight, bias, rstd, [&](int64_t cell, A, double scale, double center) {
      cells.y_scale[cell] = A(scale);
      cells.y_center[cell] = A(center);
    });
  }
  cell_gradients(plan, x, g, kernels, given, cells, finish.ending);
  std::vector<double> slope(num_groups), center(num_groups);
  const int64_t grain = at_least_one(4096 / at_least_one(plan.cells_per_group));
  parallel(num_groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      double first = 0, second = 0;
      plan.each_cell(group, [&](int64_t cell, int64_t col) {
        const double scale = weight ? weight.at(plan.channel_of(col)) : 1.0;
        first += scale * cells.first[cell];
        second += scale * cells.second[cell];
      });
      const double count = double(p.batch_size(group / p.num_groups)) * double(p.run);
      const double r = rstd[group];
      slope[group] = given.constant ? 0 : -r * r * r * second / count;
      center[group] = given.constant ? 0 : -r * first / count;
    }
  });
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    const Plan::Groups groups = plan.groups_of(block);
    for (int64_t col = begin; col < end; ++col) {
      const int64_t cell = block * plan.cols + col, group = groups[col];
      const double scale = weight ? weight.at(plan.channel_of(col)) : 1.0;
      const double offset = double(cells.pivot[cell]) - given.mean[group];
      cells.scale[cell] = A(scale * rstd[group]);
      cells.slope[cell] = A(slope[group]);
      cells.center[cell] = A(center[group] + (slope[group] == 0 ? 0 : slope[group] * offset));
    }
  });
  each_chunk_backwards(plan, [&](const Chunk& chunk) {
    Columns columns = columns_of(plan, x, cells, chunk.block);
    columns.grad = g.data_ptr();
    columns.out = dx.data_ptr();
    columns.ending = finish.ending;
    kernels.column_combine(columns, chunk.begin, chunk.end);
  });
  if (!gradients.wanted()) return;
  for (int64_t block = 0; block < plan.num_blocks; ++block) {
    const Plan::Groups groups = plan.groups_of(block);
    for (int64_t col = 0; col < plan.cols; ++col) {
      const int64_t cell = block * plan.cols + col, channel = plan.channel_of(col);
      gradients.dbias[channel] += cells.first[cell];
      gradients.dweight[channel] += cells.second[cell] * rstd[groups[col]];
    }
  }
}

}  // namespace

void forward_by_columns(const FeatureMap& x, const Tensor& y, const Finish& finish,
                        const Partition& p, const Statistics& result) {
  (x.wide() ? forward<double> : forward<float>)(x, y, finish, p, result);
}

void backward_by_columns(const Tensor& g, const FeatureMap& x, const Tensor& dx,
                         const Statistics& given, const Finish& finish, const Partition& p,
                         ParameterGradients& gradients) {
  (x.wide() ? backward<double> : backward<float>)(g, x, dx, given, finish, p, gradients);
}

}  // namespace normkit
