// Loading and storing several elements at once, as fp32 in registers.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

// kCount elements that are loaded or stored by one instruction (up to 16 bytes).
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  static_assert(sizeof(T) * kCount <= 16 && (kCount & (kCount - 1)) == 0, "at most 16 bytes, a power of two");
  T values[kCount];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The value that is left after a store in T and a load: where the model rounds between two fused steps.
template <typename T>
__device__ __forceinline__ float round_to(float value) {
  return to_float(from_float<T>(value));
}

// kCount elements at `address` (aligned to the access) -> fp32, in accesses of up to 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load_floats(const T* address, float (&values)[kCount]) {
  constexpr int kWidth = sizeof(T) * kCount < 16 ? kCount : 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < kCount; first += kWidth) {
    const auto part = *reinterpret_cast<const Vector<T, kWidth>*>(address + first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[first + i] = to_float(part.values[i]);
  }
}

// load_floats in accesses of 16 bytes that leave nothing in L1, for what is read once and not written meanwhile.
template <int kCount, typename T>
__device__ __forceinline__ void load_floats_once(const T* address, float (&values)[kCount]) {
  constexpr int kWidth = 16 / sizeof(T);
  static_assert(kCount % kWidth == 0, "whole accesses of 16 bytes");
#pragma unroll
  for (int first = 0; first < kCount; first += kWidth) {
    const uint4 loaded = ptx::load_once(address + first);
    const auto& part = reinterpret_cast<const Vector<T, kWidth>&>(loaded);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[first + i] = to_float(part.values[i]);
  }
}

// fp32 values rounded to T and stored, in accesses of up to 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void store_floats(T* address, const float (&values)[kCount]) {
  constexpr int kWidth = sizeof(T) * kCount < 16 ? kCount : 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < kCount; first += kWidth) {
    Vector<T, kWidth> part;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) part.values[i] = from_float<T>(values[first + i]);
    *reinterpret_cast<Vector<T, kWidth>*>(address + first) = part;
  }
}

// kBytes bytes (1, 2, 4, 8 or 16) in one store.
template <int kBytes>
__device__ __forceinline__ void store_bytes(uint8_t* address, const uint8_t (&bytes)[kBytes]) {
  Vector<uint8_t, kBytes> vector;
#pragma unroll
  for (int i = 0; i < kBytes; ++i) vector.values[i] = bytes[i];
  *reinterpret_cast<Vector<uint8_t, kBytes>*>(address) = vector;
}

}  // namespace dsv4
