// What the launchers of scores and of selections tell each other. No torch header, no device code.
#pragma once

#include <cstdint>

#include "indexer/indexer.h"

namespace dsv4 {

constexpr int kTile = 64;    // entries that are scored together
constexpr int kGroup = 16;   // neighbouring entries with one maximum

// Where scores go. For index_scores: `scores`. For a selection: `keys`, scores in an order of integers, whole tiles of
// them, and `maxima`, the largest key of each group of 16 (null: not wanted). Rows lie `stride` entries apart.
struct ScoreSink {
  float* scores;
  uint32_t* keys;
  uint32_t* maxima;
  int64_t stride;
};

// The tokens of one launch, in blocks of up to `rows` neighbouring tokens of a sequence, and how the tiles of a block
// are dealt out: in turn to `slices` CTAs. Row 0 of the sink is token `first_token`. A block in which no token sees
// more than `enough` entries is not scored.
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

// The k best of the keys in `sink` for `rows` tokens from `first_token` on.
cudaError_t launch_select(const IndexScoring& scoring, const ScoreSink& sink, int64_t first_token, int64_t rows, int k,
                          int32_t* indices, cudaStream_t stream);

// Keys of a row that a selection keeps in shared memory, and whether rows of this capacity are longer, so that their
// groups' maxima are wanted.
int keys_in_shared_memory(int64_t capacity, int k);
bool wants_maxima(int64_t capacity, int k);

}  // namespace dsv4
