// What the kernels of hc_collapse share: partial sums -> logits, and the phases of a row.
#pragma once

#include "common/quantised_row.cuh"
#include "common/reduce.cuh"
#include "common/rms_norm.cuh"
#include "hyper_connection/sinkhorn.cuh"
#include "hyper_connection/streams.cuh"

namespace dsv4 {

constexpr int kMaxWarps = 32;

struct CollapseArguments {
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
  Collapsed out;
};

// ---- partial sums ----

// Add `count` chunks of one value, at most kSplitsPerGroup, in order.
__device__ __forceinline__ float add_chunks(const float* chunk, int places, int count) {
  float parts[kSplitsPerGroup];
#pragma unroll
  for (int c = 0; c < kSplitsPerGroup; ++c) parts[c] = c < count ? __ldcg(chunk + c * places) : -0.0f;
#pragma unroll
  for (int c = 1; c < kSplitsPerGroup; ++c) parts[0] += parts[c];  // x + -0 is x
  return parts[0];
}

// Add the groups of one value, in order.
__device__ __forceinline__ float add_groups(const CollapseArguments& at, const float* sums, int values) {
  float sum = sums[0];
#pragma unroll 4
  for (int group = 1; group < at.groups; ++group) sum += sums[group * values];
  return sum;
}

// 1 / rms of the streams: the sums of squares lie in lanes n .. n + 3.
__device__ __forceinline__ float streams_inverse_rms(const CollapseArguments& at, int streams, float lane_sum) {
  float squares[kSquareSums];
#pragma unroll
  for (int i = 0; i < kSquareSums; ++i) squares[i] = __shfl_sync(kAllLanes, lane_sum, streams + i);
  const float sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  return inverse_rms(sum, streams * at.width, at.weights.norm_eps);
}

struct Affine {
  float scale;
  float base;
};

// Of the product at place `value` of the partial sums: before the squares those of pre, then post and comb.
__device__ __forceinline__ Affine load_affine(const CollapseArguments& at, int value) {
  const int n = at.streams, output = value < n ? value : value - kSquareSums;
  if (value >= at.weights.outputs + kSquareSums || (value >= n && output < n)) return {0.0f, 0.0f};
  return {at.weights.scale[output < n ? 0 : output < 2 * n ? 1 : 2], at.weights.base[output]};
}

// What goes into a sigmoid or a softmax, from a product with the streams and their 1 / rms.
__device__ __forceinline__ float logit_of(float product, float inverse_rms, Affine affine) {
  return add_weighted(affine.base, __fmul_rn(product, inverse_rms), affine.scale);
}

__device__ __forceinline__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// `pre` of stream `lane` in lanes below n.
__device__ __forceinline__ float find_pre(const CollapseArguments& at, int streams, float lane_sum, Affine affine) {
  const float inverse = streams_inverse_rms(at, streams, lane_sum);
  return __fadd_rn(sigmoid(logit_of(lane_sum, inverse, affine)), at.weights.hc_eps);
}

// ---- rows ----

__device__ __forceinline__ void load_norm_weights(const CollapseArguments& at, int column, float (&weights)[kCount]) {
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

// Add weight * values of one stream; the first stream starts the sum.
__device__ __forceinline__ void add_stream(int stream, float weight, const float (&values)[kCount],
                                           float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = stream == 0 ? first_weighted(weight, values[i]) : add_weighted(sums[i], weight, values[i]);
  }
}

// store(row as codes and scales) of a normed row; `amax`: its largest magnitude.
template <Tail kTail, typename Store>
__device__ __forceinline__ void quantise(const CollapseArguments& at, int64_t token, float amax, Store store) {
  const auto begin = [&](auto row) {
    row.begin(token, at.width);
    if constexpr (kTail == Tail::kNormNvfp4) {
      store(row.scaled(amax, threadIdx.x == 0));
    } else {
      store(row);
    }
  };
  if constexpr (kTail == Tail::kNormFp8) {
    switch (at.out.group) {
      case 32: return begin(Fp8Row<32>{at.out.q, at.out.q_scale});
      case 64: return begin(Fp8Row<64>{at.out.q, at.out.q_scale});
      default: return begin(Fp8Row<128>{at.out.q, at.out.q_scale});
    }
  } else if constexpr (kTail == Tail::kNormNvfp4) {
    begin(Nvfp4Row{at.out.q, at.out.q_scale, at.out.global_scale});
  }
}

// The launch for other n and widths than launch_hc_collapse keeps in registers: hc_collapse_any.cu.
cudaError_t launch_hc_collapse_any(const CollapseArguments& arguments, Dtype dtype, cudaStream_t stream);

}  // namespace dsv4
