// What the scoring kernels and the selection share: which tokens a launch scores, where scores go, and how they are ordered.
#pragma once

#include <cstdint>

#include "indexer/indexer.h"

namespace dsv4 {

constexpr int kTile = 64;    // entries that are scored together
constexpr int kGroup = 16;   // neighbouring entries with one maximum
constexpr float kUnseen = -__builtin_huge_valf();

// Where scores go. For index_scores: `scores`. For a selection: `keys`, scores in an order of integers, whole tiles of them,
// and `maxima`, the largest key of each group of 16 (null: not wanted). Rows lie `stride` entries apart.
struct ScoreSink {
  float* scores;
  uint32_t* keys;
  uint32_t* maxima;
  int64_t stride;
};

// The tokens of one launch, in blocks of up to `rows` neighbouring tokens of a sequence, and how the tiles of a block are
// dealt out: to `slices` CTAs. Row 0 of the sink is token `first_token`. A block in which no token sees more than
// `enough` entries is not scored.
struct ScoreTask {
  int first_block;
  int blocks;
  int rows;
  int slices;
  int64_t first_token;
  int enough;
  int tiles;     // of the capacity
  int capacity;  // entries
};

// The tensor cores' form: E4M3 or FP4, 64 heads of 128, everything at multiples of 16 bytes, on Hopper.
bool fits_tensor_cores(IndexForm form, const IndexScoring& scoring);
int rows_of_tensor_block(IndexForm form, int tokens);
cudaError_t launch_scores_tensor(IndexForm form, const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink,
                                 cudaStream_t stream);
// The general form, for blocks of one row.
cudaError_t launch_scores_general(IndexForm form, const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink,
                                  cudaStream_t stream);

// The form of a call, its blocks of rows (at most `most_rows`), and a launch of some of them.
int rows_of_block(IndexForm form, const IndexScoring& scoring, int64_t most_rows);
cudaError_t launch_scores(IndexForm form, const IndexScoring& scoring, const ScoreTask& task, const ScoreSink& sink,
                          cudaStream_t stream);

// The k best of the keys in `sink` for `rows` tokens from `first_token` on.
cudaError_t launch_select(const IndexScoring& scoring, const ScoreSink& sink, int64_t first_token, int64_t rows, int k,
                          int32_t* indices, cudaStream_t stream);

// Whether rows of this capacity have maxima: the selection does not keep a longer row in shared memory.
bool wants_maxima(int64_t capacity);

#ifdef __CUDACC__

// Entries that the token at `position` sees.
__device__ __forceinline__ int visible_entries(int32_t position, int ratio, int capacity) {
  return min(static_cast<int>(static_cast<uint32_t>(max(position + 1, 0)) / ratio), capacity);
}

// Scores as integers in the order of a descending sort: NaN above infinity, -0 equal to 0. No score has the key 0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score == score ? key : 0xFFFFFFFFu;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// A score in the row's place, for an entry of a tile; `seen` false where the row does not see the entry. Returns the key.
__device__ __forceinline__ uint32_t put_score(const ScoreSink& sink, int64_t row, int entry, int capacity, float score,
                                              bool seen) {
  const uint32_t key = seen ? key_of(score) : 0;
  if (sink.scores == nullptr) {
    sink.keys[row * sink.stride + entry] = key;
  } else if (entry < capacity) {
    sink.scores[row * sink.stride + entry] = seen ? score : kUnseen;
  }
  return key;
}

#endif

}  // namespace dsv4
