// Four neighbouring lanes, as the fragments of mma.sync number them.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"

namespace dsv4 {

// Lane q of four has element i of row q in words[i], and gets element q of row i: what ldmatrix would give it.
template <int kWords>
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4][kWords]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        uint32_t &low = words[i][word], &high = words[i | bit][word];
        const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? low : high, bit);
        (upper ? low : high) = other;
      }
    }
  }
}

}  // namespace dsv4
