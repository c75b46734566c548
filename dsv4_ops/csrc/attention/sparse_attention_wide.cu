// Sparse attention of sparse_attention.cu for tiles of 64 heads: large batches and prefill. The same bits, but another
// division of labour: two warpgroups share the keys, which two of 32 heads each would read twice.
//
// A CTA owns 64 heads of one row at a time and goes from row to row. 512 threads, one CTA an SM:
//
//   warpgroups 0, 1  scores and weights of every other unit for all heads (wide_consumer.cuh), and the output of 256 of
//                    the 512 dimensions for all units: 128 registers
//   warpgroups 2, 3  producers (wide_producer.cuh), ahead by what is free, into the next row too
//
// Heads lie on the outer dimension of both products here (wgmma m64n64k16; scores = Q . K^T, output = weights . K with
// the weights from registers). The two warpgroups fall out of step by themselves, since the second tile is full later
// than the first: one multiplies while the other one takes its softmax.
//
//   warpgroup 0   scores 0 | weights 0 | output 0, left  | output 1, left
//   warpgroup 1     scores 1 | weights 1 | output 0, right | output 1, right
//
// A half of a tile goes back to its producers as soon as its output is added, and scores start with the left half while
// the right one is on its way. The queries of the next row are copied while the last unit is added.
//
// Shared memory, 212 KB: two tiles of keys 2 x 64 KB; queries 64 KB; of two units weights 8 KB and totals 2 KB each.
//
// Cost of a unit in cycles of an SM:
//
//   keys from memory   37 KB: 1870 at 20 bytes a cycle in decode; rows of a prefill share most of them in L2
//   issue slots        of each SM quarter: unpacking 900, softmax and exchange 250, output sums 256
//   shared memory      write K 512, scores read K and Q 1024, output reads K 512, exchange of weights 128: 2180
//   tensor cores       2048, the floor
#include <algorithm>

#include "attention/wide_consumer.cuh"
#include "attention/wide_output.cuh"
#include "attention/wide_producer.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

using namespace wide;

constexpr int kProducerRegisters = 64, kConsumerRegisters = 192;  // of a thread
static_assert(2 * kProducerRegisters + 2 * kConsumerRegisters <= ptx::kRegistersOfFourWarpgroups);
static_assert(kThreads == 4 * kWarpgroup);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Divide, turn and store what a consuming warpgroup has of a row.
__device__ __forceinline__ void store_output(const SparseAttention& attention, const Output& output, uint32_t row,
                                             int first_head, int position, int half) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = first_head + thread / kWarp * 16 + lane / 4 + 8 * i;
    const bool exists = head < attention.heads;
    const float reciprocal = finish_head(attention, row, head, output.totals[i], half == 0 && lane % 4 == 0);
    const int64_t vector = static_cast<int64_t>(row) * attention.heads + head;
    __nv_bfloat16* const o = static_cast<__nv_bfloat16*>(attention.o) + vector * kDim + half * (kDim / 2);
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs - 1; ++slab) {
      store_slab(output.sums[slab], i, reciprocal, exists, o + slab * kSlab);
    }
    constexpr int kLast = kHalfSlabs - 1;
    if (half == 0) {
      store_slab(output.sums[kLast], i, reciprocal, exists, o + kLast * kSlab);
    } else {
      const auto* const turns = reinterpret_cast<const float2*>(rope_row(attention.rope.table, kRopeDim, position));
      store_rope_slab(output.sums[kLast], i, reciprocal, exists, turns, o + kLast * kSlab);
    }
  }
}

__device__ __forceinline__ void consume(const SparseAttention& attention, SharedMemory& memory, int own) {
  const uint32_t head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t work = static_cast<uint32_t>(attention.rows) * head_tiles;
  const auto queries_of = [&](uint32_t tile) {
    return Queries(attention, tile / head_tiles, tile % head_tiles * kHeads);
  };
  uint4 rope[2];
  queries_of(blockIdx.x).copy(memory.query);
  queries_of(blockIdx.x).load_rope(rope);
  RowKeys keys = keys_of_row(attention.keys, attention.rope, blockIdx.x / head_tiles);
  for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
    const uint32_t next = min(tile + gridDim.x, work - 1);
    const int units = (keys.count + kUnit - 1) / kUnit, position = keys.position;
    finish_queries(memory.query, rope);
    Output output;
    output.clear();
    if (units == 0) queries_of(next).copy(memory.query);
    for (int first = 0; first < units; first += kStages) {
      const int last = min(first + kStages, units) - 1;
      if (first + own <= last) weigh_unit(memory, own);
      for (int unit = first; unit <= last; ++unit) {
        const int stage = unit - first;
        if (stage != own) ptx::named_barrier(weighed_barrier(stage), kConsumers);
        if (unit == units - 1) {  // both warpgroups have the scores of all units, but not all warps met since
          ptx::named_barrier(warpgroup_barrier(own), kWarpgroup);
          queries_of(next).copy(memory.query);
        }
        output.add(memory, stage, own);
      }
    }
    queries_of(next).load_rope(rope);
    keys = keys_of_row(attention.keys, attention.rope, next / head_tiles);
    store_output(attention, output, tile / head_tiles, tile % head_tiles * kHeads, position, own);
  }
  ptx::cp_async_wait<0>();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_wide_kernel(const __grid_constant__ SparseAttention attention) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<SharedMemory*>(memory_start);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  // The same in all lanes, and known to be: what follows from it lies in uniform registers.
  const int own = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (own < 2) {
    ptx::take_registers<kConsumerRegisters>();
    consume(attention, memory, own);
    return;
  }
  ptx::give_registers<kProducerRegisters>();
  constexpr int kHalfWarps = kProducerWarps / 2;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0) - kConsumers / kWarp;
  if (warp < kHalfWarps) {
    produce_rows<0>(attention, memory, warp);
  } else {
    produce_rows<1>(attention, memory, warp - kHalfWarps);
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
