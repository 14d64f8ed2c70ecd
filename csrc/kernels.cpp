// The vector code for one instruction set. setup.py compiles this file several times, with
// NORMKIT_ISA naming the namespace and the flags choosing the instructions.
#include "kernels.h"

#include "backward_rows.h"
#include "blocks.h"
#include "columns.h"
#include "forward_rows.h"
#include "positional.h"
#include "primitives.h"

namespace normkit::NORMKIT_ISA {

template <class T>
constexpr Kernels kTable = {
    forward_groups<T>,      backward_groups<T>,      first_mean_at<T>,   run_sums<T>,
    apply_part<T>,          grad_part<T>,            combine_part<T>,    backward_elementwise<T>,
    forward_blocks<T>,      backward_blocks<T>,
    column_shift<T>,        column_sums<T>,          column_apply<T>,    column_grad_sums<T>,
    column_combine<T>,      positional_forward<T>,   positional_backward<T>,
    row_moments<T>,         row_apply<T>,            row_grad_sums<T>,   row_combine<T>,
};

const Kernels& kernels(Element element) {
  switch (element) {
    case Element::float64:
      return kTable<double>;
    case Element::bfloat16:
      return kTable<BFloat16>;
    case Element::float16:
      return kTable<Float16>;
    default:
      return kTable<float>;
  }
}

}  // namespace normkit::NORMKIT_ISA
