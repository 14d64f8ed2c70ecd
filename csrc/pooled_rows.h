// The pooled operators on contiguous memory: one statistics group at a time, so that the second
// pass over its elements finds them in the cache.
#pragma once

#include <cmath>
#include <vector>

#include "rows.h"

namespace normkit::NORMKIT_ISA {

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
  int64_t channel = low / plane;
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
  each_vector<T>(high - low, [&](int, int64_t i, int n) {
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
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) {
    const double scale = weight_at<T>(a, channel) * group.rstd;
    row_affine(x + start, y + start, length, group.pivot, A(scale),
               A(bias_at<T>(a, channel) + group.pivot_offset * scale));
  });
}

// Which piece of the example starts at `start`: counts the borders of planes and runs before it.
inline int64_t piece_index(const Partition& p, int64_t start) {
  if (p.run % p.plane == 0) return start / p.plane;
  if (p.plane % p.run == 0) return start / p.run;
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
  const double offset = sums[0] / count;
  const double spread = sums[1] / count - offset * offset;
  *mean = shift + offset;
  *var = spread < 0 ? 0 : spread;  // rounding; comparisons keep NaN
}

template <class T>
void group_statistics(const Pooled& a, int64_t group) {
  const Partition& p = a.partition;
  const int64_t batch = group / p.num_groups, low = group % p.num_groups * p.run;
  const int64_t count = p.batch_size(batch);
  const int64_t origin = p.batch_begin(batch) * p.example_size;
  const T* x = static_cast<const T*>(a.x);
  const acc_t<T> shift = first_mean(x + origin + low, p.run);
  double sums[2] = {0, 0};
  if (!a.piece_first) {
    span_sums(x, {origin + low, p.run, count, p.example_size}, shift, sums);
  } else {
    each_piece(low, low + p.run, p.plane, [&](int64_t, int64_t start, int64_t length) {
      double part[2];
      span_sums(x, {origin + start, length, count, p.example_size}, shift, part);
      const int64_t piece = batch * a.num_pieces + piece_index(p, start);
      store_moments(a.piece_first + piece, a.piece_second + piece, part, shift,
                    double(count * length));
      sums[0] += part[0];
      sums[1] += part[1];
    });
  }
  store_moments(a.mean + group, a.var + group, sums, shift, double(count) * double(p.run));
}

template <class T>
void forward_groups(const Pooled& a, int64_t begin, int64_t end) {
  const Partition& p = a.partition;
  for (int64_t k = begin; k < end; ++k) {
    if (!a.constant) group_statistics<T>(a, k);
    const Group<T> group = group_of<T>(a, k);
    const int64_t batch = k / p.num_groups, low = k % p.num_groups * p.run;
    const int64_t first = p.batch_begin(batch), last = first + p.batch_size(batch);
    for (int64_t example = first; example < last; ++example) {
      apply_run<T>(a, group, example, low, low + p.run);
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
  each_vector<T>(high - low, [&](int, int64_t i, int n) {
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
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) {
    row_gradient(g + start, x + start, dx + start, length, group.pivot,
                 A(weight_at<T>(a, channel) * k.scale), A(k.slope), A(k.center));
  });
}

// Sums of the pieces of one group; adds to sums, stores what dbias and dweight need.
template <class T>
void group_gradient_sums(const Pooled& a, const Group<T>& group, int64_t k, double* sums) {
  const Partition& p = a.partition;
  const int64_t batch = k / p.num_groups, low = k % p.num_groups * p.run;
  const int64_t origin = p.batch_begin(batch) * p.example_size;
  const T* g = static_cast<const T*>(a.grad);
  const T* x = static_cast<const T*>(a.x);
  each_piece(low, low + p.run, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) {
    double part[2];
    span_grad_sums(g, x, {origin + start, length, p.batch_size(batch), p.example_size},
                   group.pivot, part);
    part[1] += group.pivot_offset * part[0];
    const double weight = weight_at<T>(a, channel);
    sums[0] += weight * part[0];
    sums[1] += weight * part[1];
    if (a.piece_first) {
      const int64_t piece = batch * a.num_pieces + piece_index(p, start);
      a.piece_first[piece] = part[0];
      a.piece_second[piece] = part[1] * group.rstd;
    }
  });
}

template <class T>
void backward_groups(const Pooled& a, int64_t begin, int64_t end) {
  const Partition& p = a.partition;
  for (int64_t k = begin; k < end; ++k) {
    const Group<T> group = group_of<T>(a, k);
    double sums[2] = {0, 0};
    group_gradient_sums<T>(a, group, k, sums);
    const int64_t batch = k / p.num_groups, low = k % p.num_groups * p.run;
    const int64_t first = p.batch_begin(batch), count = p.batch_size(batch);
    if (a.constant) sums[0] = sums[1] = 0;
    const GroupGradient<T> gradient(group, sums, double(count) * double(p.run));
    for (int64_t example = first; example < first + count; ++example) {
      combine_run<T>(a, group, gradient, example, low, low + p.run);
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
  Sums<T> first, second;
  const Span span{0, a.partition.run, 1, 0};
  each_block(
      span,
      [&](int64_t block, int64_t length) {
        each_vector<T>(length, [&](int lane, int64_t j, int n) {
          const int64_t i = block + j;
          vec<T> gradient = load_some(g + i, n, vec<T>{});
          const vec<T> x_hat = rstd * (load_some(x + i, n, pivot) - pivot) + center;
          store_some(dbias + i, n, load_some(dbias + i, n, vec<T>{}) + gradient);
          store_some(dweight + i, n, load_some(dweight + i, n, vec<T>{}) + gradient * x_hat);
          if (weight) gradient *= load_some(weight + i, n, vec<T>{});
          first.lanes[lane] += gradient;
          second.lanes[lane] += gradient * x_hat;
        });
      },
      [&] {
        first.fold();
        second.fold();
      });
  sums[0] += first.value();
  sums[1] += second.value();
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
  each_piece(low, high, a.affine_plane, [&](int64_t, int64_t start, int64_t length) {
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
