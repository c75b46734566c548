#include "gemm/large.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "common/bind.h"
#include "common/device.h"
#include "gemm/plan.h"
#include "moe/prefill.h"

namespace dsv4 {
namespace {

constexpr int64_t kBlock = 128;            // of FP8 scales
constexpr int64_t kLibraryGrain = 16;      // tokens: cuBLASLt wants scales at 16-byte distances, and more for speed
constexpr int64_t kLeastGroupedFp8 = 512;  // tokens from which a launch for each group pays
constexpr int64_t kLeastW8a16 = 193;       // tokens from which converting the weight pays: four streams
constexpr int64_t kMostBlockColumns = 1 << 17;
constexpr int kBlockScaling = 12090;  // the CUDA runtime whose cuBLASLt has scales of blocks

int64_t of_library(int64_t tokens) { return tokens / kLibraryGrain * kLibraryGrain; }

bool aligned(const void* data, int64_t stride, int64_t to) {
  return reinterpret_cast<uintptr_t>(data) % to == 0 && stride % to == 0;
}

bool has_block_scaling() {
  int runtime = 0;
  return on_hopper() && cudaRuntimeGetVersion(&runtime) == cudaSuccess && runtime >= kBlockScaling;
}

// k a multiple of four blocks: the one distance between rows of weight scales that all versions of torch agree on.
bool fp8_serves(const Product& p) {
  const int64_t blocks = p.k / kBlock;
  const bool widths = p.k > 0 && p.k % (4 * kBlock) == 0 && p.k <= kMostBlockColumns && p.rows % kBlock == 0;
  if (!widths || p.x_group != kBlock || p.tokens < (p.groups > 1 ? kLeastGroupedFp8 : 0)) return false;
  return aligned(p.x, p.x_stride, 16) && aligned(p.weight, p.weight_stride, 16) &&
         aligned(p.x_scale, p.x_scale_stride, 4) && aligned(p.weight_scale, 0, 16) &&
         p.weight_scale_stride == blocks && has_block_scaling();
}

// What torch's product takes of bf16 operands, but for the weight.
bool dense_x_serves(const Product& p) {
  const bool widths = p.k > 0 && p.k % 8 == 0 && p.rows % 8 == 0;
  return widths && p.x_dtype == Dtype::kBf16 && aligned(p.x, 2 * p.x_stride, 16) &&
         (p.groups == 1 || p.y_dtype == Dtype::kBf16);
}

bool dense_serves(const Product& p) {
  return dense_x_serves(p) && p.weight_dtype == Dtype::kBf16 && aligned(p.weight, 2 * p.weight_stride, 16);
}

bool w8a16_serves(const Product& p) {
  return dense_x_serves(p) && p.tokens >= kLeastW8a16 && p.k % 16 == 0 && aligned(p.weight, p.weight_stride, 16);
}

LinearPrefill fp4_product(Format format, const Product& p) {
  LinearPrefill linear{};
  linear.format = format == Format::kMxfp4 ? MoeFormat::kMxfp4 : MoeFormat::kNvfp4;
  linear.x = p.x;
  linear.x_stride = p.x_stride;
  linear.x_scale = p.x_scale;
  linear.x_scale_stride = p.x_scale_stride;
  linear.x_group = p.x_group;
  linear.x_global = p.x_global;
  linear.x_global_stride = p.x_global_stride;
  linear.tokens = p.tokens;
  linear.k = static_cast<int>(p.k);
  linear.out = static_cast<int>(p.rows);
  linear.weight = p.weight;
  linear.weight_pitch = p.weight_stride;
  linear.weight_scale = p.weight_scale;
  linear.scale_pitch = p.weight_scale_stride;
  linear.weight_global = p.weight_global;
  linear.y = p.y;
  linear.workspace = reinterpret_cast<uint8_t*>(p.partials);
  return linear;
}

// A tensor over memory that someone else owns.
template <size_t kDims>
Tensor view(const void* data, ScalarType dtype, std::array<int64_t, kDims> sizes, std::array<int64_t, kDims> strides,
            int device) {
  const torch::stable::Device on(torch::headeronly::DeviceType::CUDA, static_cast<int8_t>(device));
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), kDims}, {strides.data(), kDims}, on, dtype);
}

// Call an operator of torch whose result is its last argument.
template <typename... Arguments>
void call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result's handle is ours to let go
}

void multiply_dense(const Product& p, int device) {
  const ScalarType y_dtype = p.y_dtype == Dtype::kBf16 ? kBfloat16 : kFloat32;
  const int64_t columns = p.groups * p.rows;
  if (p.groups == 1) {
    const Tensor x = view<2>(p.x, kBfloat16, {p.tokens, p.k}, {p.x_stride, 1}, device);
    const Tensor weight = view<2>(p.weight, kBfloat16, {p.k, p.rows}, {1, p.weight_stride}, device);
    const Tensor y = view<2>(p.y, y_dtype, {p.tokens, p.rows}, {columns, 1}, device);
    if (y_dtype == kBfloat16) {
      call("aten::mm", "out", x, weight, y);
    } else {
      call("aten::mm", "dtype_out", x, weight, y_dtype, y);
    }
    return;
  }
  const int64_t x_stride = p.groups * p.x_stride, weight_group = p.rows * p.weight_stride;
  const Tensor x = view<3>(p.x, kBfloat16, {p.groups, p.tokens, p.k}, {p.x_stride, x_stride, 1}, device);
  const Tensor weight =
      view<3>(p.weight, kBfloat16, {p.groups, p.k, p.rows}, {weight_group, 1, p.weight_stride}, device);
  call("aten::bmm", "out", x, weight,
       view<3>(p.y, y_dtype, {p.groups, p.tokens, p.rows}, {p.rows, columns, 1}, device));
}

