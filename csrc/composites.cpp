#include "composites.h"

#include <algorithm>
#include <cmath>

namespace normkit {
namespace {

using Sums = std::vector<double>;

bool want(int64_t wanted, int which) { return bool(wanted >> which & 1); }

Tensor as_tensor(const Sums& values, bool wanted, bool wide) {
  const int64_t size = wanted ? int64_t(values.size()) : 0;
  const Tensor result = fresh_table({size}, wide);
  copy_doubles(values.data(), size, result);
  return result;
}

// Of two norms with a weight and a bias each.
ParameterGradientTensors gradients_of(const TableParameter (&weights)[2],
                                      const TableParameter (&biases)[2], const TableNorm& first,
                                      const TableNorm& second, int64_t wanted, bool wide) {
  return {weights[0].gradient(first.dweight, want(wanted, 0), wide),
          biases[0].gradient(first.dbias, want(wanted, 1), wide),
          weights[1].gradient(second.dweight, want(wanted, 2), wide),
          biases[1].gradient(second.dbias, want(wanted, 3), wide)};
}

// A norm of the output of another; its moments are the other's center and scale^2 var.
class Chain {
 public:
  Chain(const Extent& extent, TableNorm& first, TableNorm& second)
      : first_affine(extent), second_affine(extent), extent_(extent), first_(first),
        second_(second), middle_var_(extent) {}

  void forward(const Pairs& moments) {
    const Pairs affine = first_affine, middle = seen_by_second();
    first_.forward(moments, affine);
    each_table_row(extent_, [&](int64_t row) {
      row_transform(extent_.cols, affine.firsts(row), moments.seconds(row), middle.seconds(row));
    });
    second_.forward(middle, second_affine);
  }

  // From gradients of both scales and centers; those of the first gain what comes through.
  void backward(const Pairs& moments, const Pairs& dfirst, const Pairs& dsecond,
                const Pairs& dmoments) {
    const FreshPairs fresh(extent_);
    const Pairs affine = first_affine, dmiddle = fresh;
    second_.backward(seen_by_second(), dsecond, dmiddle);
    each_table_row(extent_, [&](int64_t row) {
      const double *scale = affine.firsts(row), *v = moments.seconds(row);
      const double *dm = dmiddle.firsts(row), *dv = dmiddle.seconds(row);
      double *dscale = dfirst.firsts(row), *dcenter = dfirst.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) dscale[i] += 2 * dv[i] * scale[i] * v[i];
      for (int64_t i = 0; i < extent_.cols; ++i) dcenter[i] += dm[i];
    });
    first_.backward(moments, dfirst, dmoments);
    each_table_row(extent_, [&](int64_t row) {
      const double *scale = affine.firsts(row), *dv = dmiddle.seconds(row);
      double* to_v = dmoments.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) to_v[i] += dv[i] * scale[i] * scale[i];
    });
  }

  FreshPairs first_affine, second_affine;

 private:
  Pairs seen_by_second() const {
    return {Pairs(first_affine).second, Pairs(middle_var_).second, extent_.cols};
  }

  Extent extent_;
  TableNorm &first_, &second_;
  FreshPairs middle_var_;
};

// A batch norm, then a group norm, each with its own weight and bias.
class BatchThenGroup : public Composite {
 public:
  BatchThenGroup(const Extent& extent, const CompositeOptions& options,
                 const ParameterTensors& tensors, TableStatistics batch)
      : extent_(extent), weights_{{*tensors[0], extent.cols, 1},
                                    {*tensors[2], extent.cols, 1, options.num_groups}},
        biases_{{*tensors[1], extent.cols, 0}, {*tensors[3], extent.cols, 0, options.num_groups}},
        batch_(std::move(batch), extent, options.batch_eps, weights_[0].values(),
               biases_[0].values()),
        group_(TableStatistics(Source::row_groups, extent, options.num_groups), extent,
               options.group_eps, weights_[1].values(), biases_[1].values()),
        chain_(extent, batch_, group_) {}

