// Products of more tokens than one stream takes, where another kernel is faster:
//
//   FP8            cuBLASLt with fp32 scales of blocks, through aten::_scaled_mm; Hopper and CUDA 12.9
//   bf16           aten::mm and aten::bmm
//   W8A16          the same from 193 tokens on, with the weight converted to bf16 beforehand
//   MXFP4, NVFP4   the kernels of the experts (moe/prefill.h); Hopper
//
// Which products these are follows from the format, the widths, the number of tokens, how operands lie, and the GPU.
// The others are streams of 64 tokens each (linear.cpp), which is correct for any number. The libraries' kernels are
// as safe in CUDA graphs as ours: torch calls them on the current stream, with its own workspace.
#pragma once

#include "gemm/gemm.h"

namespace dsv4 {

// x_scale [tokens * groups, blocks] and weight_scale [weight_scales] in UE8M0 -> fp32, as cuBLASLt reads them: x's as
// [groups][blocks][tokens], the weight's as they are.
struct Fp8Scales {
  const uint8_t* x;
  int64_t x_stride;
  const uint8_t* weight;  // null: nothing to do
  int64_t weight_scales;
  float* x_fp32;
  float* weight_fp32;
  int64_t tokens;
  int groups, blocks;  // blocks: of 128 along k, a multiple of 4
};

cudaError_t launch_fp8_scales(const Fp8Scales& scales, cudaStream_t stream);

// The weight of a W8A16 product -> bf16 [groups * rows, k] at `partials`; k a multiple of 16, rows at multiples of 16
// bytes.
cudaError_t launch_convert_w8a16(const Product& product, cudaStream_t stream);

// Whether launch_large takes the product.
bool large_serves(Format format, const Product& product);

// fp32 numbers of workspace that it needs, as dsv4_ops/ops/gemm_workspace.py computes them or more.
int64_t large_floats(Format format, const Product& product);

// `product.partials` is that workspace; `device` is the current one. Raises where torch's operator does.
cudaError_t launch_large(Format format, const Product& product, int device, cudaStream_t stream);

}  // namespace dsv4
