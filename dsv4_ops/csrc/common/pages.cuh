// Writing entries of paged pools, byte for byte as dsv4_ops/ops/pages.py lays them out. Per page:
//
//   packed KV         page_size x [nope E4M3 | rope BF16], page_size x [8 * ceil(nope/512) bytes: UE8M0 per 64, zeros]
//   packed index FP8  page_size x [dim E4M3], page_size x fp32 scale
//   packed index FP4  page_size x [dim / 2 E2M1 pairs], page_size x [dim / 32 UE8M0]
//   plain             page_size x [dim fp32]
//
// A lane hands over kCount neighbouring values of an entry, the first of them at `column`, and neighbouring lanes hold
// neighbouring values: lanes find the amax of a group together, so all lanes of the warp must call a packed writer.
// Those with `inside` false write nothing. Offsets are 64-bit: pools exceed 2^31 bytes.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/pool.h"
#include "common/quantise.cuh"
#include "common/vector.cuh"

namespace dsv4 {

constexpr int kKvGroup = 64;     // channels that share a scale in the packed KV page
constexpr int kIndexGroup = 32;  // channels that share a scale in the FP4 index page

// Where one entry lies.
struct Entry {
  uint8_t* page;
  int page_size;
  int slot;  // of the page

  // Its `bytes` bytes in the part of the page that starts at `start` and has as many bytes for each entry.
  __device__ uint8_t* part(int64_t start, int bytes) const { return page + start + static_cast<int64_t>(slot) * bytes; }
};

__device__ __forceinline__ Entry find_entry(const Pool& pool, int64_t sequence, int entry) {
  const int32_t page = pool.table[sequence * pool.table_stride + entry / pool.page_size];
  return {pool.data + page * pool.page_stride, pool.page_size, entry % pool.page_size};
}

// An entry of `dim` fp32 values. Pages start at multiples of 16 bytes and dim is a multiple of 4.
template <int kCount>
__device__ __forceinline__ void write_plain(const Entry& entry, int dim, int column, const float (&values)[kCount],
                                            bool inside) {
  if (inside) store_floats(reinterpret_cast<float*>(entry.part(0, dim * 4)) + column, values);
}

// A packed KV entry of `nope` + `rope_dim` values: nope is a multiple of 64, rope_dim of kCount. Pages start at
// multiples of 8 bytes.
template <int kCount>
__device__ __forceinline__ void write_kv_packed(const Entry& entry, int nope, int rope_dim, int column,
                                                const float (&values)[kCount], bool inside) {
  static_assert(kCount == 4 || kCount == 8, "accesses of at most 8 bytes");
  uint8_t codes[kCount];
  const uint32_t scale = quantise_fp8<kKvGroup>(values, codes);
  if (!inside) return;
  const int data_bytes = nope + 2 * rope_dim;
  uint8_t* const data = entry.part(0, data_bytes);
  if (column >= nope) {
    auto* const rope = reinterpret_cast<__nv_bfloat16*>(data + nope) + (column - nope);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      Vector<__nv_bfloat162, 2> four;
      four.values[0] = __floats2bfloat162_rn(values[i], values[i + 1]);
      four.values[1] = __floats2bfloat162_rn(values[i + 2], values[i + 3]);
      *reinterpret_cast<uint2*>(rope + i) = reinterpret_cast<const uint2&>(four);
    }
    return;
  }
  store_bytes(data + column, codes);
  if (column % kKvGroup != 0) return;
  const int group = column / kKvGroup, scale_bytes = (nope + 511) / 512 * 8;
  uint8_t* const scales = entry.part(static_cast<int64_t>(entry.page_size) * data_bytes, scale_bytes);
  scales[group] = scale;
  if (column + kKvGroup < nope) return;
  for (int padding = group + 1; padding < scale_bytes; ++padding) scales[padding] = 0;
}

// A KV entry in the pool's layout.
template <int kCount>
__device__ __forceinline__ void write_kv(const Pool& pool, const Entry& entry, int dim, int rope_dim, int column,
                                         const float (&values)[kCount], bool inside) {
  if (pool.plain) {
    write_plain(entry, dim, column, values, inside);
  } else {
    write_kv_packed(entry, dim - rope_dim, rope_dim, column, values, inside);
  }
}

// An index key in FP8. Pages start at multiples of 16 bytes.
template <int kDim, int kCount>
__device__ __forceinline__ void write_index_fp8(const Entry& entry, int column, const float (&values)[kCount],
                                                bool inside) {
  uint8_t codes[kCount];
  const float scale = quantise_fp8_fp32_scale<kDim>(values, codes);
  if (!inside) return;
  store_bytes(entry.part(0, kDim) + column, codes);
  uint8_t* const scales = entry.part(static_cast<int64_t>(entry.page_size) * kDim, 4);
  if (column == 0) *reinterpret_cast<float*>(scales) = scale;
}

// An index key in FP4. Pages start at multiples of 8 bytes.
template <int kDim, int kCount>
__device__ __forceinline__ void write_index_fp4(const Entry& entry, int column, const float (&values)[kCount],
                                                bool inside) {
  uint8_t packed[kCount / 2];
  const uint32_t scale = quantise_mxfp4(values, packed);
  if (!inside) return;
  store_bytes(entry.part(0, kDim / 2) + column / 2, packed);
  uint8_t* const scales = entry.part(static_cast<int64_t>(entry.page_size) * (kDim / 2), kDim / kIndexGroup);
  if (column % kIndexGroup == 0) scales[column / kIndexGroup] = scale;
}

}  // namespace dsv4
