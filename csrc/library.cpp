// Registers the operators' CPU kernels with torch, on its stable ABI: one build serves many torch
// versions. kernels/operators.py describes the operators' arguments and results.
#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(normkit, CPU, m) {
  m.impl("pooled_forward", TORCH_BOX(&normkit::pooled_forward));
  m.impl("pooled_backward", TORCH_BOX(&normkit::pooled_backward));
  m.impl("evaluate_forward", TORCH_BOX(&normkit::evaluate_forward));
  m.impl("evaluate_backward", TORCH_BOX(&normkit::evaluate_backward));
  m.impl("ended_forward", TORCH_BOX(&normkit::ended_forward));
  m.impl("ended_backward", TORCH_BOX(&normkit::ended_backward));
  m.impl("ended_evaluate_forward", TORCH_BOX(&normkit::ended_evaluate_forward));
  m.impl("ended_evaluate_backward", TORCH_BOX(&normkit::ended_evaluate_backward));
  m.impl("positional_forward", TORCH_BOX(&normkit::positional_forward));
  m.impl("positional_backward", TORCH_BOX(&normkit::positional_backward));
  m.impl("composite_forward", TORCH_BOX(&normkit::composite_forward));
  m.impl("composite_backward", TORCH_BOX(&normkit::composite_backward));
  m.impl("ended_positional_forward", TORCH_BOX(&normkit::ended_positional_forward));
  m.impl("ended_positional_backward", TORCH_BOX(&normkit::ended_positional_backward));
  m.impl("ended_composite_forward", TORCH_BOX(&normkit::ended_composite_forward));
  m.impl("ended_composite_backward", TORCH_BOX(&normkit::ended_composite_backward));
  m.impl("moments", TORCH_BOX(&normkit::moments));
  m.impl("apply", TORCH_BOX(&normkit::apply));
  m.impl("reduce_grad", TORCH_BOX(&normkit::reduce_grad));
  m.impl("combine_grad", TORCH_BOX(&normkit::combine_grad));
}

// For explain(): which of the compiled instruction sets this processor runs.
extern "C" __attribute__((visibility("default"))) const char* normkit_instruction_set() {
  return normkit::instruction_set();
}
