// PositionalNorm on contiguous memory: every position is a column of the matrix (channels, plane),
// taken in tiles of positions that stay in the cache between the two passes.
#pragma once

#include <cmath>
#include <vector>

#include "columns.h"
#include "pooled_rows.h"

namespace normkit::NORMKIT_ISA {

// One tile of positions of one example, with its tables of pivots and factors.
template <class T>
struct Tile {
  using A = acc_t<T>;
  int64_t origin, width;  // of the first element, in elements; number of positions
  Columns columns;
  std::vector<A> pivot, scale, slope, center;
  std::vector<double> first, second;

  explicit Tile(const Positional& a)
      : pivot(a.tile), scale(a.tile), slope(a.tile), center(a.tile), first(a.tile), second(a.tile) {}

  void move_to(const Positional& a, int64_t item) {
    const int64_t example = item / a.num_tiles, start = item % a.num_tiles * a.tile;
    origin = example * a.num_channels * a.plane + start;
    width = least(a.tile, a.plane - start);
    columns = {width, a.plane, static_cast<const T*>(a.x) + origin, nullptr, nullptr,
               pivot.data(), nullptr, nullptr, nullptr};
    for (int64_t i = 0; i < width; ++i) first[i] = second[i] = 0;
  }
};

template <class T>
void tile_statistics(const Positional& a, Tile<T>& tile, double* mean, double* var) {
  using A = acc_t<T>;
  column_shift<T>(tile.columns, least(a.num_channels, 8), tile.pivot.data());
  column_sums<T>(tile.columns, 0, a.num_channels, tile.first.data(), tile.second.data());
  for (int64_t i = 0; i < tile.width; ++i) {
    const double sums[2] = {tile.first[i], tile.second[i]};
    store_moments(mean + i, var + i, sums, tile.pivot[i], double(a.num_channels));
    const double rstd = 1.0 / std::sqrt(var[i] + a.eps);
    tile.pivot[i] = A(mean[i]);
    tile.scale[i] = A(rstd);
    tile.center[i] = A((double(tile.pivot[i]) - mean[i]) * rstd);
  }
}

template <class T, class E>
void tile_results(const Positional& a, const Tile<T>& tile, const E& finish) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < a.num_channels; ++c) {
    const int64_t start = tile.origin + c * a.plane;
    const T* x = static_cast<const T*>(a.x) + start;
    T* y = static_cast<T*>(a.out) + start;
    const vec<T> weight = splat<T>(a.weight ? static_cast<const A*>(a.weight)[c] : A(1));
    const vec<T> bias = splat<T>(a.bias ? static_cast<const A*>(a.bias)[c] : A(0));
    each_vector<T>(tile.width, [&](int, int64_t i, int n) NORMKIT_INLINE {
      const vec<T> p = load_some(tile.pivot.data() + i, n, vec<T>{});
      const vec<T> x_hat =
          load_some(tile.scale.data() + i, n, vec<T>{}) * (load_some(x + i, n, p) - p) +
          load_some(tile.center.data() + i, n, vec<T>{});
      store_some(y + i, n, finish(start + i, n, weight * x_hat + bias));
    });
  }
}

template <class T>
void positional_forward(const Positional& a, int64_t begin, int64_t end) {
  Tile<T> tile(a);
  for (int64_t item = begin; item < end; ++item) {
    tile.move_to(a, item);
    const int64_t table = item / a.num_tiles * a.plane + item % a.num_tiles * a.tile;
    tile_statistics<T>(a, tile, a.mean + table, a.var + table);
    with_ending<T>(a.ending, [&](const auto& finish) { tile_results<T>(a, tile, finish); });
  }
}

