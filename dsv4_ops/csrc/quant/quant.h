// Launchers of the family `quant`; shapes and dtypes are those of dsv4_ops/ops/quant.py. Outputs are contiguous. A
// tensor has at most kMostElements elements; rows of x start at multiples of 16 bytes, rows of FP8 codes at multiples
// of 4, rows of pairs of FP4 codes at multiples of 2.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

constexpr int64_t kMostElements = int64_t{1} << 32;

// q [rows, width] E4M3, scale [rows, width / group]: UE8M0 bytes, or fp32 where `fp32_scale`.
cudaError_t launch_quant_fp8(const void* x, Dtype dtype, Rows rows, int group, bool fp32_scale, uint8_t* q, void* scale,
                             cudaStream_t stream);

// q [rows, width] E4M3 -> x [rows, width] fp32; a group is a multiple of 4.
cudaError_t launch_dequant_fp8(const uint8_t* q, Rows rows, const void* scale, Rows scale_rows, bool fp32_scale,
                               float* x, cudaStream_t stream);

// q [rows, width / 2] pairs of E2M1, scale [rows, width / 32] UE8M0.
cudaError_t launch_quant_mxfp4(const void* x, Dtype dtype, Rows rows, uint8_t* q, uint8_t* scale, cudaStream_t stream);

// q [rows, width / 2] -> x [rows, width] fp32; `rows` are those of q.
cudaError_t launch_dequant_mxfp4(const uint8_t* q, Rows rows, const uint8_t* scale, Rows scale_rows, float* x,
                                 cudaStream_t stream);

}  // namespace dsv4
