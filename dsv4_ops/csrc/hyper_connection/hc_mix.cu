// hc_mix, first launch of every op that computes `pre`: products of the streams with fn, and their sums of squares,
// over the columns of one split; with hc_post in front of it where the streams are made here.
//
// Products of fp32 run on tensor cores without loss. fn is cut into three bf16 parts whose sum it is (8 + 8 + 8 bits
// of mantissa), bf16 streams are one part as they are, fp32 streams are three. A product of parts is exact, and those
// whose exponents differ alike share an fp32 accumulator; the smallest are added first (products below 2^-28 are left
// out).
//
// One CTA owns kSplitColumns = 64 columns of every stream for 24 outputs (all, for n = 4), 8 warps: warp u has 32
// columns of one stream and its part of fn in registers (3 parts x 24 rows x 32 columns, 36 registers a lane, loaded
// before the wait). It goes through tiles of 16 tokens, which cp.async brings to shared memory a few tiles ahead. The
// order of k in a product is free, so a lane's 8 neighbouring columns, one access of 16 bytes, are its share of two
// m16n8k16 fragments. With hc_post inside, the warp first makes its stream's columns from f and all old streams,
// stores them rounded, and multiplies what it stored. Numbers of streams other than 4, and rows that are not whole
// vectors, take hc_mix_any_kernel, which reads both operands from memory for every tile.
//
// Shared memory, 42 KiB: sums of 8 warps x 16 tokens x (24 products + 4 squares), twice, so that one barrier a tile is
// enough, and sums of groups for 128 tokens. Dynamic, 45 KiB: 4 tiles in bf16 or 2 in fp32 (streams, f, post and comb).
//
// From kManyTokens tokens on, a CTA adds up the 8 splits of a group itself, which divides the partial sums in memory
// by 8. Which CTA does what never changes the order of a sum: 32 columns in a warp, the 8 warps, the splits of a
// group.
//
// Floor: fn (4 n d outputs bytes, before the wait) and x; with hc_post also f, and the new streams written. At decode
// sizes latency: a tile from L2, 2 dependent mma, two passes through shared memory, the store. For many tokens the
// bytes of x.
#include <cuda_pipeline_primitives.h>

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
template <typename T>
constexpr int kStages = sizeof(T) == sizeof(float) ? 2 : 4;  // tiles in shared memory

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
      pair.rows[half].round(values);
    }
  }
  return pair;
}

// ---- tiles in shared memory, for 4 streams ----

// 16 tokens. A row is 64 columns in units of 16 bytes; every other token has them in another order, so that 8 lanes
// that read two rows together meet all banks.
template <typename T>
struct Tile {
  static constexpr int kUnit = 16 / sizeof(T);  // columns
  static constexpr int kUnits = kSplitColumns / kUnit;
  static constexpr int kTurn = kCount / kUnit == 1 ? kUnits / 2 : 1;
  uint4 rows[5][kTokens][kUnits];  // the streams, then f
  float4 weights[kTokens][5];      // post, then the rows of comb

  static __device__ __forceinline__ int turned(int token, int unit) { return unit ^ (token & 1) * kTurn; }

  // 8 columns of a row, the first of them 8 * vector.
  __device__ __forceinline__ Columns<T> columns(int row, int token, int vector) const {
    Columns<T> result;
#pragma unroll
    for (int i = 0; i < kCount / kUnit; ++i) {
      result.parts[i] = rows[row][token][turned(token, vector * (kCount / kUnit) + i)];
    }
    return result;
  }
};

