// hc_mix, first launch of every op that computes `pre`: products of the streams with fn, and their sums of squares,
// over the columns of one split (mix.cuh); with hc_post in front of it where the streams are made here. This is the
// kernel for few tokens, and for streams of other dtypes, numbers and widths than hc_mix_many.cu takes.
//
// One CTA owns kSplitColumns = 64 columns of every stream for all outputs (24 for n = 4), 8 warps: warp u has unit u,
// its part of fn in registers (3 parts x 24 rows x 32 columns, 36 registers a lane, loaded before the wait) and goes
// through the tokens, 16 at a time, straight from global memory. With hc_post inside, the warp first makes its
// stream's columns of the 16 tokens from f and all old streams (each is read by 4 warps, 3 times from L1), stores them
// rounded, and multiplies what it stored.
//
// Shared memory, 43 KiB: sums of 8 warps x 16 tokens x (24 products + 4 squares), twice, so that one barrier a tile is
// enough; and the group sums of 128 tokens. From kManyTokens tokens on, a CTA adds up the 8 splits of a group itself,
// which divides the partial sums in memory by 8.
//
// Floor: fn (outputs * n * d * 4 bytes; before the wait) and x; with hc_post also f, and the new streams written. At
// decode sizes latency: load x, 18 mma a warp, shared memory, store.
#include "common/launch.cuh"
#include "common/quad.cuh"
#include "common/reduce.cuh"
#include "hyper_connection/mix.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kValues = kOutputs + kSquareSums;
constexpr int kGroupTiles = 8;            // tiles whose group sums a CTA keeps
constexpr int kTargetCtas = 2 * 132;      // what the GPU can hold at once

template <typename T>
constexpr int kStreamParts = sizeof(T) == sizeof(float) ? kParts : 1;

struct Shared {
  float products[2][kWarps][kTokens][kOutputs];
  float squares[2][kWarps][kTokens][kSquareSums];
  float groups[kGroupTiles][kTokens * kValues];
};

// Where a lane works: columns column .. column + 31 of `stream`, for tokens row and row + 8 of a tile.
struct Place {
  int stream;
  int column;
  int row;
};

__device__ __forceinline__ Place find_place(int unit, int split) {
  const int column = split * kSplitColumns + unit % kHalves * kUnitColumns;
  return {unit / kHalves, column, static_cast<int>(threadIdx.x % 32 / 4)};
}

// ---- operands ----

// A lane's share of a unit, `left` columns of which exist: two of each 8, zeros outside.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_share(const T* unit, int left, float (&values)[kCount]) {
  const int own = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const int column = i / 2 * 8 + own;
    float pair[2] = {};
    if constexpr (kAligned) {
      if (column < left) load_floats(unit + column, pair);
    } else {
      load_some(unit + column, left - column, pair);
    }
    values[i] = pair[0];
    values[i + 1] = pair[1];
  }
}

// Lane q of 4 has columns 8 q .. 8 q + 7 of a unit and gets its share of it.
template <typename T>
__device__ __forceinline__ Columns<T> exchange(const Columns<T>& columns) {
  uint32_t words[kCount / 2][2 * sizeof(T) / sizeof(uint32_t)];
  memcpy(words, &columns, sizeof(columns));
  transpose_quad(words);
  Columns<T> share;
  memcpy(&share, words, sizeof(share));
  return share;
}

struct WeightFragments {
  uint32_t words[kParts][kTiles][kSteps][2];
};

template <bool kAligned>
__device__ __forceinline__ WeightFragments load_weights(const MixArguments& at, const Place& place) {
  WeightFragments weights;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int output = (blockIdx.z * kTiles + tile) * 8 + place.row;
    const float* const unit =
        at.fn + (static_cast<int64_t>(output) * at.streams + place.stream) * at.width + place.column;
    float values[kCount] = {};
    if (output < at.outputs) load_share<kAligned>(unit, at.width - place.column, values);
    uint32_t parts[kParts][kCount / 2];
    split_parts(values, parts);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int word = 0; word < kCount / 2; ++word) weights.words[part][tile][word / 2][word % 2] = parts[part][word];
    }
  }
  return weights;
}

// A lane's shares of its two tokens; zeros outside of x.
template <typename T>
struct TokenPair {
  Columns<T> rows[2];
};

