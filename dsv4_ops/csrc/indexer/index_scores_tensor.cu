// Scores of index keys on the tensor cores of Hopper: sum over 64 heads of w * relu(q . k), heads of 128.
//
// Keys lie on M, 64 a tile, heads on N: 64 of one token, or 128 of two. A CTA owns up to 8 neighbouring tokens of a
// sequence (one in decode) and every n-th of their tiles, so that it is busy at any length of context. Its warpgroups
// take these in turn and never meet after the queries are in place: a thread copies by cp.async exactly the 16-byte
// parts of keys that it later feeds to wgmma from its registers. That makes the order of k in a product free, as long
// as queries and keys agree: thread t of four takes the parts t and t + 4 of a key in FP8, the group t of 32 in FP4,
// and the queries are stored in shared memory in the order that follows from it.
//
//   fp8   wgmma E4M3, 4 steps of 32; the key's scale multiplies the sum over heads
//   fp4   E2M1 times its UE8M0 scale is exact in bf16; wgmma bf16, 8 steps of 16
//
// After the product a thread has 16 heads of two keys for each token. It adds w * relu in a fixed order, four
// neighbouring lanes add up, so a score depends on nothing but its query and its key. The lanes meet, and the scores
// are written, while the next product runs.
//
// Shared memory, bytes:  rows * 64 * (128 fp8, 256 bf16)   queries, rows of 128 bytes in the 128-byte swizzle
//                        rows * 256 + 32                   weights; how many entries each row sees
//                        warpgroups * stages * 8704 (fp8) or 5120 (fp4)  keys and scales, a slot for each thread
// Floor: decode, the keys once: 132 (fp8) or 68 (fp4) bytes each from memory, 420 (220) cycles a tile and
// multiprocessor. Prefill, 16384 flops a score on the tensor cores, in FP8 256 cycles for a tile and two tokens; the
// two instructions a head and score of the sum are 128 cycles of each scheduler in that time.
// What bounds it is the instructions of the sum: in a profile of 1024 rows of 4096 keys tensor cores were busy half of
// the time and a quarter of the wait was for the pipe of comparisons, weights and lanes. Hence relu on two pipes,
// weights in registers (decode) or four vectors (prefill), lanes that meet during the next product, addresses that stay
// in registers, and pages of one tile found without a division. Four warpgroups are what the accumulators leave room
// for in prefill; in decode two CTAs of two hide the latency of one another.
#include <algorithm>
#include <cmath>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90_wgmma.cuh"
#include "common/reduce.cuh"
#include "indexer/index_operands.cuh"
#include "indexer/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kMultiprocessors = 132;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// acc = keys * queries over all of k, to be waited for; `queries` is the descriptor of the first step, `panel` the
// bytes of a panel.
template <IndexForm kForm, int kN>
__device__ __forceinline__ void start_product(float (&acc)[kN / 2], const KeyOperand<kForm>& keys, uint64_t queries,
                                              uint32_t panel) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Format<kForm>::kSteps; ++step) {
    const uint64_t operand = ptx::advance_descriptor(queries, step / 4 * panel + step % 4 * 32);
    if constexpr (kForm == IndexForm::kFp8) {
      ptx::wgmma_k32_e4m3<kN>(acc, keys.values[step], operand, step > 0);
    } else {
      ptx::wgmma_k16_bf16<kN>(acc, keys.values[step], operand, step > 0);
    }
  }
  ptx::wgmma_commit();
}

// A thread's 16 weights of a token.
struct Weights {
  float4 fours[4];

  __device__ __forceinline__ void load(const float* weights, int row, int part) {
    const auto* const from = reinterpret_cast<const float4*>(weights + row * kHeads + part * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) fours[i] = from[i];
  }
};

