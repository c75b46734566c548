// hc_mix, first launch of every op that computes `pre`: products of the streams with fn, and their sums of squares,
// over the columns of one split; with hc_post in front of it where the streams are made here.
//
// Products of fp32 run on tensor cores without loss. fn is cut into three bf16 parts whose sum it is (8 + 8 + 8 bits of
// mantissa), bf16 streams are one part as they are, fp32 streams are three. A product of parts is exact, and those
// whose exponents differ alike share an fp32 accumulator, smallest added first (part products below 2^-28 are left
// out).
//
// One CTA owns kSplitColumns = 64 columns of every stream for all outputs (24 for n = 4), 8 warps: warp u has 32
// columns of one stream, its part of fn in registers (3 parts x 24 rows x 32 columns, 36 registers a lane, loaded
// before the wait) and goes through the tokens, 16 at a time, straight from global memory: the order of k in a product
// is free, so a lane's 8 neighbouring columns, one access of 16 bytes, are its share of two m16n8k16 fragments. With
// hc_post inside, the warp first makes its stream's columns of the 16 tokens from f and all old streams (each is read
// by 4 warps, 3 times from L1), stores them rounded, and multiplies what it stored.
//
// Shared memory, 43 KiB: sums of 8 warps x 16 tokens x (24 products + 4 squares), twice, so that one barrier a tile is
// enough; and the group sums of 128 tokens. From kManyTokens tokens on, a CTA adds up the 8 splits of a group itself,
// which divides the partial sums in memory by 8. Which CTA does what never changes the order of a sum.
//
// Floor: fn (outputs * n * d * 4 bytes; before the wait) and x; with hc_post also f, and the new streams written. At
// decode sizes latency: load x, 2 x 3 dependent mma, shared memory, store. For many tokens the bytes of x.
//
// With collapse, norm and FP8 codes, dim 4096 (H200, 2026-11-25): one token 4.9 us, after hc_post 5.1, 128 tokens 15,
// 4096 tokens 160. From 16 tokens on the tiles of a CTA follow one another, each a load from L2, six dependent mma and
// a pass through shared memory: a chain of latencies, which is the likely bound, since the bytes take a tenth of the
// time. Tiles by cp.async a few ahead gave 5.2, 5.7, 16 and 172 us (though 238 instead of 275 for 4096 tokens after
// hc_post).
#include "common/launch.cuh"
#include "common/rms_norm.cuh"
#include "hyper_connection/streams.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kTokens = 16;               // of a tile: rows of an mma
constexpr int kParts = 3;                 // of an fp32 number
constexpr int kTiles = 3;                 // mma tiles of 8 outputs
constexpr int kSteps = 2;                 // mma steps of 16 columns that a warp owns
constexpr int kOutputs = 8 * kTiles;      // of a CTA
constexpr int kUnitColumns = 16 * kSteps; // of one stream that a warp multiplies at a time
constexpr int kHalves = kSplitColumns / kUnitColumns;
constexpr int kValues = kOutputs + kSquareSums;
constexpr int kGroupTiles = 8;            // tiles whose group sums a CTA keeps
constexpr int kTargetCtas = 2 * 132;      // what the GPU can hold at once

template <typename T>
constexpr int kStreamParts = sizeof(T) == sizeof(float) ? kParts : 1;

struct Arguments {
  const void* x;
  int64_t tokens;
  int streams;
  int width;
  int64_t stride;
  Post post;
  const float* fn;
  int outputs;
  float* partial;
  int chunks;
  int splits;   // that a CTA adds up
  int tiles;    // of tokens that a CTA goes through
};

struct Shared {
  float products[2][kWarps][kTokens][kOutputs];
  float squares[2][kWarps][kTokens][kSquareSums];
  float groups[kGroupTiles][kTokens * kValues];
};

// Where a lane works: columns column .. column + 7 of `stream`, for tokens row and row + 8 of a tile.
struct Place {
  int stream;
  int column;
  int row;
};

__device__ __forceinline__ Place find_place(int unit, int streams, int split) {
  const int lane = threadIdx.x % 32;
  return {unit % streams, split * kSplitColumns + unit / streams * kUnitColumns + lane % 4 * kCount, lane / 4};
}

