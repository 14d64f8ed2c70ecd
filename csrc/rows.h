// Statistics and results over rows: elements that lie side by side in memory.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace normkit::NORMKIT_ISA {

// Float lanes are folded into double after so many elements: the rounding of a lane stays that of
// a hundred additions however long the row is.
constexpr int64_t kBlock = 4096;

// `length` elements in each of `count` rows that lie `stride` apart and are summed together.
struct Span {
  int64_t offset, length, count, stride;
};

// Two sums at once, four vectors wide: enough to hide the latency of an addition.
template <class T>
struct Lanes4 {
  vec<T> one[4] = {}, two[4] = {};

  void fold(doublev& first, doublev& second) const {
    first += widen((one[0] + one[1]) + (one[2] + one[3]));
    second += widen((two[0] + two[1]) + (two[2] + two[3]));
  }
};

// Calls each(lane, index, loader) for four vectors at a time; the loader hides the tail.
template <class T, class F>
[[gnu::always_inline]] inline void each_vector(int64_t length, const F& each) {
  constexpr int W = kWidth<T>;
  int64_t i = 0;
  for (; i + 4 * W <= length; i += 4 * W) {
    each(0, i, W);
    each(1, i + W, W);
    each(2, i + 2 * W, W);
    each(3, i + 3 * W, W);
  }
  // Constant lanes: an index known only at run time would keep the sums out of the registers.
  if (i + W <= length) each(0, i, W), i += W;
  if (i + W <= length) each(1, i, W), i += W;
  if (i + W <= length) each(2, i, W), i += W;
  if (i < length) each(3, i, int(length - i));
}

template <class T>
[[gnu::always_inline]] inline vec<T> load_some(const T* x, int count, vec<T> fill) {
  return count == kWidth<T> ? load(x) : load_tail(x, count, fill);
}
template <class T>
[[gnu::always_inline]] inline void store_some(T* y, int count, vec<T> v) {
  if (count == kWidth<T>) {
    store(y, v);
  } else {
    store_tail(y, count, v);
  }
}

// The mean of a row's first elements: near enough to the mean that sums around it do not cancel.
template <class T>
inline acc_t<T> first_mean(const T* x, int64_t length) {
  const int64_t count = least(length, 4 * kWidth<T>);
  vec<T> sum = {};
  each_vector<T>(count, [&](int, int64_t i, int n) NORMKIT_INLINE { sum += load_some(x + i, n, vec<T>{}); });
  return acc_t<T>(total(widen(sum)) / double(count));
}

// Adds up term(position, n, one, two) over a span; the lanes live in registers inside each block.
template <class T, class F>
[[gnu::always_inline]] inline void sum_span(const Span& span, double* sums, const F& term) {
  doublev first = {}, second = {};
  const int64_t rows_per_fold = span.length < kBlock ? kBlock / span.length : 1;
  for (int64_t row = 0; row < span.count; row += rows_per_fold) {
    const int64_t end = least(row + rows_per_fold, span.count);
    for (int64_t block = 0; block < span.length; block += kBlock) {
      const int64_t length = least(kBlock, span.length - block);
      Lanes4<T> lanes;
      for (int64_t r = row; r < end; ++r) {
        const int64_t start = span.offset + r * span.stride + block;
        each_vector<T>(length, [&](int lane, int64_t i, int n) NORMKIT_INLINE {
          term(start + i, n, lanes.one[lane], lanes.two[lane]);
        });
      }
      lanes.fold(first, second);
    }
  }
  sums[0] = total(first);
  sums[1] = total(second);
}

// One row of a few vectors, whose sums need no folding on the way.
template <class T>
constexpr int64_t kFewVectors = 8 * kWidth<T>;
template <class T, class F>
[[gnu::always_inline]] inline void sum_few(int64_t start, int64_t length, double* sums,
                                           const F& term) {
  vec<T> one[2] = {}, two[2] = {};
  each_vector<T>(length, [&](int lane, int64_t i, int n) NORMKIT_INLINE {
    term(start + i, n, one[lane & 1], two[lane & 1]);
  });
  sums[0] = total(widen(one[0] + one[1]));
  sums[1] = total(widen(two[0] + two[1]));
}