// Sum over a thread's 16 heads of w * relu for its two keys, for the token whose columns start at acc[kFirst].
template <IndexForm kForm, int kFirst, int kCount>
__device__ __forceinline__ float2 sum_heads(const float (&acc)[kCount], const Weights& weights) {
  float2 low{0.0f, 0.0f}, high{0.0f, 0.0f};  // even and odd columns
#pragma unroll
  for (int block = 0; block < kHeads / 8; ++block) {
    const float4 four = weights.fours[block / 2];
    const float2 w = block % 2 ? float2{four.z, four.w} : float2{four.x, four.y};
    const int i = kFirst + block * 4;
    low.x = __fmaf_rn(w.x, relu<kForm, false>(acc[i]), low.x);
    low.y = __fmaf_rn(w.y, relu<kForm, true>(acc[i + 1]), low.y);
    high.x = __fmaf_rn(w.x, relu<kForm, false>(acc[i + 2]), high.x);
    high.y = __fmaf_rn(w.y, relu<kForm, true>(acc[i + 3]), high.y);
  }
  return {low.x + low.y, high.x + high.y};
}

// Of two values a lane keeps the one that `upper` says, adds the other lane's of the same kind, and gives the other one
// away.
__device__ __forceinline__ float exchange(float lower, float upper, bool keep_upper, int distance) {
  const float sent = __shfl_xor_sync(kAllLanes, keep_upper ? lower : upper, distance);
  return (keep_upper ? upper : lower) + sent;
}

// The tokens of a CTA, neighbours of one sequence.
struct Block {
  int sequence;
  int first_row;   // of the sequence
  int rows;
  int64_t token;   // of all: the first one

  __device__ __forceinline__ Block(const IndexScoring& in, const ScoreTask& task) {
    const int blocks_of_sequence = (in.tokens + task.rows - 1) / task.rows;
    const int block = task.first_block + blockIdx.x / task.slices;
    sequence = block / blocks_of_sequence;
    first_row = block % blocks_of_sequence * task.rows;
    rows = min(task.rows, in.tokens - first_row);
    token = static_cast<int64_t>(sequence) * in.tokens + first_row;
  }
};

// Sums over a thread's heads for its two keys and the one or two rows of a product, and what its lane will write.
template <bool kPaired>
struct Sums {
  float2 rows[kPaired ? 2 : 1];
  float scale;     // of the key
  int row;         // of the block; from `rows` of the block on: none
  int entry;
  int64_t offset;  // in the sink
};