  const TableStatistics& batch() const override { return batch_.statistics; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    chain_.forward(moments);
    const Pairs first = chain_.first_affine, second = chain_.second_affine;
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *s2 = second.firsts(row);
      double* scale = affine.firsts(row);
      for (int64_t i = 0; i < extent_.cols; ++i) scale[i] = s1[i] * s2[i];
      std::copy_n(second.seconds(row), extent_.cols, affine.seconds(row));
    });
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    const FreshPairs fresh_first(extent_), fresh_second(extent_);
    const Pairs dfirst = fresh_first, dsecond = fresh_second;
    const Pairs first = chain_.first_affine, second = chain_.second_affine;
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *s2 = second.firsts(row), *ds = daffine.firsts(row);
      double *ds1 = dfirst.firsts(row), *ds2 = dsecond.firsts(row);
      for (int64_t i = 0; i < extent_.cols; ++i) ds1[i] = ds[i] * s2[i];
      for (int64_t i = 0; i < extent_.cols; ++i) ds2[i] = ds[i] * s1[i];
      std::fill_n(dfirst.seconds(row), extent_.cols, 0.0);
      std::copy_n(daffine.seconds(row), extent_.cols, dsecond.seconds(row));
    });
    chain_.backward(moments, dfirst, dsecond, dmoments);
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    return gradients_of(weights_, biases_, batch_, group_, wanted, wide);
  }

 private:
  Extent extent_;
  TableParameter weights_[2], biases_[2];
  TableNorm batch_, group_;
  Chain chain_;
};

double share_of(const OptionalTensor& logit) {
  STD_TORCH_CHECK(logit && logit->numel() == 1, "a mixture needs its logit, one value");
  return 1.0 / (1.0 + std::exp(-as_doubles(*logit)[0]));
}

// A mixture of a group norm and a batch norm, side by side or one of the other's output, and one
// weight and bias after it: y = (p first + (1 - p) second) weight + bias.
class GroupAndBatch : public Composite {
 public:
  GroupAndBatch(const Extent& extent, const CompositeOptions& options,
                const ParameterTensors& tensors, TableStatistics batch)
      : extent_(extent), chained_(options.kind != Kind::parallel),
        batch_is_first_(options.kind == Kind::batch_first),
        group_share_(share_of(*tensors[2])),
        weight_(*tensors[0], extent.cols, 1), bias_(*tensors[1], extent.cols, 0),
        ones_({}, extent.cols, 1), zeros_({}, extent.cols, 0),
        batch_(std::move(batch), extent, options.batch_eps, ones_.values(), zeros_.values()),
        group_(TableStatistics(Source::row_groups, extent, options.num_groups), extent,
               options.group_eps, ones_.values(), zeros_.values()),
        chain_(extent, batch_is_first_ ? batch_ : group_, batch_is_first_ ? group_ : batch_) {}

