// wgmma with the first operand in registers (sm_90a), for all numbers of columns that kernels use. One function is one
// instruction.
//
// Thread t of the warpgroup holds in d[i] row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) +
// 2 * (t % 4) + i % 2. Of the rows r = 16 * (t / 32) + t % 32 / 4 and r + 8 it holds in a[0], a[1] four bytes from byte
// 4 * (t % 4) of the step's 32 bytes of k, and in a[2], a[3] four bytes from byte 16 + 4 * (t % 4).
#pragma once

#include "common/ptx_sm90.cuh"

namespace dsv4::ptx {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// An instruction for n columns has n / 2 accumulators, each an operand with a number. C++ has no loop over operands of
// asm, so macros of this file write them down: DSV4_NAMES_c is "%0, .., %<c - 1>", DSV4_SUMS_c the operands d[0] ..
// d[c - 1] that these names stand for.
#define DSV4_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DSV4_NAMES_16 DSV4_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV4_NAMES_20 DSV4_NAMES_16 ", %16, %17, %18, %19"
#define DSV4_NAMES_24 DSV4_NAMES_20 ", %20, %21, %22, %23"
#define DSV4_NAMES_28 DSV4_NAMES_24 ", %24, %25, %26, %27"
#define DSV4_NAMES_32 DSV4_NAMES_28 ", %28, %29, %30, %31"
#define DSV4_NAMES_40 DSV4_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DSV4_NAMES_48 DSV4_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define DSV4_NAMES_56 DSV4_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define DSV4_NAMES_64 DSV4_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV4_FOUR_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DSV4_SUMS_8 DSV4_FOUR_SUMS(0), DSV4_FOUR_SUMS(4)
#define DSV4_SUMS_16 DSV4_SUMS_8, DSV4_FOUR_SUMS(8), DSV4_FOUR_SUMS(12)
#define DSV4_SUMS_20 DSV4_SUMS_16, DSV4_FOUR_SUMS(16)
#define DSV4_SUMS_24 DSV4_SUMS_20, DSV4_FOUR_SUMS(20)
#define DSV4_SUMS_28 DSV4_SUMS_24, DSV4_FOUR_SUMS(24)
#define DSV4_SUMS_32 DSV4_SUMS_28, DSV4_FOUR_SUMS(28)
#define DSV4_SUMS_40 DSV4_SUMS_32, DSV4_FOUR_SUMS(32), DSV4_FOUR_SUMS(36)
#define DSV4_SUMS_48 DSV4_SUMS_40, DSV4_FOUR_SUMS(40), DSV4_FOUR_SUMS(44)
#define DSV4_SUMS_56 DSV4_SUMS_48, DSV4_FOUR_SUMS(48), DSV4_FOUR_SUMS(52)
#define DSV4_SUMS_64 DSV4_SUMS_56, DSV4_FOUR_SUMS(56), DSV4_FOUR_SUMS(60)

// The instruction for `columns` columns, if that is kN. `type` is what follows their number in its name, `signs` what
// follows its operands. Behind `count` accumulators the operands go on with a[0] .. a[3], b, and whether to add, whose
// numbers are a0 .. a3, at and add.
#define DSV4_WGMMA(columns, type, signs, count, a0, a1, a2, a3, at, add)                \
  if constexpr (kN == columns) {                                                        \
    asm volatile(                                                                       \
        "{.reg .pred p; setp.ne.b32 p, %" #add ", 0;"                                   \
        "wgmma.mma_async.sync.aligned.m64n" #columns type " {" DSV4_NAMES_##count "}, " \
        "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #at ", p, " signs ";}"            \
        : DSV4_SUMS_##count                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)           \
        : "memory");                                                                    \
  }

#define DSV4_WGMMA_OF_ANY_WIDTH(type, signs)               \
  DSV4_WGMMA(16, type, signs, 8, 8, 9, 10, 11, 12, 13)     \
  DSV4_WGMMA(32, type, signs, 16, 16, 17, 18, 19, 20, 21)  \
  DSV4_WGMMA(40, type, signs, 20, 20, 21, 22, 23, 24, 25)  \
  DSV4_WGMMA(48, type, signs, 24, 24, 25, 26, 27, 28, 29)  \
  DSV4_WGMMA(56, type, signs, 28, 28, 29, 30, 31, 32, 33)  \
  DSV4_WGMMA(64, type, signs, 32, 32, 33, 34, 35, 36, 37)  \
  DSV4_WGMMA(80, type, signs, 40, 40, 41, 42, 43, 44, 45)  \
  DSV4_WGMMA(96, type, signs, 48, 48, 49, 50, 51, 52, 53)  \
  DSV4_WGMMA(112, type, signs, 56, 56, 57, 58, 59, 60, 61) \
  DSV4_WGMMA(128, type, signs, 64, 64, 65, 66, 67, 68, 69)

// Whether one of these stands for kN columns.
template <int kN>
constexpr bool kIsWgmmaWidth = kN == 40 || kN == 56 || (kN % 16 == 0 && kN >= 16 && kN <= 128);

// wgmma.mma_async.m64n<kN>k32.f32.e4m3.e4m3: d = a * b, or d += a * b, with b [kN, 32] as its descriptor says.
template <int kN>
__device__ __forceinline__ void wgmma_k32_e4m3(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kIsWgmmaWidth<kN>);
  DSV4_WGMMA_OF_ANY_WIDTH("k32.f32.e4m3.e4m3", "1, 1")
}

// The same of bf16, with b [kN, 16], or [16, kN] if kMnMajorB.
template <int kN, bool kMnMajorB = false>
__device__ __forceinline__ void wgmma_k16_bf16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kIsWgmmaWidth<kN>);
  if constexpr (kMnMajorB) {
    DSV4_WGMMA_OF_ANY_WIDTH("k16.f32.bf16.bf16", "1, 1, 1")
  } else {
    DSV4_WGMMA_OF_ANY_WIDTH("k16.f32.bf16.bf16", "1, 1, 0")
  }
}

// The same of f16.
template <int kN>
__device__ __forceinline__ void wgmma_k16_f16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kIsWgmmaWidth<kN>);
  DSV4_WGMMA_OF_ANY_WIDTH("k16.f32.f16.f16", "1, 1, 0")
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4::ptx
