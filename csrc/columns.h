// Statistics and results of the columns of a row-major matrix: channels_last maps, whose channels
// are contiguous, and inputs (N, C).
#pragma once

#include "endings.h"

namespace normkit::NORMKIT_ISA {

// Float sums of a column are folded into double after so many rows.
constexpr int64_t kRowBlock = 64;
// Columns whose sums stay in registers while a block of rows passes.
template <class T>
constexpr int kStripe = 4 * kWidth<T>;

template <class T>
void column_shift(const Columns& a, int64_t rows, void* shift) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  each_vector<T>(a.cols, [&](int, int64_t i, int n) NORMKIT_INLINE {
    vec<T> sum = {};
    for (int64_t row = 0; row < rows; ++row) sum += load_some(x + row * a.stride + i, n, vec<T>{});
    store_some(static_cast<A*>(shift) + i, n, sum / splat<T>(A(rows)));
  });
}

template <class A>
inline void add_lanes(double* to, const typename Lanes<A>::type& v, int count) {
  for (int lane = 0; lane < count; ++lane) to[lane] += double(v[lane]);
}

// Adds two running sums for each column over rows [begin, end). `terms` makes both from a position.
template <class T, class F>
[[gnu::always_inline]] inline void sum_columns(const Columns& a, int64_t begin, int64_t end,
                                               double* first, double* second, const F& terms) {
  using A = acc_t<T>;
  constexpr int W = kWidth<T>;
  for (int64_t block = begin; block < end; block += kRowBlock) {
    const int64_t block_end = least(block + kRowBlock, end);
    int64_t col = 0;
    for (; col + kStripe<T> <= a.cols; col += kStripe<T>) {
      vec<T> one[4] = {}, two[4] = {};
      for (int64_t row = block; row < block_end; ++row) {
        for (int k = 0; k < 4; ++k) terms(row, col + k * W, W, one[k], two[k]);
      }
      for (int k = 0; k < 4; ++k) {
        add_lanes<A>(first + col + k * W, one[k], W);
        add_lanes<A>(second + col + k * W, two[k], W);
      }
    }
    for (; col < a.cols; col += W) {
      const int n = int(least(W, a.cols - col));
      vec<T> one = {}, two = {};
      for (int64_t row = block; row < block_end; ++row) terms(row, col, n, one, two);
      add_lanes<A>(first + col, one, n);
      add_lanes<A>(second + col, two, n);
    }
  }
}

template <class T>
void column_sums(const Columns& a, int64_t begin, int64_t end, double* first, double* second) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t stride = a.stride;
  const acc_t<T>* pivot = static_cast<const acc_t<T>*>(a.pivot);
  sum_columns<T>(a, begin, end, first, second,
                 [=](int64_t row, int64_t col, int n, vec<T>& one, vec<T>& two)
                     NORMKIT_INLINE {
                       const vec<T> p = load_some(pivot + col, n, vec<T>{});
                       const vec<T> d = load_some(x + row * stride + col, n, p) - p;
                       one += d;
                       two += d * d;
                     });
}

// The gradient of u in a row's columns from `col` on, where d = x - pivot.
template <class T, class G>
[[gnu::always_inline]] inline vec<T> column_gradient(const Columns& a, const G& source, int64_t at,
                                                     int64_t col, int n, vec<T> d) {
  if constexpr (!G::reads_u) return source(at, n, d);
  using A = acc_t<T>;
  const vec<T> scale = load_some(static_cast<const A*>(a.y_scale) + col, n, vec<T>{});
  return source(at, n, scale * d + load_some(static_cast<const A*>(a.y_center) + col, n, vec<T>{}));
}

template <class T, class G>
void column_grad_sums_by(const Columns& a, const G& source, int64_t begin, int64_t end,
                         double* first, double* second) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t stride = a.stride;
  const acc_t<T>* pivot = static_cast<const acc_t<T>*>(a.pivot);
  sum_columns<T>(a, begin, end, first, second,
                 [=, &a, &source](int64_t row, int64_t col, int n, vec<T>& one, vec<T>& two)
                     NORMKIT_INLINE {
                       const int64_t at = row * stride + col;
                       const vec<T> p = load_some(pivot + col, n, vec<T>{});
                       const vec<T> d = load_some(x + at, n, p) - p;
                       const vec<T> gradient = column_gradient<T>(a, source, at, col, n, d);
                       one += gradient;
                       two += gradient * d;
                     });
}

template <class T>
void column_grad_sums(const Columns& a, int64_t begin, int64_t end, double* first,
                      double* second) {
  with_gradient<T>(a.grad, a.ending, [&](const auto& source) {
    column_grad_sums_by<T>(a, source, begin, end, first, second);
  });
}

template <class T, class E>
void column_results(const Columns& a, const E& finish, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.out);
  const A* pivot = static_cast<const A*>(a.pivot);
  const A* scale = static_cast<const A*>(a.scale);
  const A* center = static_cast<const A*>(a.center);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * a.stride;
    each_vector<T>(a.cols, [&](int, int64_t i, int n) NORMKIT_INLINE {
      const vec<T> p = load_some(pivot + i, n, vec<T>{});
      const vec<T> u = load_some(scale + i, n, vec<T>{}) * (load_some(x + start + i, n, p) - p) +
                       load_some(center + i, n, vec<T>{});
      store_some(y + start + i, n, finish(start + i, n, u));
    });
  }
}

template <class T>
void column_apply(const Columns& a, int64_t begin, int64_t end) {
  with_ending<T>(a.ending, [&](const auto& finish) { column_results<T>(a, finish, begin, end); });
}

template <class T, class G>
void column_combine_by(const Columns& a, const G& source, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.out);
  const A* pivot = static_cast<const A*>(a.pivot);
  const A* scale = static_cast<const A*>(a.scale);
  const A* slope = static_cast<const A*>(a.slope);
  const A* center = static_cast<const A*>(a.center);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * a.stride;
    each_vector<T>(a.cols, [&](int, int64_t i, int n) NORMKIT_INLINE {
      const vec<T> p = load_some(pivot + i, n, vec<T>{});
      const vec<T> d = load_some(x + start + i, n, p) - p;
      const vec<T> gradient = column_gradient<T>(a, source, start + i, i, n, d);
      const vec<T> k = load_some(slope + i, n, vec<T>{});
      const vec<T> along = k == vec<T>{} ? vec<T>{} : k * d;  // as in row_gradient
      store_some(dx + start + i, n,
                 load_some(scale + i, n, vec<T>{}) * gradient +
                     (along + load_some(center + i, n, vec<T>{})));
    });
  }
}

// After column_grad_sums, which may have written the gradient that is read here.
template <class T>
void column_combine(const Columns& given, int64_t begin, int64_t end) {
  const Columns a = second_pass(given);
  with_gradient<T>(a.grad, a.ending, [&](const auto& source) {
    column_combine_by<T>(a, source, begin, end);
  });
}

}  // namespace normkit::NORMKIT_ISA
