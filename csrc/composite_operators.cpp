// The operators of composite norms: moments of the map's channels, a program on tables, apply.
#include <algorithm>
#include <array>
#include <cmath>

#include "operators.h"
#include "segments.h"
#include "table_run.h"
#include "through_ending.h"

namespace normkit {
namespace {

// A table (2, cells) of double: moments of every channel of every example, then the statistics that
// the forward pass keeps for the other, those of the batch stage.
struct KeptTable {
  Tensor tensor;
  int64_t num_examples, num_channels, num_kept;

  KeptTable(const Tensor& table, const FeatureMap& x, const TableProgram& program)
      : tensor(table), num_examples(x.num_examples), num_channels(x.num_channels),
        num_kept(program.kept_columns) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == 2 && table.is_contiguous() &&
                        table.size(1) == count(x, program),
                    "the table has shape (2, ", count(x, program), ")");
  }
  static int64_t count(const FeatureMap& x, const TableProgram& program) {
    return x.num_examples * x.num_channels + program.kept_columns;
  }
  double* row(int which) const { return doubles(tensor) + which * tensor.size(1); }
  double* kept(int which) const { return row(which) + num_examples * num_channels; }

  // Channels that are normalised by given statistics alone use the given mean as pivot. The cells'
  // own means do not enter the result, and may be infinite. If the given mean is not finite, the
  // pivot is 0: the gradient does not depend on the mean, but 0 * (x - NaN) would be NaN.
  void center_on_given(int64_t first) const {
    const int64_t size = num_channels - first;
    for (int64_t example = 0; example < num_examples && size > 0; ++example) {
      const int64_t cell = example * num_channels + first;
      std::transform(kept(0), kept(0) + size, row(0) + cell,
                     [](double mean) { return std::isfinite(mean) ? mean : 0.0; });
      std::copy_n(kept(1), size, row(1) + cell);
    }
  }
};

const TableProgram& program_for(const FeatureMap& x, const std::string& text) {
  STD_TORCH_CHECK(x.numel() > 0, "composites take no empty maps");
  const TableProgram& program = TableProgram::of(text);
  STD_TORCH_CHECK(program.channels == x.num_channels, "the program is for ", program.channels,
                  " channels, and the map has ", x.num_channels);
  return program;
}

SegmentTables tables_of(const FeatureMap& x, std::initializer_list<const double*> values) {
  SegmentTables result{{}, int64_t(values.size()), x.num_examples, x.num_channels};
  std::copy(values.begin(), values.end(), result.values);
  return result;
}

void count_batch(const OptionalTensor& num_batches_tracked) {
  if (num_batches_tracked) ++*static_cast<int64_t*>(num_batches_tracked->data_ptr());
}

using Slots = decltype(TableInputs::parameters);

// Statistics that the batch stage is given, and buffers that it updates.
struct Buffers {
  const OptionalTensor &given_mean, &given_var, &running_mean, &running_var, &num_batches_tracked;
};

// `factors` is null, or memory for scale and center of every cell, which the backward pass of an
// ending needs.
std::tuple<Tensor, Tensor> forward(const FeatureMap& x, const std::string& text, const Slots& slots,
                                   double share, const Buffers& buffers, const Ending& ending,
                                   double* factors) {
  const TableProgram& program = program_for(x, text);
  const KeptTable table(fresh_table({2, KeptTable::count(x, program)}, true), x, program);
  const Partition p = partition_of_segments(x, x.num_channels);
  segment_moments(x, p, true, table.row(0), table.row(1));
  const OptionalTensor &running_mean = buffers.running_mean, &running_var = buffers.running_var;

  TableInputs inputs{};
  inputs.num_examples = x.num_examples;
  inputs.segment_size = x.plane;
  inputs.share = share;
  inputs.mean = table.row(0);
  inputs.var = table.row(1);
  inputs.given[0] = buffers.given_mean ? &buffers.given_mean : &running_mean;
  inputs.given[1] = buffers.given_var ? &buffers.given_var : &running_var;
  inputs.parameters = slots;
  if (program.given_from < x.num_channels) {
    read_doubles(**inputs.given[0], table.num_kept, table.kept(0));
    read_doubles(**inputs.given[1], table.num_kept, table.kept(1));
    table.center_on_given(program.given_from);
  }
  TableRun run(program, inputs);
  run.run();
  const Tensor y = x.fresh();
  const double *scale = run.result("scale"), *center = run.result("center");
  segment_apply(x, p, tables_of(x, {table.row(0), scale, center}), y, ending);
  if (factors) {
    const int64_t cells = x.num_examples * x.num_channels;
    std::copy_n(scale, cells, factors);
    std::copy_n(center, cells, factors + cells);
  }
  if (table.num_kept > 0) {
    std::copy_n(run.result("kept_mean"), table.num_kept, table.kept(0));
    std::copy_n(run.result("kept_var"), table.num_kept, table.kept(1));
  }
  if (running_mean && running_var && program.moves == "estimates") {
    copy_doubles(table.kept(0), table.num_kept, *running_mean);
    copy_doubles(table.kept(1), table.num_kept, *running_var);
  }
  if (running_mean && running_var && program.moves == "average") {
    blend_running(*running_mean, *running_var, table.kept(0), table.kept(1), table.num_kept,
                  x.num_examples * x.plane, share);
  }
  count_batch(buffers.num_batches_tracked);
  return {y, table.tensor};
}

