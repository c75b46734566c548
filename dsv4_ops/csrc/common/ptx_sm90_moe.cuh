// PTX of the large products of moe (sm_90a): copies that an mbarrier counts, barriers of some warps, and bytes picked
// from a table. One wrapper is one instruction.
#pragma once

#include "common/ptx_sm90.cuh"

namespace dsv4::ptx {

// bar.red.or: as named_barrier, and whether `predicate` holds for any of its threads.
__device__ __forceinline__ bool named_barrier_or(int name, int threads, bool predicate) {
  uint32_t any;
  asm volatile(
      "{.reg .pred p, q; setp.ne.b32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.u32 %0, 1, 0, q;}"
      : "=r"(any)
      : "r"(name), "r"(threads), "r"(static_cast<uint32_t>(predicate))
      : "memory");
  return any != 0;
}

// prmt: byte i is the byte of low and high that the three lower bits of nibble i of `places` name; bit 3 of these four
// nibbles must be clear. (__byte_perm clears it.)
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t places) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(places));
  return bytes;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// pin_registers for the first operands of several steps, which must be complete before wgmma_fence.
template <int kSteps>
__device__ __forceinline__ void pin_registers(uint32_t (&values)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(values[step][i])::"memory");
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4::ptx
