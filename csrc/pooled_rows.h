// The pooled operators on contiguous memory: one statistics group at a time, so that the second
// pass over its elements finds them in the cache.
#pragma once

#include <cmath>
#include <vector>

#include "endings.h"

namespace normkit::NORMKIT_ISA {

// Division of a 64-bit integer takes up to a hundred cycles, as long as a short row; sizes are small.
inline int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

// Where the groups [begin, end) lie, found by counting.
struct Place {
  int64_t group, batch, low;  // low: first element of an example
  int64_t first, count;       // examples
  int64_t origin;             // first element of the tensor

  Place(const Partition& p, int64_t start) : group(start), batch(divide(start, p.num_groups)) {
    low = (start - batch * p.num_groups) * p.run;
    enter(p);
  }
  void next(const Partition& p) {
    ++group;
    low += p.run;
    if (low == p.example_size) {
      low = 0;
      ++batch;
      enter(p);
    }
  }
  void enter(const Partition& p) {
    first = p.batch_begin(batch);
    count = p.batch_size(batch);
    origin = first * p.example_size;
  }
};

// The factors that are the same for all elements of a group.
template <class T>
struct Group {
  double mean, rstd;
  acc_t<T> pivot;       // the mean, as far as the accumulator's type can hold it
  double pivot_offset;  // pivot - mean: what it cannot hold
};

template <class T>
inline Group<T> group_of(const Pooled& a, int64_t group) {
  const double mean = a.mean[group];
  const acc_t<T> pivot = acc_t<T>(mean);
  return {mean, 1.0 / std::sqrt(a.var[group] + a.eps), pivot, double(pivot) - mean};
}

// Calls piece(channel, start, length) for each part of [low, high) inside one affine channel.
template <class F>
inline void each_piece(int64_t low, int64_t high, int64_t plane, const F& piece) {
  int64_t channel = divide(low, plane);
  for (int64_t start = low; start < high; ++channel) {
    const int64_t end = least((channel + 1) * plane, high);
    piece(channel, start, end - start);
    start = end;
  }
}

template <class T>
inline acc_t<T> weight_at(const Pooled& a, int64_t channel) {
  return a.weight ? static_cast<const acc_t<T>*>(a.weight)[channel] : acc_t<T>(1);
}
template <class T>
inline acc_t<T> bias_at(const Pooled& a, int64_t channel) {
  return a.bias ? static_cast<const acc_t<T>*>(a.bias)[channel] : acc_t<T>(0);
}

// How u = weight * xhat + bias is computed in one channel of a group.
template <class T>
inline Line<T> line_of(const Pooled& a, const Group<T>& group, int64_t channel) {
  const double scale = weight_at<T>(a, channel) * group.rstd;
  return {group.pivot, acc_t<T>(scale), acc_t<T>(bias_at<T>(a, channel) + group.pivot_offset * scale)};
}

// u of elements [low, high) of an example whose affine is given by element: u(i, n, x - pivot).
template <class T>
struct ElementwiseLine {
  using A = acc_t<T>;
  const A *weight, *bias;
  vec<T> rstd, center;
  ElementwiseLine(const Pooled& a, const Group<T>& group, int64_t low)
      : weight(a.weight ? static_cast<const A*>(a.weight) + low : nullptr),
        bias(a.bias ? static_cast<const A*>(a.bias) + low : nullptr),
        rstd(splat<T>(A(group.rstd))), center(splat<T>(A(group.pivot_offset * group.rstd))) {}
  [[gnu::always_inline]] vec<T> operator()(int64_t i, int n, vec<T> d) const {
    vec<T> u = rstd * d + center;
    if (weight) u *= load_some(weight + i, n, vec<T>{});
    if (bias) u += load_some(bias + i, n, vec<T>{});
    return u;
  }
};

template <class T, class E>
void apply_elementwise(const Pooled& a, const E& end, const Group<T>& group, int64_t start,
                       int64_t low, int64_t high) {
  const T* x = static_cast<const T*>(a.x) + start;
  T* y = static_cast<T*>(a.out) + start;
  const ElementwiseLine<T> line(a, group, low);
  const vec<T> pivot = splat<T>(group.pivot);
  each_vector<T>(high - low, [&](int, int64_t i, int n) NORMKIT_INLINE {
    const vec<T> u = line(i, n, load_some(x + i, n, pivot) - pivot);
    store_some(y + i, n, end(start + i, n, u));
  });
}

// Elements [low, high) of one example, all in one group.
template <class T>
void apply_run(const Pooled& a, const Group<T>& group, int64_t example, int64_t low,
               int64_t high) {
  const int64_t origin = example * a.partition.example_size;
  if (a.affine_plane == 1) {
    return with_ending<T>(a.ending, [&](const auto& end) {
      apply_elementwise<T>(a, end, group, origin + low, low, high);
    });
  }
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.out);
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    row_result(x, y, origin + start, length, line_of<T>(a, group, channel), a.ending);
  });
}

