// sample: the next token of every row, that of the reference. Four launches for all settings, which are on the device;
// a row has chunks of 1024 to 8192 tokens, a CTA of the first three launches owns a chunk, and it ends early where its
// row needs nothing from it. z = (logit - largest) / temperature is computed anew in each launch; from the second on,
// logits come from L2.
//
//   1. sample_max      the largest logit of the chunk. (Filtered rows: their histogram is cleared.)
//   2. sample_count    not filtered: the best of z + noise of the chunk. Filtered: the chunk's part of the row's
//                      histogram of z, in shared memory (16 KB), then added to the row's (16 KB, in L2).
//   3. sample_draw     filtered rows: every CTA finds where top-k and top-p cut the histogram. It takes the best of z
//                      + noise of the tokens that are kept for certain, and of those that may be, and lists the
//                      latter.
//   4. sample_finish   a CTA a row takes the best of the chunks, greedy: the largest logit. Only if a token that may
//                      be kept is better than all that are, it decides from the list.
//
// No vocabulary is sorted, and nothing is decided that cannot matter: the tokens that may be kept are those of one or
// two of 2047 buckets, each at most 1/128 of |z| wide, so they seldom win.
//
// Noise costs a token a quarter of a block of Philox and two logarithms; only tokens that could beat what their warp
// has seen get the logarithms (gumbel_bound), or any noise at all (kLargestNoise).
//
// Everything that crosses threads is an integer sum or a maximum of (z + noise, z, index): the order of CTAs and the
// size of chunks do not show. z and the order of ranks are those of the reference bit for bit. The noise differs from
// the CPU's by the last bits of two logarithms, less than 6e-6, so the token can differ where the two best values come
// as close as that (less than one draw in 10^5), and where top_p falls on a cumulative probability (buckets.cuh).
//
// What is read and written stays inside the buffers whatever they hold. That includes logits and settings that change
// between two launches: a row that is filtered in one launch and was not in the one before finds a histogram and a
// list's length that nobody cleared, and gets some token of the vocabulary.
//
// Floor: 4 bytes a token, once for greedy rows, twice for rows without filters, three times for filtered ones, the
// second and third time from L2 as far as the batch fits into it. For one row: the latency of four launches.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "sampling/buckets.cuh"
#include "sampling/noise.cuh"
#include "sampling/row.cuh"
#include "sampling/sample.h"

namespace dsv4 {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kTokens = 4;          // of a thread at a time: a block of Philox
constexpr int kWantedChunks = 528;  // of all rows together: 4 a SM
static_assert(kChunkUnit == kThreads * kTokens, "a unit is one step of a CTA");

// The logits of this CTA's chunk, four neighbouring ones a thread at a time; the next four are on their way meanwhile.
class Chunk {
 public:
  // early: the first ones are loaded at once, before it is known whether the row needs them.
  __device__ Chunk(const SampleBatch& batch, bool early)
      : batch_(batch),
        row_(batch.logits + static_cast<int64_t>(blockIdx.x) * batch.rows.stride),
        begin_(static_cast<int64_t>(blockIdx.y) * batch.chunk + threadIdx.x * kTokens),
        early_(early) {
    if (early) load(0);
  }

  // function(logits, first token, count). All threads call it equally often; count is 0 past the end of the row.
  template <typename Function>
  __device__ __forceinline__ void for_each(Function function) {
    if (!early_) load(0);
    for (int done = 0; done < batch_.chunk; done += kChunkUnit) {
      float logits[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) logits[i] = next_[i];
      const int count = count_;
      if (done + kChunkUnit < batch_.chunk) load(done + kChunkUnit);
      function(logits, static_cast<uint32_t>(begin_ + done), count);
    }
  }

 private:
  __device__ __forceinline__ void load(int offset) { count_ = load_four(batch_, row_, begin_ + offset, next_); }