  const TableStatistics& batch() const override { return batch_.statistics; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    const Pairs first = chain_.first_affine, second = chain_.second_affine;
    if (chained_) {
      chain_.forward(moments);
      each_table_row(extent_, [&](int64_t row) {  // from here on: of both norms together
        const double* s1 = first.firsts(row);
        double* s2 = second.firsts(row);
        for (int64_t i = 0; i < extent_.cols; ++i) s2[i] *= s1[i];
      });
    } else {
      group_.forward(moments, first);
      batch_.forward(moments, second);
    }
    const double p = first_share(), q = 1 - p, *weight = weight_.values(), *bias = bias_.values();
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *c1 = first.seconds(row);
      const double *s2 = second.firsts(row), *c2 = second.seconds(row);
      double *scale = affine.firsts(row), *center = affine.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        scale[i] = (p * s1[i] + q * s2[i]) * weight[i];
        center[i] = (p * c1[i] + q * c2[i]) * weight[i] + bias[i];
      }
    });
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    const FreshPairs fresh_first(extent_), fresh_second(extent_);
    const Pairs dfirst = fresh_first, dsecond = fresh_second;
    mixture_gradients(daffine, dfirst);
    shares_of(daffine, dfirst, dsecond);
    if (chained_) return chain_.backward(moments, dfirst, dsecond, dmoments);
    const FreshPairs fresh(extent_);
    const Pairs dbatch = fresh;
    group_.backward(moments, dfirst, dmoments);
    batch_.backward(moments, dsecond, dbatch);
    each_table_row(extent_, [&](int64_t row) {
      row_add(extent_.cols, dbatch.firsts(row), dmoments.firsts(row));
      row_add(extent_.cols, dbatch.seconds(row), dmoments.seconds(row));
    });
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    return {weight_.gradient(dweight_, want(wanted, 0), wide),
            bias_.gradient(dbias_, want(wanted, 1), wide),
            as_tensor({dlogit_}, want(wanted, 2), wide), as_tensor({}, false, wide)};
  }

 private:
  double first_share() const { return batch_is_first_ ? 1 - group_share_ : group_share_; }

  // Of the weight and bias after the mixture, and of its share; `terms` is scratch memory.
  void mixture_gradients(const Pairs& daffine, const Pairs& terms) {
    const Pairs first = chain_.first_affine, second = chain_.second_affine;
    const double p = first_share(), q = 1 - p, *weight = weight_.values();
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *c1 = first.seconds(row);
      const double *s2 = second.firsts(row), *c2 = second.seconds(row);
      const double *ds = daffine.firsts(row), *dc = daffine.seconds(row);
      double *of_weight = terms.firsts(row), *of_share = terms.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        of_weight[i] = ds[i] * (p * s1[i] + q * s2[i]) + dc[i] * (p * c1[i] + q * c2[i]);
        of_share[i] = weight[i] * (ds[i] * (s1[i] - s2[i]) + dc[i] * (c1[i] - c2[i]));
      }
    });
    dweight_ = column_sums(extent_, terms.first, terms.stride);
    dbias_ = column_sums(extent_, daffine.second, daffine.stride);
    const double dfirst_share = row_sum(extent_.size(), terms.second);
    const double sign = batch_is_first_ ? -1 : 1;  // the logit is the group norm's
    dlogit_ = sign * dfirst_share * group_share_ * (1 - group_share_);
  }

  // Gradients of both norms' scales and centers, from those of the mixture's.
  void shares_of(const Pairs& daffine, const Pairs& dfirst, const Pairs& dsecond) const {
    const Pairs first = chain_.first_affine, second = chain_.second_affine;
    const double p = first_share(), q = 1 - p, *weight = weight_.values();
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *s2 = second.firsts(row);
      const double *ds = daffine.firsts(row), *dc = daffine.seconds(row);
      double *ds1 = dfirst.firsts(row), *dc1 = dfirst.seconds(row);
      double *ds2 = dsecond.firsts(row), *dc2 = dsecond.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        const double dscale = ds[i] * weight[i], dcenter = dc[i] * weight[i];
        ds1[i] = p * dscale + (chained_ ? q * dscale * (s2[i] / s1[i]) : 0.0);
        ds2[i] = q * dscale * (chained_ ? s1[i] : 1.0);
        dc1[i] = p * dcenter;
        dc2[i] = q * dcenter;
      }
    });
  }

  Extent extent_;
  bool chained_, batch_is_first_;
  double group_share_, dlogit_ = 0;
  TableParameter weight_, bias_, ones_, zeros_;
  TableNorm batch_, group_;
  Chain chain_;
  Sums dweight_, dbias_;
};

// An instance norm on the first columns, a batch norm on the others.
class Halves : public Composite {
 public:
  Halves(const Extent& extent, const CompositeOptions& options, const ParameterTensors& tensors,
         TableStatistics batch)
      : half_(options.num_groups), rest_(extent.cols - half_),
        weights_{{*tensors[0], half_, 1}, {*tensors[2], rest_, 1}},
        biases_{{*tensors[1], half_, 0}, {*tensors[3], rest_, 0}},
        instance_(TableStatistics(Source::row_groups, {extent.rows, half_}, half_),
                  {extent.rows, half_}, options.group_eps, weights_[0].values(),
                  biases_[0].values()),
        batch_(std::move(batch), {extent.rows, rest_}, options.batch_eps, weights_[1].values(),
               biases_[1].values()) {}

