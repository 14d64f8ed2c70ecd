// Activations, which may follow a norm, and their derivatives, on vectors.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace normkit::NORMKIT_ISA {

typedef uint64_t uint64v __attribute__((vector_size(kBytes)));
typedef int32_t int32v __attribute__((vector_size(kBytes)));

template <class V>
inline V at_most(V v, V most) {
  return v > most ? most : v;  // comparisons keep NaN
}
template <class V>
inline V at_least(V v, V least) {
  return v < least ? least : v;
}

// v where the bits of mask are 1, and 0 elsewhere.
inline vec<float> with_mask(vec<float> v, vec<float> mask) {
  const uint32v bits = load_as<uint32v>(&v) & load_as<uint32v>(&mask);
  return load_as<vec<float>>(&bits);
}
inline vec<double> with_mask(vec<double> v, vec<double> mask) {
  const uint64v bits = load_as<uint64v>(&v) & load_as<uint64v>(&mask);
  return load_as<vec<double>>(&bits);
}

// Where u <= 0, leaky ReLU gives slope * v, and ReLU gives 0 even if v is infinite.
template <class T>
struct Below {
  vec<T> slope, mask;
  Below(Activation act, double factor) : slope(splat<T>(acc_t<T>(factor))) {
    std::memset(&mask, act == Activation::relu ? 0 : 0xff, sizeof(mask));
  }
  [[gnu::always_inline]] vec<T> operator()(vec<T> v, vec<T> u) const {
    return u <= vec<T>{} ? with_mask(slope * v, mask) : v;
  }
};

// Applies a scalar function to each lane: for double, where precision matters more than time.
template <class F>
inline vec<double> by_lane(vec<double> v, const F& function) {
  for (int lane = 0; lane < kWidth<double>; ++lane) v[lane] = function(v[lane]);
  return v;
}

inline vec<double> exponential(vec<double> v) {
  return by_lane(v, [](double u) { return std::exp(u); });
}
inline vec<double> hyperbolic_tangent(vec<double> v) {
  return by_lane(v, [](double u) { return std::tanh(u); });
}
inline vec<double> error_function(vec<double> v) {
  return by_lane(v, [](double u) { return std::erf(u); });
}

// c[0] + c[1] v + c[2] v^2 + ...
template <int count>
inline vec<float> polynomial(vec<float> v, const float (&c)[count]) {
  vec<float> sum = splat<float>(c[count - 1]);
  for (int i = count - 2; i >= 0; --i) sum = sum * v + splat<float>(c[i]);
  return sum;
}

