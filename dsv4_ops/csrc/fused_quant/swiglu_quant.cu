// swiglu_quant_* and swiglu_interleaved_quant_*: the kernel of norm/swiglu_rows.cuh with a quantiser behind it.
#include "fused_quant/fused_quant.h"
#include "norm/swiglu_rows.cuh"

namespace dsv4 {
namespace {

template <typename Output>
cudaError_t launch(const GateUpInput& in, Output output, cudaStream_t stream) {
  return with_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* gate_up = static_cast<const T*>(in.gate_up);
    return in.interleaved
               ? launch_swiglu_rows<Pairs<T, kGatedCount>>(gate_up, in.rows, in.route_weight, in.limit, output, stream)
               : launch_swiglu_rows<Halves<T, kGatedCount>>(gate_up, in.rows, in.route_weight, in.limit, output, stream);
  });
}

}  // namespace

cudaError_t launch_swiglu_quant_fp8(const GateUpInput& in, int group, uint8_t* q, uint8_t* scale, cudaStream_t stream) {
  switch (group) {
    case 32: return launch(in, Fp8Row<32>{q, scale}, stream);
    case 64: return launch(in, Fp8Row<64>{q, scale}, stream);
    case 128: return launch(in, Fp8Row<128>{q, scale}, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_swiglu_quant_mxfp4(const GateUpInput& in, uint8_t* q, uint8_t* scale, cudaStream_t stream) {
  return launch(in, Mxfp4Row{q, scale}, stream);
}

cudaError_t launch_swiglu_quant_nvfp4(const GateUpInput& in, uint8_t* q, uint8_t* scale, float* global_scale,
                                      cudaStream_t stream) {
  return launch(in, Nvfp4Row{q, scale, global_scale}, stream);
}

}  // namespace dsv4