template <bool kAligned, typename T>
__device__ __forceinline__ TokenPair<T> load_streams(const MixArguments& at, const Place& place, int64_t first) {
  TokenPair<T> pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = first + place.row + 8 * half;
    const T* const unit = static_cast<const T*>(at.x) + (token * at.streams + place.stream) * at.stride + place.column;
    float values[kCount] = {};
    if (token < at.tokens) load_share<kAligned>(unit, at.width - place.column, values);
    pair.rows[half] = to_columns<T>(values);
  }
  return pair;
}

// hc_post of a unit, stored and returned. A lane makes 8 neighbouring columns.
template <typename T>
__device__ __forceinline__ TokenPair<T> make_streams(const MixArguments& at, const Place& place, int64_t first) {
  constexpr int n = 4;
  const int column = place.column + threadIdx.x % 4 * kCount;
  TokenPair<T> pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    pair.rows[half] = {};
    if (first + 8 * half >= at.tokens) continue;  // the same for the whole CTA
    const int64_t token = first + place.row + 8 * half;
    if (token < at.tokens && column < at.width) {
      const T* const x = static_cast<const T*>(at.x) + token * n * at.stride + column;
      Columns<T> old[n], input;
      float comb[n];
      input.load(static_cast<const T*>(at.post.f) + token * at.post.f_stride + column);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        old[j].load(x + j * at.stride);
        comb[j] = at.post.comb[(token * n + j) * n + place.stream];
      }
      float f[kCount], values[n][kCount];
      const float post = at.post.post[token * n + place.stream];
      input.to_floats(f);
#pragma unroll
      for (int j = 0; j < n; ++j) old[j].to_floats(values[j]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        f[i] = post_column(post, f[i], comb, {values[0][i], values[1][i], values[2][i], values[3][i]});
      }
      pair.rows[half] = to_columns<T>(f);
      pair.rows[half].store(static_cast<T*>(at.post.streams) + (token * n + place.stream) * at.width + column);
    }
    pair.rows[half] = exchange(pair.rows[half]);
  }
  return pair;
}

// ---- products ----

struct Sums {
  float products[kTiles][4];
  float squares[2];
};

// The products and squares of a unit.
template <typename T>
__device__ __forceinline__ Sums multiply(const TokenPair<T>& pair, const WeightFragments& weights) {
  Sums sums = {};
  uint32_t parts[2][kParts][kCount / 2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float values[kCount];
    pair.rows[half].to_floats(values);
    sums.squares[half] = sum_of_squares(values);
    split_parts(values, parts[half]);
  }
#pragma unroll
  for (int order = kParts; order >= 0; --order) {  // of magnitude of the products, smallest first
#pragma unroll
    for (int i = 0; i < kStreamParts<T>; ++i) {
      const int j = order - i;
      if (j < 0 || j >= kParts) continue;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t a[4] = {parts[0][i][2 * step], parts[1][i][2 * step], parts[0][i][2 * step + 1],
                               parts[1][i][2 * step + 1]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          ptx::mma_m16n8k16_bf16(sums.products[tile], a, weights.words[j][tile][step]);
        }
      }
    }
  }
  return sums;
}

__device__ __forceinline__ void add(const Sums& more, Sums& sums) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.products[tile][i] += more.products[tile][i];
  }
  sums.squares[0] += more.squares[0];
  sums.squares[1] += more.squares[1];
}

__device__ __forceinline__ void store_sums(const Sums& sums, Shared& shared, int buffer) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const products = shared.products[buffer][warp][row + 8 * half];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 pair = {sums.products[tile][2 * half], sums.products[tile][2 * half + 1]};
      *reinterpret_cast<float2*>(products + tile * 8 + 2 * lane) = pair;
    }
    shared.squares[buffer][warp][row + 8 * half][lane] = sums.squares[half];
  }
}

// Add the sums of the warps, in order, to those of the group's earlier splits, and store the chunk's with its last
// split.
__device__ __forceinline__ void add_warps(const MixArguments& at, Shared& shared, int buffer, int tile, int64_t first,
                                          bool starts_chunk, bool ends_chunk) {
  const int places = at.outputs + kSquareSums;
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * kValues; i += kThreads) {
    const int token = i / kValues, value = i % kValues;
    const float* const sums =
        value < kOutputs ? &shared.products[buffer][0][token][value]
                         : &shared.squares[buffer][0][token][value - kOutputs];
    const int distance = value < kOutputs ? kTokens * kOutputs : kTokens * kSquareSums;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * distance];
    if (!starts_chunk) total = shared.groups[tile][i] + total;
    if (!ends_chunk) {
      shared.groups[tile][i] = total;
      continue;
    }
    const int output = blockIdx.z * kOutputs + value;
    const bool square = value >= kOutputs;
    if (first + token >= at.tokens || (square ? blockIdx.z != 0 : output >= at.outputs)) continue;
    const int place = square ? at.streams + value - kOutputs : place_of(output, at.streams);
    at.partial[((first + token) * at.chunks + blockIdx.x) * places + place] = total;
  }
}

