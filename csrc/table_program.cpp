#include "table_program.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <unordered_map>

#include "table_rows.h"

namespace normkit {
namespace {

constexpr int64_t kBlock = 512;  // values of a table that are worked on at a time
constexpr int64_t kMostKept = 1 << 17;  // values that a thread keeps memory for

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

const Tensor& there(const OptionalTensor& tensor) {
  STD_TORCH_CHECK(tensor.has_value(), "a program on tables asks for a tensor that was not given");
  return *tensor;
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
  STD_TORCH_CHECK(head && channels > 0, "a program on tables begins with its channels, not with '",
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
  steps_.push_back(step);
}

int TableProgram::line_of(const std::string& result) const {
  for (const auto& [name, line] : results_) {
    if (name == result) return line;
  }
  return -1;
}

// Tables of the map's channels come out in memory of their own.
void TableProgram::copy_results() {
  static const char* tables[] = {"scale", "center", "k1", "k2", "k3"};
  for (auto& [name, line] : results_) {
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

// In which pass over the rows each table is made. A sum over examples is there after a pass.
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

// Gives tables of a pass memory that nothing needs any more.
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

TableRun::TableRun(const TableProgram& program, const TableInputs& inputs)
    : program_(program), inputs_(inputs) {
  const int64_t rows = inputs.num_examples, cells = rows * program.channels;
  num_threads_ = 1;
  if (cells > kTableGrain) {
    num_threads_ = int(std::min({num_threads(), ceil_div(cells, kTableGrain), rows}));
  }
  const int64_t for_threads = num_threads_ * (program.block_size_ + program.partial_size_);
  rows_ = memory(program.row_size_ + rows * program.whole_columns_ + for_threads + 1);
  whole_ = rows_ + program.row_size_;
  blocks_ = whole_ + rows * program.whole_columns_;
  partials_ = blocks_ + num_threads_ * program.block_size_;
}

// Memory of this thread's last run, where that is enough and not much.
double* TableRun::memory(int64_t size) {
  static thread_local std::vector<double> kept;
  if (size > kMostKept) {
    own_.reset(new double[size]);
    return own_.get();
  }
  if (int64_t(kept.size()) < size) kept.resize(size);
  return kept.data();
}

void TableRun::run() {
  load_inputs();
  const int64_t rows = inputs_.num_examples, share = ceil_div(rows, num_threads_);
  for (int phase = 0; phase < program_.num_phases_; ++phase) {
    for (const int line : program_.rows_before_[phase]) make(line, 0, 0, 1);
    if (program_.in_pass_[phase].empty()) continue;
    parallel(num_threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pass(phase, int(i), std::min(i * share, rows), std::min((i + 1) * share, rows));
      }
    });
    merge(phase);
  }
}

void TableRun::load_inputs() {
  for (size_t line = 0; line < program_.steps_.size(); ++line) {
    const Step& step = program_.steps_[line];
    if (step.op >= Op::add || step.per_example) continue;
    double* to = rows_ + step.offset;
    const int which = step.op == Op::number ? 0 : int(step.number);
    switch (step.op) {
      case Op::parameter:
        read_doubles(there(*inputs_.parameters[which]), step.columns, to);
        break;
      case Op::given:
        read_doubles(there(*inputs_.given[which]), step.columns, to);
        break;
      case Op::kept:
        std::copy_n(inputs_.kept[which], step.columns, to);
        break;
      case Op::share:
        *to = inputs_.share;
        break;
      case Op::inverse_examples:
        *to = 1.0 / double(inputs_.num_examples);
        break;
      case Op::inverse_size:
        *to = 1.0 / double(inputs_.segment_size);
        break;
      default:
        *to = step.number;
    }
  }
}

double* TableRun::place(int line, int thread, int64_t row) const {
  const Step& step = program_.steps_[line];
  switch (step.place) {
    case TableProgram::Place::row:
      return rows_ + step.offset;
    case TableProgram::Place::block:
      return blocks_ + thread * program_.block_size_ + step.offset;
    case TableProgram::Place::whole:
      return whole_ + inputs_.num_examples * step.offset + row * step.columns;
    default: {
      const double* given = step.op == Op::mean          ? inputs_.mean
                            : step.op == Op::var         ? inputs_.var
                            : step.op == Op::grad_scale  ? inputs_.grad_scale
                                                         : inputs_.grad_center;
      return const_cast<double*>(given) + row * step.columns;  // read only
    }
  }
}

TableRun::View TableRun::view(int line, int thread, int64_t row) const {
  const Step& step = program_.steps_[line];
  const Step& root = program_.steps_[step.root];
  return {place(step.root, thread, row) + step.shift, root.per_example ? root.columns : 0,
          step.is_scalar()};
}

void TableRun::pass(int phase, int thread, int64_t begin, int64_t end) {
  std::fill_n(partial(thread), program_.partial_size_, 0.0);
  for (int64_t row = begin; row < end; row += program_.block_rows_) {
    const int64_t count = std::min(program_.block_rows_, end - row);
    for (const int line : program_.in_pass_[phase]) {
      const Step& step = program_.steps_[line];
      if (step.is_sum()) {
        accumulate(step, thread, row, count, begin);
      } else {
        make(line, thread, row, count);
      }
    }
  }
}

void TableRun::accumulate(const Step& step, int thread, int64_t row, int64_t count,
                          int64_t begin) {
  double* to = partial(thread) + step.partial;
  const View a = view(step.tables[0], thread, row);
  if (step.op != Op::spread_examples) {
    for (int64_t i = 0; i < count; ++i) row_accumulate(step.columns, a.values + i * a.stride, to);
    return;
  }
  const View m = view(step.tables[1], thread, row);
  for (int64_t i = 0; i < count; ++i) {
    const double share = 1.0 / double(row + i - begin + 1);
    row_accumulate_spread(step.columns, a.values + i * a.stride, m.values + i * m.stride, share,
                          to, to + step.columns);
  }
}

// Adds up what the threads have summed, in their order.
void TableRun::merge(int phase) {
  const int64_t rows = inputs_.num_examples, share = ceil_div(rows, num_threads_);
  for (const int line : program_.in_pass_[phase]) {
    const Step& step = program_.steps_[line];
    if (!step.is_sum()) continue;
    double *to = rows_ + step.offset, *first = partial(0) + step.partial;
    const bool is_spread = step.op == Op::spread_examples;
    const int64_t columns = step.columns;
    for (int i = 1; i < num_threads_; ++i) {
      const double* other = partial(i) + step.partial;
      const double before = double(std::min(i * share, rows));
      const double more = double(std::min((i + 1) * share, rows)) - before;
      if (more <= 0) continue;
      for (int64_t c = 0; c < columns; ++c) {
        if (is_spread) {
          const double apart = other[c] - first[c];
          first[c] += apart * more / (before + more);
          first[columns + c] += other[columns + c] + apart * apart * before * more / (before + more);
        } else {
          first[c] += other[c];
        }
      }
    }
    const double factor = step.op == Op::sum_examples ? 1.0 : 1.0 / double(rows);
    row_multiply(columns, first + (is_spread ? columns : 0), factor, to);
  }
}

void TableRun::make(int line, int thread, int64_t row, int64_t count) const {
  const Step& step = program_.steps_[line];
  double* out = place(line, thread, row);
  const int64_t columns = step.columns;
  View a = view(step.tables[0], thread, row);
  View b = step.num_tables > 1 ? view(step.tables[1], thread, row) : a;
  switch (step.op) {
    case Op::add: case Op::subtract: case Op::multiply: case Op::rsqrt: case Op::sigmoid:
    case Op::copy:
      break;
    case Op::repeat:
      for (int64_t i = 0; i < count; ++i) {
        runs_repeat(columns / step.width(), step.width(), a.values + i * a.stride,
                    out + i * columns);
      }
      return;
    case Op::sum_runs: case Op::mean_runs: {
      const double factor = step.op == Op::sum_runs ? 1.0 : 1.0 / step.number;
      for (int64_t i = 0; i < count; ++i) {
        runs_sum(columns, step.width(), a.values + i * a.stride, factor, out + i * columns);
      }
      return;
    }
    case Op::spread_runs: {
      const View center = view(step.tables[2], thread, row);
      for (int64_t i = 0; i < count; ++i) {
        runs_spread(columns, step.width(), a.values + i * a.stride, b.values + i * b.stride,
                    center.values + i * center.stride, out + i * columns);
      }
      return;
    }
    case Op::softmax:
      return row_softmax(columns, a.values, out);
    case Op::pad: {
      const int64_t size = program_.steps_[step.tables[0]].columns, first = step.width();
      for (int64_t i = 0; i < count; ++i) {
        double* to = out + i * columns;
        std::fill_n(to, first, 0.0);
        std::copy_n(a.values + i * a.stride, size, to + first);
        std::fill_n(to + first + size, columns - first - size, 0.0);
      }
      return;
    }
    default: {  // join
      const int64_t size = program_.steps_[step.tables[0]].columns;
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(a.values + i * a.stride, size, out + i * columns);
        std::copy_n(b.values + i * b.stride, columns - size, out + i * columns + size);
      }
      return;
    }
  }
  int64_t rows = count, n = columns;
  const auto is_dense = [&](const View& v) { return v.is_scalar || v.stride == columns; };
  if (rows > 1 && is_dense(a) && is_dense(b)) {
    n *= rows;
    rows = 1;
  }
  const bool one = n == 1;
  for (int64_t i = 0; i < rows; ++i) {
    const double *x = a.values + i * a.stride, *y = b.values + i * b.stride;
    double* to = out + i * columns;
    switch (step.op) {
      case Op::add:
        if (b.is_scalar && !one) row_add(n, x, *y, to);
        else if (a.is_scalar && !one) row_add(n, y, *x, to);
        else row_add(n, x, y, to);
        break;
      case Op::multiply:
        if (b.is_scalar && !one) row_multiply(n, x, *y, to);
        else if (a.is_scalar && !one) row_multiply(n, y, *x, to);
        else row_multiply(n, x, y, to);
        break;
      case Op::subtract:
        if (b.is_scalar && !one) row_add(n, x, -*y, to);
        else if (a.is_scalar && !one) row_subtract(n, *x, y, to);
        else row_subtract(n, x, y, to);
        break;
      case Op::rsqrt:
        row_rsqrt(n, x, to);
        break;
      case Op::sigmoid:
        row_sigmoid(n, x, to);
        break;
      default:
        if (a.is_scalar) std::fill_n(to, n, *x);
        else std::copy_n(x, n, to);
    }
  }
}

double* TableRun::result(const std::string& name) const {
  const int line = program_.line_of(name);
  return line < 0 ? nullptr : const_cast<double*>(view(line, 0, 0).values);
}

int64_t TableRun::columns_of(const std::string& name) const {
  return program_.steps_[program_.line_of(name)].columns;
}

}  // namespace normkit
