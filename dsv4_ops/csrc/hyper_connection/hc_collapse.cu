// hc_collapse, second launch of every op that computes `pre`: partial sums -> pre, post, comb, and the weighted sum of
// the streams, normed and quantised where the op does that.
//
//   y = sum_j pre_j x_j, rounded; then rms_norm of what was rounded, rounded; then the quantiser of what that rounded
//
// A CTA has one of two roles, so that the two long chains of a token run on different SMs:
//
//   rows     One token each. The CTA adds the partial sums of pre and of the squares (n + 4 values), and each warp for
//            itself turns them into the weights pre. A thread owns 8 neighbouring columns of all 4 streams, loaded
//            while the partial sums arrive, and keeps them in registers up to the quantiser. Barriers: one after the
//            partial sums, one for the norm's sum of squares, one for the largest magnitude where the format is NVFP4.
//   mixing   The first CTAs of the grid: post, and comb by Sinkhorn's iteration, of one token (few tokens) or of a
//            token a warp. hc_head has none.
//
// Other n, rows that are not whole vectors, and rows wider than 8192 (fp32: 4096) are read again in every phase
// instead of kept.
//
// Shared memory, dynamic: sums of groups [tokens of the CTA][groups][outputs + 4] fp32, then the logits of comb
// [tokens][n][n]: 960 bytes for one token of 4096 columns and n = 4, 15 KiB for 16. Static: 256 bytes, two words a
// warp.
//
// Budget of one token at decode sizes, in cycles: partial sums from L2 (one access, 8 in flight a thread) and their
// adds, barrier, adds of the groups, mean, root and sigmoid: a load and about 300. Then the row: 240 instructions a
// warp, of 16 warps on 4 schedulers for 4096 columns, and two barriers. Beside it comb: 2 * iterations - 1 steps of 4
// multiply-adds and a reciprocal, each of which waits for the last, about 50 cycles; with 20 iterations that is the
// longest chain and bounds the launch. For many tokens the floor is n * d elements read and the results written.
#include <algorithm>

#include "common/launch.cuh"
#include "common/quantised_row.cuh"
#include "common/reduce.cuh"
#include "common/rms_norm.cuh"
#include "hyper_connection/sinkhorn.cuh"
#include "hyper_connection/streams.cuh"

