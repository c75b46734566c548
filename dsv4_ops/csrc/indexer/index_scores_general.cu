// Scores of index keys on the CUDA cores: any number of heads, any width, any alignment, all three forms.
//
//   score[t, e] = sum_h w[t, h] * relu(q[t, h] . k[e])
//
// A CTA owns one token and every n-th of its tiles of 64 keys. A tile is dequantised into shared memory, then heads
// come eight at a time: two threads share a key, each multiplies four heads. Sums run along the width, then along a
// thread's heads, then over the two threads: fixed by the widths. This form serves exact mode (plain), heads and widths
// other than 64 x 128, and GPUs other than Hopper; floor: 2 fp32 flops a head, channel and score, of which shared
// memory lets about half through.
//
// Shared memory, bytes: 64 * (dim + 1) * 4 keys, dim * 32 eight heads as [dim][8], 288 weights and sums.
#include <algorithm>

#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "indexer/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 2 * kTile;
constexpr int kHeadsAtOnce = 8;
constexpr int kScaleGroup = 32;  // channels that share a scale in FP4

size_t shared_bytes(int dim) {
  return sizeof(float) * (static_cast<size_t>(kTile) * (dim + 1) + kHeadsAtOnce * dim + kHeadsAtOnce + kTile);
}

__device__ __forceinline__ float decode_fp4(const uint8_t* codes, const uint8_t* scales, int channel) {
  const uint32_t pair = codes[channel / 2];
  return decode_e2m1(channel % 2 ? pair >> 4 : pair & 15u) * decode_ue8m0(scales[channel / kScaleGroup]);
}

template <IndexForm kForm>
__device__ __forceinline__ float query_value(const IndexScoring& in, int64_t line, int channel) {
  const uint8_t* const q = in.q + line * in.q_stride;
  if constexpr (kForm == IndexForm::kPlain) return reinterpret_cast<const float*>(q)[channel];
  if constexpr (kForm == IndexForm::kFp8) return decode_e4m3(q[channel]);
  if constexpr (kForm == IndexForm::kFp4) return decode_fp4(q, in.scales + line * in.scales_stride, channel);
}

template <IndexForm kForm>
__device__ __forceinline__ float key_value(const IndexScoring& in, const uint8_t* page, int slot, int channel) {
  const int64_t place = static_cast<int64_t>(slot) * in.dim;
  const int64_t all = static_cast<int64_t>(in.keys.page_size) * in.dim;
  if constexpr (kForm == IndexForm::kPlain) return reinterpret_cast<const float*>(page)[place + channel];
  if constexpr (kForm == IndexForm::kFp8) {
    return decode_e4m3(page[place + channel]) * reinterpret_cast<const float*>(page + all)[slot];
  }
  if constexpr (kForm == IndexForm::kFp4) {
    return decode_fp4(page + place / 2, page + all / 2 + static_cast<int64_t>(slot) * (in.dim / kScaleGroup), channel);
  }
}

// Dequantise the keys of a tile that are seen; the others are zero.
template <IndexForm kForm>
__device__ __forceinline__ void load_keys(const IndexScoring& in, int64_t table, int tile, int seen, float* keys) {
  for (int warp_key = threadIdx.x / kWarp; warp_key < kTile; warp_key += kThreads / kWarp) {
    const int entry = tile * kTile + warp_key;
    const bool exists = entry < seen;
    const int64_t page = exists ? in.keys.table[table + entry / in.keys.page_size] : 0;
    const uint8_t* const bytes = in.keys.data + page * in.keys.page_stride;
    for (int channel = threadIdx.x % kWarp; channel < in.dim; channel += kWarp) {
      const float value = exists ? key_value<kForm>(in, bytes, entry % in.keys.page_size, channel) : 0.0f;
      keys[warp_key * (in.dim + 1) + channel] = value;
    }
  }
}

