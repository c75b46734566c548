#include <optional>

#include "common/bind.h"
#include "gemm/large.h"

namespace dsv4 {
namespace {

using Workspace = std::optional<Tensor>;

constexpr int64_t kBlock = 128;  // rows and columns of an FP8 weight that share a scale
constexpr int64_t kMxfp4Group = 32;
constexpr int64_t kNvfp4Group = 16;
constexpr int64_t kMostColumns = int64_t{1} << 28;
constexpr int64_t kMostGroups = 65535;  // of grid.z

int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// A product in the making: what all formats check the same way.
class Operands {
 public:
  Operands(const char* op, bool grouped, const Tensor& x) : call_(op, x), op_(op), grouped_(grouped) {}

  // x [T, K] or, in a grouped product, [T, G, K]; weight [N, K] or [G * R, K]; `packing` values an element.
  void set(const Tensor& x, const Tensor& weight, std::initializer_list<ScalarType> x_dtypes,
           std::initializer_list<ScalarType> weight_dtypes, int64_t x_packing, int64_t weight_packing) {
    call_.expect_rows("x", x, x_dtypes);
    call_.expect(x.dim() >= (grouped_ ? 3 : 1), "x", grouped_ ? "[T, G, K]" : "[T, K]", x);
    const int64_t last = x.dim() - 1;
    p.k = x.size(last) * x_packing;
    p.groups = grouped_ ? x.size(last - 1) : 1;
    call_.expect(p.k <= kMostColumns, "x", "[..., K] with K at most 2^28", x);
    call_.expect(p.groups <= kMostGroups, "x", "[T, G, K] with G at most 65535", x);
    call_.expect_tensor("weight", weight, weight_dtypes, {kAny, p.k / weight_packing});
    const bool whole = p.groups > 0 ? weight.size(0) % p.groups == 0 : weight.size(0) == 0;
    call_.expect(whole, "weight", "[G * R, K] with the G of x [T, G, K]", weight);
    p.rows = p.groups > 0 ? weight.size(0) / p.groups : 0;
    const Rows rows = call_.rows("x", x, 1);
    p.tokens = p.groups > 0 ? rows.count / p.groups : 0;
    p.x = x.const_data_ptr();
    p.x_stride = rows.stride;
    p.weight = weight.const_data_ptr();
    p.weight_stride = call_.rows("weight", weight, 1).stride;
  }

  void set_x_scale(const Tensor& x, const Tensor& scale, ScalarType dtype, int64_t group) {
    call_.expect(group > 0 && p.k % group == 0, "x", "[..., K] with K a multiple of " + std::to_string(group), x);
    call_.expect_rows_like("x_scale", scale, {dtype}, x, p.k / group);
    p.x_scale = static_cast<const uint8_t*>(scale.const_data_ptr());
    p.x_scale_stride = call_.rows("x_scale", scale, 1).stride;
  }

  // UE8M0 scales of groups of 32, 64 or 128, whatever x_scale has.
  void set_fp8_scale(const Tensor& x, const Tensor& scale) {
    call_.expect_rows("x_scale", scale, {kUint8});
    const int64_t groups = scale.size(scale.dim() - 1), group = groups > 0 ? p.k / groups : 0;
    call_.expect(group == 32 || group == 64 || group == 128, "x_scale",
                 "[T, K/group] uint8 with group 32, 64 or 128", scale);
    set_x_scale(x, scale, kUint8, group);
    p.x_group = static_cast<int>(group);
  }

  void set_weight_scale(const Tensor& scale, std::initializer_list<ScalarType> dtypes, int64_t rows, int64_t columns) {
    call_.expect_tensor("weight_scale", scale, dtypes, {rows, columns});
    p.weight_scale = scale.const_data_ptr();
    p.weight_scale_stride = call_.rows("weight_scale", scale, 1).stride;
    p.fp32_weight_scale = scale.scalar_type() == kFloat32;
  }

  void set_globals(const Tensor& x, const Tensor& x_global, const Tensor& weight_global) {
    const bool one = x_global.dim() == 1 && x_global.size(0) == 1;
    if (one) {
      call_.expect_tensor("x_global", x_global, {kFloat32}, {1});
    } else {
      call_.expect_rows_like("x_global", x_global, {kFloat32}, x, 1);
      p.x_global_stride = call_.rows("x_global", x_global, 4).stride;
    }
    if (weight_global.dim() == 0) {
      call_.expect_tensor("weight_global", weight_global, {kFloat32}, {});
    } else {
      call_.expect_tensor("weight_global", weight_global, {kFloat32}, {1});
    }
    p.x_global = data<float>(x_global);
    p.weight_global = data<float>(weight_global);
  }

  Tensor launch(Format format, const Tensor& x, Tensor y, ScalarType dtype, const Workspace& workspace) {
    expect_output(x, y, dtype);
    p.y = y.mutable_data_ptr();
    p.y_dtype = dtype == kBfloat16 ? Dtype::kBf16 : Dtype::kFp32;
    if (p.tokens == 0 || p.groups * p.rows == 0) return y;
    const bool large = large_serves(format, p);
    set_workspace(workspace, large ? large_floats(format, p) : partial_floats(format, p));
    call_.check(large ? launch_large(format, p, x.get_device_index(), call_.stream())
                      : launch_linear(format, p, call_.stream()));
    return y;
  }

  Product p{};

 private:
  void set_workspace(const Workspace& workspace, int64_t floats) {
    if (floats == 0) return;
    const std::string wanted = "at least " + std::to_string(floats) + " float32";
    STD_TORCH_CHECK(workspace.has_value(), "dsv4::", op_, ": workspace must be ", wanted, ", got None");
    call_.expect_tensor("workspace", *workspace, {kFloat32}, {kAny});
    call_.expect_contiguous("workspace", *workspace);
    call_.expect(workspace->numel() >= floats, "workspace", wanted, *workspace);
    call_.rows("workspace", *workspace, 16);
    p.partials = mutable_data<float>(*workspace);
  }

