// hc_collapse, second launch of every op that computes `pre`: partial sums -> pre, post, comb, and the weighted sum of
// the streams, normed and quantised where the op does that.
//
//   y = sum_j pre_j x_j, rounded; then rms_norm of what was rounded, rounded; then the quantiser of what that rounded
//
// A CTA has one of two roles, so that the two long chains of a token run on different SMs:
//
//   rows     The CTA adds the partial sums of pre and of the squares (n + 4 values), and a warp turns them into the
//            weights pre. A thread owns 8 neighbouring columns of all 4 streams, loaded while the partial sums arrive,
//            and keeps them in registers up to the quantiser. Barriers: one after the partial sums, one for the norm's
//            sum of squares, one for the largest magnitude where the format is NVFP4. A CTA has one token, in which
//            case each warp finds pre for itself, or for many tokens up to 8 after one another: a warp finds pre for
//            one of them, and the streams of the next token are on their way while this one is normed.
//   mixing   post, and comb by Sinkhorn's iteration: of one token (few tokens), or the partial sums and logits of a
//            token a warp, and then Sinkhorn of a token a lane. hc_head has none.
//
// For few tokens mixing comes first in the grid, because it takes longest. For many it comes last, and the last tokens
// come first, which L2 still holds from hc_mix.
//
// Other n, rows that are not whole vectors, and rows wider than 8192 (fp32: 4096) are read again in every phase
// instead of kept.
//
// Shared memory, dynamic: sums of groups [tokens of the CTA][groups][values] fp32, n + 4 values of them for rows and
// outputs + 4 for mixing, whose logits of comb [tokens][n][n] follow. Static: two words a warp, twice, and pre.
//
// Budget of one token at decode sizes, in cycles: partial sums from L2 (one access, 8 in flight a thread) and their
// adds, barrier, adds of the groups, mean, root and sigmoid: a load and about 300. Then the row: 240 instructions a
// warp, of 16 warps on 4 schedulers for 4096 columns, and two barriers. Beside it comb: 2 * iterations - 1 steps of 4
// multiply-adds and a reciprocal, each of which waits for the last, about 50 cycles; with 20 iterations that is the
// longest chain and bounds the launch. For many tokens the floor is n * d elements read and the results written, beside
// about 250 instructions a warp and token.
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
constexpr int kFewTokens = 64;    // up to here a CTA with the role mixing has one
constexpr int kMaxMixing = 32;    // tokens of such a CTA
constexpr int kMaxRows = 8;       // tokens of a CTA with the role rows
constexpr int kSms = 132;

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
  int row_tokens;     // of a CTA
  bool backwards;     // roles and tokens
  Collapsed out;
};

// ---- partial sums ----

