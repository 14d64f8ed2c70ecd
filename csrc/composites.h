// What a composite of norms does to the moments of a map's segments, and the transpose.
#pragma once

#include <array>
#include <memory>

#include "table_norms.h"

namespace normkit {

// As Python names them in kernels/cpu/composite.py.
enum class Kind : int64_t {
  batch_then_group,         // parameters: batch weight, bias, group weight, bias
  group_first,              // weight, bias, mix logit
  batch_first,              // likewise
  parallel,                 // likewise
  switched,                 // weight, bias, mean logits, variance logits
  switched_without_batch,   // likewise
  halves,                   // instance weight, bias, batch weight, bias; groups: channels of the first
};

struct CompositeOptions {
  Kind kind;
  int64_t num_groups;
  double batch_eps, group_eps;

  // Channels of a map that the batch stage sees: the last ones.
  int64_t num_batch_channels(int64_t num_channels) const {
    if (kind == Kind::switched_without_batch) return 0;
    return kind == Kind::halves ? num_channels - num_groups : num_channels;
  }
};

using ParameterTensors = std::array<const OptionalTensor*, 4>;
using ParameterGradientTensors = std::array<Tensor, 4>;

class Composite {
 public:
  virtual ~Composite() = default;
  virtual void forward(const Pairs& moments, const Pairs& affine) = 0;
  // After forward: from gradients of scale and center to those of the moments.
  virtual void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) = 0;
  // After backward; `wanted` has one bit for each parameter.
  virtual ParameterGradientTensors gradients(int64_t wanted, bool wide) const = 0;
  // The batch stage's statistics, of what it saw.
  virtual const TableStatistics& batch() const = 0;
};

// `batch`: where the batch stage takes its statistics from.
std::unique_ptr<Composite> make_composite(const CompositeOptions& options, const Extent& extent,
                                          const ParameterTensors& parameters,
                                          TableStatistics batch);

}  // namespace normkit
