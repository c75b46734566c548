// The gated activation: the arithmetic of swiglu in dsv4_ops/ops/norm.py, and how a lane finds its gates and ups.
//
//   h = silu(min(gate, limit)) * clamp(up, -limit, limit) * route_weight, in fp32, rounded once to the activation dtype
//
// exp is the only step that no two devices agree on, so h is within a rounding of the reference, not equal to it. In fp32
// exp and the quotient have full precision. For bf16 the function spends two instructions on them (ex2.approx and
// rcp.approx; the exact forms would cost a memory-bound kernel more than its memory time): the relative error before
// the rounding to bf16 is below (|gate| + 5) * 2^-24, and silu(gate) for a gate below -87.3, at most 2^-119, comes out as 0.
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

// One value of h as it is stored in T. NaN stays NaN in the clamps too.
template <typename T>
__device__ __forceinline__ float swiglu(float gate, float up, float route_weight, float limit) {
  const float clamped_up = ptx::min_nan(ptx::max_nan(up, -limit), limit);
  return round_to<T>(silu<T>(ptx::min_nan(gate, limit)) * clamped_up * route_weight);
}

// Where gate and up of h[column] lie in a row of gate_up [2 * width]: columns [0, width) and [width, 2 * width).
struct Halves {
  template <int kCount, typename T>
  static __device__ __forceinline__ void load(const T* row, int width, int column, float (&gate)[kCount],
                                              float (&up)[kCount]) {
    load_floats_once(row + column, gate);
    load_floats_once(row + width + column, up);
  }
};

// The same for a row of interleaved pairs (gate, up).
struct Pairs {
  template <int kCount, typename T>
  static __device__ __forceinline__ void load(const T* row, int, int column, float (&gate)[kCount],
                                              float (&up)[kCount]) {
    float pairs[2 * kCount];
    load_floats_once(row + 2 * column, pairs);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gate[i] = pairs[2 * i];
      up[i] = pairs[2 * i + 1];
    }
  }
};

}  // namespace dsv4
