// From a group's pooled channels to its entry in the pool: norm, rope, Hadamard, quantiser.
#pragma once

#include <type_traits>

#include "common/hadamard.cuh"
#include "common/pages.cuh"
#include "common/rms_norm.cuh"
#include "common/rope.cuh"
#include "compressor/compressor.h"
#include "compressor/pooling.cuh"

namespace dsv4 {

// What an entry is rounded to between its steps.
template <EntryForm kForm>
using EntryElement = std::conditional_t<kForm == EntryForm::kPlain, float, __nv_bfloat16>;

// Four norm weights from `column` on.
__device__ __forceinline__ void load_weights(const Compressor& c, int column, float (&weights)[kQuad]) {
  if (c.norm_dtype == Dtype::kBf16) {
    load_floats(static_cast<const __nv_bfloat16*>(c.norm_weight) + column, weights);
  } else {
    load_floats(static_cast<const float*>(c.norm_weight) + column, weights);
  }
}

template <EntryForm kForm, int kDim>
__device__ __forceinline__ void write_index(const Entry& entry, int column, float (&values)[kQuad], bool inside) {
  hadamard<kDim>(values);
  round_all_to<__nv_bfloat16>(values);
  if constexpr (kForm == EntryForm::kIndexFp8) {
    write_index_fp8<kDim>(entry, column, values, inside);
  } else {
    write_index_fp4<kDim>(entry, column, values, inside);
  }
}

template <EntryForm kForm>
__device__ __forceinline__ void write_entry(const Entry& entry, int dim, int rope_dim, int column,
                                            float (&values)[kQuad], bool inside) {
  if constexpr (kForm == EntryForm::kPlain) {
    write_plain(entry, dim, column, values, inside);
  } else if constexpr (kForm == EntryForm::kKv) {
    write_kv_packed(entry, dim - rope_dim, rope_dim, column, values, inside);
  } else {
    switch (dim) {
      case 32: return write_index<kForm, 32>(entry, column, values, inside);
      case 64: return write_index<kForm, 64>(entry, column, values, inside);
      default: return write_index<kForm, 128>(entry, column, values, inside);
    }
  }
}

// 1 / rms of `dim` channels, whose squares add up to `sum`. A power of two is divided by without a division.
template <int kDim>
__device__ __forceinline__ float inverse_rms_of(float sum, int dim, float eps) {
  if constexpr (kDim > 0 && (kDim & (kDim - 1)) == 0) {
    return __frcp_rn(__fsqrt_rn(__fadd_rn(__fmul_rn(sum, 1.0f / kDim), eps)));
  } else {
    return inverse_rms(sum, dim, eps);
  }
}

// A quad of pooled channels, rounded to the entry's element -> the entry.
template <EntryForm kForm>
__device__ __forceinline__ void finish_entry(const Entry& entry, int dim, int rope_dim, int column, float inverse_rms,
                                             const float (&weights)[kQuad], const float2 (&turns)[kQuad / 2],
                                             float (&values)[kQuad], bool inside) {
  using T = EntryElement<kForm>;
  rms_norm<T>(values, weights, inverse_rms);
  rotate(values, column - (dim - rope_dim), turns);
  round_all_to<T>(values);
  write_entry<kForm>(entry, dim, rope_dim, column, values, inside);
}

}  // namespace dsv4
