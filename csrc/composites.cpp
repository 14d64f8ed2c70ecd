#include "composites.h"

#include <algorithm>
#include <cmath>

namespace normkit {
namespace {

using Sums = std::vector<double>;

// A norm after a norm, or beside it, mixed: y = (p first + q second) weight + bias, where `second`
// sees the output of `first`, or the input too. Batch-channel norm is p = 0, q = 1.
class TwoNorms : public Composite {
 public:
  struct Options {
    bool batch_is_first, chained, mixed;
  };

  TwoNorms(const Options& options, const Extent& extent, const CompositeOptions& given,
           const ParameterTensors& tensors, TableStatistics batch)
      : options_(options), extent_(extent), weight_(*tensors[0], extent.cols),
        bias_(*tensors[1], extent.cols),
        other_weight_(options.mixed ? OptionalTensor() : *tensors[2], extent.cols),
        other_bias_(options.mixed ? OptionalTensor() : *tensors[3], extent.cols),
        batch_(std::move(batch), extent, given.batch_eps, options.mixed ? nullptr : weight_.values(),
               options.mixed ? nullptr : bias_.values()),
        group_(TableStatistics(Source::row_groups, extent, given.num_groups), extent,
               given.group_eps, other_weight_.values(), other_bias_.values()),
        first_affine_(extent), second_affine_(extent), middle_(extent) {
    if (options.mixed) {
      const double logit = as_doubles(**tensors[2])[0];
      group_share_ = 1.0 / (1.0 + std::exp(-logit));
    }
    const bool group_is_mixed_first = !options.batch_is_first;
    first_share_ = !options.mixed ? 0.0 : group_is_mixed_first ? group_share_ : 1 - group_share_;
  }

