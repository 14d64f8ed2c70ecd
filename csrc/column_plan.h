// Matrices whose columns belong to statistics groups: how a partition of a channels_last map or of
// an input (N, C) lies in memory, and the sums that the operators share.
//
// Memory is a list of blocks, each a matrix whose columns lie in one statistics group each. A cell
// is one column of one block. Per cell: moments, then the group's, then one (scale, center).
#pragma once

#include <algorithm>

#include "pooled.h"

namespace normkit {


constexpr int64_t kChunk = 131072;  // elements one thread takes at a time
constexpr int64_t kShiftRows = 8;   // rows whose mean the sums of a block are taken around

struct Chunk {
  int64_t block, begin, end;  // rows, counted over the whole tensor
};

// How a partition lies in memory.
class Plan {
 public:
  Plan(const FeatureMap& x, const Partition& partition) : p(partition) {
    if (x.layout == Layout::channels_last) {
      cols = x.num_channels;
      columns_per_channel = 1;
      int64_t segment = p.run, rest = p.plane;
      while (rest) {
        const int64_t next = segment % rest;
        segment = rest;
        rest = next;
      }
      slices = p.plane / segment;
      rows_per_example = p.plane / slices;
    } else {
      cols = p.example_size;
      columns_per_channel = p.plane;
      slices = 1;
      rows_per_example = 1;
    }
    // Blocks of whole batches where the columns of all their rows belong together.
    examples_per_block = slices == 1 ? p.examples_per_group : 1;
    num_blocks = slices == 1 ? p.num_batches : p.num_examples * slices;
    cells_per_group = cols * slices / p.num_groups;
    count_cells();
    const int64_t rows = std::max<int64_t>(kShiftRows, kChunk / cols);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t end = first_row(block) + rows_of(block);
      first_chunk.push_back(chunks.size());
      for (int64_t row = first_row(block); row < end; row += rows) {
        chunks.push_back({block, row, std::min(row + rows, end)});
      }
    }
  }

  int64_t batch_of(int64_t block) const {
    return slices == 1 ? block : block / slices / p.examples_per_group;
  }
  int64_t first_row(int64_t block) const {
    return block * examples_per_block * rows_per_example;
  }
  int64_t rows_of(int64_t block) const {
    return slices == 1 ? p.batch_size(block) * rows_per_example : rows_per_example;
  }
  int64_t channel_of(int64_t col) const { return channels_[col]; }
  int64_t group_of(int64_t block, int64_t col) const { return groups_of(block)[col]; }

  // The groups of a block's columns, found once for the block.
  class Groups {
   public:
    Groups(const int32_t* groups, int64_t origin) : groups_(groups), origin_(origin) {}
    int64_t operator[](int64_t col) const { return origin_ + groups_[col]; }

   private:
    const int32_t* groups_;
    int64_t origin_;
  };
  Groups groups_of(int64_t block) const {
    const int64_t slice = slices == 1 ? 0 : block % slices;
    return {&groups_[slice * cols], batch_of(block) * p.num_groups};
  }
  int64_t num_cells() const { return num_blocks * cols; }

  // Calls visit(cell, col) for every cell of a group.
  template <class F>
  void each_cell(int64_t group, const F& visit) const {
    const int64_t batch = group / p.num_groups, first = group % p.num_groups * cells_per_group;
    const int64_t examples = slices == 1 ? 1 : p.batch_size(batch);
    const int64_t origin = slices == 1 ? batch : p.batch_begin(batch);
    for (int64_t example = origin; example < origin + examples; ++example) {
      int64_t col = first / slices, slice = first % slices;
      for (int64_t k = 0; k < cells_per_group; ++k) {
        visit((example * slices + slice) * cols + col, col);
        if (++slice == slices) slice = 0, ++col;
      }
    }
  }

  // Calls body(block, col_begin, col_end) on all threads until every cell has been seen.
  template <class F>
  void each_block(const F& body) const {
    constexpr int64_t kStrip = 512;
    const int64_t strips = ceil_div(cols, kStrip);
    parallel(num_blocks * strips, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t col = i % strips * kStrip;
        body(i / strips, col, std::min(col + kStrip, cols));
      }
    });
  }

  Partition p;
  int64_t cols, columns_per_channel, slices, rows_per_example, examples_per_block, num_blocks;
  int64_t cells_per_group;
  std::vector<Chunk> chunks;
  std::vector<size_t> first_chunk;  // of each block

 private:
  // By counting: on a 7x7 map a division for each cell costs as much as the cell's elements.
  void count_cells() {
    groups_.resize(slices * cols);
    channels_.resize(cols);
    int64_t group = 0, left = cells_per_group, channel = 0, columns = columns_per_channel;
    for (int64_t col = 0; col < cols; ++col) {
      for (int64_t slice = 0; slice < slices; ++slice) {
        groups_[slice * cols + col] = int32_t(group);
        if (--left == 0) left = cells_per_group, ++group;
      }
      channels_[col] = int32_t(channel);
      if (--columns == 0) columns = columns_per_channel, ++channel;
    }
  }

  std::vector<int32_t> groups_;    // (slices, cols): group within an example
  std::vector<int32_t> channels_;  // (cols)
};