// The two bf16 that are the top halves of two fp32 numbers (rounded towards zero), `low` in bits 0..15.
__device__ __forceinline__ uint32_t top_halves(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

__device__ __forceinline__ float below_top_half(float value) {
  return value - __uint_as_float(__float_as_uint(value) & 0xFFFF0000u);
}

// Neighbouring fp32 values -> pairs of bf16, part by part; the parts add up to the values.
template <int kPairs>
__device__ __forceinline__ void split_parts(float (&values)[2 * kPairs], uint32_t (&parts)[kParts][kPairs]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      parts[part][i] = top_halves(values[2 * i], values[2 * i + 1]);
      values[2 * i] = below_top_half(values[2 * i]);
      values[2 * i + 1] = below_top_half(values[2 * i + 1]);
    }
  }
}

// ---- operands ----

struct WeightFragments {
  uint32_t words[kParts][kTiles][kSteps][2];
};

template <bool kAligned>
__device__ __forceinline__ WeightFragments load_weights(const Arguments& at, const Place& place) {
  WeightFragments weights;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int output = (blockIdx.z * kTiles + tile) * 8 + place.row;
    const float* const row =
        at.fn + (static_cast<int64_t>(output) * at.streams + place.stream) * at.width + place.column;
    float values[kCount] = {};
    if constexpr (kAligned) {
      if (output < at.outputs && place.column < at.width) load_floats(row, values);
    } else if (output < at.outputs) {
      load_some(row, at.width - place.column, values);
    }
    uint32_t parts[kParts][kCount / 2];
    split_parts<kCount / 2>(values, parts);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int word = 0; word < kCount / 2; ++word) weights.words[part][tile][word / 2][word % 2] = parts[part][word];
    }
  }
  return weights;
}

// A lane's columns of its two tokens; zeros outside of x.
template <typename T>
struct TokenPair {
  Columns<T> rows[2];
};

template <bool kAligned, typename T>
__device__ __forceinline__ TokenPair<T> load_streams(const Arguments& at, const Place& place, int64_t first) {
  TokenPair<T> pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = first + place.row + 8 * half;
    const T* const row = static_cast<const T*>(at.x) + (token * at.streams + place.stream) * at.stride + place.column;
    pair.rows[half] = {};
    if constexpr (kAligned) {
      if (token < at.tokens && place.column < at.width) pair.rows[half].load_once(row);
    } else if (token < at.tokens) {
      float values[kCount];
      load_some(row, at.width - place.column, values);
      pair.rows[half] = to_columns<T>(values);
    }
  }
  return pair;
}

// hc_post of a lane's columns, stored and returned.
template <typename T>
__device__ __forceinline__ TokenPair<T> make_streams(const Arguments& at, const Place& place, int64_t first) {
  constexpr int n = 4;
  TokenPair<T> pair;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    pair.rows[half] = {};
    if (first + 8 * half >= at.tokens) continue;  // the same for the whole CTA
    const int64_t token = first + place.row + 8 * half;
    if (token >= at.tokens || place.column >= at.width) continue;
    const T* const x = static_cast<const T*>(at.x) + token * n * at.stride + place.column;
    Columns<T> old[n], input;
    float comb[n];
    input.load(static_cast<const T*>(at.post.f) + token * at.post.f_stride + place.column);
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
    store_columns(static_cast<T*>(at.post.streams) + (token * n + place.stream) * at.width + place.column,
                  pair.rows[half]);
  }
  return pair;
}

// ---- products ----

struct Sums {
  float products[kParts][kTiles][4];  // by the order of magnitude of what is added
  float squares[2];
};

// Add the products and squares of a lane's columns.
template <typename T>
__device__ __forceinline__ void multiply(const TokenPair<T>& pair, const WeightFragments& weights, Sums& sums) {
  constexpr int kWords = kCount / 2;
  uint32_t parts[2][kParts][kWords];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float values[kCount];
    pair.rows[half].to_floats(values);
    sums.squares[half] += sum_of_squares(values);
    split_parts<kWords>(values, parts[half]);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kStreamParts<T>; ++i) {
      const uint32_t a[4] = {parts[0][i][2 * step], parts[1][i][2 * step], parts[0][i][2 * step + 1],
                             parts[1][i][2 * step + 1]};
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        if (i + j > kParts) continue;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          ptx::mma_m16n8k16_bf16(sums.products[i + j < kParts ? i + j : kParts - 1][tile], a,
                                 weights.words[j][tile][step]);
        }
      }
    }
  }
}

__device__ __forceinline__ void store_sums(const Sums& sums, Shared& shared, int buffer) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const products = shared.products[buffer][warp][row + 8 * half];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float2 pair;
      const auto total = [&](int i) {
        return (sums.products[2][tile][i] + sums.products[1][tile][i]) + sums.products[0][tile][i];
      };
      pair.x = total(2 * half);
      pair.y = total(2 * half + 1);
      *reinterpret_cast<float2*>(products + tile * 8 + 2 * lane) = pair;
    }
    shared.squares[buffer][warp][row + 8 * half][lane] = sums.squares[half];
  }
}

