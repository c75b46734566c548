// Launchers of the family `indexer`; shapes and dtypes are those of dsv4_ops/ops/indexer.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/rope.h"
#include "common/types.h"

namespace dsv4 {

enum class IndexForm { kPlain, kFp8, kFp4 };

// Queries q [T, heads, dim] with heads `stride` elements apart, and their weights [T, heads] with tokens
// `weights_stride` apart.
struct IndexQuery {
  const void* q;
  Dtype dtype;
  int64_t rows;  // T * heads
  int heads;
  int dim;
  int64_t stride;
  const void* weights;
  Dtype weights_dtype;
  int64_t weights_stride;
};

// Codes of q (fp32, E4M3 or E2M1 pairs), for FP4 `scales` [T, heads, dim / 32] UE8M0, and w [T, heads] fp32.
cudaError_t launch_index_query(IndexForm form, const IndexQuery& query, const Rope& rope, void* codes, uint8_t* scales,
                               float* w, cudaStream_t stream);

}  // namespace dsv4
