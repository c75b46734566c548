// hc_mix for more than kFewMixTokens tokens of bf16, n = 4, whose columns are whole splits: the sums of hc_mix.cu in
// the same order, by warps that own tokens instead of columns.
//
// One CTA owns a chunk (64 columns of every stream, or from kManyTokens tokens on 8 times as many) for 4 warps of 16 or
// 32 tokens. A warp multiplies all units of its tokens, so all sums stay in its registers: of the unit, the split and
// the group. Its x goes by cp.async through a ring of its own, the next 3 units of 32 tokens (7 of 16) on their way.
// fn is the same for all warps: cut into parts once a CTA, in shared memory as the fragments that lanes read; the first
// split's before the wait, the next split's while this one is multiplied, and one barrier a split.
//
// Shared memory:
//   fragments of a split  [8 units][3 parts][3 tiles][32 lanes] x 16 bytes = 36 KiB, for groups twice
//   x                     [4 warps] x 8 KiB: units of [tokens][32 columns], 64 bytes a token, of which the 16-byte
//                         chunk c of token t lies at c ^ (t / 2 % 4), so that ldmatrix meets every bank once
//
// A unit of 32 tokens, 1024 elements, takes 36 mma, 64 instructions for squares, 28 adds, 9 reads of fragments, 4 of x,
// and fn for the next split about 60: by this count less time than its 2 KiB take from memory. Floor: the bytes of x.
#include "common/launch.cuh"
#include "hyper_connection/mix.cuh"

namespace dsv4 {
namespace {

constexpr int kStreams = 4;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kUnits = kHalves * kStreams;
constexpr int kFragments = kUnits * kParts * kTiles * 32;  // of 16 bytes
constexpr int kItems = kHalves * kTiles;       // of fn that a lane cuts for a split: its share of a unit for an output
constexpr int kChunks = kUnitColumns * 2 / 16;  // of a token in a unit
constexpr int kRing = 512;                      // chunks of a warp's ring
constexpr int64_t kSmallTokens = 256;           // up to here a warp has 16 tokens
static_assert(kWarps == kStreams, "a warp cuts the fn of a stream");
static_assert(kItems <= kUnits, "an item a unit");

// Warp j cuts the columns of stream j, an item at a time. `fn`: where this lane's share begins for its output of the
// first tile.
__device__ __forceinline__ void load_item(const MixArguments& at, const float* fn, int item, float (&values)[kCount]) {
  const int half = item / kTiles, tile = item % kTiles, output = tile * 8 + threadIdx.x % 32 / 4;
  const float* const share = fn + static_cast<int64_t>(tile) * (8 * kStreams * at.width) + half * kUnitColumns;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    float2 pair = {0.0f, 0.0f};
    if (output < at.outputs) pair = *reinterpret_cast<const float2*>(share + i / 2 * 8);
    values[i] = pair.x;
    values[i + 1] = pair.y;
  }
}

// `fragments`: of the split, this lane's of the warp's stream.
__device__ __forceinline__ void store_item(int item, float (&values)[kCount], uint4* fragments) {
  const int half = item / kTiles, tile = item % kTiles;
  uint32_t parts[kParts][kCount / 2];
  split_parts(values, parts);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    fragments[((half * kParts + part) * kTiles + tile) * 32] = {parts[part][0], parts[part][1], parts[part][2],
                                                                parts[part][3]};
  }
}

// Of a lane's tokens, which are 8 apart; a mma has two of them.
template <int kMmas>
struct Sums {
  float products[kMmas][kTiles][4];
  float squares[2 * kMmas];
};

template <int kMmas>
__device__ __forceinline__ void add(const Sums<kMmas>& more, Sums<kMmas>& sums) {
#pragma unroll
  for (int m = 0; m < kMmas; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.products[m][tile][i] += more.products[m][tile][i];
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kMmas; ++i) sums.squares[i] += more.squares[i];
}

// The products and squares of a unit. `x`: its first 16 bytes; `fragments`: this lane's first.
template <int kMmas>
__device__ __forceinline__ Sums<kMmas> multiply(const uint4* x, const uint4* fragments) {
  const int lane = threadIdx.x % 32, token = lane % kTokens;
  uint32_t a[kMmas][kSteps][4];
#pragma unroll
  for (int m = 0; m < kMmas; ++m) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = (2 * step + lane / kTokens) ^ (token / 2 % kChunks);
      ptx::ldmatrix_x4(a[m][step], x + (m * kTokens + token) * kChunks + chunk);
    }
  }
  Sums<kMmas> sums = {};
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) {
    uint4 b[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) b[tile] = fragments[(part * kTiles + tile) * 32];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t words[2] = {step == 0 ? b[tile].x : b[tile].z, step == 0 ? b[tile].y : b[tile].w};
#pragma unroll
        for (int m = 0; m < kMmas; ++m) ptx::mma_m16n8k16_bf16(sums.products[m][tile], a[m][step], words);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < 2 * kMmas; ++row) {
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 pair = unpack_bf16x2(a[row / 2][i / 2][i % 2 * 2 + row % 2]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
    sums.squares[row] = sum_of_squares(values);
  }
  return sums;
}

