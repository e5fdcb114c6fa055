// The operators of composite.h: Bone's and Bat's linears, token shift's blends.
// Their rows are tokens. Gradients that are not wanted are empty tensors.

#include "composite.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>

#include <optional>
#include <tuple>
#include <vector>

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;
using std::tuple;
using std::vector;

// Calls another operator of this library.
template <typename Result, typename... Arguments>
Result call(const char* name, Arguments... arguments) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<Result(Arguments...)>()
      .call(arguments...);
}

void add_to_shards(Tensor& x, const Tensor& s) {
  call<void, Tensor&, const Tensor&>("finchtune::add_to_shards_", x, s);
}

Tensor shard_sums(const Tensor& x, int64_t r, at::ScalarType dtype) {
  return call<Tensor, const Tensor&, int64_t, at::ScalarType>("finchtune::shard_sums", x, r, dtype);
}

// y = x W^T + s D with s the sums of x's shards; x (T, k), D (r, d), W (d, k).
tuple<Tensor, Tensor> bone(const Tensor& x, const Tensor& D, const Tensor& W) {
  const Tensor s = shard_sums(x, D.size(0), x.scalar_type());
  Tensor y = at::mm(x, W.t());
  y.addmm_(s, D);
  return {y, s};
}

tuple<Tensor, Tensor> bone_backward(const Tensor& dy, const optional<Tensor>& ds, const Tensor& s,
                                    const Tensor& D, const Tensor& W, bool of_x, bool of_D) {
  Tensor dx = none(dy);
  if (of_x) {
    dx = at::mm(dy, W);
    // Into dx itself: a gradient of s spread out and then added would take two more.
    add_to_shards(dx, ds ? at::addmm(*ds, dy, D.t()) : at::mm(dy, D.t()));
  }
  return {dx, of_D ? at::mm(s.t(), dy) : none(dy)};
}

// y = W (x + u) + tile(sum_b u_b) with u_b = D_b x_b; x (T, k), D (k / r, r, r), W (d, k).
Tensor bat_row(const Tensor& x, const Tensor& D, const Tensor& W) {
  const auto [moved, sums] =
      call<tuple<Tensor, Tensor>, const Tensor&, const Tensor&>("finchtune::bat_row_forward", x, D);
  Tensor y = at::mm(moved, W.t());
  add_to_shards(y, sums);
  return y;
}

tuple<Tensor, Tensor> bat_row_backward(const Tensor& dy, const Tensor& x, const Tensor& D,
                                       const Tensor& W) {
  Tensor dx = at::mm(dy, W);
  const Tensor sums = shard_sums(dy, D.size(1), at::kFloat);
  const Tensor dD = call<Tensor, Tensor&, const Tensor&, const Tensor&, const Tensor&>(
      "finchtune::bat_row_backward_", dx, x, D, sums);
  return {dx, dD};
}

vector<Tensor> token_mix(const Tensor& x, const optional<Tensor>& before,
                         const optional<Tensor>& cu_seqlens, const Tensor& maa) {
  return call<vector<Tensor>, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
              const Tensor&>("finchtune::token_mix", x, before, cu_seqlens, maa);
}

struct MixGradients {
  Tensor sum, blended, maa;
};

MixGradients token_mix_backward(at::TensorList douts, const Tensor& x,
                                const optional<Tensor>& before, const optional<Tensor>& cu_seqlens,
                                const Tensor& maa, at::TensorList blends, bool of_maa) {
  vector<Tensor> rows;
  for (const Tensor& dout : douts) rows.push_back(dout.flatten(0, 1));
  const auto [sum, blended, dmaa] =
      call<tuple<Tensor, Tensor, Tensor>, at::TensorList, const Tensor&, const optional<Tensor>&,
           const optional<Tensor>&, const Tensor&, at::TensorList, bool>(
          "finchtune::token_mix_backward", rows, x, before, cu_seqlens, maa, blends, of_maa);
  return {sum, blended, of_maa ? dmaa.to(maa.scalar_type()) : none(maa)};
}

tuple<Tensor, Tensor> shift_backward(const MixGradients& from, const optional<Tensor>& more,
                                     const Tensor& x, const optional<Tensor>& cu_seqlens,
                                     const Tensor& maa, bool of_before) {
  return call<tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const optional<Tensor>&,
              const Tensor&, const optional<Tensor>&, const Tensor&, bool>(
      "finchtune::shift_backward", from.sum, from.blended, more, x, cu_seqlens, maa, of_before);
}

vector<Tensor> like(const Tensor& x, const vector<Tensor>& rows) {
  vector<Tensor> found;
  for (const Tensor& row : rows) found.push_back(row.view(x.sizes()));
  return found;
}

