#include "common/bind.h"

#include <optional>

#include "router/router.h"

namespace dsv4 {
namespace {

// Everything that gate and gate_topk share; x is the tensor whose rows are routed.
GateChoice choice_of(const Call& call, const Tensor& x, int64_t experts, const Tensor& bias, const Tensor& fixed_ids,
                     int64_t k, double route_scale, Tensor& ids, Tensor& weights) {
  call.expect_tensor("bias", bias, {kFloat32}, {experts});
  call.expect_contiguous("bias", bias);
  const std::string slots = "[T, k] with one slot for each of the k = " + std::to_string(k) +
                            " experts of a row, 1 <= k <= E = " + std::to_string(experts) +
                            " and k <= " + std::to_string(kMaxChosen);
  call.expect_rows("fixed_ids", fixed_ids, {kInt32}, k);
  call.expect(k >= 1 && k <= experts && k <= kMaxChosen && row_count(fixed_ids) == row_count(x), "fixed_ids", slots,
              fixed_ids);
  call.expect_output("ids", ids, kInt32, x, k);
  call.expect_output("weights", weights, kFloat32, x, k);
  return {data<float>(bias),
          data<int>(fixed_ids),
          call.rows("fixed_ids", fixed_ids, 4).stride,
          static_cast<int>(k),
          static_cast<float>(route_scale),
          mutable_data<int>(ids),
          mutable_data<float>(weights)};
}

std::tuple<Tensor, Tensor> gate(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& fixed_ids,
                                int64_t k, double route_scale, Tensor ids, Tensor weights,
                                std::optional<Tensor> workspace) {
  const Call call("gate", x);
  call.expect_rows("x", x, {kBfloat16, kFloat32});
  const Rows rows = call.rows("x", x, 16);
  call.expect_tensor("weight", weight, {kBfloat16, kFloat32}, {kAny, rows.width});
  const Rows weight_rows = call.rows("weight", weight, 16);
  call.expect(rows.width % 8 == 0 && rows.width > 0, "x", "[T, d] with d a multiple of 8", x);
  const int64_t experts = weight_rows.count;
  call.expect(experts >= 1 && experts <= kMaxExperts, "weight", "[E, d] with 1 <= E <= " + std::to_string(kMaxExperts),
              weight);
  const GateChoice choice = choice_of(call, x, experts, bias, fixed_ids, k, route_scale, ids, weights);
  const GateProduct product{x.const_data_ptr(),       dtype_of(x),      rows,
                            weight.const_data_ptr(),  dtype_of(weight), weight_rows.stride,
                            static_cast<int>(experts)};
  const Tensor& parts = workspace.has_value() ? *workspace : x;
  const int64_t size = workspace_size(product);
  const bool fits = workspace.has_value() && parts.numel() >= size;
  call.expect(fits, "workspace", "given, with at least " + std::to_string(size) + " float32", parts);
  call.expect_rows("workspace", parts, {kFloat32});
  call.expect_contiguous("workspace", parts);
  call.check(launch_gate(product, choice, mutable_data<float>(parts), call.stream()));
  return {ids, weights};
}

std::tuple<Tensor, Tensor> gate_topk(const Tensor& logits, const Tensor& bias, const Tensor& fixed_ids, int64_t k,
                                     double route_scale, Tensor ids, Tensor weights) {
  const Call call("gate_topk", logits);
  call.expect_rows("logits", logits, {kFloat32});
  const Rows rows = call.rows("logits", logits, 4);
  call.expect(rows.width >= 1 && rows.width <= kMaxExperts, "logits",
              "[T, E] with 1 <= E <= " + std::to_string(kMaxExperts), logits);
  const GateChoice choice = choice_of(call, logits, rows.width, bias, fixed_ids, k, route_scale, ids, weights);
  call.check(launch_gate_topk(data<float>(logits), rows.count, rows.stride, 1, static_cast<int>(rows.width), choice,
                              call.stream()));
  return {ids, weights};
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("gate.out", TORCH_BOX(&gate));
  m.impl("gate_topk.out", TORCH_BOX(&gate_topk));
}

}  // namespace
}  // namespace dsv4