template <int kMmas>
__device__ __forceinline__ void store_sums(const MixArguments& at, int64_t token, const Sums<kMmas>& sums) {
  const int lane = threadIdx.x % 4, places = at.outputs + kSquareSums;
#pragma unroll
  for (int row = 0; row < 2 * kMmas; ++row, token += 8) {
    if (token >= at.tokens) return;
    float* const partial = at.partial + (token * at.chunks + blockIdx.x) * places;
    partial[kStreams + lane] = sums.squares[row];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int output = i / 2 * 8 + lane * 2 + i % 2;
      if (output < at.outputs) {
        partial[place_of(output, kStreams)] = sums.products[row / 2][i / 2][row % 2 * 2 + i % 2];
      }
    }
  }
}

// A warp has kMmas * 16 tokens.
template <int kMmas>
__global__ void __launch_bounds__(kThreads, 2) hc_mix_many_kernel(const MixArguments at) {
  constexpr int kUnitChunks = kMmas * kTokens * kChunks, kSlots = kRing / kUnitChunks, kAhead = kSlots - 1;
  constexpr int kRows = kUnitChunks / 32;  // tokens of which a lane copies a chunk
  static_assert(kUnits % kSlots == 0, "a unit has one slot");
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint4* const ring = shared + warp * kRing;
  uint4* const fragments = shared + kWarps * kRing;
  uint4* const own = fragments + warp * kHalves * kParts * kTiles * 32 + lane;  // of the stream that this warp cuts
  const int first_split = blockIdx.x * at.splits;
  const int last_split = min(first_split + at.splits, at.width / kSplitColumns);
  const int first_column = first_split * kSplitColumns;

  // 1. the first split's part of fn
  const float* fn =
      at.fn + static_cast<int64_t>(lane / 4 * kStreams + warp) * at.width + first_column + lane % 4 * 2;
  {
    float values[kItems][kCount];
#pragma unroll
    for (int i = 0; i < kItems; ++i) load_item(at, fn, i, values[i]);
#pragma unroll
    for (int i = 0; i < kItems; ++i) store_item(i, values[i], own);
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  // 2. the first units of x
  const int64_t token = (static_cast<int64_t>(blockIdx.y) * kWarps + warp) * kMmas * kTokens + lane / 4;
  const int rows_left = static_cast<int>(min(at.tokens - token, static_cast<int64_t>(8 * kRows)));
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(at.x) + token * kStreams * at.stride + first_column +
                           lane % 4 * kCount;
  uint4* const target = ring + lane / 4 * kChunks + (lane % kChunks ^ lane / 8 % kChunks);
  const auto copy = [&](int unit) {  // from kUnits on those of the next split
    const int columns = unit / kUnits * kSplitColumns + unit % kHalves * kUnitColumns;
    const __nv_bfloat16* source = x + unit % kUnits / kHalves * at.stride + columns;
    uint4* const slot = target + unit % kSlots * kUnitChunks;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      ptx::cp_async_16(slot + row * 32, source, 8 * row < rows_left ? 16 : 0);
      source += 8 * kStreams * at.stride;
    }
  };
#pragma unroll 1
  for (int unit = 0; unit < kAhead; ++unit) {
    copy(unit);
    ptx::cp_async_commit();
  }
  __syncthreads();

  // 3. split by split. The loops are not unrolled: their body is what the instruction caches next to a scheduler hold.
  Sums<kMmas> group = {};
  int buffer = 0;
#pragma unroll 1
  for (int split = first_split; split < last_split; ++split, buffer ^= kFragments) {
    const bool more = split + 1 < last_split;
    fn += kSplitColumns;
    Sums<kMmas> sums = {};
#pragma unroll 1
    for (int unit = 0; unit < kUnits; ++unit) {
      ptx::cp_async_wait<kAhead - 1>();
      __syncwarp();  // all lanes' copies of this unit are here, and the slot of the last one is free
      if (unit + kAhead < kUnits || more) copy(unit + kAhead);
      ptx::cp_async_commit();
      const bool cuts = more && unit < kItems;
      float values[kCount];
      if (cuts) load_item(at, fn, unit, values);
      const uint4* const of_unit = fragments + buffer + unit * kParts * kTiles * 32 + lane;
      add(multiply<kMmas>(ring + unit % kSlots * kUnitChunks, of_unit), sums);
      if (cuts) store_item(unit, values, own + (buffer ^ kFragments));
    }
    x += kSplitColumns;
    add(sums, group);
    if (more) __syncthreads();
  }
  store_sums(at, token, group);
}

}  // namespace

cudaError_t launch_hc_mix_many(const MixArguments& arguments, cudaStream_t stream) {
  const bool small = arguments.tokens <= kSmallTokens;
  const int64_t tokens = kWarps * kTokens * (small ? 1 : 2);  // of a CTA
  const size_t bytes = (kWarps * kRing + kFragments * (arguments.splits > 1 ? 2 : 1)) * sizeof(uint4);
  const Launch at{dim3(arguments.chunks, ceil_div(arguments.tokens, tokens)), dim3(kThreads), stream, bytes};
  return launch_kernel(small ? hc_mix_many_kernel<1> : hc_mix_many_kernel<2>, at, arguments);
}

}  // namespace dsv4
