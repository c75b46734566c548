// Where the pairs of a prefill go: sorted by expert, and in an expert by their number (prefill.h).
//
// CTA e serves expert e. All of its warps read all ids, each its own part of the pairs: once to count every expert's
// (in shared memory) and its own expert's pairs in each part, and once more to place these. The ids come from L2: 4
// bytes a pair and expert. Then it fills its expert up to a multiple of 16 rows and cuts it into blocks of nearly the
// same size.
#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "moe/prefill.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kMostUnits = kPrefillBlock / kPrefillGrain;

__device__ __forceinline__ int units_of(int pairs) { return (pairs + kPrefillGrain - 1) / kPrefillGrain; }
__device__ __forceinline__ int blocks_of(int units) { return (units + kMostUnits - 1) / kMostUnits; }

struct PairIds {
  const int* ids;
  int64_t stride;  // of tokens
  Divisor k;
  int pairs;

  __device__ __forceinline__ int load(int pair) const {
    if (pair >= pairs) return -1;
    const int token = k.divide(pair);
    return ids[token * stride + (pair - token * static_cast<int>(k.value()))];
  }
};

__global__ void __launch_bounds__(kThreads)
    prefill_sort_kernel(const __grid_constant__ Moe moe, const __grid_constant__ PrefillRows rows, Divisor k) {
  extern __shared__ int counts[];  // [experts]
  __shared__ int own[kWarps];      // pairs of this expert in the part of each warp
  __shared__ int units_before, blocks_before;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int expert = blockIdx.x, thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const PairIds ids{moe.ids, moe.ids_stride, k, static_cast<int>(moe.tokens) * moe.k};
  for (int i = thread; i < moe.experts; i += kThreads) counts[i] = 0;
  if (thread == 0) units_before = blocks_before = 0;
  __syncthreads();

  // 1. count
  const int part = ((ids.pairs + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
  const int begin = warp * part, end = min(begin + part, ids.pairs);
  int count = 0;
#pragma unroll 4
  for (int pair = begin + lane; pair - lane < end; pair += kWarp) {
    const int id = ids.load(pair);
    if (id >= 0 && id < moe.experts) atomicAdd(counts + id, 1);
    count += id == expert;
  }
  count = __reduce_add_sync(kAllLanes, count);
  if (lane == 0) own[warp] = count;
  __syncthreads();

  // 2. what the experts before this one take
  int units = 0, blocks = 0;
  for (int i = thread; i < expert; i += kThreads) {
    units += units_of(counts[i]);
    blocks += blocks_of(units_of(counts[i]));
  }
  units = __reduce_add_sync(kAllLanes, units);
  blocks = __reduce_add_sync(kAllLanes, blocks);
  if (lane == 0 && units > 0) {
    atomicAdd(&units_before, units);
    atomicAdd(&blocks_before, blocks);
  }
  __syncthreads();
  const int first = units_before * kPrefillGrain, total = counts[expert];

  // 3. place
  int row = first;
  for (int i = 0; i < warp; ++i) row += own[i];
#pragma unroll 4
  for (int pair = begin + lane; pair - lane < end; pair += kWarp) {
    const int id = ids.load(pair);
    const unsigned mine = __ballot_sync(kAllLanes, id == expert);
    if (id == expert) {
      const int place = row + __popc(mine & ((1u << lane) - 1)), token = k.divide(pair);
      rows.row_of_pair[pair] = place;
      rows.pair_of_row[place] = pair;
      rows.route[place] = moe.route_weights[token * moe.route_stride + (pair - token * moe.k)];
      if (moe.format == MoeFormat::kNvfp4) rows.factor[place] = moe.x_global[token * moe.x_global_stride];
    } else if (expert == 0 && pair < ids.pairs && (id < 0 || id >= moe.experts)) {
      rows.row_of_pair[pair] = -1;
    }
    row += __popc(mine);
  }
  const int own_units = units_of(total), own_blocks = blocks_of(own_units);
  if (thread < own_units * kPrefillGrain - total) {
    rows.pair_of_row[first + total + thread] = -1;
    rows.route[first + total + thread] = 0.0f;
    rows.factor[first + total + thread] = 0.0f;
  }
  for (int i = thread; i < own_blocks; i += kThreads) {
    const auto at = [&](int block) { return static_cast<int>(static_cast<int64_t>(block) * own_units / own_blocks); };
    rows.blocks[blocks_before + i] = {expert, first + at(i) * kPrefillGrain, (at(i + 1) - at(i)) * kPrefillGrain, 0};
  }
  if (expert == moe.experts - 1 && thread == 0) {
    rows.counts[0] = blocks_before + own_blocks;
    rows.counts[1] = first + own_units * kPrefillGrain;
  }
}

}  // namespace

cudaError_t launch_prefill_sort(const Moe& moe, const PrefillRows& rows, cudaStream_t stream) {
  const Launch at{dim3(moe.experts), dim3(kThreads), stream, moe.experts * sizeof(int)};
  return launch_kernel(prefill_sort_kernel, at, moe, rows, Divisor(moe.k));
}

}  // namespace dsv4
