// The pooled operators on contiguous memory: one statistics group at a time, so that the second
// pass over its elements finds them in the cache.
#pragma once

#include <cmath>
#include <vector>

#include "rows.h"

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

// What one group's elements have in common.
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

template <class T>
void apply_elementwise(const Pooled& a, const Group<T>& group, int64_t start, int64_t low,
                       int64_t high) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x) + start;
  T* y = static_cast<T*>(a.out) + start;
  const A* weight = a.weight ? static_cast<const A*>(a.weight) + low : nullptr;
  const A* bias = a.bias ? static_cast<const A*>(a.bias) + low : nullptr;
  const vec<T> pivot = splat<T>(group.pivot), rstd = splat<T>(A(group.rstd));
  const vec<T> center = splat<T>(A(group.pivot_offset * group.rstd));
  each_vector<T>(high - low, [&](int, int64_t i, int n) NORMKIT_INLINE {
    vec<T> y_hat = rstd * (load_some(x + i, n, pivot) - pivot) + center;
    if (weight) y_hat *= load_some(weight + i, n, vec<T>{});
    if (bias) y_hat += load_some(bias + i, n, vec<T>{});
    store_some(y + i, n, y_hat);
  });
}

// Elements [low, high) of one example, all in one group.
template <class T>
void apply_run(const Pooled& a, const Group<T>& group, int64_t example, int64_t low,
               int64_t high) {
  using A = acc_t<T>;
  const int64_t origin = example * a.partition.example_size;
  if (a.affine_plane == 1) return apply_elementwise<T>(a, group, origin + low, low, high);
  const T* x = static_cast<const T*>(a.x) + origin;
  T* y = static_cast<T*>(a.out) + origin;
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    const double scale = weight_at<T>(a, channel) * group.rstd;
    row_affine(x + start, y + start, length, group.pivot, A(scale),
               A(bias_at<T>(a, channel) + group.pivot_offset * scale));
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

// Whether a group covers whole channels whose planes are short rows, in several examples.
inline bool has_short_channels(const Pooled& a, const Place& at) {
  const Partition& p = a.partition;
  return at.count > 1 && p.plane <= kShortRow && p.run % p.plane == 0 &&
         a.affine_plane == p.plane;
}

// Calls stretch(span, units, pivots, parts) for up to kUnits channels of such a group at a time.
template <class T, class F>
void each_stretch(const Pooled& a, const Place& at, acc_t<T> pivot, const F& stretch) {
  const Partition& p = a.partition;
  acc_t<T> pivots[kUnits];
  for (acc_t<T>& entry : pivots) entry = pivot;
  double parts[2 * kUnits];
  for (int64_t start = at.low; start < at.low + p.run; start += kUnits * p.plane) {
    const int64_t units = least(kUnits, divide(at.low + p.run - start, p.plane));
    stretch(Span{at.origin + start, p.plane, at.count, p.example_size}, units, pivots, parts);
  }
}

template <class T>
void group_statistics(const Pooled& a, const Place& at) {
  const Partition& p = a.partition;
  const T* x = static_cast<const T*>(a.x);
  const acc_t<T> shift = first_mean(x + at.origin + at.low, p.run);
  double sums[2] = {0, 0};
  if (!a.piece_first) {
    span_sums(x, {at.origin + at.low, p.run, at.count, p.example_size}, shift, sums);
  } else {
    int64_t piece = at.batch * a.num_pieces + piece_index(p, at.low);
    const auto take = [&](const double* part, int64_t length) NORMKIT_INLINE {
      store_moments(a.piece_first + piece, a.piece_second + piece, part, shift,
                    double(at.count * length));
      ++piece;  // the pieces of a group follow each other; counting saves a division
      sums[0] += part[0];
      sums[1] += part[1];
    };
    if (has_short_channels(a, at)) {
      each_stretch<T>(a, at, shift, [&](const Span& span, int64_t units, const acc_t<T>* pivot,
                                        double* parts) NORMKIT_INLINE {
        unit_sums(x, span, units, pivot, parts);
        for (int64_t unit = 0; unit < units; ++unit) take(parts + 2 * unit, p.plane);
      });
    } else {
      each_piece(at.low, at.low + p.run, p.plane,
                 [&](int64_t, int64_t start, int64_t length) NORMKIT_INLINE {
                   double part[2];
                   span_sums(x, {at.origin + start, length, at.count, p.example_size}, shift, part);
                   take(part, length);
                 });
    }
  }
  store_moments(a.mean + at.group, a.var + at.group, sums, shift,
                double(at.count) * double(p.run));
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

template <class T>
void forward_units(const Pooled& a, const Place& at, int64_t units) {
  using A = acc_t<T>;
  const Partition& p = a.partition;
  A pivot[kUnits], scale[kUnits], center[kUnits];
  const T* x = static_cast<const T*>(a.x);
  if (!a.constant) {
    double sums[2 * kUnits];
    for (int64_t unit = 0; unit < units; ++unit) {
      pivot[unit] = first_mean(x + at.origin + at.low + unit * p.run, p.run);
    }
    unit_sums(x, {at.origin + at.low, p.run, at.count, p.example_size}, units, pivot, sums);
    for (int64_t unit = 0; unit < units; ++unit) {
      store_moments(a.mean + at.group + unit, a.var + at.group + unit, sums + 2 * unit,
                    pivot[unit], double(at.count) * double(p.run));
    }
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    const Group<T> group = group_of<T>(a, at.group + unit);
    const int64_t channel = divide(at.low + unit * p.run, a.affine_plane);
    const double factor = weight_at<T>(a, channel) * group.rstd;
    pivot[unit] = group.pivot;
    scale[unit] = A(factor);
    center[unit] = A(bias_at<T>(a, channel) + group.pivot_offset * factor);
  }
  for (int64_t example = 0; example < at.count; ++example) {
    const int64_t start = at.origin + example * p.example_size + at.low;
    for (int64_t unit = 0; unit < units; ++unit) {
      row_affine(x + start + unit * p.run, static_cast<T*>(a.out) + start + unit * p.run, p.run,
                 pivot[unit], scale[unit], center[unit]);
    }
  }
}

template <class T>
void forward_groups(const Pooled& a, int64_t begin, int64_t end) {
  const Partition& p = a.partition;
  if (has_short_rows(a)) {
    for (Place at(p, begin); at.group < end;) {
      const int64_t units = count_units(a, at, end);
      forward_units<T>(a, at, units);
      for (int64_t unit = 0; unit < units; ++unit) at.next(p);
    }
    return;
  }
  for (Place at(p, begin); at.group < end; at.next(p)) {
    if (!a.constant) group_statistics<T>(a, at);
    const Group<T> group = group_of<T>(a, at.group);
    for (int64_t example = at.first; example < at.first + at.count; ++example) {
      apply_run<T>(a, group, example, at.low, at.low + p.run);
    }
  }
}

// The two sums over a group that its gradient needs: sum(w g) and sum(w g (x - mean)).
template <class T>
struct GroupGradient {
  double scale, slope, center;  // dx = w scale g + slope (x - pivot) + center

  GroupGradient(const Group<T>& group, const double* sums, double count) {
    scale = group.rstd;
    slope = -group.rstd * group.rstd * group.rstd * sums[1] / count;
    center = -group.rstd * sums[0] / count + slope * group.pivot_offset;
  }
};

template <class T>
void combine_elementwise(const Pooled& a, const Group<T>& group, const GroupGradient<T>& k,
                         int64_t start, int64_t low, int64_t high) {
  using A = acc_t<T>;
  const T* g = static_cast<const T*>(a.grad) + start;
  const T* x = static_cast<const T*>(a.x) + start;
  T* dx = static_cast<T*>(a.out) + start;
  const A* weight = a.weight ? static_cast<const A*>(a.weight) + low : nullptr;
  const vec<T> pivot = splat<T>(group.pivot), scale = splat<T>(A(k.scale));
  const vec<T> slope = splat<T>(A(k.slope)), center = splat<T>(A(k.center));
  each_vector<T>(high - low, [&](int, int64_t i, int n) NORMKIT_INLINE {
    vec<T> gradient = scale * load_some(g + i, n, vec<T>{});
    if (weight) gradient *= load_some(weight + i, n, vec<T>{});
    store_some(dx + i, n, gradient + (slope * (load_some(x + i, n, pivot) - pivot) + center));
  });
}

template <class T>
void combine_run(const Pooled& a, const Group<T>& group, const GroupGradient<T>& k,
                 int64_t example, int64_t low, int64_t high) {
  using A = acc_t<T>;
  const int64_t origin = example * a.partition.example_size;
  if (a.affine_plane == 1) return combine_elementwise<T>(a, group, k, origin + low, low, high);
  const T* g = static_cast<const T*>(a.grad) + origin;
  const T* x = static_cast<const T*>(a.x) + origin;
  T* dx = static_cast<T*>(a.out) + origin;
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    row_gradient(g + start, x + start, dx + start, length, group.pivot,
                 A(weight_at<T>(a, channel) * k.scale), A(k.slope), A(k.center));
  });
}

