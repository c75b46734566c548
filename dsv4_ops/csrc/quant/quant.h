// Launchers of the family `quant`; shapes and dtypes are those of dsv4_ops/ops/quant.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

// q [rows, width] E4M3, scale [rows, width / group]: UE8M0 bytes, or fp32 where `fp32_scale`.
cudaError_t launch_quant_fp8(const void* x, Dtype dtype, Rows rows, int group, bool fp32_scale, uint8_t* q, void* scale,
                             cudaStream_t stream);

}  // namespace dsv4
