// Launchers of sparse_attention_mixed; shapes and dtypes are those of dsv4_ops/ops/attention_mixed.py.
#pragma once

#include "attention/attention.h"

namespace dsv4 {

// Where the element of a vector [B, S, H] lies, in elements from the first one.
struct VectorStrides {
  int64_t sequence, token, head;
};

// Queries in two parts: E4M3 codes with one scale for all, and rope dimensions in bf16.
struct MixedQueries {
  const uint8_t* nope;  // [B, S, H, D - R]
  VectorStrides nope_strides;
  const float* scale;  // [B, S, H]
  VectorStrides scale_strides;
  const void* rope;  // [B, S, H, R] bf16
  VectorStrides rope_strides;
};

// attention.q is null, attention.dtype that of o: bf16.
struct MixedAttention {
  SparseAttention attention;
  MixedQueries queries;
};

cudaError_t launch_sparse_attention_mixed(const MixedAttention& attention, cudaStream_t stream);
cudaError_t launch_sparse_attention_mixed_plain(const MixedAttention& attention, cudaStream_t stream);

}  // namespace dsv4
