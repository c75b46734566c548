// rms_norm_quant_fp8, _mxfp4 and _nvfp4: the kernels of norm/rms_norm_rows.cuh with a quantiser behind them.
#include "fused_quant/fused_quant.h"
#include "norm/rms_norm_rows.cuh"

namespace dsv4 {
namespace {

template <typename Output>
cudaError_t launch(const NormInput& in, Output output, cudaStream_t stream) {
  return launch_rms_norm_rows(in.x, in.dtype, in.rows, in.weight, in.weight_dtype, in.eps, in.y, output, stream);
}

}  // namespace

cudaError_t launch_rms_norm_quant_fp8(const NormInput& in, int group, uint8_t* q, uint8_t* scale, cudaStream_t stream) {
  switch (group) {
    case 32: return launch(in, Fp8Row<32>{q, scale}, stream);
    case 64: return launch(in, Fp8Row<64>{q, scale}, stream);
    case 128: return launch(in, Fp8Row<128>{q, scale}, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_rms_norm_quant_mxfp4(const NormInput& in, uint8_t* q, uint8_t* scale, cudaStream_t stream) {
  return launch(in, Mxfp4Row{q, scale}, stream);
}

cudaError_t launch_rms_norm_quant_nvfp4(const NormInput& in, uint8_t* q, uint8_t* scale, float* global_scale,
                                        cudaStream_t stream) {
  return launch(in, Nvfp4Row{q, scale, global_scale}, stream);
}

}  // namespace dsv4
