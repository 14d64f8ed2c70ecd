// Runs programs on tables: what a composite of norms does to the moments of a map's channels.
//
// kernels/program.py says what a program's text is and makes it from the composite's formula. Here it
// is read once, laid out in memory, and then run for each call: a few rows of all tables at a time,
// which stay in the nearest cache, on all threads. What sums over examples ends a pass over the rows.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "tensors.h"

namespace normkit {

using ParameterTensors = std::array<const OptionalTensor*, 4>;

// What a program is given; tables (N, C) of double.
struct TableInputs {
  int64_t num_examples;
  int64_t segment_size;
  double share;  // of what the input says, beside what was there before
  const double *mean, *var, *grad_scale, *grad_center;
  const double* kept[2];
  const OptionalTensor* given[2];
  ParameterTensors parameters;
};

enum class Op {
  mean, var, grad_scale, grad_center, parameter, given, kept, share, inverse_examples, inverse_size,
  number, add, subtract, multiply, rsqrt, sigmoid, softmax, repeat, sum_runs, mean_runs,
  spread_runs, spread_examples, sum_examples, mean_examples, slice, pad, join, detach,
  each_example, copy
};

class TableProgram {
 public:
  // The program of a text, which is read when it is first asked for.
  static const TableProgram& of(const std::string& text);
  explicit TableProgram(const std::string& text);

  int64_t channels, given_from, kept_columns;
  std::string moves;
  bool has(const std::string& result) const { return line_of(result) >= 0; }

 private:
  friend class TableRun;
  enum class Place { row, block, whole, given };
  struct Step {
    Op op;
    int tables[3];
    int num_tables;
    double number;
    bool per_example;
    int64_t columns;
    int phase;        // the pass over rows that makes it; of a row, the pass before which it is there
    int root;         // the line whose memory it is: another's for a part of that
    int64_t shift;    // first column of that part
    Place place;
    int64_t offset;   // in the memory of that place, in columns for whole tables
    int64_t partial;  // of a sum over examples: in each thread's memory of these

    bool is_sum() const {
      return op == Op::sum_examples || op == Op::mean_examples || op == Op::spread_examples;
    }
    bool is_view() const {
      return op == Op::slice || op == Op::detach || op == Op::each_example;
    }
    bool is_scalar() const { return !per_example && columns == 1; }
    int64_t width() const { return int64_t(number); }
  };

  int line_of(const std::string& result) const;
  void read(const std::string& line);
  void copy_results();
  void plan_phases();
  void plan_memory();
  std::vector<int> last_phases() const;
  void plan_blocks();

  std::vector<Step> steps_;
  std::vector<std::pair<std::string, int>> results_;
  int num_phases_ = 0;
  std::vector<std::vector<int>> rows_before_, in_pass_;  // lines, by phase
  int64_t block_rows_ = 1, row_size_ = 0, whole_columns_ = 0, block_size_ = 0, partial_size_ = 0;
};

// One run of a program; a thread has one at a time, which its results are read from.
class TableRun {
 public:
  TableRun(const TableProgram& program, const TableInputs& inputs);
  void run();
  // After run: a table (N, C), or a row.
  double* result(const std::string& name) const;
  int64_t columns_of(const std::string& name) const;

 private:
  using Step = TableProgram::Step;
  struct View {
    const double* values;
    int64_t stride;
    bool is_scalar;
  };

  double* memory(int64_t size);
  void load_inputs();
  void pass(int phase, int thread, int64_t begin, int64_t end);
  void merge(int phase);
  void accumulate(const Step& step, int thread, int64_t row, int64_t count, int64_t begin);
  View view(int line, int thread, int64_t row) const;
  double* place(int line, int thread, int64_t row) const;
  void make(int line, int thread, int64_t row, int64_t count) const;
  double* partial(int thread) const { return partials_ + thread * program_.partial_size_; }

  const TableProgram& program_;
  const TableInputs& inputs_;
  int num_threads_;
  std::unique_ptr<double[]> own_;
  double *rows_, *whole_, *blocks_, *partials_;
};

}  // namespace normkit
