// hc_collapse, second launch of every op that computes `pre`: partial sums -> pre, post, comb, and the weighted sum of
// the streams, normed and quantised where the op does that.
//
//   y = sum_j pre_j x_j, rounded; then rms_norm of what was rounded, rounded; then the quantiser of what that rounded
//
// This is the kernel for n = 4 and rows of whole vectors, up to 8192 columns wide (fp32: 4096); hc_collapse_any.cu has
// the others. A CTA has one of two roles, so that the two long chains of a token run on different SMs:
//
//   rows     A thread owns 8 neighbouring columns of all 4 streams, loaded while the partial sums arrive, and keeps
//            them in registers up to the quantiser. The CTA adds the partial sums of pre and of the squares (8 values),
//            and one warp makes the weights pre of them: what a warp does once for a token is as long as its share of
//            the row. Barriers of a token: one after the partial sums, one after pre, one for the norm's sum of
//            squares, one for the largest magnitude where the format is NVFP4. For many tokens a CTA has up to 8 of
//            them after one another: the first two barriers and pre, a warp a token, are for all of them together, and
//            the streams of the next token are on their way while this one is normed.
//   mixing   post, and comb by Sinkhorn's iteration, of up to 32 tokens: partial sums and logits of a token a warp,
//            then Sinkhorn of a token a lane. hc_head has none.
//
// For few tokens mixing comes first in the grid, because it takes longest. For many it comes last, and the last tokens
// come first, which L2 still holds from hc_mix.
//
// Shared memory, dynamic: sums of groups [tokens of the CTA][groups][values] fp32, 8 values for rows and 28 for mixing,
// whose logits of comb [tokens][4][4] follow. Static: two words a warp, twice, and pre.
//
// Budget of one token at decode sizes, in cycles: partial sums from L2 (one access, 8 in flight a thread) and their
// adds, barrier, adds of the groups, mean, root and sigmoid: a load and about 300. Then the row: 240 instructions a
// warp, of 16 warps on 4 schedulers for 4096 columns, and two barriers. Beside it comb: 2 * iterations - 1 steps of 4
// multiply-adds and a reciprocal, each of which waits for the last, about 50 cycles; with 20 iterations that is the
// longest chain and bounds the launch. For many tokens the floor is n * d elements read and the results written.
//
// H200, 2026-11-25, us warm of hc_pre_rms_norm_quant_fp8, both launches, 4096 wide: 1 token 4.6, 128 tokens 10.0, 4096
// tokens 109 (floor 42).
#include <algorithm>

#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "hyper_connection/collapse.cuh"

namespace dsv4 {
namespace {

constexpr int kStreams = 4;
constexpr int kPreValues = kStreams + kSquareSums;
constexpr int kValues = (2 + kStreams) * kStreams + kSquareSums;  // of mixing
constexpr int kMatrix = kStreams * kStreams;
template <typename T>
constexpr int kMaxThreads = sizeof(T) == 2 ? 1024 : 512;
constexpr int kFewTokens = 64;  // up to here a CTA with the role mixing has one
constexpr int kMaxMixing = 32;  // tokens of such a CTA
constexpr int kMaxRows = 8;     // tokens of a CTA with the role rows
constexpr int kSms = 132;

// How the tokens of a launch are divided.
struct Division {
  int mixing_ctas;
  int mixing_tokens;  // of a CTA
  int row_tokens;     // of a CTA
  bool backwards;     // roles and tokens
  Divisor groups;
};

// Add the chunks of each group: values 0 .. kCount - 1 of `tokens` tokens to sums [tokens][groups][kCount].
template <int kCount>
__device__ __forceinline__ void add_all_chunks(const CollapseArguments& at, const Division& division, int64_t first,
                                               int tokens, float* sums) {
  const int places = at.weights.outputs + kSquareSums, all = tokens * at.groups * kCount;
  const float* const partial = at.partial + first * at.chunks * places;
  if (at.chunks_per_group == 1) {  // nothing to add: 8 at a time
    for (int begin = threadIdx.x; begin < all; begin += 8 * blockDim.x) {
      float parts[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned index = begin + i * blockDim.x;
        if (index < all) parts[i] = __ldcg(partial + index / kCount * places + index % kCount);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned index = begin + i * blockDim.x;
        if (index < all) sums[index] = parts[i];
      }
    }
    return;
  }
  for (unsigned index = threadIdx.x; index < all; index += blockDim.x) {
    const int place = index / kCount, token = division.groups.divide(place);
    const int chunk = (place - token * at.groups) * kSplitsPerGroup;
    const float* const chunks = partial + (token * at.chunks + chunk) * places + index % kCount;
    sums[index] = add_chunks(chunks, places, min(kSplitsPerGroup, at.chunks - chunk));
  }
}

// ---- role mixing ----

// post and the logits of comb of one token by a warp.
__device__ __forceinline__ void find_logits(const CollapseArguments& at, int64_t token, Affine affine,
                                            const float* sums, float* logits) {
  const int lane = threadIdx.x % kWarp;
  const float sum = lane < kValues ? add_groups(at, sums + lane, kValues) : 0.0f;
  const float logit = logit_of(sum, streams_inverse_rms(at, kStreams, sum), affine);
  const int output = lane - kPreValues;  // behind those of pre
  if (output < 0 || lane >= kValues) return;
  if (output < kStreams) {
    at.out.post[token * kStreams + output] = 2.0f * sigmoid(logit);
  } else {
    logits[output - kStreams] = logit;
  }
}

// comb by a thread.
__device__ __forceinline__ void store_comb(const CollapseArguments& at, int64_t token, const float* logits) {
  float matrix[4][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) matrix[j][k] = logits[j * 4 + k];
  }
  sinkhorn_4(matrix, at.weights.hc_eps, at.weights.iterations);
  float4* const comb = reinterpret_cast<float4*>(at.out.comb) + token * 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) comb[j] = {matrix[j][0], matrix[j][1], matrix[j][2], matrix[j][3]};
}