// Add the sums of the warps, in order, to those of the group's earlier splits, and store the chunk's with its last
// split.
__device__ __forceinline__ void add_warps(const Arguments& at, Shared& shared, int buffer, int tile, int64_t first,
                                          bool starts_chunk, bool ends_chunk) {
  const int places = at.outputs + kSquareSums;
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * kValues; i += kThreads) {
    const int token = i / kValues, value = i % kValues;
    const float* const sums =
        value < kOutputs ? &shared.products[buffer][0][token][value]
                         : &shared.squares[buffer][0][token][value - kOutputs];
    const int distance = value < kOutputs ? kTokens * kOutputs : kTokens * kSquareSums;
    float total = sums[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total += sums[warp * distance];
    if (!starts_chunk) total = shared.groups[tile][i] + total;
    if (!ends_chunk) {
      shared.groups[tile][i] = total;
      continue;
    }
    const int output = blockIdx.z * kOutputs + value;
    const bool square = value >= kOutputs;
    if (first + token >= at.tokens || (square ? blockIdx.z != 0 : output >= at.outputs)) continue;
    const int place = square ? at.streams + value - kOutputs : output < at.streams ? output : output + kSquareSums;
    at.partial[((first + token) * at.chunks + blockIdx.x) * places + place] = total;
  }
}

// kStreams is 4, or 0 for any number; kAligned: rows can be read 8 columns at a time.
template <typename T, int kStreams, bool kAligned, bool kPost>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) hc_mix_kernel(const Arguments at) {
  __shared__ Shared shared;
  const int unit = threadIdx.x / 32;
  const int units = kHalves * at.streams;
  const int first_split = blockIdx.x * at.splits;
  const int last_split = min(first_split + at.splits, (at.width + kSplitColumns - 1) / kSplitColumns);
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * at.tiles * kTokens;
  Place place = find_place(unit, at.streams, first_split);
  WeightFragments weights;
  if constexpr (kStreams == 4) weights = load_weights<kAligned>(at, place);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  int buffer = 0;
  for (int split = first_split; split < last_split; ++split) {
    if (kStreams == 4 && split != first_split) {
      place = find_place(unit, at.streams, split);
      weights = load_weights<kAligned>(at, place);
    }
    TokenPair<T> next;
    if constexpr (kStreams == 4 && !kPost) next = load_streams<kAligned, T>(at, place, first_token);
    for (int tile = 0; tile < at.tiles; ++tile) {
      const int64_t first = first_token + tile * kTokens;
      if (first >= at.tokens) break;
      Sums sums = {};
      if constexpr (kPost) {
        multiply(make_streams<T>(at, place, first), weights, sums);
      } else if constexpr (kStreams == 4) {
        const TokenPair<T> now = next;
        if (tile + 1 < at.tiles) next = load_streams<kAligned, T>(at, place, first + kTokens);
        multiply(now, weights, sums);
      } else {
        for (int other = unit; other < units; other += kWarps) {
          place = find_place(other, at.streams, split);
          multiply(load_streams<kAligned, T>(at, place, first), load_weights<kAligned>(at, place), sums);
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
void (*choose_kernel(int streams, bool aligned, bool post))(Arguments) {
  if (post) return hc_mix_kernel<T, 4, true, true>;
  if (streams == 4 && aligned) return hc_mix_kernel<T, 4, true, false>;
  return aligned ? hc_mix_kernel<T, 0, true, false> : hc_mix_kernel<T, 0, false, false>;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

cudaError_t launch_hc_mix(const Streams& x, const Post* post, const MixWeights& weights, float* partial,
                          cudaStream_t stream) {
  const int64_t tiles = ceil_div(x.tokens, kTokens);
  const int64_t blocks = ceil_div(weights.outputs, kOutputs);
  const int chunks = chunk_count(x.tokens, x.width);
  const bool groups = x.tokens >= kManyTokens;
  const int64_t tiles_each = groups ? kGroupTiles : ceil_div(tiles * chunks * blocks, kTargetCtas);
  const Launch at{dim3(chunks, ceil_div(tiles, tiles_each < 1 ? 1 : tiles_each), blocks), dim3(kThreads), stream};
  const Arguments arguments{.x = x.data,
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
  return with_dtype(x.dtype, [&](auto element) {
    return launch_kernel(choose_kernel<decltype(element)>(x.streams, reads_vectors(x.width), post != nullptr), at,
                         arguments);
  });
}

}  // namespace dsv4
