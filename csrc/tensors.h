// Torch's side of the operators: feature maps, tables, fresh outputs and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace normkit {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// With fewer elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// The same for cells of a table, which cost more each: a square root, or several reads and writes.
constexpr int64_t kTableGrain = 4096;

enum class Layout { contiguous, channels_last };

// A tensor (N, C, *S) whose memory is dense in one of the two layouts.
struct FeatureMap {
  Tensor tensor;
  Layout layout;
  Element element;
  int32_t dtype;
  int64_t num_examples, num_channels, plane;

  // Copies only what is neither contiguous nor channels_last.
  explicit FeatureMap(const Tensor& x);

  const void* data() const { return tensor.data_ptr(); }
  int64_t numel() const { return num_examples * num_channels * plane; }
  bool wide() const { return element == Element::float64; }
  size_t element_size() const { return wide() ? 8 : element == Element::float32 ? 4 : 2; }
  size_t accumulator_size() const { return wide() ? sizeof(double) : sizeof(float); }

  // A tensor of the same shape, strides and dtype, not yet written.
  Tensor fresh() const;
  // `other` in this map's strides and dtype: itself where it already is.
  Tensor matching(const Tensor& other) const;
};

// The dtype of a tensor, which must be on the CPU.
int32_t dtype_of(const Tensor& x);

Tensor fresh_table(std::initializer_list<int64_t> sizes, bool wide);
inline double* doubles(const Tensor& table) { return static_cast<double*>(table.data_ptr()); }

// The values of a contiguous floating-point tensor.
std::vector<double> as_doubles(const Tensor& table);
// Copies them into existing memory; the tensor has `count` values.
void read_doubles(const Tensor& table, int64_t count, double* to);
// Copies `count` values into a float32 or float64 table.
void copy_doubles(const double* values, int64_t count, const Tensor& table);

// A parameter (C,) in the accumulator's type, each value repeated `repeat` times.
class Parameter {
 public:
  Parameter(const OptionalTensor& parameter, const FeatureMap& x, int64_t repeat = 1);
  const void* data() const { return data_; }
  double at(int64_t channel) const {
    return wide_ ? static_cast<const double*>(data_)[channel]
                 : double(static_cast<const float*>(data_)[channel]);
  }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  const void* data_ = nullptr;
  bool wide_ = false;
  std::vector<double> copy_;  // raw memory for float too
};

int64_t num_threads();

template <class F>
void parallel(int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t(0), count);
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  TORCH_ERROR_CODE_CHECK(
      torch_parallel_for(0, count, grain, call, const_cast<F*>(&body)));
}

inline int64_t at_least_one(int64_t value) { return value < 1 ? 1 : value; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace normkit
