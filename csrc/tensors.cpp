#include "tensors.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace normkit {
namespace {

// Strides that differ only on axes of length 1 describe the same memory.
template <class Strides>
bool dense_in_order(const Tensor& x, const std::vector<int64_t>& order, const Strides& strides) {
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t axis = order[i], size = x.sizes()[axis];
    if (size != 1 && strides[axis] != expected) return false;
    expected *= size;
  }
  return true;
}

std::vector<int64_t> axes_of(const Tensor& x, Layout layout) {
  std::vector<int64_t> order;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    if (layout == Layout::contiguous || axis != 1) order.push_back(axis);
  }
  if (layout == Layout::channels_last) order.push_back(1);
  return order;
}

Element element_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Element::float32;
  if (dtype == aoti_torch_dtype_float64()) return Element::float64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Element::bfloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(),
                  "normkit's CPU kernels take float32, float64, bfloat16 and float16");
  return Element::float16;
}

}  // namespace

int32_t dtype_of(const Tensor& x) {
  // The dispatcher sends a call here when any tensor is on the CPU; the others may not be.
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STD_TORCH_CHECK(device == aoti_torch_device_type_cpu(),
                  "all tensors of a call are on one device: this input is on the CPU and a "
                  "parameter or buffer is not; move the layer or the input with .to(device)");
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

namespace {

Tensor fresh_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Page faults of small pages cost more than the kernel itself on large fresh outputs.
void advise_huge_pages(const Tensor& fresh, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthwhile = size_t(4) << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t aligned = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(aligned), end - aligned, MADV_HUGEPAGE);  // advice may fail
#else
  (void)fresh, (void)bytes;
#endif
}

template <class T>
void widen(const void* from, int64_t stride, int64_t count, int64_t repeat, T* to, int32_t dtype) {
  const Element element = element_of(dtype);
  for (int64_t i = 0; i < count; ++i) {
    T value;
    switch (element) {
      case Element::float32:
        value = T(static_cast<const float*>(from)[i * stride]);
        break;
      case Element::float64:
        value = T(static_cast<const double*>(from)[i * stride]);
        break;
      case Element::bfloat16:
        value = T(static_cast<const torch::headeronly::BFloat16*>(from)[i * stride]);
        break;
      default:
        value = T(float(static_cast<const torch::headeronly::Half*>(from)[i * stride]));
    }
    for (int64_t j = 0; j < repeat; ++j) *to++ = value;
  }
}

}  // namespace

FeatureMap::FeatureMap(const Tensor& x) : tensor(x), dtype(dtype_of(x)) {
  STD_TORCH_CHECK(x.dim() >= 2, "a feature map has shape (N, C, *S); this one has ", x.dim(),
                  " axes");
  element = element_of(dtype);
  num_examples = x.size(0);
  num_channels = x.size(1);
  plane = 1;
  for (int64_t axis = 2; axis < x.dim(); ++axis) plane *= x.sizes()[axis];
  layout = Layout::contiguous;
  if (x.is_contiguous()) return;
  if (dense_in_order(x, axes_of(x, Layout::channels_last), x.strides())) {
    layout = Layout::channels_last;
  } else {
    tensor = torch::stable::contiguous(x);
  }
}

Tensor FeatureMap::fresh() const {
  const Tensor out =
      fresh_strided(tensor.dim(), tensor.sizes().data(), tensor.strides().data(), dtype);
  advise_huge_pages(out, size_t(numel()) * element_size());
  return out;
}

Tensor FeatureMap::matching(const Tensor& other) const {
  bool same = dtype_of(other) == dtype && other.dim() == tensor.dim();
  for (int64_t axis = 0; same && axis < tensor.dim(); ++axis) {
    const int64_t size = tensor.sizes()[axis];
    same = other.sizes()[axis] == size &&
           (size == 1 || other.strides()[axis] == tensor.strides()[axis]);
  }
  if (same) return other;
  Tensor copy = fresh();
  torch::stable::copy_(copy, other);
  return copy;
}

Tensor fresh_table(std::initializer_list<int64_t> sizes, bool wide) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = at_least_one(sizes.begin()[1]);
  return fresh_strided(int64_t(sizes.size()), sizes.begin(), strides,
                       wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

Parameter::Parameter(const OptionalTensor& parameter, const FeatureMap& x, int64_t repeat) {
  if (!parameter) return;
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == x.num_channels,
                  "weight and bias have shape (C,) = (", x.num_channels, ",)");
  wide_ = x.wide();
  const int32_t dtype = dtype_of(*parameter), wanted =
      wide_ ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const int64_t stride = x.num_channels == 1 ? 1 : parameter->stride(0);
  if (dtype == wanted && stride == 1 && repeat == 1) {
    data_ = parameter->data_ptr();
    return;
  }
  copy_.resize(at_least_one(x.num_channels * repeat));
  data_ = copy_.data();
  if (wide_) {
    widen(parameter->data_ptr(), stride, x.num_channels, repeat, copy_.data(), dtype);
  } else {
    widen(parameter->data_ptr(), stride, x.num_channels, repeat,
          reinterpret_cast<float*>(copy_.data()), dtype);
  }
}

std::vector<double> as_doubles(const Tensor& table) {
  std::vector<double> result(at_least_one(table.numel()));
  read_doubles(table, table.numel(), result.data());
  return result;
}

void read_doubles(const Tensor& table, int64_t count, double* to) {
  STD_TORCH_CHECK(table.numel() == count, "a parameter or statistic has ", table.numel(),
                  " values where ", count, " are needed");
  const Tensor values = table.is_contiguous() ? table : torch::stable::contiguous(table);
  widen(values.data_ptr(), 1, count, 1, to, dtype_of(values));
}

void copy_doubles(const double* values, int64_t count, const Tensor& table) {
  if (dtype_of(table) == aoti_torch_dtype_float64()) {
    std::copy_n(values, count, doubles(table));
  } else {
    std::copy_n(values, count, static_cast<float*>(table.data_ptr()));
  }
}

int64_t num_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return threads;
}

}  // namespace normkit
