// Norms on tables: what a norm of a map does to the moments of its segments, and the transpose.
//
// A table (N, C) has one cell for each channel of each example, and each cell a pair of doubles:
// mean and variance of what lies in it, or the scale and center that a norm gives it, or gradients
// of either. A norm maps every cell affinely, so the next one's input follows from the table.
#pragma once

#include <memory>
#include <vector>

#include "table_rows.h"
#include "tensors.h"

namespace normkit {

// Two tables that someone else owns, `stride` apart from row to row.
struct Pairs {
  double *first, *second;
  int64_t stride;

  double* firsts(int64_t row) const { return first + row * stride; }
  double* seconds(int64_t row) const { return second + row * stride; }
  // The columns from `col` on.
  Pairs from(int64_t col) const { return {first + col, second + col, stride}; }
};

struct Extent {
  int64_t rows, cols;
  int64_t size() const { return rows * cols; }
};

// Two tables of one's own, not yet written.
class FreshPairs {
 public:
  explicit FreshPairs(const Extent& extent)
      : memory_(new double[2 * at_least_one(extent.size())]), extent_(extent) {}
  operator Pairs() const { return {memory_.get(), memory_.get() + extent_.size(), extent_.cols}; }

 private:
  std::unique_ptr<double[]> memory_;
  Extent extent_;
};

// A parameter of a value for each column, or for each of `num_runs` equal runs of them; `absent`
// everywhere where there is none.
class TableParameter {
 public:
  TableParameter(const OptionalTensor& parameter, int64_t cols, double absent,
                 int64_t num_runs = 0);
  const double* values() const { return values_.data(); }
  // From the sums of the columns of a table, as a tensor; empty when not wanted.
  Tensor gradient(const std::vector<double>& columns, bool wanted, bool wide) const;

 private:
  int64_t num_values_;
  std::vector<double> values_;  // one for each column
};

// Where a norm's statistics come from.
enum class Source {
  row_groups,  // equal runs of an example's channels
  batch,       // a channel over the batch
  given,       // `share` of the cell's own, the rest of given ones; 0: all given, no gradient
};

// Statistics of the groups of a table, and how their gradient comes back to its cells.
class TableStatistics {
 public:
  // `num_groups` counts in a row and matters to row_groups alone.
  TableStatistics(Source source, const Extent& extent, int64_t num_groups);
  static TableStatistics given(const Extent& extent, const double* mean, const double* var,
                               double share);

  void measure(const Pairs& moments, double eps);
  // Mean, variance, 1 / sqrt(var + eps) of each cell's group along a row; `buffer` may hold it.
  const double* means(int64_t row, double* buffer) const { return along(mean, row, buffer); }
  const double* vars(int64_t row, double* buffer) const { return along(var, row, buffer); }
  const double* rstds(int64_t row, double* buffer) const { return along(rstd, row, buffer); }
  // Adds to `grads`, of the cells' moments, what comes through the groups: `through` has the
  // gradients of mean and variance as each cell sees them.
  void transpose(const Pairs& moments, const Pairs& through, const Pairs& grads) const;

  std::vector<double> mean, var, rstd;  // of the groups

 private:
  const double* along(const std::vector<double>& values, int64_t row, double* buffer) const;
  void measure_rows(const Pairs& moments);
  void measure_columns(const Pairs& moments);
  void blend(const Pairs& moments);
  void transpose_rows(const Pairs& moments, const Pairs& through, const Pairs& grads) const;
  void transpose_columns(const Pairs& moments, const Pairs& through, const Pairs& grads) const;
  void transpose_blend(const Pairs& moments, const Pairs& through, const Pairs& grads) const;

  Source source_;
  Extent extent_;
  int64_t width_;  // columns of a group
  double share_ = 1;
  std::vector<double> given_mean_, given_var_;
};

// One norm: statistics of its input, scale = weight * rstd, center = (mean - M) * scale + bias.
class TableNorm {
 public:
  TableNorm(TableStatistics statistics, const Extent& extent, double eps, const double* weight,
            const double* bias);

  void forward(const Pairs& moments, const Pairs& affine);
  // From gradients of scale and center to those of the moments.
  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments);

  // After backward: each column's sums, for the gradients of weight and bias.
  std::vector<double> dweight, dbias;

  TableStatistics statistics;

 private:
  Extent extent_;
  double eps_;
  const double *weight_, *bias_;
};

// Runs body(row) on all threads, or body(row, buffers) with two rows of scratch memory.
template <class F>
void each_table_row(const Extent& extent, const F& body) {
  parallel(extent.rows, at_least_one(kTableGrain / at_least_one(extent.cols)),
           [&](int64_t begin, int64_t end) {
             for (int64_t row = begin; row < end; ++row) body(row);
           });
}
template <class F>
void each_table_row_buffered(const Extent& extent, const F& body) {
  parallel(extent.rows, at_least_one(kTableGrain / at_least_one(extent.cols)),
           [&](int64_t begin, int64_t end) {
             const FreshPairs fresh({1, extent.cols});
             for (int64_t row = begin; row < end; ++row) body(row, Pairs(fresh));
           });
}

// The sum of each column.
std::vector<double> column_sums(const Extent& extent, const double* values, int64_t stride);

}  // namespace normkit