// exp(v) = 2^n exp(r) with |r| <= log(2) / 2; the polynomial is that of Cephes' expf.
inline vec<float> exponential(vec<float> v) {
  const vec<float> u = at_least(at_most(v, splat<float>(88.3762626f)), splat<float>(-87.3365478f));
  const vec<float> magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const vec<float> shifted = u * splat<float>(1.44269504f) + magic;
  const vec<float> n = shifted - magic;
  const vec<float> r = (u - n * splat<float>(0.693359375f)) - n * splat<float>(-2.12194440e-4f);
  constexpr float kTerms[] = {1.0f,           1.0f,           5.0000001201e-1f, 1.6666665459e-1f,
                              4.1665795894e-2f, 8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  const vec<float> e = polynomial(r, kTerms);
  const int32v exponent = (load_as<int32v>(&shifted) << 23) + (int32v{} + 0x3f800000);
  const vec<float> result = e * load_as<vec<float>>(&exponent);
  return v > splat<float>(88.3762626f) ? splat<float>(__builtin_inff()) : result;
}

// Rational functions as in Eigen and XLA, a few units in the last place.
inline vec<float> hyperbolic_tangent(vec<float> v) {
  const vec<float> u = at_least(at_most(v, splat<float>(7.90531111f)), splat<float>(-7.90531111f));
  constexpr float kAbove[] = {4.89352455891786e-03f, 6.37261928875436e-04f,  1.48572235717979e-05f,
                              5.12229709037114e-08f, -8.60467152213735e-11f, 2.00018790482477e-13f,
                              -2.76076847742355e-16f};
  constexpr float kBelow[] = {4.89352518554385e-03f, 2.26843463243900e-03f, 1.18534705686654e-04f,
                              1.19825839466702e-06f};
  const vec<float> square = u * u;
  const vec<float> result = u * polynomial(square, kAbove) / polynomial(square, kBelow);
  return square < splat<float>(1.6e-7f) ? v : result;
}
inline vec<float> error_function(vec<float> v) {
  const vec<float> u = at_least(at_most(v, splat<float>(4.0f)), splat<float>(-4.0f));
  constexpr float kAbove[] = {-1.60960333262415e-02f, -2.95459980854025e-03f, -7.34990630326855e-04f,
                              -5.69250639462346e-05f, -2.10102402082508e-06f, 2.77068142495902e-08f,
                              -2.72614225801306e-10f};
  constexpr float kBelow[] = {-1.42647390514189e-02f, -7.37332916720468e-03f, -1.68282697438203e-03f,
                              -2.13374055278905e-04f, -1.45660718464996e-05f};
  const vec<float> square = u * u;
  return u * polynomial(square, kAbove) / polynomial(square, kBelow);
}

template <class T>
inline vec<T> logistic(vec<T> u) {
  return splat<T>(1) / (exponential(-u) + splat<T>(1));
}
// The cumulative distribution function of the standard normal distribution.
template <class T>
inline vec<T> normal_share(vec<T> u) {
  const vec<T> one = splat<T>(1), root_half = splat<T>(acc_t<T>(0.70710678118654752440));
  return (error_function(u * root_half) + one) * splat<T>(acc_t<T>(0.5));
}

// act(u); u itself without an activation. `slope` is that of a leaky ReLU below 0.
template <class T, Activation act>
[[gnu::always_inline]] inline vec<T> activate(vec<T> u, vec<T> slope) {
  if constexpr (act == Activation::relu) return u <= vec<T>{} ? vec<T>{} : u;
  if constexpr (act == Activation::leaky_relu) return u <= vec<T>{} ? slope * u : u;
  if constexpr (act == Activation::silu) return u * logistic<T>(u);
  if constexpr (act == Activation::gelu) return u * normal_share<T>(u);
  if constexpr (act == Activation::hardswish) {
    const vec<T> three = splat<T>(3), six = splat<T>(6);
    return u * at_least(at_most(u + three, six), vec<T>{}) / six;
  }
  if constexpr (act == Activation::sigmoid) return logistic<T>(u);
  if constexpr (act == Activation::tanh) return hyperbolic_tangent(u);
  if constexpr (act == Activation::relu6) return at_least(at_most(u, splat<T>(6)), vec<T>{});
  return u;
}

// g act'(u)
template <class T, Activation act>
[[gnu::always_inline]] inline vec<T> through(vec<T> g, vec<T> u, vec<T> slope) {
  const vec<T> one = splat<T>(1);
  if constexpr (act == Activation::relu) return u <= vec<T>{} ? vec<T>{} : g;
  if constexpr (act == Activation::leaky_relu) return u <= vec<T>{} ? slope * g : g;
  if constexpr (act == Activation::silu) {
    const vec<T> share = logistic<T>(u);
    return g * (share * (one + u * (one - share)));
  }
  if constexpr (act == Activation::gelu) {
    const vec<T> half = splat<T>(acc_t<T>(0.5));
    const vec<T> density =
        exponential(-half * u * u) * splat<T>(acc_t<T>(0.39894228040143267794));
    return g * (normal_share<T>(u) + u * density);
  }
  if constexpr (act == Activation::hardswish) {
    const vec<T> three = splat<T>(3);
    const vec<T> inside = g * (u / three + splat<T>(acc_t<T>(0.5)));
    return u < -three ? vec<T>{} : (u <= three ? inside : g);
  }
  if constexpr (act == Activation::sigmoid) {
    const vec<T> share = logistic<T>(u);
    return g * (share * (one - share));
  }
  if constexpr (act == Activation::tanh) {
    const vec<T> y = hyperbolic_tangent(u);
    return g * (one - y * y);
  }
  if constexpr (act == Activation::relu6) {
    return u <= vec<T>{} ? vec<T>{} : (u >= splat<T>(6) ? vec<T>{} : g);
  }
  return g;
}

// Calls body with the activation as a constant, so that its loop is compiled for each activation.
template <Activation act>
using Constant = std::integral_constant<Activation, act>;
template <class F>
inline void with_activation(Activation act, const F& body) {
  switch (act) {
    case Activation::relu:
      return body(Constant<Activation::relu>{});
    case Activation::leaky_relu:
      return body(Constant<Activation::leaky_relu>{});
    case Activation::silu:
      return body(Constant<Activation::silu>{});
    case Activation::gelu:
      return body(Constant<Activation::gelu>{});
    case Activation::hardswish:
      return body(Constant<Activation::hardswish>{});
    case Activation::sigmoid:
      return body(Constant<Activation::sigmoid>{});
    case Activation::tanh:
      return body(Constant<Activation::tanh>{});
    case Activation::relu6:
      return body(Constant<Activation::relu6>{});
    default:
      return body(Constant<Activation::none>{});
  }
}

// Applies an activation that is known only at run time. One call for each vector, so that the loops
// around it are compiled once, not for every activation.
template <class T>
[[gnu::noinline]] vec<T> activate_any(Activation act, vec<T> u, vec<T> slope) {
  vec<T> result;
  with_activation(act, [&](auto kind) NORMKIT_INLINE {
    result = activate<T, decltype(kind)::value>(u, slope);
  });
  return result;
}
template <class T>
[[gnu::noinline]] vec<T> through_any(Activation act, vec<T> g, vec<T> u, vec<T> slope) {
  vec<T> result;
  with_activation(act, [&](auto kind) NORMKIT_INLINE {
    result = through<T, decltype(kind)::value>(g, u, slope);
  });
  return result;
}

}  // namespace normkit::NORMKIT_ISA
