// PTX of Hopper that the attention kernels with 64 heads need besides ptx_sm90.cuh. One wrapper is one instruction.
#pragma once

#include <cstdint>

namespace dsv4::ptx {

// bar.arrive: counts this warp at barrier `name` of `threads` threads without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// st.shared: an address in the shared window costs one register where a pointer costs two, and stays in that space.
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

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

// ld.global: 4 bytes at an address that came from another lane, of which the compiler does not know where it points.
__device__ __forceinline__ uint32_t load_global(const void* address) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
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

// As kRegistersOfThreeWarpgroups of ptx_sm90.cuh, for a CTA of four.
constexpr int kRegistersOfFourWarpgroups = 4 * 128;

// ld.global, predicated: where `condition` holds, 4 bytes take the place of `value`. A branch around a load makes the
// compiler copy what was loaded, and wait for it, where the branch ends.
__device__ __forceinline__ void load_global_if(int32_t& value, const int32_t* address, bool condition) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.s32 %0, [%1];}"
               : "+r"(value)
               : "l"(address), "r"(static_cast<int>(condition)));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// wgmma.mma_async.m64n64k16.f32.bf16.bf16 with A from registers: d = a * b, or d += a * b. d as in ptx::wgmma. With row
// = 16 * (t / 32) + t % 32 / 4 and k = 2 * (t % 4), thread t of the warpgroup holds in a[] A (row, k), (row + 8, k),
// (row, k + 8), (row + 8, k + 8), each with its right neighbour in the high half.
template <bool kMnMajorB>
__device__ __forceinline__ void wgmma_64(float (&d)[32], uint4 a, uint64_t b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(accumulate), "n"(kMnMajorB)
      : "memory");
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4::ptx
