// The ending of a call, y = act(u + residual) with u = scale * (x - pivot) + center, row by row; and
// for backward, how the gradient of u is computed from that of y.
#pragma once

#include "activations.h"
#include "rows.h"

namespace normkit::NORMKIT_ISA {

// The factors of u in one channel of one group.
template <class T>
struct Line {
  acc_t<T> pivot, scale = 0, center = 0;
};

// The same ending for memory that begins `start` elements later.
template <class T>
inline Ending later(Ending ending, int64_t start) {
  for (const void** map : {&ending.residual, &ending.result}) {
    if (*map) *map = static_cast<const T*>(*map) + start;
  }
  if (ending.passed) ending.passed = static_cast<T*>(ending.passed) + start;
  return ending;
}

// end(at, n, u): the result from u at element `at` and n - 1 after it. ReLU, leaky ReLU and the sum
// alone are cheap and have loops of their own; others are a call for each vector.
template <class T, bool is_cheap, bool has_residual>
struct End {
  const T* residual;
  Activation activation;
  Below<T> below;
  explicit End(const Ending& ending)
      : residual(static_cast<const T*>(ending.residual)), activation(ending.activation),
        below(activation, activation == Activation::none ? 1 : ending.slope) {}
  [[gnu::always_inline]] vec<T> operator()(int64_t at, int n, vec<T> u) const {
    if constexpr (has_residual) u += load_some(residual + at, n, vec<T>{});
    if constexpr (is_cheap) return below(u, u);
    return activate_any<T>(activation, u, below.slope);
  }
};

// No ending.
template <class T>
struct NoEnd {
  [[gnu::always_inline]] vec<T> operator()(int64_t, int, vec<T> u) const { return u; }
};

// Calls body(end) with the function for this ending.
template <class T, bool is_cheap, class F>
inline void with_residual(const Ending& ending, const F& body) {
  if (ending.residual) {
    body(End<T, is_cheap, true>(ending));
  } else {
    body(End<T, is_cheap, false>(ending));
  }
}
template <class T, class F>
inline void with_ending(const Ending& ending, const F& body) {
  if (!ending.follows()) {
    body(NoEnd<T>{});
  } else if (ending.activation <= Activation::leaky_relu) {
    with_residual<T, true>(ending, body);
  } else {
    with_residual<T, false>(ending, body);
  }
}

template <class T, class E>
void row_end(const T* x, T* y, int64_t at, int64_t length, const Line<T>& line, const E& end) {
  const vec<T> p = splat<T>(line.pivot), s = splat<T>(line.scale), c = splat<T>(line.center);
  each_vector<T>(length, [&](int, int64_t i, int n) NORMKIT_INLINE {
    store_some(y + at + i, n, end(at + i, n, s * (load_some(x + at + i, n, p) - p) + c));
  });
}

// Elements [at, at + length) of a map: u, then the ending.
template <class T>
inline void row_result(const T* x, T* y, int64_t at, int64_t length, const Line<T>& line,
                       const Ending& ending) {
  if (!ending.follows()) {
    return row_affine(x + at, y + at, length, line.pivot, line.scale, line.center);
  }
  with_ending<T>(ending, [&](const auto& end) { row_end<T>(x, y, at, length, line, end); });
}

// Below: gradient(at, n, u) is the gradient of u where that of y is g.

// No ending, or the first pass has stored the gradient of u.
template <class T>
struct PlainGradient {
  static constexpr bool reads_u = false;
  using Second = PlainGradient;  // what the second pass reads
  const T* g;
  PlainGradient(const void* grad, const Ending&) : g(static_cast<const T*>(grad)) {}
  vec<T> operator()(int64_t at, int n, vec<T>) const { return load_some(g + at, n, vec<T>{}); }
};

// ReLU and leaky ReLU of the norm alone: both passes of backward compute the sign of u again.
template <class T>
struct SignedGradient {
  static constexpr bool reads_u = true;
  using Second = SignedGradient;
  const T* g;
  Below<T> below;
  SignedGradient(const void* grad, const Ending& ending)
      : g(static_cast<const T*>(grad)), below(ending.activation, ending.slope) {}
  vec<T> operator()(int64_t at, int n, vec<T> u) const {
    return below(load_some(g + at, n, vec<T>{}), u);
  }
};

// All other endings: the first pass stores the gradient of u, and the second reads it.
template <class T>
struct PassedGradient {
  static constexpr bool reads_u = true;
  using Second = PlainGradient<T>;
  const T *g, *residual, *result;
  T* passed;
  Activation activation;
  Below<T> below;
  PassedGradient(const void* grad, const Ending& ending)
      : g(static_cast<const T*>(grad)), residual(static_cast<const T*>(ending.residual)),
        result(static_cast<const T*>(ending.result)), passed(static_cast<T*>(ending.passed)),
        activation(ending.activation), below(ending.activation, ending.slope) {}
  vec<T> operator()(int64_t at, int n, vec<T> u) const {
    vec<T> gradient = load_some(g + at, n, vec<T>{});
    if (result) {
      gradient = below(gradient, load_some(result + at, n, vec<T>{}));
    } else {
      if (residual) u += load_some(residual + at, n, vec<T>{});
      gradient = through_any<T>(activation, gradient, u, below.slope);
    }
    store_some(passed + at, n, gradient);
    return gradient;
  }
};

// Calls body(gradient) with the function for this ending.
template <class T, class F>
inline void with_gradient(const void* grad, const Ending& ending,
                                                 const F& body) {
  if (ending.activation == Activation::none) return body(PlainGradient<T>(grad, ending));
  if (ending.passed) return body(PassedGradient<T>(grad, ending));
  body(SignedGradient<T>(grad, ending));
}

// The gradient that the second pass of backward reads: the stored one, if the first pass stored it.
template <class A>
inline A second_pass(A arguments) {
  if (arguments.ending.passed) {
    arguments.grad = arguments.ending.passed;
    arguments.ending = {};
  }
  return arguments;
}

// The gradient of u, where d = x - pivot.
template <class T, class G>
[[gnu::always_inline]] inline vec<T> gradient_at(const G& gradient, int64_t at, int n, vec<T> d,
                                                 const Line<T>& line) {
  if constexpr (!G::reads_u) return gradient(at, n, d);
  return gradient(at, n, splat<T>(line.scale) * d + splat<T>(line.center));
}

// sums = {sum(g), sum(g * (x - pivot))}, g being the gradient of u
template <class T, class G>
inline void span_grad_sums(const G& gradient, const T* x, const Span& span, const Line<T>& line,
                           double* sums) {
  const vec<T> pivots = splat<T>(line.pivot);
  sum_span<T>(span, sums, [&](int64_t at, int n, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
    const vec<T> d = load_some(x + at, n, pivots) - pivots;
    const vec<T> g = gradient_at<T>(gradient, at, n, d, line);
    one += g;
    two += g * d;
  });
}

template <class T, class G>
inline void unit_grad_sums(const G& gradient, const T* x, const Span& span, int64_t units,
                           const Line<T>* lines, double* sums) {
  sum_units<T>(span, units, sums,
               [&](int64_t at, int n, int64_t unit, vec<T>& one, vec<T>& two) NORMKIT_INLINE {
                 const vec<T> pivots = splat<T>(lines[unit].pivot);
                 const vec<T> d = load_some(x + at, n, pivots) - pivots;
                 const vec<T> g = gradient_at<T>(gradient, at, n, d, lines[unit]);
                 one += g;
                 two += g * d;
               });
}

// dx = scale * g + slope * (x - pivot) + center, g being the gradient of u. Without a slope (given
// statistics) the plain gradient leaves x unread and the others x's value out: it may be infinite,
// and dx is finite all the same.
template <class T, class G>
inline void row_gradient(const G& gradient, const T* x, T* dx, int64_t at, int64_t length,
                         const Line<T>& line, acc_t<T> scale, acc_t<T> slope, acc_t<T> center) {
  const vec<T> p = splat<T>(line.pivot), s = splat<T>(scale), k = splat<T>(slope);
  const vec<T> c = splat<T>(center);
  if (slope == 0) {
    each_vector<T>(length, [&](int, int64_t i, int n) NORMKIT_INLINE {
      const vec<T> d = G::reads_u ? load_some(x + at + i, n, p) - p : vec<T>{};
      store_some(dx + at + i, n, s * gradient_at<T>(gradient, at + i, n, d, line) + c);
    });
    return;
  }
  each_vector<T>(length, [&](int, int64_t i, int n) NORMKIT_INLINE {
    const vec<T> d = load_some(x + at + i, n, p) - p;
    const vec<T> g = gradient_at<T>(gradient, at + i, n, d, line);
    store_some(dx + at + i, n, s * g + (k * d + c));
  });
}

}  // namespace normkit::NORMKIT_ISA