// Add the chunks of each group, in order: values 0 .. values - 1 of `tokens` tokens to sums [tokens][groups][values]. A
// warp has a group, a lane a value.
__device__ __forceinline__ void add_chunks(const Arguments& at, int64_t first, int tokens, int values, float* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int places = at.weights.outputs + kSquareSums, all = tokens * at.groups;
  const float* const partial = at.partial + first * at.chunks * places;
  for (int value = lane; value < values; value += kWarp) {
    if (at.chunks_per_group == 1) {  // nothing to add, and one chunk behind the other: 8 at a time
      for (int begin = warp; begin < all; begin += kSplitsPerGroup * warps) {
        float parts[kSplitsPerGroup];
#pragma unroll
        for (int i = 0; i < kSplitsPerGroup; ++i) {
          const int group = begin + i * warps;
          if (group < all) parts[i] = __ldcg(partial + group * places + value);
        }
#pragma unroll
        for (int i = 0; i < kSplitsPerGroup; ++i) {
          const int group = begin + i * warps;
          if (group < all) sums[group * values + value] = parts[i];
        }
      }
      continue;
    }
    for (int group = warp; group < all; group += warps) {
      const int token = group / at.groups, chunk = (group - token * at.groups) * kSplitsPerGroup;
      const int count = min(kSplitsPerGroup, at.chunks - chunk);
      const float* const chunks = partial + (token * at.chunks + chunk) * places + value;
      float parts[kSplitsPerGroup];
#pragma unroll
      for (int c = 0; c < kSplitsPerGroup; ++c) parts[c] = c < count ? __ldcg(chunks + c * places) : -0.0f;
#pragma unroll
      for (int c = 1; c < kSplitsPerGroup; ++c) parts[0] += parts[c];  // x + -0 is x
      sums[group * values + value] = parts[0];
    }
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

// post and the logits of comb of one token by a warp; `affine` belongs to value `lane`.
__device__ __forceinline__ void find_logits(const Arguments& at, int64_t token, Affine affine, const float* sums,
                                            float* logits) {
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
}

// comb of n = 4 by a thread.
__device__ __forceinline__ void store_comb_4(const Arguments& at, int64_t token, const float* logits) {
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

// comb of another n by a warp, which `logits` are shared by.
__device__ __forceinline__ void store_comb_any(const Arguments& at, int64_t token, float* logits) {
  const int lane = threadIdx.x % kWarp, n = at.streams;
  float row[kMaxStreams];
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) row[k] = lane < n && k < n ? logits[lane * n + k] : 0.0f;
  __syncwarp();
  sinkhorn_warp(row, n, at.weights.hc_eps, at.weights.iterations, logits);
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    if (lane < n && k < n) at.out.comb[token * n * n + lane * n + k] = row[k];
  }
}

__device__ void mix_tokens(const Arguments& at, int64_t first, Affine affine, float* sums) {
  const int tokens = static_cast<int>(min(static_cast<int64_t>(at.mixing_tokens), at.tokens - first));
  const int values = at.weights.outputs + kSquareSums, matrix = at.streams * at.streams;
  add_chunks(at, first, tokens, values, sums);
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* const logits = sums + at.mixing_tokens * at.groups * values;
  for (int token = warp; token < tokens; token += blockDim.x / kWarp) {
    find_logits(at, first + token, affine, sums + token * at.groups * values, logits + token * matrix);
    __syncwarp();
    if (at.streams != 4) store_comb_any(at, first + token, logits + token * matrix);
  }
  if (at.streams != 4) return;
  if (tokens > 1) __syncthreads();  // one token is the first warp's own
  if (warp == 0 && lane < tokens) store_comb_4(at, first + lane, logits + lane * matrix);
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
  __shared__ alignas(16) float scratch[2][kMaxWarps];
  __shared__ uint32_t largest[2][kMaxWarps];
  __shared__ float4 pres[kMaxRows];
  const int own = threadIdx.x * kCount, step = kKept ? at.width : blockDim.x * kCount;  // columns
  const bool kept = kKept && own < at.width;
  // 1. parameters
  const int place = at.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const bool is_row = place >= at.mixing_ctas;
  const Affine affine = load_affine(at, threadIdx.x % kWarp);
  float weights[kCount] = {};
  if (kept && kTail != Tail::kNone && is_row) load_norm_weights(at, own, weights);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  if (!is_row) {
    mix_tokens(at, static_cast<int64_t>(place) * at.mixing_tokens, affine, sums);
    return;
  }
  const int64_t first_token = static_cast<int64_t>(place - at.mixing_ctas) * at.row_tokens;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(at.row_tokens), at.tokens - first_token));
  const int values_of_pre = at.streams + kSquareSums;

  // 2. streams and partial sums
  const int64_t token_stride = at.streams * at.stride;
  const T* x = static_cast<const T*>(at.x) + first_token * token_stride;
  Columns<T> streams[4] = {};
  const auto load_streams = [&] {
#pragma unroll
    for (int j = 0; j < 4; ++j) streams[j].load_once(x + j * at.stride + own);
  };
  if (kept) load_streams();
  add_chunks(at, first_token, tokens, values_of_pre, sums);
  __syncthreads();
  const int finds = at.row_tokens == 1 ? 0 : threadIdx.x / kWarp;  // the token whose pre this warp finds
  float pre = 0.0f;
  if (finds < tokens) pre = find_pre(at, sums + finds * at.groups * values_of_pre, affine);
  if (at.row_tokens > 1) {
    const int lane = threadIdx.x % kWarp;
    if (finds < tokens && lane < 4) reinterpret_cast<float*>(pres + finds)[lane] = pre;
    __syncthreads();
  }

  for (int t = 0; t < tokens; ++t) {
    const int64_t token = first_token + t;
    T* const y = static_cast<T*>(at.out.y) + token * at.width;

    // 3. the weighted sum, rounded
    float values[kCount] = {};
    float squares = 0.0f;
    for (int first = 0; first < at.width; first += step) {
      const int column = first + own;
      if constexpr (kKept) {
        float4 of_stream;
        if (at.row_tokens > 1) {
          of_stream = pres[t];
        } else {
          of_stream = {__shfl_sync(kAllLanes, pre, 0), __shfl_sync(kAllLanes, pre, 1), __shfl_sync(kAllLanes, pre, 2),
                       __shfl_sync(kAllLanes, pre, 3)};
        }
        const float each[4] = {of_stream.x, of_stream.y, of_stream.z, of_stream.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float stream[kCount];
          streams[j].to_floats(stream);
          add_stream(j, each[j], stream, values);
        }
        x += token_stride;
        if (kept && t + 1 < tokens) load_streams();
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
    if constexpr (kTail == Tail::kNone) continue;

    // 4. the normed row
    const float sum = sum_warps<kMaxWarps>(squares, scratch[t % 2]);
    const float inverse = inverse_rms(sum, at.width, at.weights.norm_eps);
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
        row.scale_by(__uint_as_float(max_warps(bits, largest[t % 2])), threadIdx.x == 0);
        global_scale = row.of_row;
      }
      for (int first = 0; first < at.width; first += step) {
        const int column = first + own;
        if constexpr (!kKept) load_some(y + column, at.width - column, values);
        quantise<kTail>(at, token, column, values, global_scale, column < at.width);
      }
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
    const int warps = threads / kWarp;
    const bool many = x.tokens >= kManyTokens;
    const int mixing_tokens = !kept || x.tokens <= kFewTokens ? 1 : many ? kMaxMixing : std::max(warps / 4, 1);
    const int64_t mixing_ctas = out.comb == nullptr ? 0 : (x.tokens + mixing_tokens - 1) / mixing_tokens;
    const int resident = kSms * (kKeptThreads<T> / threads);  // CTAs
    const int64_t each = (x.tokens + resident - 1) / resident;
    const int row_tokens = !kept ? 1 : static_cast<int>(std::min<int64_t>(std::min(warps, kMaxRows), each));
    const int64_t row_ctas = (x.tokens + row_tokens - 1) / row_tokens;
    const int groups = group_count(x.width), values = weights.outputs + kSquareSums;
    const Arguments arguments{.x = x.data,
                              .tokens = x.tokens,
                              .streams = x.streams,
                              .width = x.width,
                              .stride = x.stride,
                              .weights = weights,
                              .partial = partial,
                              .chunks = chunk_count(x.tokens, x.width),
                              .chunks_per_group = many ? 1 : kSplitsPerGroup,
                              .groups = groups,
                              .mixing_ctas = static_cast<int>(mixing_ctas),
                              .mixing_tokens = mixing_tokens,
                              .row_tokens = row_tokens,
                              .backwards = many,
                              .out = out};
    const int of_mixing = mixing_tokens * (groups * values + x.streams * x.streams);
    const int of_rows = row_tokens * groups * (x.streams + kSquareSums);
    const size_t bytes = std::max(mixing_ctas > 0 ? of_mixing : 0, of_rows) * sizeof(float);
    const Launch at{dim3(mixing_ctas + row_ctas), dim3(threads), stream, bytes};
    return launch_kernel(kept ? choose_kernel<T, true>(out.tail) : choose_kernel<T, false>(out.tail), at, arguments);
  });
}

}  // namespace dsv4
