// PTX of Hopper that the attention kernels with 64 heads need besides ptx_sm90.cuh. One wrapper is one instruction.
#pragma once

#include <cstdint>

namespace dsv4::ptx {

// st.shared.v4: an address in the shared window costs one register where a pointer costs two, and stays in that space.
__device__ __forceinline__ void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// ld.shared.v4
__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// ld.shared.v2
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}

// stmatrix: four matrices 8x8 of 16-bit values. Lane i gives the address of row i % 8 of matrix i / 8 in memory,
// and holds of each (row i / 4, columns 2 * (i % 4) and the next).
__device__ __forceinline__ void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// barrier.cluster.arrive.release and .wait.acquire: all threads of a cluster meet, but those that have ended; what each
// wrote to shared memory before is seen by all after.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// ld.global.v2: 8 bytes.
__device__ __forceinline__ uint2 load_global_8(const void* address) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address));
  return value;
}

// No instruction: the compiler may not move what gives these values behind it.
__device__ __forceinline__ void pin_registers(uint4& a, uint4& b) {
  asm volatile(""
               : "+r"(a.x), "+r"(a.y), "+r"(a.z), "+r"(a.w), "+r"(b.x), "+r"(b.y), "+r"(b.z), "+r"(b.w)
               :
               : "memory");
}

// mapa, ld.shared::cluster: the word at this address in the shared memory of CTA number `rank` of the cluster.
__device__ __forceinline__ uint32_t load_of_cta(uint32_t shared, uint32_t rank) {
  uint32_t value;
  asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.u32 %0, [a];}"
               : "=r"(value)
               : "r"(shared), "r"(rank)
               : "memory");
  return value;
}

// ld.global, predicated: where `condition` holds, 4 bytes take the place of `value`. A branch around a load makes the
// compiler copy what was loaded, and wait for it, where the branch ends.
__device__ __forceinline__ void load_global_if(int32_t& value, const int32_t* address, bool condition) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.s32 %0, [%1];}"
               : "+r"(value)
               : "l"(address), "r"(static_cast<int>(condition)));
}

// st.global.v4, predicated: without a branch, across which nothing would be moved.
__device__ __forceinline__ void store_if(void* address, uint4 value, bool condition) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(address),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(static_cast<int>(condition))
               : "memory");
}

}  // namespace dsv4::ptx