// Start to copy a tile; zeros where it has no tokens or columns. Every thread then commits.
template <bool kPost, typename T>
__device__ __forceinline__ void copy_tile(const Arguments& at, int split, int64_t first, Tile<T>& tile) {
  constexpr int kRows = kPost ? 5 : 4, kUnits = Tile<T>::kUnits;
  const auto copy = [](void* to, const void* from, bool exists) {
    __pipeline_memcpy_async(to, from, sizeof(uint4), exists ? 0 : sizeof(uint4));
  };
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * kRows * kUnits; i += kThreads) {
    const int unit = i % kUnits, row = i / kUnits % kRows, token = i / kUnits / kRows;
    const int column = split * kSplitColumns + unit * Tile<T>::kUnit;
    const bool exists = first + token < at.tokens && column < at.width;
    const T* const x = static_cast<const T*>(at.x) + ((first + token) * 4 + row) * at.stride;
    const T* const f = static_cast<const T*>(at.post.f) + (first + token) * at.post.f_stride;
    const void* const from = exists ? (row < 4 ? x : f) + column : at.x;
    copy(&tile.rows[row][token][Tile<T>::turned(token, unit)], from, exists);
  }
  if (kPost && threadIdx.x < kTokens * 5) {
    const int part = threadIdx.x % 5, token = threadIdx.x / 5;
    const bool exists = first + token < at.tokens;
    const float* const post = at.post.post + (first + token) * 4;
    const float* const comb = at.post.comb + (first + token) * 16 + (part - 1) * 4;
    copy(&tile.weights[token][part], exists ? (part == 0 ? post : comb) : at.post.post, exists);
  }
}

// A lane's columns of its two tokens from a tile, with kPost those that hc_post makes of it, which are stored.
template <bool kPost, typename T>
__device__ __forceinline__ TokenPair<T> take_streams(const Arguments& at, const Place& place, int64_t first,
                                                     const Tile<T>& tile) {
  TokenPair<T> pair;
  const int vector = place.column % kSplitColumns / kCount;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = place.row + 8 * half;
    if constexpr (!kPost) {
      pair.rows[half] = tile.columns(place.stream, token, vector);
      continue;
    }
    pair.rows[half] = {};
    if (first + 8 * half >= at.tokens) continue;  // the same for the whole CTA
    float f[kCount], x[4][kCount], comb[4];
    tile.columns(4, token, vector).to_floats(f);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tile.columns(j, token, vector).to_floats(x[j]);
      comb[j] = reinterpret_cast<const float*>(&tile.weights[token][1 + j])[place.stream];
    }
    const float post = reinterpret_cast<const float*>(&tile.weights[token][0])[place.stream];
#pragma unroll
    for (int i = 0; i < kCount; ++i) f[i] = post_column(post, f[i], comb, {x[0][i], x[1][i], x[2][i], x[3][i]});
    pair.rows[half].round(f);
    if (first + token >= at.tokens || place.column >= at.width) continue;
    T* const streams = static_cast<T*>(at.post.streams) + ((first + token) * 4 + place.stream) * at.width;
    pair.rows[half].store(streams + place.column);
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
    const bool square = value >= kOutputs;
    const float* const sums = square ? &shared.squares[buffer][0][token][value - kOutputs]
                                     : &shared.products[buffer][0][token][value];
    const int distance = square ? kTokens * kSquareSums : kTokens * kOutputs;  // from warp to warp
    float total = sums[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total += sums[warp * distance];
    if (!starts_chunk) total = shared.groups[tile][i] + total;
    if (!ends_chunk) {
      shared.groups[tile][i] = total;
      continue;
    }
    const int output = blockIdx.z * kOutputs + value;
    if (first + token >= at.tokens || (square ? blockIdx.z != 0 : output >= at.outputs)) continue;
    const int place = square ? at.streams + value - kOutputs : output < at.streams ? output : output + kSquareSums;
    at.partial[((first + token) * at.chunks + blockIdx.x) * places + place] = total;
  }
}

// Which tile of which split: the tiles of a split come one after the other.
struct Turn {
  int split;
  int tile;

  __device__ __forceinline__ void advance(int tiles) {
    if (++tile < tiles) return;
    tile = 0;
    ++split;
  }
};

