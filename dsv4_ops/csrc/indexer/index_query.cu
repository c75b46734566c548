// index_query_plain, index_query_fp8, index_query_fp4: index queries, ready to be scored.
//
//   plain  y = rope(q) in fp32                                               w = weights * dim^-0.5 * heads^-0.5
//   fp8    E4M3 of bf16(hadamard(bf16(rope(bf16(q))))), one scale a head     w as above, times that scale
//   fp4    E2M1 of the same, one UE8M0 scale for each 32                     w as above
//
// Weights are rounded to the dtype of q first.
//
// A thread owns 8 neighbouring columns, or 16 where there are many heads of 128: fewer exchanges and addresses. A head
// lies in neighbouring lanes: the transform and the amax are exchanges between them. A CTA of 128 threads owns heads of
// one token; no shared memory. The row of the rope table is loaded before the wait, by a guess of the position, and
// again if the guess was wrong.
//
// Floor: 2 bytes read and 1 (FP8) or 0.53 (FP4) written an element of bf16; at decode sizes the latency of one read,
// eleven exchanges between lanes, and the store. Many heads are bound by the instructions: about 30 an element. One
// token of 64 heads of 128 in FP8: 1.22 us (H200, 2026-11-25); quant_fp8 of one row, which only copies, takes 0.83.
#include <algorithm>
#include <cmath>

#include "common/divisor.cuh"
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
constexpr int kVector = 8;            // columns of a thread, or half of them
constexpr int kScaleGroup = 32;       // columns that share a scale in FP4
constexpr int kSms = 132;             // of an H200
constexpr int kThreadsOfAnSm = 896;   // that are resident at least
constexpr int kMaxParts = 65535;      // of a grid

struct Outputs {
  void* codes;
  uint8_t* scales;
  float* w;
};

// In the dtype of q: weights come from a product in fp32 beside others.
template <typename T>
__device__ __forceinline__ float load_weight(const IndexQuery& query, int64_t index) {
  if (query.weights_dtype == Dtype::kFp32) return round_to<T>(static_cast<const float*>(query.weights)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(query.weights)[index]);
}

// Store rotated columns of the head that starts at element `start`, in its form; returns the head's FP8 scale.
template <IndexForm kForm, int kDim, int kCount>
__device__ __forceinline__ float store_query(float (&values)[kCount], int64_t start, int column, bool inside,
                                             const Outputs& out) {
  auto* const codes = static_cast<uint8_t*>(out.codes);
  if constexpr (kForm == IndexForm::kPlain) {
    if (inside) store_floats(static_cast<float*>(out.codes) + start + column, values);
    return 1.0f;
  } else {
    round_all_to<__nv_bfloat16>(values);
    hadamard<kDim>(values);
    round_all_to<__nv_bfloat16>(values);
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

// CTA (token, part): part, part + parts, ... of a token's heads, where a part is what 128 threads hold. kDim is 0 where
// the width does not matter to the lanes (plain); such a CTA has one part, since the next would have other columns.
template <IndexForm kForm, int kDim, int kCount, typename T>
__global__ void __launch_bounds__(kThreads)
    index_query_kernel(const IndexQuery query, const Rope rope, const Outputs out, const Divisor by_tokens,
                       const float factor) {
  const int dim = kDim == 0 ? query.dim : kDim;
  const unsigned vectors = dim / kCount;  // of a head
  const unsigned end = query.heads * vectors, first = blockIdx.y * kThreads + threadIdx.x;
  const int token = blockIdx.x, sequence = by_tokens.divide(token);
  const int column = first % vectors * kCount, first_rotated = column - (dim - rope.dim);
  const int32_t* const position = rope.positions + sequence * rope.stride + (token - sequence * rope.tokens);
  const int64_t first_row = static_cast<int64_t>(token) * query.heads, first_weight = token * query.weights_stride;
  const auto* const q = static_cast<const T*>(query.q) + first_row * query.stride + column;

  float2 turns[kCount / 2];
  const int guess = guess_position(rope, position);
  load_turns<kCount>(rope_row(rope.table, rope.dim, guess), first_rotated, turns);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  const auto head_of = [&](unsigned part) {  // shuffles need whole warps: past the end the last head again
    return static_cast<int>(min(part * kThreads + threadIdx.x, end - 1) / vectors);
  };
  Packed<T, kCount> next;
  next.load(q + head_of(blockIdx.y) * query.stride);
  __syncwarp();  // the position is not looked at, and waited for, before q is on its way
  const int actual = max(*position, 0);
  if (actual != guess) load_turns<kCount>(rope_row(rope.table, rope.dim, actual), first_rotated, turns);

#pragma unroll 1
  for (unsigned part = blockIdx.y; part * kThreads < end; part += gridDim.y) {
    const int head = head_of(part);
    const bool inside = part * kThreads + threadIdx.x < end;
    const float weight = load_weight<T>(query, first_weight + head);
    float values[kCount];
    next.to_floats(values);
    if ((part + gridDim.y) * kThreads < end) next.load(q + head_of(part + gridDim.y) * query.stride);
    if constexpr (kForm != IndexForm::kPlain && sizeof(T) == 4) round_all_to<__nv_bfloat16>(values);
    rotate(values, first_rotated, turns);
    const float scale = store_query<kForm, kDim>(values, (first_row + head) * dim, column, inside, out);
    if (inside && column == 0) {
      const float scaled = __fmul_rn(weight, factor);
      out.w[first_row + head] = kForm == IndexForm::kFp8 ? __fmul_rn(scaled, scale) : scaled;
    }
  }
}

template <IndexForm kForm, int kDim, int kCount>
cudaError_t launch_columns(const IndexQuery& query, const Rope& rope, const Outputs& out, int64_t parts_of_a_wave,
                           cudaStream_t stream) {
  // As in the reference: in double, then rounded once.
  const auto factor = static_cast<float>(std::pow(query.dim, -0.5) * std::pow(query.heads, -0.5));
  const int64_t tokens = query.rows / query.heads;
  const int64_t most = (static_cast<int64_t>(query.heads) * (query.dim / kCount) + kThreads - 1) / kThreads;
  const int64_t parts = std::min(most, (parts_of_a_wave + tokens - 1) / tokens);
  if (tokens > INT32_MAX || most > kMaxParts) return cudaErrorInvalidValue;
  const Launch at{dim3(tokens, parts), dim3(kThreads), stream};
  return with_dtype(query.dtype, [&](auto element) {
    return launch_kernel(index_query_kernel<kForm, kDim, kCount, decltype(element)>, at, query, rope, out,
                         Divisor(rope.tokens), factor);
  });
}

// Where heads fill the GPU, a thread takes two vectors of several. What is computed is the same.
template <IndexForm kForm, int kDim>
cudaError_t launch(const IndexQuery& query, const Rope& rope, const Outputs& out, cudaStream_t stream) {
  if (query.rows == 0) return cudaSuccess;
  constexpr int64_t kWave = int64_t{kSms} * kThreadsOfAnSm / kThreads;
  if constexpr (kDim == 128) {
    const bool many = query.rows * (kDim / (2 * kVector)) >= kWave * kThreads;
    if (many) return launch_columns<kForm, kDim, 2 * kVector>(query, rope, out, kWave, stream);
  }
  return launch_columns<kForm, kDim, kVector>(query, rope, out, INT32_MAX, stream);
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