// Writes dx, and returns the parameters' gradients that are wanted.
std::array<Tensor, 4> backward(const Tensor& grad, const FeatureMap& x, const Tensor& kept,
                               const std::string& text, const Slots& slots, double share,
                               int64_t wanted, const Tensor& dx, const double* factors,
                               ThroughEnding* through) {
  const TableProgram& program = program_for(x, text);
  const KeptTable table(kept, x, program);
  const Partition p = partition_of_segments(x, x.num_channels);
  const Tensor g = x.matching(grad);
  const int64_t cells = x.num_examples * x.num_channels;
  const std::unique_ptr<double[]> sums(new double[2 * cells]);
  const Tensor& passed = through ? through->always_passed() : g;
  SegmentTables lines = tables_of(x, {table.row(0)});
  if (through) lines = tables_of(x, {table.row(0), factors, factors + cells});
  segment_grad_sums(x, g, p, lines, sums.get(), sums.get() + cells,
                    through ? through->ending : Ending{});

  TableInputs inputs{};
  inputs.num_examples = x.num_examples;
  inputs.segment_size = x.plane;
  inputs.share = share;
  inputs.mean = table.row(0);
  inputs.var = table.row(1);
  inputs.grad_center = sums.get();  // sum(g); of scale: sum(g (x - mean))
  inputs.grad_scale = sums.get() + cells;
  inputs.kept[0] = table.kept(0);
  inputs.kept[1] = table.kept(1);
  inputs.parameters = slots;
  TableRun run(program, inputs);
  run.run();
  segment_combine(x, passed, p,
                  tables_of(x, {table.row(0), run.result("k1"), run.result("k2"), run.result("k3")}),
                  dx);
  const auto gradient = [&](int i) {
    const std::string name = "gradient" + std::to_string(i);
    const bool is_wanted = wanted >> i & 1 && program.has(name);
    const int64_t size = is_wanted ? run.columns_of(name) : 0;
    const Tensor result = fresh_table({size}, x.wide());
    if (size > 0) copy_doubles(run.result(name), size, result);
    return result;
  };
  return {gradient(0), gradient(1), gradient(2), gradient(3)};
}

}  // namespace

std::tuple<Tensor, Tensor> composite_forward(
    const Tensor& input, const std::string& text, const OptionalTensor& first,
    const OptionalTensor& second, const OptionalTensor& third, const OptionalTensor& fourth,
    double share, const OptionalTensor& given_mean, const OptionalTensor& given_var,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked) {
  return forward(FeatureMap(input), text, {&first, &second, &third, &fourth}, share,
                 {given_mean, given_var, running_mean, running_var, num_batches_tracked}, {},
                 nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_backward(
    const Tensor& grad, const Tensor& input, const Tensor& kept, const std::string& text,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, double share, int64_t wanted) {
  const FeatureMap x(input);
  const Tensor dx = x.fresh();
  const auto found = backward(grad, x, kept, text, {&first, &second, &third, &fourth}, share,
                              wanted, dx, nullptr, nullptr);
  return {dx, found[0], found[1], found[2], found[3]};
}

std::tuple<Tensor, Tensor, Tensor> ended_composite_forward(
    const Tensor& input, const OptionalTensor& residual, const std::string& text,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, double share, int64_t activation, double slope,
    const OptionalTensor& given_mean, const OptionalTensor& given_var,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked) {
  const FeatureMap x(input);
  const OptionalTensor added = beside(x, residual);
  const Tensor factors = fresh_table({2, x.num_examples * x.num_channels}, true);
  const auto [y, table] =
      forward(x, text, {&first, &second, &third, &fourth}, share,
              {given_mean, given_var, running_mean, running_var, num_batches_tracked},
              ending_of(activation, slope, added), doubles(factors));
  return {y, table, factors};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ended_composite_backward(
    const Tensor& grad, const Tensor& input, const Tensor& kept, const Tensor& factors,
    const OptionalTensor& residual, const OptionalTensor& result, const std::string& text,
    const OptionalTensor& first, const OptionalTensor& second, const OptionalTensor& third,
    const OptionalTensor& fourth, double share, int64_t activation, double slope,
    bool need_residual, int64_t wanted) {
  const FeatureMap x(input);
  STD_TORCH_CHECK(factors.numel() == 2 * x.num_examples * x.num_channels && factors.is_contiguous(),
                  "the factors have shape (2, N * C)");
  ThroughEnding through(x, residual, result, activation, slope, need_residual);
  const auto found = backward(grad, x, kept, text, {&first, &second, &third, &fourth}, share,
                              wanted, through.dx, doubles(factors), &through);
  return {through.dx, through.dresidual, found[0], found[1], found[2], found[3]};
}

}  // namespace normkit
