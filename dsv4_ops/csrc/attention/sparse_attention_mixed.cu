// Sparse attention for queries in two parts: E4M3 codes with one scale for each head, and rope dimensions in bf16. It
// is sparse_attention_wide.cu, with its warpgroups, producers, hand-overs and fold, but for the queries: codes are made
// bf16, which is exact, as they are brought to shared memory, and their products are multiplied by the scale of the
// query before those of the rope dimensions are added.
//
// The tensor cores could multiply codes by codes in half the time, but not sooner: keys must be in bf16 for the output
// anyway, and codes beside them are bytes to bring and to write, while products of scores are not what bounds a row
// (sparse_attention_wide.cu). FP8 products were built and measured on an H200, 2026-11-25, with the producers of that
// day: prefill of 4096 rows, 64 heads, 1152 keys reached 314 TFLOP/s, where bf16 products of queries in bf16 had 384.
//
// Codes of the next row are asked for in L2 while the last unit is added, and loaded once it is: there are no
// registers, and no room in shared memory, for them before.
#include <algorithm>

#include "attention/mixed_attention.h"
#include "attention/wide_roles.cuh"

namespace dsv4 {
namespace {

using namespace wide;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ int64_t vector_at(const Rope& rope, const VectorStrides& strides, uint32_t row, int head) {
  return row / rope.tokens * strides.sequence + row % rope.tokens * strides.token + head * strides.head;
}

constexpr int kGroups = kNope / 64;

// A thread brings of head threadIdx.x / 4 16 codes of each group of 64, and 16 rope dimensions. It multiplies products
// of two other heads.
struct Queries {
  float scales[2];

  __device__ __forceinline__ static const uint8_t* codes_of(const MixedAttention& mixed, uint32_t row, int head) {
    return mixed.queries.nope + vector_at(mixed.attention.rope, mixed.queries.nope_strides, row,
                                          min(head, mixed.attention.heads - 1));
  }

  __device__ __forceinline__ static void copy(const MixedAttention& mixed, uint32_t row, int first_head,
                                              SharedMemory& memory) {
    static_assert(kConsumers == 4 * kHeads && kNope / 4 <= 128, "a line of L2 for each of four threads");
    const int heads = mixed.attention.heads, own = threadIdx.x / 4, head = first_head + own, quarter = threadIdx.x % 4;
    ptx::prefetch_l2(codes_of(mixed, row, head) + quarter * (kNope / 4));
    const auto* const rope =
        static_cast<const __nv_bfloat16*>(mixed.queries.rope) +
        vector_at(mixed.attention.rope, mixed.queries.rope_strides, row, min(head, heads - 1)) + quarter * 16;
    uint8_t* const slab = memory.query + kTileBytes - kSlabBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::cp_async_16(slab + chunk_offset(own, quarter * 2 + i), rope + i * 8, head < heads ? 16 : 0);
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void finish(const MixedAttention& mixed, uint32_t row, int first_head,
                                         SharedMemory& memory) {
    const int heads = mixed.attention.heads, own = threadIdx.x / 4;
    const bool exists = first_head + own < heads;
    const uint8_t* const codes = codes_of(mixed, row, first_head + own) + threadIdx.x % 4 * 16;
    uint4 parts[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) parts[group] = ptx::load_once(codes + group * 64);
    const uint32_t at = ptx::shared_address(memory.query) + chunk_offset(own, threadIdx.x % 4 * 2);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint4 first, second;
      unpack_e4m3(exists ? parts[group] : uint4{0, 0, 0, 0}, first_factor(127), first, second);
      ptx::store_shared(at + group * kSlabBytes, first);
      ptx::store_shared((at ^ 16) + group * kSlabBytes, second);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = min(head_of_thread(first_head, i), heads - 1);
      scales[i] = mixed.queries.scale[vector_at(mixed.attention.rope, mixed.queries.scale_strides, row, head)];
    }
    ptx::cp_async_wait<0>();
    ptx::mbarrier_arrive(memory.hand_overs.queries());
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

__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_mixed_kernel(const __grid_constant__ MixedAttention mixed) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  attend_rows<Fold::kRunning, false, Queries>(mixed, mixed.attention);
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
  return launch_kernel(sparse_attention_mixed_kernel, at, mixed);
}

}  // namespace dsv4
