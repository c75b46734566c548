#include "common/bind.h"

#include <optional>

#include "nvfp4/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int64_t kBlock = 16;

int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

int64_t size_128x4(int64_t rows, int64_t columns) { return (rows + 127) / 128 * ((columns + 3) / 4) * 512; }

// x [..., K] of activations with K a multiple of `group`, in rows that start at multiples of `alignment` bytes.
Rows activation_rows(const Call& call, const Tensor& x, int64_t group, int alignment) {
  call.expect_rows("x", x, {kBfloat16, kFloat32});
  const bool fits = last_size(x) % group == 0 && x.numel() <= kMostElements;
  call.expect(fits, "x", "[T, K] with K a multiple of " + std::to_string(group) + " and at most 2^32 elements", x);
  return call.rows("x", x, alignment);
}

Rows code_rows(const Call& call, const Tensor& q) {
  call.expect_rows("q", q, {kUint8});
  const bool fits = last_size(q) * 2 % kBlock == 0 && 2 * q.numel() <= kMostElements;
  call.expect(fits, "q", "[T, K/2] with K a multiple of 16 and at most 2^31 bytes", q);
  return call.rows("q", q, 2);
}

// global_scale [1] or, one for each row of x, [..., 1].
Rows global_rows(const Call& call, const Tensor& global_scale, const Tensor& x) {
  call.expect_rows("global_scale", global_scale, {kFloat32}, 1);
  const int64_t dims = global_scale.dim();
  bool fits = global_scale.numel() == 1 || dims == x.dim();
  for (int64_t i = 0; fits && global_scale.numel() != 1 && i + 1 < dims; ++i) fits = global_scale.size(i) == x.size(i);
  call.expect(fits, "global_scale", "[1] or [T, 1] float32 for rows " + describe(x), global_scale);
  return call.rows("global_scale", global_scale, 4);
}

// Block scales in the 128x4 layout.
void expect_layout(const Call& call, const char* name, const Tensor& layout, int64_t rows, int64_t columns) {
  call.expect_tensor(name, layout, {kE4m3}, {size_128x4(rows, columns)});
  call.expect_contiguous(name, layout);
  const bool aligned = reinterpret_cast<uintptr_t>(layout.const_data_ptr()) % 16 == 0;
  call.expect(aligned || layout.numel() == 0, name, "at a multiple of 16 bytes", layout);
}

Tensor nvfp4_global_scale(const Tensor& x, Tensor scale, std::optional<Tensor> workspace) {
  const Call call("nvfp4_global_scale", x);
  const Rows rows = activation_rows(call, x, 1, static_cast<int>(x.element_size()));
  call.expect_tensor("scale", scale, {kFloat32}, {1});
  const std::string wanted = "given, with at least " + std::to_string(kMostPartials) + " int32";
  call.expect(workspace.has_value(), "workspace", wanted, x);
  call.expect_rows("workspace", *workspace, {kInt32});
  call.expect(workspace->numel() >= kMostPartials, "workspace", wanted, *workspace);
  call.expect_contiguous("workspace", *workspace);
  call.check(launch_nvfp4_global_scale(x.const_data_ptr(), dtype_of(x), rows, mutable_data<uint32_t>(*workspace),
                                       mutable_data<float>(scale), call.stream()));
  return scale;
}

Tensor nvfp4_row_scale(const Tensor& x, Tensor scale) {
  const Call call("nvfp4_row_scale", x);
  const Rows rows = activation_rows(call, x, 1, static_cast<int>(x.element_size()));
  call.expect_output("scale", scale, kFloat32, x, 1);
  call.check(launch_nvfp4_row_scale(x.const_data_ptr(), dtype_of(x), rows, mutable_data<float>(scale), call.stream()));
  return scale;
}

std::tuple<Tensor, Tensor> quant_nvfp4(const Tensor& x, const Tensor& global_scale, Tensor q, Tensor scale) {
  const Call call("quant_nvfp4", x);
  const Rows rows = activation_rows(call, x, kBlock, 16), global = global_rows(call, global_scale, x);
  call.expect_output("q", q, kUint8, x, rows.width / 2);
  call.expect_output("scale", scale, kE4m3, x, rows.width / kBlock);
  call.check(launch_quant_nvfp4(x.const_data_ptr(), dtype_of(x), rows, data<float>(global_scale), global, false,
                                mutable_data<uint8_t>(q), mutable_data<uint8_t>(scale), call.stream()));
  return {q, scale};
}

