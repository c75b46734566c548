#include <optional>

#include "common/bind.h"
#include "moe/moe.h"

namespace dsv4 {
namespace {

using Shared = std::optional<Tensor>;
using Workspace = std::optional<Tensor>;

constexpr int64_t kBlock = 128;  // rows and columns of an FP8 weight that share a scale
constexpr int64_t kMxfp4Group = 32;
constexpr int64_t kNvfp4Group = 16;
constexpr int64_t kMostExperts = 1 << 16;
constexpr int64_t kMostSlots = 1024;
constexpr int64_t kMostWidth = 1 << 20;

int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// A call in the making: what all formats check the same way.
class Arguments {
 public:
  Arguments(const char* op, MoeFormat format, const Tensor& x) : call_(op, x), op_(op) {
    moe.format = format;
    moe.x_dtype = Dtype::kBf16;
  }

  // x [T, d] with `x_packing` values an element, w1 [E, I, d] with `packing`; ids and route weights [T, k].
  void set(const Tensor& x, std::initializer_list<ScalarType> dtypes, int64_t x_packing, const Tensor& w1,
           int64_t packing, const Tensor& ids, const Tensor& weights, double limit) {
    packing_ = packing;
    moe.limit = static_cast<float>(limit);
    call_.expect_rows("x", x, dtypes);
    call_.expect(x.dim() >= 2, "x", "[T, d]", x);
    const int64_t d = x.size(x.dim() - 1) * x_packing;
    const bool fits = w1.dim() == 3 && w1.size(2) * packing == d && w1.size(1) % packing == 0 && d <= kMostWidth &&
                      w1.size(0) <= kMostExperts && w1.size(1) <= kMostWidth;
    const std::string width = std::to_string(d) + (packing == 2 ? ", packed by two" : "");
    call_.expect(fits, "w1", "[E, I, d] with d = " + width + ", E at most 65536 and I at most 2^20", w1);
    moe.d = static_cast<int>(d);
    moe.experts = static_cast<int>(w1.size(0));
    moe.inner = static_cast<int>(w1.size(1));
    moe.tokens = row_count(x);
    call_.expect_rows("ids", ids, {kInt32});
    const int64_t k = ids.size(ids.dim() - 1);
    call_.expect_rows_like("ids", ids, {kInt32}, x, k);
    call_.expect_rows_like("weights", weights, {kFloat32}, x, k);
    call_.expect(k <= kMostSlots && moe.tokens * k < (int64_t{1} << 31), "ids",
                 "[T, k] with k at most 1024 and fewer than 2^31 pairs", ids);
    moe.k = static_cast<int>(k);
    moe.ids = data<int>(ids);
    moe.ids_stride = call_.rows("ids", ids, 4).stride;
    moe.route_weights = data<float>(weights);
    moe.route_stride = call_.rows("weights", weights, 4).stride;
  }

  void set_x_scale(const Tensor& x, const Tensor& scale, ScalarType dtype, int64_t group) {
    call_.expect(group > 0 && moe.d % group == 0, "x", "[T, d] with d a multiple of " + std::to_string(group), x);
    call_.expect_rows_like("x_scale", scale, {dtype}, x, moe.d / group);
    moe.x_scale = scale.const_data_ptr();
    moe.x_scale_stride = call_.rows("x_scale", scale, 1).stride;
    moe.x_group = static_cast<int>(group);
  }

  // UE8M0 scales of groups of 32, 64 or 128, whatever x_scale has.
  void set_fp8_scale(const Tensor& x, const Tensor& scale) {
    call_.expect_rows("x_scale", scale, {kUint8});
    const int64_t groups = scale.size(scale.dim() - 1), group = groups > 0 ? moe.d / groups : 0;
    call_.expect(group == 32 || group == 64 || group == 128, "x_scale", "[T, d/group] with group 32, 64 or 128",
                 scale);
    set_x_scale(x, scale, kUint8, group);
  }

  void set_x_global(const Tensor& x, const Tensor& scale) {
    if (scale.dim() == 1 && scale.numel() == 1) {
      call_.expect_tensor("x_global", scale, {kFloat32}, {1});
    } else {
      call_.expect_rows_like("x_global", scale, {kFloat32}, x, 1);
      moe.x_global_stride = call_.rows("x_global", scale, 4).stride;
    }
    moe.x_global = data<float>(scale);
  }

  MoeWeight weight(const char* name, const Tensor& weight, std::initializer_list<ScalarType> dtypes, int64_t rows,
                   int64_t columns) const {
    call_.expect_tensor(name, weight, dtypes, {moe.experts, rows, columns / packing_});
    call_.expect_contiguous(name, weight);
    return {weight.const_data_ptr(), Dtype::kBf16, nullptr, nullptr};
  }

