// Rotary embedding of interleaved pairs, bit for bit apply_rope of dsv4_ops/ops/rope.py: products and sums are rounded
// one by one, so nothing may be contracted to an FMA.
//
// The last `rope_dim` channels of a row are rotated. `first` is the place of a lane's first value among those channels,
// column - (dim - rope_dim): even, and negative where the value is not rotated. A row of the table holds (cos, sin) of
// each pair. The table is a parameter of the model, positions are not.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "common/rope.h"

namespace dsv4 {

// Where the position of token `token` of all B * tokens lies.
__device__ __forceinline__ const int32_t* position_of(const Rope& rope, uint32_t token) {
  return rope.positions + token / rope.tokens * rope.stride + token % rope.tokens;
}

// The position that a token probably has, in front of ptx::wait_for_predecessors(): what depends on a position can then
// be loaded together with the position, instead of after it. Only a kernel that runs right before this one can still
// write positions, and then what is read here may be anything. So it lies in the table whatever it is, serves only to
// choose what to load, and has to be compared with the position that is read after the wait.
__device__ __forceinline__ int guess_position(const Rope& rope, const int32_t* position) {
  return max(min(ptx::load_relaxed(position), rope.rows - 1), 0);
}

// Row of the table for a position; a row without a token (-1) is rotated as position 0.
__device__ __forceinline__ const float* rope_row(const float* table, int rope_dim, int32_t position) {
  return table + static_cast<int64_t>(max(position, 0)) * rope_dim;
}

// (cos, sin) of the pairs of kCount neighbouring values; those of pairs that are not rotated are not read.
template <int kCount>
__device__ __forceinline__ void load_turns(const float* row, int first, float2 (&turns)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int channel = first + 2 * i;
    turns[i] = channel >= 0 ? *reinterpret_cast<const float2*>(row + channel) : float2{1.0f, 0.0f};
  }
}

// (even, odd) turned by an angle. With -sin instead of sin it is the inverse rotation.
__device__ __forceinline__ float2 rotate(float2 pair, float2 turn) {
  const float even = __fsub_rn(__fmul_rn(pair.x, turn.x), __fmul_rn(pair.y, turn.y));
  const float odd = __fadd_rn(__fmul_rn(pair.x, turn.y), __fmul_rn(pair.y, turn.x));
  return {even, odd};
}

// Rotate those of a lane's values that belong to the rotated channels.
template <int kCount>
__device__ __forceinline__ void rotate(float (&values)[kCount], int first, const float2 (&turns)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    if (first + 2 * i < 0) continue;  // a turn by (1, 0) would change -0 and inf
    const float2 turned = rotate(float2{values[2 * i], values[2 * i + 1]}, turns[i]);
    values[2 * i] = turned.x;
    values[2 * i + 1] = turned.y;
  }
}

}  // namespace dsv4
