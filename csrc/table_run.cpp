#include "table_run.h"

#include <algorithm>

#include "table_rows.h"

namespace normkit {
namespace {

constexpr int64_t kMostKept = 1 << 17;  // values that a thread keeps memory for

const Tensor& there(const OptionalTensor& tensor) {
  STD_TORCH_CHECK(tensor.has_value(), "a program on tables asks for a tensor that was not given");
  return *tensor;
}

}  // namespace

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

// The memory of this thread's last run, if it is large enough, and small enough to be kept.
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

// Adds up the threads' sums, in the order of the threads.
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

// Computes `count` rows of a table, from `row` on.
void TableRun::make(int line, int thread, int64_t row, int64_t count) const {
  const Step& step = program_.steps_[line];
  const View a = view(step.tables[0], thread, row);
  const View b = step.num_tables > 1 ? view(step.tables[1], thread, row) : a;
  double* out = place(line, thread, row);
  if (step.op <= Op::sigmoid || step.op == Op::copy) {
    return value_by_value(step.op, count, step.columns, a, b, out);
  }
  const View c = step.num_tables > 2 ? view(step.tables[2], thread, row) : a;
  const int64_t size = program_.steps_[step.tables[0]].columns;  // of a row of the first table
  for (int64_t i = 0; i < count; ++i, out += step.columns) {
    along_row(step, size, a.row(i), b.row(i), c.row(i), out);
  }
}

void TableRun::value_by_value(Op op, int64_t rows, int64_t columns, const View& a, const View& b,
                              double* out) {
  const auto is_dense = [&](const View& v) { return v.is_scalar || v.stride == columns; };
  if (is_dense(a) && is_dense(b)) {
    columns *= rows;
    rows = 1;
  }
  // A single number is the second argument, except in "number - table".
  const bool is_first = a.is_scalar && op != Op::subtract;
  const View &x = is_first ? b : a, &y = is_first ? a : b;
  for (int64_t i = 0; i < rows; ++i, out += columns) {
    const double *u = x.row(i), *v = y.row(i);
    switch (op) {
      case Op::add:
        y.is_scalar ? row_add(columns, u, *v, out) : row_add(columns, u, v, out);
        break;
      case Op::multiply:
        y.is_scalar ? row_multiply(columns, u, *v, out) : row_multiply(columns, u, v, out);
        break;
      case Op::subtract:
        if (y.is_scalar) row_add(columns, u, -*v, out);
        else if (x.is_scalar) row_subtract(columns, *u, v, out);
        else row_subtract(columns, u, v, out);
        break;
      case Op::rsqrt:
        row_rsqrt(columns, u, out);
        break;
      case Op::sigmoid:
        row_sigmoid(columns, u, out);
        break;
      default:  // copy
        a.is_scalar ? std::fill_n(out, columns, *a.values) : std::copy_n(u, columns, out);
    }
  }
}

void TableRun::along_row(const Step& step, int64_t size, const double* a, const double* b,
                         const double* c, double* out) {
  const int64_t columns = step.columns, width = step.width();
  switch (step.op) {
    case Op::softmax:
      return row_softmax(columns, a, out);
    case Op::repeat:
      return runs_repeat(size, width, a, out);
    case Op::sum_runs:
      return runs_sum(columns, width, a, 1.0, out);
    case Op::mean_runs:
      return runs_sum(columns, width, a, 1.0 / step.number, out);
    case Op::spread_runs:
      return runs_spread(columns, width, a, b, c, out);
    case Op::pad:
      std::fill_n(out, columns, 0.0);
      std::copy_n(a, size, out + width);
      return;
    default:  // join
      std::copy_n(a, size, out);
      std::copy_n(b, columns - size, out + size);
  }
}

double* TableRun::result(const std::string& name) const {
  const int line = program_.line_of(name);
  STD_TORCH_CHECK(line >= 0, "a program on tables is to have a result ", name);
  return const_cast<double*>(view(line, 0, 0).values);
}

int64_t TableRun::columns_of(const std::string& name) const {
  return program_.steps_[program_.line_of(name)].columns;
}

}  // namespace normkit
