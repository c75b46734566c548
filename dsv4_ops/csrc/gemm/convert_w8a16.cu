// The weight of a W8A16 product of many tokens, from E4M3 with UE8M0 scales to bf16 in the workspace, where the
// library's product reads it.
//
// A CTA owns a row, a thread 16 neighbouring values of it: one load of 16 bytes, which does not wait for the kernels
// before, and two stores.
//
// Floor: 3 bytes a value.
#include "common/e4m3_bf16.cuh"
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "gemm/large.h"

namespace dsv4 {
namespace {

constexpr int kConvertThreads = 256;
constexpr int kUnit = 16;  // values of a thread

__global__ void __launch_bounds__(kConvertThreads) convert_w8a16_kernel(const __grid_constant__ Product p) {
  const int64_t row = blockIdx.x;
  const auto* const codes = static_cast<const uint8_t*>(p.weight) + row * p.weight_stride;
  const auto* const scales = static_cast<const uint8_t*>(p.weight_scale) + row / 128 * p.weight_scale_stride;
  auto* const out = reinterpret_cast<uint4*>(reinterpret_cast<__nv_bfloat16*>(p.partials) + row * p.k);
  const int units = static_cast<int>(p.k / kUnit);
  uint4 unit = {};
  uint32_t scale = 0;
  const auto load = [&](int at) {
    if (at < units) {
      unit = ptx::load_once(codes + at * int64_t{kUnit});
      scale = scales[at / (128 / kUnit)];
    }
  };
  load(threadIdx.x);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  for (int at = threadIdx.x; at < units; at += kConvertThreads) {
    const float value = decode_ue8m0(scale);
    const uint32_t factor = pack_bf16x2(value, value);
    const auto in_order = [&](uint32_t word) -> uint2 {
      const uint32_t even = scale_e4m3<true>(word, 0, factor), odd = scale_e4m3<true>(word, 1, factor);
      return {__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632)};
    };
    const uint2 a = in_order(unit.x), b = in_order(unit.y), c = in_order(unit.z), d = in_order(unit.w);
    out[2 * at] = {a.x, a.y, b.x, b.y};
    out[2 * at + 1] = {c.x, c.y, d.x, d.y};
    load(at + kConvertThreads);
  }
}

}  // namespace

cudaError_t launch_convert_w8a16(const Product& product, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(product.groups * product.rows));
  return launch_kernel(convert_w8a16_kernel, Launch{grid, dim3(kConvertThreads), stream}, product);
}

}  // namespace dsv4