// Sums of the pieces of one group; adds to sums, stores what dbias and dweight need.
template <class T>
void group_gradient_sums(const Pooled& a, const Group<T>& group, const Place& at, double* sums) {
  const Partition& p = a.partition;
  const T* g = static_cast<const T*>(a.grad);
  const T* x = static_cast<const T*>(a.x);
  const auto take = [&](int64_t channel, int64_t piece, double* part) NORMKIT_INLINE {
    part[1] += group.pivot_offset * part[0];
    const double weight = weight_at<T>(a, channel);
    sums[0] += weight * part[0];
    sums[1] += weight * part[1];
    if (a.piece_first) {
      a.piece_first[piece] = part[0];
      a.piece_second[piece] = part[1] * group.rstd;
    }
  };
  int64_t piece = a.piece_first ? at.batch * a.num_pieces + piece_index(p, at.low) : 0;
  if (has_short_channels(a, at)) {
    each_stretch<T>(a, at, group.pivot, [&](const Span& span, int64_t units, const acc_t<T>* pivot,
                                            double* parts) NORMKIT_INLINE {
      unit_grad_sums(g, x, span, units, pivot, parts);
      int64_t channel = divide(span.offset - at.origin, p.plane);
      for (int64_t unit = 0; unit < units; ++unit) take(channel++, piece++, parts + 2 * unit);
    });
    return;
  }
  each_piece(at.low, at.low + p.run, a.affine_plane,
             [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    double part[2];
    span_grad_sums(g, x, {at.origin + start, length, at.count, p.example_size}, group.pivot, part);
    take(channel, piece++, part);
  });
}

