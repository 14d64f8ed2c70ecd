#include "table_norms.h"

#include <algorithm>
#include <cmath>

namespace normkit {
namespace {

constexpr int64_t kStrip = 256;  // columns whose sums stay in the nearest cache

// Runs body(begin, end) on strips of columns, on all threads.
template <class F>
void each_strip(const Extent& extent, const F& body) {
  const int64_t strips = ceil_div(extent.cols, kStrip);
  parallel(strips, at_least_one(kTableGrain / (kStrip * at_least_one(extent.rows))),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               body(i * kStrip, std::min((i + 1) * kStrip, extent.cols));
             }
           });
}

}  // namespace

TableParameter::TableParameter(const OptionalTensor& parameter, int64_t cols, double absent,
                               int64_t num_runs)
    : num_values_(parameter ? parameter->numel() : cols), values_(cols, absent) {
  if (!parameter) return;
  STD_TORCH_CHECK(num_values_ == cols || (num_values_ == num_runs && cols % num_runs == 0),
                  "a parameter of ", num_values_, " values does not fit ", cols, " channels");
  const std::vector<double> values = as_doubles(*parameter);
  const int64_t repeat = cols / num_values_;
  for (int64_t i = 0; i < num_values_; ++i) std::fill_n(&values_[i * repeat], repeat, values[i]);
}

Tensor TableParameter::gradient(const std::vector<double>& columns, bool wanted, bool wide) const {
  std::vector<double> sums(wanted ? num_values_ : 0);
  const int64_t repeat = wanted ? int64_t(values_.size()) / num_values_ : 0;
  for (size_t i = 0; i < sums.size(); ++i) sums[i] = row_sum(repeat, &columns[i * repeat]);
  const Tensor result = fresh_table({int64_t(sums.size())}, wide);
  copy_doubles(sums.data(), int64_t(sums.size()), result);
  return result;
}

TableStatistics::TableStatistics(Source source, const Extent& extent, int64_t num_groups)
    : source_(source), extent_(extent), width_(1) {
  if (source != Source::row_groups) return;
  STD_TORCH_CHECK(num_groups > 0 && extent.cols % num_groups == 0, num_groups,
                  " groups do not divide ", extent.cols, " channels");
  width_ = extent.cols / num_groups;
}

TableStatistics TableStatistics::given(const Extent& extent, const double* mean,
                                       const double* var, double share) {
  TableStatistics result(Source::given, extent, 0);
  result.share_ = share;
  result.given_mean_.assign(mean, mean + extent.cols);
  result.given_var_.assign(var, var + extent.cols);
  return result;
}

void TableStatistics::measure(const Pairs& moments, double eps) {
  if (source_ == Source::row_groups) measure_rows(moments);
  if (source_ == Source::batch) measure_columns(moments);
  if (source_ == Source::given) {
    if (share_ == 0) {
      mean = given_mean_;
      var = given_var_;
    } else {
      blend(moments);
    }
  }
  rstd.resize(var.size());
  for (size_t i = 0; i < var.size(); ++i) rstd[i] = 1.0 / std::sqrt(var[i] + eps);
}

// M = mean(m), V = mean(v + (m - M)^2)
void TableStatistics::measure_rows(const Pairs& moments) {
  const int64_t groups = extent_.cols / width_;
  mean.resize(extent_.rows * groups);
  var.resize(extent_.rows * groups);
  each_table_row(extent_, [&](int64_t row) {
    for (int64_t group = 0; group < groups; ++group) {
      const double* m = moments.firsts(row) + group * width_;
      const double* v = moments.seconds(row) + group * width_;
      const double center = row_sum(width_, m) / double(width_);
      mean[row * groups + group] = center;
      var[row * groups + group] = row_spread(width_, m, v, center) / double(width_);
    }
  });
}

void TableStatistics::measure_columns(const Pairs& moments) {
  mean.assign(extent_.cols, 0.0);
  var.assign(extent_.cols, 0.0);
  const double reciprocal = 1.0 / double(extent_.rows);
  each_strip(extent_, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    double *const means = &mean[begin], *const vars = &var[begin];
    for (int64_t row = 0; row < extent_.rows; ++row) row_add(n, moments.firsts(row) + begin, means);
    row_scale(n, reciprocal, means);
    for (int64_t row = 0; row < extent_.rows; ++row) {
      row_add_spread(n, moments.firsts(row) + begin, moments.seconds(row) + begin, means, vars);
    }
    row_scale(n, reciprocal, vars);
  });
}

// Moments of a mixture of the cell's values and the given ones.
void TableStatistics::blend(const Pairs& moments) {
  mean.resize(extent_.size());
  var.resize(extent_.size());
  each_table_row(extent_, [&](int64_t row) {
    const double *m = moments.firsts(row), *v = moments.seconds(row);
    for (int64_t col = 0; col < extent_.cols; ++col) {
      const double between = m[col] - given_mean_[col], cell = 1 - share_;
      mean[row * extent_.cols + col] = share_ * m[col] + cell * given_mean_[col];
      var[row * extent_.cols + col] =
          share_ * v[col] + cell * given_var_[col] + share_ * cell * between * between;
    }
  });
}

