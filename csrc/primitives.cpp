// The four primitives: moments, apply and their gradients over tables (N, K) or (1, K), K segments
// of an example's flattened (C, *S) axis.
#include "column_plan.h"
#include "operators.h"

namespace normkit {
namespace {

// Tables as the kernels read them: all of one type, contiguous.
struct Tables {
  std::vector<std::vector<double>> values;
  int64_t num_rows, num_segments;

  Tables(const FeatureMap& x, std::initializer_list<const Tensor*> tables) {
    const Tensor& shape = **tables.begin();
    STD_TORCH_CHECK(shape.dim() == 2, "a table has shape (N, K) or (1, K)");
    num_rows = shape.size(0);
    num_segments = shape.size(1);
    STD_TORCH_CHECK(num_rows == 1 || num_rows == x.num_examples, "a table has 1 or ",
                    x.num_examples, " rows; this one has ", num_rows);
    for (const Tensor* table : tables) {
      STD_TORCH_CHECK(table->numel() == num_rows * num_segments,
                      "all tables of one call have the same shape");
      values.push_back(as_doubles(*table));
    }
  }
};

Partition segments_of(const FeatureMap& x, int64_t num_segments) {
  STD_TORCH_CHECK(num_segments > 0 && x.num_channels > 0 && num_segments % x.num_channels == 0 &&
                      x.plane % (num_segments / x.num_channels) == 0,
                  "segments are equal parts of a channel; ", num_segments, " segments do not cut ",
                  x.num_channels, " channels of ", x.plane, " elements");
  return make_partition(x, num_segments, 1);
}

Rows rows_of(const FeatureMap& x, const Partition& p, Tables& tables) {
  Rows rows{};
  rows.length = p.run;
  rows.table_size = tables.num_rows * tables.num_segments;
  rows.x = x.data();
  rows.wide = true;
  for (size_t i = 0; i < tables.values.size(); ++i) rows.table[i] = tables.values[i].data();
  return rows;
}

int64_t row_grain(const Partition& p) { return at_least_one(kGrain / at_least_one(p.run)); }

// Runs kernel(rows) over all segments of a contiguous map.
void each_row(const Partition& p, const Rows& rows,
              void (*kernel)(const Rows&, int64_t begin, int64_t end)) {
  parallel(p.num_examples * p.num_groups, row_grain(p),
           [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

// The table entry of a cell of a plan with one group for each segment of each example.
int64_t table_entry(const Plan& plan, const Tables& tables, int64_t block, int64_t col) {
  const int64_t group = plan.group_of(block, col);
  return tables.num_rows == 1 ? group % tables.num_segments : group;
}

// Fills pivots and factors from tables mean, scale, [slope,] center.
template <class A>
void fill_cells(const Plan& plan, const Tables& tables, Cells<A>& cells) {
  const bool gradient = tables.values.size() == 4;
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      const int64_t cell = block * plan.cols + col;
      const int64_t entry = table_entry(plan, tables, block, col);
      const double mean = tables.values[0][entry], scale = tables.values[1][entry];
      const double slope = gradient ? tables.values[2][entry] : scale;
      cells.pivot[cell] = A(mean);
      cells.scale[cell] = A(scale);
      cells.slope[cell] = A(slope);
      cells.center[cell] = A(tables.values.back()[entry] +
                             (double(cells.pivot[cell]) - mean) * slope);
    }
  });
}

template <class A>
void apply_columns(const FeatureMap& x, const void* grad, const Tensor& out, const Partition& p,
                   const Tables& tables) {
  const Kernels& kernels = best_kernels(x.element);
  const Plan plan(x, p);
  Cells<A> cells(plan);
  fill_cells(plan, tables, cells);
  const auto kernel = grad ? kernels.column_combine : kernels.column_apply;
  each_chunk_backwards(plan, [&](const Chunk& chunk) {
    Columns columns = columns_of(plan, x, cells, chunk.block);
    columns.grad = grad;
    columns.out = out.data_ptr();
    kernel(columns, chunk.begin, chunk.end);
  });
}

void write(void* table, bool wide, int64_t entry, double value) {
  if (wide) {
    static_cast<double*>(table)[entry] = value;
  } else {
    static_cast<float*>(table)[entry] = float(value);
  }
}

// Copies the sums or moments of cells into tables (N, K).
template <class A>
void write_cells(const Plan& plan, const Cells<A>& cells, bool wide, const Tensor& first,
                 const Tensor& second) {
  void *const firsts = first.data_ptr(), *const seconds = second.data_ptr();
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      const int64_t entry = plan.group_of(block, col);
      write(firsts, wide, entry, cells.first[block * plan.cols + col]);
      write(seconds, wide, entry, cells.second[block * plan.cols + col]);
    }
  });
}

