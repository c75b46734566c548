// The order of columns that weights of a format ask for (prefill.h).
//
// A thread of wgmma holds, of a row of the first operand and for each step of 16 columns, those at places 2t, 2t + 1,
// 2t + 8 and 2t + 9, with t = lane % 4. The order of columns in a product is free if both operands have the same, so
// thread t takes from 128 columns whole 16-byte pieces of packed weights, and a step's places are where decoding a word
// leaves its values:
//
//   FP4    t has the 32 columns from 32t on; two steps a word of eight codes; step s has in its pairs (half, even) the
//          codes 2 (s % 2) + half and, as second, the one four further
//   FP8    t has the 16 columns from 16t and from 64 + 16t on; a step a word; pairs are bytes (0, 2) and (1, 3)
//   bf16   t has of each 32 columns the 8 from 8t on; a step two words; pairs are words
#pragma once

#include "moe/moe.h"

namespace dsv4 {

// Place of a column in 128: step, thread, half (pair at 2t or at 2t + 8), second of the pair.
template <MoeFormat kFormat>
struct Order {
  static constexpr bool kFp4 = kFormat == MoeFormat::kMxfp4 || kFormat == MoeFormat::kNvfp4;

  // First of the eight neighbouring columns that thread t has in the steps 2 * two_steps and the one after it.
  static constexpr __host__ __device__ int first(int two_steps, int t) {
    if (kFp4) return 32 * t + 8 * two_steps;
    if (kFormat == MoeFormat::kFp8) return 64 * (two_steps / 2) + 16 * t + 8 * (two_steps % 2);
    return 32 * two_steps + 8 * t;
  }

  // Which of these eight.
  static constexpr __host__ __device__ int among_eight(int step, int half, int second) {
    if (kFp4) return 2 * (step % 2) + 4 * second + half;
    if (kFormat == MoeFormat::kFp8) return 4 * (step % 2) + 2 * second + half;
    return 4 * (step % 2) + 2 * half + second;
  }

  static constexpr __host__ __device__ int column(int step, int t, int half, int second) {
    return first(step / 2, t) + among_eight(step, half, second);
  }
};

// The same for steps of 32 columns in E4M3: a thread holds those at places 4t .. 4t + 3 and 4t + 16 .. 4t + 19. It has
// the 32 columns from 32t on, a step a word of eight codes, of which the even ones come first.
template <>
struct Order<MoeFormat::kMxfp4Folded> {
  static constexpr bool kFp4 = true;

  // `half`: place 4t + i or 4t + 16 + i.
  static constexpr __host__ __device__ int column(int step, int t, int half, int i) {
    return 32 * t + 8 * step + 2 * i + half;
  }
};

}  // namespace dsv4