const double* TableStatistics::along(const std::vector<double>& values, int64_t row,
                                     double* buffer) const {
  if (source_ == Source::batch || (source_ == Source::given && share_ == 0)) return values.data();
  if (source_ == Source::given) return values.data() + row * extent_.cols;
  const int64_t groups = extent_.cols / width_;
  for (int64_t group = 0; group < groups; ++group) {
    std::fill_n(buffer + group * width_, width_, values[row * groups + group]);
  }
  return buffer;
}

void TableStatistics::transpose(const Pairs& moments, const Pairs& through,
                                const Pairs& grads) const {
  if (source_ == Source::row_groups) return transpose_rows(moments, through, grads);
  if (source_ == Source::batch) return transpose_columns(moments, through, grads);
  if (share_ != 0) transpose_blend(moments, through, grads);
}

void TableStatistics::transpose_rows(const Pairs& moments, const Pairs& through,
                                     const Pairs& grads) const {
  const int64_t groups = extent_.cols / width_;
  const double reciprocal = 1.0 / double(width_);
  each_table_row(extent_, [&](int64_t row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * width_;
      const double first = row_sum(width_, through.firsts(row) + begin) * reciprocal;
      const double second = row_sum(width_, through.seconds(row) + begin) * reciprocal;
      row_through(width_, moments.firsts(row) + begin, mean[row * groups + group], first, second,
                  grads.firsts(row) + begin, grads.seconds(row) + begin);
    }
  });
}

void TableStatistics::transpose_columns(const Pairs& moments, const Pairs& through,
                                        const Pairs& grads) const {
  const double reciprocal = 1.0 / double(extent_.rows);
  each_strip(extent_, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    double first[kStrip] = {}, second[kStrip] = {};
    for (int64_t row = 0; row < extent_.rows; ++row) {
      row_add(n, through.firsts(row) + begin, first);
      row_add(n, through.seconds(row) + begin, second);
    }
    row_scale(n, reciprocal, first);
    row_scale(n, reciprocal, second);
    for (int64_t row = 0; row < extent_.rows; ++row) {
      row_through(n, moments.firsts(row) + begin, &mean[begin], first, second,
                  grads.firsts(row) + begin, grads.seconds(row) + begin);
    }
  });
}

void TableStatistics::transpose_blend(const Pairs& moments, const Pairs& through,
                                      const Pairs& grads) const {
  each_table_row(extent_, [&](int64_t row) {
    const double *m = moments.firsts(row);
    const double *dm = through.firsts(row), *dv = through.seconds(row);
    double *to_m = grads.firsts(row), *to_v = grads.seconds(row);
    for (int64_t col = 0; col < extent_.cols; ++col) {
      const double between = m[col] - given_mean_[col];
      to_m[col] += share_ * (dm[col] + 2 * (1 - share_) * between * dv[col]);
      to_v[col] += share_ * dv[col];
    }
  });
}

TableNorm::TableNorm(TableStatistics own_statistics, const Extent& extent, double eps,
                     const double* weight, const double* bias)
    : statistics(std::move(own_statistics)), extent_(extent), eps_(eps), weight_(weight),
      bias_(bias) {}

void TableNorm::forward(const Pairs& moments, const Pairs& affine) {
  statistics.measure(moments, eps_);
  each_table_row_buffered(extent_, [&](int64_t row, const Pairs& buffers) {
    const NormRow in{moments.firsts(row), statistics.means(row, buffers.first),
                     statistics.rstds(row, buffers.second), weight_, bias_};
    row_norm(extent_.cols, in, affine.firsts(row), affine.seconds(row));
  });
}

void TableNorm::backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) {
  const FreshPairs fresh(extent_), fresh_terms(extent_);
  const Pairs through = fresh;  // gradients of mean and variance as each cell sees them
  const double* terms = Pairs(fresh_terms).first;
  each_table_row_buffered(extent_, [&](int64_t row, const Pairs& buffers) {
    const NormRow in{moments.firsts(row), statistics.means(row, buffers.first),
                     statistics.rstds(row, buffers.second), weight_, bias_};
    row_norm_gradient(extent_.cols, in, {daffine.firsts(row), daffine.seconds(row)},
                      through.firsts(row), through.seconds(row), dmoments.firsts(row),
                      Pairs(fresh_terms).firsts(row));
    std::fill_n(dmoments.seconds(row), extent_.cols, 0.0);
  });
  statistics.transpose(moments, through, dmoments);
  dweight = column_sums(extent_, terms, extent_.cols);
  dbias = column_sums(extent_, daffine.second, daffine.stride);
}

std::vector<double> column_sums(const Extent& extent, const double* values, int64_t stride) {
  std::vector<double> result(extent.cols, 0.0);
  each_strip(extent, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < extent.rows; ++row) {
      row_add(end - begin, values + row * stride + begin, &result[begin]);
    }
  });
  return result;
}

}  // namespace normkit