  const SampleBatch& batch_;
  const float* row_;
  int64_t begin_;
  bool early_;
  float next_[kTokens];
  int count_;
};

__global__ void __launch_bounds__(kThreads) sample_max_kernel(SampleBatch batch) {
  __shared__ uint64_t scratch[kWarps];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Chunk chunk(batch, true);
  const RowWorkspace workspace = workspace_of(batch, blockIdx.x);
  const Row row = load_row(batch, blockIdx.x);
  if (filters(row)) {
    const int step = gridDim.y * kThreads;
    for (int i = blockIdx.y * kThreads + threadIdx.x; i < kBuckets; i += step) workspace.histogram[i] = 0;
    if (blockIdx.y == 0 && threadIdx.x == 0) *workspace.listed_count = 0;
  }
  uint32_t best = 0, best_token = 0;
  chunk.for_each([&](const float(&logits)[kTokens], uint32_t token, int count) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t key = ordered(logits[i]);
      if (i >= count || key <= best) continue;  // not the first: tokens come in ascending order
      best = key;
      best_token = token + i;
    }
  });
  if (best == 0xFFFFFFFFu) best_token = 0;  // NaN: all differences from it are, and the first of them wins
  const uint64_t mine = best == 0 ? 0 : static_cast<uint64_t>(best) << 32 | ~best_token;
  const uint64_t largest = max_warps64(mine, scratch);
  if (threadIdx.x == 0) workspace.largest[blockIdx.y] = largest;
}

// With chunks of one step there are few rows, and a wasted load of theirs costs less than waiting for the settings.
__device__ __forceinline__ bool is_single(const SampleBatch& batch) { return batch.chunk == kChunkUnit; }

// Draws for the tokens of a thread and keeps the best of those that are kept for certain and of those that may be.
// What is skipped is what cannot beat the best of the certain ones so far in this warp. The largest logit, which is
// always kept, reaches kSmallestNoise.
class Draw {
 public:
  __device__ explicit Draw(const Row& row) : seed_(row.seed), counter_(row.counter) {}

  // wanted, maybe: bits of the tokens. Called by all lanes of a warp together.
  __device__ __forceinline__ void add(const float (&scaled)[kTokens], uint32_t token, uint32_t wanted, uint32_t maybe) {
    bool close = false;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) close = close || (wanted >> i & 1 && !(scaled[i] + kLargestNoise < beaten_));
    if (close) {
      const uint4 block = philox(seed_, counter_, token / kTokens);
      const uint32_t words[kTokens] = {block.x, block.y, block.z, block.w};
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (!(wanted >> i & 1) || scaled[i] + gumbel_bound(words[i]) < beaten_) continue;
        const auto candidate = candidate_of(rank_key(scaled[i], token + i), __fadd_rn(scaled[i], gumbel(words[i])));
        if (maybe >> i & 1) {
          if (beats(candidate, maybe_)) maybe_ = candidate;
        } else if (beats(candidate, sure_)) {
          sure_ = candidate;
        }
      }
    }
    const uint32_t noisy = max_lanes(sure_.noisy);
    if (noisy > ordered(beaten_)) beaten_ = from_ordered(noisy);
  }

  __device__ Candidate sure() const { return sure_; }
  __device__ Candidate maybe() const { return maybe_; }

 private:
  uint64_t seed_, counter_;
  float beaten_ = kSmallestNoise;  // NaN once a NaN has won: then nothing is skipped
  Candidate sure_{}, maybe_{};
};

__device__ __forceinline__ void scale_all(const float (&logits)[kTokens], float largest, float temperature,
                                          float (&scaled)[kTokens]) {
#pragma unroll
  for (int i = 0; i < kTokens; ++i) scaled[i] = scale(logits[i], largest, temperature);
}