// Sums over channels of w g and w g (x - pivot), then the factors of dx for each position; g being
// the gradient of u = weight * xhat + bias.
template <class T, class G>
void tile_gradient(const Positional& a, const G& source, Tile<T>& tile, const double* mean,
                   const double* var) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(a.weight);
  const A* biases = static_cast<const A*>(a.bias);
  for (int64_t i = 0; i < tile.width; ++i) {
    tile.pivot[i] = A(mean[i]);
    if constexpr (G::reads_u) {
      const double rstd = 1.0 / std::sqrt(var[i] + a.eps);
      tile.scale[i] = A(rstd);
      tile.center[i] = A((double(tile.pivot[i]) - mean[i]) * rstd);
    }
  }
  const T* x = static_cast<const T*>(a.x) + tile.origin;
  const A *pivot = tile.pivot.data(), *scales = tile.scale.data(), *centers = tile.center.data();
  const int64_t stride = a.plane, origin = tile.origin;
  sum_columns<T>(tile.columns, 0, a.num_channels, tile.first.data(), tile.second.data(),
                 [=, &source](int64_t row, int64_t col, int n, vec<T>& one, vec<T>& two)
                     NORMKIT_INLINE {
                       const int64_t at = row * stride + col;
                       const vec<T> p = load_some(pivot + col, n, vec<T>{});
                       const vec<T> d = load_some(x + at, n, p) - p;
                       const vec<T> weight = splat<T>(weights ? weights[row] : A(1));
                       vec<T> u = d;
                       if constexpr (G::reads_u) {
                         u = load_some(scales + col, n, vec<T>{}) * d +
                             load_some(centers + col, n, vec<T>{});
                         u = weight * u + splat<T>(biases ? biases[row] : A(0));
                       }
                       const vec<T> gradient = weight * source(origin + at, n, u);
                       one += gradient;
                       two += gradient * d;
                     });
  for (int64_t i = 0; i < tile.width; ++i) {
    const double rstd = 1.0 / std::sqrt(var[i] + a.eps);
    const Group<T> group{mean[i], rstd, tile.pivot[i], double(tile.pivot[i]) - mean[i]};
    const double sums[2] = {tile.first[i],
                            tile.second[i] + group.pivot_offset * tile.first[i]};
    const GroupGradient<T> k(group, sums, double(a.num_channels));
    tile.scale[i] = A(k.scale);
    tile.slope[i] = A(k.slope);
    tile.center[i] = A(k.center);
    tile.first[i] = group.pivot_offset * rstd;
  }
}

// One channel of a tile: dx, and this tile's terms of dbias and dweight.
template <class T>
void tile_channel_gradient(const Positional& a, const Tile<T>& tile, int64_t item, int64_t c) {
  using A = acc_t<T>;
  const int64_t start = tile.origin + c * a.plane;
  const T* x = static_cast<const T*>(a.x) + start;
  const T* g = static_cast<const T*>(a.grad) + start;
  T* dx = static_cast<T*>(a.out) + start;
  const vec<T> weight = splat<T>(a.weight ? static_cast<const A*>(a.weight)[c] : A(1));
  double sums[2];
  sum_span<T>({0, tile.width, 1, 0}, sums,
              [&](int64_t i, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
                const vec<T> p = load_some(tile.pivot.data() + i, n, vec<T>{});
                const vec<T> d = load_some(x + i, n, p) - p;
                const vec<T> gradient = load_some(g + i, n, vec<T>{});
                const vec<T> scale = load_some(tile.scale.data() + i, n, vec<T>{});
                const vec<T> slope = load_some(tile.slope.data() + i, n, vec<T>{});
                const vec<T> center = load_some(tile.center.data() + i, n, vec<T>{});
                one += gradient;
                two += gradient * (scale * d);
                store_some(dx + i, n, weight * (scale * gradient) + (slope * d + center));
              });
  if (!a.tile_dbias) return;
  double offset = 0;  // what the pivots could not hold of the means
  if (sizeof(A) < sizeof(double)) {
    for (int64_t i = 0; i < tile.width; ++i) offset += to_float(g[i]) * tile.first[i];
  }
  a.tile_dbias[item * a.num_channels + c] = sums[0];
  a.tile_dweight[item * a.num_channels + c] = sums[1] + offset;
}

template <class T, class G>
void positional_backward_by(const Positional& a, const G& source, int64_t begin, int64_t end) {
  Tile<T> tile(a);
  const Positional second = second_pass(a);
  for (int64_t item = begin; item < end; ++item) {
    tile.move_to(a, item);
    const int64_t table = item / a.num_tiles * a.plane + item % a.num_tiles * a.tile;
    tile_gradient<T>(a, source, tile, a.mean + table, a.var + table);
    for (int64_t c = 0; c < a.num_channels; ++c) tile_channel_gradient<T>(second, tile, item, c);
  }
}

template <class T>
void positional_backward(const Positional& a, int64_t begin, int64_t end) {
  if (a.ending.passed) {
    return positional_backward_by<T>(a, PassedGradient<T>(a.grad, a.ending), begin, end);
  }
  positional_backward_by<T>(a, PlainGradient<T>(a.grad, {}), begin, end);
}

}  // namespace normkit::NORMKIT_ISA
