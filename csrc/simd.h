// Vectors of one instruction set, loads and stores of every element type, and sums of lanes.
//
// GCC's vector extension instead of intrinsics: operators read like the formula, and the same text
// serves every instruction set. Only masked tails and float16 need intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// On lambdas: one call per vector would undo everything that the vectors win.
#define NORMKIT_INLINE __attribute__((always_inline))

namespace normkit::NORMKIT_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type sums and tables use: float, double for double.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

template <class A>
struct Lanes {
  static constexpr int width = kBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kBytes)));
};
template <class T>
using vec = typename Lanes<acc_t<T>>::type;
template <class T>
constexpr int kWidth = Lanes<acc_t<T>>::width;

typedef uint32_t uint32v __attribute__((vector_size(kBytes)));
typedef uint16_t uint16v __attribute__((vector_size(kBytes / 2)));
typedef float float_half __attribute__((vector_size(kBytes / 2)));
typedef double doublev __attribute__((vector_size(kBytes)));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline vec<T> splat(acc_t<T> value) {
  return value - vec<T>{};  // a scalar operand is broadcast; -0.0 survives a subtraction of +0.0
}

inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float result;
  if (magnitude >= 0x7c00u) {
    bits |= 0x7f800000u;  // infinity or not a number
    std::memcpy(&result, &bits, 4);
  } else {
    std::memcpy(&result, &bits, 4);
    result *= 0x1p112f;  // moves the exponent's bias; exact for subnormal numbers too
  }
  std::memcpy(&bits, &result, 4);
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

inline void from_float(float value, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_float(float value, Float16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    out.bits = sign | 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    out.bits = sign | 0x7c00u;  // 65520 and above round to infinity
  } else if (bits < 0x38800000u) {
    float magnitude;  // below the normal range: adding 0.5 leaves the rounded bits at the end
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out.bits = sign | uint16_t(bits - 0x3f000000u);
  } else {
    out.bits = sign | uint16_t((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
  }
}
inline void from_float(float value, float& out) { out = value; }
inline void from_float(double value, double& out) { out = value; }

template <class V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

inline vec<float> load(const float* x) { return load_as<vec<float>>(x); }
inline vec<double> load(const double* x) { return load_as<vec<double>>(x); }
inline vec<float> load(const BFloat16* x) {
  const uint32v bits = __builtin_convertvector(load_as<uint16v>(x), uint32v) << 16;
  return load_as<vec<float>>(&bits);
}
inline vec<float> load(const Float16* x) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__F16C__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
  vec<float> v;
  for (int lane = 0; lane < kWidth<float>; ++lane) v[lane] = to_float(x[lane]);
  return v;
#endif
}

inline void store(float* y, vec<float> v) { std::memcpy(y, &v, sizeof(v)); }
inline void store(double* y, vec<double> v) { std::memcpy(y, &v, sizeof(v)); }
inline void store(BFloat16* y, vec<float> v) {
  const uint32v bits = load_as<uint32v>(&v);
  const uint32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32v result = (v != v) ? (uint32v{} + 0x7fc0u) : rounded;
  const uint16v narrow = __builtin_convertvector(result, uint16v);
  std::memcpy(y, &narrow, sizeof(narrow));
}
inline void store(Float16* y, vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)y, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)y, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kWidth<float>; ++lane) from_float(v[lane], y[lane]);
#endif
}

// The first `count` elements, the other lanes as in `fill`. Never touches memory beyond `count`.
template <class T>
inline vec<T> load_tail(const T* x, int64_t count, vec<T> fill) {
  for (int lane = 0; lane < count; ++lane) fill[lane] = to_float(x[lane]);
  return fill;
}
template <class T>
inline void store_tail(T* y, int64_t count, vec<T> v) {
  for (int lane = 0; lane < count; ++lane) from_float(v[lane], y[lane]);
}
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1u); }
template <>
inline vec<float> load_tail(const float* x, int64_t count, vec<float> fill) {
  return (vec<float>)_mm512_mask_loadu_ps((__m512)fill, first_lanes(count), x);
}
template <>
inline void store_tail(float* y, int64_t count, vec<float> v) {
  _mm512_mask_storeu_ps(y, first_lanes(count), (__m512)v);
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <>
inline vec<float> load_tail(const BFloat16* x, int64_t count, vec<float> fill) {
  const __m512i bits =
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), x)), 16);
  return (vec<float>)_mm512_mask_mov_ps((__m512)fill, first_lanes(count), _mm512_castsi512_ps(bits));
}
template <>
inline vec<float> load_tail(const Float16* x, int64_t count, vec<float> fill) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), x);
  return (vec<float>)_mm512_mask_cvtph_ps((__m512)fill, first_lanes(count), bits);
}
template <>
inline void store_tail(BFloat16* y, int64_t count, vec<float> v) {
  BFloat16 whole[kWidth<float>];
  store(whole, v);
  _mm256_mask_storeu_epi16(y, first_lanes(count), _mm256_loadu_si256((const __m256i*)whole));
}
template <>
inline void store_tail(Float16* y, int64_t count, vec<float> v) {
  _mm256_mask_storeu_epi16(y, first_lanes(count),
                           _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#endif

// The sum of all lanes, in double.
inline doublev widen(vec<double> v) { return v; }
inline doublev widen(vec<float> v) {
  float_half halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], doublev) + __builtin_convertvector(halves[1], doublev);
}
template <int width>
inline double lane_sum(const double* lanes) {
  if constexpr (width == 1) {
    return lanes[0];
  } else {
    return lane_sum<width / 2>(lanes) + lane_sum<width / 2>(lanes + width / 2);
  }
}
inline double total(doublev v) {
  double lanes[kBytes / 8];
  std::memcpy(lanes, &v, sizeof(v));
  return lane_sum<kBytes / 8>(lanes);
}

}  // namespace normkit::NORMKIT_ISA
