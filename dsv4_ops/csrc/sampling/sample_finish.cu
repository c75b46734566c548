// sample_finish: the token of a row from what the chunks found, one CTA a row (see sample.cu).
//
// Greedy, or a largest logit that is not finite: the largest logit. Else the best candidate of those that are kept for
// certain, unless one that may be kept is better. Then, until it is decided:
//   the best of those is kept if it is the best token of all, or fewer than k tokens are better and their mass falls
//   short of top_p of the mass of the k best. In its bucket both are counted over the list. If it is dropped, so is
//   all that ranks behind it, and the next best of what ranks before it is looked at.
// A round halves what is left on average. Where more than 4096 tokens share the buckets (nearly equal logits), the
// rounds go over the row instead of the list: slow, and right.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "sampling/buckets.cuh"
#include "sampling/noise.cuh"
#include "sampling/row.cuh"
#include "sampling/sample.h"

namespace dsv4 {
namespace {

constexpr int kFinishThreads = 512;
constexpr int kWarps = kFinishThreads / kWarp;

struct Shared {
  Histogram<kFinishThreads>::Shared histogram;
  uint64_t words[2][kWarps];
  Candidate candidates[2][kWarps];
};

// Tokens of the buckets that have to be known, from the list or, where they are too many for it, from the row.
struct Tokens {
  const uint64_t* list;  // null: too many
  const float* logits;
  int count;
  float largest;
  const Row& row;
  const Cut& cut;

  // The rank of a token, 0 if it is in no such bucket.
  __device__ uint64_t rank(int i) const {
    if (list != nullptr) return list[i];
    const float scaled = scale(logits[i], largest, row.temperature);
    return cut.lists(bucket_of(scaled)) ? rank_key(scaled, i) : 0;
  }

