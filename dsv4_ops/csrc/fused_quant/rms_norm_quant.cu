// rms_norm_quant_fp8, _mxfp4 and _nvfp4: y = rounded(weight * x / rms(x)), and codes and scales of the rounded y by the
// policy `Output` (common/quantised_row.cuh).
//
// One CTA owns a row, as norm/norm_row.cuh says: weights into registers before the wait, x after it, one barrier for
// the sum of squares, for NVFP4 a second one for the largest magnitude of y, then y and its codes out of registers.
// Shared memory: 64 bytes for each of the two.
//
// With few rows the GPU is empty and the time is that of one CTA, of which quantising is a third. So gridDim.y CTAs
// work on the same row: each computes all of y, and writes and quantises every gridDim.y-th warp's part. Who writes has
// no influence on the bits.
//
// Floor: with bf16 2 + 2 bytes an element and the codes (1 or 1/2 byte) at the speed of a copy. NVFP4, 4096 rows of
// 7168: floor 31 us, measured 44 (H200, 2026-11-25) with 36 instructions an element, two thirds of them in the E2M1
// codes and exact quotients of quantise.cuh. They bound it: 78% of the issue slots were taken, the rest was lost at the
// two barriers of a row, which is why as many rows as possible are in flight. One row of 7168: 2.1 us.
#include "common/quantised_row.cuh"
#include "fused_quant/fused_quant.h"
#include "norm/norm_row.cuh"

namespace dsv4 {
namespace {

constexpr int kFewRows = 32;  // rows that several CTAs share

// NVFP4 waits at two barriers a row, and computes longer than it loads: five CTAs, at the cost of ten registers
// spilled. The others leave registers for four CTAs on Hopper, and for three on Blackwell.
template <typename Output>
constexpr int kManyCtas = Output::kNeedsAmax ? 5 : 3;

template <int kVectors, int kParts, typename T, typename W, typename Output>
__global__ void __launch_bounds__(norm_max_threads(kVectors) / kParts, norm_min_ctas<kParts, T, W>(kManyCtas<Output>))
    rms_norm_quant_kernel(const T* x, Rows rows, const W* weight, float eps, T* y, Output output) {
  __shared__ alignas(16) float sums[kNormMaxWarps];
  NormRow<kVectors, kParts, T, W> row;
  row.width = static_cast<unsigned>(rows.width);
  row.load_weights(weight);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  row.load(x + blockIdx.x * rows.stride);
  row.normalise(eps, sums);

  output.begin(blockIdx.x, row.width);
  y += blockIdx.x * rows.width;
  const auto store = [&](const auto& target) {
    // This CTA's share of the warps: gridDim.y is a power of two.
    if ((threadIdx.x / kWarp & (gridDim.y - 1)) != blockIdx.y) return;
#pragma unroll
    for (int i = 0; i < row.kAll; ++i) {
      store_row(target, row.column_of(i), row.values[i], row.inside(i));
      if (row.inside(i)) row.values[i].store(y + row.column_of(i));
    }
  };
  if constexpr (Output::kNeedsAmax) {
    __shared__ uint32_t largest[kNormMaxWarps];
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < row.kAll; ++i) bits = max(bits, row.values[i].max_magnitude_bits());
    bits = max_warps(bits, largest);
    store(output.scaled(__uint_as_float(bits), threadIdx.x == 0 && blockIdx.y == 0));
  } else {
    store(output);
  }
}

template <typename T, typename W, typename Output>
__global__ void __launch_bounds__(kNormMaxWarps * kWarp)
    rms_norm_quant_any_kernel(const T* x, Rows rows, const W* weight, float eps, T* y, Output output) {
  __shared__ alignas(16) float sums[kNormMaxWarps];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const auto width = static_cast<unsigned>(rows.width);
  y += blockIdx.x * rows.width;
  const uint32_t bits = norm_any_row(x + blockIdx.x * rows.stride, weight, width, eps, y, sums);
  output.begin(blockIdx.x, width);
  const auto store = [&](const auto& target) {
    for_each_norm_vector(width, [&](unsigned column) {
      float values[kNormCount];
      load_some(y + column, static_cast<int>(width - column), values);  // what this thread has stored
      target.store(column, values, column < width);
    });
  };
  if constexpr (Output::kNeedsAmax) {
    __shared__ uint32_t largest[kNormMaxWarps];
    store(output.scaled(__uint_as_float(max_warps(bits, largest)), threadIdx.x == 0));
  } else {
    store(output);
  }
}

template <typename T, typename W, typename Output>
cudaError_t launch(const T* x, Rows rows, const W* weight, float eps, T* y, Output output, cudaStream_t stream) {
  const NormTactic tactic = norm_tactic(rows, sizeof(T), {x, weight, y});
  const bool alone = !tactic.in_registers || rows.count > kFewRows || tactic.warps < 8;
  const unsigned ctas = alone ? 1 : tactic.warps < 12 ? 2 : 4;  // of a row
  const Launch at{dim3(static_cast<unsigned>(rows.count), ctas), dim3(tactic.warps * kWarp), stream};
  if (!tactic.in_registers) {
    return launch_kernel(rms_norm_quant_any_kernel<T, W, Output>, at, x, rows, weight, eps, y, output);
  }
  return with_norm_tactic(tactic, [&](auto vectors, auto parts) {
    const auto kernel = rms_norm_quant_kernel<vectors(), parts(), T, W, Output>;
    return launch_kernel(kernel, at, x, rows, weight, eps, y, output);
  });
}

template <typename Output>
cudaError_t launch(const NormInput& in, Output output, cudaStream_t stream) {
  return with_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    return with_dtype(in.weight_dtype, [&](auto weight_element) {
      const auto* weight = static_cast<const decltype(weight_element)*>(in.weight);
      return launch(static_cast<const T*>(in.x), in.rows, weight, in.eps, static_cast<T*>(in.y), output, stream);
    });
  });
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
