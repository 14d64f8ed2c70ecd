// Statistics and results over columns of a row-major matrix: channels_last maps, where channels lie
// side by side, and dense inputs.
#pragma once

#include "rows.h"

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

template <class T>
void column_grad_sums(const Columns& a, int64_t begin, int64_t end, double* first,
                      double* second) {
  const T* x = static_cast<const T*>(a.x);
  const T* g = static_cast<const T*>(a.grad);
  const int64_t stride = a.stride;
  const acc_t<T>* pivot = static_cast<const acc_t<T>*>(a.pivot);
  sum_columns<T>(a, begin, end, first, second,
                 [=](int64_t row, int64_t col, int n, vec<T>& one, vec<T>& two)
                     NORMKIT_INLINE {
                       const vec<T> p = load_some(pivot + col, n, vec<T>{});
                       const vec<T> gradient = load_some(g + row * stride + col, n, vec<T>{});
                       one += gradient;
                       two += gradient * (load_some(x + row * stride + col, n, p) - p);
                     });
}

template <class T>
void column_apply(const Columns& a, int64_t begin, int64_t end) {
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
      store_some(y + start + i, n,
                 load_some(scale + i, n, vec<T>{}) * (load_some(x + start + i, n, p) - p) +
                     load_some(center + i, n, vec<T>{}));
    });
  }
}

template <class T>
void column_combine(const Columns& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.x);
  const T* g = static_cast<const T*>(a.grad);
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
      const vec<T> gradient = load_some(g + start + i, n, vec<T>{});
      const vec<T> k = load_some(slope + i, n, vec<T>{});
      const vec<T> along = k == vec<T>{} ? vec<T>{} : k * d;  // as in row_gradient
      store_some(dx + start + i, n,
                 load_some(scale + i, n, vec<T>{}) * gradient +
                     (along + load_some(center + i, n, vec<T>{})));
    });
  }
}

}  // namespace normkit::NORMKIT_ISA