template <class T>
void backward_units(const Pooled& a, const Place& at, int64_t units) {
  using A = acc_t<T>;
  const Partition& p = a.partition;
  A pivot[kUnits], scale[kUnits], slope[kUnits], center[kUnits];
  double sums[2 * kUnits];
  const T* g = static_cast<const T*>(a.grad);
  const T* x = static_cast<const T*>(a.x);
  for (int64_t unit = 0; unit < units; ++unit) pivot[unit] = A(a.mean[at.group + unit]);
  unit_grad_sums(g, x, {at.origin + at.low, p.run, at.count, p.example_size}, units, pivot, sums);
  for (int64_t unit = 0; unit < units; ++unit) {
    const Group<T> group = group_of<T>(a, at.group + unit);
    double* pair = sums + 2 * unit;
    pair[1] += group.pivot_offset * pair[0];
    if (a.piece_first) {  // pieces are groups
      a.piece_first[at.group + unit] = pair[0];
      a.piece_second[at.group + unit] = pair[1] * group.rstd;
    }
    const double weight = weight_at<T>(a, divide(at.low + unit * p.run, a.affine_plane));
    const double share = a.constant ? 0 : weight;
    const double weighted[2] = {share * pair[0], share * pair[1]};
    const GroupGradient<T> k(group, weighted, double(at.count) * double(p.run));
    scale[unit] = A(weight * k.scale);
    slope[unit] = A(k.slope);
    center[unit] = A(k.center);
  }
  for (int64_t example = 0; example < at.count; ++example) {
    const int64_t start = at.origin + example * p.example_size + at.low;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t row = start + unit * p.run;
      row_gradient(g + row, x + row, static_cast<T*>(a.out) + row, p.run, pivot[unit], scale[unit],
                   slope[unit], center[unit]);
    }
  }
}

template <class T>
void backward_groups(const Pooled& a, int64_t begin, int64_t end) {
  const Partition& p = a.partition;
  if (has_short_rows(a)) {
    for (Place at(p, begin); at.group < end;) {
      const int64_t units = count_units(a, at, end);
      backward_units<T>(a, at, units);
      for (int64_t unit = 0; unit < units; ++unit) at.next(p);
    }
    return;
  }
  for (Place at(p, begin); at.group < end; at.next(p)) {
    const Group<T> group = group_of<T>(a, at.group);
    double sums[2] = {0, 0};
    group_gradient_sums<T>(a, group, at, sums);
    if (a.constant) sums[0] = sums[1] = 0;
    const GroupGradient<T> gradient(group, sums, double(at.count) * double(p.run));
    for (int64_t example = at.first; example < at.first + at.count; ++example) {
      combine_run<T>(a, group, gradient, example, at.low, at.low + p.run);
    }
  }
}