// kStreams is 4, or 0 for any number; kAligned: rows can be read 8 columns at a time.
template <typename T, int kStreams, bool kAligned, bool kPost>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) hc_mix_kernel(const MixArguments at) {
  __shared__ Shared shared;
  const int unit = threadIdx.x / 32;
  const int units = kHalves * at.streams;
  const int first_split = blockIdx.x * at.splits;
  const int last_split = min(first_split + at.splits, (at.width + kSplitColumns - 1) / kSplitColumns);
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * at.tiles * kTokens;
  Place place = find_place(unit, first_split);
  WeightFragments weights;
  if constexpr (kStreams == 4) weights = load_weights<kAligned>(at, place);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  int buffer = 0;
  for (int split = first_split; split < last_split; ++split) {
    if (kStreams == 4 && split != first_split) {
      place = find_place(unit, split);
      weights = load_weights<kAligned>(at, place);
    }
    TokenPair<T> next;
    if constexpr (kStreams == 4 && !kPost) next = load_streams<kAligned, T>(at, place, first_token);
    for (int tile = 0; tile < at.tiles; ++tile) {
      const int64_t first = first_token + tile * kTokens;
      if (first >= at.tokens) break;
      Sums sums = {};
      if constexpr (kPost) {
        sums = multiply(make_streams<T>(at, place, first), weights);
      } else if constexpr (kStreams == 4) {
        const TokenPair<T> now = next;
        if (tile + 1 < at.tiles) next = load_streams<kAligned, T>(at, place, first + kTokens);
        sums = multiply(now, weights);
      } else {
        for (int other = unit; other < units; other += kWarps) {
          place = find_place(other, split);
          add(multiply(load_streams<kAligned, T>(at, place, first), load_weights<kAligned>(at, place)), sums);
        }
      }
      store_sums(sums, shared, buffer);
      __syncthreads();
      add_warps(at, shared, buffer, tile, first, split == first_split, split + 1 == last_split);
      buffer ^= 1;
    }
  }
}

template <typename T>
void (*choose_kernel(int streams, bool aligned, bool post))(MixArguments) {
  if (post) return hc_mix_kernel<T, 4, true, true>;
  if (streams == 4 && aligned) return hc_mix_kernel<T, 4, true, false>;
  return aligned ? hc_mix_kernel<T, 0, true, false> : hc_mix_kernel<T, 0, false, false>;
}

}  // namespace

cudaError_t launch_hc_mix(const Streams& x, const Post* post, const MixWeights& weights, float* partial,
                          cudaStream_t stream) {
  const int64_t tiles = ceil_div(x.tokens, kTokens);
  const int64_t blocks = ceil_div(weights.outputs, kOutputs);
  const int chunks = chunk_count(x.tokens, x.width);
  const bool groups = x.tokens >= kManyTokens;
  const int64_t tiles_each = groups ? kGroupTiles : ceil_div(tiles * chunks * blocks, kTargetCtas);
  const Launch at{dim3(chunks, ceil_div(tiles, tiles_each < 1 ? 1 : tiles_each), blocks), dim3(kThreads), stream};
  const MixArguments arguments{.x = x.data,
                            .tokens = x.tokens,
                            .streams = x.streams,
                            .width = x.width,
                            .stride = x.stride,
                            .post = post == nullptr ? Post{} : *post,
                            .fn = weights.fn,
                            .outputs = weights.outputs,
                            .partial = partial,
                            .chunks = chunks,
                            .splits = groups ? kSplitsPerGroup : 1,
                            .tiles = static_cast<int>(tiles_each)};
  if (mixes_many(x)) return launch_hc_mix_many(arguments, stream);
  return with_dtype(x.dtype, [&](auto element) {
    return launch_kernel(choose_kernel<decltype(element)>(x.streams, reads_vectors(x.width), post != nullptr), at,
                         arguments);
  });
}

}  // namespace dsv4
