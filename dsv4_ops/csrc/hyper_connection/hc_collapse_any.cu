// hc_collapse for n other than 4, rows that are not whole vectors, and rows too wide for the registers of a CTA: the
// same sums as hc_collapse.cu, with the same two roles, of one token a CTA. A row is read again in every phase.
//
// Shared memory, dynamic: sums of groups [groups][outputs + 4] fp32, then the logits of comb [n][n].
#include <algorithm>

#include "common/launch.cuh"
#include "hyper_connection/collapse.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;

// Add the chunks of each group: values 0 .. values - 1 of a token to sums [groups][values].
__device__ __forceinline__ void add_all_chunks(const CollapseArguments& at, int64_t token, int values, float* sums) {
  const int places = at.weights.outputs + kSquareSums;
  for (int i = threadIdx.x; i < at.groups * values; i += kThreads) {
    const int chunk = i / values * at.chunks_per_group;
    const float* const first = at.partial + (token * at.chunks + chunk) * places + i % values;
    sums[i] = add_chunks(first, places, min(at.chunks_per_group, at.chunks - chunk));
  }
}

// post and comb of a token.
__device__ void mix_token(const CollapseArguments& at, int64_t token, Affine affine, float* sums) {
  const int lane = threadIdx.x % kWarp, n = at.streams;
  const int values = at.weights.outputs + kSquareSums;
  add_all_chunks(at, token, values, sums);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  float* const logits = sums + at.groups * values;
  float inverse = 0.0f;
  for (int first = 0; first < values; first += kWarp) {
    const int value = first + lane;
    const float sum = value < values ? add_groups(at, sums + value, values) : 0.0f;
    if (first == 0) inverse = streams_inverse_rms(at, n, sum);
    if (first > 0) affine = load_affine(at, value);
    if (value < n + kSquareSums || value >= values) continue;
    const int output = value - kSquareSums;
    const float logit = logit_of(sum, inverse, affine);
    if (output < 2 * n) {
      at.out.post[token * n + output - n] = 2.0f * sigmoid(logit);
    } else {
      logits[output - 2 * n] = logit;
    }
  }
  __syncwarp();
  float row[kMaxStreams];
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) row[k] = lane < n && k < n ? logits[lane * n + k] : 0.0f;
  __syncwarp();
  sinkhorn_warp(row, n, at.weights.hc_eps, at.weights.iterations, logits);
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    if (lane < n && k < n) at.out.comb[(token * n + lane) * n + k] = row[k];
  }
}

template <typename T, Tail kTail>
__global__ void __launch_bounds__(kThreads) hc_collapse_any_kernel(const CollapseArguments at, int mixing_ctas) {
  extern __shared__ float sums[];
  __shared__ alignas(16) float scratch[kMaxWarps];
  __shared__ uint32_t largest[kMaxWarps];
  const Affine affine = load_affine(at, threadIdx.x % kWarp);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  if (static_cast<int>(blockIdx.x) < mixing_ctas) {
    mix_token(at, blockIdx.x, affine, sums);
    return;
  }

  const int64_t token = blockIdx.x - mixing_ctas;
  const T* const x = static_cast<const T*>(at.x) + token * at.streams * at.stride;
  T* const y = static_cast<T*>(at.out.y) + token * at.width;
  const auto for_each_vector = [&](auto function) {
    for (int first = 0; first < at.width; first += kThreads * kCount) function(first + threadIdx.x * kCount);
  };

  // 1. pre of stream j in lane j of every warp
  const int values_of_pre = at.streams + kSquareSums, lane = threadIdx.x % kWarp;
  add_all_chunks(at, token, values_of_pre, sums);
  __syncthreads();
  const float sum_of_lane = lane < values_of_pre ? add_groups(at, sums + lane, values_of_pre) : 0.0f;
  const float pre = find_pre(at, at.streams, sum_of_lane, affine);

  // 2. the weighted sum, rounded
  float squares = 0.0f;
  for_each_vector([&](int column) {
    float values[kCount] = {};
    for (int j = 0; j < at.streams; ++j) {
      float stream[kCount];
      load_some(x + j * at.stride + column, at.width - column, stream);
      add_stream(j, __shfl_sync(kAllLanes, pre, j), stream, values);
    }
    round_all_to<T>(values);
    squares += sum_of_squares(values);
    store_some(y + column, at.width - column, values);
  });
  if constexpr (kTail == Tail::kNone) return;

  // 3. the normed row, from what this thread has stored
  const float inverse = inverse_rms(sum_warps<kMaxWarps>(squares, scratch), at.width, at.weights.norm_eps);
  uint32_t bits = 0;
  for_each_vector([&](int column) {
    float values[kCount], weights[kCount];
    load_norm_weights(at, column, weights);
    load_some(y + column, at.width - column, values);
    rms_norm<T>(values, weights, inverse);
    store_some(y + column, at.width - column, values);
    bits = max(bits, max_magnitude_bits(values));
  });

  // 4. codes and scales
  if constexpr (kTail == Tail::kNormNvfp4) bits = max_warps(bits, largest);
  quantise<kTail>(at, token, __uint_as_float(bits), [&](const auto& row) {
    for_each_vector([&](int column) {
      float values[kCount];
      load_some(y + column, at.width - column, values);
      row.store(column, values, column < at.width);
    });
  });
}

template <typename T>
void (*choose_kernel(Tail tail))(CollapseArguments, int) {
  switch (tail) {
    case Tail::kNone: return hc_collapse_any_kernel<T, Tail::kNone>;
    case Tail::kNorm: return hc_collapse_any_kernel<T, Tail::kNorm>;
    case Tail::kNormFp8: return hc_collapse_any_kernel<T, Tail::kNormFp8>;
    default: return hc_collapse_any_kernel<T, Tail::kNormNvfp4>;
  }
}

}  // namespace

cudaError_t launch_hc_collapse_any(const CollapseArguments& arguments, Dtype dtype, cudaStream_t stream) {
  const int64_t mixing_ctas = arguments.out.comb == nullptr ? 0 : arguments.tokens;
  const int n = arguments.streams, values = arguments.weights.outputs + kSquareSums;
  const size_t bytes = (arguments.groups * values + n * n) * sizeof(float);
  const Launch at{dim3(mixing_ctas + arguments.tokens), dim3(kThreads), stream, bytes};
  return with_dtype(dtype, [&](auto element) {
    return launch_kernel(choose_kernel<decltype(element)>(arguments.out.tail), at, arguments,
                         static_cast<int>(mixing_ctas));
  });
}

}  // namespace dsv4
