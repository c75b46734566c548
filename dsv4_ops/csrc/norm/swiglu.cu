// swiglu: h = rounded(silu(min(gate, limit)) * clamp(up, -limit, limit) * route_weight).
//
// One CTA owns a tile of a row, as norm/gated_row.cuh says; no shared memory. Rows that are not whole vectors or start
// anywhere are read and written element by element.
// Floor: with bf16 4 + 2 bytes an element of h at the speed of a copy.
#include "norm/gated_row.cuh"
#include "norm/norm.h"

namespace dsv4 {
namespace {

constexpr int kMaxThreads = 256;

// Halves (common/swiglu.cuh) element by element.
template <typename T, int kCount>
struct AnyHalves {
  static constexpr bool kPacked = false;
  float gates[kCount], ups[kCount];

  __device__ __forceinline__ void load(const T* row, unsigned width, unsigned column, int) {
    const int left = static_cast<int>(width - column);
    load_some(row + column, left, gates);
    load_some(row + width + column, left, ups);
  }

  __device__ __forceinline__ void to_floats(float (&gate)[kCount], float (&up)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gate[i] = gates[i];
      up[i] = ups[i];
    }
  }
};

template <int kVectors, bool kWhole, typename T>
__global__ void __launch_bounds__(kMaxThreads)
    swiglu_kernel(const T* gate_up, Rows rows, const float* route_weight, float limit, T* h) {
  using GateUp = std::conditional_t<kWhole, Halves<T, kGatedCount>, AnyHalves<T, kGatedCount>>;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const auto width = static_cast<unsigned>(rows.width);
  const unsigned first = blockIdx.y * blockDim.x * kVectors * kGatedCount;
  GatedTile<kVectors, 0, GateUp, T> tile;
  tile.compute(gate_up + blockIdx.x * rows.stride, width, first, route_weight + blockIdx.x, limit);
  h += blockIdx.x * rows.width;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const unsigned column = tile.column_of(first, i);
    if (column >= width) continue;
    if constexpr (kWhole) {
      tile.h[i].store(h + column);
    } else {
      float values[kGatedCount];
      tile.h[i].to_floats(values);
      store_some(h + column, static_cast<int>(width - column), values);
    }
  }
}

template <bool kWhole, typename T>
cudaError_t launch(const T* gate_up, Rows rows, const float* route_weight, float limit, T* h, cudaStream_t stream) {
  const GatedTactic tactic = gated_tactic(rows, false);
  const dim3 grid(static_cast<unsigned>(rows.count), static_cast<unsigned>(tactic.tiles));
  const Launch at{grid, dim3(tactic.threads), stream};
  return tactic.vectors == 1 ? launch_kernel(swiglu_kernel<1, kWhole, T>, at, gate_up, rows, route_weight, limit, h)
                             : launch_kernel(swiglu_kernel<2, kWhole, T>, at, gate_up, rows, route_weight, limit, h);
}

}  // namespace

cudaError_t launch_swiglu(const void* gate_up, Dtype dtype, Rows rows, const float* route_weight, float limit, void* h,
                          cudaStream_t stream) {
  if (rows.width == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
    const bool whole = rows.width % kGatedCount == 0 && aligned(gate_up) && aligned(h) &&
                       rows.stride * sizeof(T) % 16 == 0;
    const auto* source = static_cast<const T*>(gate_up);
    auto* const target = static_cast<T*>(h);
    return whole ? launch<true>(source, rows, route_weight, limit, target, stream)
                 : launch<false>(source, rows, route_weight, limit, target, stream);
  });
}

}  // namespace dsv4
