// Programs on tables: what a composite of norms does to the moments of a map's channels.
//
// kernels/program.py describes the text of a program, which is made from the composite's formula.
// This file parses a text once, and plans when each step is computed and where its table lies. A run
// computes all steps for a few rows of the tables at a time, so that these stay in the nearest cache.
// A sum over examples needs all rows, so it ends such a pass over the rows; tables that a later pass
// needs are stored whole.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace normkit {

enum class Op {
  mean, var, grad_scale, grad_center, parameter, given, kept, share, inverse_examples, inverse_size,
  number, add, subtract, multiply, rsqrt, sigmoid, softmax, repeat, sum_runs, mean_runs,
  spread_runs, spread_examples, sum_examples, mean_examples, slice, pad, join, detach,
  each_example, copy
};

class TableProgram {
 public:
  // The program of a text; it is parsed by the first call.
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
  bool fits(const Step& step) const;
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

}  // namespace normkit