  // y [T, N]: x [T, K] without its last size, or x [T, G, K] without its last two.
  void expect_output(const Tensor& x, const Tensor& y, ScalarType dtype) const {
    const int64_t leading = x.dim() - (grouped_ ? 2 : 1);
    call_.expect_rows("y", y, {dtype}, p.groups * p.rows);
    bool fits = y.dim() == leading + 1 && y.is_contiguous();
    for (int64_t i = 0; fits && i < leading; ++i) fits = y.size(i) == x.size(i);
    call_.expect(fits, "y", "contiguous [T, N] with the leading sizes of x", y);
  }

  Call call_;
  const char* op_;
  bool grouped_;
};

template <bool kGrouped>
Tensor linear_dense(const Tensor& x, const Tensor& weight, Tensor y, Workspace workspace) {
  Operands operands(kGrouped ? "grouped_linear_dense" : "linear_dense", kGrouped, x);
  operands.set(x, weight, {kBfloat16, kFloat32}, {kBfloat16, kFloat32}, 1, 1);
  operands.p.x_dtype = dtype_of(x);
  operands.p.weight_dtype = dtype_of(weight);
  return operands.launch(Format::kDense, x, y, x.scalar_type(), workspace);
}

Tensor linear_fp32(const Tensor& x, const Tensor& weight, Tensor y, Workspace workspace) {
  Operands operands("linear_fp32", false, x);
  operands.set(x, weight, {kBfloat16, kFloat32}, {kBfloat16, kFloat32}, 1, 1);
  operands.p.x_dtype = dtype_of(x);
  operands.p.weight_dtype = dtype_of(weight);
  return operands.launch(Format::kDense, x, y, kFloat32, workspace);
}

template <bool kGrouped>
Tensor linear_fp8(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale, Tensor y,
                  Workspace workspace) {
  Operands operands(kGrouped ? "grouped_linear_fp8" : "linear_fp8", kGrouped, x);
  operands.set(x, weight, {kE4m3}, {kE4m3}, 1, 1);
  operands.set_fp8_scale(x, x_scale);
  operands.set_weight_scale(weight_scale, {kUint8, kFloat32}, blocks(weight.size(0)), blocks(operands.p.k));
  return operands.launch(Format::kFp8, x, y, kBfloat16, workspace);
}

template <bool kGrouped>
Tensor linear_w8a16(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, Tensor y, Workspace workspace) {
  Operands operands(kGrouped ? "grouped_linear_w8a16" : "linear_w8a16", kGrouped, x);
  operands.set(x, weight, {kBfloat16}, {kE4m3}, 1, 1);
  operands.p.x_dtype = Dtype::kBf16;
  operands.set_weight_scale(weight_scale, {kUint8}, blocks(weight.size(0)), blocks(operands.p.k));
  return operands.launch(Format::kW8a16, x, y, kBfloat16, workspace);
}

template <bool kGrouped>
Tensor linear_mxfp4(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale, Tensor y,
                    Workspace workspace) {
  Operands operands(kGrouped ? "grouped_linear_mxfp4" : "linear_mxfp4", kGrouped, x);
  operands.set(x, weight, {kE4m3}, {kUint8}, 1, 2);
  operands.set_fp8_scale(x, x_scale);
  operands.set_weight_scale(weight_scale, {kUint8}, weight.size(0), operands.p.k / kMxfp4Group);
  return operands.launch(Format::kMxfp4, x, y, kBfloat16, workspace);
}

template <bool kGrouped>
Tensor linear_nvfp4(const Tensor& x, const Tensor& x_scale, const Tensor& x_global, const Tensor& weight,
                    const Tensor& weight_scale, const Tensor& weight_global, Tensor y, Workspace workspace) {
  Operands operands(kGrouped ? "grouped_linear_nvfp4" : "linear_nvfp4", kGrouped, x);
  operands.set(x, weight, {kUint8}, {kUint8}, 2, 2);
  operands.set_x_scale(x, x_scale, kE4m3, kNvfp4Group);
  operands.set_weight_scale(weight_scale, {kE4m3}, weight.size(0), operands.p.k / kNvfp4Group);
  operands.set_globals(x, x_global, weight_global);
  return operands.launch(Format::kNvfp4, x, y, kBfloat16, workspace);
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("linear_dense.out", TORCH_BOX(&linear_dense<false>));
  m.impl("linear_fp32.out", TORCH_BOX(&linear_fp32));
  m.impl("linear_fp8.out", TORCH_BOX(&linear_fp8<false>));
  m.impl("linear_mxfp4.out", TORCH_BOX(&linear_mxfp4<false>));
  m.impl("linear_nvfp4.out", TORCH_BOX(&linear_nvfp4<false>));
  m.impl("linear_w8a16.out", TORCH_BOX(&linear_w8a16<false>));
  m.impl("grouped_linear_dense.out", TORCH_BOX(&linear_dense<true>));
  m.impl("grouped_linear_fp8.out", TORCH_BOX(&linear_fp8<true>));
  m.impl("grouped_linear_mxfp4.out", TORCH_BOX(&linear_mxfp4<true>));
  m.impl("grouped_linear_nvfp4.out", TORCH_BOX(&linear_nvfp4<true>));
  m.impl("grouped_linear_w8a16.out", TORCH_BOX(&linear_w8a16<true>));
}

}  // namespace
}  // namespace dsv4
