#include "common/bind.h"
#include "quant/quant.h"

namespace dsv4 {
namespace {

std::tuple<Tensor, Tensor> quant_fp8_as(const char* op, ScalarType scale_dtype, const Tensor& x, int64_t group, Tensor q,
                                        Tensor scale) {
  const Call call(op, x);
  call.expect_rows("x", x, {kBfloat16, kFloat32});
  const Rows rows = call.rows("x", x, 16);
  call.expect((group == 32 || group == 64 || group == 128) && rows.width % group == 0, "x",
              "[T, K] with K a multiple of the group (32, 64 or 128; here " + std::to_string(group) + ")", x);
  call.expect_rows("q", q, {kE4m3}, rows.width);
  call.expect_rows("scale", scale, {scale_dtype}, rows.width / group);
  call.expect_contiguous("q", q);
  call.expect_contiguous("scale", scale);
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

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("quant_fp8.out", TORCH_BOX(&quant_fp8));
  m.impl("quant_fp8_fp32_scale.out", TORCH_BOX(&quant_fp8_fp32_scale));
}

}  // namespace
}  // namespace dsv4
