// Scales of an FP8 product of many tokens, from UE8M0 to the fp32 that cuBLASLt reads, those of x transposed.
//
// A thread owns four neighbouring blocks of one token: a 4-byte load, and four stores at which the threads of a warp
// write 32 neighbouring tokens. Further CTAs convert the scales of the weight, 16 bytes of fp32 a thread.
//
// Floor: 5 bytes a scale, a 25th of what the product reads of x: latency.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "gemm/large.h"

namespace dsv4 {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kAtOnce = 4;  // scales of a thread: 4 bytes

__device__ float4 decode_four(uint32_t bytes) {
  return {decode_ue8m0(bytes & 0xFF), decode_ue8m0(bytes >> 8 & 0xFF), decode_ue8m0(bytes >> 16 & 0xFF),
          decode_ue8m0(bytes >> 24)};
}

__global__ void __launch_bounds__(kScaleThreads) fp8_scales_kernel(const __grid_constant__ Fp8Scales s) {
  const int quads = s.blocks / kAtOnce;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  const int row = blockIdx.y;
  if (row >= s.groups * quads) {  // of the weight, a parameter
    const int64_t width = static_cast<int64_t>(gridDim.x) * kScaleThreads;
    const int64_t first = ((row - s.groups * quads) * width + place) * kAtOnce;
    const bool any = first < s.weight_scales;
    const uint32_t bytes = any ? *reinterpret_cast<const uint32_t*>(s.weight + first) : 0;
    ptx::wait_for_predecessors();
    ptx::launch_dependents();
    if (any) *reinterpret_cast<float4*>(s.weight_fp32 + first) = decode_four(bytes);
    return;
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  if (place >= s.tokens) return;
  const int group = row / quads, block = row % quads * kAtOnce;
  const uint8_t* const x = s.x + (place * s.groups + group) * s.x_stride + block;
  const float4 scales = decode_four(*reinterpret_cast<const uint32_t*>(x));
  float* const out = s.x_fp32 + (static_cast<int64_t>(group) * s.blocks + block) * s.tokens + place;
  out[0] = scales.x;
  out[s.tokens] = scales.y;
  out[2 * s.tokens] = scales.z;
  out[3 * s.tokens] = scales.w;
}

}  // namespace

cudaError_t launch_fp8_scales(const Fp8Scales& scales, cudaStream_t stream) {
  const auto ceil_divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t columns = ceil_divide(scales.tokens, kScaleThreads);
  const int64_t of_x = scales.groups * (scales.blocks / kAtOnce);
  const int64_t of_weight =
      scales.weight == nullptr ? 0 : ceil_divide(scales.weight_scales, columns * kScaleThreads * kAtOnce);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(of_x + of_weight));
  return launch_kernel(fp8_scales_kernel, Launch{grid, dim3(kScaleThreads), stream}, scales);
}

}  // namespace dsv4