// From sums to scores, keys and maxima. Lanes exchange sums until each has one score.
template <bool kPaired>
__device__ __forceinline__ void put_scores(const Sums<kPaired>& sums, bool upper, const int* seen_by, int rows,
                                           int capacity, const ScoreSink& sink) {
  const int lane = threadIdx.x % kWarp, part = lane % 4;
  float2 both = sums.rows[0];
  float score;
  if constexpr (kPaired) {
    const bool second = part % 2;
    both = {exchange(both.x, sums.rows[1].x, second, 1), exchange(both.y, sums.rows[1].y, second, 1)};
    score = exchange(both.x, both.y, upper, 2);
  } else {
    score = exchange(both.x, both.y, upper, 1);
    score += __shfl_xor_sync(kAllLanes, score, 2);
  }
  const bool exists = sums.row < rows && (kPaired || part < 2);
  uint32_t key = 0;
  if (exists) {
    const bool seen = sums.entry < (kPaired ? seen_by[sums.row] : *seen_by);
    key = put_score(sink, sums.offset, sums.entry, capacity, score * sums.scale, seen);
  }
  if (sink.maxima == nullptr) return;
  if constexpr (kPaired) {  // over the lanes of one row
    const uint32_t even = __reduce_max_sync(kAllLanes, part % 2 ? 0 : key);
    const uint32_t odd = __reduce_max_sync(kAllLanes, part % 2 ? key : 0);
    key = part % 2 ? odd : even;
  } else {
    key = __reduce_max_sync(kAllLanes, key);
  }
  if (exists && lane < (kPaired ? 2 : 1)) sink.maxima[sums.offset / kGroup] = key;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// kPaired: two tokens a product, else a block has one token. Pages: how keys are found.
template <IndexForm kForm, bool kPaired, typename Pages>
__global__ void __launch_bounds__(kMostWarpgroups<kForm, kPaired>* kWarpgroup, kPaired ? 1 : 2)
    index_scores_tensor_kernel(IndexScoring in, ScoreTask task, ScoreSink sink, Divisor page_size) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using F = Format<kForm>;
  constexpr int kN = kPaired ? 2 * kHeads : kHeads, kReady = kStages<kPaired>;
  constexpr int kStageBytes = SharedMap<kForm>::kStageBytes;
  extern __shared__ __align__(1024) uint8_t shared[];

  // 1. this CTA's tokens, its tiles, this thread's keys
  const Block block(in, task);
  const int all_rows = kPaired ? (block.rows + 1) / 2 * 2 : 1;
  const int warpgroups = blockDim.x / kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
  const int slice = blockIdx.x % task.slices, stride = task.slices * warpgroups;
  const int first_tile = slice + task.slices * warpgroup;  // then every stride-th one
  const int lane = threadIdx.x % kWarp, part = lane % 4;
  const int row = threadIdx.x % kWarpgroup / kWarp * kGroup + lane / 4;
  const int upper = kPaired ? part / 2 : part % 2;  // the key whose score this lane ends up with is row + 8 * upper
  const Pages pages(in, page_size, block.sequence, task.capacity, row, part, upper);

  uint8_t* const queries = shared;
  auto* const weights = reinterpret_cast<float*>(queries + all_rows * kHeads * 128 * F::kPanels);
  auto* const seen_by = reinterpret_cast<int*>(weights + all_rows * kHeads);
  uint8_t* const stages = reinterpret_cast<uint8_t*>(seen_by + kMostRows);
  const int first_slot = keep(warpgroup * kReady * kStageBytes + threadIdx.x % kWarpgroup * 16);
  const int first_scale_slot = keep(first_slot + kWarpgroup * 16 * F::kParts - threadIdx.x % kWarpgroup * 12);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  // 2. everything that is waited for together: positions, the first pages, the first queries
  const int32_t* const positions = in.positions + block.sequence * in.positions_stride + block.first_row;
  int seen = 0;  // by any row
#pragma unroll 4
  for (int i = 0; i < (kPaired ? block.rows : 1); ++i) {
    seen = max(seen, visible_entries(positions[i], in.ratio, task.capacity));
  }
  typename Pages::Places places[kReady];
#pragma unroll
  for (int i = 0; i < kReady; ++i) places[i] = pages.find(first_tile + i * stride);
  const int halves = all_rows * kHeads * 2;
  QueryHalf<kForm> query;
  query.load(in, block.token, block.rows, threadIdx.x);
  __syncwarp();  // ptxas leaves the loads above it, all under way at once
  const int all_tiles = (seen + kTile - 1) / kTile;
  const bool idle = seen <= task.enough || (sink.scores == nullptr && slice >= all_tiles);
  const int end_tile = idle ? 0 : all_tiles;

  // 3. the first keys on their way, queries in place
#pragma unroll
  for (int i = 0; i < kReady; ++i) {
    const int tile = first_tile + i * stride;
    uint8_t* const stage = stages + i * kStageBytes;
    if (tile < end_tile) pages.copy(places[i], tile, seen, stage + first_slot, stage + first_scale_slot);
    ptx::cp_async_commit();
  }
  if (idle) return;
  for (int i = threadIdx.x; i < halves; i += static_cast<int>(blockDim.x)) {
    query.store(queries, all_rows, i);
    query.load(in, block.token, block.rows, i + static_cast<int>(blockDim.x));
  }
  for (int i = threadIdx.x; i < all_rows * kHeads; i += blockDim.x) {
    const int token = i / kHeads, head = i % kHeads;
    const float weight = token < block.rows ? in.w[(block.token + token) * in.w_stride + head] : 0.0f;
    store_weight<kForm>(weights, token, head, weight);
  }
  if (threadIdx.x < all_rows) {
    const bool exists = threadIdx.x < block.rows;
    const int own = exists && kPaired ? visible_entries(positions[threadIdx.x], in.ratio, task.capacity) : seen;
    seen_by[threadIdx.x] = exists ? own : 0;
  }
  ptx::fence_async_proxy();
  __syncthreads();

  // 4. tiles
  const uint64_t first_queries = ptx::wgmma_descriptor(ptx::shared_address(queries), 16, 1024, true);
  const uint32_t panel = all_rows * kHeads * 128;
  const int64_t sink_row = block.token - task.first_token;
  typename Pages::Places next = pages.find(first_tile + kReady * stride);
  Weights own_weights;
  if constexpr (!kPaired) own_weights.load(weights, 0, part);
  Sums<kPaired> sums{};
  sums.row = kMostRows;
  const int own_row = kPaired ? part % 2 : 0;
  const int64_t row_offset = (sink_row + own_row) * sink.stride;
  int tile = first_tile;
  for (int stage = 0; tile < end_tile; tile += stride) {
    uint8_t* const slot = stages + stage + first_slot;
    uint8_t* const scale_slot = stages + stage + first_scale_slot;
    KeyOperand<kForm> keys;
    ptx::cp_async_wait<kReady - 1>();
    keys.load(slot, scale_slot, part);
    if (tile + kReady * stride < end_tile) {
      pages.copy(next, tile + kReady * stride, seen, slot, scale_slot);
      next = pages.find(tile + (kReady + 1) * stride);
    }
    ptx::cp_async_commit();
    stage = stage == (kReady - 1) * kStageBytes ? 0 : stage + kStageBytes;
    const auto product = [&](int first) {  // with the queries of rows from `first` on
      float acc[kN / 2];
      start_product<kForm, kN>(acc, keys, ptx::advance_descriptor(first_queries, first * kHeads * 128), panel);
      // Of the product before. The condition, which always holds, keeps ptxas from mixing shuffles with the steps of
      // the product, the last of which would wait for them.
      if (task.capacity > 0) put_scores<kPaired>(sums, upper, seen_by, block.rows, task.capacity, sink);
      sums.scale = keys.scale;
      sums.row = first + own_row;
      if (first == 0) {
        sums.entry = tile * kTile + row + 8 * upper;
        sums.offset = row_offset + sums.entry;
      } else {
        sums.offset += 2 * sink.stride;
      }
      if constexpr (kPaired) own_weights.load(weights, first, part);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(acc);
      sums.rows[0] = sum_heads<kForm, 0>(acc, own_weights);
      if constexpr (kPaired) {
        own_weights.load(weights, first + 1, part);
        sums.rows[1] = sum_heads<kForm, kHeads / 2>(acc, own_weights);
      }
    };
    if (!kPaired) {
      product(0);
    } else if (all_rows == F::kMostRows) {
#pragma unroll
      for (int first = 0; first < F::kMostRows; first += 2) product(first);
    } else {
#pragma unroll 1
      for (int first = 0; first < all_rows; first += 2) product(first);
    }
  }
  put_scores<kPaired>(sums, upper, seen_by, block.rows, task.capacity, sink);

  // 5. entries that no row sees
  if (sink.scores == nullptr) return;
  for (; tile < task.tiles; tile += stride) {
    for (int i = threadIdx.x % kWarpgroup; i < block.rows * kTile; i += kWarpgroup) {
      const int entry = tile * kTile + i % kTile;
      if (entry < task.capacity) sink.scores[(sink_row + i / kTile) * sink.stride + entry] = kUnseen;
    }
  }
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

// What a multiprocessor is thought to need, in cycles, when it has `resident` CTAs of `warpgroups` at a time.
struct Costs {
  int warpgroups;
  int resident;
  double tile;       // a tile, where enough of them are under way
  double lone_tile;  // a tile, where the multiprocessor has one CTA
  int most_tiles;    // of a CTA: more would leave multiprocessors idle at the end
};

// CTAs that share the tiles of a block: the number that is done first by that account.
int slices_of(int blocks, int tiles, const Costs& costs) {
  constexpr double kPrologue = 3000;
  constexpr int kMostSlices = 4096;
  double best = 0;
  int slices = 1;
  for (int candidate = 1; candidate <= std::min(tiles, kMostSlices); ++candidate) {
    const int tiles_of_slice = (tiles + candidate - 1) / candidate;
    if (tiles_of_slice > costs.most_tiles && candidate < std::min(tiles, kMostSlices)) continue;
    const double ctas_of_each = static_cast<double>(blocks) * candidate / kMultiprocessors;
    const double rounds = std::ceil(ctas_of_each);
    const double together = std::min<double>(costs.resident, std::max(1.0, ctas_of_each));
    const double busy = std::min(1.0, (tiles_of_slice + 1.0) / (costs.warpgroups + 1.0));
    const double cycles = std::max(costs.tile, costs.lone_tile / (together * busy));
    const double total = std::max(1.0, rounds / costs.resident) * kPrologue + rounds * tiles_of_slice * cycles;
    if (best == 0 || total < best * 0.99) {
      best = total;
      slices = candidate;
    }
  }
  return slices;
}

template <IndexForm kForm, bool kPaired>
Costs costs_of(int rows) {
  constexpr bool kFp4 = kForm == IndexForm::kFp4;
  if (kPaired) {
    const double products = (rows + 1) / 2 * (kFp4 ? 600.0 : 320.0);  // 64 keys x 128 columns each
    return {kMostWarpgroups<kForm, kPaired>, 1, products, products, INT32_MAX};
  }
  const double tile = kFp4 ? 450.0 : 420.0;  // instructions; bytes at the memory's speed
  return {kMostWarpgroups<kForm, kPaired>, 2, tile, 900.0, 64};
}

template <IndexForm kForm, bool kPaired, typename Pages>
cudaError_t launch(const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink, cudaStream_t stream) {
  const Costs costs = costs_of<kForm, kPaired>(task.rows);
  task.slices = slices_of(task.blocks, task.tiles, costs);
  const int warpgroups = std::min(costs.warpgroups, (task.tiles + task.slices - 1) / task.slices);
  const int all_rows = kPaired ? (task.rows + 1) / 2 * 2 : 1;
  const auto shared = static_cast<size_t>(SharedMap<kForm>::bytes(all_rows, warpgroups, kStages<kPaired>));
  const Launch at{dim3(static_cast<unsigned>(static_cast<int64_t>(task.blocks) * task.slices)),
                  dim3(warpgroups * kWarpgroup), stream, shared};
  return launch_kernel(index_scores_tensor_kernel<kForm, kPaired, Pages>, at, scoring, task, sink,
                       Divisor(scoring.keys.page_size));
}

template <IndexForm kForm>
cudaError_t launch(const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink, cudaStream_t stream) {
  if (scoring.keys.page_size == kTile && scoring.keys.page_stride <= UINT32_MAX) {
    return task.rows == 1 ? launch<kForm, false, TilePages<kForm>>(scoring, task, sink, stream)
                          : launch<kForm, true, TilePages<kForm>>(scoring, task, sink, stream);
  }
  return task.rows == 1 ? launch<kForm, false, AnyPages<kForm>>(scoring, task, sink, stream)
                        : launch<kForm, true, AnyPages<kForm>>(scoring, task, sink, stream);
}

bool is_multiple(const void* pointer, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride % bytes == 0;
}

}  // namespace

bool fits_tensor_cores(IndexForm form, const IndexScoring& scoring) {
  if (form == IndexForm::kPlain || scoring.heads != kHeads || scoring.dim != kDim) return false;
  if (!is_multiple(scoring.q, scoring.q_stride, 16)) return false;
  if (!is_multiple(scoring.keys.data, scoring.keys.page_stride, 16)) return false;
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  return major == 9;
}

int rows_of_tensor_block(IndexForm form, int tokens) {
  return std::min(tokens, form == IndexForm::kFp8 ? Format<IndexForm::kFp8>::kMostRows
                                                  : Format<IndexForm::kFp4>::kMostRows);
}

cudaError_t launch_scores_tensor(IndexForm form, const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink,
                                 cudaStream_t stream) {
  return form == IndexForm::kFp8 ? launch<IndexForm::kFp8>(scoring, task, sink, stream)
                                 : launch<IndexForm::kFp4>(scoring, task, sink, stream);
}

}  // namespace dsv4
