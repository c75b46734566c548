// Launchers of the family `nvfp4`; shapes and dtypes are those of dsv4_ops/ops/nvfp4.py. Outputs are contiguous. A
// tensor has at most kMostElements elements; where it is quantised, rows of x start at multiples of 16 bytes and rows
// of pairs of codes at multiples of 2. `global_rows` describes a global scale [1] or [rows, 1].
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

constexpr int64_t kMostElements = int64_t{1} << 32;
constexpr int kMostPartials = 1024;                 // of nvfp4_global_scale
constexpr int64_t kMostColumns = int64_t{1} << 20;  // of block scales whose layout is changed

// scale [1]; partials [kMostPartials].
cudaError_t launch_nvfp4_global_scale(const void* x, Dtype dtype, Rows rows, uint32_t* partials, float* scale,
                                      cudaStream_t stream);

// scale [rows, 1].
cudaError_t launch_nvfp4_row_scale(const void* x, Dtype dtype, Rows rows, float* scale, cudaStream_t stream);

// q [rows, width / 2] pairs of E2M1, scale [rows, width / 16] E4M3, linear or `tiled`: in the 128x4 layout.
cudaError_t launch_quant_nvfp4(const void* x, Dtype dtype, Rows rows, const float* global_scale, Rows global_rows,
                               bool tiled, uint8_t* q, uint8_t* scale, cudaStream_t stream);

// q [rows, width / 2], scale [rows, width / 16] -> x [rows, width] fp32; `rows` are those of q.
cudaError_t launch_dequant_nvfp4(const uint8_t* q, Rows rows, const uint8_t* scale, Rows scale_rows,
                                 const float* global_scale, Rows global_rows, float* x, cudaStream_t stream);

// The same with the scales in the 128x4 layout.
cudaError_t launch_dequant_nvfp4_128x4(const uint8_t* q, Rows rows, const uint8_t* scale, const float* global_scale,
                                       Rows global_rows, float* x, cudaStream_t stream);

// scale [rows, columns] -> layout [ceil(rows / 128) * ceil(columns / 4) * 512].
cudaError_t launch_nvfp4_scale_to_128x4(const uint8_t* scale, Rows rows, uint8_t* layout, cudaStream_t stream);

// layout -> linear [rows, columns]. The layout starts at a multiple of 16 bytes.
cudaError_t launch_nvfp4_scale_from_128x4(const uint8_t* layout, int64_t rows, int64_t columns, uint8_t* linear,
                                          cudaStream_t stream);

}  // namespace dsv4
