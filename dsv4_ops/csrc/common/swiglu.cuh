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

// The clamps of gate and up. For bf16 they are done two at a time, if the limit is a bf16 too.
class SwigluLimit {
 public:
  __device__ __forceinline__ explicit SwigluLimit(float limit)
      : limit_(limit), pair_(pack_bf16x2(limit, limit)), is_bf16_(unpack_bf16x2(pair_).x == limit) {}

  // NaN stays NaN.
  __device__ __forceinline__ float gate(float value) const { return ptx::min_nan(value, limit_); }
  __device__ __forceinline__ float up(float value) const {
    return ptx::min_nan(ptx::max_nan(value, -limit_), limit_);
  }

  __device__ __forceinline__ bool is_bf16() const { return is_bf16_; }
  __device__ __forceinline__ uint32_t gates(uint32_t word) const { return min_bf16x2(word, pair_); }
  __device__ __forceinline__ uint32_t ups(uint32_t word) const {
    return min_bf16x2(max_bf16x2(word, pair_ ^ 0x80008000u), pair_);
  }
  // The gate in the lower half.
  __device__ __forceinline__ uint32_t gate_and_up(uint32_t word) const {
    return min_bf16x2(max_bf16x2(word, (pair_ & 0xFFFF0000u) ^ 0x8000FF80u), pair_);  // 0xFF80 is -infinity
  }

 private:
  float limit_;
  uint32_t pair_;
  bool is_bf16_;
};

// h of neighbouring columns, as it is stored in T, from gates and ups as they were loaded. kPairs: limit.is_bf16().
template <bool kPairs, typename T, int kCount, typename GateUp>
__device__ __forceinline__ Packed<T, kCount> swiglu(GateUp loaded, float route_weight, const SwigluLimit& limit) {
  float gate[kCount], up[kCount], h[kCount];
  if constexpr (kPairs) loaded.clamp(limit);
  loaded.to_floats(gate, up);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float clamped_gate = kPairs ? gate[i] : limit.gate(gate[i]);
    h[i] = silu<T>(clamped_gate) * (kPairs ? up[i] : limit.up(up[i])) * route_weight;
  }
  Packed<T, kCount> result;
  result.round(h);
  return result;
}

// kCount gates and ups of neighbouring columns of h, as they were loaded from a row of gate_up [2 * width] that has the
// gates in its first half and the ups in its second.
template <typename T, int kCount>
struct Halves {
  static constexpr bool kPacked = true;
  Packed<T, kCount> gates, ups;

  // Those `further` behind `column`: a constant that becomes part of the access.
  __device__ __forceinline__ void load(const T* row, unsigned width, unsigned column, int further) {
    gates.load_once(row + column + further);
    ups.load_once(row + width + column + further);
  }

  __device__ __forceinline__ void clamp(const SwigluLimit& limit) {
    gates = gates.map_words([&](uint32_t word) { return limit.gates(word); });
    ups = ups.map_words([&](uint32_t word) { return limit.ups(word); });
  }

  __device__ __forceinline__ void to_floats(float (&gate)[kCount], float (&up)[kCount]) const {
    gates.to_floats(gate);
    ups.to_floats(up);
  }
};

// The same for a row of interleaved pairs (gate, up).
template <typename T, int kCount>
struct Pairs {
  static constexpr bool kPacked = true;
  Packed<T, 2 * kCount> pairs;

  __device__ __forceinline__ void load(const T* row, unsigned, unsigned column, int further) {
    pairs.load_once(row + 2 * column + 2 * further);
  }

  __device__ __forceinline__ void clamp(const SwigluLimit& limit) {
    pairs = pairs.map_words([&](uint32_t word) { return limit.gate_and_up(word); });
  }

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
