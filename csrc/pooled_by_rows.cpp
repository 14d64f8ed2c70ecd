// How threads share the pooled operators on contiguous memory: each takes whole groups if there are
// enough; otherwise all threads share one group after another.
#include <algorithm>

#include "pooled.h"

namespace normkit {
namespace {

constexpr int64_t kPart = 65536;  // elements of a group that one thread takes at a time
constexpr int64_t kVector = 16;   // planes shorter than this are given their affine by element

bool expands(const Partition& p, bool affine) {
  return affine && p.plane < kVector && p.run >= kVector;
}

// Whether some threads would be idle for long if each took whole groups.
bool shares_groups(const Partition& p) {
  const int64_t threads = num_threads(), groups = p.num_batches * p.num_groups;
  if (p.examples_per_group * p.run < 2 * kGrain) return false;
  return ceil_div(groups, threads) * threads * 4 > groups * 5;
}

int64_t count_pieces(const Partition& p) {
  int64_t a = p.run, b = p.plane;
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return p.num_channels + p.num_groups - p.example_size / (p.run / a * p.plane);
}

Pooled describe(const FeatureMap& x, const Tensor& out, const Partition& p, const Finish& finish,
                const Statistics& tables) {
  Pooled a{};
  a.partition = p;
  a.x = x.data();
  a.out = out.data_ptr();
  a.affine_plane = p.plane;
  a.eps = finish.eps;
  a.ending = finish.ending;
  a.mean = tables.mean;
  a.var = tables.var;
  a.constant = tables.constant;
  return a;
}

// Calls part(batch, example, low, high, index) for all parts of one group, on all threads.
template <class F>
void each_part(const Partition& p, int64_t group, const F& part) {
  const int64_t batch = group / p.num_groups, begin = group % p.num_groups * p.run;
  const int64_t parts = ceil_div(p.run, kPart), count = p.batch_size(batch);
  const int64_t grain = at_least_one(kGrain / std::min(kPart, p.run));
  parallel(count * parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t low = begin + i % parts * kPart;
      part(p.batch_begin(batch) + i / parts, low, std::min(low + kPart, begin + p.run), i);
    }
  });
}

int64_t num_parts(const Partition& p) { return p.examples_per_group * ceil_div(p.run, kPart); }

// Mean and variance of one group, summed by all threads.
void shared_statistics(const Kernels& kernels, const Pooled& a, int64_t group,
                       std::vector<double>& sums) {
  const Partition& p = a.partition;
  const int64_t batch = group / p.num_groups, begin = group % p.num_groups * p.run;
  const double shift =
      kernels.first_mean(a.x, p.batch_begin(batch) * p.example_size + begin, p.run);
  std::fill(sums.begin(), sums.end(), 0.0);
  each_part(p, group, [&](int64_t example, int64_t low, int64_t high, int64_t part) {
    kernels.run_sums(a.x, example * p.example_size + low, high - low, shift, &sums[2 * part]);
  });
  double first = 0, second = 0;
  for (size_t i = 0; i < sums.size(); i += 2) {
    first += sums[i];
    second += sums[i + 1];
  }
  const double count = double(p.batch_size(batch)) * double(p.run), offset = first / count;
  const double spread = second / count - offset * offset;
  a.mean[group] = shift + offset;
  a.var[group] = spread < 0 ? 0 : spread;
}

void shared_forward(const Kernels& kernels, const Pooled& a) {
  const Partition& p = a.partition;
  std::vector<double> sums(2 * num_parts(p));
  for (int64_t group = 0; group < p.num_batches * p.num_groups; ++group) {
    if (!a.constant) shared_statistics(kernels, a, group, sums);
    each_part(p, group, [&](int64_t example, int64_t low, int64_t high, int64_t) {
      kernels.apply_run(a, group, example, low, high);
    });
  }
}

}  // namespace

void forward_by_rows(const FeatureMap& x, const Tensor& y, const Finish& finish,
                     const Partition& p, const Statistics& result) {
  const Kernels& kernels = best_kernels(x.element);
  Pooled a = describe(x, y, p, finish, result);
  const bool affine = finish.weight || finish.bias, expanded = expands(p, affine);
  const int64_t repeat = expanded ? p.plane : 1;
  const Parameter weights(finish.weight, x, repeat), biases(finish.bias, x, repeat);
  a.weight = weights.data();
  a.bias = biases.data();
  a.affine_plane = !affine ? p.run : expanded ? 1 : p.plane;

  std::vector<double> pieces;
  const bool cells_are_groups = p.plane % p.run == 0;
  if (result.channel_mean && !cells_are_groups) {
    a.num_pieces = p.num_channels;
    pieces.resize(2 * p.num_batches * a.num_pieces);
    a.piece_first = pieces.data();
    a.piece_second = pieces.data() + p.num_batches * a.num_pieces;
  }
  if (shares_groups(p) && !a.piece_first) {
    shared_forward(kernels, a);
  } else {
    parallel(p.num_batches * p.num_groups, at_least_one(kGrain / (p.examples_per_group * p.run)),
             [&](int64_t begin, int64_t end) { kernels.forward_groups(a, begin, end); });
  }
  if (!result.channel_mean) return;
  if (cells_are_groups) {
    pool_channels(p, p.plane / p.run, a.mean, a.var, result);
  } else {
    pool_channels(p, 1, a.piece_first, a.piece_second, result);
  }
}