__device__ __forceinline__ void mix_tokens(const CollapseArguments& at, const Division& division, int64_t first,
                                           Affine affine, float* sums) {
  const int tokens = static_cast<int>(min(static_cast<int64_t>(division.mixing_tokens), at.tokens - first));
  add_all_chunks<kValues>(at, division, first, tokens, sums);
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* const logits = sums + division.mixing_tokens * at.groups * kValues;
  for (int token = warp; token < tokens; token += blockDim.x / kWarp) {
    find_logits(at, first + token, affine, sums + token * at.groups * kValues, logits + token * kMatrix);
  }
  if (tokens > 1) {
    __syncthreads();
  } else {
    __syncwarp();  // the only token is the first warp's
  }
  if (warp == 0 && lane < tokens) store_comb(at, first + lane, logits + lane * kMatrix);
}

// ---- role rows ----

// The threads of the CTA have all columns of a row in registers, 8 each.
template <typename T, Tail kTail>
__global__ void __launch_bounds__(kMaxThreads<T>) hc_collapse_kernel(const CollapseArguments at, Division division) {
  extern __shared__ float sums[];
  __shared__ alignas(16) float scratch[2][kMaxWarps];
  __shared__ uint32_t largest[2][kMaxWarps];
  __shared__ float4 pres[kMaxRows];
  const int column = threadIdx.x * kCount, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool inside = column < at.width;
  // 1. parameters
  const int place = division.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const bool is_row = place >= division.mixing_ctas;
  const Affine affine = load_affine(at, lane);
  float weights[kCount] = {};
  if (inside && kTail != Tail::kNone && is_row) load_norm_weights(at, column, weights);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  if (!is_row) {
    mix_tokens(at, division, static_cast<int64_t>(place) * division.mixing_tokens, affine, sums);
    return;
  }
  const int64_t first = static_cast<int64_t>(place - division.mixing_ctas) * division.row_tokens;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(division.row_tokens), at.tokens - first));

  // 2. streams of the first token, and pre of all
  const T* x = static_cast<const T*>(at.x) + first * kStreams * at.stride + column;
  T* y = static_cast<T*>(at.out.y) + first * at.width + column;
  Columns<T> streams[kStreams] = {};
  const auto load_streams = [&] {
#pragma unroll
    for (int j = 0; j < kStreams; ++j) streams[j].load_once(x + j * at.stride);
  };
  if (inside) load_streams();
  add_all_chunks<kPreValues>(at, division, first, tokens, sums);
  __syncthreads();
  if (warp < tokens) {
    const float* const of_token = sums + warp * at.groups * kPreValues;
    const float sum = lane < kPreValues ? add_groups(at, of_token + lane, kPreValues) : 0.0f;
    const float pre = find_pre(at, kStreams, sum, affine);
    if (lane < kStreams) reinterpret_cast<float*>(pres + warp)[lane] = pre;
  }
  __syncthreads();

  for (int t = 0; t < tokens; ++t, y += at.width) {
    // 3. the weighted sum, rounded
    const float4 pre = pres[t];
    const float each[kStreams] = {pre.x, pre.y, pre.z, pre.w};
    float values[kCount];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) {
      float stream[kCount];
      streams[j].to_floats(stream);
      add_stream(j, each[j], stream, values);
    }
    x += kStreams * at.stride;
    if (inside && t + 1 < tokens) load_streams();
    round_all_to<T>(values);
    if constexpr (kTail == Tail::kNone) {
      if (inside) to_columns<T>(values).store(y);
      continue;
    }

    // 4. the normed row
    const float sum = sum_warps<kMaxWarps>(sum_of_squares(values), scratch[t % 2]);
    rms_norm<T>(values, weights, inverse_rms(sum, at.width, at.weights.norm_eps));
    if (inside) to_columns<T>(values).store(y);

    // 5. codes and scales
    uint32_t bits = 0;
    if constexpr (kTail == Tail::kNormNvfp4) bits = max_warps(max_magnitude_bits(values), largest[t % 2]);
    quantise<kTail>(at, first + t, __uint_as_float(bits),
                    [&](const auto& row) { row.store(column, values, inside); });
  }
}

