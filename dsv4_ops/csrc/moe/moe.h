// Launchers of the family `moe`; shapes and dtypes are those of dsv4_ops/ops/moe.py.
//
// All four ops are one computation on a `Moe`: products with w1 and w3, SwiGLU, quantisation, product with w2, sum over
// the slots of a row, sum of that and what the shared expert made of it. A pair is one slot of one token, number token
// * k + slot. launch_moe chooses who computes it:
//
//   prefill   many tokens: where prefill_serves says so (prefill_dispatch.cpp)
//   decode    few tokens: weights are streamed once for all pairs of an expert (decode.cu)
//   plain     widths that are no multiples of 128, groups of x that are not 128, fp32: CUDA cores (plain.cu)
//
// Who computes a token depends on widths, dtypes and, beyond what a decode step has, on the number of tokens.
//
// Workspace, from its start (each part at a multiple of 16 bytes; dsv4_ops/ops/moe_workspace.py has the same numbers):
//
//   h        [pairs, inner]  activation dtype   after SwiGLU and the route weight
//   results  [pairs, d]      activation dtype   what w2 makes of it; the sum over the slots reads it
//   steps    [pairs]         fp32               global scale of h, where it is quantised in memory (plain, NVFP4)
//
// A prefill has a map of its own (prefill_dispatch.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/types.h"

namespace dsv4 {

// kMxfp4Folded is no format of an op: MXFP4 as a prefill on the tensor cores' FP8 takes it (prefill_fold.cuh).
enum class MoeFormat { kDense, kFp8, kMxfp4, kNvfp4, kMxfp4Folded };

constexpr int kMoeWidth = 128;  // widths that decode and prefill take are multiples of it

// One projection of all experts, contiguous: [experts, rows, columns], FP4 packed by two.
struct MoeWeight {
  const void* weight;
  Dtype dtype;        // dense: of the weight; FP8: kFp32 if the scales are fp32, kBf16 if they are UE8M0
  const void* scale;  // FP8 [experts, ceil(rows / 128), ceil(columns / 128)], FP4 [experts, rows, columns / group]
  const float* global;  // NVFP4: [experts]
};

struct Moe {
  MoeFormat format;
  int64_t tokens;
  int k, experts, d, inner;
  float limit;

  const void* x;     // tokens rows of d, FP4 packed by two
  Dtype x_dtype;     // the activation dtype: fp32 in dense alone
  int64_t x_stride;  // bytes from row to row; the other strides are in elements
  const void* x_scale;  // FP8 input: UE8M0, d / x_group a row; NVFP4: E4M3, d / 16
  int64_t x_scale_stride;
  int x_group;
  const float* x_global;  // NVFP4
  int64_t x_global_stride;  // 0: one for all rows

  const int* ids;  // tokens rows of k; outside 0 .. experts - 1: nothing is added
  int64_t ids_stride;
  const float* route_weights;  // tokens rows of k
  int64_t route_stride;

  MoeWeight w1, w3, w2;  // [inner, d], [inner, d], [d, inner] of every expert
  const void* shared;    // tokens rows of d in the activation dtype, added to the sum over the slots; or null
  int64_t shared_stride;
  void* y;               // tokens rows of d, contiguous: fp32, with `shared` the activation dtype
  uint8_t* workspace;    // workspace_bytes
};

struct MoeWorkspace {
  int64_t results, steps, size;  // bytes from the start of the workspace; h lies at 0
};

inline MoeWorkspace workspace_of(int64_t pairs, int64_t d, int64_t inner, Dtype activation) {
  const int64_t bytes = activation == Dtype::kBf16 ? 2 : 4;
  const auto part = [&](int64_t size) { return (size + 15) / 16 * 16; };
  const int64_t results = part(pairs * inner * bytes), steps = results + part(pairs * d * bytes);
  return {results, steps, steps + part(pairs * 4)};
}

inline MoeWorkspace workspace_of(const Moe& moe) {
  return workspace_of(moe.tokens * moe.k, moe.d, moe.inner, moe.x_dtype);
}

// Whether decode and prefill can take it: what they load in 16 bytes starts at multiples of 16 bytes.
inline bool has_wide_rows(const Moe& moe) {
  const bool weights_bf16 =
      moe.w1.dtype == Dtype::kBf16 && moe.w3.dtype == Dtype::kBf16 && moe.w2.dtype == Dtype::kBf16;
  return moe.d % kMoeWidth == 0 && moe.inner % kMoeWidth == 0 && moe.x_dtype == Dtype::kBf16 &&
         (moe.format != MoeFormat::kDense || weights_bf16) &&
         ((moe.format != MoeFormat::kFp8 && moe.format != MoeFormat::kMxfp4) || moe.x_group == kMoeWidth);
}

// Whoever serves it, in this order: prefill, decode, plain.
cudaError_t launch_moe(const Moe& moe, cudaStream_t stream);

// Many tokens (prefill_dispatch.cpp): whether there is a kernel for this GPU, format and number of tokens. Asked only
// where has_wide_rows. It must not serve decode steps (up to 64 tokens): their rows keep their bits in every batch.
bool prefill_serves(const Moe& moe);
cudaError_t launch_moe_prefill(const Moe& moe, cudaStream_t stream);

// Bytes of workspace that whoever serves a call needs.
int64_t workspace_bytes(const Moe& moe);

// Products and SwiGLU: h and results in the workspace.
cudaError_t launch_moe_decode(const Moe& moe, cudaStream_t stream);
cudaError_t launch_moe_plain(const Moe& moe, cudaStream_t stream);

// y = the sum of every token's results over its slots, in their order, in fp32; shared + that, rounded once.
cudaError_t launch_moe_combine(const Moe& moe, cudaStream_t stream);

}  // namespace dsv4
