#include "segments.h"

#include "column_plan.h"

namespace normkit {
namespace {

Rows rows_of(const FeatureMap& x, const Partition& p, const SegmentTables& tables) {
  Rows rows{};
  rows.length = p.run;
  rows.table_size = tables.num_rows * tables.num_segments;
  rows.x = x.data();
  rows.wide = true;
  for (int64_t i = 0; i < tables.count; ++i) {
    rows.table[i] = const_cast<double*>(tables.values[i]);  // the kernels write only results
  }
  return rows;
}

// Runs kernel(rows) over all segments of a contiguous map.
void each_row(const Partition& p, const Rows& rows,
              void (*kernel)(const Rows&, int64_t begin, int64_t end)) {
  parallel(p.num_examples * p.num_groups, at_least_one(kGrain / at_least_one(p.run)),
           [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

// The table entry of a cell of a plan with one group for each segment of each example.
int64_t table_entry(const Plan& plan, const SegmentTables& tables, int64_t block, int64_t col) {
  const int64_t group = plan.group_of(block, col);
  return tables.num_rows == 1 ? group % tables.num_segments : group;
}

// Fills pivots and factors from tables mean, scale, [slope,] center.
template <class A>
void fill_cells(const Plan& plan, const SegmentTables& tables, Cells<A>& cells) {
  const double* slopes = tables.values[tables.count - 2];
  const double* centers = tables.values[tables.count - 1];
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      const int64_t cell = block * plan.cols + col;
      const int64_t entry = table_entry(plan, tables, block, col);
      const double mean = tables.values[0][entry];
      cells.pivot[cell] = A(mean);
      cells.scale[cell] = A(tables.values[1][entry]);
      cells.slope[cell] = A(slopes[entry]);
      cells.center[cell] =
          A(centers[entry] + (double(cells.pivot[cell]) - mean) * slopes[entry]);
    }
  });
}

template <class A>
void affine_columns(const FeatureMap& x, const void* grad, const Tensor& out, const Partition& p,
                    const SegmentTables& tables, const Ending& ending) {
  const Kernels& kernels = best_kernels(x.element);
  const Plan plan(x, p);
  Cells<A> cells(plan);
  fill_cells(plan, tables, cells);
  const auto kernel = grad ? kernels.column_combine : kernels.column_apply;
  each_chunk_backwards(plan, [&](const Chunk& chunk) {
    Columns columns = columns_of(plan, x, cells, chunk.block);
    columns.grad = grad;
    columns.out = out.data_ptr();
    columns.ending = ending;
    kernel(columns, chunk.begin, chunk.end);
  });
}

// y from tables, or dx where there is a gradient.
void affine(const FeatureMap& x, const void* grad, const Partition& p, const SegmentTables& tables,
            const Tensor& out, const Ending& ending) {
  if (x.layout == Layout::channels_last || p.run == 1) {
    const auto run = x.wide() ? affine_columns<double> : affine_columns<float>;
    return run(x, grad, out, p, tables, ending);
  }
  Rows rows = rows_of(x, p, tables);
  rows.grad = grad;
  rows.out = out.data_ptr();
  rows.ending = ending;
  const Kernels& kernels = best_kernels(x.element);
  each_row(p, rows, grad ? kernels.row_combine : kernels.row_apply);
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
void write_cells(const Plan& plan, const Cells<A>& cells, bool wide, void* first, void* second) {
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      const int64_t entry = plan.group_of(block, col);
      write(first, wide, entry, cells.first[block * plan.cols + col]);
      write(second, wide, entry, cells.second[block * plan.cols + col]);
    }
  });
}

template <class A>
void moments_columns(const FeatureMap& x, const Partition& p, bool wide, void* mean, void* var) {
  const Plan plan(x, p);
  Cells<A> cells(plan);
  cell_moments(plan, x, best_kernels(x.element), cells);
  write_cells(plan, cells, wide, mean, var);
}

template <class A>
void fill_lines(const Plan& plan, const SegmentTables& tables, Cells<A>& cells) {
  cells.y_scale.resize(plan.num_cells());
  cells.y_center.resize(plan.num_cells());
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      const int64_t cell = block * plan.cols + col;
      const int64_t entry = table_entry(plan, tables, block, col);
      const double mean = tables.values[0][entry], scale = tables.values[1][entry];
      cells.y_scale[cell] = A(scale);
      cells.y_center[cell] = A(tables.values[2][entry] + (double(A(mean)) - mean) * scale);
    }
  });
}

template <class A>
void grad_sums_columns(const FeatureMap& x, const Tensor& g, const Partition& p,
                       const SegmentTables& tables, double* first, double* second,
                       const Ending& ending) {
  const Plan plan(x, p);
  Cells<A> cells(plan);
  if (ending.passed) fill_lines(plan, tables, cells);
  std::vector<double> repeated;  // one row for each example, as cell_gradients reads them
  const double* means = tables.values[0];
  if (tables.num_rows == 1) {
    for (int64_t n = 0; n < p.num_examples; ++n) {
      repeated.insert(repeated.end(), means, means + p.num_groups);
    }
    means = repeated.data();
  }
  Statistics given{};
  given.mean = const_cast<double*>(means);  // read only
  cell_gradients(plan, x, g, best_kernels(x.element), given, cells, ending);
  write_cells(plan, cells, true, first, second);
}

}  // namespace

Partition partition_of_segments(const FeatureMap& x, int64_t num_segments) {
  STD_TORCH_CHECK(num_segments > 0 && x.num_channels > 0 && num_segments % x.num_channels == 0 &&
                      x.plane % (num_segments / x.num_channels) == 0,
                  "segments are equal parts of a channel; ", num_segments, " segments do not cut ",
                  x.num_channels, " channels of ", x.plane, " elements");
  return make_partition(x, num_segments, 1);
}

void segment_moments(const FeatureMap& x, const Partition& p, bool wide, void* mean, void* var) {
  if (x.layout == Layout::channels_last) {
    const auto run = x.wide() ? moments_columns<double> : moments_columns<float>;
    return run(x, p, wide, mean, var);
  }
  Rows rows{};
  rows.length = p.run;
  rows.x = x.data();
  rows.wide = wide;
  rows.table[0] = mean;
  rows.table[1] = var;
  each_row(p, rows, best_kernels(x.element).row_moments);
}

void segment_apply(const FeatureMap& x, const Partition& p, const SegmentTables& tables,
                   const Tensor& y, const Ending& ending) {
  affine(x, nullptr, p, tables, y, ending);
}

void segment_grad_sums(const FeatureMap& x, const Tensor& g, const Partition& p,
                       const SegmentTables& tables, double* first, double* second,
                       const Ending& ending) {
  if (x.layout == Layout::channels_last) {
    const auto run = x.wide() ? grad_sums_columns<double> : grad_sums_columns<float>;
    return run(x, g, p, tables, first, second, ending);
  }
  Rows rows = rows_of(x, p, tables);
  rows.grad = g.data_ptr();
  rows.ending = ending;
  rows.table[3] = rows.table[1];
  rows.table[4] = rows.table[2];
  rows.table[1] = first;
  rows.table[2] = second;
  each_row(p, rows, best_kernels(x.element).row_grad_sums);
}

void segment_combine(const FeatureMap& x, const Tensor& g, const Partition& p,
                     const SegmentTables& tables, const Tensor& dx) {
  affine(x, g.data_ptr(), p, tables, dx, {});
}

}  // namespace normkit