template <IndexForm kForm>
__global__ void __launch_bounds__(kThreads)
    index_scores_general_kernel(IndexScoring in, ScoreTask task, ScoreSink sink) {
  extern __shared__ __align__(16) float general_shared[];
  float* const heads = general_shared;                  // [dim][8]
  float* const weights = heads + kHeadsAtOnce * in.dim;  // [8]
  float* const sums = weights + kHeadsAtOnce;            // [64]
  float* const keys = sums + kTile;                      // [64][dim + 1]

  const int64_t token = task.first_block + blockIdx.x / task.slices;
  const int slice = blockIdx.x % task.slices, sequence = token / in.tokens, own_row = token % in.tokens;
  const int own_key = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int64_t row = token - task.first_token;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int32_t position = in.positions[sequence * in.positions_stride + own_row];
  const int seen = visible_entries(position, in.ratio, task.capacity);
  if (seen <= task.enough) return;

  const int end_tile = sink.scores == nullptr ? (seen + kTile - 1) / kTile : task.tiles;
  for (int tile = slice; tile < end_tile; tile += task.slices) {
    float score = 0.0f;
    if (tile * kTile < seen) {
      __syncthreads();
      load_keys<kForm>(in, sequence * in.keys.table_stride, tile, seen, keys);
      for (int first = 0; first < in.heads; first += kHeadsAtOnce) {
        __syncthreads();
        for (int i = threadIdx.x; i < kHeadsAtOnce * in.dim; i += kThreads) {
          const int head = first + i / in.dim, channel = i % in.dim;
          const float value = head < in.heads ? query_value<kForm>(in, token * in.heads + head, channel) : 0.0f;
          heads[channel * kHeadsAtOnce + i / in.dim] = value;
        }
        if (threadIdx.x < kHeadsAtOnce && first + threadIdx.x < in.heads) {
          weights[threadIdx.x] = in.w[token * in.w_stride + first + threadIdx.x];
        }
        __syncthreads();
        float4 products{0.0f, 0.0f, 0.0f, 0.0f};
        for (int channel = 0; channel < in.dim; ++channel) {
          const float key = keys[own_key * (in.dim + 1) + channel];
          const float4 q = *reinterpret_cast<const float4*>(heads + channel * kHeadsAtOnce + 4 * half);
          products.x = __fmaf_rn(key, q.x, products.x);
          products.y = __fmaf_rn(key, q.y, products.y);
          products.z = __fmaf_rn(key, q.z, products.z);
          products.w = __fmaf_rn(key, q.w, products.w);
        }
        const float four[4] = {products.x, products.y, products.z, products.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int head = 4 * half + i;
          if (first + head < in.heads) score = __fmaf_rn(weights[head], ptx::max_nan(four[i], 0.0f), score);
        }
      }
      __syncthreads();
      if (half == 1) sums[own_key] = score;
      __syncthreads();
      if (half == 0) score += sums[own_key];
    }
    if (half == 1) continue;
    const int entry = tile * kTile + own_key;
    const int64_t offset = row * sink.stride + entry;
    uint32_t key = put_score(sink, offset, entry, task.capacity, score, entry < seen);
    if (sink.maxima == nullptr) continue;
#pragma unroll
    for (int distance = 1; distance < kGroup; distance *= 2) {
      key = max(key, __shfl_xor_sync(kAllLanes, key, distance));
    }
    if (own_key % kGroup == 0) sink.maxima[offset / kGroup] = key;
  }
}

template <IndexForm kForm>
cudaError_t launch(const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink, cudaStream_t stream) {
  // About 2048 CTAs; more would load the queries of a token more often.
  const int64_t wanted = std::max<int64_t>(2048 / std::max(task.blocks, 1), 1);
  task.slices = static_cast<int>(std::min<int64_t>(wanted, task.tiles));
  const Launch at{dim3(static_cast<unsigned>(static_cast<int64_t>(task.blocks) * task.slices)), dim3(kThreads), stream,
                  shared_bytes(scoring.dim)};
  return launch_kernel(index_scores_general_kernel<kForm>, at, scoring, task, sink);
}

}  // namespace

cudaError_t launch_scores_general(IndexForm form, const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink,
                                  cudaStream_t stream) {
  switch (form) {
    case IndexForm::kPlain: return launch<IndexForm::kPlain>(scoring, task, sink, stream);
    case IndexForm::kFp8: return launch<IndexForm::kFp8>(scoring, task, sink, stream);
    case IndexForm::kFp4: return launch<IndexForm::kFp4>(scoring, task, sink, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dsv4
