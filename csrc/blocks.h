// The pooled operators on channels_last maps whose groups are whole channels: one run of examples
// at a time, from its sums to its result, so that the second pass finds it in the cache.
#pragma once

#include <vector>

#include "backward_rows.h"
#include "columns.h"

namespace normkit::NORMKIT_ISA {

// A run of examples as a matrix of positions by channels; tables have one entry for each channel.
template <class T>
struct Block {
  using A = acc_t<T>;
  int64_t rows = 0, first_group = 0, group_width;
  Columns columns{};
  std::vector<A> pivot, scale, slope, center, y_scale, y_center;
  std::vector<double> first, second;

  explicit Block(const Pooled& a)
      : group_width(a.partition.num_channels / a.partition.num_groups),
        pivot(a.partition.num_channels), scale(pivot.size()), slope(pivot.size()),
        center(pivot.size()), y_scale(a.ending.follows() ? pivot.size() : 0),
        y_center(y_scale.size()), first(pivot.size()), second(pivot.size()) {}

  void move_to(const Pooled& a, int64_t batch) {
    const Partition& p = a.partition;
    const int64_t start = p.batch_begin(batch) * p.example_size;
    rows = p.batch_size(batch) * p.plane;
    first_group = batch * p.num_groups;
    columns = {p.num_channels, p.num_channels, static_cast<const T*>(a.x) + start,
               a.grad ? static_cast<const T*>(a.grad) + start : nullptr, static_cast<T*>(a.out) + start,
               pivot.data(), scale.data(), slope.data(), center.data(), y_scale.data(),
               y_center.data(), later<T>(a.ending, start)};
    for (size_t i = 0; i < first.size(); ++i) first[i] = second[i] = 0;
  }

  // Calls visit(group, col_begin, col_end) for every group.
  template <class F>
  void each_group(const Pooled& a, const F& visit) {
    for (int64_t g = 0; g < a.partition.num_groups; ++g) {
      visit(group_of<T>(a, first_group + g), g * group_width, (g + 1) * group_width);
    }
  }

  // From the last row to the first, because the pass before left the last rows in the cache.
  void finish(void (*kernel)(const Columns&, int64_t begin, int64_t end)) const {
    for (int64_t end = rows; end > 0; end -= kRowBlock) {
      kernel(columns, end < kRowBlock ? 0 : end - kRowBlock, end);
    }
  }
};

// Moments of every channel, then of every group.
template <class T>
void block_statistics(const Pooled& a, Block<T>& block, int64_t batch) {
  column_shift<T>(block.columns, least(block.rows, 8), block.pivot.data());
  column_sums<T>(block.columns, 0, block.rows, block.first.data(), block.second.data());
  const int64_t channels = a.partition.num_channels, width = block.group_width;
  double *mean = block.first.data(), *var = block.second.data();
  for (int64_t c = 0; c < channels; ++c) {
    const double sums[2] = {mean[c], var[c]};
    store_moments(mean + c, var + c, sums, block.pivot[c], double(block.rows));
  }
  for (int64_t c = 0; a.piece_first && c < channels; ++c) {
    a.piece_first[batch * channels + c] = mean[c];
    a.piece_second[batch * channels + c] = var[c];
  }
  for (int64_t g = 0; g < a.partition.num_groups; ++g, mean += width, var += width) {
    pool_moments(mean, var, width, a.mean + block.first_group + g, a.var + block.first_group + g);
  }
}

template <class T>
void forward_blocks(const Pooled& a, int64_t begin, int64_t end) {
  Block<T> block(a);
  for (int64_t batch = begin; batch < end; ++batch) {
    block.move_to(a, batch);
    if (!a.constant) block_statistics<T>(a, block, batch);
    block.each_group(a, [&](const Group<T>& group, int64_t low, int64_t high) {
      for (int64_t c = low; c < high; ++c) {
        const Line<T> line = line_of<T>(a, group, c);
        block.pivot[c] = line.pivot;
        block.scale[c] = line.scale;
        block.center[c] = line.center;
      }
    });
    block.finish(column_apply<T>);
  }
}

// One group's factors of dx from its channels' sums, which become terms of dbias and dweight.
template <class T>
void block_factors(const Pooled& a, Block<T>& block, const Group<T>& group, int64_t low,
                   int64_t high) {
  using A = acc_t<T>;
  double sums[2] = {0, 0};
  for (int64_t c = low; c < high; ++c) {
    const double weight = weight_at<T>(a, c);
    block.second[c] += group.pivot_offset * block.first[c];
    sums[0] += weight * block.first[c];
    sums[1] += weight * block.second[c];
  }
  if (a.constant) sums[0] = sums[1] = 0;
  const GroupGradient<T> k(group, sums, double(block.rows) * double(block.group_width));
  for (int64_t c = low; c < high; ++c) {
    block.scale[c] = A(weight_at<T>(a, c) * k.scale);
    block.slope[c] = A(k.slope);
    block.center[c] = A(k.center);
    block.second[c] *= group.rstd;
  }
}

template <class T>
void backward_blocks(const Pooled& a, int64_t begin, int64_t end) {
  Block<T> block(a);
  const int64_t channels = a.partition.num_channels;
  for (int64_t batch = begin; batch < end; ++batch) {
    block.move_to(a, batch);
    block.each_group(a, [&](const Group<T>& group, int64_t low, int64_t high) {
      for (int64_t c = low; c < high; ++c) {
        block.pivot[c] = group.pivot;
        if (!a.ending.follows()) continue;
        const Line<T> line = line_of<T>(a, group, c);
        block.y_scale[c] = line.scale;
        block.y_center[c] = line.center;
      }
    });
    column_grad_sums<T>(block.columns, 0, block.rows, block.first.data(), block.second.data());
    block.each_group(a, [&](const Group<T>& group, int64_t low, int64_t high) {
      block_factors<T>(a, block, group, low, high);
    });
    block.finish(column_combine<T>);
    for (int64_t c = 0; a.piece_first && c < channels; ++c) {
      a.piece_first[batch * channels + c] = block.first[c];
      a.piece_second[batch * channels + c] = block.second[c];
    }
  }
}

}  // namespace normkit::NORMKIT_ISA