struct Work {
  int64_t first_token;
  int tiles;
  int first_split, last_split;
};

__device__ __forceinline__ Work find_work(const Arguments& at) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * at.tiles * kTokens;
  const int64_t tiles = (at.tokens - first + kTokens - 1) / kTokens;
  const int split = blockIdx.x * at.splits, splits = (at.width + kSplitColumns - 1) / kSplitColumns;
  return {first, static_cast<int>(min(static_cast<int64_t>(at.tiles), tiles)), split, min(split + at.splits, splits)};
}

// 4 streams, rows of whole vectors.
template <typename T, bool kPost>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) hc_mix_kernel(const Arguments at) {
  __shared__ Shared shared;
  extern __shared__ uint4 dynamic_shared[];
  auto* const stages = reinterpret_cast<Tile<T>*>(dynamic_shared);
  const Work work = find_work(at);
  const int turns = (work.last_split - work.first_split) * work.tiles;
  const int unit = threadIdx.x / 32;
  Turn turn{work.first_split, 0}, ahead = turn;
  Place place = find_place(unit, 4, turn.split);
  WeightFragments weights = load_weights<true>(at, place);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  const auto copy_ahead = [&](int index) {
    if (index < turns) {
      copy_tile<kPost>(at, ahead.split, work.first_token + ahead.tile * kTokens, stages[index % kStages<T>]);
      ahead.advance(work.tiles);
    }
    __pipeline_commit();  // an empty group too: the waits below count groups
  };
#pragma unroll 1
  for (int i = 0; i < kStages<T>; ++i) copy_ahead(i);
  __pipeline_wait_prior(kStages<T> - 1);
  __syncthreads();
  for (int i = 0; i < turns; ++i) {
    const int64_t first = work.first_token + turn.tile * kTokens;
    const Turn now = turn;
    turn.advance(work.tiles);
    Sums sums = {};
    multiply(take_streams<kPost>(at, place, first, stages[i % kStages<T>]), weights, sums);
    store_sums(sums, shared, i % 2);
    __pipeline_wait_prior(kStages<T> - 2);
    __syncthreads();  // the sums and the next tile can be read, this one can be overwritten
    copy_ahead(i + kStages<T>);
    if (turn.split != now.split && i + 1 < turns) {
      place = find_place(unit, 4, turn.split);
      weights = load_weights<true>(at, place);
    }
    add_warps(at, shared, i % 2, now.tile, first, now.split == work.first_split, now.split + 1 == work.last_split);
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) hc_mix_any_kernel(const Arguments at) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  __shared__ Shared shared;
  const Work work = find_work(at);
  int buffer = 0;
  for (int split = work.first_split; split < work.last_split; ++split) {
    for (int tile = 0; tile < work.tiles; ++tile) {
      const int64_t first = work.first_token + tile * kTokens;
      Sums sums = {};
      for (int unit = threadIdx.x / 32; unit < kHalves * at.streams; unit += kWarps) {
        const Place place = find_place(unit, at.streams, split);
        multiply(load_streams<kAligned, T>(at, place, first), load_weights<kAligned>(at, place), sums);
      }
      store_sums(sums, shared, buffer);
      __syncthreads();
      add_warps(at, shared, buffer, tile, first, split == work.first_split, split + 1 == work.last_split);
      buffer ^= 1;
    }
  }
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
    using T = decltype(element);
    const bool aligned = reads_vectors(x.width);
    if (x.streams != 4 || !aligned) {
      return launch_kernel(aligned ? hc_mix_any_kernel<T, true> : hc_mix_any_kernel<T, false>, at, arguments);
    }
    Launch with_stages = at;
    with_stages.shared_bytes = kStages<T> * sizeof(Tile<T>);
    return launch_kernel(post == nullptr ? hc_mix_kernel<T, false> : hc_mix_kernel<T, true>, with_stages, arguments);
  });
}

}  // namespace dsv4