  const TableStatistics& batch() const override { return batch_.statistics; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    const Pairs first = first_affine_, second = second_affine_, middle = middle_;
    first_norm().forward(moments, first);
    if (options_.chained) transform(extent_, moments, first, middle);
    second_norm().forward(options_.chained ? middle : moments, second);
    const double p = first_share_, q = 1 - p;
    const double *weight = outer(weight_), *bias = outer(bias_);
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *c1 = first.seconds(row);
      const double *s2 = second.firsts(row), *c2 = second.seconds(row);
      double *scale = affine.firsts(row), *center = affine.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        const double w = weight ? weight[i] : 1.0, b = bias ? bias[i] : 0.0;
        scale[i] = (p * s1[i] + q * s2[i] * (options_.chained ? s1[i] : 1.0)) * w;
        center[i] = (p * c1[i] + q * c2[i]) * w + b;
      }
    });
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    const FreshPairs fresh_first(extent_), fresh_second(extent_);
    const Pairs dfirst = fresh_first, dsecond = fresh_second;
    if (options_.mixed) outer_gradients(daffine);
    split_gradients(daffine, dfirst, dsecond);
    second_backward(moments, dsecond, dfirst, dmoments);
    const FreshPairs fresh_own(extent_);
    const Pairs own = fresh_own;
    backward_of(first_norm(), moments, dfirst, own);
    add(own, dmoments);
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    const auto want = [&](int which) { return bool(wanted >> which & 1); };
    const Tensor third = options_.mixed ? scalar(dlogit_, want(2), wide)
                                        : other_weight_.gradient(dweight_[1].data(), want(2), wide);
    return {weight_.gradient(dweight_[0].data(), want(0), wide),
            bias_.gradient(dbias_[0].data(), want(1), wide), third,
            other_bias_.gradient(dbias_[1].data(), want(3) && !options_.mixed, wide)};
  }

 private:
  TableNorm& first_norm() { return options_.batch_is_first ? batch_ : group_; }
  TableNorm& second_norm() { return options_.batch_is_first ? group_ : batch_; }
  const double* outer(const TableParameter& p) const { return options_.mixed ? p.values() : nullptr; }

  static Tensor scalar(double value, bool wanted, bool wide) {
    const Tensor result = fresh_table({wanted ? 1 : 0}, wide);
    copy_doubles(&value, wanted ? 1 : 0, result);
    return result;
  }

  // Sums for a norm's own weight and bias, which it has unless the norms are mixed.
  void backward_of(const TableNorm& norm, const Pairs& moments, const Pairs& daffine,
                   const Pairs& dmoments) {
    const int which = &norm == &batch_ ? 0 : 1;
    const TableParameter& weight = which == 0 ? weight_ : other_weight_;
    const TableParameter& bias = which == 0 ? bias_ : other_bias_;
    const bool affine = !options_.mixed;
    if (affine && weight) dweight_[which].assign(extent_.cols, 0.0);
    if (affine && bias) dbias_[which].assign(extent_.cols, 0.0);
    norm.backward(moments, daffine, dmoments, affine && weight ? dweight_[which].data() : nullptr,
                  affine && bias ? dbias_[which].data() : nullptr);
  }

  // Of the weight and bias after the mixture, and of its share.
  void outer_gradients(const Pairs& daffine) {
    const Pairs first = first_affine_, second = second_affine_;
    const double p = first_share_, q = 1 - p, *weight = weight_.values();
    const FreshPairs fresh(extent_);
    const Pairs terms = fresh;
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *c1 = first.seconds(row);
      const double *s2 = second.firsts(row), *c2 = second.seconds(row);
      const double *ds = daffine.firsts(row), *dc = daffine.seconds(row);
      double *of_weight = terms.firsts(row), *of_share = terms.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        const double chained = s2[i] * (options_.chained ? s1[i] : 1.0);
        const double w = weight ? weight[i] : 1.0;
        of_weight[i] = ds[i] * (p * s1[i] + q * chained) + dc[i] * (p * c1[i] + q * c2[i]);
        of_share[i] = w * (ds[i] * (s1[i] - chained) + dc[i] * (c1[i] - c2[i]));
      }
    });
    Sums share(extent_.cols, 0.0);
    dweight_[0].assign(extent_.cols, 0.0);
    dbias_[0].assign(extent_.cols, 0.0);
    add_columns(extent_, terms.first, terms.stride, dweight_[0].data());
    add_columns(extent_, terms.second, terms.stride, share.data());
    add_columns(extent_, daffine.second, daffine.stride, dbias_[0].data());
    double dfirst_share = 0;
    for (const double value : share) dfirst_share += value;
    const double sign = options_.batch_is_first ? -1 : 1;  // the logit is the group norm's
    dlogit_ = sign * dfirst_share * group_share_ * (1 - group_share_);
  }

  // Gradients of the two norms' scales and centers, from those of the composite's.
  void split_gradients(const Pairs& daffine, const Pairs& dfirst, const Pairs& dsecond) {
    const Pairs first = first_affine_, second = second_affine_;
    const double p = first_share_, q = 1 - p, *weight = outer(weight_);
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *s2 = second.firsts(row);
      const double *ds = daffine.firsts(row), *dc = daffine.seconds(row);
      double *ds1 = dfirst.firsts(row), *dc1 = dfirst.seconds(row);
      double *ds2 = dsecond.firsts(row), *dc2 = dsecond.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        const double w = weight ? weight[i] : 1.0, dscale = ds[i] * w, dcenter = dc[i] * w;
        ds1[i] = (options_.chained ? p + q * s2[i] : p) * dscale;
        dc1[i] = p * dcenter;
        ds2[i] = q * dscale * (options_.chained ? s1[i] : 1.0);
        dc2[i] = q * dcenter;
      }
    });
  }

  // The second norm's transpose: to the moments it saw, and through them to the first norm.
  void second_backward(const Pairs& moments, const Pairs& dsecond, const Pairs& dfirst,
                       const Pairs& dmoments) {
    if (!options_.chained) return backward_of(second_norm(), moments, dsecond, dmoments);
    const Pairs middle = middle_, first = first_affine_;
    const FreshPairs fresh(extent_);
    const Pairs dmiddle = fresh;
    backward_of(second_norm(), middle, dsecond, dmiddle);
    each_table_row(extent_, [&](int64_t row) {
      const double *s1 = first.firsts(row), *v = moments.seconds(row);
      const double *dm = dmiddle.firsts(row), *dv = dmiddle.seconds(row);
      double *ds1 = dfirst.firsts(row), *dc1 = dfirst.seconds(row);
      double *to_m = dmoments.firsts(row), *to_v = dmoments.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        ds1[i] += 2 * dv[i] * s1[i] * v[i];
        dc1[i] += dm[i];
        to_m[i] = 0;
        to_v[i] = dv[i] * s1[i] * s1[i];
      }
    });
  }

  void add(const Pairs& from, const Pairs& to) const {
    each_table_row(extent_, [&](int64_t row) {
      const double *first = from.firsts(row), *second = from.seconds(row);
      double *to_first = to.firsts(row), *to_second = to.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) to_first[i] += first[i];
      for (int64_t i = 0; i < extent_.cols; ++i) to_second[i] += second[i];
    });
  }

  Options options_;
  Extent extent_;
  TableParameter weight_, bias_, other_weight_, other_bias_;
  TableNorm batch_, group_;
  FreshPairs first_affine_, second_affine_, middle_;
  double group_share_ = 0, first_share_ = 0, dlogit_ = 0;
  Sums dweight_[2], dbias_[2];  // of the batch norm or after the mixture; of the group norm
};

