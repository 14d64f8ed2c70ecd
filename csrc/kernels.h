// The interface between operators and vector code: plain data and plain functions.
//
// The vector code (rows.h, columns.h, positional.h) is compiled once for each instruction set and
// reached through one table of functions for each element type. Nothing here knows about torch.
#pragma once

#include <cstdint>

namespace normkit {

enum class Element { float32, float64, bfloat16, float16 };

// As in kernels/activations.py.
enum class Activation : int64_t { none, relu, leaky_relu, silu, gelu, hardswish, sigmoid, tanh, relu6 };

// The ending of a call, y = act(norm(x) + residual), and maps for its gradient, in x's layout.
struct Ending {
  Activation activation;
  double slope;          // of a leaky ReLU below 0
  const void* residual;  // what is added, or null
  const void* result;    // backward of ReLU and leaky ReLU with a residual: y, which has u's sign
  void* passed;          // backward: where g act'(u) is written, or null
  bool follows() const { return activation != Activation::none || residual; }
};

// A feature map (num_examples, num_channels, plane) whose statistics groups are runs of
// `examples_per_group` examples times runs of `run` elements of one example.
struct Partition {
  int64_t num_examples, num_channels, plane;
  int64_t num_groups, examples_per_group;
  int64_t example_size;  // num_channels * plane
  int64_t run;           // example_size / num_groups
  int64_t num_batches;   // runs of examples, the last may be shorter

  int64_t batch_begin(int64_t batch) const { return batch * examples_per_group; }
  int64_t batch_size(int64_t batch) const {
    const int64_t left = num_examples - batch_begin(batch);
    return left < examples_per_group ? left : examples_per_group;
  }
};

// One call of the pooled operators on contiguous memory. `weight` and `bias` hold the accumulator's
// type (float, or double for float64) and may be null. They have one value for each `affine_plane`
// elements of an example: the plane, or 1 when short planes were expanded, or `run` without affine.
struct Pooled {
  Partition partition;
  const void* x;
  const void* grad;  // backward only
  void* out;         // y, or dx
  const void* weight;
  const void* bias;
  int64_t affine_plane;
  double eps;
  double* mean;  // (num_batches, num_groups)
  double* var;
  bool constant;  // mean and var are given and do not depend on x
  // Sums for each piece (the part of a group inside one channel), (num_batches, num_pieces), or null:
  // forward: mean and variance; backward: terms of dbias and dweight.
  double* piece_first;
  double* piece_second;
  int64_t num_pieces;
  Ending ending;
};

// A row-major matrix with one statistic for each column, and the tables that go with its columns.
struct Columns {
  int64_t cols, stride;  // stride: from a row to the next, in elements
  const void* x;
  const void* grad;
  void* out;
  const void* pivot;  // accumulator's type, (cols,), as are the next three
  const void* scale;
  const void* slope;
  const void* center;
  const void* y_scale;  // backward through an ending: the factors of forward
  const void* y_center;
  Ending ending;
};

// PositionalNorm on contiguous memory: examples of (num_channels, plane), statistics per position.
struct Positional {
  int64_t num_examples, num_channels, plane, tile, num_tiles;  // tiles of positions in a plane
  const void* x;
  const void* grad;
  void* out;
  const void* weight;
  const void* bias;
  double eps;
  double* mean;  // (num_examples, plane)
  double* var;
  double* tile_dbias;  // (num_examples * num_tiles, num_channels) or null
  double* tile_dweight;
  Ending ending;  // whose gradient, backward, the first pass always writes
};

// The four primitives on contiguous memory: `num_rows` rows of `length`, row r using table entry
// r % table_size. Tables hold float or double as `wide` says.
struct Rows {
  int64_t length, table_size;
  const void* x;
  const void* grad;
  void* out;
  bool wide;
  void* table[5];
  Ending ending;  // of apply; and of the sums of gradients, which always write what they pass
};

struct Kernels {
  // Whole groups [begin, end) of num_batches * num_groups, statistics and result.
  void (*forward_groups)(const Pooled&, int64_t begin, int64_t end);
  void (*backward_groups)(const Pooled&, int64_t begin, int64_t end);
  // Parts of one group, elements [low, high) of one example, for groups shared by threads.
  double (*first_mean)(const void* x, int64_t offset, int64_t length);
  void (*run_sums)(const void* x, int64_t offset, int64_t length, double shift, double* sums);
  void (*apply_run)(const Pooled&, int64_t group, int64_t example, int64_t low, int64_t high);
  void (*grad_run)(const Pooled&, int64_t group, int64_t example, int64_t low, int64_t high,
                   double* pieces);
  void (*combine_run)(const Pooled&, int64_t group, int64_t example, int64_t low, int64_t high,
                      const double* sums);
  // Affine per element: one group index for batches [begin, end), adding to dbias and dweight.
  void (*backward_elementwise)(const Pooled&, int64_t group, int64_t begin, int64_t end,
                               void* dbias, void* dweight);

  // channels_last, groups of whole channels: runs of examples [begin, end).
  void (*forward_blocks)(const Pooled&, int64_t begin, int64_t end);
  void (*backward_blocks)(const Pooled&, int64_t begin, int64_t end);

  void (*column_shift)(const Columns&, int64_t rows, void* shift);
  void (*column_sums)(const Columns&, int64_t begin, int64_t end, double* first, double* second);
  void (*column_apply)(const Columns&, int64_t begin, int64_t end);
  void (*column_grad_sums)(const Columns&, int64_t begin, int64_t end, double* first,
                           double* second);
  void (*column_combine)(const Columns&, int64_t begin, int64_t end);

  void (*positional_forward)(const Positional&, int64_t begin, int64_t end);
  void (*positional_backward)(const Positional&, int64_t begin, int64_t end);

  void (*row_moments)(const Rows&, int64_t begin, int64_t end);
  void (*row_apply)(const Rows&, int64_t begin, int64_t end);
  void (*row_grad_sums)(const Rows&, int64_t begin, int64_t end);
  void (*row_combine)(const Rows&, int64_t begin, int64_t end);
};

// One per compiled instruction set; dispatch.cpp chooses among them.
namespace baseline {
const Kernels& kernels(Element);
}
namespace avx2 {
const Kernels& kernels(Element);
}
namespace avx512 {
const Kernels& kernels(Element);
}

const Kernels& best_kernels(Element);
const char* instruction_set();

}  // namespace normkit
