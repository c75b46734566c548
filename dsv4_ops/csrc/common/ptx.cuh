// PTX instructions that CUDA C++ has no name for: one wrapper, one instruction. No PTX stands anywhere else.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace dsv4::ptx {

// griddepcontrol.launch_dependents: the next kernel of the stream may start its preamble once every CTA said so.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// griddepcontrol.wait: the kernels before this one have finished and their writes can be seen.
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// prefetch.global.L2: the line at `address` comes to L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ld.global.L1::no_allocate.v4: 16 bytes that are read once and that no kernel writes while this one runs. Not .nc:
// ptxas takes what such a load reads for constant and may move it above griddepcontrol.wait.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// ld.global.v4, ld.global.L1::evict_first.v4: 16 bytes of a line of which the SM soon loads the rest. The line stays in
// L1, or goes first when others need its place.
__device__ __forceinline__ uint4 load_16(const void* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ uint4 load_shared_line(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::evict_first.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// st.global.v4: 16 bytes. An assignment may become several stores: the compiler takes vectors apart, and does not
// always find them again where a thread writes to several rows.
__device__ __forceinline__ void store(void* address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// cp.async.cg: 16 bytes from global to shared memory, both at multiples of 16, past L1; zeros, and no read, for `bytes`
// 0. Asks L2 for the 128 bytes around.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}

// cp.async.ca: 4 bytes from global to shared memory, both at multiples of 4; zeros, and no read, for `bytes` 0.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// cp.async.ca: 8 bytes from global to shared memory, both at multiples of 8.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(global) : "memory");
}

// cp.async.commit_group: the copies of this thread since the last commit are one group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: all but the last kPending groups of this thread have arrived, and this thread sees them.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ld.relaxed.gpu.global: 4 bytes from L2, also while another kernel writes them; leaves nothing in L1.
__device__ __forceinline__ int32_t load_relaxed(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// fence.acq_rel.gpu: loads after it see at least what the loads before it could have seen; what L1 holds is dropped.
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// mul.hi.u32: the upper word of the product. By 2^(32 - n) it is a shift to the right by n that does not take the pipe
// of shifts and logic, which is the busy one where codes are taken apart.
__device__ __forceinline__ uint32_t mul_hi(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.hi.u32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// lop3.b32: the bits of `a` where `mask` has ones, else those of `b`. Written out in C++ and masked again afterwards,
// it becomes two instructions for each mask.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(result) : "r"(a), "r"(b), "n"(kMask));
  return result;
}

// min.NaN.f32, max.NaN.f32: NaN if an operand is NaN, where fminf and fmaxf return the other operand.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// ex2.approx.ftz.f32: 2^value within 2^-22 of itself; a result below 2^-126 is 0.
__device__ __forceinline__ float ex2_approx_ftz(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// rcp.approx.ftz.f32: 1 / value within one ulp; a result below 2^-126 is 0.
__device__ __forceinline__ float rcp_approx_ftz(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// rsqrt.approx.ftz.f32: 1 / sqrt(value) within 2^-22.9 of itself.
__device__ __forceinline__ float rsqrt_approx_ftz(float value) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// cvt.rn.satfinite.e4m3x2.f32: nearest even, saturating at 448; NaN gives 0x7F. `low` goes to bits 0..7.
__device__ __forceinline__ uint16_t cvt_e4m3x2(float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// cvt.rn.f16x2.e4m3x2: exact.
__device__ __forceinline__ __half2 cvt_half2(uint16_t e4m3x2) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(e4m3x2));
  return *reinterpret_cast<__half2*>(&halves);
}

// cvt.rn.f16x2.e4m3x2 of both halves of a word: pairs (0, 1) and (2, 3). Taken apart by mov, the upper half costs no
// shift.
__device__ __forceinline__ void cvt_half2x2(uint32_t (&pairs)[2], uint32_t e4m3x4) {
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(e4m3x4));
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d += a * b for a warp's 16x16 and 16x8 tiles. With row = lane /
// 4 and pair = 2 * (lane % 4), a lane holds a (row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8) and b
// (pair, row), (pair + 8, row), each with its right (b: lower) neighbour in the high half, and d (row, pair),
// (row, pair + 1), (row + 8, pair), (row + 8, pair + 1).
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32: the same of f16.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same without addend: d = a * b.
__device__ __forceinline__ void mul_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8 x 16-byte matrices. Lane i names row i % 8 of matrix i / 8, and gets
// bytes 4 * (lane % 4) .. + 3 of row lane / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x2.shared.b16: two of them, named by lanes 0 .. 15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&words)[2], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
}

}  // namespace dsv4::ptx
