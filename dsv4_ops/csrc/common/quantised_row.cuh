// Where a fused kernel leaves a row that it has quantised from registers: one policy for each format.
//
// A policy names the outputs of all rows. `begin` moves it to one row. `store` quantises kCount neighbouring values,
// which are rounded to the activation dtype, and writes the codes and the scales; all lanes of the warp call it
// together, those past the end of the row with `inside` false. A format with kNeedsAmax scales by the largest magnitude
// of the row: `scale_by` tells it to every thread before the first `store`.
#pragma once

#include "common/quantise.cuh"
#include "common/vector.cuh"

namespace dsv4 {

// q [rows, width] E4M3, scale [rows, width / kGroup] UE8M0.
template <int kGroup>
struct Fp8Row {
  static constexpr bool kNeedsAmax = false;
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
};

// q [rows, width / 2] pairs of E2M1, scale [rows, width / 32] UE8M0.
struct Mxfp4Row {
  static constexpr bool kNeedsAmax = false;
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

// q [rows, width / 2] pairs of E2M1, scale [rows, width / 16] E4M3, global_scale [rows] fp32.
struct Nvfp4Row {
  static constexpr bool kNeedsAmax = true;
  uint8_t* q;
  uint8_t* scale;
  float* global_scale;
  float of_row;  // set by scale_by

  __device__ __forceinline__ void begin(int64_t row, unsigned width) {
    q += row * (width / 2);
    scale += row * (width / 16);
    global_scale += row;
  }

  __device__ __forceinline__ void scale_by(float amax, bool writes) {
    of_row = clamp_min(__fdiv_rn(amax, kNvfp4Largest), kNvfp4ScaleFloor);
    if (writes) *global_scale = of_row;
  }

  template <int kCount>
  __device__ __forceinline__ void store(unsigned column, const float (&values)[kCount], bool inside) const {
    uint8_t packed[kCount / 2];
    const uint32_t code = quantise_nvfp4(values, of_row, packed);
    if (!inside) return;
    store_bytes(q + column / 2, packed);
    if (column % 16 == 0) scale[column / 16] = code;
  }
};

}  // namespace dsv4