namespace {

template <class F>
void each_piece(int64_t low, int64_t high, int64_t plane, const F& piece) {
  for (int64_t start = low; start < high;) {
    const int64_t channel = start / plane, end = std::min((channel + 1) * plane, high);
    piece(channel);
    start = end;
  }
}

void shared_backward(const Kernels& kernels, const Pooled& a, const Parameter& weight,
                     ParameterGradients& gradients) {
  const Partition& p = a.partition;
  const int64_t most = std::min(kPart, p.run) / a.affine_plane + 2;
  std::vector<double> table(2 * num_parts(p) * most);
  for (int64_t group = 0; group < p.num_batches * p.num_groups; ++group) {
    const int64_t batch = group / p.num_groups, begin = group % p.num_groups * p.run;
    each_part(p, group, [&](int64_t example, int64_t low, int64_t high, int64_t part) {
      kernels.grad_run(a, group, example, low, high, &table[2 * part * most]);
    });
    const double rstd = 1.0 / std::sqrt(a.var[group] + a.eps);
    const int64_t parts = ceil_div(p.run, kPart);
    double sums[2] = {0, 0};
    for (int64_t part = 0; part < p.batch_size(batch) * parts; ++part) {
      const int64_t low = begin + part % parts * kPart;
      const double* entry = &table[2 * part * most];
      each_piece(low, std::min(low + kPart, begin + p.run), a.affine_plane, [&](int64_t channel) {
        const double scale = weight ? weight.at(channel) : 1.0;
        sums[0] += scale * entry[0];
        sums[1] += scale * entry[1];
        if (gradients.wanted()) {
          gradients.dbias[channel] += entry[0];
          gradients.dweight[channel] += entry[1] * rstd;
        }
        entry += 2;
      });
    }
    if (a.constant) sums[0] = sums[1] = 0;
    each_part(p, group, [&](int64_t example, int64_t low, int64_t high, int64_t) {
      kernels.combine_run(a, group, example, low, high, sums);
    });
  }
}

// Dense inputs and tiny planes: each thread adds the parameters' gradients element by element for
// its share of the batches; the shares are fixed, so that the sums do not depend on the threads.
void elementwise_backward(const Kernels& kernels, const FeatureMap& x, const Pooled& a,
                          ParameterGradients& gradients) {
  constexpr int64_t kShares = 16;
  const Partition& p = a.partition;
  const int64_t size = ceil_div(p.num_batches, std::min(kShares, p.num_batches));
  const int64_t shares = ceil_div(p.num_batches, size);
  const size_t bytes = size_t(p.example_size) * x.accumulator_size();
  std::vector<double> memory(2 * shares * bytes / sizeof(double) + 1, 0.0);
  char* dbias = reinterpret_cast<char*>(memory.data());
  char* dweight = dbias + shares * bytes;
  const int64_t work = size * p.examples_per_group * p.run;
  parallel(shares * p.num_groups, at_least_one(kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t share = i / p.num_groups, first = share * size;
      kernels.backward_elementwise(a, i % p.num_groups, first,
                                   std::min(first + size, p.num_batches), dbias + share * bytes,
                                   dweight + share * bytes);
    }
  });
  if (!gradients.wanted()) return;
  const auto read = [&](const char* from, int64_t i) {
    return x.wide() ? reinterpret_cast<const double*>(from)[i]
                    : double(reinterpret_cast<const float*>(from)[i]);
  };
  for (int64_t share = 0; share < shares; ++share) {
    for (int64_t i = 0; i < p.example_size; ++i) {
      gradients.dbias[i / p.plane] += read(dbias + share * bytes, i);
      gradients.dweight[i / p.plane] += read(dweight + share * bytes, i);
    }
  }
}

void add_pieces(const Pooled& a, ParameterGradients& gradients) {
  const Partition& p = a.partition;
  for (int64_t batch = 0; batch < p.num_batches; ++batch) {
    int64_t piece = batch * a.num_pieces, group_end = p.run;
    for (int64_t channel = 0; channel < p.num_channels; ++channel) {
      const int64_t channel_end = (channel + 1) * p.plane;
      for (bool last = false; !last; ++piece) {
        gradients.dbias[channel] += a.piece_first[piece];
        gradients.dweight[channel] += a.piece_second[piece];
        last = group_end >= channel_end;
        if (group_end <= channel_end) group_end += p.run;
      }
    }
  }
}

}  // namespace

void backward_by_rows(const Tensor& g, const FeatureMap& x, const Tensor& dx,
                      const Statistics& given, const Finish& finish, const Partition& p,
                      ParameterGradients& gradients) {
  const Kernels& kernels = best_kernels(x.element);
  Pooled a = describe(x, dx, p, finish, given);
  a.grad = g.data_ptr();
  const bool affine = finish.weight || finish.bias || gradients.wanted();
  const bool expanded = expands(p, affine);
  const int64_t repeat = expanded ? p.plane : 1;
  const Parameter weights(finish.weight, x, repeat), biases(finish.bias, x, repeat);
  a.weight = weights.data();
  a.bias = biases.data();
  a.affine_plane = !affine ? p.run : expanded ? 1 : p.plane;
  if (expanded) return elementwise_backward(kernels, x, a, gradients);
  if (shares_groups(p)) return shared_backward(kernels, a, weights, gradients);

  std::vector<double> pieces;
  if (gradients.wanted()) {
    a.num_pieces = count_pieces(p);
    pieces.resize(2 * p.num_batches * a.num_pieces);
    a.piece_first = pieces.data();
    a.piece_second = pieces.data() + p.num_batches * a.num_pieces;
  }
  parallel(p.num_batches * p.num_groups, at_least_one(kGrain / (p.examples_per_group * p.run)),
           [&](int64_t begin, int64_t end) { kernels.backward_groups(a, begin, end); });
  if (gradients.wanted()) add_pieces(a, gradients);
}

}  // namespace normkit