namespace dsv4 {
namespace {

constexpr int kMaxWarps = 32;
constexpr int kAnyThreads = 256;  // of a CTA that does not keep its row
template <typename T>
constexpr int kKeptThreads = sizeof(T) == 2 ? 1024 : 512;  // at most, of one that does
constexpr int kMaxMixing = 16;    // tokens of a CTA with the role mixing
constexpr int kFewTokens = 64;    // up to here such a CTA has one

struct Arguments {
  const void* x;
  int64_t tokens;
  int streams;
  int width;
  int64_t stride;
  MixWeights weights;
  const float* partial;
  int chunks;
  int chunks_per_group;
  int groups;
  int mixing_ctas;
  int mixing_tokens;  // of a CTA
  Collapsed out;
};

// ---- partial sums ----

// Add the chunks of each group, in order: values 0 .. values - 1 of `tokens` tokens to sums [tokens][groups][values].
__device__ __forceinline__ void add_chunks(const Arguments& at, int64_t first, int tokens, int values, float* sums) {
  const int places = at.weights.outputs + kSquareSums;
  for (int i = threadIdx.x; i < tokens * at.groups * values; i += blockDim.x) {
    const int value = i % values, group = i / values % at.groups;
    const int64_t token = first + i / values / at.groups;
    const int chunk = group * at.chunks_per_group;
    const int count = min(at.chunks_per_group, at.chunks - chunk);
    const float* const partial = at.partial + (token * at.chunks + chunk) * places + value;
    float parts[kSplitsPerGroup];
#pragma unroll
    for (int c = 0; c < kSplitsPerGroup; ++c) parts[c] = c < count ? __ldcg(partial + c * places) : -0.0f;
#pragma unroll
    for (int c = 1; c < kSplitsPerGroup; ++c) parts[0] += parts[c];  // x + -0 is x
    sums[i] = parts[0];
  }
}

// Add the groups of one value, in order.
__device__ __forceinline__ float add_groups(const Arguments& at, const float* sums, int values) {
  float sum = sums[0];
  for (int group = 1; group < at.groups; ++group) sum += sums[group * values];
  return sum;
}

// 1 / rms of the streams: the sums of squares lie in lanes n .. n + 3.
__device__ __forceinline__ float streams_inverse_rms(const Arguments& at, float lane_sum) {
  float squares[kSquareSums];
#pragma unroll
  for (int i = 0; i < kSquareSums; ++i) squares[i] = __shfl_sync(kAllLanes, lane_sum, at.streams + i);
  const float sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  return inverse_rms(sum, at.streams * at.width, at.weights.norm_eps);
}

struct Affine {
  float scale;
  float base;
};

// Of the product at place `value` of the partial sums: before the squares those of pre, then post and comb.
__device__ __forceinline__ Affine load_affine(const Arguments& at, int value) {
  const int n = at.streams, output = value < n ? value : value - kSquareSums;
  if (value >= at.weights.outputs + kSquareSums || (value >= n && output < n)) return {0.0f, 0.0f};
  return {at.weights.scale[output < n ? 0 : output < 2 * n ? 1 : 2], at.weights.base[output]};
}

// What goes into a sigmoid or a softmax, from a product with the streams and their 1 / rms.
__device__ __forceinline__ float logit_of(float product, float inverse_rms, Affine affine) {
  return add_weighted(affine.base, __fmul_rn(product, inverse_rms), affine.scale);
}

__device__ __forceinline__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// ---- role mixing ----

// post and comb of one token by a warp; `affine` belongs to value `lane`, `logits` holds n * n floats.
__device__ void mix_token(const Arguments& at, int64_t token, Affine affine, const float* sums, float* logits) {
  const int lane = threadIdx.x % kWarp, n = at.streams;
  const int values = at.weights.outputs + kSquareSums;
  float inverse = 0.0f;
  for (int first = 0; first < values; first += kWarp) {
    const int value = first + lane;
    const float sum = value < values ? add_groups(at, sums + value, values) : 0.0f;
    if (first == 0) inverse = streams_inverse_rms(at, sum);
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
  float* const comb = at.out.comb + token * n * n;
  if (n == 4) {
    float matrix[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) matrix[j][k] = logits[j * 4 + k];
    }
    sinkhorn_4(matrix, at.weights.hc_eps, at.weights.iterations);
    if (lane != 0) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      reinterpret_cast<float4*>(comb)[j] = {matrix[j][0], matrix[j][1], matrix[j][2], matrix[j][3]};
    }
    return;
  }
  float row[kMaxStreams];
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) row[k] = lane < n && k < n ? logits[lane * n + k] : 0.0f;
  __syncwarp();
  sinkhorn_warp(row, n, at.weights.hc_eps, at.weights.iterations, logits);
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    if (lane < n && k < n) comb[lane * n + k] = row[k];
  }
}

__device__ void mix_tokens(const Arguments& at, Affine affine, float* sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * at.mixing_tokens;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(at.mixing_tokens), at.tokens - first));
  const int values = at.weights.outputs + kSquareSums;
  add_chunks(at, first, tokens, values, sums);
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  if (warp >= tokens) return;
  float* const logits = sums + at.mixing_tokens * at.groups * values;
  mix_token(at, first + warp, affine, sums + warp * at.groups * values, logits + warp * at.streams * at.streams);
}

// ---- role rows ----

__device__ __forceinline__ void load_norm_weights(const Arguments& at, int column, float (&weights)[kCount]) {
  const auto load = [&](const auto* address) {
    if (column + kCount <= at.width && at.width % kCount == 0) {
      load_floats(address + column, weights);
    } else {
      load_some(address + column, at.width - column, weights);
    }
  };
  if (at.out.norm_dtype == Dtype::kBf16) {
    load(static_cast<const __nv_bfloat16*>(at.out.norm_weight));
  } else {
    load(static_cast<const float*>(at.out.norm_weight));
  }
}

