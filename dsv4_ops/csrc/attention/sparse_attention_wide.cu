// Sparse attention of sparse_attention.cu for tiles of 64 heads: large batches and prefill. The same bits, but another
// division of labour: two warpgroups share the keys, which two of 32 heads each would read twice.
//
// A CTA owns 64 heads of one row at a time and goes from row to row. 384 threads, one CTA an SM:
//
//   warpgroups 0, 1  take units in pairs. Each computes scores and weights of one unit for all heads (wgmma m64n64k16);
//                    then both add both units to their half of the output: 256 dimensions x 64 heads in 128 registers
//   warpgroup 2      producer (producer.cuh): unit u goes to stage u % 2; ahead by what is free, into the next row too
//
// A pair: scores and weights | barrier of 256 | steps of the fold, by the threads that keep the totals | barrier of 128
// | output of the first unit, whose tile is then free | output of the second.
//
// Shared memory, 219 KB: two tiles of keys 2 x 64 KB; queries 64 KB, in the end the staged output, 66 KB; of each unit
// of a pair weights 8 KB, largest scores and sums of each warp 2.3 KB; steps 2 KB.
//
// Cost of a unit in cycles of an SM:
//
//   keys from memory   37 KB: 1870 at 20 bytes a cycle in decode; rows of a prefill share most of them in L2
//   unpacking          800 issue slots of each SM quarter
//   shared memory      write K 512, scores read K and Q 1024, output reads K and weights 1024: 2560
//   tensor cores       2048, the floor
#include <algorithm>

#include "attention/output.cuh"
#include "attention/products.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

constexpr int kHeads = 64;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;  // of a thread
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= ptx::kRegistersOfThreeWarpgroups);
[[maybe_unused]] constexpr int kBothBarrier = 3;  // of the consuming warpgroups; each has a barrier of its own, 1 or 2
[[maybe_unused]] constexpr int kOwnSlabs = kSlabs / 2;
constexpr int kOwnDims = kDim / 2;
constexpr int kStagingBytes = kHeads * kStagingStride<kOwnDims>;

// What is found about a unit by the warpgroup that has its scores, for both.
struct Unit {
  alignas(128) uint8_t weights[kHeads * kUnit * 2];
  float largest[4 * kHeads];
  float sum[4 * kHeads];
  float unit_largest[kHeads];
};

// How a warpgroup adds the two units of a pair.
struct PairSteps {
  float before[2][kHeads], unit[2][kHeads];
  uint32_t rescale[2][2];  // by unit and by warp of heads
};

struct SharedMemory {
  TileMemory tiles;
  alignas(1024) uint8_t query[2 * kStagingBytes];  // 8 slabs of [64][128 bytes]; in the end output, twice [64][256]
  Unit unit[2];
  PairSteps steps[2];
};
static_assert(sizeof(SharedMemory) <= 227 * 1024, "what a CTA can have");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The consuming warpgroup `own`: scores of every other unit, output of its half of the dimensions for all of them.
__device__ __forceinline__ void consume(const Tiles& tiles, SharedMemory& memory, int units, int own,
                                        const StageUses& uses, float (&output)[kOwnSlabs][kHeads / 2], Total& total) {
#pragma unroll
  for (int slab = 0; slab < kOwnSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) output[slab][i] = 0.0f;
  }
  const uint32_t query = ptx::shared_address(memory.query), tile = ptx::shared_address(tiles.keys);
  const int thread = threadIdx.x % kWarpgroup;
  PairSteps& steps = memory.steps[own];
  float part[kHeads / 2];
  const auto start_slab = [&](int stage, int slab) {
    multiply_weights<kHeads>(tile + stage * kTileBytes, ptx::shared_address(memory.unit[stage].weights),
                             own * kOwnSlabs + slab, part);
  };
  for (int first = 0; first < units; first += 2) {
    // 1. Scores and weights of one unit
    if (first + own < units) {
      ptx::mbarrier_wait(tiles.full_barrier(own), (uses.of(own) + first / 2) & 1);
      multiply_queries<kHeads>(tile + own * kTileBytes, query, part);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(part);
      Unit& mine = memory.unit[own];
      const uint64_t valid = *reinterpret_cast<const uint64_t*>(tiles.valid + own * 8);
      float own_largest = -INFINITY;
      weigh<kHeads>(part, valid, Exchange{mine.weights, mine.largest, mine.sum}, 1 + own, own_largest,
                    [](int, float) {});
      if (thread < kHeads) mine.unit_largest[thread] = own_largest;
    }
    ptx::named_barrier(kBothBarrier, 2 * kWarpgroup);

    // 2. How both are added. A product started before would be serialised: ptxas loses track of it in the branches
    // here.
    if (thread < kHeads) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (first + i >= units) continue;
        const Step step =
            total.add(memory.unit[i].unit_largest[thread], combine_warps<kHeads>(memory.unit[i].sum, thread, Sum()));
        steps.before[i][thread] = step.before;
        steps.unit[i][thread] = step.unit;
        const bool rescale = __any_sync(kAllLanes, step.before != 1.0f);
        if (thread % kWarp == 0) steps.rescale[i][thread / kWarp] = rescale;
      }
    }
    ptx::named_barrier(1 + own, kWarpgroup);

    // 3. Output
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i >= units) continue;
      start_slab(i, 0);
      float factors[kColumns<kHeads>];
      load_columns<kHeads>(steps.unit[i], factors);
      if ((steps.rescale[i][0] | steps.rescale[i][1]) != 0) {
#pragma unroll
        for (int j = 0; j < kHeads / 2; ++j) {
          const float before = steps.before[i][head_of_column(j / 4 * 2 + j % 2, threadIdx.x % kWarp)];
#pragma unroll
          for (int slab = 0; slab < kOwnSlabs; ++slab) output[slab][j] = __fmul_rn(output[slab][j], before);
        }
      }
