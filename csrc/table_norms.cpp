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

TableParameter::TableParameter(const OptionalTensor& parameter, int64_t cols) {
  if (!parameter) return;
  num_values_ = parameter->numel();
  STD_TORCH_CHECK(num_values_ > 0 && cols % num_values_ == 0, "a parameter of ", num_values_,
                  " values does not fit ", cols, " channels");
  const std::vector<double> values = as_doubles(*parameter);
  values_.resize(cols);
  const int64_t repeat = cols / num_values_;
  for (int64_t i = 0; i < cols; ++i) values_[i] = values[i / repeat];
}

Tensor TableParameter::gradient(const double* columns, bool wanted, bool wide) const {
  std::vector<double> sums(wanted ? num_values_ : 0, 0.0);
  if (!sums.empty()) {
    const int64_t repeat = int64_t(values_.size()) / num_values_;
    for (size_t i = 0; i < values_.size(); ++i) sums[i / repeat] += columns[i];
  }
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
      double sum = 0, spread = 0;
      for (int64_t i = 0; i < width_; ++i) sum += m[i];
      const double center = sum / double(width_);
      for (int64_t i = 0; i < width_; ++i) spread += v[i] + (m[i] - center) * (m[i] - center);
      mean[row * groups + group] = center;
      var[row * groups + group] = spread / double(width_);
    }
  });
}

void TableStatistics::measure_columns(const Pairs& moments) {
  mean.assign(extent_.cols, 0.0);
  var.assign(extent_.cols, 0.0);
  const double reciprocal = 1.0 / double(extent_.rows);
  each_strip(extent_, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < extent_.rows; ++row) {
      const double* m = moments.firsts(row);
      for (int64_t col = begin; col < end; ++col) mean[col] += m[col];
    }
    for (int64_t col = begin; col < end; ++col) mean[col] *= reciprocal;
    for (int64_t row = 0; row < extent_.rows; ++row) {
      const double *m = moments.firsts(row), *v = moments.seconds(row);
      for (int64_t col = begin; col < end; ++col) {
        var[col] += v[col] + (m[col] - mean[col]) * (m[col] - mean[col]);
      }
    }
    for (int64_t col = begin; col < end; ++col) var[col] *= reciprocal;
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
      const double *m = moments.firsts(row) + begin, center = mean[row * groups + group];
      const double *dm = through.firsts(row) + begin, *dv = through.seconds(row) + begin;
      double *to_m = grads.firsts(row) + begin, *to_v = grads.seconds(row) + begin;
      double first = 0, second = 0;
      for (int64_t i = 0; i < width_; ++i) first += dm[i];
      for (int64_t i = 0; i < width_; ++i) second += dv[i];
      first *= reciprocal;
      second *= reciprocal;
      for (int64_t i = 0; i < width_; ++i) to_m[i] += first + 2 * second * (m[i] - center);
      for (int64_t i = 0; i < width_; ++i) to_v[i] += second;
    }
  });
}

void TableStatistics::transpose_columns(const Pairs& moments, const Pairs& through,
                                        const Pairs& grads) const {
  const double reciprocal = 1.0 / double(extent_.rows);
  each_strip(extent_, [&](int64_t begin, int64_t end) {
    double first[kStrip] = {}, second[kStrip] = {};
    for (int64_t row = 0; row < extent_.rows; ++row) {
      const double *dm = through.firsts(row) + begin, *dv = through.seconds(row) + begin;
      for (int64_t i = 0; i < end - begin; ++i) first[i] += dm[i];
      for (int64_t i = 0; i < end - begin; ++i) second[i] += dv[i];
    }
    for (int64_t i = 0; i < end - begin; ++i) first[i] *= reciprocal;
    for (int64_t i = 0; i < end - begin; ++i) second[i] *= reciprocal;
    for (int64_t row = 0; row < extent_.rows; ++row) {
      const double *m = moments.firsts(row) + begin, *center = mean.data() + begin;
      double *to_m = grads.firsts(row) + begin, *to_v = grads.seconds(row) + begin;
      for (int64_t i = 0; i < end - begin; ++i) {
        to_m[i] += first[i] + 2 * second[i] * (m[i] - center[i]);
        to_v[i] += second[i];
      }
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
  each_table_row(extent_, [&](int64_t row) {
    double *scale = affine.firsts(row), *center = affine.seconds(row);
    const double* m = moments.firsts(row);
    const double* rstd = statistics.rstds(row, scale);
    const double* mean = statistics.means(row, center);
    for (int64_t col = 0; col < extent_.cols; ++col) {
      scale[col] = weight_ ? rstd[col] * weight_[col] : rstd[col];
      center[col] = (m[col] - mean[col]) * scale[col] + (bias_ ? bias_[col] : 0.0);
    }
  });
}

void TableNorm::backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments,
                         double* dweight, double* dbias) const {
  const FreshPairs fresh(extent_);
  const Pairs through = fresh;  // gradients of mean and variance as each cell sees them
  const std::unique_ptr<double[]> terms(new double[at_least_one(dweight ? extent_.size() : 0)]);
  each_table_row(extent_, [&](int64_t row) {
    double *dmean = through.firsts(row), *dvar = through.seconds(row);
    double *to_m = dmoments.firsts(row), *to_v = dmoments.seconds(row);
    double* term = dweight ? terms.get() + row * extent_.cols : nullptr;
    const double *dscale = daffine.firsts(row), *dcenter = daffine.seconds(row);
    const double* m = moments.firsts(row);
    const double* rstd = statistics.rstds(row, dvar);
    const double* mean = statistics.means(row, dmean);
    for (int64_t col = 0; col < extent_.cols; ++col) {
      const double r = rstd[col], w = weight_ ? weight_[col] : 1.0;
      const double whole = dscale[col] + dcenter[col] * (m[col] - mean[col]);
      const double direct = dcenter[col] * r * w;
      if (term) term[col] = whole * r;
      dmean[col] = -direct;
      dvar[col] = -0.5 * r * r * r * w * whole;
      to_m[col] = direct;
      to_v[col] = 0;
    }
  });
  statistics.transpose(moments, through, dmoments);
  if (dweight) add_columns(extent_, terms.get(), extent_.cols, dweight);
  if (dbias) add_columns(extent_, daffine.second, daffine.stride, dbias);
}

void transform(const Extent& extent, const Pairs& moments, const Pairs& affine,
               const Pairs& out) {
  each_table_row(extent, [&](int64_t row) {
    const double *v = moments.seconds(row), *scale = affine.firsts(row);
    double* var = out.seconds(row);
    std::copy_n(affine.seconds(row), extent.cols, out.firsts(row));
    for (int64_t col = 0; col < extent.cols; ++col) var[col] = scale[col] * scale[col] * v[col];
  });
}

void add_columns(const Extent& extent, const double* values, int64_t stride, double* result) {
  each_strip(extent, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < extent.rows; ++row) {
      const double* from = values + row * stride;
      for (int64_t col = begin; col < end; ++col) result[col] += from[col];
    }
  });
}

}  // namespace normkit
