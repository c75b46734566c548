// Launchers of rms_norm and swiglu; shapes and dtypes are those of dsv4_ops/ops/norm.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

// y [rows, width] of x's dtype; weight [width].
cudaError_t launch_rms_norm(const void* x, Dtype dtype, Rows rows, const void* weight, Dtype weight_dtype, float eps,
                            void* y, cudaStream_t stream);

// h [rows, width] of gate_up's dtype; `rows` are those of gate_up [rows, 2 * width], with the width of h.
cudaError_t launch_swiglu(const void* gate_up, Dtype dtype, Rows rows, const float* route_weight, float limit, void* h,
                          cudaStream_t stream);

}  // namespace dsv4
