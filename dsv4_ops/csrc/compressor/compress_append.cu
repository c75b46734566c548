// csa_, hca_ and index_compress_append: keep new tokens, and write the entry of every group that they complete.
//
//   entry = quantise([hadamard(]rope(rms_norm(sum over a group's rows of softmax_rows(score + ape) * kv))[)])
//
// One token a sequence of a released CSA or index compressor is compress_token.cu's; all other calls are handled here.
//
// compress_append_kernel. One CTA owns a sequence (up to 8 tokens) or some groups of one. Its threads stand four
// channels apart: D = 512 are four warps, index keys one. Where groups do not overlap (kHalves = 1: HCA, 128 rows),
// threadIdx.y counts row lanes, whose sums meet in shared memory. Every row is read once, 16 loads of 16 bytes of a
// thread in flight; norm, rope, Hadamard and quantiser work on registers. A step that completes no group only copies
// its token, which arrives while the position does; the token's row of ape comes before the wait, by a guess of the
// position.
//
// Old rows of the state are read before new ones overwrite them. In a CTA, every channel has one thread that reads all
// its rows and then writes (kHalves = 2), or the barrier of the row lanes lies in between (kHalves = 1). A chunk of
// more than 8 tokens has several CTAs and a second launch, keep_rows_kernel: a CTA owns a slot of a sequence's state.
//
// The sum of a channel has one order, whatever the chunk: rows lane, lane + lanes, ..., eight at a time, then the
// lanes.
//
// Shared memory:
//   sums       kHalves = 1: 1 KB, kHalves = 2: 64 bytes: sums of squares of the warps, for two groups in turn
//   lane_sums  kHalves = 1: 24 KB: three floats a channel of every row lane
//   staged     kHalves = 2: ape if it has at most 32 KB (16 KB for D = 512), from before the wait; a larger one goes
//              to L2
//
// Floor: two dependent reads for a decode step without an entry. An entry of D = 512 reads 28 KB (CSA) or 508 KB (HCA)
// at the 64 bytes a clock of one SM. A chunk reads 16 * D (CSA) or 8 * D bytes (HCA) a token at the speed of memory.
#include <algorithm>

#include "common/launch.cuh"
#include "compressor/entry.cuh"
#include "compressor/pooling.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = kCompressorMaxDim / kQuad;  // of a row lane at most
constexpr int kLaneThreads = 512;                    // of a CTA with row lanes
constexpr int kMaxWarps = kThreads / kWarp;          // of a row lane
constexpr int kMaxLanes = kLaneThreads / kWarp;
constexpr int kDecodeTokens = 8;  // of a sequence, up to which one CTA does everything
constexpr int kKeepThreads = 128;
constexpr int kApeBytes = 32 * 1024;  // largest ape that is held in shared memory
constexpr int kSms = 132;             // of an H200: the grid of a chunk fills them about once

// A token at a place of its group: the thread's channels of both halves.
template <int kHalves>
struct Token {
  float kv[kHalves][kQuad], score[kHalves][kQuad], bias[kHalves][kQuad];

  __device__ __forceinline__ void load(const Compressor& c, const Channels& from, int row) {
    const float* const kv_row = from.kv + static_cast<int64_t>(row) * c.kv_stride;
    const float* const score_row = from.score + static_cast<int64_t>(row) * c.score_stride;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      load_floats(kv_row + half * from.dim, kv[half]);
      load_floats(score_row + half * from.dim, score[half]);
    }
  }

  __device__ __forceinline__ void load_bias(const Channels& from, int place) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) load_floats(from.ape + place * from.width + half * from.dim, bias[half]);
  }

  // -> a slot of the state: kv and score + ape.
  __device__ __forceinline__ void store(const Channels& to, int slot) const {
    float* const kept = to.state + slot * (2 * to.width);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float biased[kQuad];
#pragma unroll
      for (int k = 0; k < kQuad; ++k) biased[k] = score[half][k] + bias[half][k];
      store_floats(kept + half * to.dim, kv[half]);
      store_floats(kept + to.width + half * to.dim, biased);
    }
  }
};

// Place of a position in its group.
__device__ __forceinline__ int place_of(int position, Divisor by_ratio, int ratio) {
  return position - by_ratio.divide(position) * ratio;
}

template <int kHalves>
__device__ __forceinline__ Channels find_channels(const Compressor& c, int dim, const float* ape, int sequence,
                                                  int column) {
  const int64_t first_token = static_cast<int64_t>(sequence) * c.rope.tokens;
  const int width = kHalves * dim;
  return {c.state + static_cast<int64_t>(sequence) * kHalves * c.ratio * 2 * width + column,
          c.kv + first_token * c.kv_stride + column,
          c.score + first_token * c.score_stride + column,
          ape + column,
          dim,
          width};
}

