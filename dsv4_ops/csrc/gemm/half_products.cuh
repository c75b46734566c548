// Products of a warp's 16 rows of E4M3 weights with x in f16, where x lies in shared memory as StagedX puts it for that.
#pragma once

#include "common/ptx.cuh"
#include "common/ptx_sm90_gemm.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/staged_x.cuh"

namespace dsv4 {

// Of Hopper the four warps of a warpgroup multiply their 64 rows by wgmma, together: all of them call, in the same order.
template <int kTokenTiles>
struct HalfProducts {
  static constexpr int kTokens = 8 * kTokenTiles;
  using Staged = StagedX<Format::kFp8, kTokens>;

  const uint8_t* x;  // the window
  int lane;

  // `part` becomes the products of kSteps fragments of 16 values with x from step `first` of the window on.
  template <int kSteps>
  __device__ __forceinline__ void start(float (&part)[4 * kTokenTiles], const uint32_t (&a)[kSteps][4],
                                        int first) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint64_t b = ptx::wgmma_descriptor(ptx::shared_address(x), 16, 1024, true);
    ptx::pin_registers(part);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = first + i, bytes = step / 4 * Staged::kHalfSlabBytes + step % 4 * 32;
      ptx::wgmma_k16_f16<kTokens>(part, a[i], ptx::advance_descriptor(b, bytes), i > 0);
    }
    ptx::wgmma_commit();
#else
#pragma unroll
    for (float& sum : part) sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = first + i, chunk = step % 4 * 2 + lane / 8 % 2;
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += 2) {
        const int token = n * 8 + lane / 16 * 8 + lane % 8;
        uint32_t words[4];
        ptx::ldmatrix_x4(words, x + step / 4 * Staged::kHalfSlabBytes + token * 128 + (chunk ^ token % 8) * 16);
        ptx::mma_m16n8k16_f16(tile(part, n), a[i], {words[0], words[1]});
        ptx::mma_m16n8k16_f16(tile(part, n + 1), a[i], {words[2], words[3]});
      }
    }
#endif
  }

  // Products that were started are there, but for the last kPending times.
  template <int kPending>
  __device__ __forceinline__ static void wait(float (&part)[4 * kTokenTiles]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    ptx::wgmma_wait<kPending>();
    ptx::pin_registers(part);
#endif
  }

 private:
  __device__ __forceinline__ static float (&tile(float (&part)[4 * kTokenTiles], int n))[4] {
    return reinterpret_cast<float(&)[4]>(part[4 * n]);
  }
};

}  // namespace dsv4