template <typename T>
void (*choose_kernel(Tail tail))(CollapseArguments, Division) {
  switch (tail) {
    case Tail::kNone: return hc_collapse_kernel<T, Tail::kNone>;
    case Tail::kNorm: return hc_collapse_kernel<T, Tail::kNorm>;
    case Tail::kNormFp8: return hc_collapse_kernel<T, Tail::kNormFp8>;
    default: return hc_collapse_kernel<T, Tail::kNormNvfp4>;
  }
}

}  // namespace

cudaError_t launch_hc_collapse(const Streams& x, const MixWeights& weights, const float* partial, const Collapsed& out,
                               cudaStream_t stream) {
  const bool many = x.tokens >= kManyTokens;
  const int groups = group_count(x.width);
  const CollapseArguments arguments{.x = x.data,
                                    .tokens = x.tokens,
                                    .streams = x.streams,
                                    .width = x.width,
                                    .stride = x.stride,
                                    .weights = weights,
                                    .partial = partial,
                                    .chunks = chunk_count(x.tokens, x.width),
                                    .chunks_per_group = many ? 1 : kSplitsPerGroup,
                                    .groups = groups,
                                    .out = out};
  return with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const bool kept = x.streams == kStreams && reads_vectors(x.width) && x.width <= kMaxThreads<T> * kCount;
    if (!kept) return launch_hc_collapse_any(arguments, x.dtype, stream);
    const int warps = (x.width / kCount + kWarp - 1) / kWarp, threads = warps * kWarp;
    const int mixing_tokens = x.tokens <= kFewTokens ? 1 : many ? kMaxMixing : std::max(warps / 4, 1);
    const int64_t mixing_ctas = out.comb == nullptr ? 0 : (x.tokens + mixing_tokens - 1) / mixing_tokens;
    const int resident = kSms * (kMaxThreads<T> / threads);  // CTAs
    const int64_t each = std::max<int64_t>((x.tokens + resident - 1) / resident, 1);  // also of no tokens
    const int row_tokens = static_cast<int>(std::min<int64_t>({warps, kMaxRows, each}));
    const int64_t row_ctas = (x.tokens + row_tokens - 1) / row_tokens;
    const int of_mixing = mixing_ctas == 0 ? 0 : mixing_tokens * (groups * kValues + kMatrix);
    const size_t bytes = std::max(of_mixing, row_tokens * groups * kPreValues) * sizeof(float);
    const Launch at{dim3(mixing_ctas + row_ctas), dim3(threads), stream, bytes};
    const Division division{static_cast<int>(mixing_ctas), mixing_tokens, row_tokens, many, Divisor(groups)};
    return launch_kernel(choose_kernel<T>(out.tail), at, arguments, division);
  });
}

}  // namespace dsv4
