// Backward of the pooled operators on contiguous memory: sums over a group, then its gradient.
#pragma once

#include "pooled_rows.h"

namespace normkit::NORMKIT_ISA {

// The two sums over a group that its gradient needs: sum(w g) and sum(w g (x - mean)).
template <class T>
struct GroupGradient {
  double scale, slope, center;  // dx = w scale g + slope (x - pivot) + center

  GroupGradient(const Group<T>& group, const double* sums, double count) {
    scale = group.rstd;
    slope = -group.rstd * group.rstd * group.rstd * sums[1] / count;
    center = -group.rstd * sums[0] / count;
    if (slope != 0) center += slope * group.pivot_offset;  // given statistics may be NaN
  }
};

template <class T, class G>
void combine_elementwise(const Pooled& a, const G& source, const Group<T>& group,
                         const GroupGradient<T>& k, int64_t start, int64_t low, int64_t high) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x) + start;
  T* dx = static_cast<T*>(a.out) + start;
  const ElementwiseLine<T> line(a, group, low);
  const vec<T> pivot = splat<T>(group.pivot), scale = splat<T>(A(k.scale));
  const vec<T> slope = splat<T>(A(k.slope)), center = splat<T>(A(k.center));
  const bool has_slope = A(k.slope) != 0;  // as in row_gradient
  const bool reads_x = has_slope || G::reads_u;
  each_vector<T>(high - low, [&](int, int64_t i, int n) NORMKIT_INLINE {
    const vec<T> d = reads_x ? load_some(x + i, n, pivot) - pivot : vec<T>{};
    vec<T> gradient = scale * source(start + i, n, line(i, n, d));
    if (line.weight) gradient *= load_some(line.weight + i, n, vec<T>{});
    store_some(dx + i, n, gradient + (has_slope ? slope * d + center : center));
  });
}

template <class T, class G>
void combine_pieces(const Pooled& a, const G& source, const Group<T>& group,
                    const GroupGradient<T>& k, int64_t origin, int64_t low, int64_t high) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.out);
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    row_gradient(source, x, dx, origin + start, length, line_of<T>(a, group, channel),
                 A(weight_at<T>(a, channel) * k.scale), A(k.slope), A(k.center));
  });
}

template <class T>
void combine_run(const Pooled& a, const Group<T>& group, const GroupGradient<T>& k,
                 int64_t example, int64_t low, int64_t high) {
  const int64_t origin = example * a.partition.example_size;
  with_gradient<T>(a.grad, a.ending, [&](const auto& source) {
    if (a.affine_plane == 1) {
      combine_elementwise<T>(a, source, group, k, origin + low, low, high);
    } else {
      combine_pieces<T>(a, source, group, k, origin, low, high);
    }
  });
}

// Sums of the pieces of one group; adds to sums, stores what dbias and dweight need.
template <class T, class G>
void group_gradient_sums(const Pooled& a, const G& source, const Group<T>& group, const Place& at,
                         double* sums) {
  const Partition& p = a.partition;
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
    each_stretch<T>(a, at, group, [&](const Span& span, int64_t units, const Line<T>* lines,
                                      double* parts) NORMKIT_INLINE {
      unit_grad_sums(source, x, span, units, lines, parts);
      int64_t channel = divide(span.offset - at.origin, p.plane);
      for (int64_t unit = 0; unit < units; ++unit) take(channel++, piece++, parts + 2 * unit);
    });
    return;
  }
  each_piece(at.low, at.low + p.run, a.affine_plane,
             [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    double part[2];
    span_grad_sums(source, x, {at.origin + start, length, at.count, p.example_size},
                   line_of<T>(a, group, channel), part);
    take(channel, piece++, part);
  });
}

template <class T, class G>
void backward_units(const Pooled& a, const G& source, const Place& at, int64_t units) {
  using A = acc_t<T>;
  const Partition& p = a.partition;
  Line<T> lines[kUnits];
  A scale[kUnits], slope[kUnits], center[kUnits];
  double sums[2 * kUnits];
  const T* x = static_cast<const T*>(a.x);
  const auto channel_of = [&](int64_t unit) { return divide(at.low + unit * p.run, a.affine_plane); };
  for (int64_t unit = 0; unit < units; ++unit) {
    lines[unit] = line_of<T>(a, group_of<T>(a, at.group + unit), channel_of(unit));
  }
  unit_grad_sums(source, x, {at.origin + at.low, p.run, at.count, p.example_size}, units, lines, sums);
  for (int64_t unit = 0; unit < units; ++unit) {
    const Group<T> group = group_of<T>(a, at.group + unit);
    double* pair = sums + 2 * unit;
    pair[1] += group.pivot_offset * pair[0];
    if (a.piece_first) {  // pieces are groups
      a.piece_first[at.group + unit] = pair[0];
      a.piece_second[at.group + unit] = pair[1] * group.rstd;
    }
    const double weight = weight_at<T>(a, channel_of(unit));
    double weighted[2] = {weight * pair[0], weight * pair[1]};
    if (a.constant) weighted[0] = weighted[1] = 0;  // not times 0: they may be NaN
    const GroupGradient<T> k(group, weighted, double(at.count) * double(p.run));
    scale[unit] = A(weight * k.scale);
    slope[unit] = A(k.slope);
    center[unit] = A(k.center);
  }
  const Pooled second = second_pass(a);
  const typename G::Second gradient(second.grad, second.ending);
  for (int64_t example = 0; example < at.count; ++example) {
    const int64_t start = at.origin + example * p.example_size + at.low;
    for (int64_t unit = 0; unit < units; ++unit) {
      row_gradient(gradient, x, static_cast<T*>(a.out), start + unit * p.run, p.run, lines[unit],
                   scale[unit], slope[unit], center[unit]);
    }
  }
}

