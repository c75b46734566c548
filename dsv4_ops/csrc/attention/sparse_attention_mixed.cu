// Sparse attention with scores from FP8 products: queries and keys are multiplied as the E4M3 codes that they are, rope
// dimensions and output in bf16. Otherwise sparse_attention_wide.cu, whose warpgroups, hand-overs and fold these are.
//
// Groups of 64 dimensions of a key have a scale each. So a group's products are summed apart (2 wgmma m64n32k32: 64
// heads x 32 keys, from zero) and added to the scores by an FMA with the key's scale, in the order of the groups: the
// tensor cores add FP8 products with 13 bits below the largest one, and over 64 dimensions that stays below what the
// rounding of the queries costs. Then the scores are multiplied by the query's scale, and the rope dimensions are
// added.
//
// Shared memory, 224 KB: two tiles of keys in bf16 2 x 64 KB, for the output, and of their codes 2 x 28 KB, which
// make room for the weights once they have been multiplied; queries 28 and 8 KB; scales 3.6 KB.
//
// Cost of a unit in cycles of an SM, against sparse_attention_wide.cu: tensor cores 448 + 128 for scores (1024) and
// 1024; shared memory 224 more to write codes, 800 for scores (1024); issue slots of each quarter 300 more for scores.
//
// H200, 2026-11-25: prefill of 4096 rows, 64 heads, 1152 keys 314 TFLOP/s, less than the 384 of the exact form: it has
// the same conversion of keys to bf16 for the output, and the codes to write beside it.
#include <algorithm>

#include "attention/mixed_attention.h"
#include "attention/wide_consumer.cuh"
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

struct Queries {
  RopePart rope;
  float scales[2];  // of this thread's heads

  // Start copies of the codes.
  __device__ __forceinline__ static void copy(const MixedAttention& mixed, uint32_t row, int first_head,
                                              MixedMemory& memory) {
    const int head = threadIdx.x / 4, quarter = threadIdx.x % 4, heads = mixed.attention.heads;
    const uint8_t* const from =
        mixed.queries.nope + quarter * 16 +
        vector_at(mixed.attention.rope, mixed.queries.nope_strides, row, min(first_head + head, heads - 1));
    uint8_t* const to = memory.query_codes + code_offset(head, quarter);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      ptx::cp_async_16(to + group * kGroupBytes, from + group * 64, first_head + head < heads ? 16 : 0);
    }
  }
  __device__ __forceinline__ void load(const MixedAttention& mixed, uint32_t row, int first_head) {
    const int heads = mixed.attention.heads, head = first_head + threadIdx.x / 4;
    const auto* const q = static_cast<const __nv_bfloat16*>(mixed.queries.rope);
    rope.load(q + vector_at(mixed.attention.rope, mixed.queries.rope_strides, row, min(head, heads - 1)),
              head < heads);
    const int first = first_head + threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = min(first + 8 * i, heads - 1);
      scales[i] = mixed.queries.scale[vector_at(mixed.attention.rope, mixed.queries.scale_strides, row, own)];
    }
  }
  __device__ __forceinline__ void store(MixedMemory& memory) { rope.store(memory.query_rope); }

  // scores [64 heads, 64 keys] = queries . keys of the tile of a stage
  __device__ __forceinline__ void multiply(const MixedMemory& memory, int stage, uint32_t parity,
                                           float (&scores)[32]) const {
    const uint64_t a = ptx::wgmma_descriptor_64(ptx::shared_address(memory.query_codes));
    const uint64_t b = ptx::wgmma_descriptor_64(ptx::shared_address(memory.codes[stage]));
    const float* const key_scales = memory.scales[stage][0] + threadIdx.x % 4 * 2;
    const auto start = [&](int keys, int group, float(&part)[16]) {
      ptx::pin_registers(part);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int bytes = group * kGroupBytes + step * 32;
        ptx::wgmma_32_e4m3(part, ptx::advance_descriptor(a, bytes),
                           ptx::advance_descriptor(b, bytes + keys * (kGroupBytes / 2)), step);
      }
      ptx::wgmma_commit();
    };
    const auto add = [&](int keys, int group, const float(&part)[16]) {
      const float* const from = key_scales + group * kUnit + keys * 32;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 factors = *reinterpret_cast<const float2*>(from + i / 4 * 8);
        const float factor = i % 2 == 0 ? factors.x : factors.y;
        float& score = scores[keys * 16 + i];
        score = group == 0 ? __fmul_rn(part[i], factor) : __fmaf_rn(part[i], factor, score);
      }
    };
    // Keys 0 .. 31: a group is multiplied while the one before is added. For the others there are no registers left for
    // that.
    float parts[2][16];
    ptx::mbarrier_wait(memory.hand_overs.full(stage, 0), parity);
    start(0, 0, parts[0]);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group + 1 == kHalfSlabs) ptx::mbarrier_wait(memory.hand_overs.full(stage, 1), parity);
      if (group + 1 < kGroups) {
        start(0, group + 1, parts[(group + 1) % 2]);
        ptx::wgmma_wait<1>();
      } else {
        ptx::wgmma_wait<0>();
      }
      ptx::pin_registers(parts[group % 2]);
      add(0, group, parts[group % 2]);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      start(1, group, parts[0]);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(parts[0]);
      add(1, group, parts[0]);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = __fmul_rn(scores[i], scales[i / 2 % 2]);

    const uint32_t rope_slab = ptx::shared_address(memory.keys) + (stage + 1) * kTileBytes - kSlabBytes;
    const uint64_t query_rope = ptx::wgmma_descriptor(ptx::shared_address(memory.query_rope), 16, 1024, true);
    const uint64_t key_rope = ptx::wgmma_descriptor(rope_slab, 16, 1024, true);
    ptx::pin_registers(scores);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRopeDim / 16; ++step) {
      ptx::wgmma<kUnit, false, false>(scores, ptx::advance_descriptor(query_rope, step * 32),
                                      ptx::advance_descriptor(key_rope, step * 32), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_mixed_kernel(const __grid_constant__ MixedAttention mixed) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<MixedMemory*>(memory_start);
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
  produce_rows(mixed.attention, memory, __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0) - kConsumers / kWarp);
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
  const Launch at{dim3(std::min<int64_t>(tiles, processors)), dim3(kThreads), stream, sizeof(MixedMemory)};
  return launch_kernel(sparse_attention_mixed_kernel, at, mixed);
}

}  // namespace dsv4
