// Launchers of the family `hyper_connection`; shapes and dtypes are those of dsv4_ops/ops/hyper_connection.py and
// hyper_connection_quant.py.
//
// An op that computes `pre` is two launches, and hc_post in front of them where hc_mix cannot do that. hc_mix adds up
// products of columns; hc_collapse adds those sums, and ends in what the op returns. Between them, for every token,
// `workspace` holds
//
//   partial [tokens, chunks, outputs + 4] fp32: n products of `pre`, 4 sums of squares, the other products
//
// A chunk is a split (kSplitColumns columns of every stream), or from kManyTokens tokens on a group: the sum of
// kSplitsPerGroup splits. Both ways give a row the same bits: splits are added to groups and groups to rows, in order.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace dsv4 {

constexpr int kMaxStreams = 16;
constexpr int kSplitColumns = 64;
constexpr int kSplitsPerGroup = 8;
constexpr int kManyTokens = 2048;
constexpr int kFewMixTokens = 32;
constexpr int kSquareSums = 4;

// x [tokens, streams, width]: tokens * streams rows, `stride` elements from one to the next.
struct Streams {
  const void* data;
  Dtype dtype;
  int64_t tokens;
  int streams;
  int width;
  int64_t stride;
};

// fn [outputs, streams * width], scale [3] (head: [1]), base [outputs].
struct MixWeights {
  const float* fn;
  const float* scale;
  const float* base;
  int outputs;
  float norm_eps;
  float hc_eps;
  int iterations;
};

// What hc_post adds to the streams x: f [tokens, width], post [tokens, n], comb [tokens, n, n]; the sum goes to
// `streams` [tokens, n, width].
struct Post {
  const void* f;
  int64_t f_stride;
  const float* post;
  const float* comb;
  void* streams;
};

enum class Tail { kNone, kNorm, kNormFp8, kNormNvfp4 };

// What hc_collapse does with the weighted sum of a token, and where its results go. Pointers that the op has no result
// for are null.
struct Collapsed {
  Tail tail;
  const void* norm_weight;  // [width]
  Dtype norm_dtype;
  int group;            // of FP8
  void* y;              // [tokens, width], normed unless kNone
  uint8_t* q;           // [tokens, width] or, packed, [tokens, width / 2]
  uint8_t* q_scale;     // [tokens, width / group] UE8M0 or [tokens, width / 16] E4M3
  float* global_scale;  // [tokens]
  float* post;          // [tokens, n]
  float* comb;          // [tokens, n, n]
};

constexpr int split_count(int width) { return (width + kSplitColumns - 1) / kSplitColumns; }
constexpr int group_count(int width) { return (split_count(width) + kSplitsPerGroup - 1) / kSplitsPerGroup; }
constexpr int chunk_count(int64_t tokens, int width) {
  return tokens < kManyTokens ? split_count(width) : group_count(width);
}
constexpr int64_t workspace_size(int64_t tokens, int width, int outputs) {
  return tokens * chunk_count(tokens, width) * (outputs + kSquareSums);
}

// Whether rows of this width are read 8 columns at a time; they must then start at multiples of 16 bytes.
constexpr bool reads_vectors(int width) { return width % 8 == 0; }

// Whether the kernel for many tokens (hc_mix_many.cu) multiplies. hc_post is then a launch of its own.
constexpr bool mixes_many(const Streams& x) {
  return x.tokens > kFewMixTokens && x.dtype == Dtype::kBf16 && x.streams == 4 && x.width % kSplitColumns == 0;
}

// comb [count, n, n] contiguous; logits: count * n rows of n.
cudaError_t launch_sinkhorn(const float* logits, Rows rows, int n, float eps, int iterations, float* comb,
                            cudaStream_t stream);

cudaError_t launch_hc_post(const Streams& x, const Post& post, cudaStream_t stream);

// Partial sums of x, or with `post` of the new streams, which it writes.
cudaError_t launch_hc_mix(const Streams& x, const Post* post, const MixWeights& weights, float* partial,
                          cudaStream_t stream);

cudaError_t launch_hc_collapse(const Streams& x, const MixWeights& weights, const float* partial, const Collapsed& out,
                               cudaStream_t stream);

// Every op that computes `pre`: hc_mix (of x, or of the streams that `post` makes of it), then hc_collapse.
cudaError_t launch_hc_pre(const Streams& x, const Post* post, const MixWeights& weights, float* workspace,
                          const Collapsed& out, cudaStream_t stream);

}  // namespace dsv4
