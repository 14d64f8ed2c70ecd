// PositionalNorm: statistics over the channels of each position.
#include <algorithm>

#include "operators.h"
#include "pooled.h"
#include "through_ending.h"

namespace normkit {
namespace {

constexpr int64_t kTileElements = 65536;  // of a tile over all channels: stays in the L2 cache

// Positions of a channels_last map are rows of channels: a LayerNorm of dense inputs.
bool positions_are_rows(const FeatureMap& x) {
  return x.layout == Layout::channels_last || x.plane == 1;
}

FeatureMap as_rows(FeatureMap x) {
  x.num_examples *= x.plane;
  x.plane = 1;
  x.layout = Layout::contiguous;
  return x;
}

Positional describe(const FeatureMap& x, const Tensor& out, double eps, const Tensor& table) {
  Positional a{};
  a.num_examples = x.num_examples;
  a.num_channels = x.num_channels;
  a.plane = x.plane;
  const int64_t tile = std::max<int64_t>(64, kTileElements / x.num_channels / 64 * 64);
  a.tile = std::min(tile, x.plane);
  a.num_tiles = ceil_div(x.plane, a.tile);
  a.x = x.data();
  a.out = out.data_ptr();
  a.eps = eps;
  a.mean = doubles(table);
  a.var = a.mean + x.num_examples * x.plane;
  return a;
}

int64_t tile_grain(const Positional& a) {
  return at_least_one(kGrain / at_least_one(a.tile * a.num_channels));
}

std::tuple<Tensor, Tensor> forward(const FeatureMap& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, double eps, const Ending& ending) {
  const Tensor y = x.fresh();
  const Tensor table = fresh_table({2, x.num_examples * x.plane}, true);
  if (x.numel() == 0) {
    std::fill_n(doubles(table), table.numel(), 0.0);
    return {y, table};
  }
  if (positions_are_rows(x)) {
    const FeatureMap rows = as_rows(x);
    forward_by_rows(rows, y, {weight, bias, eps, ending}, make_partition(rows, 1, 1),
                    {doubles(table), doubles(table) + table.size(1), nullptr, nullptr});
    return {y, table};
  }
  const Kernels& kernels = best_kernels(x.element);
  const Parameter weights(weight, x), biases(bias, x);
  Positional a = describe(x, y, eps, table);
  a.weight = weights.data();
  a.bias = biases.data();
  a.ending = ending;
  parallel(a.num_examples * a.num_tiles, tile_grain(a),
           [&](int64_t begin, int64_t end) { kernels.positional_forward(a, begin, end); });
  return {y, table};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const FeatureMap& x,
                                            const Tensor& dx, const Tensor& table,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, double eps,
                                            bool need_weight, bool need_bias,
                                            const Ending& ending) {
  const Tensor g = x.matching(grad);
  STD_TORCH_CHECK(table.numel() == 2 * x.num_examples * x.plane && table.is_contiguous(),
                  "the table has shape (2, N * P)");
  ParameterGradients gradients(need_weight || need_bias ? x.num_channels : 0);
  if (x.numel() > 0 && positions_are_rows(x)) {
    const FeatureMap rows = as_rows(x);
    backward_by_rows(g, rows, dx,
                     {doubles(table), doubles(table) + table.size(1), nullptr, nullptr},
                     {weight, bias, eps, ending}, make_partition(rows, 1, 1), gradients);
  } else if (x.numel() > 0) {
    const Kernels& kernels = best_kernels(x.element);
    const Parameter weights(weight, x), biases(bias, x);
    Positional a = describe(x, dx, eps, table);
    a.grad = g.data_ptr();
    a.weight = weights.data();
    a.bias = biases.data();
    a.ending = ending;
    const int64_t items = a.num_examples * a.num_tiles;
    std::vector<double> tiles(gradients.wanted() ? 2 * items * a.num_channels : 0);
    if (gradients.wanted()) {
      a.tile_dbias = tiles.data();
      a.tile_dweight = tiles.data() + items * a.num_channels;
    }
    parallel(items, tile_grain(a),
             [&](int64_t begin, int64_t end) { kernels.positional_backward(a, begin, end); });
    for (int64_t i = 0; gradients.wanted() && i < items * a.num_channels; ++i) {
      gradients.dbias[i % a.num_channels] += a.tile_dbias[i];
      gradients.dweight[i % a.num_channels] += a.tile_dweight[i];
    }
  }
  return {dx, gradient_tensor(gradients.dweight, need_weight, x.wide()),
          gradient_tensor(gradients.dbias, need_bias, x.wide())};
}

}  // namespace

std::tuple<Tensor, Tensor> positional_forward(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps) {
  return forward(FeatureMap(input), weight, bias, eps, {});
}

std::tuple<Tensor, Tensor, Tensor> positional_backward(const Tensor& grad, const Tensor& input,
                                                       const Tensor& table,
                                                       const OptionalTensor& weight, double eps,
                                                       bool need_weight, bool need_bias) {
  const FeatureMap x(input);
  return backward(grad, x, x.fresh(), table, weight, std::nullopt, eps, need_weight, need_bias, {});
}

std::tuple<Tensor, Tensor> ended_positional_forward(const Tensor& input,
                                                    const OptionalTensor& residual,
                                                    const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps,
                                                    int64_t activation, double slope) {
  const FeatureMap x(input);
  const OptionalTensor added = beside(x, residual);
  return forward(x, weight, bias, eps, ending_of(activation, slope, added));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ended_positional_backward(
    const Tensor& grad, const Tensor& input, const Tensor& table, const OptionalTensor& residual,
    const OptionalTensor& result, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, int64_t activation, double slope, bool need_residual, bool need_weight,
    bool need_bias) {
  const FeatureMap x(input);
  ThroughEnding through(x, residual, result, activation, slope, need_residual);
  through.always_passed();
  return through.with(backward(grad, x, through.dx, table, weight, bias, eps, need_weight,
                               need_bias, through.ending));
}

}  // namespace normkit
