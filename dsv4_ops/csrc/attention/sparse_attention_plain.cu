// Sparse attention without tensor cores, for every form that sparse_attention.cu and sparse_attention_mixed.cu do not
// take: fp32 queries or pools (exact mode), other head dimensions, and GPUs without wgmma, until those have a kernel of
// their own. Computes in fp32.
//
// A CTA owns one head of one row. Warp w takes keys 4w .. 4w + 3, then those 32 further on, with a running softmax of
// its own; a lane has dimensions lane, lane + 32, ... of query, keys and output. The eight results are added up in
// order, by each thread for a pair of dimensions. Every head reads the keys for itself, from L2: this is about
// correctness, not about speed. Shared memory: output of each warp [8][D], their largest scores and sums [8] each,
// 16.1 KB for D = 512.
#include "attention/keys.cuh"
#include "attention/mixed_attention.h"
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/quantise.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kKeys = 4;  // of a warp at a time
constexpr int kLargestDim = 512;
constexpr int kValues = kLargestDim / kWarp;  // of a lane
static_assert(2 * kWarps * kWarp == kLargestDim, "a thread has a pair of output");
constexpr int kGroup = 64;                    // dimensions that share a scale

// E4M3 -> fp32 by moving the bits; a NaN code is 480, as in decode_finite_e4m3 of dsv4_ops/ops/formats.py.
__device__ __forceinline__ float decode_finite_e4m3(uint32_t code) {
  return __uint_as_float((code & 0x80u) << 24 | (code & 0x7Fu) << 20) * 0x1p120f;
}

struct Shape {
  int dim, rope_dim;
};

struct NoQueries {};  // but attention.q

__device__ __forceinline__ float load_key_value(const Pool& pool, const Place& place, Shape shape, int dim) {
  if (pool.plain) {
    return reinterpret_cast<const float*>(place.page)[static_cast<int64_t>(place.slot) * shape.dim + dim];
  }
  const int nope = shape.dim - shape.rope_dim, bytes = nope + 2 * shape.rope_dim;
  const uint8_t* const data = place.page + static_cast<int64_t>(place.slot) * bytes;
  if (dim >= nope) return to_float(reinterpret_cast<const __nv_bfloat16*>(data + nope)[dim - nope]);
  const int scale_bytes = (nope + 511) / 512 * 8;
  const uint8_t* const scales = place.page + static_cast<int64_t>(pool.page_size) * bytes + place.slot * scale_bytes;
  return decode_finite_e4m3(data[dim]) * decode_ue8m0(scales[dim / kGroup]);
}

__device__ __forceinline__ void load_key(const KeySources& sources, const RowKeys& row, Shape shape, int key, int entry,
                                         float (&values)[kValues]) {
  const bool window = key < row.window_keys;
  const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
  Place place{};
  if (entry >= 0) {
    place = place_of_entry(pool, window ? sources.window_page : sources.compressed_page, row.sequence, entry);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int dim = i * kWarp + threadIdx.x % kWarp;
    values[i] = entry >= 0 && dim < shape.dim ? load_key_value(pool, place, shape, dim) : 0.0f;
  }
}

// Values of a query: of a tensor [B, S, H, D], or of its parts.
template <typename T>
__device__ __forceinline__ float query_value(const SparseAttention& attention, NoQueries, int64_t row, int head,
                                             int dim) {
  return to_float(static_cast<const T*>(attention.q)[(row * attention.heads + head) * attention.q_stride + dim]);
}

template <typename T>
__device__ __forceinline__ float query_value(const SparseAttention& attention, const MixedQueries& queries, int64_t row,
                                             int head, int dim) {
  const int64_t sequence = row / attention.rope.tokens, token = row % attention.rope.tokens;
  const auto at = [&](const VectorStrides& strides) {
    return sequence * strides.sequence + token * strides.token + head * strides.head;
  };
  const int nope = attention.dim - attention.rope.dim;
  if (dim >= nope) return to_float(static_cast<const T*>(queries.rope)[at(queries.rope_strides) + dim - nope]);
  return decode_e4m3(queries.nope[at(queries.nope_strides) + dim]) * queries.scale[at(queries.scale_strides)];
}

