// The signatures of the operators that both libraries, the one for the CPU and the one for the GPU,
// may implement. Each library contains this file, so that either works without the other; whichever
// is loaded first defines them.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

namespace {

constexpr const char* kSchemas[] = {
    "wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, "
    "Tensor? cu_seqlens, bool for_backward) -> (Tensor y, Tensor state, Tensor checkpoints)",
    "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, "
    "Tensor? cu_seqlens, Tensor checkpoints, Tensor grad_y, Tensor? grad_state) "
    "-> (Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state)",
    "wkv7_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor a, Tensor b, Tensor? state, "
    "Tensor? cu_seqlens, bool for_backward) -> (Tensor y, Tensor state, Tensor checkpoints)",
    "wkv7_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor a, Tensor b, Tensor? state, "
    "Tensor? cu_seqlens, Tensor checkpoints, Tensor grad_y, Tensor? grad_state) "
    "-> (Tensor r, Tensor k, Tensor v, Tensor w, Tensor a, Tensor b, Tensor state)",
    "cross_entropy_(Tensor(a!) logits, Tensor labels, float l2wrap) -> Tensor losses",
    "shard_sums(Tensor x, int r, ScalarType dtype) -> Tensor sums",
    "add_to_shards_(Tensor(a!) x, Tensor s) -> ()",
    "bat_row_forward(Tensor x, Tensor D) -> (Tensor moved, Tensor sums)",
    "bat_row_backward_(Tensor(a!) dx, Tensor x, Tensor D, Tensor sums) -> Tensor dD",
    "unpack(Tensor codes, Tensor scales, float[] table, int rows, int columns, ScalarType dtype) "
    "-> Tensor",
    "bone(Tensor x, Tensor D, Tensor W) -> (Tensor y, Tensor sums)",
    "bone_backward(Tensor dy, Tensor? dsums, Tensor sums, Tensor D, Tensor W, bool of_x, bool "
    "of_D) "
    "-> (Tensor x, Tensor D)",
    "bat_row(Tensor x, Tensor D, Tensor W) -> Tensor",
    "bat_row_backward(Tensor dy, Tensor x, Tensor D, Tensor W) -> (Tensor x, Tensor D)",
    "fixed_mixtures(Tensor x, Tensor? before, Tensor? cu_seqlens, Tensor[] maa) -> Tensor[]",
    "fixed_mixtures_backward(Tensor[] douts, Tensor x, Tensor? before, Tensor? cu_seqlens, "
    "Tensor[] maa, bool of_before, bool of_maa) -> (Tensor x, Tensor before, Tensor maa)",
    "mixtures(Tensor x, Tensor? before, Tensor? cu_seqlens, Tensor maa_x, Tensor[] maa, Tensor w1, "
    "Tensor w2) -> (Tensor low, Tensor[] mixtures)",
    "mixtures_backward(Tensor[] douts, Tensor x, Tensor? before, Tensor? cu_seqlens, Tensor low, "
    "Tensor maa_x, Tensor[] maa, Tensor w1, Tensor w2, bool of_before, bool of_maa_x, bool of_maa, "
    "bool of_w1, bool of_w2) "
    "-> (Tensor x, Tensor before, Tensor maa_x, Tensor maa, Tensor w1, Tensor w2)",
    "low_ranks(Tensor[] x, Tensor[] one, Tensor[] two, Tensor?[] zero, int[] activations) "
    "-> (Tensor[] y, Tensor[] low)",
    "low_ranks_backward(Tensor[] dy, Tensor[] x, Tensor[] low, Tensor[] one, Tensor[] two, "
    "int[] activations, bool[] of_one, bool[] of_two, bool[] of_zero) -> Tensor[]",
    "token_mix(Tensor x, Tensor? before, Tensor? cu_seqlens, Tensor maa) -> Tensor[]",
    "token_mix_(Tensor(a!)[] blends, Tensor x, Tensor? before, Tensor? cu_seqlens, Tensor maa) "
    "-> ()",
    "token_mix_backward(Tensor[] douts, Tensor x, Tensor? before, Tensor? cu_seqlens, "
    "Tensor maa, Tensor(a!)[] blends, bool of_maa) "
    "-> (Tensor sum, Tensor blended, Tensor maa)",
    "shift_backward(Tensor sum, Tensor blended, Tensor? more, Tensor x, Tensor? cu_seqlens, "
    "Tensor maa, bool of_before) -> (Tensor x, Tensor before)",
    "gated_norm(Tensor y, Tensor gate, Tensor weight, Tensor bias, int groups, float eps) "
    "-> Tensor",
    "gated_norm_backward(Tensor dout, Tensor y, Tensor gate, Tensor weight, Tensor bias, "
    "int groups, float eps, bool of_weight) "
    "-> (Tensor y, Tensor gate, Tensor weight, Tensor bias)",
    "added_norm(Tensor x, Tensor? y, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor total, Tensor normed, Tensor moments)",
    "added_norm_backward(Tensor dnormed, Tensor? dtotal, Tensor total, Tensor moments, "
    "Tensor weight, bool of_weight) -> (Tensor x, Tensor weight, Tensor bias)",
    "squared_relu(Tensor x) -> Tensor",
    "squared_relu_backward(Tensor dy, Tensor y) -> Tensor",
    "sigmoid_gate(Tensor gate, Tensor y) -> Tensor",
    "sigmoid_gate_backward(Tensor dout, Tensor gate, Tensor y) "
    "-> (Tensor gate, Tensor y)",
    "wkv7_inputs(Tensor[] rows, Tensor[] values, Tensor[] weights, int heads, float eps) "
    "-> Tensor[]",
    "wkv7_inputs_backward(Tensor[] douts, Tensor[] rows, Tensor[] values, Tensor[] weights, "
    "int heads, float eps, bool of_weights) -> Tensor[]",
    "bonus_norm(Tensor[] rows, Tensor[] weights, int heads, float eps) -> Tensor",
    "bonus_norm_backward(Tensor dout, Tensor[] rows, Tensor[] weights, int heads, float eps, "
    "bool of_weights) -> Tensor[]",
    "products(Tensor[] x, Tensor[] W, int[] activations) -> Tensor[] y",
    "coded_product(Tensor x, Tensor codes, Tensor scales, Tensor? table, int n_out, "
    "int activation) -> Tensor y",
    "fp8_rows(Tensor x, Tensor? factors) -> (Tensor codes, Tensor scales)",
    "turn_bytes(Tensor codes) -> Tensor",
    "wkv6_step_(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state) -> Tensor y",
};

bool defined(const std::string& schema) {
  const std::string name = "finchtune::" + schema.substr(0, schema.find('('));
  return c10::Dispatcher::singleton().findSchema({name, ""}).has_value();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finchtune, library) {
  for (const char* schema : kSchemas)
    if (!defined(schema)) library.def(schema);
}
