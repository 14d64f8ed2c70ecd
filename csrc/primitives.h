// The four primitives on contiguous memory: rows of equal length and a table entry for each.
#pragma once

#include "pooled_rows.h"

namespace normkit::NORMKIT_ISA {

inline double read_table(const Rows& a, int which, int64_t i) {
  return a.wide ? static_cast<const double*>(a.table[which])[i]
                : double(static_cast<const float*>(a.table[which])[i]);
}
inline void write_table(const Rows& a, int which, int64_t i, double value) {
  if (a.wide) {
    static_cast<double*>(a.table[which])[i] = value;
  } else {
    static_cast<float*>(a.table[which])[i] = float(value);
  }
}

// tables: mean, var
template <class T>
void row_moments(const Rows& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * a.length;
    const bool few = a.length <= kFewVectors<T>;
    const acc_t<T> shift = few ? to_float(x[start]) : first_mean(x + start, a.length);
    double sums[2], mean, var;
    if (few) {
      few_sums(x, start, a.length, shift, sums);
    } else {
      span_sums(x, {start, a.length, 1, 0}, shift, sums);
    }
    store_moments(&mean, &var, sums, shift, double(a.length));
    write_table(a, 0, row, mean);
    write_table(a, 1, row, var);
  }
}

// tables: mean, scale, center; y = scale * (x - mean) + center, then the ending
template <class T>
void row_apply(const Rows& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.out);
  int64_t entry = begin % a.table_size;
  for (int64_t row = begin; row < end; ++row) {
    const double mean = read_table(a, 0, entry), scale = read_table(a, 1, entry);
    const A pivot = A(mean);
    const A center = A(read_table(a, 2, entry) + (double(pivot) - mean) * scale);
    row_result<T>(x, y, row * a.length, a.length, Line<T>{pivot, A(scale), center}, a.ending);
    if (++entry == a.table_size) entry = 0;
  }
}

// tables: mean, then sum(g) and sum(g (x - mean)) as results, then the scale and center of u
template <class T, class G>
void row_grad_sums_by(const Rows& a, const G& gradient, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t entry = row % a.table_size;
    const double mean = read_table(a, 0, entry);
    Line<T> line{acc_t<T>(mean)};
    const double offset = double(line.pivot) - mean;
    if constexpr (G::reads_u) {
      const double scale = read_table(a, 3, entry);
      line.scale = acc_t<T>(scale);
      line.center = acc_t<T>(read_table(a, 4, entry) + offset * scale);
    }
    double sums[2];
    const T *g = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
    if (!G::reads_u && a.length <= kFewVectors<T>) {
      few_grad_sums(g, x, row * a.length, a.length, line.pivot, sums);
    } else {
      span_grad_sums(gradient, x, {row * a.length, a.length, 1, 0}, line, sums);
    }
    write_table(a, 1, row, sums[0]);
    write_table(a, 2, row, sums[1] + offset * sums[0]);
  }
}

template <class T>
void row_grad_sums(const Rows& a, int64_t begin, int64_t end) {
  if (a.ending.passed) {
    return row_grad_sums_by<T>(a, PassedGradient<T>(a.grad, a.ending), begin, end);
  }
  row_grad_sums_by<T>(a, PlainGradient<T>(a.grad, {}), begin, end);
}

// tables: mean, k1, k2, k3; dx = k1 * g + k2 * (x - mean) + k3
template <class T>
void row_combine(const Rows& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  int64_t entry = begin % a.table_size;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * a.length;
    const double mean = read_table(a, 0, entry), slope = read_table(a, 2, entry);
    const A pivot = A(mean);
    row_gradient(PlainGradient<T>(a.grad, {}), static_cast<const T*>(a.x), static_cast<T*>(a.out),
                 start, a.length, Line<T>{pivot}, A(read_table(a, 1, entry)), A(slope),
                 A(read_table(a, 3, entry) + (double(pivot) - mean) * slope));
    if (++entry == a.table_size) entry = 0;
  }
}

}  // namespace normkit::NORMKIT_ISA
