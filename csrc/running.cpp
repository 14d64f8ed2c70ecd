// Running statistics, in place.
#include "operators.h"

namespace normkit {
namespace {

template <class T>
void blend(const Tensor& running, const std::vector<double>& value, double factor,
           double momentum) {
  T* table = static_cast<T*>(running.data_ptr());
  for (int64_t i = 0; i < running.numel(); ++i) {
    table[i] = T((1.0 - momentum) * double(table[i]) + momentum * factor * value[i]);
  }
}

void blend(const Tensor& running, const Tensor& value, double factor, double momentum) {
  STD_TORCH_CHECK(running.is_contiguous() && running.numel() == value.numel(),
                  "running statistics are contiguous and as many as the batch's");
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(running.get(), &dtype));
  const bool wide = dtype == aoti_torch_dtype_float64();
  STD_TORCH_CHECK(wide || dtype == aoti_torch_dtype_float32(),
                  "running statistics are float32 or float64");
  const auto run = wide ? blend<double> : blend<float>;
  run(running, as_doubles(value), factor, momentum);
}

}  // namespace

void update_running(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var,
                    int64_t count, double momentum) {
  const double bessel = count > 1 ? double(count) / double(count - 1) : 1.0;
  blend(running_mean, mean, 1.0, momentum);
  blend(running_var, var, bessel, momentum);
}

}  // namespace normkit
