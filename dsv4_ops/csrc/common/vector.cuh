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

// The two bf16 of a word as fp32: its halves in the upper half of a register.
__device__ __forceinline__ float2 unpack_bf16x2(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}

__device__ __forceinline__ __nv_bfloat162 as_bf16x2(uint32_t word) {
  return reinterpret_cast<const __nv_bfloat162&>(word);
}

__device__ __forceinline__ uint32_t as_word(__nv_bfloat162 pair) { return reinterpret_cast<const uint32_t&>(pair); }

// Two values rounded to bf16 in a word.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  return as_word(__floats2bfloat162_rn(low, high));
}

// min and max of the bf16 in two words, half by half; NaN if one of the two is. And their product, rounded.
__device__ __forceinline__ uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  return as_word(__hmin2_nan(as_bf16x2(a), as_bf16x2(b)));
}

__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  return as_word(__hmax2_nan(as_bf16x2(a), as_bf16x2(b)));
}

__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return as_word(__hmul2(as_bf16x2(a), as_bf16x2(b)));
}

// Elements as they lie in memory -> fp32, of which the first goes to values[first].
template <int kWidth, int kCount, typename T>
__device__ __forceinline__ void unpack(const Vector<T, kWidth>& vector, int first, float (&values)[kCount]) {
  if constexpr (sizeof(T) == 2 && kWidth % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const float2 pair = unpack_bf16x2(reinterpret_cast<const uint32_t&>(vector.values[i]));
      values[first + i] = pair.x;
      values[first + i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[first + i] = to_float(vector.values[i]);
  }
}

// round_to<T> of neighbouring values, a pair in one instruction.
template <typename T, int kCount>
__device__ __forceinline__ void round_all_to(float (&values)[kCount]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 pair = unpack_bf16x2(pack_bf16x2(values[i], values[i + 1]));
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  }
}

// kCount elements at `address` (aligned to the access) -> fp32, in accesses of up to 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load_floats(const T* address, float (&values)[kCount]) {
  constexpr int kWidth = sizeof(T) * kCount < 16 ? kCount : 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < kCount; first += kWidth) {
    const auto part = *reinterpret_cast<const Vector<T, kWidth>*>(address + first);  // a copy: one access
    unpack(part, first, values);
  }
}

// kCount elements as they lie in memory, in parts of 16 bytes: from bf16 half the registers that their values take.
template <typename T, int kCount>
struct Packed {
  static constexpr int kWidth = 16 / sizeof(T);
  static_assert(kCount % kWidth == 0, "whole parts");
  uint4 parts[kCount / kWidth];

  __device__ __forceinline__ void load(const T* address) {
#pragma unroll
    for (int i = 0; i < kCount / kWidth; ++i) parts[i] = *reinterpret_cast<const uint4*>(address + i * kWidth);
  }

  // The same for what is read once: it leaves nothing in L1.
  __device__ __forceinline__ void load_once(const T* address) {
#pragma unroll
    for (int i = 0; i < kCount / kWidth; ++i) parts[i] = ptx::load_once(address + i * kWidth);
  }

  // function(word) for every word: for bf16, two elements.
  template <typename Function>
  __device__ __forceinline__ Packed map_words(Function function) const {
    Packed result;
#pragma unroll
    for (int i = 0; i < kCount / kWidth; ++i) {
      result.parts[i] = {function(parts[i].x), function(parts[i].y), function(parts[i].z), function(parts[i].w)};
    }
    return result;
  }

  // Products with a normal power of two, or with NaN; of bf16 two at a time.
  __device__ __forceinline__ Packed times_power_of_two(float factor) const {
    if constexpr (sizeof(T) == 2) {
      const uint32_t pair = __byte_perm(__float_as_uint(factor), 0, 0x3232);
      return map_words([&](uint32_t word) { return mul_bf16x2(word, pair); });
    } else {
      return map_words([&](uint32_t word) { return __float_as_uint(__uint_as_float(word) * factor); });
    }
  }

  // Elements i and i + 1, for an even i.
  __device__ __forceinline__ float2 pair(int i) const {
    const uint32_t* const words = &parts[i / kWidth].x + i % kWidth * sizeof(T) / sizeof(uint32_t);
    if constexpr (sizeof(T) == 2) return unpack_bf16x2(words[0]);
    return {__uint_as_float(words[0]), __uint_as_float(words[1])};
  }

  __device__ __forceinline__ void round_pair(int i, float2 values) {
    uint32_t* const words = &parts[i / kWidth].x + i % kWidth * sizeof(T) / sizeof(uint32_t);
    if constexpr (sizeof(T) == 2) {
      words[0] = pack_bf16x2(values.x, values.y);
    } else {
      words[0] = __float_as_uint(values.x);
      words[1] = __float_as_uint(values.y);
    }
  }

  __device__ __forceinline__ void to_floats(float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount / kWidth; ++i) {
      unpack(reinterpret_cast<const Vector<T, kWidth>&>(parts[i]), i * kWidth, values);
    }
  }

  __device__ __forceinline__ void round(const float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) round_pair(i, {values[i], values[i + 1]});
  }

  // Bits of the largest magnitude as fp32, ordered as unsigned integers: NaN above infinity above every number.
  __device__ __forceinline__ uint32_t max_magnitude_bits() const {
    uint32_t largest = 0;  // of bf16: two, of the even and of the odd elements
#pragma unroll
    for (int i = 0; i < kCount / kWidth; ++i) {
#pragma unroll
      for (const uint32_t word : {parts[i].x, parts[i].y, parts[i].z, parts[i].w}) {
        largest = sizeof(T) == 2 ? __vmaxu2(largest, word & 0x7FFF7FFFu) : max(largest, word & 0x7FFFFFFFu);
      }
    }
    return sizeof(T) == 2 ? max(largest << 16, largest & 0xFFFF0000u) : largest;
  }

  // To global memory, 16 bytes in one store. An assignment may become several: the compiler takes vectors apart, and
  // does not always find them again where a thread writes to several rows.
  __device__ __forceinline__ void store(T* address) const {
#pragma unroll
    for (int i = 0; i < kCount / kWidth; ++i) __stwb(reinterpret_cast<uint4*>(address + i * kWidth), parts[i]);
  }
};

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

// The first `left` elements at `address`, one by one, and zeros: for the end of a row, or a row that starts anywhere.
template <int kCount, typename T>
__device__ __forceinline__ void load_some(const T* address, int left, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = i < left ? to_float(address[i]) : 0.0f;
}

template <int kCount, typename T>
__device__ __forceinline__ void store_some(T* address, int left, const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < left) address[i] = from_float<T>(values[i]);
  }
}

// kBytes bytes (1, 2, 4, 8 or 16) in one store. They are joined pair by pair: what was taken apart from a pair or a
// word then costs nothing.
template <int kBytes>
__device__ __forceinline__ void store_bytes(uint8_t* address, const uint8_t (&bytes)[kBytes]) {
  const auto pair = [&](int i) { return static_cast<uint32_t>(bytes[i]) | static_cast<uint32_t>(bytes[i + 1]) << 8; };
  if constexpr (kBytes == 1) {
    *address = bytes[0];
  } else if constexpr (kBytes == 2) {
    *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(pair(0));
  } else {
    Vector<uint32_t, kBytes / 4> words;
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words.values[i] = pair(4 * i) | pair(4 * i + 2) << 16;
    *reinterpret_cast<Vector<uint32_t, kBytes / 4>*>(address) = words;
  }
}

}  // namespace dsv4
