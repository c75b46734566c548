// swiglu_quant_* and swiglu_interleaved_quant_*: h = rounded(silu(min(gate, limit)) * clamp(up, -limit, limit) *
// route_weight), and codes and scales of the rounded h by the policy `Output` (common/quantised_row.cuh).
//
// One CTA owns a tile of a row, as norm/gated_row.cuh says, and h stays in registers. NVFP4 scales by the largest
// magnitude of the row, so there one CTA owns a row: in one tile up to a width of 8192 (4096 where a thread has one
// vector), in several beyond, each then computed twice. Shared memory: 64 bytes for that maximum.
//
// Floor: with bf16 4 bytes an element of h and its codes (1 or 1/2 byte) at the speed of a copy. FP8, 24576 rows of
// 2048: floor 56 us, measured 65 (H200, 2026-11-25), a best public kernel 59. Memory bounds it: half of the time of a
// warp is waiting for its loads, DRAM is 78% busy, instructions take 33 us and exp and its reciprocal 27. Why DRAM does
// not get busier is not known. Clamping bf16 pairs and one scale for two vectors a thread took a fifth off the
// instructions and 1 us off the time; longer lines in flight a thread have not been tried.
#include "common/quantised_row.cuh"
#include "fused_quant/fused_quant.h"
#include "norm/gated_row.cuh"

namespace dsv4 {
namespace {

template <typename Output>
constexpr int kMaxThreads = Output::kNeedsAmax ? 512 : 256;

template <int kVectors, typename GateUp, typename T, typename Output>
__global__ void __launch_bounds__(kMaxThreads<Output>)
    swiglu_quant_kernel(const T* gate_up, Rows rows, const float* route_weight, float limit, Output output) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const auto width = static_cast<unsigned>(rows.width);
  const unsigned step = blockDim.x * kVectors * kGatedCount;  // columns of a tile
  GatedTile<kVectors, Output::kSpan, GateUp, T> tile;
  const auto compute = [&](unsigned first) {
    tile.compute(gate_up + blockIdx.x * rows.stride, width, first, route_weight + blockIdx.x, limit);
  };
  const auto store = [&](const auto& target, unsigned first) {
    if constexpr (Output::kSpan != 0) {
      const unsigned column = tile.column_of(first, 0);
      target.store(column, tile.h, column < width);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const unsigned column = tile.column_of(first, i);
        store_row(target, column, tile.h[i], column < width);
      }
    }
  };

  output.begin(blockIdx.x, width);
  if constexpr (!Output::kNeedsAmax) {
    compute(blockIdx.y * step);
    store(output, blockIdx.y * step);
  } else {
    __shared__ uint32_t largest[kMaxThreads<Output> / kWarp];
    uint32_t bits = 0;
    for (unsigned first = 0; first < width; first += step) {
      compute(first);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) bits = max(bits, tile.h[i].max_magnitude_bits());
    }
    const auto target = output.scaled(__uint_as_float(max_warps(bits, largest)), threadIdx.x == 0);
    for (unsigned first = 0; first < width; first += step) {
      if (step < width) compute(first);
      store(target, first);
    }
  }
}

template <typename GateUp, typename T, typename Output>
cudaError_t launch_as(const GateUpInput& in, Output output, cudaStream_t stream) {
  const GatedTactic tactic = gated_tactic(in.rows, Output::kNeedsAmax);
  const auto tiles = static_cast<unsigned>(Output::kNeedsAmax ? 1 : tactic.tiles);
  const Launch at{dim3(static_cast<unsigned>(in.rows.count), tiles), dim3(tactic.threads), stream};
  const auto kernel = tactic.vectors == 1 ? swiglu_quant_kernel<1, GateUp, T, Output>
                                          : swiglu_quant_kernel<2, GateUp, T, Output>;
  return launch_kernel(kernel, at, static_cast<const T*>(in.gate_up), in.rows, in.route_weight, in.limit, output);
}

template <typename Output>
cudaError_t launch(const GateUpInput& in, Output output, cudaStream_t stream) {
  return with_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    return in.interleaved ? launch_as<Pairs<T, kGatedCount>, T>(in, output, stream)
                          : launch_as<Halves<T, kGatedCount>, T>(in, output, stream);
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
