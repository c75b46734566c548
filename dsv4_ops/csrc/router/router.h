// Launchers of the family `router`; shapes and dtypes are those of dsv4_ops/ops/router.py.
//
// `gate` is two launches: the product x . weight^T, then the choice of experts (gate_topk). Between them lie sums over
// parts of d, [rows, parts, experts] fp32: one part for each slice of d where there are few rows, so that every SM
// streams some of the weights, and two where there are many, so that little has to be written. A logit is always the
// same sum of the same terms in the same order,
//
//   logit = (slice 0 + ... + slice h - 1) + (slice h + ... + last slice),   h = ceil(slices / 2), left to right,
//
// and what a slice is made of depends on neither the number of rows nor the other rows. dsv4_ops/ops/router.py
// allocates the workspace with the same numbers.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

constexpr int kMaxExperts = 1024;
constexpr int kMaxChosen = 32;   // slots of a row
constexpr int kFewRows = 256;    // up to here a part is a slice
constexpr int kSliceBf16 = 512;  // columns of a slice, x and weight both bf16
constexpr int kSliceFp32 = 128;  // columns of a slice otherwise

struct GateProduct {
  const void* x;  // rows.count rows of d
  Dtype x_dtype;
  Rows rows;
  const void* weight;  // `experts` rows of d
  Dtype weight_dtype;
  int64_t weight_stride;
  int experts;
};

struct GateChoice {
  const float* bias;     // [experts]
  const int* fixed_ids;  // rows of k
  int64_t fixed_stride;
  int k;
  float route_scale;
  int* ids;        // [rows, k]
  float* weights;  // [rows, k]
};

inline bool is_bf16(const GateProduct& p) { return p.x_dtype == Dtype::kBf16 && p.weight_dtype == Dtype::kBf16; }

inline int slice_count(const GateProduct& p) {
  const int width = is_bf16(p) ? kSliceBf16 : kSliceFp32;
  return static_cast<int>((p.rows.width + width - 1) / width);
}

inline int part_count(const GateProduct& p) { return p.rows.count <= kFewRows ? slice_count(p) : 2; }

inline int64_t workspace_size(const GateProduct& p) { return p.rows.count * part_count(p) * p.experts; }

// parts: workspace_size floats.
cudaError_t launch_gate(const GateProduct& product, const GateChoice& choice, float* parts, cudaStream_t stream);

// The product alone, for operands that are not both bf16.
cudaError_t launch_gate_product_fp32(const GateProduct& product, float* parts, cudaStream_t stream);

// logits: `rows` rows of `parts` parts of `experts` sums, `stride` elements from row to row.
cudaError_t launch_gate_topk(const float* logits, int64_t rows, int64_t stride, int parts, int experts,
                             const GateChoice& choice, cudaStream_t stream);

// The same for more than kFewRows rows of one or two parts.
cudaError_t launch_gate_topk_many(const float* logits, int64_t rows, int64_t stride, int parts, int experts,
                                  const GateChoice& choice, cudaStream_t stream);

}  // namespace dsv4