  const TableStatistics& batch() const override { return batch_.statistics; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    instance_.forward(moments, affine);
    batch_.forward(moments.from(half_), affine.from(half_));
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    instance_.backward(moments, daffine, dmoments);
    batch_.backward(moments.from(half_), daffine.from(half_), dmoments.from(half_));
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    return gradients_of(weights_, biases_, instance_, batch_, wanted, wide);
  }

 private:
  int64_t half_, rest_;
  TableParameter weights_[2], biases_[2];
  TableNorm instance_, batch_;
};

// The gradient of logits from that of their softmax.
Sums softmax_gradient(const Sums& shares, const Sums& dshares) {
  double mean = 0;
  for (size_t i = 0; i < shares.size(); ++i) mean += shares[i] * dshares[i];
  Sums result(shares.size());
  for (size_t i = 0; i < shares.size(); ++i) result[i] = shares[i] * (dshares[i] - mean);
  return result;
}

Sums softmax(const OptionalTensor& logits, int64_t size) {
  STD_TORCH_CHECK(logits && logits->numel() == size, "there are ", size, " logits");
  Sums result = as_doubles(*logits);
  const double largest = *std::max_element(result.begin(), result.end());
  double sum = 0;
  for (double& value : result) sum += value = std::exp(value - largest);
  for (double& value : result) value /= sum;
  return result;
}

// Normalises by a mixture of each cell's own statistics, its example's and the batch's.
class Switched : public Composite {
 public:
  Switched(const Extent& extent, const CompositeOptions& options, const ParameterTensors& tensors,
           TableStatistics batch)
      : extent_(extent), eps_(options.batch_eps), uses_batch_(options.kind == Kind::switched),
        weight_(*tensors[0], extent.cols, 1), bias_(*tensors[1], extent.cols, 0),
        mean_shares_(softmax(*tensors[2], uses_batch_ ? 3 : 2)),
        var_shares_(softmax(*tensors[3], uses_batch_ ? 3 : 2)),
        layer_(Source::row_groups, extent, 1), batch_(std::move(batch)), mixed_(extent) {}

  const TableStatistics& batch() const override { return batch_; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    layer_.measure(moments, eps_);
    if (uses_batch_) batch_.measure(moments, eps_);
    const Pairs mixed = mixed_;  // mean, 1 / sqrt(var + eps)
    each_table_row_buffered(extent_, [&](int64_t row, const Pairs& buffers) {
      double *mean = mixed.firsts(row), *rstd = mixed.seconds(row);
      mix(mean_shares_, moments.firsts(row), layer_.mean[row], batch_means(row, buffers.first),
          mean);
      mix(var_shares_, moments.seconds(row), layer_.var[row], batch_vars(row, buffers.second),
          rstd);
      for (int64_t i = 0; i < extent_.cols; ++i) rstd[i] = 1.0 / std::sqrt(rstd[i] + eps_);
      row_norm(extent_.cols, norm_row(moments, row), affine.firsts(row), affine.seconds(row));
    });
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    const FreshPairs fresh(extent_), fresh_terms(extent_);
    const Pairs dmixed = fresh, terms = fresh_terms;
    each_table_row(extent_, [&](int64_t row) {
      row_norm_gradient(extent_.cols, norm_row(moments, row),
                        {daffine.firsts(row), daffine.seconds(row)}, dmixed.firsts(row),
                        dmixed.seconds(row), dmoments.firsts(row), terms.firsts(row));
      std::fill_n(dmoments.seconds(row), extent_.cols, 0.0);
    });
    dweight_ = column_sums(extent_, terms.first, terms.stride);
    dbias_ = column_sums(extent_, daffine.second, daffine.stride);
    share_gradients(moments, dmixed);
    pass_share(0, dmixed, terms);
    each_table_row(extent_, [&](int64_t row) {
      row_add(extent_.cols, terms.firsts(row), dmoments.firsts(row));
      row_add(extent_.cols, terms.seconds(row), dmoments.seconds(row));
    });
    pass_share(1, dmixed, terms);
    layer_.transpose(moments, terms, dmoments);
    if (!uses_batch_) return;
    pass_share(2, dmixed, terms);
    batch_.transpose(moments, terms, dmoments);
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    return {weight_.gradient(dweight_, want(wanted, 0), wide),
            bias_.gradient(dbias_, want(wanted, 1), wide),
            as_tensor(softmax_gradient(mean_shares_, dmean_shares_), want(wanted, 2), wide),
            as_tensor(softmax_gradient(var_shares_, dvar_shares_), want(wanted, 3), wide)};
  }

