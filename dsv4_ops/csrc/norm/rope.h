// Launchers of the family `norm` that rotate: shapes and dtypes are those of dsv4_ops/ops/norm.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/pool.h"
#include "common/rope.h"
#include "common/types.h"

namespace dsv4 {

constexpr int kNormRopeMaxDim = 1024;     // D of a row
constexpr int kNormRopeMaxRopeDim = 256;  // its rotated channels

// q [T, heads, dim]: heads are read `stride` elements apart at x and written `out_stride` apart at y. x may be y.
struct Heads {
  const void* x;
  void* y;
  Dtype dtype;
  int64_t tokens;
  int heads;
  int dim;
  int64_t stride;
  int64_t out_stride;
};

// kv [T, dim], rows `stride` elements apart, and the pool of the window.
struct WindowRows {
  const void* x;
  Dtype dtype;
  int64_t tokens;
  int dim;
  int64_t stride;
  const void* weight;  // [dim]
  Dtype weight_dtype;
  Pool pool;
};

cudaError_t launch_q_norm_rope(const Heads& q, const Rope& rope, float eps, cudaStream_t stream);

cudaError_t launch_kv_norm_rope_append(const WindowRows& kv, const Rope& rope, float eps, cudaStream_t stream);

// Both in one launch; q and kv have the same tokens, dim and dtype.
cudaError_t launch_qkv_norm_rope_append(const Heads& q, const WindowRows& kv, const Rope& rope, float eps,
                                        cudaStream_t stream);

}  // namespace dsv4
