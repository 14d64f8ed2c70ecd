// Runs a program on tables, on all threads.
#pragma once

#include <array>
#include <memory>

#include "table_program.h"
#include "tensors.h"

namespace normkit {

using ParameterTensors = std::array<const OptionalTensor*, 4>;

// Inputs of a program; tables (N, C) of double.
struct TableInputs {
  int64_t num_examples;
  int64_t segment_size;
  double share;  // of what the input says, beside what was there before
  const double *mean, *var, *grad_scale, *grad_center;
  const double* kept[2];
  const OptionalTensor* given[2];
  ParameterTensors parameters;
};

// One run of a program, which holds its results. A thread has one run at a time.
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
    int64_t stride;  // from row to row; 0 where every row is the same
    bool is_scalar;
    const double* row(int64_t i) const { return values + i * stride; }
  };

  double* memory(int64_t size);
  void load_inputs();
  void pass(int phase, int thread, int64_t begin, int64_t end);
  void merge(int phase);
  void accumulate(const Step& step, int thread, int64_t row, int64_t count, int64_t begin);
  View view(int line, int thread, int64_t row) const;
  double* place(int line, int thread, int64_t row) const;
  void make(int line, int thread, int64_t row, int64_t count) const;
  static void value_by_value(Op op, int64_t rows, int64_t columns, const View& a, const View& b,
                             double* out);
  static void along_row(const Step& step, int64_t size, const double* a, const double* b,
                        const double* c, double* out);
  double* partial(int thread) const { return partials_ + thread * program_.partial_size_; }

  const TableProgram& program_;
  const TableInputs& inputs_;
  int num_threads_;
  std::unique_ptr<double[]> own_;
  double *rows_, *whole_, *blocks_, *partials_;
};

}  // namespace normkit
