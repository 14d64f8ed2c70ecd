// Registers the operators with torch, on its stable ABI: one build serves many torch versions.
//
// x and grad: feature maps (N, C, *S), contiguous or channels_last; y and dx share x's strides.
// Statistics groups: `num_groups` equal runs of the flattened (C, *S) axis times runs of
// `examples_per_group` consecutive examples (0: all). Variances are biased. A table is float64 and
// (2, cells): means above variances; cells are num_batches * num_groups, then, where channel
// statistics are wanted, the channels. Fewer tensors and arguments mean fewer microseconds on tiny
// maps (1.2 for an argument), which is also why running statistics move inside the operator.
#include "operators.h"

STABLE_TORCH_LIBRARY_FRAGMENT(normkit, m) {
  m.def(
      "pooled_forward(Tensor x, Tensor? weight, Tensor? bias, int num_groups, "
      "int examples_per_group, float eps, bool channel_statistics, "
      "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
      "Tensor(c!)? num_batches_tracked=None, float momentum=0.0) -> (Tensor y, Tensor table)");
  m.def(
      "pooled_backward(Tensor grad, Tensor x, Tensor table, Tensor? weight, int num_groups, "
      "int examples_per_group, float eps, bool need_weight, bool need_bias) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "evaluate_forward(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "int num_groups, float eps) -> Tensor y");
  m.def(
      "evaluate_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
      "int num_groups, float eps, bool need_weight, bool need_bias) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "positional_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor y, Tensor table)");
  m.def(
      "positional_backward(Tensor grad, Tensor x, Tensor table, Tensor? weight, float eps, "
      "bool need_weight, bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "composite_forward(Tensor x, int kind, Tensor? first, Tensor? second, Tensor? third, "
      "Tensor? fourth, int num_groups, float batch_eps, float group_eps, int batch_source, "
      "float rate, Tensor? given_mean=None, Tensor? given_var=None, "
      "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
      "Tensor(c!)? num_batches_tracked=None) -> (Tensor y, Tensor table)");
  m.def(
      "composite_backward(Tensor grad, Tensor x, Tensor table, int kind, Tensor? first, "
      "Tensor? second, Tensor? third, Tensor? fourth, int num_groups, float batch_eps, "
      "float group_eps, int batch_source, float rate, int wanted) "
      "-> (Tensor dx, Tensor dfirst, Tensor dsecond, Tensor dthird, Tensor dfourth)");
  m.def("moments(Tensor x, int segment_size, bool wide=False) -> (Tensor mean, Tensor var)");
  m.def("apply(Tensor x, Tensor mean, Tensor scale, Tensor center) -> Tensor y");
  m.def(
      "reduce_grad(Tensor grad, Tensor x, Tensor mean) "
      "-> (Tensor grad_sum, Tensor grad_product_sum)");
  m.def(
      "combine_grad(Tensor grad, Tensor x, Tensor mean, Tensor k1, Tensor k2, Tensor k3) "
      "-> Tensor dx");
  m.def(
      "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
      "int count, float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normkit, CPU, m) {
  m.impl("pooled_forward", TORCH_BOX(&normkit::pooled_forward));
  m.impl("pooled_backward", TORCH_BOX(&normkit::pooled_backward));
  m.impl("evaluate_forward", TORCH_BOX(&normkit::evaluate_forward));
  m.impl("evaluate_backward", TORCH_BOX(&normkit::evaluate_backward));
  m.impl("positional_forward", TORCH_BOX(&normkit::positional_forward));
  m.impl("positional_backward", TORCH_BOX(&normkit::positional_backward));
  m.impl("composite_forward", TORCH_BOX(&normkit::composite_forward));
  m.impl("composite_backward", TORCH_BOX(&normkit::composite_backward));
  m.impl("moments", TORCH_BOX(&normkit::moments));
  m.impl("apply", TORCH_BOX(&normkit::apply));
  m.impl("reduce_grad", TORCH_BOX(&normkit::reduce_grad));
  m.impl("combine_grad", TORCH_BOX(&normkit::combine_grad));
  m.impl("update_running_", TORCH_BOX(&normkit::update_running));
}

// For explain(): which of the compiled instruction sets this processor runs.
extern "C" __attribute__((visibility("default"))) const char* normkit_instruction_set() {
  return normkit::instruction_set();
}