// x_j = x + xx maa_j; x (B, T, C), maa n of (C).
vector<Tensor> fixed_mixtures(const Tensor& x, const optional<Tensor>& before,
                              const optional<Tensor>& cu_seqlens, at::TensorList maa) {
  return like(x, token_mix(x, before, cu_seqlens, at::stack(maa)));
}

tuple<Tensor, Tensor, Tensor> fixed_mixtures_backward(at::TensorList douts, const Tensor& x,
                                                      const optional<Tensor>& before,
                                                      const optional<Tensor>& cu_seqlens,
                                                      at::TensorList maa, bool of_before,
                                                      bool of_maa) {
  const Tensor all = at::stack(maa);
  const MixGradients from = token_mix_backward(douts, x, before, cu_seqlens, all, {}, of_maa);
  const auto [dx, dbefore] = shift_backward(from, std::nullopt, x, cu_seqlens, all, of_before);
  return {dx, dbefore, from.maa};
}

// (T, n M) as a view (n, T, M).
Tensor by_mixture(const Tensor& low, int64_t n) {
  return low.unflatten(1, {n, low.size(1) / n}).transpose(0, 1);
}

// x_j = x + xx (maa_j + m_j) with m = tanh((x + xx maa_x) w1) w2, and its low-rank part (T, n M).
// x (B, T, C), maa_x (1, C), maa n of (C), w1 (C, n M), w2 (n, M, C).
tuple<Tensor, vector<Tensor>> mixtures(const Tensor& x, const optional<Tensor>& before,
                                       const optional<Tensor>& cu_seqlens, const Tensor& maa_x,
                                       at::TensorList maa, const Tensor& w1, const Tensor& w2) {
  const int64_t n = w2.size(0);
  Tensor low = at::mm(token_mix(x, before, cu_seqlens, maa_x)[0], w1).tanh_();
  const Tensor parts = by_mixture(low, n);
  vector<Tensor> blends;  // separate tensors, so that each is freed by itself
  for (int64_t j = 0; j < n; ++j) blends.push_back(at::mm(parts[j], w2[j]));
  call<void, at::TensorList, const Tensor&, const optional<Tensor>&, const optional<Tensor>&,
       const Tensor&>("finchtune::token_mix_", blends, x, before, cu_seqlens, at::stack(maa));
  return {low, like(x, blends)};
}

// The token before each token of x, less it: (T, C).
Tensor differences(const Tensor& x, const optional<Tensor>& before,
                   const optional<Tensor>& cu_seqlens) {
  const Tensor all = at::ones({1, x.size(2)}, x.options());
  return token_mix(x, before, cu_seqlens, all)[0].sub_(x.flatten(0, 1));
}

tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixtures_backward(
    at::TensorList douts, const Tensor& x, const optional<Tensor>& before,
    const optional<Tensor>& cu_seqlens, const Tensor& low, const Tensor& maa_x, at::TensorList maa,
    const Tensor& w1, const Tensor& w2, bool of_before, bool of_maa_x, bool of_maa, bool of_w1,
    bool of_w2) {
  const int64_t n = w2.size(0);
  const Tensor parts = by_mixture(low, n);
  Tensor d_blends = at::bmm(parts, w2);  // the blends, until the kernel has read them
  const MixGradients from =
      token_mix_backward(douts, x, before, cu_seqlens, at::stack(maa), d_blends.unbind(), of_maa);
  Tensor d_low = at::empty_like(low);
  Tensor d_low_parts = by_mixture(d_low, n);
  at::bmm_out(d_low_parts, d_blends, w2.mT());
  d_low = at::tanh_backward(d_low, low);
  const Tensor d_input = at::mm(d_low, w1.t());
  const auto [dx, dbefore] = shift_backward(from, d_input, x, cu_seqlens, maa_x, of_before);
  Tensor dmaa_x = none(x), dw1 = none(x);
  if (of_maa_x || of_w1) {
    const Tensor xx = differences(x, before, cu_seqlens);
    if (of_maa_x) dmaa_x = at::mul(d_input, xx).sum(0, true);
    if (of_w1) dw1 = at::mm(at::addcmul(x.flatten(0, 1), xx, maa_x).t(), d_low);
  }
  return {dx, dbefore, dmaa_x, from.maa, dw1, of_w2 ? at::bmm(parts.mT(), d_blends) : none(x)};
}

}  // namespace

void add_composites(torch::Library& library) {
  library.impl("bone", &bone);
  library.impl("bone_backward", &bone_backward);
  library.impl("bat_row", &bat_row);
  library.impl("bat_row_backward", &bat_row_backward);
  library.impl("fixed_mixtures", &fixed_mixtures);
  library.impl("fixed_mixtures_backward", &fixed_mixtures_backward);
  library.impl("mixtures", &mixtures);
  library.impl("mixtures_backward", &mixtures_backward);
}

}  // namespace finchtune
