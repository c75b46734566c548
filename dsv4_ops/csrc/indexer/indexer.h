// Launchers of the family `indexer`; shapes and dtypes are those of dsv4_ops/ops/{index_query,indexer}.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/pool.h"
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

// What is scored: queries [B, tokens, heads, dim] and their weights w, and the keys of B sequences. Bytes of q, scales
// and elements of w lie one stride apart from head to head (q, scales) and token to token (w).
struct IndexScoring {
  const uint8_t* q;         // fp32, E4M3 or E2M1 pairs
  int64_t q_stride;
  const uint8_t* scales;    // FP4: UE8M0 [B, tokens, heads, dim / 32]
  int64_t scales_stride;
  const float* w;           // [B, tokens, heads]
  int64_t w_stride;
  Pool keys;
  const int32_t* positions;  // [B, tokens], -1: no token
  int64_t positions_stride;
  int batch;
  int tokens;
  int heads;
  int dim;
  int ratio;

  int capacity() const { return keys.max_pages * keys.page_size; }
};

// Scores [B, tokens, capacity] fp32, -inf for entries that a token does not see.
cudaError_t launch_index_scores(IndexForm form, const IndexScoring& scoring, float* scores, cudaStream_t stream);

// The k best entries of each token, int32 [B, tokens, k]: ascending, then -1. `workspace` holds at least
// index_topk_row_words words, and is used for as many rows at a time as fit.
cudaError_t launch_index_topk(IndexForm form, const IndexScoring& scoring, int k, uint32_t* workspace,
                              int64_t workspace_words, int32_t* indices, cudaStream_t stream);

// Words of the workspace for one row: a key for each entry, in long rows also one for each 16 entries.
int64_t index_topk_row_words(int64_t capacity, int k);

}  // namespace dsv4