#pragma unroll
      for (int slab = 0; slab < kOwnSlabs; ++slab) {
        ptx::wgmma_wait<0>();
        if (slab == kOwnSlabs - 1) ptx::mbarrier_arrive(tiles.empty_barrier(i));
        ptx::pin_registers(part);
#pragma unroll
        for (int j = 0; j < kHeads / 2; ++j) {
          output[slab][j] = __fmaf_rn(part[j], factors[j / 4 * 2 + j % 2], output[slab][j]);
        }
        if (slab + 1 < kOwnSlabs) start_slab(i, slab + 1);
      }
    }
  }
}

// The consuming warpgroup `own`, for the heads from first_head on of one row. Returns the row's number of units.
__device__ __forceinline__ int attend(const SparseAttention& attention, const Tiles& tiles, SharedMemory& memory,
                                      uint32_t row, int first_head, int own, const StageUses& uses) {
  const RowKeys keys = keys_of_row(attention.keys, attention.rope, row);
  const int units = (keys.count + kUnit - 1) / kUnit;
  const int heads = attention.heads - first_head, thread = threadIdx.x % kWarpgroup;
  const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;  // of q and o
  ptx::named_barrier(kBothBarrier, 2 * kWarpgroup);  // the output of the row before has left the memory of the queries
  load_queries<kHeads>(static_cast<const __nv_bfloat16*>(attention.q) + vector * attention.q_stride, attention.q_stride,
                       heads, memory.query, threadIdx.x, 2 * kWarpgroup);
  ptx::fence_async_proxy();
  ptx::named_barrier(kBothBarrier, 2 * kWarpgroup);
  float output[kOwnSlabs][kHeads / 2];
  Total total;
  consume(tiles, memory, units, own, uses, output, total);

  float* const reciprocals = memory.steps[own].before[0];
  if (thread < kHeads) reciprocals[thread] = finish_head(attention, row, first_head + thread, total, own == 0);
  ptx::named_barrier(1 + own, kWarpgroup);
  float reciprocal[kColumns<kHeads>];
  load_columns<kHeads>(reciprocals, reciprocal);
  const float2 turn = inverse_turn(attention.rope, keys.position);
  uint8_t* const staging = memory.query + own * kStagingBytes;
#pragma unroll
  for (int slab = 0; slab < kOwnSlabs; ++slab) {
    finish_slab<kHeads>(output[slab], reciprocal, own == 1 && slab == kOwnSlabs - 1, turn);
    stage_slab<kHeads, kOwnDims>(output[slab], staging, slab * kSlab);
  }
  ptx::named_barrier(1 + own, kWarpgroup);
  store_rows<kHeads, kOwnDims>(staging, static_cast<__nv_bfloat16*>(attention.o) + vector * kDim, heads,
                               own * kOwnDims);
  return units;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_wide_kernel(const __grid_constant__ SparseAttention attention) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<SharedMemory*>(memory_start);
  constexpr int kProducerWarps = 4;
  const Tiles tiles = start_tiles(memory.tiles, kProducerWarps, 2 * kWarpgroup);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  // The same in all lanes, and known to be: what follows from it lies in uniform registers.
  const int own = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  const uint32_t head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t work = static_cast<uint32_t>(attention.rows) * head_tiles;
  StageUses uses;
  if (own == 2) {
    ptx::give_registers<kProducerRegisters>();
    for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
      const RowKeys keys = keys_of_row(attention.keys, attention.rope, tile / head_tiles);
      const int units = (keys.count + kUnit - 1) / kUnit;
      produce<kProducerWarps>(attention.keys, keys, tiles, 0, units, threadIdx.x / kWarp - 8, uses);
      uses.add(units);
    }
    return;
  }
  ptx::take_registers<kConsumerRegisters>();
  for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
    const int units = attend(attention, tiles, memory, tile / head_tiles, tile % head_tiles * kHeads, own, uses);
    uses.add(units);
  }
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

}  // namespace

cudaError_t launch_sparse_attention_wide(const SparseAttention& attention, int processors, cudaStream_t stream) {
  const int64_t tiles = attention.rows * ((attention.heads + kHeads - 1) / kHeads);
  const Launch at{dim3(std::min<int64_t>(tiles, processors)), dim3(kThreads), stream, sizeof(SharedMemory)};
  return launch_kernel(sparse_attention_wide_kernel, at, attention);
}

}  // namespace dsv4
