// A CTA of sparse_attention_wide.cu or sparse_attention_mixed.cu: who does what.
#pragma once

#include "attention/wide_consumer.cuh"
#include "attention/wide_producer.cuh"
#include "common/launch.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace dsv4::wide {

template <Fold kFold, bool kQuantised, typename Queries, typename Operands>
__device__ __forceinline__ void attend_rows(const Operands& operands, const SparseAttention& attention) {
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<SharedMemory*>(memory_start);
  if (threadIdx.x == 0) memory.hand_overs.init();
  __syncthreads();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  // The same in all lanes, and known to be: what follows from it lies in uniform registers.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
  if (warp < kConsumers / kWarp) {
    ptx::take_registers<kConsumerRegisters>();
    consume_rows<kFold, kQuantised, Queries>(operands, attention, memory, warp / 4);
  } else {
    ptx::give_registers<kProducerRegisters>();
    produce_rows<kFold>(attention, memory, warp - kConsumers / kWarp);
  }
}

}  // namespace dsv4::wide
#endif  // __CUDA_ARCH_FEAT_SM90_ALL
