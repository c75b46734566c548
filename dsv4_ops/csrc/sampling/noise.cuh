// Gumbel noise from Philox-4x32-10: dsv4_ops/ops/sampling.py says what the words are and how noise is made of them.
#pragma once

#include <cstdint>

namespace dsv4 {

constexpr float kLargestNoise = 23.0f;   // above that of any word: 22.9 for word 0
constexpr float kSmallestNoise = -2.9f;  // below that of any word: -2.82, where u is cut off at 1 - 2^-24

// Words of tokens 4 * block .. 4 * block + 3.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter, uint32_t block) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = block, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u, second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// -log(-log1p(-u)), u = (word + 1/2) / 2^32 below 1.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = fminf(__fmul_rn(__fadd_rn(__uint2float_rn(word), 0.5f), 0x1p-32f), 1.0f - 0x1p-24f);
  return -logf(-log1pf(-u));
}

// Not below gumbel(word), and close to it where that is large. -log1p(-u) >= u, so the noise is at most -log(u), and
// the first 23 bits of the word are not above u. The errors of both logarithms together are below 2e-5.
__device__ __forceinline__ float gumbel_bound(uint32_t word) {
  const float low = __uint_as_float(0x3F800000u | word >> 9) - 1.0f;
  return fmaf(__log2f(low), -0.693147181f, 1e-4f);
}

}  // namespace dsv4
