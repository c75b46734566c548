// Launchers of the family `sampling`; shapes and dtypes are those of dsv4_ops/ops/sampling.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

constexpr int64_t kMaxVocabulary = 1 << 20;
constexpr int kChunkUnit = 1024;   // tokens of a chunk are a multiple of this
constexpr int kMaxChunkUnits = 8;  // sums of a CTA's histogram stay below 2^32: see buckets.cuh
constexpr int kBuckets = 2048;     // of a row's histogram
constexpr int kListed = 4096;      // tokens of a row that can be listed

// What lies between the launches, for each row: 8-byte words of the histogram, of the list, of the list's length (2),
// and for every chunk its largest logit (1) and its two candidates (2 each). dsv4_ops/ops/sampling.py allocates the
// same.
constexpr int64_t max_chunks(int64_t vocabulary) { return ((vocabulary + kChunkUnit - 1) / kChunkUnit + 1) / 2 * 2; }
constexpr int64_t workspace_words(int64_t vocabulary) { return kBuckets + kListed + 2 + 5 * max_chunks(vocabulary); }

struct SampleSettings {  // one of each for a row
  const float* temperature;
  const int* top_k;
  const float* top_p;
  const int64_t* seed;
  const int64_t* counter;
};

struct SampleBatch {
  const float* logits;
  Rows rows;
  SampleSettings settings;
  uint64_t* workspace;  // at a multiple of 16 bytes
  int64_t row_words;    // workspace_words(rows.width)
  int64_t max_chunks;   // max_chunks(rows.width)
  int chunk;            // tokens of a chunk
  int chunks;           // of a row
  bool vectors;         // rows start at multiples of 16 bytes
};

// token [rows]
cudaError_t launch_sample(const float* logits, Rows rows, const SampleSettings& settings, uint64_t* workspace,
                          int64_t* token, cudaStream_t stream);

// The last of its launches.
cudaError_t launch_sample_finish(const SampleBatch& batch, int64_t* token, cudaStream_t stream);

}  // namespace dsv4