// `pre` of stream `lane` in lanes below n.
__device__ __forceinline__ float find_pre(const Arguments& at, const float* sums, Affine affine) {
  const int lane = threadIdx.x % kWarp, values = at.streams + kSquareSums;
  const float sum = lane < values ? add_groups(at, sums + lane, values) : 0.0f;
  const float inverse = streams_inverse_rms(at, sum);
  return __fadd_rn(sigmoid(logit_of(sum, inverse, affine)), at.weights.hc_eps);
}

// Add weight * values of one stream; the first stream starts the sum.
__device__ __forceinline__ void add_stream(int stream, float weight, const float (&values)[kCount],
                                           float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = stream == 0 ? first_weighted(weight, values[i]) : add_weighted(sums[i], weight, values[i]);
  }
}

// Codes and scales of a lane's part of the normed row. All lanes of a warp call it together.
template <Tail kTail>
__device__ __forceinline__ void quantise(const Arguments& at, int64_t token, int column, const float (&values)[kCount],
                                         float global_scale, bool inside) {
  const auto store = [&](auto row) {
    row.begin(token, at.width);
    row.store(column, values, inside);
  };
  if constexpr (kTail == Tail::kNormFp8) {
    switch (at.out.group) {
      case 32: store(Fp8Row<32>{at.out.q, at.out.q_scale}); break;
      case 64: store(Fp8Row<64>{at.out.q, at.out.q_scale}); break;
      default: store(Fp8Row<128>{at.out.q, at.out.q_scale}); break;
    }
  } else if constexpr (kTail == Tail::kNormNvfp4) {
    store(Nvfp4Row{at.out.q, at.out.q_scale, at.out.global_scale, global_scale});
  }
}

// kKept: n is 4 and the threads of the CTA have all columns of the row in registers, 8 each.
template <typename T, bool kKept, Tail kTail>
__global__ void __launch_bounds__(kKept ? kKeptThreads<T> : kAnyThreads) hc_collapse_kernel(const Arguments at) {
  extern __shared__ float sums[];
  __shared__ alignas(16) float scratch[kMaxWarps];
  __shared__ uint32_t largest[kMaxWarps];
  const int own = threadIdx.x * kCount, step = kKept ? at.width : blockDim.x * kCount;  // columns
  const bool kept = kKept && own < at.width;
  // 1. parameters
  const bool is_row = static_cast<int>(blockIdx.x) >= at.mixing_ctas;
  const Affine affine = load_affine(at, threadIdx.x % kWarp);
  float weights[kCount] = {};
  if (kept && kTail != Tail::kNone && is_row) load_norm_weights(at, own, weights);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  if (!is_row) {
    mix_tokens(at, affine, sums);
    return;
  }
  const int64_t token = blockIdx.x - at.mixing_ctas;
  const T* const x = static_cast<const T*>(at.x) + token * at.streams * at.stride;
  T* const y = static_cast<T*>(at.out.y) + token * at.width;

  // 2. streams and partial sums
  Columns<T> streams[4] = {};
  if (kept) {
#pragma unroll
    for (int j = 0; j < 4; ++j) streams[j].load_once(x + j * at.stride + own);
  }
  add_chunks(at, token, 1, at.streams + kSquareSums, sums);
  __syncthreads();
  const float pre = find_pre(at, sums, affine);

  // 3. the weighted sum, rounded
  float values[kCount] = {};
  float squares = 0.0f;
  for (int first = 0; first < at.width; first += step) {
    const int column = first + own;
    if constexpr (kKept) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float stream[kCount];
        streams[j].to_floats(stream);
        add_stream(j, __shfl_sync(kAllLanes, pre, j), stream, values);
      }
    } else {
      for (int j = 0; j < at.streams; ++j) {
        float stream[kCount];
        load_some(x + j * at.stride + column, at.width - column, stream);
        add_stream(j, __shfl_sync(kAllLanes, pre, j), stream, values);
      }
    }
    round_all_to<T>(values);
    squares += sum_of_squares(values);
    if constexpr (!kKept) {
      store_some(y + column, at.width - column, values);
    } else if (kTail == Tail::kNone && kept) {
      store_floats(y + column, values);
    }
  }
  if constexpr (kTail == Tail::kNone) return;

  // 4. the normed row
  const float inverse = inverse_rms(sum_warps<kMaxWarps>(squares, scratch), at.width, at.weights.norm_eps);
  uint32_t bits = 0;
  for (int first = 0; first < at.width; first += step) {
    const int column = first + own;
    if constexpr (!kKept) {
      load_norm_weights(at, column, weights);
      load_some(y + column, at.width - column, values);  // what this thread has stored
    }
    rms_norm<T>(values, weights, inverse);
    if constexpr (kKept) {
      if (kept) store_floats(y + column, values);
    } else {
      store_some(y + column, at.width - column, values);
    }
    bits = max(bits, max_magnitude_bits(values));
  }

  // 5. codes and scales
  if constexpr (kTail == Tail::kNormFp8 || kTail == Tail::kNormNvfp4) {
    float global_scale = 0.0f;
    if constexpr (kTail == Tail::kNormNvfp4) {
      Nvfp4Row row{nullptr, nullptr, at.out.global_scale + token, 0.0f};
      row.scale_by(__uint_as_float(max_warps(bits, largest)), threadIdx.x == 0);
      global_scale = row.of_row;
    }
    for (int first = 0; first < at.width; first += step) {
      const int column = first + own;
      if constexpr (!kKept) load_some(y + column, at.width - column, values);
      quantise<kTail>(at, token, column, values, global_scale, column < at.width);
    }
  }
}