cudaError_t launch_w8a16(const Product& p, int device, cudaStream_t stream) {
  const cudaError_t status = launch_convert_w8a16(p, stream);
  if (status != cudaSuccess) return status;
  Product dense = p;
  dense.weight = p.partials;
  dense.weight_dtype = Dtype::kBf16;
  dense.weight_stride = p.k;
  multiply_dense(dense, device);
  return cudaSuccess;
}

// The first `tokens` of the product; scales in fp32 as launch_fp8_scales leaves them.
void multiply_fp8(const Product& p, int64_t tokens, const float* x_scale, const float* weight_scale, int device) {
  const int64_t blocks = p.k / kBlock, row_blocks = p.rows / kBlock, columns = p.groups * p.rows;
  for (int64_t group = 0; group < p.groups; ++group) {
    const auto* const x = static_cast<const uint8_t*>(p.x) + group * p.x_stride;
    const auto* const weight = static_cast<const uint8_t*>(p.weight) + group * p.rows * p.weight_stride;
    auto* const y = static_cast<uint16_t*>(p.y) + group * p.rows;
    call("aten::_scaled_mm", "out", view<2>(x, kE4m3, {tokens, p.k}, {p.groups * p.x_stride, 1}, device),
         view<2>(weight, kE4m3, {p.k, p.rows}, {1, p.weight_stride}, device),
         view<2>(x_scale + group * blocks * tokens, kFloat32, {tokens, blocks}, {1, tokens}, device),
         view<2>(weight_scale + group * row_blocks * blocks, kFloat32, {blocks, row_blocks}, {1, blocks}, device),
         std::optional<Tensor>(), std::optional<Tensor>(), std::optional<ScalarType>(kBfloat16), false,
         view<2>(y, kBfloat16, {tokens, p.rows}, {columns, 1}, device));
  }
}

cudaError_t launch_fp8(const Product& p, int device, cudaStream_t stream) {
  const int64_t tokens = of_library(p.tokens), blocks = p.k / kBlock;
  float* const x_scale = p.partials;
  float* const weight_scale = x_scale + tokens * p.groups * blocks;
  const auto* const stored = static_cast<const uint8_t*>(p.weight_scale);
  const Fp8Scales scales{p.x_scale,
                         p.x_scale_stride,
                         p.fp32_weight_scale ? nullptr : stored,
                         p.groups * p.rows / kBlock * blocks,
                         x_scale,
                         weight_scale,
                         tokens,
                         static_cast<int>(p.groups),
                         static_cast<int>(blocks)};
  const cudaError_t status = launch_fp8_scales(scales, stream);
  if (status != cudaSuccess) return status;
  const auto* const fp32 = static_cast<const float*>(p.weight_scale);
  multiply_fp8(p, tokens, x_scale, p.fp32_weight_scale ? fp32 : weight_scale, device);
  Product rest = p;  // up to 15 tokens; sums of their ranges take the place of the scales
  rest.tokens -= tokens;
  rest.x = static_cast<const uint8_t*>(p.x) + tokens * p.groups * p.x_stride;
  rest.x_scale = p.x_scale + tokens * p.groups * p.x_scale_stride;
  rest.y = static_cast<uint16_t*>(p.y) + tokens * p.groups * p.rows;
  return launch_linear(Format::kFp8, rest, stream);
}

}  // namespace

bool large_serves(Format format, const Product& product) {
  if (product.tokens <= kTokensAtOnce || !aligned(product.y, 0, 16)) return false;
  switch (format) {
    case Format::kDense: return dense_serves(product);
    case Format::kFp8: return fp8_serves(product);
    case Format::kW8a16: return w8a16_serves(product);
    default: return product.groups == 1 && linear_prefill_serves(fp4_product(format, product));
  }
}

int64_t large_floats(Format format, const Product& product) {
  switch (format) {
    case Format::kDense: return 0;
    case Format::kW8a16: return product.groups * product.rows * product.k / 2;
    case Format::kFp8: {
      Product rest = product;
      rest.tokens -= of_library(product.tokens);
      const int64_t blocks = product.k / kBlock;
      const int64_t scales = product.groups * (of_library(product.tokens) + product.rows / kBlock) * blocks;
      return std::max(scales, partial_floats(format, rest));
    }
    default: return linear_prefill_workspace_size(product.tokens, product.k) / static_cast<int64_t>(sizeof(float));
  }
}

cudaError_t launch_large(Format format, const Product& product, int device, cudaStream_t stream) {
  switch (format) {
    case Format::kDense: multiply_dense(product, device); return cudaSuccess;
    case Format::kFp8: return launch_fp8(product, device, stream);
    case Format::kW8a16: return launch_w8a16(product, device, stream);
    default: return launch_linear_fp4_prefill(fp4_product(format, product), stream);
  }
}

}  // namespace dsv4