  // function(rank, bucket) for this thread's share of them.
  template <typename Function>
  __device__ void for_each(Function function) const {
    for (int i = threadIdx.x; i < count; i += kFinishThreads) {
      const uint64_t one = rank(i);
      if (one != 0) function(one, bucket_of(scaled_of(one)));
    }
  }
};

// q of a token (buckets.cuh).
__device__ __forceinline__ uint32_t mass_of(uint64_t rank, int bucket) {
  return kWhole - missing_mass(scaled_of(rank), bucket);
}

// How many tokens of a bucket rank before `rank`, and, where masses matter, the sum of their q.
struct Better {
  uint32_t count;
  uint64_t mass;
};
__device__ Better better_than(const Tokens& tokens, int bucket, uint64_t rank, Shared& shared) {
  uint64_t count = 0, mass = 0;
  tokens.for_each([&](uint64_t one, int its_bucket) {
    if (its_bucket != bucket || one <= rank) return;
    ++count;
    if (tokens.row.by_mass) mass += mass_of(one, bucket);
  });
  __syncthreads();
  count = sum_warps64(count, shared.words[0]);
  return {static_cast<uint32_t>(count), sum_warps64(mass, shared.words[1])};
}

// The mass of the k best tokens: that in front of their last bucket, and of the best ones in it, found bit by bit.
__device__ uint64_t mass_of_best(const Tokens& tokens, const Cut& cut, uint32_t k, Shared& shared) {
  const Bucket& last = cut.rank;
  if (!cut.rank_is_cut) return mass_through(last);
  const uint32_t wanted = k - last.count_before;
  uint64_t largest = 0, smallest = 0;  // the latter as its complement
  tokens.for_each([&](uint64_t one, int bucket) {
    if (bucket == last.index) largest = max(largest, one), smallest = max(smallest, ~one);
  });
  __syncthreads();
  largest = max_warps64(largest, shared.words[0]);
  smallest = ~max_warps64(smallest, shared.words[1]);
  const int bits = 64 - __clzll(largest ^ smallest);  // that differ between tokens of the bucket
  // threshold: the largest number such that at least `wanted` ranks are not below it
  uint64_t threshold = bits == 64 ? 0 : largest >> bits << bits;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint64_t trial = threshold | uint64_t{1} << bit;
    if (better_than(tokens, last.index, trial - 1, shared).count >= wanted) threshold = trial;
  }
  return last.mass_before + bucket_mass(last.index, better_than(tokens, last.index, threshold - 1, shared).mass);
}

// The best noisy value of the tokens that may be kept and rank before `rank`.
__device__ Candidate best_before(const Tokens& tokens, uint64_t rank, Shared& shared) {
  Candidate best{};
  tokens.for_each([&](uint64_t one, int bucket) {
    if (one <= rank || bucket < tokens.cut.sure_end || bucket >= tokens.cut.maybe_end) return;
    const uint32_t token = token_of(one);
    const uint4 block = philox(tokens.row.seed, tokens.row.counter, token / 4);
    const uint32_t word = token % 4 == 0 ? block.x : token % 4 == 1 ? block.y : token % 4 == 2 ? block.z : block.w;
    if (scaled_of(one) + gumbel_bound(word) < from_ordered(best.noisy)) return;
    const Candidate candidate = candidate_of(one, __fadd_rn(scaled_of(one), gumbel(word)));
    if (beats(candidate, best)) best = candidate;
  });
  __syncthreads();
  return max_warps(best, shared.candidates[0]);
}

// `maybe` beats `sure`, which may be no token: the token of the row.
__device__ uint32_t decide(const SampleBatch& batch, const RowWorkspace& workspace, const Row& row, float largest,
                           const Candidate& sure, Candidate maybe, Shared& shared) {
  const Histogram<kFinishThreads> histogram(workspace.histogram, shared.histogram);
  const Cut cut = find_cut(histogram, row);
  const bool listed = cut.listed <= kListed;
  const int64_t place = blockIdx.x;
  const Tokens tokens{listed ? workspace.listed : nullptr,
                      batch.logits + place * batch.rows.stride,
                      listed ? static_cast<int>(cut.listed) : static_cast<int>(batch.rows.width),
                      largest,
                      row,
                      cut};
  const uint64_t whole = row.by_mass ? mass_of_best(tokens, cut, row.top_k, shared) : 0;
  while (beats(maybe, sure)) {
    const int index = bucket_of(scaled_of(maybe.rank));
    const Better better = better_than(tokens, index, maybe.rank, shared);
    const Bucket bucket = histogram.at(0, index);
    const uint32_t count = bucket.count_before + better.count;
    const uint64_t mass = bucket.mass_before + bucket_mass(index, better.mass);
    const bool dropped = (row.by_rank && count >= row.top_k) || (row.by_mass && reaches(mass, row.top_p, whole));
    if (count == 0 || !dropped) return token_of(maybe.rank);
    maybe = best_before(tokens, maybe.rank, shared);
  }
  return token_of(sure.rank);
}

__global__ void __launch_bounds__(kFinishThreads, 1) sample_finish_kernel(SampleBatch batch, int64_t* token) {
  __shared__ Shared shared;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t place = blockIdx.x;
  const RowWorkspace workspace = workspace_of(batch, place);
  const Row row = load_row(batch, place);
  // Loaded before it is known which of them the row has: one latency instead of two.
  Candidate sure{}, maybe{};
  for (int i = threadIdx.x; i < batch.chunks; i += kFinishThreads) {
    if (beats(workspace.sure[i], sure)) sure = workspace.sure[i];
    if (beats(workspace.maybe[i], maybe)) maybe = workspace.maybe[i];
  }
  const uint64_t best_logit = max_warps64(share_of_largest(batch, workspace), shared.words[0]);
  const float largest = scaled_of(best_logit);
  uint32_t result = token_of(best_logit);
  if (draws(row) && is_finite(largest)) {
    sure = max_warps(sure, shared.candidates[0]);
    result = token_of(sure.rank);
    if (filters(row)) {
      maybe = max_warps(maybe, shared.candidates[1]);
      if (beats(maybe, sure)) result = decide(batch, workspace, row, largest, sure, maybe, shared);
    }
  }
  // Settings that changed between the launches can leave a list or candidates that nobody wrote.
  if (threadIdx.x == 0) token[place] = min(static_cast<int64_t>(result), batch.rows.width - 1);
}

}  // namespace

cudaError_t launch_sample_finish(const SampleBatch& batch, int64_t* token, cudaStream_t stream) {
  return launch_kernel(sample_finish_kernel, {dim3(batch.rows.count), dim3(kFinishThreads), stream}, batch, token);
}

}  // namespace dsv4
