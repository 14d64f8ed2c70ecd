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

template <class T>
struct Sums {
  using V = vec<T>;
  V lanes[4] = {};
  doublev sum = {};

  void fold() {
    sum += widen((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
    for (V& lane : lanes) lane = V{};
  }
  double value() {
    fold();
    return total(sum);
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
  int lane = 0;
  for (; i + W <= length; i += W) each(lane++, i, W);
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
  each_vector<T>(count, [&](int, int64_t i, int n) { sum += load_some(x + i, n, vec<T>{}); });
  return acc_t<T>(total(widen(sum)) / double(count));
}

// Calls block(row_begin + i, n) for blocks of at most kBlock elements and fold() between them.
template <class B, class F>
[[gnu::always_inline]] inline void each_block(const Span& span, const B& block, const F& fold) {
  int64_t pending = 0;
  for (int64_t row = 0; row < span.count; ++row) {
    const int64_t start = span.offset + row * span.stride;
    for (int64_t i = 0; i < span.length; i += kBlock) {
      const int64_t n = least(kBlock, span.length - i);
      if ((pending += n) > kBlock) {
        fold();
        pending = n;
      }
      block(start + i, n);
    }
  }
}

// sums = {sum(x - shift), sum((x - shift)^2)}
template <class T>
inline void span_sums(const T* x, const Span& span, acc_t<T> shift, double* sums) {
  const vec<T> shifts = splat<T>(shift);
  Sums<T> first, second;
  each_block(
      span,
      [&](int64_t start, int64_t length) {
        each_vector<T>(length, [&](int lane, int64_t i, int n) {
          const vec<T> d = load_some(x + start + i, n, shifts) - shifts;
          first.lanes[lane] += d;
          second.lanes[lane] += d * d;
        });
      },
      [&] {
        first.fold();
        second.fold();
      });
  sums[0] = first.value();
  sums[1] = second.value();
}

// sums = {sum(g), sum(g * (x - pivot))}
template <class T>
inline void span_grad_sums(const T* g, const T* x, const Span& span, acc_t<T> pivot, double* sums) {
  const vec<T> pivots = splat<T>(pivot);
  Sums<T> first, second;
  each_block(
      span,
      [&](int64_t start, int64_t length) {
        each_vector<T>(length, [&](int lane, int64_t i, int n) {
          const vec<T> gradient = load_some(g + start + i, n, vec<T>{});
          first.lanes[lane] += gradient;
          second.lanes[lane] += gradient * (load_some(x + start + i, n, pivots) - pivots);
        });
      },
      [&] {
        first.fold();
        second.fold();
      });
  sums[0] = first.value();
  sums[1] = second.value();
}

// y = scale * (x - pivot) + center
template <class T>
inline void row_affine(const T* x, T* y, int64_t length, acc_t<T> pivot, acc_t<T> scale,
                       acc_t<T> center) {
  const vec<T> p = splat<T>(pivot), s = splat<T>(scale), c = splat<T>(center);
  each_vector<T>(length, [&](int, int64_t i, int n) {
    store_some(y + i, n, s * (load_some(x + i, n, p) - p) + c);
  });
}

// dx = scale * g + slope * (x - pivot) + center
template <class T>
inline void row_gradient(const T* g, const T* x, T* dx, int64_t length, acc_t<T> pivot,
                         acc_t<T> scale, acc_t<T> slope, acc_t<T> center) {
  const vec<T> p = splat<T>(pivot), s = splat<T>(scale), k = splat<T>(slope), c = splat<T>(center);
  each_vector<T>(length, [&](int, int64_t i, int n) {
    const vec<T> gradient = load_some(g + i, n, vec<T>{});
    store_some(dx + i, n, s * gradient + (k * (load_some(x + i, n, p) - p) + c));
  });
}

}  // namespace normkit::NORMKIT_ISA
