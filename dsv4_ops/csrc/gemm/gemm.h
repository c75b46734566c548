// Launchers of the family `gemm`: y = x @ weight^T. fp32 accumulation, one rounding at the end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/types.h"

namespace dsv4 {

// kW8a16: bf16 x and E4M3 weights.
enum class Format { kDense, kFp8, kMxfp4, kNvfp4, kW8a16 };

constexpr int kFewTokens = 8;      // up to so many tokens no product needs a workspace
constexpr int kTokensAtOnce = 64;  // what one launch takes: more tokens are several launches

// A product of x [tokens, groups, k] with weight [groups * rows, k], group by group. Distances between rows are in
// elements as they are stored (bytes, but for dense operands).
struct Product {
  const void* x;
  Dtype x_dtype;  // of dense operands
  int64_t x_stride;
  const uint8_t* x_scale;  // UE8M0 (FP8 x) or E4M3 (NVFP4 x)
  int64_t x_scale_stride;
  const float* x_global;  // NVFP4
  int64_t x_global_stride;  // 0: one for all
  const void* weight;
  Dtype weight_dtype;
  int64_t weight_stride;
  const void* weight_scale;
  int64_t weight_scale_stride;
  bool fp32_weight_scale;  // of kFp8
  const float* weight_global;
  void* y;  // [tokens, groups * rows]
  Dtype y_dtype;
  float* partials;         // workspace, at least partial_floats(format, product) of it
  int64_t tokens, groups, rows, k;
  int x_group;  // of FP8 x
};

// fp32 numbers of workspace that launch_linear needs.
int64_t partial_floats(Format format, const Product& product);

cudaError_t launch_linear(Format format, const Product& product, cudaStream_t stream);

// The parts of launch_linear. Up to 64 tokens of operands as can_stream (plan.h) wants them:
cudaError_t launch_stream_dense(const Product& product, int64_t first_token, int tokens, cudaStream_t stream);
cudaError_t launch_stream_fp8(const Product& product, int64_t first_token, int tokens, cudaStream_t stream);
cudaError_t launch_stream_mxfp4(const Product& product, int64_t first_token, int tokens, cudaStream_t stream);
cudaError_t launch_stream_nvfp4(const Product& product, int64_t first_token, int tokens, cudaStream_t stream);
cudaError_t launch_stream_w8a16(const Product& product, int64_t first_token, int tokens, cudaStream_t stream);
// Any operands:
cudaError_t launch_linear_plain(Format format, const Product& product, cudaStream_t stream);
// Sums of ranges that a stream left in the workspace -> y:
cudaError_t launch_add_ranges(Format format, const Product& product, int64_t first_token, int tokens, int ranges,
                              cudaStream_t stream);

}  // namespace dsv4