// An instance norm on the first columns, a batch norm on the others; either may have none.
class Halves : public Composite {
 public:
  Halves(const Extent& extent, const CompositeOptions& options, const ParameterTensors& tensors,
         TableStatistics batch)
      : half_(options.num_groups), extents_{{extent.rows, half_}, {extent.rows, extent.cols - half_}},
        weights_{{*tensors[0], half_}, {*tensors[2], extent.cols - half_}},
        biases_{{*tensors[1], half_}, {*tensors[3], extent.cols - half_}},
        norms_{{TableStatistics(Source::row_groups, extents_[0], at_least_one(half_)), extents_[0],
                options.group_eps, weights_[0].values(), biases_[0].values()},
               {std::move(batch), extents_[1], options.batch_eps, weights_[1].values(),
                biases_[1].values()}} {}

  const TableStatistics& batch() const override { return norms_[1].statistics; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    for (int part : {0, 1}) norms_[part].forward(moments.from(at(part)), affine.from(at(part)));
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    for (int part : {0, 1}) {
      const int64_t cols = extents_[part].cols;
      dweights_[part].assign(weights_[part] ? cols : 0, 0.0);
      dbiases_[part].assign(biases_[part] ? cols : 0, 0.0);
      norms_[part].backward(moments.from(at(part)), daffine.from(at(part)), dmoments.from(at(part)),
                            weights_[part] ? dweights_[part].data() : nullptr,
                            biases_[part] ? dbiases_[part].data() : nullptr);
    }
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    const auto want = [&](int which) { return bool(wanted >> which & 1); };
    return {weights_[0].gradient(dweights_[0].data(), want(0), wide),
            biases_[0].gradient(dbiases_[0].data(), want(1), wide),
            weights_[1].gradient(dweights_[1].data(), want(2), wide),
            biases_[1].gradient(dbiases_[1].data(), want(3), wide)};
  }

 private:
  int64_t at(int part) const { return part == 0 ? 0 : half_; }

  int64_t half_;
  Extent extents_[2];
  TableParameter weights_[2], biases_[2];
  TableNorm norms_[2];
  Sums dweights_[2], dbiases_[2];
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
  Sums result = as_doubles(*logits);
  STD_TORCH_CHECK(int64_t(result.size()) == size, "there are ", size, " logits");
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
        weight_(*tensors[0], extent.cols), bias_(*tensors[1], extent.cols),
        mean_shares_(softmax(*tensors[2], uses_batch_ ? 3 : 2)),
        var_shares_(softmax(*tensors[3], uses_batch_ ? 3 : 2)),
        layer_(Source::row_groups, extent, 1), batch_(std::move(batch)), mixed_(extent) {}

  const TableStatistics& batch() const override { return batch_; }