// This thread's channels of ape [ratio, 2 * dim] -> the same places of shared memory. No other thread reads them.
__device__ __forceinline__ void stage_ape(const Compressor& c, int dim, int column, float* staged) {
#pragma unroll 8
  for (int half = 0; half < 2 * c.ratio; ++half) {
    const int at = half * dim + column;
    *reinterpret_cast<float4*>(staged + at) = *reinterpret_cast<const float4*>(c.ape + at);
  }
}

// A larger ape comes to L2, a share of it by each CTA.
__device__ __forceinline__ void prefetch_ape(const Compressor& c, int width) {
  constexpr int kLine = 128 / sizeof(float);
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t ctas = gridDim.x * gridDim.y, cta = blockIdx.y * gridDim.x + blockIdx.x;
  for (int64_t at = (cta * threads + thread) * kLine; at < c.ratio * width; at += ctas * threads * kLine) {
    ptx::prefetch_l2(c.ape + at);
  }
}

// The sums of all row lanes -> lane 0. Every thread has read its rows when one leaves.
__device__ __forceinline__ void combine_lanes(Softmax<kQuad>& softmax, float4* shared) {
  softmax.store(shared + threadIdx.y * blockDim.x + threadIdx.x, kLaneThreads);
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int lane = 1; lane < blockDim.y; ++lane) softmax.add(shared + lane * blockDim.x + threadIdx.x, kLaneThreads);
}

template <EntryForm kForm, int kHalves, int kDim>
__global__ void __launch_bounds__(kHalves == 1 ? kLaneThreads : kThreads)
    compress_append_kernel(const Compressor c, const Divisor by_ratio, const Divisor by_page, const bool stage,
                           const bool keep) {
  using T = EntryElement<kForm>;
  extern __shared__ float4 staged[];
  __shared__ float4 sums[2][kHalves == 1 ? kMaxLanes : 1][kMaxWarps / 4];  // of two groups in turn
  __shared__ float4 lane_sums[kHalves == 1 ? 3 * kLaneThreads : 1];
  const int sequence = blockIdx.y, column = threadIdx.x * kQuad;
  const int lane = kHalves == 1 ? threadIdx.y : 0, lanes = kHalves == 1 ? blockDim.y : 1;
  const int dim = kDim ? kDim : c.dim;
  const bool inside = (kDim > 0 && kDim % (kQuad * kWarp) == 0) || column < dim;

  // 1. Parameters of the model.
  const float* ape = c.ape;
  float weights[kQuad] = {};
  if (inside) load_weights(c, column, weights);
  if (kHalves == 2 && stage) {
    ape = &staged[0].x;
    if (inside) stage_ape(c, dim, column, &staged[0].x);
  } else {
    prefetch_ape(c, kHalves * dim);
  }
  const Channels channels = find_channels<kHalves>(c, dim, ape, sequence, column);
  Token<kHalves> token;
  const bool keeps = keep && inside && lane < c.rope.tokens;
  const int guess = guess_position(c.rope, c.rope.positions + sequence * c.rope.stride);
  if (keeps) token.load_bias(channels, place_of(guess + lane, by_ratio, c.ratio));
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  // 2. Where the sequence stands; meanwhile a token for the state.
  if (keeps) token.load(c, channels, lane);
  const Chunk chunk = find_chunk(c.rope, sequence);
  const int first_group = by_ratio.divide(chunk.start);
  const int groups = by_ratio.divide(chunk.start + chunk.rows) - first_group;

  // 3. An entry for every group that ends in the chunk.
  for (int index = blockIdx.x, turn = 0; index < groups; index += gridDim.x, turn ^= 1) {
    const int group = first_group + index;
    const int first_rotated = inside && lane == 0 ? column - (dim - c.rope.dim) : -kQuad;
    float2 turns[kQuad / 2];
    load_turns<kQuad>(rope_row(c.rope.table, c.rope.dim, group * c.ratio), first_rotated, turns);
    const int page_index = by_page.divide(group);
    const int32_t page = c.pool.table[sequence * c.pool.table_stride + page_index];

    float values[kQuad] = {};
    Softmax<kQuad> softmax;
    if (inside) softmax = pool_rows<kHalves>(c, channels, chunk.start, group, lane, lanes);
    if constexpr (kHalves == 1) combine_lanes(softmax, lane_sums);
    if (inside && lane == 0) softmax.mean(values);
    round_all_to<T>(values);
    const float sum = sum_warps<kMaxWarps>(sum_of_squares(values), &sums[turn][lane][0].x);
    if (lane != 0) continue;
    const Entry entry{c.pool.data + page * c.pool.page_stride, c.pool.page_size, group - page_index * c.pool.page_size};
    const float scale = inverse_rms_of<kDim>(sum, dim, c.eps);
    finish_entry<kForm>(entry, dim, c.rope.dim, column, scale, weights, turns, values, inside);
  }

  // 4. The tokens that the state keeps; the first one again, from L1, if its registers were needed.
  if (!keeps) return;
  for (int row = lane; row < chunk.rows; row += lanes) {
    if (row + kHalves * c.ratio < chunk.rows) continue;
    const int position = chunk.start + row, group = by_ratio.divide(position), place = position - group * c.ratio;
    if (row != lane || groups > 0) token.load(c, channels, row);
    if (row != lane || groups > 0 || chunk.start != guess) token.load_bias(channels, place);
    token.store(channels, group % kHalves * c.ratio + place);
  }
}