// sum(w g) and sum(w g xhat) of one run; adds g to dbias and g xhat to dweight, element by element.
template <class T>
void elementwise_grad_run(const Pooled& a, const Group<T>& group, int64_t start, int64_t low,
                          acc_t<T>* dbias, acc_t<T>* dweight, double* sums) {
  using A = acc_t<T>;
  const T* g = static_cast<const T*>(a.grad) + start;
  const T* x = static_cast<const T*>(a.x) + start;
  const A* weight = a.weight ? static_cast<const A*>(a.weight) + low : nullptr;
  const vec<T> pivot = splat<T>(group.pivot), rstd = splat<T>(A(group.rstd));
  const vec<T> center = splat<T>(A(group.pivot_offset * group.rstd));
  double parts[2];
  sum_span<T>({0, a.partition.run, 1, 0}, parts,
              [&](int64_t i, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
                vec<T> gradient = load_some(g + i, n, vec<T>{});
                const vec<T> x_hat = rstd * (load_some(x + i, n, pivot) - pivot) + center;
                store_some(dbias + i, n, load_some(dbias + i, n, vec<T>{}) + gradient);
                store_some(dweight + i, n, load_some(dweight + i, n, vec<T>{}) + gradient * x_hat);
                if (weight) gradient *= load_some(weight + i, n, vec<T>{});
                one += gradient;
                two += gradient * x_hat;
              });
  sums[0] += parts[0];
  sums[1] += parts[1];
}

template <class T>
void backward_elementwise(const Pooled& a, int64_t index, int64_t begin, int64_t end, void* dbias,
                          void* dweight) {
  using A = acc_t<T>;
  const Partition& p = a.partition;
  const int64_t low = index * p.run;
  for (int64_t batch = begin; batch < end; ++batch) {
    const Group<T> group = group_of<T>(a, batch * p.num_groups + index);
    const int64_t first = p.batch_begin(batch), count = p.batch_size(batch);
    double sums[2] = {0, 0};
    for (int64_t n = first; n < first + count; ++n) {
      elementwise_grad_run<T>(a, group, n * p.example_size + low, low, static_cast<A*>(dbias) + low,
                              static_cast<A*>(dweight) + low, sums);
    }
    sums[1] /= group.rstd;  // GroupGradient takes sums of (x - mean)
    if (a.constant) sums[0] = sums[1] = 0;
    const GroupGradient<T> gradient(group, sums, double(count) * double(p.run));
    for (int64_t n = first; n < first + count; ++n) {
      combine_run<T>(a, group, gradient, n, low, low + p.run);
    }
  }
}

// The same steps on a part of a group, for groups that several threads share.

template <class T>
void run_sums(const void* x, int64_t offset, int64_t length, double shift, double* sums) {
  span_sums(static_cast<const T*>(x), {offset, length, 1, 0}, acc_t<T>(shift), sums);
}
template <class T>
double first_mean_at(const void* x, int64_t offset, int64_t length) {
  return first_mean(static_cast<const T*>(x) + offset, length);
}
template <class T>
void apply_part(const Pooled& a, int64_t k, int64_t example, int64_t low, int64_t high) {
  apply_run<T>(a, group_of<T>(a, k), example, low, high);
}

// Pairs {sum(g), sum(g (x - mean))} for each piece of [low, high).
template <class T>
void grad_part(const Pooled& a, int64_t k, int64_t example, int64_t low, int64_t high,
               double* pieces) {
  const Group<T> group = group_of<T>(a, k);
  const int64_t origin = example * a.partition.example_size;
  each_piece(low, high, a.affine_plane, [&](int64_t, int64_t start, int64_t length) NORMKIT_INLINE {
    span_grad_sums(static_cast<const T*>(a.grad), static_cast<const T*>(a.x),
                   {origin + start, length, 1, 0}, group.pivot, pieces);
    pieces[1] += group.pivot_offset * pieces[0];
    pieces += 2;
  });
}

template <class T>
void combine_part(const Pooled& a, int64_t k, int64_t example, int64_t low, int64_t high,
                  const double* sums) {
  const Partition& p = a.partition;
  const Group<T> group = group_of<T>(a, k);
  const double count = double(p.batch_size(k / p.num_groups)) * double(p.run);
  combine_run<T>(a, group, GroupGradient<T>(group, sums, count), example, low, high);
}

}  // namespace normkit::NORMKIT_ISA
