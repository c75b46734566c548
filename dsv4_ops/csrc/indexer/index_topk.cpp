// index_scores_* and index_topk_*: which kernels a call launches. No device code.
//
// Scores are one launch. A selection is two for each chunk of rows that the workspace holds: scores as ordered integers
// into the workspace (index_scores_tensor.cu, index_scores_general.cu), then the k best of each row (index_select.cu).
// Decode is one chunk. Rows that see at most k entries are not scored.
#include <algorithm>

#include "indexer/scoring.h"

namespace dsv4 {
namespace {

int tiles_of(int64_t capacity) { return static_cast<int>((capacity + kTile - 1) / kTile); }

// Tokens of a block, at most `most_rows`.
int rows_of_block(IndexForm form, const IndexScoring& scoring, int64_t most_rows) {
  if (!fits_tensor_cores(form, scoring)) return 1;
  return static_cast<int>(std::min<int64_t>(rows_of_tensor_block(form, scoring.tokens), most_rows));
}

cudaError_t launch_scores(IndexForm form, const IndexScoring& scoring, const ScoreTask& task, const ScoreSink& sink,
                          cudaStream_t stream) {
  return fits_tensor_cores(form, scoring) ? launch_scores_tensor(form, scoring, task, sink, stream)
                                          : launch_scores_general(form, scoring, task, sink, stream);
}

}  // namespace

int64_t index_topk_row_words(int64_t capacity, int k) {
  const int64_t stride = static_cast<int64_t>(tiles_of(capacity)) * kTile;
  return wants_maxima(capacity, k) ? stride + stride / kGroup : stride;
}

cudaError_t launch_index_scores(IndexForm form, const IndexScoring& scoring, float* scores, cudaStream_t stream) {
  if (scoring.batch == 0 || scoring.tokens == 0) return cudaSuccess;
  const int rows = rows_of_block(form, scoring, scoring.tokens), capacity = scoring.capacity();
  const int blocks = scoring.batch * ((scoring.tokens + rows - 1) / rows);
  const ScoreTask task{0, blocks, rows, 1, 0, -1, tiles_of(capacity), capacity};
  return launch_scores(form, scoring, task, {scores, nullptr, nullptr, capacity}, stream);
}

cudaError_t launch_index_topk(IndexForm form, const IndexScoring& scoring, int k, uint32_t* workspace,
                              int64_t workspace_words, int32_t* indices, cudaStream_t stream) {
  if (scoring.batch == 0 || scoring.tokens == 0 || k == 0) return cudaSuccess;
  const int capacity = scoring.capacity();
  const int64_t rows_that_fit = workspace_words / index_topk_row_words(capacity, k);
  if (rows_that_fit < 1) return cudaErrorInvalidValue;
  const int rows = rows_of_block(form, scoring, rows_that_fit);
  const int blocks_of_sequence = (scoring.tokens + rows - 1) / rows;
  const int64_t blocks = static_cast<int64_t>(scoring.batch) * blocks_of_sequence;
  const int64_t chunks = (blocks + rows_that_fit / rows - 1) / (rows_that_fit / rows);
  const int64_t blocks_of_chunk = (blocks + chunks - 1) / chunks;
  const auto first_token = [&](int64_t block) {
    return block / blocks_of_sequence * scoring.tokens + block % blocks_of_sequence * rows;
  };
  const int64_t stride = static_cast<int64_t>(tiles_of(capacity)) * kTile;
  uint32_t* const maxima = wants_maxima(capacity, k) ? workspace + rows_that_fit * stride : nullptr;
  const ScoreSink sink{nullptr, workspace, maxima, stride};
  for (int64_t block = 0; block < blocks; block += blocks_of_chunk) {
    const int64_t count = std::min(blocks_of_chunk, blocks - block), first = first_token(block);
    const ScoreTask task{static_cast<int>(block), static_cast<int>(count), rows, 1, first, k, tiles_of(capacity),
                         capacity};
    cudaError_t status = launch_scores(form, scoring, task, sink, stream);
    if (status != cudaSuccess) return status;
    status = launch_select(scoring, sink, first, first_token(block + count) - first, k, indices, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace dsv4
