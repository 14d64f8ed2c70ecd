// Running statistics, in place.
#include "operators.h"
#include "pooled.h"

namespace normkit {
namespace {

template <class T>
void blend(T* running, const double* value, int64_t size, double factor, double momentum) {
  for (int64_t i = 0; i < size; ++i) {
    running[i] = T((1.0 - momentum) * double(running[i]) + momentum * factor * value[i]);
  }
}

void blend(const Tensor& running, const double* value, int64_t size, double factor,
           double momentum) {
  STD_TORCH_CHECK(running.is_contiguous() && running.numel() == size,
                  "running statistics are contiguous and have ", size, " values");
  const int32_t dtype = dtype_of(running);
  const bool wide = dtype == aoti_torch_dtype_float64();
  STD_TORCH_CHECK(wide || dtype == aoti_torch_dtype_float32(),
                  "running statistics are float32 or float64");
  if (wide) {
    blend(static_cast<double*>(running.data_ptr()), value, size, factor, momentum);
  } else {
    blend(static_cast<float*>(running.data_ptr()), value, size, factor, momentum);
  }
}

}  // namespace

void blend_running(const Tensor& running_mean, const Tensor& running_var, const double* mean,
                   const double* var, int64_t size, int64_t count, double momentum) {
  const double bessel = count > 1 ? double(count) / double(count - 1) : 1.0;
  blend(running_mean, mean, size, 1.0, momentum);
  blend(running_var, var, size, bessel, momentum);
}

}  // namespace normkit