// Dimensions 2 * pair and the next one of a vector of output, by all threads together; or their codes, in groups of two
// warps. `scratch` has a word for each warp, which is still read.
template <typename T>
__device__ __forceinline__ void store_pair(const SparseAttention& attention, int64_t vector, int pair, bool exists,
                                           float2 values, float* scratch) {
  const int64_t first = vector * attention.dim + 2 * pair;
  if (attention.o_scale == nullptr) {
    if (!exists) return;
    T* const o = static_cast<T*>(attention.o) + first;
    o[0] = from_float<T>(values.x);
    o[1] = from_float<T>(values.y);
    return;
  }
  static_assert(kScaleGroup == 2 * 2 * kWarp, "of two warps");
  const float rounded[2] = {round_to<T>(values.x), round_to<T>(values.y)};
  const uint32_t bits = max_lanes(max_magnitude_bits(rounded));
  const int warp = threadIdx.x / kWarp;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[warp] = __uint_as_float(bits);
  __syncthreads();
  if (!exists) return;
  const uint32_t largest = max(__float_as_uint(scratch[warp]), __float_as_uint(scratch[warp ^ 1]));
  const uint32_t scale = fp8_group_scale(__uint_as_float(largest));
  uint8_t codes[2];
  encode_fp8(rounded, invert_ue8m0(scale), codes);
  store_bytes(static_cast<uint8_t*>(attention.o) + first, codes);
  if (2 * pair % kScaleGroup == 0) attention.o_scale[first / kScaleGroup] = scale;
}

template <typename T, typename Queries>
__global__ void __launch_bounds__(kWarps* kWarp)
    sparse_attention_plain_kernel(const __grid_constant__ SparseAttention attention,
                                  const __grid_constant__ Queries queries) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  __shared__ float outputs[kWarps][kLargestDim], largests[kWarps], sums[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t vector = blockIdx.x;
  const int head = vector % attention.heads;
  const RowKeys row = keys_of_row(attention.keys, attention.rope, vector / attention.heads);
  const Shape shape{attention.dim, attention.rope.dim};

  // 1. The keys of this warp
  float query[kValues], output[kValues] = {}, largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int dim = i * kWarp + lane;
    query[i] = dim < shape.dim ? query_value<T>(attention, queries, vector / attention.heads, head, dim) : 0.0f;
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(shape.dim));
  for (int first = warp * kKeys; first < row.count; first += kWarps * kKeys) {
    float keys[kKeys][kValues], scores[kKeys], highest = largest;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int entry = entry_of_key(attention.keys, row, first + k);
      load_key(attention.keys, row, shape, first + k, entry, keys[k]);
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < kValues; ++i) score = fmaf(query[i], keys[k][i], score);
      score = sum_lanes(score) * scale;
      scores[k] = entry >= 0 ? score : -INFINITY;
      highest = fmaxf(highest, scores[k]);
    }
    const float reference = highest == -INFINITY ? 0.0f : highest;
    const float before = expf(largest - reference);
    largest = highest;
    sum *= before;
#pragma unroll
    for (int i = 0; i < kValues; ++i) output[i] *= before;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const float weight = expf(scores[k] - reference);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kValues; ++i) output[i] = fmaf(weight, keys[k][i], output[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) outputs[warp][i * kWarp + lane] = output[i];
  if (lane == 0) {
    largests[warp] = largest;
    sums[warp] = sum;
  }
  __syncthreads();

  // 2. All of them, in order
  float highest = -INFINITY, total = 0.0f, factors[kWarps];
  for (int i = 0; i < kWarps; ++i) highest = fmaxf(highest, largests[i]);
  const float reference = highest == -INFINITY ? 0.0f : highest;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    factors[i] = expf(largests[i] - reference);
    total += factors[i] * sums[i];
  }
  const float denominator = total + expf(attention.sink[head] - reference);
  if (threadIdx.x == 0) attention.lse[vector] = reference + logf(total);
  const int nope = shape.dim - shape.rope_dim, pair = threadIdx.x;
  float2 values{0.0f, 0.0f};
  if (total > 0) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      values.x = fmaf(factors[i], outputs[i][2 * pair], values.x);
      values.y = fmaf(factors[i], outputs[i][2 * pair + 1], values.y);
    }
    values = {values.x / denominator, values.y / denominator};
  }
  const bool exists = 2 * pair < shape.dim;
  if (exists && 2 * pair >= nope) {
    const float* const turn = rope_row(attention.rope.table, shape.rope_dim, row.position) + 2 * pair - nope;
    values = rotate(values, {__ldg(turn), -__ldg(turn + 1)});
  }
  store_pair<T>(attention, vector, pair, exists, values, sums);
}

}  // namespace

cudaError_t launch_sparse_attention_plain(const SparseAttention& attention, cudaStream_t stream) {
  const Launch at{dim3(attention.rows * attention.heads), dim3(kWarps * kWarp), stream};
  return with_dtype(attention.dtype, [&](auto element) {
    return launch_kernel(sparse_attention_plain_kernel<decltype(element), NoQueries>, at, attention, NoQueries());
  });
}

cudaError_t launch_sparse_attention_mixed_plain(const MixedAttention& mixed, cudaStream_t stream) {
  const Launch at{dim3(mixed.attention.rows * mixed.attention.heads), dim3(kWarps * kWarp), stream};
  return launch_kernel(sparse_attention_plain_kernel<__nv_bfloat16, MixedQueries>, at, mixed.attention, mixed.queries);
}

}  // namespace dsv4