// Which piece of the example starts at `start`: counts the borders of planes and runs before it.
inline int64_t piece_index(const Partition& p, int64_t start) {
  if (start == 0 || p.run == p.plane) return divide(start, p.plane);
  int64_t a = p.run, b = p.plane;
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return start / p.plane + start / p.run - start / (p.run / a * p.plane);
}

inline void store_moments(double* mean, double* var, const double* sums, double shift,
                          double count) {
  const double share = 1.0 / count, offset = sums[0] * share;
  const double spread = sums[1] * share - offset * offset;
  *mean = shift + offset;
  *var = spread < 0 ? 0 : spread;  // rounding; comparisons keep NaN
}

// Moments of equally many elements each, by the law of total variance.
inline void pool_moments(const double* means, const double* vars, int64_t count, double* mean,
                         double* var) {
  double sum = 0, spread = 0;
  for (int64_t i = 0; i < count; ++i) sum += means[i];
  const double pooled = sum / double(count);
  for (int64_t i = 0; i < count; ++i) {
    spread += vars[i] + (means[i] - pooled) * (means[i] - pooled);
  }
  *mean = pooled;
  *var = spread / double(count);
}

// Whether a group covers whole channels whose planes are short rows, in several examples.
inline bool has_short_channels(const Pooled& a, const Place& at) {
  const Partition& p = a.partition;
  return at.count > 1 && p.plane <= kShortRow && p.run % p.plane == 0 &&
         a.affine_plane == p.plane;
}

// Calls stretch(span, units, lines, parts) for up to kUnits channels of such a group at a time.
template <class T, class F>
void each_stretch(const Pooled& a, const Place& at, const Group<T>& group, const F& stretch) {
  const Partition& p = a.partition;
  Line<T> lines[kUnits];
  double parts[2 * kUnits];
  for (int64_t start = at.low; start < at.low + p.run; start += kUnits * p.plane) {
    const int64_t units = least(kUnits, divide(at.low + p.run - start, p.plane));
    const int64_t channel = divide(start, p.plane);
    for (int64_t unit = 0; unit < units; ++unit) lines[unit] = line_of<T>(a, group, channel + unit);
    stretch(Span{at.origin + start, p.plane, at.count, p.example_size}, units, lines, parts);
  }
}

// Groups of one short row in each of several examples: BatchNorm and Ghost BatchNorm on small maps.
inline bool has_short_rows(const Pooled& a) {
  const Partition& p = a.partition;
  return p.run <= kShortRow && p.examples_per_group > 1 && p.plane % p.run == 0 &&
         a.affine_plane != 1;
}

// How many of the groups from `at` on to take together: they share examples and fit the L2 cache.
inline int64_t count_units(const Pooled& a, const Place& at, int64_t end) {
  constexpr int64_t kCached = 131072;  // elements
  const Partition& p = a.partition;
  const int64_t left = divide(p.example_size - at.low, p.run);
  const int64_t cached = divide(kCached, at.count * p.run);
  return least(least(left, end - at.group), least(kUnits, cached < 4 ? 4 : cached));
}

}  // namespace normkit::NORMKIT_ISA
