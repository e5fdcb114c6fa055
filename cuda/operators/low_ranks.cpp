// Products through few channels: y_i = zero_i + activation_i(x_i one_i) two_i, several in one call.

#include <ATen/core/List.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>

#include <optional>
#include <tuple>
#include <vector>

#include "composite.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::vector;

enum Activation { kNone, kTanh, kSigmoid };

Tensor activated(const Tensor& low, int64_t activation) {
  if (activation == kNone) return low;
  return activation == kTanh ? at::tanh(low) : at::sigmoid(low);
}

Tensor activated_backward(const Tensor& dlow, const Tensor& low, int64_t activation) {
  if (activation == kNone) return dlow;
  return activation == kTanh ? at::tanh_backward(dlow, low) : at::sigmoid_backward(dlow, low);
}

// y (T, C) and low = activation(x one) (T, M) of each; x (T, C), one (C, M), two (M, C), zero (C).
std::tuple<vector<Tensor>, vector<Tensor>> low_ranks(at::TensorList x, at::TensorList one,
                                                     at::TensorList two,
                                                     const c10::List<std::optional<Tensor>>& zero,
                                                     at::IntArrayRef activations) {
  vector<Tensor> y, lows;
  for (size_t i = 0; i < x.size(); ++i) {
    const Tensor low = activated(at::mm(x[i], one[i]), activations[i]);
    const std::optional<Tensor> own = zero[i];
    y.push_back(own ? at::addmm(*own, low, two[i]) : at::mm(low, two[i]));
    lows.push_back(low);
  }
  return {y, lows};
}

// The gradients of all x, one, two and zero; empty where not wanted. x is read for those of one.
vector<Tensor> low_ranks_backward(at::TensorList dy, at::TensorList x, at::TensorList low,
                                  at::TensorList one, at::TensorList two,
                                  at::IntArrayRef activations, const c10::List<bool>& of_one,
                                  const c10::List<bool>& of_two, const c10::List<bool>& of_zero) {
  vector<Tensor> dx, done, dtwo, dzero;
  for (size_t i = 0; i < dy.size(); ++i) {
    const Tensor dlow = activated_backward(at::mm(dy[i], two[i].t()), low[i], activations[i]);
    dx.push_back(at::mm(dlow, one[i].t()));
    done.push_back(of_one[i] ? at::mm(x[i].t(), dlow) : none(dlow));
    dtwo.push_back(of_two[i] ? at::mm(low[i].t(), dy[i]) : none(dlow));
    dzero.push_back(of_zero[i] ? dy[i].sum(0) : none(dlow));
  }
  for (const vector<Tensor>* more : {&done, &dtwo, &dzero})
    dx.insert(dx.end(), more->begin(), more->end());
  return dx;
}

}  // namespace

void add_low_ranks(torch::Library& library) {
  library.impl("low_ranks", &low_ranks);
  library.impl("low_ranks_backward", &low_ranks_backward);
}

}  // namespace finchtune
