// How threads share the pooled operators on channels_last maps: each takes whole runs of examples,
// if there are enough. Other maps go to pooled_by_columns.cpp.
#include "pooled.h"

namespace normkit {
namespace {

Pooled describe(const FeatureMap& x, const Tensor& out, const Partition& p, const Finish& finish,
                const Statistics& tables) {
  Pooled a{};
  a.partition = p;
  a.x = x.data();
  a.out = out.data_ptr();
  a.eps = finish.eps;
  a.ending = finish.ending;
  a.mean = tables.mean;
  a.var = tables.var;
  a.constant = tables.constant;
  a.num_pieces = p.num_channels;
  return a;
}

// Two values for each channel of each run.
std::vector<double> pieces_of(Pooled& a) {
  const int64_t count = a.partition.num_batches * a.num_pieces;
  std::vector<double> pieces(2 * count);
  a.piece_first = pieces.data();
  a.piece_second = pieces.data() + count;
  return pieces;
}

int64_t grain(const Partition& p) {
  return at_least_one(kGrain / at_least_one(p.examples_per_group * p.example_size));
}

}  // namespace

bool by_blocks(const FeatureMap& x, const Partition& p) {
  if (x.layout != Layout::channels_last || p.run % p.plane != 0) return false;
  const int64_t threads = num_threads();
  return x.numel() < 2 * kGrain || ceil_div(p.num_batches, threads) * threads * 4 <= p.num_batches * 5;
}

void forward_by_blocks(const FeatureMap& x, const Tensor& y, const Finish& finish,
                       const Partition& p, const Statistics& result) {
  const Kernels& kernels = best_kernels(x.element);
  const Parameter weights(finish.weight, x), biases(finish.bias, x);
  Pooled a = describe(x, y, p, finish, result);
  a.weight = weights.data();
  a.bias = biases.data();
  std::vector<double> pieces;
  if (result.channel_mean) pieces = pieces_of(a);
  parallel(p.num_batches, grain(p),
           [&](int64_t begin, int64_t end) { kernels.forward_blocks(a, begin, end); });
  if (result.channel_mean) pool_channels(p, 1, a.piece_first, a.piece_second, result);
}

void backward_by_blocks(const Tensor& g, const FeatureMap& x, const Tensor& dx,
                        const Statistics& given, const Finish& finish, const Partition& p,
                        ParameterGradients& gradients) {
  const Kernels& kernels = best_kernels(x.element);
  const Parameter weights(finish.weight, x), biases(finish.bias, x);
  Pooled a = describe(x, dx, p, finish, given);
  a.grad = g.data_ptr();
  a.weight = weights.data();
  a.bias = biases.data();
  std::vector<double> pieces;
  if (gradients.wanted()) pieces = pieces_of(a);
  parallel(p.num_batches, grain(p),
           [&](int64_t begin, int64_t end) { kernels.backward_blocks(a, begin, end); });
  for (int64_t i = 0; gradients.wanted() && i < p.num_batches * p.num_channels; ++i) {
    gradients.dbias[i % p.num_channels] += a.piece_first[i];
    gradients.dweight[i % p.num_channels] += a.piece_second[i];
  }
}

}  // namespace normkit