template <class T, class G>
void backward_groups_by(const Pooled& a, const G& source, int64_t begin, int64_t end) {
  const Partition& p = a.partition;
  if (has_short_rows(a)) {
    for (Place at(p, begin); at.group < end;) {
      const int64_t units = count_units(a, at, end);
      backward_units<T>(a, source, at, units);
      for (int64_t unit = 0; unit < units; ++unit) at.next(p);
    }
    return;
  }
  const Pooled second = second_pass(a);
  for (Place at(p, begin); at.group < end; at.next(p)) {
    const Group<T> group = group_of<T>(a, at.group);
    double sums[2] = {0, 0};
    group_gradient_sums<T>(a, source, group, at, sums);
    if (a.constant) sums[0] = sums[1] = 0;
    const GroupGradient<T> gradient(group, sums, double(at.count) * double(p.run));
    for (int64_t example = at.first; example < at.first + at.count; ++example) {
      combine_run<T>(second, group, gradient, example, at.low, at.low + p.run);
    }
  }
}

template <class T>
void backward_groups(const Pooled& a, int64_t begin, int64_t end) {
  with_gradient<T>(a.grad, a.ending, [&](const auto& source) {
    backward_groups_by<T>(a, source, begin, end);
  });
}

// sum(w g) and sum(w g xhat) of one run; adds g to dbias and g xhat to dweight, element by element.
template <class T, class G>
void elementwise_grad_run(const Pooled& a, const G& source, const Group<T>& group, int64_t start,
                          int64_t low, acc_t<T>* dbias, acc_t<T>* dweight, double* sums) {
  const T* x = static_cast<const T*>(a.x) + start;
  const ElementwiseLine<T> line(a, group, low);
  const vec<T> pivot = splat<T>(group.pivot);
  double parts[2];
  sum_span<T>({0, a.partition.run, 1, 0}, parts,
              [&](int64_t i, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
                const vec<T> d = load_some(x + i, n, pivot) - pivot;
                vec<T> gradient = source(start + i, n, line(i, n, d));
                const vec<T> x_hat = line.rstd * d + line.center;
                store_some(dbias + i, n, load_some(dbias + i, n, vec<T>{}) + gradient);
                store_some(dweight + i, n, load_some(dweight + i, n, vec<T>{}) + gradient * x_hat);
                if (line.weight) gradient *= load_some(line.weight + i, n, vec<T>{});
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
  const Pooled second = second_pass(a);
  const int64_t low = index * p.run;
  for (int64_t batch = begin; batch < end; ++batch) {
    const Group<T> group = group_of<T>(a, batch * p.num_groups + index);
    const int64_t first = p.batch_begin(batch), count = p.batch_size(batch);
    double sums[2] = {0, 0};
    with_gradient<T>(a.grad, a.ending, [&](const auto& source) {
      for (int64_t n = first; n < first + count; ++n) {
        elementwise_grad_run<T>(a, source, group, n * p.example_size + low, low,
                                static_cast<A*>(dbias) + low, static_cast<A*>(dweight) + low, sums);
      }
    });
    sums[1] /= group.rstd;  // GroupGradient takes sums of (x - mean)
    if (a.constant) sums[0] = sums[1] = 0;
    const GroupGradient<T> gradient(group, sums, double(count) * double(p.run));
    for (int64_t n = first; n < first + count; ++n) {
      combine_run<T>(second, group, gradient, n, low, low + p.run);
    }
  }
}

// The same steps on a part of a group, for groups that several threads share.

// Pairs {sum(g), sum(g (x - mean))} for each piece of [low, high).
template <class T, class G>
void grad_pieces(const Pooled& a, const G& source, const Group<T>& group, int64_t origin,
                 int64_t low, int64_t high, double* pieces) {
  const T* x = static_cast<const T*>(a.x);
  each_piece(low, high, a.affine_plane, [&](int64_t channel, int64_t start, int64_t length) NORMKIT_INLINE {
    span_grad_sums(source, x, {origin + start, length, 1, 0}, line_of<T>(a, group, channel), pieces);
    pieces[1] += group.pivot_offset * pieces[0];
    pieces += 2;
  });
}
template <class T>
void grad_part(const Pooled& a, int64_t k, int64_t example, int64_t low, int64_t high,
               double* pieces) {
  const int64_t origin = example * a.partition.example_size;
  with_gradient<T>(a.grad, a.ending, [&](const auto& source) {
    grad_pieces<T>(a, source, group_of<T>(a, k), origin, low, high, pieces);
  });
}

template <class T>
void combine_part(const Pooled& a, int64_t k, int64_t example, int64_t low, int64_t high,
                  const double* sums) {
  const Partition& p = a.partition;
  const Group<T> group = group_of<T>(a, k);
  const double count = double(p.batch_size(k / p.num_groups)) * double(p.run);
  combine_run<T>(second_pass(a), group, GroupGradient<T>(group, sums, count), example, low, high);
}

}  // namespace normkit::NORMKIT_ISA