// Around its first element, which lies at most sqrt(length) deviations from the mean.
template <class T>
inline void few_sums(const T* x, int64_t start, int64_t length, acc_t<T> shift, double* sums) {
  const vec<T> shifts = splat<T>(shift);
  sum_few<T>(start, length, sums, [&](int64_t at, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
    const vec<T> d = load_some(x + at, n, shifts) - shifts;
    one += d;
    two += d * d;
  });
}

template <class T>
inline void few_grad_sums(const T* g, const T* x, int64_t start, int64_t length, acc_t<T> pivot,
                          double* sums) {
  const vec<T> pivots = splat<T>(pivot);
  sum_few<T>(start, length, sums, [&](int64_t at, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
    const vec<T> gradient = load_some(g + at, n, vec<T>{});
    one += gradient;
    two += gradient * (load_some(x + at, n, pivots) - pivots);
  });
}

// sums = {sum(x - shift), sum((x - shift)^2)}
template <class T>
inline void span_sums(const T* x, const Span& span, acc_t<T> shift, double* sums) {
  const vec<T> shifts = splat<T>(shift);
  sum_span<T>(span, sums, [&](int64_t at, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
    const vec<T> d = load_some(x + at, n, shifts) - shifts;
    one += d;
    two += d * d;
  });
}

// Short rows below each other: taking one channel at a time would touch a new page for each row, so
// the sums of neighbouring channels grow together while whole stretches of an example pass by.
constexpr int64_t kShortRow = 256;  // elements
constexpr int64_t kUnits = 64;      // neighbouring rows at most

// span.length is a row's; `units` neighbouring rows; sums are pairs. term(at, n, unit, one, two).
template <class T, class F>
[[gnu::always_inline]] inline void sum_units(const Span& span, int64_t units, double* sums,
                                             const F& term) {
  doublev first[kUnits] = {}, second[kUnits] = {};
  const int64_t rows_per_fold = kBlock / span.length;
  for (int64_t begin = 0; begin < span.count; begin += rows_per_fold) {
    vec<T> one[kUnits] = {}, two[kUnits] = {};
    const int64_t end = least(begin + rows_per_fold, span.count);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t start = span.offset + row * span.stride + unit * span.length;
        vec<T> ones[2] = {}, twos[2] = {};
        each_vector<T>(span.length, [&](int lane, int64_t i, int n) NORMKIT_INLINE {
          term(start + i, n, unit, ones[lane & 1], twos[lane & 1]);
        });
        one[unit] += ones[0] + ones[1];
        two[unit] += twos[0] + twos[1];
      }
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      first[unit] += widen(one[unit]);
      second[unit] += widen(two[unit]);
    }
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    sums[2 * unit] = total(first[unit]);
    sums[2 * unit + 1] = total(second[unit]);
  }
}

template <class T>
inline void unit_sums(const T* x, const Span& span, int64_t units, const acc_t<T>* shift,
                      double* sums) {
  sum_units<T>(span, units, sums,
               [&](int64_t at, int n, int64_t unit, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
                 const vec<T> shifts = splat<T>(shift[unit]);
                 const vec<T> d = load_some(x + at, n, shifts) - shifts;
                 one += d;
                 two += d * d;
               });
}

// y = scale * (x - pivot) + center
template <class T>
inline void row_affine(const T* x, T* y, int64_t length, acc_t<T> pivot, acc_t<T> scale,
                       acc_t<T> center) {
  const vec<T> p = splat<T>(pivot), s = splat<T>(scale), c = splat<T>(center);
  each_vector<T>(length, [&](int, int64_t i, int n) NORMKIT_INLINE {
    store_some(y + i, n, s * (load_some(x + i, n, p) - p) + c);
  });
}

}  // namespace normkit::NORMKIT_ISA
