// Checks that the ops of norm and fused_quant share.
#pragma once

#include "common/bind.h"

namespace dsv4 {

constexpr int64_t kMaxWidth = 1 << 27;         // of a row: columns are 32-bit numbers in the kernels
constexpr int64_t kMaxRows = (1LL << 31) - 1;  // the largest grid

inline void expect_sizes(const Call& call, const char* name, const Tensor& x, const Rows& rows) {
  const bool fits = rows.width <= kMaxWidth && rows.count <= kMaxRows;
  call.expect(fits, name, "at most 2^31 - 1 rows of at most 2^27 elements", x);
}

// Rows of x [..., K], which may start anywhere, and the weight [K] of their norm.
inline Rows norm_rows(const Call& call, const Tensor& x, const Tensor& weight) {
  call.expect_rows("x", x, {kBfloat16, kFloat32});
  const Rows rows = call.rows("x", x, 1);
  expect_sizes(call, "x", x, rows);
  call.expect_tensor("weight", weight, {kBfloat16, kFloat32}, {rows.width});
  call.expect_contiguous("weight", weight);
  return rows;
}

// Rows of h [..., I] from gate_up [..., 2 * I], and one route weight for each.
inline Rows gated_rows(const Call& call, const Tensor& gate_up, const Tensor& route_weight, int alignment) {
  call.expect_rows("gate_up", gate_up, {kBfloat16, kFloat32});
  Rows rows = call.rows("gate_up", gate_up, alignment);
  expect_sizes(call, "gate_up", gate_up, rows);
  call.expect(rows.width % 2 == 0, "gate_up", "[..., 2 * I]", gate_up);
  rows.width /= 2;
  bool fits = route_weight.is_cuda() && route_weight.get_device_index() == gate_up.get_device_index() &&
              route_weight.scalar_type() == kFloat32 && route_weight.dim() == gate_up.dim() - 1 &&
              route_weight.is_contiguous();
  for (int64_t i = 0; fits && i < route_weight.dim(); ++i) fits = route_weight.size(i) == gate_up.size(i);
  const std::string wanted = "contiguous float32, one for each row of gate_up " + describe(gate_up);
  call.expect(fits, "route_weight", wanted, route_weight);
  return rows;
}

}  // namespace dsv4