template <class A>
void moments_columns(const FeatureMap& x, const Partition& p, bool wide, const Tensor& mean,
                     const Tensor& var) {
  const Plan plan(x, p);
  Cells<A> cells(plan);
  cell_moments(plan, x, best_kernels(x.element), cells);
  write_cells(plan, cells, wide, mean, var);
}

template <class A>
void reduce_columns(const FeatureMap& x, const Tensor& g, const Partition& p, Tables& tables,
                    const Tensor& first, const Tensor& second) {
  const Plan plan(x, p);
  Cells<A> cells(plan);
  std::vector<double>& means = tables.values[0];
  if (tables.num_rows == 1) {  // one row for each example, as cell_gradients reads them
    means.resize(p.num_examples * p.num_groups);
    for (size_t i = p.num_groups; i < means.size(); ++i) means[i] = means[i - p.num_groups];
  }
  cell_gradients(plan, x, g, best_kernels(x.element), {means.data(), nullptr, nullptr, nullptr}, cells);
  write_cells(plan, cells, x.wide(), first, second);
}

}  // namespace

std::tuple<Tensor, Tensor> moments(const Tensor& input, int64_t segment_size, bool wide) {
  const FeatureMap x(input);
  STD_TORCH_CHECK(segment_size > 0 && x.plane % segment_size == 0, "a channel has ", x.plane,
                  " elements, which segments of ", segment_size, " do not divide");
  const Partition p = make_partition(x, x.num_channels * (x.plane / segment_size), 1);
  const bool table_wide = wide || x.wide();
  const Tensor mean = fresh_table({x.num_examples, p.num_groups}, table_wide);
  const Tensor var = fresh_table({x.num_examples, p.num_groups}, table_wide);
  if (x.numel() == 0) return {mean, var};
  if (x.layout == Layout::channels_last) {
    const auto run = x.wide() ? moments_columns<double> : moments_columns<float>;
    run(x, p, table_wide, mean, var);
    return {mean, var};
  }
  Rows rows{};
  rows.length = p.run;
  rows.x = x.data();
  rows.wide = table_wide;
  rows.table[0] = mean.data_ptr();
  rows.table[1] = var.data_ptr();
  each_row(p, rows, best_kernels(x.element).row_moments);
  return {mean, var};
}

Tensor apply(const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& center) {
  const FeatureMap x(input);
  const Tensor y = x.fresh();
  if (x.numel() == 0) return y;
  Tables tables(x, {&mean, &scale, &center});
  const Partition p = segments_of(x, tables.num_segments);
  if (x.layout == Layout::channels_last || p.run == 1) {
    const auto run = x.wide() ? apply_columns<double> : apply_columns<float>;
    run(x, nullptr, y, p, tables);
    return y;
  }
  Rows rows = rows_of(x, p, tables);
  rows.out = y.data_ptr();
  each_row(p, rows, best_kernels(x.element).row_apply);
  return y;
}

std::tuple<Tensor, Tensor> reduce_grad(const Tensor& grad, const Tensor& input,
                                       const Tensor& mean) {
  const FeatureMap x(input);
  const Tensor g = x.matching(grad);
  Tables tables(x, {&mean});
  const Tensor first = fresh_table({x.num_examples, tables.num_segments}, x.wide());
  const Tensor second = fresh_table({x.num_examples, tables.num_segments}, x.wide());
  if (x.numel() == 0) return {first, second};
  const Partition p = segments_of(x, tables.num_segments);
  if (x.layout == Layout::channels_last) {
    const auto run = x.wide() ? reduce_columns<double> : reduce_columns<float>;
    run(x, g, p, tables, first, second);
    return {first, second};
  }
  const int64_t size = x.num_examples * tables.num_segments;
  tables.values.resize(3, std::vector<double>(size));
  Rows rows = rows_of(x, p, tables);
  rows.grad = g.data_ptr();
  each_row(p, rows, best_kernels(x.element).row_grad_sums);
  void *const firsts = first.data_ptr(), *const seconds = second.data_ptr();
  for (int64_t i = 0; i < size; ++i) {
    write(firsts, x.wide(), i, tables.values[1][i]);
    write(seconds, x.wide(), i, tables.values[2][i]);
  }
  return {first, second};
}

Tensor combine_grad(const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& k1,
                    const Tensor& k2, const Tensor& k3) {
  const FeatureMap x(input);
  const Tensor g = x.matching(grad);
  const Tensor dx = x.fresh();
  if (x.numel() == 0) return dx;
  Tables tables(x, {&mean, &k1, &k2, &k3});
  const Partition p = segments_of(x, tables.num_segments);
  if (x.layout == Layout::channels_last || p.run == 1) {
    const auto run = x.wide() ? apply_columns<double> : apply_columns<float>;
    run(x, g.data_ptr(), dx, p, tables);
    return dx;
  }
  Rows rows = rows_of(x, p, tables);
  rows.grad = g.data_ptr();
  rows.out = dx.data_ptr();
  each_row(p, rows, best_kernels(x.element).row_combine);
  return dx;
}

}  // namespace normkit
