// Sparse attention for queries in two parts: E4M3 codes with one scale for each head, and rope dimensions in bf16. It
// is sparse_attention_wide.cu, with its warpgroups, producers, hand-overs and fold, but for the queries: codes are made
// bf16, which is exact, as they are brought to shared memory, and their products are multiplied by the scale of the
// query before those of the rope dimensions are added.
//
// The tensor cores could multiply codes by codes in half the time, but not sooner: keys must be in bf16 for the output
// anyway, and codes beside them are bytes to bring and to write. H200, 2026-11-25, prefill of 4096 rows, 64 heads, 1152
// keys: 446 TFLOP/s, as much as queries in bf16. With keys that each row unpacks, FP8 products reached 314 TFLOP/s
// where bf16 products of queries in bf16 had 384.
//
// Codes of the next row are asked for in L2 while the last unit is added, and loaded once the output is stored: there
// are no registers, and no room in shared memory, for them before.
#include <algorithm>

#include "attention/mixed_attention.h"
#include "attention/wide_consumer.cuh"
#include "attention/wide_copier.cuh"
#include "attention/wide_producer.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

using namespace wide;

constexpr int kProducerRegisters = 64, kConsumerRegisters = 192;  // of a thread
static_assert(2 * kProducerRegisters + 2 * kConsumerRegisters <= ptx::kRegistersOfFourWarpgroups);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ int64_t vector_at(const Rope& rope, const VectorStrides& strides, uint32_t row, int head) {
  return row / rope.tokens * strides.sequence + row % rope.tokens * strides.token + head * strides.head;
}

constexpr int kGroups = kNope / 64;

// A thread brings of head threadIdx.x / 4 16 codes of each group of 64, and multiplies products of two heads.
struct Queries {
  const uint8_t* codes;
  bool exists;
  RopePart rope;
  float scales[2];

  __device__ __forceinline__ static const uint8_t* codes_of(const MixedAttention& mixed, uint32_t row, int head) {
    return mixed.queries.nope + vector_at(mixed.attention.rope, mixed.queries.nope_strides, row,
                                          min(head, mixed.attention.heads - 1));
  }

  __device__ __forceinline__ static void copy(const MixedAttention& mixed, uint32_t row, int first_head,
                                              SharedMemory&) {
    static_assert(kNope / 4 <= 128, "a line of L2 for each of four threads");
    ptx::prefetch_l2(codes_of(mixed, row, first_head + threadIdx.x / 4) + threadIdx.x % 4 * (kNope / 4));
  }
  __device__ __forceinline__ void load(const MixedAttention& mixed, uint32_t row, int first_head) {
    const int heads = mixed.attention.heads, head = first_head + threadIdx.x / 4;
    codes = codes_of(mixed, row, head) + threadIdx.x % 4 * 16;
    exists = head < heads;
    const auto* const q = static_cast<const __nv_bfloat16*>(mixed.queries.rope);
    rope.load(q + vector_at(mixed.attention.rope, mixed.queries.rope_strides, row, min(head, heads - 1)), exists);
    const int first = first_head + threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = min(first + 8 * i, heads - 1);
      scales[i] = mixed.queries.scale[vector_at(mixed.attention.rope, mixed.queries.scale_strides, row, own)];
    }
  }
  __device__ __forceinline__ void store(SharedMemory& memory) {
    uint4 parts[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) parts[group] = ptx::load_once(codes + group * 64);
    const uint32_t at = ptx::shared_address(memory.query) + chunk_offset(threadIdx.x / 4, threadIdx.x % 4 * 2);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint4 first, second;
      unpack_e4m3(exists ? parts[group] : uint4{0, 0, 0, 0}, first_factor(127), first, second);
      ptx::store_shared(at + group * kSlabBytes, first);
      ptx::store_shared((at ^ 16) + group * kSlabBytes, second);
    }
    rope.store(memory.query + kTileBytes - kSlabBytes);
  }

  __device__ __forceinline__ void multiply(const SharedMemory& memory, int stage, uint32_t parity,
                                           float (&scores)[32]) const {
    multiply_slabs<0, kGroups>(memory, stage, parity, scores);
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = __fmul_rn(scores[i], scales[i / 2 % 2]);
    multiply_slabs<kGroups, kSlabs>(memory, stage, parity, scores);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <bool kUnpacked>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_mixed_kernel(const __grid_constant__ MixedAttention mixed) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<SharedMemory*>(memory_start);
  if (threadIdx.x == 0) memory.hand_overs.init();
  __syncthreads();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  // The same in all lanes, and known to be: what follows from it lies in uniform registers.
  const int own = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (own < 2) {
    ptx::take_registers<kConsumerRegisters>();
    consume_rows<Fold::kRunning, Queries>(mixed, mixed.attention, memory, own);
    return;
  }
  ptx::give_registers<kProducerRegisters>();
  const int producer = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0) - kConsumers / kWarp;
  if constexpr (kUnpacked) {
    copy_rows(mixed.attention, memory, producer);
  } else {
    produce_rows(mixed.attention, memory, producer);
  }
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

}  // namespace

cudaError_t launch_sparse_attention_mixed(const MixedAttention& mixed, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  const int64_t tiles = mixed.attention.rows * ((mixed.attention.heads + kHeads - 1) / kHeads);
  const Launch at{dim3(std::min<int64_t>(tiles, processors)), dim3(kThreads), stream, sizeof(SharedMemory)};
  if (mixed.attention.unpacked.entries == nullptr) {
    return launch_kernel(sparse_attention_mixed_kernel<false>, at, mixed);
  }
  status = launch_unpack_keys(mixed.attention, stream);
  return status == cudaSuccess ? launch_kernel(sparse_attention_mixed_kernel<true>, at, mixed) : status;
}

}  // namespace dsv4
