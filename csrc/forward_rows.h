// Forward of the pooled operators on contiguous memory: statistics of a group, then its result.
#pragma once

#include "pooled_rows.h"

namespace normkit::NORMKIT_ISA {

// Statistics of each channel of a group that covers whole channels, then of the group. A channel's
// sums are taken around its own first elements: around the group's they would cancel where the
// channels lie far from each other, and what is not finite in one channel would reach the others.
template <class T>
void group_of_channels_statistics(const Pooled& a, const Place& at) {
  const Partition& p = a.partition;
  const T* x = static_cast<const T*>(a.x);
  const int64_t begin = at.batch * a.num_pieces + divide(at.low, p.plane);
  const int64_t width = divide(p.run, p.plane);
  double *const means = a.piece_first + begin, *const vars = a.piece_second + begin;
  const int64_t most = has_short_channels(a, at) ? kUnits : 1;
  acc_t<T> shifts[kUnits];
  double sums[2 * kUnits];
  for (int64_t first = 0; first < width; first += most) {
    const int64_t units = least(most, width - first);
    const Span span{at.origin + at.low + first * p.plane, p.plane, at.count, p.example_size};
    for (int64_t unit = 0; unit < units; ++unit) {
      shifts[unit] = first_mean(x + span.offset + unit * p.plane, p.plane);
    }
    if (most == 1) {
      span_sums(x, span, shifts[0], sums);
    } else {
      unit_sums(x, span, units, shifts, sums);
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      store_moments(means + first + unit, vars + first + unit, sums + 2 * unit, shifts[unit],
                    double(at.count * p.plane));
    }
  }
  pool_moments(means, vars, width, a.mean + at.group, a.var + at.group);
}

template <class T>
void group_statistics(const Pooled& a, const Place& at) {
  const Partition& p = a.partition;
  const T* x = static_cast<const T*>(a.x);
  if (a.piece_first) return group_of_channels_statistics<T>(a, at);
  const acc_t<T> shift = first_mean(x + at.origin + at.low, p.run);
  double sums[2];
  span_sums(x, {at.origin + at.low, p.run, at.count, p.example_size}, shift, sums);
  store_moments(a.mean + at.group, a.var + at.group, sums, shift,
                double(at.count) * double(p.run));
}

template <class T>
void forward_units(const Pooled& a, const Place& at, int64_t units) {
  const Partition& p = a.partition;
  Line<T> lines[kUnits];
  const T* x = static_cast<const T*>(a.x);
  if (!a.constant) {
    double sums[2 * kUnits];
    acc_t<T> pivot[kUnits];
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
    const int64_t channel = divide(at.low + unit * p.run, a.affine_plane);
    lines[unit] = line_of<T>(a, group_of<T>(a, at.group + unit), channel);
  }
  for (int64_t example = 0; example < at.count; ++example) {
    const int64_t start = at.origin + example * p.example_size + at.low;
    for (int64_t unit = 0; unit < units; ++unit) {
      row_result(x, static_cast<T*>(a.out), start + unit * p.run, p.run, lines[unit], a.ending);
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

}  // namespace normkit::NORMKIT_ISA