template <typename T, bool kKept>
void (*choose_kernel(Tail tail))(Arguments) {
  switch (tail) {
    case Tail::kNone: return hc_collapse_kernel<T, kKept, Tail::kNone>;
    case Tail::kNorm: return hc_collapse_kernel<T, kKept, Tail::kNorm>;
    case Tail::kNormFp8: return hc_collapse_kernel<T, kKept, Tail::kNormFp8>;
    default: return hc_collapse_kernel<T, kKept, Tail::kNormNvfp4>;
  }
}

}  // namespace

cudaError_t launch_hc_collapse(const Streams& x, const MixWeights& weights, const float* partial, const Collapsed& out,
                               cudaStream_t stream) {
  return with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const bool kept = x.streams == 4 && reads_vectors(x.width) && x.width <= kKeptThreads<T> * kCount;
    const int threads = kept ? (x.width / kCount + kWarp - 1) / kWarp * kWarp : kAnyThreads;
    const int mixing_tokens = kept && x.tokens > kFewTokens ? std::min(threads / kWarp, kMaxMixing) : 1;
    const int64_t mixing_ctas = out.comb == nullptr ? 0 : (x.tokens + mixing_tokens - 1) / mixing_tokens;
    const int groups = group_count(x.width), values = weights.outputs + kSquareSums;
    const Arguments arguments{.x = x.data,
                              .tokens = x.tokens,
                              .streams = x.streams,
                              .width = x.width,
                              .stride = x.stride,
                              .weights = weights,
                              .partial = partial,
                              .chunks = chunk_count(x.tokens, x.width),
                              .chunks_per_group = x.tokens < kManyTokens ? kSplitsPerGroup : 1,
                              .groups = groups,
                              .mixing_ctas = static_cast<int>(mixing_ctas),
                              .mixing_tokens = mixing_tokens,
                              .out = out};
    const size_t floats = mixing_tokens * (groups * values + x.streams * x.streams);
    const Launch at{dim3(mixing_ctas + x.tokens), dim3(threads), stream, floats * sizeof(float)};
    return launch_kernel(kept ? choose_kernel<T, true>(out.tail) : choose_kernel<T, false>(out.tail), at, arguments);
  });
}

}  // namespace dsv4
