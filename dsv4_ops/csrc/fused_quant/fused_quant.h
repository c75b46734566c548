// Launchers of the family `fused_quant`; shapes and dtypes are those of dsv4_ops/ops/fused_quant.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

// x [rows, width] and weight [width] of an RMS norm whose rounded result is stored in y [rows, width] and quantised.
struct NormInput {
  const void* x;
  Dtype dtype;  // of x and y
  Rows rows;
  const void* weight;
  Dtype weight_dtype;
  float eps;
  void* y;
};

// gate_up [rows, 2 * width] of a gated activation h [rows, width], which is quantised and not stored.
struct GateUpInput {
  const void* gate_up;
  Dtype dtype;
  Rows rows;         // those of gate_up, with the width of h
  bool interleaved;  // pairs (gate, up); else all gates, then all ups
  const float* route_weight;
  float limit;
};

// q [rows, width] E4M3, scale [rows, width / group] UE8M0; group 32, 64 or 128.
cudaError_t launch_rms_norm_quant_fp8(const NormInput& in, int group, uint8_t* q, uint8_t* scale, cudaStream_t stream);
cudaError_t launch_swiglu_quant_fp8(const GateUpInput& in, int group, uint8_t* q, uint8_t* scale, cudaStream_t stream);

// q [rows, width / 2], scale [rows, width / 32] UE8M0.
cudaError_t launch_rms_norm_quant_mxfp4(const NormInput& in, uint8_t* q, uint8_t* scale, cudaStream_t stream);
cudaError_t launch_swiglu_quant_mxfp4(const GateUpInput& in, uint8_t* q, uint8_t* scale, cudaStream_t stream);

// q [rows, width / 2], scale [rows, width / 16] E4M3, global_scale [rows].
cudaError_t launch_rms_norm_quant_nvfp4(const NormInput& in, uint8_t* q, uint8_t* scale, float* global_scale,
                                        cudaStream_t stream);
cudaError_t launch_swiglu_quant_nvfp4(const GateUpInput& in, uint8_t* q, uint8_t* scale, float* global_scale,
                                      cudaStream_t stream);

}  // namespace dsv4
