#include "table_program.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <unordered_map>

#include "tensors.h"

namespace normkit {
namespace {

constexpr int64_t kBlock = 512;  // values of a table that are worked on at a time

const std::map<std::string, Op>& ops() {
  static const std::map<std::string, Op> known = {
      {"mean", Op::mean}, {"var", Op::var}, {"grad_scale", Op::grad_scale},
      {"grad_center", Op::grad_center}, {"parameter", Op::parameter}, {"given", Op::given},
      {"kept", Op::kept}, {"share", Op::share}, {"inverse_examples", Op::inverse_examples},
      {"inverse_size", Op::inverse_size}, {"number", Op::number}, {"add", Op::add},
      {"subtract", Op::subtract}, {"multiply", Op::multiply}, {"rsqrt", Op::rsqrt},
      {"sigmoid", Op::sigmoid}, {"softmax", Op::softmax}, {"repeat", Op::repeat},
      {"sum_runs", Op::sum_runs}, {"mean_runs", Op::mean_runs}, {"spread_runs", Op::spread_runs},
      {"spread_examples", Op::spread_examples}, {"sum_examples", Op::sum_examples},
      {"mean_examples", Op::mean_examples}, {"slice", Op::slice}, {"pad", Op::pad},
      {"join", Op::join}, {"detach", Op::detach}, {"each_example", Op::each_example}};
  return known;
}

int num_tables(Op op) {
  switch (op) {
    case Op::add: case Op::subtract: case Op::multiply: case Op::join:
      return 2;
    case Op::spread_runs: case Op::spread_examples:
      return 3;
    default:
      return op < Op::add ? 0 : 1;
  }
}

}  // namespace

const TableProgram& TableProgram::of(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::unique_ptr<const TableProgram>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<const TableProgram>& found = known[text];
  if (!found) found = std::make_unique<const TableProgram>(text);
  return *found;
}

TableProgram::TableProgram(const std::string& text) {
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  std::istringstream head(line);
  head >> channels >> moves >> given_from >> kept_columns;
  STD_TORCH_CHECK(head && channels > 0 && given_from >= 0 && kept_columns >= 0 &&
                      kept_columns <= channels && (given_from == channels ||
                      kept_columns == channels - given_from),
                  "a program on tables begins with its channels, not with '",
                  line, "'");
  while (std::getline(lines, line)) read(line);
  copy_results();
  plan_phases();
  plan_memory();
}

void TableProgram::read(const std::string& line) {
  std::istringstream words(line);
  std::string rows, name;
  words >> rows;
  if (rows == "=") {
    int made;
    words >> name >> made;
    STD_TORCH_CHECK(words && made >= 0 && made < int(steps_.size()),
                    "a result of a program on tables is one of its steps: '", line, "'");
    results_.emplace_back(name, made);
    return;
  }
  Step step{};
  words >> step.columns >> name;
  const auto op = ops().find(name);
  STD_TORCH_CHECK(op != ops().end(), "no program on tables has a step '", line, "'");
  step.op = op->second;
  step.per_example = rows == "N";
  step.num_tables = num_tables(step.op);
  for (int i = 0; i < step.num_tables; ++i) {
    words >> step.tables[i];
    STD_TORCH_CHECK(step.tables[i] >= 0 && step.tables[i] < int(steps_.size()),
                    "a step takes tables that are there: '", line, "'");
  }
  words >> step.number;
  STD_TORCH_CHECK(fits(step), "the tables of a step do not fit it: '", line, "'");
  steps_.push_back(step);
}

// Whether a step's table and its arguments have the right numbers of columns. No other check keeps a
// run from reading or writing outside its memory.
bool TableProgram::fits(const Step& step) const {
  const auto columns_of = [&](int i) { return steps_[step.tables[i]].columns; };
  const auto is_alike = [&](int i) {
    return columns_of(i) == step.columns || steps_[step.tables[i]].is_scalar();
  };
  const int64_t first = step.num_tables > 0 ? columns_of(0) : 0, width = step.width();
  switch (step.op) {
    case Op::mean: case Op::var: case Op::grad_scale: case Op::grad_center:
      return step.per_example && step.columns == channels;
    case Op::kept:
      return (width == 0 || width == 1) && step.columns == kept_columns;
    case Op::given:
      return width == 0 || width == 1;
    case Op::parameter:
      return width >= 0 && width < 4;
    case Op::share: case Op::inverse_examples: case Op::inverse_size: case Op::number:
      return step.columns == 1;
    case Op::repeat:
      return width > 0 && step.columns == first * width;
    case Op::sum_runs: case Op::mean_runs:
      return width > 0 && first == step.columns * width;
    case Op::spread_runs:
      return width > 0 && first == step.columns * width && columns_of(1) == first &&
             columns_of(2) == step.columns;
    case Op::slice:
      return width >= 0 && width + step.columns <= first;
    case Op::pad:
      return width >= 0 && width + first <= step.columns;
    case Op::join:
      return first + columns_of(1) == step.columns;
    case Op::add: case Op::subtract: case Op::multiply:
      return is_alike(0) && is_alike(1);
    case Op::spread_examples:
      return first == step.columns && columns_of(1) == step.columns;
    default:
      return first == step.columns;
  }
}

int TableProgram::line_of(const std::string& result) const {
  for (const auto& [name, line] : results_) {
    if (name == result) return line;
  }
  return -1;
}

// Results with a column for each channel of the map have memory of their own.
void TableProgram::copy_results() {
  static const char* tables[] = {"scale", "center", "k1", "k2", "k3"};
  for (auto& [name, line] : results_) {
    const bool is_kept = name == "kept_mean" || name == "kept_var";
    const bool is_row = is_kept || name.rfind("gradient", 0) == 0;
    STD_TORCH_CHECK(is_row ? !steps_[line].per_example : steps_[line].columns == channels ||
                                                             steps_[line].is_scalar(),
                    "a program's result ", name, " has ", steps_[line].columns, " columns");
    STD_TORCH_CHECK(!is_kept || steps_[line].columns == kept_columns, "a program keeps ",
                    kept_columns, " columns, and ", name, " has ", steps_[line].columns);
    if (std::find(std::begin(tables), std::end(tables), name) == std::end(tables)) continue;
    const Step& made = steps_[line];
    if (made.per_example && !made.is_view() && made.op >= Op::add) continue;
    Step copy{};
    copy.op = Op::copy;
    copy.tables[0] = line;
    copy.num_tables = 1;
    copy.per_example = true;
    copy.columns = channels;
    line = int(steps_.size());
    steps_.push_back(copy);
  }
}

// In which pass over the rows each table is computed. A sum over examples is known after a pass.
void TableProgram::plan_phases() {
  for (Step& step : steps_) {
    step.phase = 0;
    const int count = step.op == Op::spread_examples ? 2 : step.num_tables;  // M is found anew
    for (int i = 0; i < count; ++i) step.phase = std::max(step.phase, steps_[step.tables[i]].phase);
    if (step.is_sum()) ++step.phase;
    num_phases_ = std::max(num_phases_, step.phase + 1);
  }
  rows_before_.resize(num_phases_);
  in_pass_.resize(num_phases_);
  for (int line = 0; line < int(steps_.size()); ++line) {
    const Step& step = steps_[line];
    if (step.op < Op::add || step.is_view()) continue;
    if (step.is_sum()) {
      in_pass_[step.phase - 1].push_back(line);
    } else {
      (step.per_example ? in_pass_ : rows_before_)[step.phase].push_back(line);
    }
  }
}

// The last pass in which each line's memory is read.
std::vector<int> TableProgram::last_phases() const {
  std::vector<int> last(steps_.size(), -1);
  for (const Step& step : steps_) {
    if (step.is_view()) continue;
    const int phase = step.is_sum() ? step.phase - 1 : step.phase;
    for (int i = 0; i < step.num_tables; ++i) {
      int& of_root = last[steps_[step.tables[i]].root];
      of_root = std::max(of_root, phase);
    }
  }
  for (const auto& [name, line] : results_) last[steps_[line].root] = num_phases_;
  return last;
}

void TableProgram::plan_memory() {
  block_rows_ = std::max<int64_t>(1, kBlock / channels);
  for (int line = 0; line < int(steps_.size()); ++line) {
    Step& step = steps_[line];
    step.root = line;
    if (step.is_view()) {
      const Step& whole = steps_[step.tables[0]];
      step.root = whole.root;
      step.shift = whole.shift + (step.op == Op::slice ? step.width() : 0);
    } else if (!step.per_example) {
      step.place = Place::row;
      step.offset = row_size_;
      row_size_ += step.columns;
      step.partial = partial_size_;
      if (step.is_sum()) partial_size_ += step.columns * (step.op == Op::spread_examples ? 2 : 1);
    } else if (step.op < Op::add) {
      step.place = Place::given;
    }
  }
  const std::vector<int> last = last_phases();
  for (size_t line = 0; line < steps_.size(); ++line) {
    Step& step = steps_[line];
    if (step.is_view() || !step.per_example || step.op < Op::add) continue;
    step.place = last[line] > step.phase ? Place::whole : Place::block;
    if (step.place == Place::block) continue;
    step.offset = whole_columns_;
    whole_columns_ += step.columns;
  }
  plan_blocks();
}

// Lets the tables of a pass use memory that no later step reads.
void TableProgram::plan_blocks() {
  for (const std::vector<int>& lines : in_pass_) {
    std::vector<int> last(steps_.size(), -1);  // the line that reads it last
    for (const int line : lines) {
      for (int i = 0; i < steps_[line].num_tables; ++i) {
        last[steps_[steps_[line].tables[i]].root] = line;
      }
    }
    std::multimap<int64_t, int64_t> free;  // columns, offset
    int64_t size = 0;
    for (const int line : lines) {
      Step& step = steps_[line];
      if (step.per_example && step.place == Place::block) {
        const auto found = free.find(step.columns);
        if (found != free.end()) {
          step.offset = found->second;
          free.erase(found);
        } else {
          step.offset = size;
          size += step.columns * block_rows_;
        }
      }
      for (int i = 0; i < step.num_tables; ++i) {
        const int root = steps_[step.tables[i]].root;
        const Step& read = steps_[root];
        if (read.per_example && read.place == Place::block && last[root] == line) {
          free.emplace(read.columns, read.offset);
          last[root] = -1;  // given back once, if it is read twice
        }
      }
    }
    block_size_ = std::max(block_size_, size);
  }
}

}  // namespace normkit