// CTA (slot, sequence): the last token of the chunk that belongs there.
template <int kHalves>
__global__ void __launch_bounds__(kKeepThreads) keep_rows_kernel(const Compressor c) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int slot = blockIdx.x, slots = gridDim.x, sequence = blockIdx.y;
  const Chunk chunk = find_chunk(c.rope, sequence);
  const int last = chunk.start + chunk.rows - 1;
  const int position = last - (last % slots - slot + slots) % slots;
  if (position < chunk.start) return;
  for (int column = threadIdx.x * kQuad; column < c.dim; column += kKeepThreads * kQuad) {
    const Channels channels = find_channels<kHalves>(c, c.dim, c.ape, sequence, column);
    Token<kHalves> token;
    token.load(c, channels, position - chunk.start);
    token.load_bias(channels, position % c.ratio);
    token.store(channels, slot);
  }
}

// CTAs of a sequence whose chunk can end `groups` groups: about one wave, and every CTA the same number of groups.
int ctas_of_chunk(int groups, int sequences, int threads, int threads_of_an_sm) {
  const int64_t wave = kSms * (threads_of_an_sm / threads);
  const int64_t turns = (static_cast<int64_t>(groups) * sequences + wave - 1) / wave;
  return static_cast<int>((groups + turns - 1) / turns);
}

template <EntryForm kForm, int kHalves, int kDim>
cudaError_t launch(const Compressor& c, cudaStream_t stream) {
  if (c.sequences == 0 || c.rope.tokens == 0) return cudaSuccess;
  const int threads = (c.dim + kQuad * kWarp - 1) / (kQuad * kWarp) * kWarp;
  const int lanes = kHalves == 1 ? kLaneThreads / threads : 1;
  const int64_t ape_bytes = int64_t{4} * kHalves * c.dim * c.ratio;
  const bool stage = kHalves == 2 && ape_bytes <= kApeBytes;
  const bool keep = c.rope.tokens <= kDecodeTokens;
  const int groups = (c.rope.tokens + c.ratio - 1) / c.ratio;  // that a chunk can end, at most
  const int ctas = keep ? 1 : ctas_of_chunk(groups, c.sequences, threads * lanes, kHalves == 1 ? 512 : 384);
  const Divisor by_ratio(c.ratio), by_page(c.pool.page_size);
  const Launch pool{dim3(ctas, c.sequences), dim3(threads, lanes), stream, stage ? static_cast<size_t>(ape_bytes) : 0};
  const cudaError_t status =
      launch_kernel(compress_append_kernel<kForm, kHalves, kDim>, pool, c, by_ratio, by_page, stage, keep);
  if (keep || status != cudaSuccess) return status;
  const Launch rows{dim3(kHalves * c.ratio, c.sequences), dim3(kKeepThreads), stream};
  return launch_kernel(keep_rows_kernel<kHalves>, rows, c);
}

// The dimension of the released models is a constant, any other a parameter.
template <EntryForm kForm, int kHalves, int kDim>
cudaError_t launch_dim(const Compressor& c, cudaStream_t stream) {
  return c.dim == kDim ? launch<kForm, kHalves, kDim>(c, stream) : launch<kForm, kHalves, 0>(c, stream);
}

}  // namespace

cudaError_t launch_compress_append(const Compressor& c, int halves, EntryForm form, cudaStream_t stream) {
  if (is_a_model_token(c, halves, form)) return launch_compress_token(c, form, stream);
  switch (form) {
    case EntryForm::kPlain:
      return halves == 1 ? launch<EntryForm::kPlain, 1, 0>(c, stream) : launch<EntryForm::kPlain, 2, 0>(c, stream);
    case EntryForm::kKv:
      return halves == 1 ? launch_dim<EntryForm::kKv, 1, 512>(c, stream)
                         : launch_dim<EntryForm::kKv, 2, 512>(c, stream);
    case EntryForm::kIndexFp8: return launch_dim<EntryForm::kIndexFp8, 2, 128>(c, stream);
    case EntryForm::kIndexFp4: return launch_dim<EntryForm::kIndexFp4, 2, 128>(c, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
