// index_query_plain, index_query_fp8, index_query_fp4: index queries, ready to be scored.
//
//   plain  y = rope(q) in fp32                                               w = weights * dim^-0.5 * heads^-0.5
//   fp8    E4M3 of bf16(hadamard(bf16(rope(bf16(q))))), one scale a head     w as above, times that scale
//   fp4    E2M1 of the same, one UE8M0 scale for each 32                     w as above
//
// A thread owns 8 neighbouring columns, a head lies in dim / 8 neighbouring lanes: the transform and the amax are
// exchanges between them. A grid of CTAs of 128 threads covers the heads; no shared memory. Floor: 2 bytes read and 1
// (FP8) or 0.53 (FP4) written an element of bf16; at decode sizes the latency of a position, its row of the table, and
// the store.
#include <cmath>

#include "common/hadamard.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/quantise.cuh"
#include "common/rope.cuh"
#include "common/vector.cuh"
#include "indexer/indexer.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kCount = 8;        // columns of a thread
constexpr int kScaleGroup = 32;  // columns that share a scale in FP4

struct Outputs {
  void* codes;
  uint8_t* scales;
  float* w;
};

__device__ __forceinline__ float load_weight(const IndexQuery& query, int64_t index) {
  if (query.weights_dtype == Dtype::kFp32) return static_cast<const float*>(query.weights)[index];
  return to_float(static_cast<const __nv_bfloat16*>(query.weights)[index]);
}

__device__ __forceinline__ void round_all(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = round_to<__nv_bfloat16>(values[i]);
}

// Store eight rotated columns of the head that starts at element `start`, in its form; returns the head's FP8 scale.
template <IndexForm kForm, int kDim>
__device__ __forceinline__ float store_query(float (&values)[kCount], int64_t start, int column, bool inside,
                                             const Outputs& out) {
  auto* const codes = static_cast<uint8_t*>(out.codes);
  if constexpr (kForm == IndexForm::kPlain) {
    if (inside) store_floats(static_cast<float*>(out.codes) + start + column, values);
    return 1.0f;
  } else {
    round_all(values);
    hadamard<kDim>(values);
    round_all(values);
  }
  if constexpr (kForm == IndexForm::kFp8) {
    uint8_t bytes[kCount];
    const float scale = quantise_fp8_fp32_scale<kDim>(values, bytes);
    if (inside) store_bytes(codes + start + column, bytes);
    return scale;
  }
  if constexpr (kForm == IndexForm::kFp4) {
    uint8_t bytes[kCount / 2];
    const uint32_t scale = quantise_mxfp4(values, bytes);
    if (inside) store_bytes(codes + (start + column) / 2, bytes);
    if (inside && column % kScaleGroup == 0) out.scales[(start + column) / kScaleGroup] = scale;
  }
  return 1.0f;
}

// kDim is 0 where the width does not matter to the lanes (plain).
template <IndexForm kForm, int kDim, typename T>
__global__ void __launch_bounds__(kThreads) index_query_kernel(IndexQuery query, Rope rope, Outputs out, float factor) {
  ptx::launch_dependents();
  const int dim = kDim == 0 ? query.dim : kDim;
  const uint32_t vectors = dim / kCount;  // of a head
  const int64_t vector = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t last = query.rows * vectors - 1;
  const bool inside = vector <= last;
  const int64_t index = inside ? vector : last;  // lanes past the end repeat the last vector: shuffles need whole warps
  const uint32_t row = index / vectors, token = row / query.heads, head = row % query.heads;
  const int column = index % vectors * kCount;
  const int first_rotated = column - (dim - rope.dim);
  const int32_t* const position = position_of(rope, token);
  ptx::wait_for_predecessors();

  float2 turns[kCount / 2];
  const float* const angles = rope_row(rope.table, rope.dim, *position);
  float values[kCount];
  load_floats(static_cast<const T*>(query.q) + row * query.stride + column, values);
  const float weight = load_weight(query, token * query.weights_stride + head);
  load_turns<kCount>(angles, first_rotated, turns);

  if constexpr (kForm != IndexForm::kPlain) round_all(values);
  rotate(values, first_rotated, turns);
  const float scale = store_query<kForm, kDim>(values, static_cast<int64_t>(row) * dim, column, inside, out);
  if (!inside || column != 0) return;
  const float scaled = __fmul_rn(weight, factor);
  out.w[row] = kForm == IndexForm::kFp8 ? __fmul_rn(scaled, scale) : scaled;
}

template <IndexForm kForm, int kDim>
cudaError_t launch(const IndexQuery& query, const Rope& rope, const Outputs& out, cudaStream_t stream) {
  if (query.rows > INT32_MAX) return cudaErrorInvalidValue;  // the kernel counts heads in 32 bits
  // As in the reference: in double, then rounded once.
  const auto factor = static_cast<float>(std::pow(query.dim, -0.5) * std::pow(query.heads, -0.5));
  const int64_t vectors = query.rows * (query.dim / kCount);
  const Launch at{dim3((vectors + kThreads - 1) / kThreads), dim3(kThreads), stream};
  return with_dtype(query.dtype, [&](auto element) {
    return launch_kernel(index_query_kernel<kForm, kDim, decltype(element)>, at, query, rope, out, factor);
  });
}

template <IndexForm kForm>
cudaError_t launch_packed(const IndexQuery& query, const Rope& rope, const Outputs& out, cudaStream_t stream) {
  switch (query.dim) {
    case 32: return launch<kForm, 32>(query, rope, out, stream);
    case 64: return launch<kForm, 64>(query, rope, out, stream);
    case 128: return launch<kForm, 128>(query, rope, out, stream);
    case 256: return launch<kForm, 256>(query, rope, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_index_query(IndexForm form, const IndexQuery& query, const Rope& rope, void* codes, uint8_t* scales,
                               float* w, cudaStream_t stream) {
  const Outputs out{codes, scales, w};
  switch (form) {
    case IndexForm::kPlain: return launch<IndexForm::kPlain, 0>(query, rope, out, stream);
    case IndexForm::kFp8: return launch_packed<IndexForm::kFp8>(query, rope, out, stream);
    case IndexForm::kFp4: return launch_packed<IndexForm::kFp4>(query, rope, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dsv4