  // Widths that the groups of h fill: FP8 of 32, 64 or 128, FP4 like the weights.
  void expect_inner(const Tensor& w1, int64_t group) const {
    call_.expect(moe.inner % group == 0, "w1", "[E, I, d] with I a multiple of " + std::to_string(group), w1);
  }

  void set_weight_scale(MoeWeight& weight, const char* name, const Tensor& scale,
                        std::initializer_list<ScalarType> dtypes, int64_t rows, int64_t columns) const {
    call_.expect_tensor(name, scale, dtypes, {moe.experts, rows, columns});
    call_.expect_contiguous(name, scale);
    weight.scale = scale.const_data_ptr();
    if (scale.scalar_type() == kFloat32) weight.dtype = Dtype::kFp32;
  }

  void set_weight_global(MoeWeight& weight, const char* name, const Tensor& scale) const {
    call_.expect_tensor(name, scale, {kFloat32}, {moe.experts});
    call_.expect_contiguous(name, scale);
    weight.global = data<float>(scale);
  }

  Tensor launch(const Tensor& x, const Tensor& w1, const Tensor& w3, const Tensor& w2, const Shared& shared, Tensor y,
                const Workspace& workspace) {
    const ScalarType activation = moe.x_dtype == Dtype::kBf16 ? kBfloat16 : kFloat32;
    call_.expect_output("y", y, shared.has_value() ? activation : kFloat32, x, moe.d);
    moe.y = y.mutable_data_ptr();
    if (shared.has_value()) {
      call_.expect_rows_like("shared", *shared, {activation}, x, moe.d);
      moe.shared = shared->const_data_ptr();
      moe.shared_stride = call_.rows("shared", *shared, moe.d % 8 == 0 ? 16 : 1).stride;
    }
    // What starts at multiples of 16 bytes where rows are loaded whole.
    const int alignment = has_wide_rows(moe) ? 16 : 1;
    moe.x = x.const_data_ptr();
    moe.x_stride = call_.rows("x", x, alignment).stride * static_cast<int64_t>(x.element_size());
    call_.rows("w1", w1, alignment);
    call_.rows("w3", w3, alignment);
    call_.rows("w2", w2, alignment);
    const int64_t bytes = workspace_bytes(moe);
    if (bytes > 0) {
      const std::string wanted = "at least " + std::to_string(bytes) + " uint8 at a multiple of 16 bytes";
      STD_TORCH_CHECK(workspace.has_value(), "dsv4::", op_, ": workspace must be ", wanted, ", got None");
      call_.expect_tensor("workspace", *workspace, {kUint8}, {kAny});
      call_.expect_contiguous("workspace", *workspace);
      moe.workspace = mutable_data<uint8_t>(*workspace);
      const bool fits = workspace->numel() >= bytes && reinterpret_cast<uintptr_t>(moe.workspace) % 16 == 0;
      call_.expect(fits, "workspace", wanted, *workspace);
    }
    call_.check(launch_moe(moe, call_.stream()));
    return y;
  }

  Moe moe{};

