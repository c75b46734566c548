#include "common/bind.h"
#include "fused_quant/fused_quant.h"
#include "norm/bind_norm.h"

namespace dsv4 {
namespace {

constexpr int kMxfp4Group = 32;
constexpr int kNvfp4Group = 16;

// Raise unless FP8 has groups of this size.
void expect_fp8_group(const Call& call, const Tensor& x, int64_t group) {
  call.expect(group == 32 || group == 64 || group == 128, "group", "32, 64 or 128, is " + std::to_string(group), x);
}

// Raise unless rows of `width` elements are whole groups; `x` and `name` are the tensor, `what` says what the width is.
void expect_groups(const Call& call, const char* name, const Tensor& x, const char* what, int64_t width,
                   int64_t group) {
  call.expect(width > 0 && width % group == 0, name, std::string(what) + " a multiple of " + std::to_string(group), x);
}

NormInput norm_input(const Call& call, const Tensor& x, const Tensor& weight, double eps, int64_t group, Tensor& y) {
  const Rows rows = norm_rows(call, x, weight);
  expect_groups(call, "x", x, "[..., K] with K", rows.width, group);
  call.expect_output("y", y, x.scalar_type(), x, rows.width);
  return {x.const_data_ptr(),      dtype_of(x),      rows,
          weight.const_data_ptr(), dtype_of(weight), static_cast<float>(eps),
          y.mutable_data_ptr()};
}

GateUpInput gate_up_input(const Call& call, const Tensor& gate_up, bool interleaved, const Tensor& route_weight,
                          double limit, int64_t group) {
  const Rows rows = gated_rows(call, gate_up, route_weight, 16);
  expect_groups(call, "gate_up", gate_up, "[..., 2 * I] with I", rows.width, group);
  return {gate_up.const_data_ptr(),  dtype_of(gate_up),        rows, interleaved,
          data<float>(route_weight), static_cast<float>(limit)};
}

// Codes and scales of rows of `width` elements: q [..., width / packing], scale [..., width / group].
void expect_codes(const Call& call, const Tensor& x, int64_t width, const Tensor& q, ScalarType q_dtype,
                  int64_t packing, const Tensor& scale, ScalarType scale_dtype, int64_t group) {
  call.expect_output("q", q, q_dtype, x, width / packing);
  call.rows("q", q, 8);
  call.expect_output("scale", scale, scale_dtype, x, width / group);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quant_fp8(const Tensor& x, const Tensor& weight, double eps, int64_t group,
                                                      Tensor y, Tensor q, Tensor scale) {
  const Call call("rms_norm_quant_fp8", x);
  expect_fp8_group(call, x, group);
  const NormInput in = norm_input(call, x, weight, eps, group, y);
  expect_codes(call, x, in.rows.width, q, kE4m3, 1, scale, kUint8, group);
  call.check(launch_rms_norm_quant_fp8(in, static_cast<int>(group), mutable_data<uint8_t>(q),
                                       mutable_data<uint8_t>(scale), call.stream()));
  return {y, q, scale};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quant_mxfp4(const Tensor& x, const Tensor& weight, double eps, Tensor y,
                                                        Tensor q, Tensor scale) {
  const Call call("rms_norm_quant_mxfp4", x);
  const NormInput in = norm_input(call, x, weight, eps, kMxfp4Group, y);
  expect_codes(call, x, in.rows.width, q, kUint8, 2, scale, kUint8, kMxfp4Group);
  call.check(launch_rms_norm_quant_mxfp4(in, mutable_data<uint8_t>(q), mutable_data<uint8_t>(scale), call.stream()));
  return {y, q, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quant_nvfp4(const Tensor& x, const Tensor& weight, double eps,
                                                                Tensor y, Tensor q, Tensor scale, Tensor global_scale) {
  const Call call("rms_norm_quant_nvfp4", x);
  const NormInput in = norm_input(call, x, weight, eps, kNvfp4Group, y);
  expect_codes(call, x, in.rows.width, q, kUint8, 2, scale, kE4m3, kNvfp4Group);
  call.expect_output("global_scale", global_scale, kFloat32, x, 1);
  call.check(launch_rms_norm_quant_nvfp4(in, mutable_data<uint8_t>(q), mutable_data<uint8_t>(scale),
                                         mutable_data<float>(global_scale), call.stream()));
  return {y, q, scale, global_scale};
}

template <bool kInterleaved>
std::tuple<Tensor, Tensor> swiglu_quant_fp8(const Tensor& gate_up, const Tensor& route_weight, double limit,
                                            int64_t group, Tensor q, Tensor scale) {
  const Call call(kInterleaved ? "swiglu_interleaved_quant_fp8" : "swiglu_quant_fp8", gate_up);
  expect_fp8_group(call, gate_up, group);
  const GateUpInput in = gate_up_input(call, gate_up, kInterleaved, route_weight, limit, group);
  expect_codes(call, gate_up, in.rows.width, q, kE4m3, 1, scale, kUint8, group);
  call.check(launch_swiglu_quant_fp8(in, static_cast<int>(group), mutable_data<uint8_t>(q),
                                     mutable_data<uint8_t>(scale), call.stream()));
  return {q, scale};
}

template <bool kInterleaved>
std::tuple<Tensor, Tensor> swiglu_quant_mxfp4(const Tensor& gate_up, const Tensor& route_weight, double limit, Tensor q,
                                              Tensor scale) {
  const Call call(kInterleaved ? "swiglu_interleaved_quant_mxfp4" : "swiglu_quant_mxfp4", gate_up);
  const GateUpInput in = gate_up_input(call, gate_up, kInterleaved, route_weight, limit, kMxfp4Group);
  expect_codes(call, gate_up, in.rows.width, q, kUint8, 2, scale, kUint8, kMxfp4Group);
  call.check(launch_swiglu_quant_mxfp4(in, mutable_data<uint8_t>(q), mutable_data<uint8_t>(scale), call.stream()));
  return {q, scale};
}

template <bool kInterleaved>
std::tuple<Tensor, Tensor, Tensor> swiglu_quant_nvfp4(const Tensor& gate_up, const Tensor& route_weight, double limit,
                                                      Tensor q, Tensor scale, Tensor global_scale) {
  const Call call(kInterleaved ? "swiglu_interleaved_quant_nvfp4" : "swiglu_quant_nvfp4", gate_up);
  const GateUpInput in = gate_up_input(call, gate_up, kInterleaved, route_weight, limit, kNvfp4Group);
  expect_codes(call, gate_up, in.rows.width, q, kUint8, 2, scale, kE4m3, kNvfp4Group);
  call.expect_output("global_scale", global_scale, kFloat32, gate_up, 1);
  call.check(launch_swiglu_quant_nvfp4(in, mutable_data<uint8_t>(q), mutable_data<uint8_t>(scale),
                                       mutable_data<float>(global_scale), call.stream()));
  return {q, scale, global_scale};
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("rms_norm_quant_fp8.out", TORCH_BOX(&rms_norm_quant_fp8));
  m.impl("rms_norm_quant_mxfp4.out", TORCH_BOX(&rms_norm_quant_mxfp4));
  m.impl("rms_norm_quant_nvfp4.out", TORCH_BOX(&rms_norm_quant_nvfp4));
  m.impl("swiglu_quant_fp8.out", TORCH_BOX(&swiglu_quant_fp8<false>));
  m.impl("swiglu_quant_mxfp4.out", TORCH_BOX(&swiglu_quant_mxfp4<false>));
  m.impl("swiglu_quant_nvfp4.out", TORCH_BOX(&swiglu_quant_nvfp4<false>));
  m.impl("swiglu_interleaved_quant_fp8.out", TORCH_BOX(&swiglu_quant_fp8<true>));
  m.impl("swiglu_interleaved_quant_mxfp4.out", TORCH_BOX(&swiglu_quant_mxfp4<true>));
  m.impl("swiglu_interleaved_quant_nvfp4.out", TORCH_BOX(&swiglu_quant_nvfp4<true>));
}

}  // namespace
}  // namespace dsv4
