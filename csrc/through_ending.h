// An ending, y = act(norm(x) + residual), from the operators' arguments to the kernels' struct.
#pragma once

#include "tensors.h"

namespace normkit {

// A map in the layout of x, or none.
inline OptionalTensor beside(const FeatureMap& x, const OptionalTensor& other) {
  if (!other) return std::nullopt;
  STD_TORCH_CHECK(other->numel() == x.numel(), "residual and result have the shape of x");
  return x.matching(*other);
}

inline Ending ending_of(int64_t activation, double slope, const OptionalTensor& residual) {
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::relu6),
                  "there is no activation ", activation);
  return {Activation(activation), slope, residual ? residual->data_ptr() : nullptr, nullptr, nullptr};
}

// The gradients of x, residual, weight and bias of y = act(norm(x) + residual). The gradient of
// norm(x) is stored in the residual's gradient if that is wanted, otherwise in the memory of dx. For
// ReLU and leaky ReLU without a residual it is not stored.
struct ThroughEnding {
  OptionalTensor residual, result;  // hold the memory that the ending points to
  Ending ending;
  Tensor dx, dresidual;

  ThroughEnding(const FeatureMap& x, const OptionalTensor& given_residual,
                const OptionalTensor& given_result, int64_t activation, double slope,
                bool need_residual)
      : residual(beside(x, given_residual)), result(beside(x, given_result)),
        ending(ending_of(activation, slope, residual)), dx(x.fresh()),
        dresidual(need_residual ? x.fresh() : fresh_table({0}, x.wide())) {
    STD_TORCH_CHECK(ending.activation != Activation::none, "the gradient is that of the norm alone");
    if (result) ending.result = result->data_ptr();
    const bool is_signed = ending.activation == Activation::relu ||
                           ending.activation == Activation::leaky_relu;
    if (need_residual) {
      ending.passed = dresidual.data_ptr();
    } else if (!is_signed || residual || result) {
      ending.passed = dx.data_ptr();
    }
  }
  // Where the gradient of u is, for kernels whose first pass always stores it.
  const Tensor& always_passed() {
    if (!ending.passed) ending.passed = dx.data_ptr();
    return ending.passed == dx.data_ptr() ? dx : dresidual;
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> with(
      const std::tuple<Tensor, Tensor, Tensor>& found) const {
    const auto& [dx_, dweight, dbias] = found;
    return {dx_, dresidual, dweight, dbias};
  }
};

}  // namespace normkit