std::tuple<Tensor, Tensor> quant_nvfp4_128x4(const Tensor& x, const Tensor& global_scale, Tensor q, Tensor scale) {
  const Call call("quant_nvfp4_128x4", x);
  call.expect(x.dim() == 2, "x", "[T, K] (flatten the leading dimensions)", x);
  const Rows rows = activation_rows(call, x, kBlock, 16), global = global_rows(call, global_scale, x);
  call.expect_output("q", q, kUint8, x, rows.width / 2);
  expect_layout(call, "scale", scale, rows.count, rows.width / kBlock);
  call.check(launch_quant_nvfp4(x.const_data_ptr(), dtype_of(x), rows, data<float>(global_scale), global, true,
                                mutable_data<uint8_t>(q), mutable_data<uint8_t>(scale), call.stream()));
  return {q, scale};
}

Tensor dequant_nvfp4(const Tensor& q, const Tensor& scale, const Tensor& global_scale, Tensor x) {
  const Call call("dequant_nvfp4", q);
  const Rows rows = code_rows(call, q), global = global_rows(call, global_scale, q);
  call.expect_rows_like("scale", scale, {kE4m3}, q, 2 * rows.width / kBlock);
  call.expect_output("x", x, kFloat32, q, 2 * rows.width);
  call.check(launch_dequant_nvfp4(data<uint8_t>(q), rows, data<uint8_t>(scale), call.rows("scale", scale, 1),
                                  data<float>(global_scale), global, mutable_data<float>(x), call.stream()));
  return x;
}

Tensor dequant_nvfp4_128x4(const Tensor& q, const Tensor& scale, const Tensor& global_scale, Tensor x) {
  const Call call("dequant_nvfp4_128x4", q);
  call.expect(q.dim() == 2, "q", "[T, K/2] (flatten the leading dimensions)", q);
  const Rows rows = code_rows(call, q), global = global_rows(call, global_scale, q);
  expect_layout(call, "scale", scale, rows.count, 2 * rows.width / kBlock);
  call.expect_output("x", x, kFloat32, q, 2 * rows.width);
  call.check(launch_dequant_nvfp4_128x4(data<uint8_t>(q), rows, data<uint8_t>(scale), data<float>(global_scale), global,
                                        mutable_data<float>(x), call.stream()));
  return x;
}

Tensor nvfp4_scale_to_128x4(const Tensor& scale, Tensor layout) {
  const Call call("nvfp4_scale_to_128x4", scale);
  call.expect_tensor("scale", scale, {kE4m3}, {kAny, kAny});
  const Rows rows = call.rows("scale", scale, 1);
  call.expect(rows.width <= kMostColumns, "scale", "[rows, columns] with at most 2^20 columns", scale);
  expect_layout(call, "layout", layout, rows.count, rows.width);
  call.check(launch_nvfp4_scale_to_128x4(data<uint8_t>(scale), rows, mutable_data<uint8_t>(layout), call.stream()));
  return layout;
}

Tensor nvfp4_scale_from_128x4(const Tensor& scale, int64_t rows, int64_t columns, Tensor linear) {
  const Call call("nvfp4_scale_from_128x4", scale);
  call.expect(rows >= 0 && columns >= 0 && columns <= kMostColumns, "scale",
              "of [rows, columns] with at most 2^20 columns, not [" + std::to_string(rows) + ", " +
                  std::to_string(columns) + "]",
              scale);
  expect_layout(call, "scale", scale, rows, columns);
  call.expect_tensor("linear", linear, {kE4m3}, {rows, columns});
  call.expect_contiguous("linear", linear);
  call.check(
      launch_nvfp4_scale_from_128x4(data<uint8_t>(scale), rows, columns, mutable_data<uint8_t>(linear), call.stream()));
  return linear;
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("nvfp4_global_scale.out", TORCH_BOX(&nvfp4_global_scale));
  m.impl("nvfp4_row_scale.out", TORCH_BOX(&nvfp4_row_scale));
  m.impl("quant_nvfp4.out", TORCH_BOX(&quant_nvfp4));
  m.impl("quant_nvfp4_128x4.out", TORCH_BOX(&quant_nvfp4_128x4));
  m.impl("dequant_nvfp4.out", TORCH_BOX(&dequant_nvfp4));
  m.impl("dequant_nvfp4_128x4.out", TORCH_BOX(&dequant_nvfp4_128x4));
  m.impl("nvfp4_scale_to_128x4.out", TORCH_BOX(&nvfp4_scale_to_128x4));
  m.impl("nvfp4_scale_from_128x4.out", TORCH_BOX(&nvfp4_scale_from_128x4));
}

}  // namespace
}  // namespace dsv4
