// Where a fused kernel leaves a row that it has quantised from registers: one policy for each format.
//
// A policy names the outputs of all rows. `begin` moves it to one row. `store` quantises kCount neighbouring values,
// which are rounded to the activation dtype, and writes the codes and the scales; all lanes of the warp call it
// together, those past the end of the row with `inside` false. A format with kNeedsAmax scales by the largest magnitude
// of the row: `scaled` makes of it what has the `store`, once for all of a thread's vectors. Where kSpan is not 0,
// vectors of a thread are stored together, if they lie in the same kSpan columns.
#pragma once

#include "common/quantise.cuh"
#include "common/vector.cuh"

namespace dsv4 {

// q [rows, width] E4M3, scale [rows, width / kGroup] UE8M0.
template <int kGroup>
struct Fp8Row {
  static constexpr bool kNeedsAmax = false;
  static constexpr int kSpan = kGroup;
  uint8_t* q;
  uint8_t* scale;

  __device__ __forceinline__ void begin(int64_t row, unsigned width) {
    q += row * width;
    scale += row * (width / kGroup);
  }

  template <int kCount>
  __device__ __forceinline__ void store(unsigned column, const float (&values)[kCount], bool inside) const {
    uint8_t codes[kCount];
    const uint32_t byte = quantise_fp8<kGroup>(values, codes);
    if (!inside) return;
    store_bytes(q + column, codes);
    if (column % kGroup == 0) scale[column / kGroup] = byte;
  }

  // The same from a thread's vectors as they lie in memory, kGroup / kVectors columns apart: all of one group. Of bf16
  // two magnitudes are compared at a time, and two values scaled, by a power of two.
  template <typename T, int kCount, int kVectors>
  __device__ __forceinline__ void store(unsigned column, const Packed<T, kCount> (&vectors)[kVectors],
                                        bool inside) const {
    uint32_t bits = 0;
#pragma unroll
    for (const auto& vector : vectors) bits = max(bits, vector.max_magnitude_bits());
    const uint32_t byte = fp8_group_scale(__uint_as_float(max_lanes<kGroup / kCount / kVectors>(bits)));
    const float factor = invert_ue8m0(byte);
    if (!inside) return;
    uint8_t* const codes_at = q + column;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float values[kCount];
      vectors[i].times_power_of_two(factor).to_floats(values);
      uint8_t codes[kCount];
      encode_fp8(values, 1.0f, codes);
      store_bytes(codes_at + i * (kGroup / kVectors), codes);
    }
    if (column % kGroup == 0) scale[column / kGroup] = byte;
  }
};

// q [rows, width / 2] pairs of E2M1, scale [rows, width / 32] UE8M0.
struct Mxfp4Row {
  static constexpr bool kNeedsAmax = false;
  static constexpr int kSpan = 0;
  uint8_t* q;
  uint8_t* scale;

  __device__ __forceinline__ void begin(int64_t row, unsigned width) {
    q += row * (width / 2);
    scale += row * (width / 32);
  }

  template <int kCount>
  __device__ __forceinline__ void store(unsigned column, const float (&values)[kCount], bool inside) const {
    uint8_t packed[kCount / 2];
    const uint32_t byte = quantise_mxfp4(values, packed);
    if (!inside) return;
    store_bytes(q + column / 2, packed);
    if (column % 32 == 0) scale[column / 32] = byte;
  }
};

// A row of NVFP4 whose global scale is known.
struct Nvfp4Scaled {
  uint8_t* q;
  uint8_t* scale;
  Nvfp4Global global;

  template <int kCount>
  __device__ __forceinline__ void store(unsigned column, const float (&values)[kCount], bool inside) const {
    store(column, values, group_amax<16>(values), inside);
  }

  // The same from a vector as it lies in memory: of bf16 two magnitudes are compared at a time.
  template <typename T, int kCount>
  __device__ __forceinline__ void store(unsigned column, const Packed<T, kCount> (&vectors)[1], bool inside) const {
    float values[kCount];
    vectors[0].to_floats(values);
    const uint32_t bits = max_lanes<16 / kCount>(vectors[0].max_magnitude_bits());
    store(column, values, __uint_as_float(bits), inside);
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void store(unsigned column, const float (&values)[kCount], float amax,
                                        bool inside) const {
    uint8_t packed[kCount / 2];
    const uint32_t code = quantise_nvfp4(values, amax, global, packed);
    if (!inside) return;
    store_bytes(q + column / 2, packed);
    if (column % 16 == 0) scale[column / 16] = code;
  }
};

// q [rows, width / 2] pairs of E2M1, scale [rows, width / 16] E4M3, global_scale [rows] fp32.
struct Nvfp4Row {
  static constexpr bool kNeedsAmax = true;
  static constexpr int kSpan = 0;
  uint8_t* q;
  uint8_t* scale;
  float* global_scale;

  __device__ __forceinline__ void begin(int64_t row, unsigned width) {
    q += row * (width / 2);
    scale += row * (width / 16);
    global_scale += row;
  }

  // `writes`: this thread stores the global scale.
  __device__ __forceinline__ Nvfp4Scaled scaled(float amax, bool writes) const {
    const float of_row = nvfp4_global_scale(amax);
    if (writes) *global_scale = of_row;
    return {q, scale, Nvfp4Global(of_row)};
  }
};

// output.store of a vector as it lies in memory.
template <typename Output, typename T, int kCount>
__device__ __forceinline__ void store_row(const Output& output, unsigned column, const Packed<T, kCount>& packed,
                                          bool inside) {
  const Packed<T, kCount> vectors[1] = {packed};
  if constexpr (requires { output.store(column, vectors, inside); }) {
    output.store(column, vectors, inside);
  } else {
    float values[kCount];
    packed.to_floats(values);
    output.store(column, values, inside);
  }
}

}  // namespace dsv4