  void forward(const Pairs& moments, const Pairs& affine) override {
    layer_.measure(moments, eps_);
    if (uses_batch_) batch_.measure(moments, eps_);
    const Pairs mixed = mixed_;  // mean, 1 / sqrt(var + eps)
    const double *weight = weight_.values(), *bias = bias_.values();
    each_table_row(extent_, [&](int64_t row) {
      double *scale = affine.firsts(row), *center = affine.seconds(row);
      double *mean = mixed.firsts(row), *rstd = mixed.seconds(row);
      const double* m = moments.firsts(row);
      mix(mean_shares_, m, layer_.mean[row], batch_means(row, mean), mean);
      mix(var_shares_, moments.seconds(row), layer_.var[row], batch_vars(row, rstd), rstd);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        rstd[i] = 1.0 / std::sqrt(rstd[i] + eps_);
        scale[i] = weight ? rstd[i] * weight[i] : rstd[i];
        center[i] = (m[i] - mean[i]) * scale[i] + (bias ? bias[i] : 0.0);
      }
    });
  }

  void backward(const Pairs& moments, const Pairs& daffine, const Pairs& dmoments) override {
    const FreshPairs fresh(extent_), fresh_part(extent_);
    const Pairs dmixed = fresh, part = fresh_part;
    mixture_gradients(moments, daffine, dmixed);
    share_gradients(moments, dmixed);
    each_table_row(extent_, [&](int64_t row) {  // the cell's own share, and what is not mixed
      const double *dc = daffine.seconds(row), *rstd = mixed_seconds(row);
      const double *dmean = dmixed.firsts(row), *dvar = dmixed.seconds(row);
      double *to_m = dmoments.firsts(row), *to_v = dmoments.seconds(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        const double scale = weight_ ? rstd[i] * weight_.values()[i] : rstd[i];
        to_m[i] = dc[i] * scale + mean_shares_[0] * dmean[i];
        to_v[i] = var_shares_[0] * dvar[i];
      }
    });
    scaled(dmixed, 1, part);
    layer_.transpose(moments, part, dmoments);
    if (!uses_batch_) return;
    scaled(dmixed, 2, part);
    batch_.transpose(moments, part, dmoments);
  }

  ParameterGradientTensors gradients(int64_t wanted, bool wide) const override {
    const auto want = [&](int which) { return bool(wanted >> which & 1); };
    const auto vector = [&](const Sums& values, bool is_wanted) {
      const int64_t size = is_wanted ? int64_t(values.size()) : 0;
      const Tensor result = fresh_table({size}, wide);
      copy_doubles(values.data(), size, result);
      return result;
    };
    return {weight_.gradient(dweight_.data(), want(0), wide),
            bias_.gradient(dbias_.data(), want(1), wide),
            vector(softmax_gradient(mean_shares_, dmean_shares_), want(2)),
            vector(softmax_gradient(var_shares_, dvar_shares_), want(3))};
  }

 private:
  const double* batch_means(int64_t row, double* buffer) const {
    return uses_batch_ ? batch_.means(row, buffer) : nullptr;
  }
  const double* batch_vars(int64_t row, double* buffer) const {
    return uses_batch_ ? batch_.vars(row, buffer) : nullptr;
  }
  const double* mixed_seconds(int64_t row) const { return Pairs(mixed_).seconds(row); }

  void mix(const Sums& shares, const double* own, double layer, const double* batch,
           double* out) const {
    for (int64_t i = 0; i < extent_.cols; ++i) {
      out[i] = shares[0] * own[i] + shares[1] * layer + (batch ? shares[2] * batch[i] : 0.0);
    }
  }

  // Of the mixed mean and variance; sums for weight and bias.
  void mixture_gradients(const Pairs& moments, const Pairs& daffine, const Pairs& dmixed) {
    const FreshPairs fresh(extent_);
    const Pairs terms = fresh, mixed = mixed_;
    each_table_row(extent_, [&](int64_t row) {
      const double *ds = daffine.firsts(row), *dc = daffine.seconds(row);
      const double *m = moments.firsts(row);
      const double *mean = mixed.firsts(row), *rstd = mixed.seconds(row);
      double *dmean = dmixed.firsts(row), *dvar = dmixed.seconds(row);
      double* of_weight = terms.firsts(row);
      for (int64_t i = 0; i < extent_.cols; ++i) {
        const double w = weight_ ? weight_.values()[i] : 1.0, r = rstd[i];
        const double whole = ds[i] + dc[i] * (m[i] - mean[i]);
        of_weight[i] = whole * r;
        dmean[i] = -dc[i] * r * w;
        dvar[i] = -0.5 * r * r * r * w * whole;
      }
    });
    dweight_.assign(extent_.cols, 0.0);
    dbias_.assign(extent_.cols, 0.0);
    add_columns(extent_, terms.first, terms.stride, dweight_.data());
    add_columns(extent_, daffine.second, daffine.stride, dbias_.data());
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
    double of_own = 0, total = 0, of_batch = 0;
    for (int64_t i = 0; i < extent_.cols; ++i) {
      of_own += grad[i] * own[i];
      total += grad[i];
      if (batch) of_batch += grad[i] * batch[i];
    }
    sums[0] += of_own;
    sums[1] += total * layer;
    if (batch) sums[2] += of_batch;
  }

  void scaled(const Pairs& from, size_t share, const Pairs& to) const {
    each_table_row(extent_, [&](int64_t row) {
      const double *first = from.firsts(row), *second = from.seconds(row);
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
  const auto two_norms = [&](const TwoNorms::Options& shape) {
    return std::make_unique<TwoNorms>(shape, extent, options, parameters, std::move(batch));
  };
  switch (options.kind) {
    case Kind::batch_then_group:
      return two_norms({.batch_is_first = true, .chained = true, .mixed = false});
    case Kind::group_first:
      return two_norms({.batch_is_first = false, .chained = true, .mixed = true});
    case Kind::batch_first:
      return two_norms({.batch_is_first = true, .chained = true, .mixed = true});
    case Kind::parallel:
      return two_norms({.batch_is_first = false, .chained = false, .mixed = true});
    case Kind::halves:
      return std::make_unique<Halves>(extent, options, parameters, std::move(batch));
    default:
      return std::make_unique<Switched>(extent, options, parameters, std::move(batch));
  }
}

}  // namespace normkit
