// The four primitives as operators: moments, apply and their gradients over tables of tensors.
#include "operators.h"
#include "segments.h"

namespace normkit {
namespace {

// The values of tensors (N, K) or (1, K), all of one shape.
class GivenTables : public SegmentTables {
 public:
  GivenTables(const FeatureMap& x, std::initializer_list<const Tensor*> tables) : SegmentTables{} {
    const Tensor& shape = **tables.begin();
    STD_TORCH_CHECK(shape.dim() == 2, "a table has shape (N, K) or (1, K)");
    num_rows = shape.size(0);
    num_segments = shape.size(1);
    STD_TORCH_CHECK(num_rows == 1 || num_rows == x.num_examples, "a table has 1 or ",
                    x.num_examples, " rows; this one has ", num_rows);
    for (const Tensor* table : tables) {
      STD_TORCH_CHECK(table->numel() == num_rows * num_segments,
                      "all tables of one call have the same shape");
      kept_.push_back(as_doubles(*table));
      values[count++] = kept_.back().data();
    }
  }

 private:
  std::vector<std::vector<double>> kept_;
};

}  // namespace

std::tuple<Tensor, Tensor> moments(const Tensor& input, int64_t segment_size, bool wide) {
  const FeatureMap x(input);
  STD_TORCH_CHECK(segment_size > 0 && x.plane % segment_size == 0, "a channel has ", x.plane,
                  " elements, which segments of ", segment_size, " do not divide");
  const Partition p = make_partition(x, x.num_channels * (x.plane / segment_size), 1);
  const bool table_wide = wide || x.wide();
  const Tensor mean = fresh_table({x.num_examples, p.num_groups}, table_wide);
  const Tensor var = fresh_table({x.num_examples, p.num_groups}, table_wide);
  if (x.numel() > 0) segment_moments(x, p, table_wide, mean.data_ptr(), var.data_ptr());
  return {mean, var};
}

Tensor apply(const Tensor& input, const Tensor& mean, const Tensor& scale, const Tensor& center) {
  const FeatureMap x(input);
  const Tensor y = x.fresh();
  if (x.numel() == 0) return y;
  const GivenTables tables(x, {&mean, &scale, &center});
  segment_apply(x, partition_of_segments(x, tables.num_segments), tables, y);
  return y;
}

std::tuple<Tensor, Tensor> reduce_grad(const Tensor& grad, const Tensor& input,
                                       const Tensor& mean) {
  const FeatureMap x(input);
  const Tensor g = x.matching(grad);
  const GivenTables tables(x, {&mean});
  const int64_t size = x.num_examples * tables.num_segments;
  std::vector<double> first(size), second(size);
  if (x.numel() > 0) {
    const Partition p = partition_of_segments(x, tables.num_segments);
    segment_grad_sums(x, g, p, tables, first.data(), second.data());
  }
  const auto as_table = [&](const std::vector<double>& sums) {
    const Tensor table = fresh_table({x.num_examples, tables.num_segments}, x.wide());
    copy_doubles(sums.data(), size, table);
    return table;
  };
  return {as_table(first), as_table(second)};
}

Tensor combine_grad(const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& k1,
                    const Tensor& k2, const Tensor& k3) {
  const FeatureMap x(input);
  const Tensor g = x.matching(grad);
  const Tensor dx = x.fresh();
  if (x.numel() == 0) return dx;
  const GivenTables tables(x, {&mean, &k1, &k2, &k3});
  segment_combine(x, g, partition_of_segments(x, tables.num_segments), tables, dx);
  return dx;
}

}  // namespace normkit
