#include "norm/bind_norm.h"
#include "norm/norm.h"

namespace dsv4 {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor y) {
  const Call call("rms_norm", x);
  const Rows rows = norm_rows(call, x, weight);
  call.expect_output("y", y, x.scalar_type(), x, rows.width);
  call.check(launch_rms_norm(x.const_data_ptr(), dtype_of(x), rows, weight.const_data_ptr(), dtype_of(weight),
                             static_cast<float>(eps), y.mutable_data_ptr(), call.stream()));
  return y;
}

Tensor swiglu(const Tensor& gate_up, const Tensor& route_weight, double limit, Tensor h) {
  const Call call("swiglu", gate_up);
  const Rows rows = gated_rows(call, gate_up, route_weight, 1);
  call.expect_output("h", h, gate_up.scalar_type(), gate_up, rows.width);
  call.check(launch_swiglu(gate_up.const_data_ptr(), dtype_of(gate_up), rows, data<float>(route_weight),
                           static_cast<float>(limit), h.mutable_data_ptr(), call.stream()));
  return h;
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("rms_norm.out", TORCH_BOX(&rms_norm));
  m.impl("swiglu.out", TORCH_BOX(&swiglu));
}

}  // namespace
}  // namespace dsv4
