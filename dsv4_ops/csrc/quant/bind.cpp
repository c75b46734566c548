#include "common/bind.h"

#include "quant/quant.h"

namespace dsv4 {
namespace {

// x [..., K] of activations with K a multiple of the group.
Rows activation_rows(const Call& call, const Tensor& x, int64_t group) {
  call.expect_rows("x", x, {kBfloat16, kFloat32});
  const bool fits = x.size(x.dim() - 1) % group == 0 && x.numel() <= kMostElements;
  call.expect(fits, "x", "[T, K] with K a multiple of " + std::to_string(group) + " and at most 2^32 elements", x);
  return call.rows("x", x, 16);
}

std::tuple<Tensor, Tensor> quant_fp8_as(const char* op, ScalarType scale_dtype, const Tensor& x, int64_t group,
                                        Tensor q, Tensor scale) {
  const Call call(op, x);
  call.expect(group == 32 || group == 64 || group == 128, "x",
              "quantised in groups of 32, 64 or 128 (not " + std::to_string(group) + ")", x);
  const Rows rows = activation_rows(call, x, group);
  call.expect_output("q", q, kE4m3, x, rows.width);
  call.expect_output("scale", scale, scale_dtype, x, rows.width / group);
  call.check(launch_quant_fp8(x.const_data_ptr(), dtype_of(x), rows, static_cast<int>(group), scale_dtype == kFloat32,
                              mutable_data<uint8_t>(q), scale.mutable_data_ptr(), call.stream()));
  return {q, scale};
}

std::tuple<Tensor, Tensor> quant_fp8(const Tensor& x, int64_t group, Tensor q, Tensor scale) {
  return quant_fp8_as("quant_fp8", kUint8, x, group, q, scale);
}

std::tuple<Tensor, Tensor> quant_fp8_fp32_scale(const Tensor& x, int64_t group, Tensor q, Tensor scale) {
  return quant_fp8_as("quant_fp8_fp32_scale", kFloat32, x, group, q, scale);
}

Tensor dequant_fp8(const Tensor& q, const Tensor& scale, Tensor x) {
  const Call call("dequant_fp8", q);
  call.expect_rows("q", q, {kE4m3});
  call.expect(q.numel() <= kMostElements, "q", "at most 2^32 elements", q);
  call.expect_rows("scale", scale, {kUint8, kFloat32});
  const int64_t groups = scale.size(scale.dim() - 1), width = q.size(q.dim() - 1);
  call.expect(groups > 0 && width % (4 * groups) == 0, "scale",
              "[T, K/group] with a group that is a multiple of 4 for q " + describe(q), scale);
  call.expect_rows_like("scale", scale, {kUint8, kFloat32}, q, groups);
  call.expect_output("x", x, kFloat32, q, width);
  const bool fp32_scale = scale.scalar_type() == kFloat32;
  call.check(launch_dequant_fp8(data<uint8_t>(q), call.rows("q", q, 4), scale.const_data_ptr(),
                                call.rows("scale", scale, fp32_scale ? 4 : 1), fp32_scale, mutable_data<float>(x),
                                call.stream()));
  return x;
}

std::tuple<Tensor, Tensor> quant_mxfp4(const Tensor& x, Tensor q, Tensor scale) {
  const Call call("quant_mxfp4", x);
  const Rows rows = activation_rows(call, x, 32);
  call.expect_output("q", q, kUint8, x, rows.width / 2);
  call.expect_output("scale", scale, kUint8, x, rows.width / 32);
  call.check(launch_quant_mxfp4(x.const_data_ptr(), dtype_of(x), rows, mutable_data<uint8_t>(q),
                                mutable_data<uint8_t>(scale), call.stream()));
  return {q, scale};
}

Tensor dequant_mxfp4(const Tensor& q, const Tensor& scale, Tensor x) {
  const Call call("dequant_mxfp4", q);
  call.expect_rows("q", q, {kUint8});
  const int64_t bytes = q.size(q.dim() - 1);
  call.expect(bytes % 16 == 0 && 2 * q.numel() <= kMostElements, "q",
              "[T, K/2] with K a multiple of 32 and at most 2^31 bytes", q);
  call.expect_rows_like("scale", scale, {kUint8}, q, bytes / 16);
  call.expect_output("x", x, kFloat32, q, 2 * bytes);
  call.check(launch_dequant_mxfp4(data<uint8_t>(q), call.rows("q", q, 2), data<uint8_t>(scale),
                                  call.rows("scale", scale, 1), mutable_data<float>(x), call.stream()));
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("quant_fp8.out", TORCH_BOX(&quant_fp8));
  m.impl("quant_fp8_fp32_scale.out", TORCH_BOX(&quant_fp8_fp32_scale));
  m.impl("dequant_fp8.out", TORCH_BOX(&dequant_fp8));
  m.impl("quant_mxfp4.out", TORCH_BOX(&quant_mxfp4));
  m.impl("dequant_mxfp4.out", TORCH_BOX(&dequant_mxfp4));
}

}  // namespace
}  // namespace dsv4