__global__ void __launch_bounds__(kThreads) sample_count_kernel(SampleBatch batch) {
  __shared__ uint64_t scratch[kWarps];
  __shared__ Candidate candidates[kWarps];
  __shared__ uint32_t counts[kBuckets], missing[kBuckets];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Chunk chunk(batch, is_single(batch));
  const RowWorkspace workspace = workspace_of(batch, blockIdx.x);
  const Row row = load_row(batch, blockIdx.x);
  const float largest = scaled_of(max_warps64(share_of_largest(batch, workspace), scratch));
  if (!draws(row) || !is_finite(largest)) return;

  if (!filters(row)) {
    Draw draw(row);
    chunk.for_each([&](const float(&logits)[kTokens], uint32_t token, int count) {
      float scaled[kTokens];
      scale_all(logits, largest, row.temperature, scaled);
      draw.add(scaled, token, (1u << count) - 1, 0);
    });
    const Candidate best = max_warps(draw.sure(), candidates);
    if (threadIdx.x == 0) workspace.sure[blockIdx.y] = best;
    return;
  }

  for (int i = threadIdx.x; i < kBuckets; i += kThreads) counts[i] = missing[i] = 0;
  __syncthreads();
  chunk.for_each([&](const float(&logits)[kTokens], uint32_t, int count) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float scaled = scale(logits[i], largest, row.temperature);
      const int bucket = bucket_of(scaled);
      if (i >= count || bucket == kNoBucket) continue;
      atomicAdd(&counts[bucket], 1u);
      if (row.by_mass) atomicAdd(&missing[bucket], missing_mass(scaled, bucket));
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) {
    if (counts[i] == 0) continue;
    const uint64_t word = static_cast<uint64_t>(counts[i]) << kCountShift | missing[i];
    atomicAdd(reinterpret_cast<unsigned long long*>(workspace.histogram + i), word);
  }
}

__global__ void __launch_bounds__(kThreads, 4) sample_draw_kernel(SampleBatch batch) {
  __shared__ uint64_t scratch[kWarps];
  __shared__ Candidate candidates[2][kWarps];
  __shared__ Histogram<kThreads>::Shared histogram_memory;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Chunk chunk(batch, is_single(batch));
  const RowWorkspace workspace = workspace_of(batch, blockIdx.x);
  const Row row = load_row(batch, blockIdx.x);
  const uint64_t share = share_of_largest(batch, workspace);
  if (!filters(row)) return;
  const Histogram<kThreads> histogram(workspace.histogram, histogram_memory);
  const float largest = scaled_of(max_warps64(share, scratch));
  if (!is_finite(largest)) return;

  const Cut cut = find_cut(histogram, row);
  const bool listing = cut.listed <= kListed;
  Draw draw(row);
  chunk.for_each([&](const float(&logits)[kTokens], uint32_t token, int count) {
    float scaled[kTokens];
    scale_all(logits, largest, row.temperature, scaled);
    uint32_t wanted = 0, maybe = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int bucket = bucket_of(scaled[i]);
      if (i >= count) continue;
      if (bucket < cut.maybe_end) wanted |= 1u << i;
      if (bucket < cut.maybe_end && bucket >= cut.sure_end) maybe |= 1u << i;
      if (listing && cut.lists(bucket)) {
        const unsigned place = atomicAdd(workspace.listed_count, 1u);
        if (place < kListed) workspace.listed[place] = rank_key(scaled[i], token + i);
      }
    }
    draw.add(scaled, token, wanted, maybe);
  });
  const Candidate sure = max_warps(draw.sure(), candidates[0]), maybe = max_warps(draw.maybe(), candidates[1]);
  if (threadIdx.x == 0) {
    workspace.sure[blockIdx.y] = sure;
    workspace.maybe[blockIdx.y] = maybe;
  }
}

}  // namespace

cudaError_t launch_sample(const float* logits, Rows rows, const SampleSettings& settings, uint64_t* workspace,
                          int64_t* token, cudaStream_t stream) {
  const int64_t units = (rows.width + kChunkUnit - 1) / kChunkUnit;
  const int64_t wanted = (rows.count * units + kWantedChunks - 1) / kWantedChunks;  // units of a chunk
  const int64_t chunk_units = wanted < 1 ? 1 : wanted > kMaxChunkUnits ? kMaxChunkUnits : wanted;
  const bool vectors = rows.stride % kTokens == 0 && reinterpret_cast<uintptr_t>(logits) % sizeof(float4) == 0;
  const SampleBatch batch{logits,
                          rows,
                          settings,
                          workspace,
                          workspace_words(rows.width),
                          max_chunks(rows.width),
                          static_cast<int>(chunk_units * kChunkUnit),
                          static_cast<int>((units + chunk_units - 1) / chunk_units),
                          vectors};
  const Launch at{dim3(rows.count, batch.chunks), dim3(kThreads), stream};
  for (auto* const kernel : {sample_max_kernel, sample_count_kernel, sample_draw_kernel}) {
    const cudaError_t status = launch_kernel(kernel, at, batch);
    if (status != cudaSuccess) return status;
  }
  return launch_sample_finish(batch, token, stream);
}

}  // namespace dsv4