// Tables over cells. A is the accumulator's type, which the kernels read.
template <class A>
struct Cells {
  explicit Cells(const Plan& plan)
      : pivot(plan.num_cells()), scale(plan.num_cells()), slope(plan.num_cells()),
        center(plan.num_cells()), first(plan.num_cells()), second(plan.num_cells()),
        part_first(plan.chunks.size() * plan.cols), part_second(plan.chunks.size() * plan.cols) {}

  std::vector<A> pivot, scale, slope, center;
  std::vector<A> y_scale, y_center;             // empty without an ending
  std::vector<double> first, second;            // (num_blocks, cols)
  std::vector<double> part_first, part_second;  // (chunks, cols)

  // The sums of a block's chunks, in their order.
  void fold(const Plan& plan, int64_t block, int64_t begin, int64_t end) {
    size_t chunk = plan.first_chunk[block];
    for (; chunk < plan.chunks.size() && plan.chunks[chunk].block == block; ++chunk) {
      for (int64_t col = begin; col < end; ++col) {
        first[block * plan.cols + col] += part_first[chunk * plan.cols + col];
        second[block * plan.cols + col] += part_second[chunk * plan.cols + col];
      }
    }
  }
};

inline int64_t chunk_grain(const Plan& plan) {
  const int64_t elements = plan.p.num_examples * plan.p.example_size;
  const int64_t chunk = at_least_one(elements / int64_t(plan.chunks.size()));
  return at_least_one(kGrain / chunk);
}

template <class A>
Columns columns_of(const Plan& plan, const FeatureMap& x, const Cells<A>& cells, int64_t block) {
  const int64_t at = block * plan.cols;
  Columns columns{plan.cols,        plan.cols,        x.data(),         nullptr, nullptr,
                  &cells.pivot[at], &cells.scale[at], &cells.slope[at], &cells.center[at]};
  if (!cells.y_scale.empty()) {
    columns.y_scale = &cells.y_scale[at];
    columns.y_center = &cells.y_center[at];
  }
  return columns;
}

template <class A>
void cell_moments(const Plan& plan, const FeatureMap& x, const Kernels& kernels, Cells<A>& cells) {
  parallel(plan.num_blocks, at_least_one(kGrain / (plan.cols * kShiftRows)),
           [&](int64_t begin, int64_t end) {
             for (int64_t block = begin; block < end; ++block) {
               Columns columns = columns_of(plan, x, cells, block);
               columns.x = static_cast<const char*>(x.data()) +
                           plan.first_row(block) * plan.cols * x.element_size();
               kernels.column_shift(columns, std::min(kShiftRows, plan.rows_of(block)),
                                    &cells.pivot[block * plan.cols]);
             }
           });
  parallel(int64_t(plan.chunks.size()), chunk_grain(plan), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = plan.chunks[i];
      kernels.column_sums(columns_of(plan, x, cells, chunk.block), chunk.begin, chunk.end,
                          &cells.part_first[i * plan.cols], &cells.part_second[i * plan.cols]);
    }
  });
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    cells.fold(plan, block, begin, end);
    const double reciprocal = 1.0 / double(plan.rows_of(block));
    for (int64_t cell = block * plan.cols + begin; cell < block * plan.cols + end; ++cell) {
      const double offset = cells.first[cell] * reciprocal;
      const double spread = cells.second[cell] * reciprocal - offset * offset;
      cells.first[cell] = double(cells.pivot[cell]) + offset;
      cells.second[cell] = spread < 0 ? 0 : spread;
    }
  });
}

// Sums of g and of g (x - mean) over each cell, with the group's mean; also stores pivots.
template <class A>
void cell_gradients(const Plan& plan, const FeatureMap& x, const Tensor& g, const Kernels& kernels,
                    const Statistics& given, Cells<A>& cells, const Ending& ending = {}) {
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    const Plan::Groups groups = plan.groups_of(block);
    for (int64_t col = begin; col < end; ++col) {
      cells.pivot[block * plan.cols + col] = A(given.mean[groups[col]]);
    }
  });
  parallel(int64_t(plan.chunks.size()), chunk_grain(plan), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = plan.chunks[i];
      Columns columns = columns_of(plan, x, cells, chunk.block);
      columns.grad = g.data_ptr();
      columns.ending = ending;
      kernels.column_grad_sums(columns, chunk.begin, chunk.end, &cells.part_first[i * plan.cols],
                               &cells.part_second[i * plan.cols]);
    }
  });
  plan.each_block([&](int64_t block, int64_t begin, int64_t end) {
    cells.fold(plan, block, begin, end);
    const Plan::Groups groups = plan.groups_of(block);
    for (int64_t col = begin; col < end; ++col) {
      const int64_t cell = block * plan.cols + col;
      const double mean = given.mean[groups[col]];
      cells.second[cell] += (double(cells.pivot[cell]) - mean) * cells.first[cell];
    }
  });
}

// From the last chunk to the first, because the pass before left the end of the map in the cache.
template <class F>
void each_chunk_backwards(const Plan& plan, const F& body) {
  parallel(int64_t(plan.chunks.size()), chunk_grain(plan), [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) body(plan.chunks[i]);
  });
}

}  // namespace normkit