 private:
  const double* batch_means(int64_t row, double* buffer) const {
    return uses_batch_ ? batch_.means(row, buffer) : nullptr;
  }
  const double* batch_vars(int64_t row, double* buffer) const {
    return uses_batch_ ? batch_.vars(row, buffer) : nullptr;
  }
  NormRow norm_row(const Pairs& moments, int64_t row) const {
    const Pairs mixed = mixed_;
    return {moments.firsts(row), mixed.firsts(row), mixed.seconds(row), weight_.values(),
            bias_.values()};
  }

  void mix(const Sums& shares, const double* own, double layer, const double* batch,
           double* out) const {
    for (int64_t i = 0; i < extent_.cols; ++i) out[i] = shares[0] * own[i] + shares[1] * layer;
    if (!batch) return;
    for (int64_t i = 0; i < extent_.cols; ++i) out[i] += shares[2] * batch[i];
  }

  // Sums over all cells of the mixture's gradients times what each share multiplies.
  void share_gradients(const Pairs& moments, const Pairs& dmixed) {
    dmean_shares_.assign(mean_shares_.size(), 0.0);
    dvar_shares_.assign(var_shares_.size(), 0.0);
    Sums buffer(extent_.cols);
    for (int64_t row = 0; row < extent_.rows; ++row) {
      add_shares(dmixed.firsts(row), moments.firsts(row), layer_.mean[row],
                 batch_means(row, buffer.data()), dmean_shares_);
      add_shares(dmixed.seconds(row), moments.seconds(row), layer_.var[row],
                 batch_vars(row, buffer.data()), dvar_shares_);
    }
  }

  void add_shares(const double* grad, const double* own, double layer, const double* batch,
                  Sums& sums) const {
    sums[0] += row_product(extent_.cols, grad, own);
    sums[1] += row_sum(extent_.cols, grad) * layer;
    if (batch) sums[2] += row_product(extent_.cols, grad, batch);
  }

  // The part of the mixture's gradients that one share's statistics receive.
  void pass_share(size_t share, const Pairs& dmixed, const Pairs& to) const {
    each_table_row(extent_, [&](int64_t row) {
      const double *first = dmixed.firsts(row), *second = dmixed.seconds(row);
      double *to_first = to.firsts(row), *to_second = to.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) to_first[i] = mean_shares_[share] * first[i];
      for (int64_t i = 0; i < extent_.cols; ++i) to_second[i] = var_shares_[share] * second[i];
    });
  }

  Extent extent_;
  double eps_;
  bool uses_batch_;
  TableParameter weight_, bias_;
  Sums mean_shares_, var_shares_;
  TableStatistics layer_, batch_;
  FreshPairs mixed_;
  Sums dweight_, dbias_, dmean_shares_, dvar_shares_;
};

}  // namespace

std::unique_ptr<Composite> make_composite(const CompositeOptions& options, const Extent& extent,
                                          const ParameterTensors& parameters,
                                          TableStatistics batch) {
  switch (options.kind) {
    case Kind::batch_then_group:
      return std::make_unique<BatchThenGroup>(extent, options, parameters, std::move(batch));
    case Kind::group_first:
    case Kind::batch_first:
    case Kind::parallel:
      return std::make_unique<GroupAndBatch>(extent, options, parameters, std::move(batch));
    case Kind::halves:
      return std::make_unique<Halves>(extent, options, parameters, std::move(batch));
    default:
      return std::make_unique<Switched>(extent, options, parameters, std::move(batch));
  }
}

}  // namespace normkit
