// The gated activation: the arithmetic of swiglu in dsv4_ops/ops/norm.py, and how a lane finds its gates and ups.
//
//   h = silu(min(gate, limit)) * clamp(up, -limit, limit) * route_weight, in fp32, rounded once to the activation dtype
//
// exp is the only step that no two devices agree on, so h is within a rounding of the reference, not equal to it. In
// fp32 exp and the quotient have full precision. For bf16 they are two approximate instructions (the exact forms would
// cost a memory-bound kernel more than its memory time): the relative error before the rounding to bf16 is below
// (|gate| + 5) * 2^-24, and silu(gate) for a gate below -87.3, at most 2^-119, comes out as 0.
#pragma once

#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace dsv4 {

template <typename T>
__device__ __forceinline__ float silu(float gate) {
  if constexpr (sizeof(T) == sizeof(float)) return gate / (1.0f + expf(-gate));
  constexpr float kMinusLog2E = -1.44269504f;
  return gate * ptx::rcp_approx_ftz(1.0f + ptx::ex2_approx_ftz(gate * kMinusLog2E));
}

// h as it is stored in T. NaN stays NaN in the clamps too.
template <typename T, int kCount>
__device__ __forceinline__ void swiglu(const float (&gate)[kCount], const float (&up)[kCount], float route_weight,
                                       float limit, float (&h)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float clamped_up = ptx::min_nan(ptx::max_nan(up[i], -limit), limit);
    h[i] = silu<T>(ptx::min_nan(gate[i], limit)) * clamped_up * route_weight;
  }
  round_all_to<T>(h);
}

// kCount gates and ups of neighbouring columns of h, as they were loaded from a row of gate_up [2 * width] that has the
// gates in its first half and the ups in its second.
template <typename T, int kCount>
struct Halves {
  Packed<T, kCount> gates, ups;

  __device__ __forceinline__ void load(const T* row, unsigned width, unsigned column) {
    gates.load_once(row + column);
    ups.load_once(row + width + column);
  }

  __device__ __forceinline__ void to_floats(float (&gate)[kCount], float (&up)[kCount]) const {
    gates.to_floats(gate);
    ups.to_floats(up);
  }
};

// The same for a row of interleaved pairs (gate, up).
template <typename T, int kCount>
struct Pairs {
  Packed<T, 2 * kCount> pairs;

  __device__ __forceinline__ void load(const T* row, unsigned, unsigned column) { pairs.load_once(row + 2 * column); }

  __device__ __forceinline__ void to_floats(float (&gate)[kCount], float (&up)[kCount]) const {
    float values[2 * kCount];
    pairs.to_floats(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gate[i] = values[2 * i];
      up[i] = values[2 * i + 1];
    }
  }
};

}  // namespace dsv4