 private:
  Call call_;
  const char* op_;
  int64_t packing_ = 1;
};

Tensor moe_dense(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w3,
                 const Tensor& w2, double limit, const Shared& shared, Tensor y, Workspace workspace) {
  Arguments arguments("moe_dense", MoeFormat::kDense, x);
  Moe& moe = arguments.moe;
  arguments.set(x, {kBfloat16, kFloat32}, 1, w1, 1, ids, weights, limit);
  moe.x_dtype = dtype_of(x);
  const auto dense = [&](const char* name, const Tensor& w, int64_t rows, int64_t columns) {
    MoeWeight weight = arguments.weight(name, w, {kBfloat16, kFloat32}, rows, columns);
    weight.dtype = dtype_of(w);
    return weight;
  };
  moe.w1 = dense("w1", w1, moe.inner, moe.d);
  moe.w3 = dense("w3", w3, moe.inner, moe.d);
  moe.w2 = dense("w2", w2, moe.d, moe.inner);
  return arguments.launch(x, w1, w3, w2, shared, y, workspace);
}

Tensor moe_fp8(const Tensor& x, const Tensor& x_scale, const Tensor& ids, const Tensor& weights, const Tensor& w1,
               const Tensor& w1_scale, const Tensor& w3, const Tensor& w3_scale, const Tensor& w2,
               const Tensor& w2_scale, double limit, const Shared& shared, Tensor y, Workspace workspace) {
  Arguments arguments("moe_fp8", MoeFormat::kFp8, x);
  Moe& moe = arguments.moe;
  arguments.set(x, {kE4m3}, 1, w1, 1, ids, weights, limit);
  arguments.set_fp8_scale(x, x_scale);
  arguments.expect_inner(w1, 32);
  const auto fp8 = [&](const char* name, const Tensor& w, const char* scale_name, const Tensor& scale, int64_t rows,
                       int64_t columns) {
    MoeWeight weight = arguments.weight(name, w, {kE4m3}, rows, columns);
    arguments.set_weight_scale(weight, scale_name, scale, {kUint8, kFloat32}, blocks(rows), blocks(columns));
    return weight;
  };
  moe.w1 = fp8("w1", w1, "w1_scale", w1_scale, moe.inner, moe.d);
  moe.w3 = fp8("w3", w3, "w3_scale", w3_scale, moe.inner, moe.d);
  moe.w2 = fp8("w2", w2, "w2_scale", w2_scale, moe.d, moe.inner);
  return arguments.launch(x, w1, w3, w2, shared, y, workspace);
}

Tensor moe_mxfp4(const Tensor& x, const Tensor& x_scale, const Tensor& ids, const Tensor& weights, const Tensor& w1,
                 const Tensor& w1_scale, const Tensor& w3, const Tensor& w3_scale, const Tensor& w2,
                 const Tensor& w2_scale, double limit, const Shared& shared, Tensor y, Workspace workspace) {
  Arguments arguments("moe_mxfp4", MoeFormat::kMxfp4, x);
  Moe& moe = arguments.moe;
  arguments.set(x, {kE4m3}, 1, w1, 2, ids, weights, limit);
  arguments.set_fp8_scale(x, x_scale);
  arguments.expect_inner(w1, 32);
  const auto mxfp4 = [&](const char* name, const Tensor& w, const char* scale_name, const Tensor& scale, int64_t rows,
                         int64_t columns) {
    MoeWeight weight = arguments.weight(name, w, {kUint8}, rows, columns);
    arguments.set_weight_scale(weight, scale_name, scale, {kUint8}, rows, columns / kMxfp4Group);
    return weight;
  };
  moe.w1 = mxfp4("w1", w1, "w1_scale", w1_scale, moe.inner, moe.d);
  moe.w3 = mxfp4("w3", w3, "w3_scale", w3_scale, moe.inner, moe.d);
  moe.w2 = mxfp4("w2", w2, "w2_scale", w2_scale, moe.d, moe.inner);
  return arguments.launch(x, w1, w3, w2, shared, y, workspace);
}

Tensor moe_nvfp4(const Tensor& x, const Tensor& x_scale, const Tensor& x_global, const Tensor& ids,
                 const Tensor& weights, const Tensor& w1, const Tensor& w1_scale, const Tensor& w1_global,
                 const Tensor& w3, const Tensor& w3_scale, const Tensor& w3_global, const Tensor& w2,
                 const Tensor& w2_scale, const Tensor& w2_global, double limit, const Shared& shared, Tensor y,
                 Workspace workspace) {
  Arguments arguments("moe_nvfp4", MoeFormat::kNvfp4, x);
  Moe& moe = arguments.moe;
  arguments.set(x, {kUint8}, 2, w1, 2, ids, weights, limit);
  arguments.set_x_scale(x, x_scale, kE4m3, kNvfp4Group);
  arguments.set_x_global(x, x_global);
  arguments.expect_inner(w1, kNvfp4Group);
  const auto nvfp4 = [&](const char* name, const Tensor& w, const char* scale_name, const Tensor& scale,
                         const char* global_name, const Tensor& global, int64_t rows, int64_t columns) {
    MoeWeight weight = arguments.weight(name, w, {kUint8}, rows, columns);
    arguments.set_weight_scale(weight, scale_name, scale, {kE4m3}, rows, columns / kNvfp4Group);
    arguments.set_weight_global(weight, global_name, global);
    return weight;
  };
  moe.w1 = nvfp4("w1", w1, "w1_scale", w1_scale, "w1_global", w1_global, moe.inner, moe.d);
  moe.w3 = nvfp4("w3", w3, "w3_scale", w3_scale, "w3_global", w3_global, moe.inner, moe.d);
  moe.w2 = nvfp4("w2", w2, "w2_scale", w2_scale, "w2_global", w2_global, moe.d, moe.inner);
  return arguments.launch(x, w1, w3, w2, shared, y, workspace);
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("moe_dense.out", TORCH_BOX(&moe_dense));
  m.impl("moe_fp8.out", TORCH_BOX(&moe_fp8));
  m.impl("moe_mxfp4.out", TORCH_BOX(&moe_mxfp4));
  m.impl("moe_nvfp4.out", TORCH_BOX(&moe_nvfp4));
}

}  // namespace
}  // namespace dsv4
