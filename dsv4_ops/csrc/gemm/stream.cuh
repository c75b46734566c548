// Products of up to 64 tokens: weights stream through shared memory into mma.sync.
//
// A CTA has 8 warps. A warp takes tiles of 16 (of more than 16 tokens: 32) rows of the weight and one of up to 8 ranges
// of k, and goes through it in pieces of 16 x 128 bytes, which it copies (cp.async) into a ring of its own, several
// pieces ahead and across the ends of its tiles. Nobody else waits for a piece, so the main loop has no barrier of the
// CTA, and the ring is filled before the kernel waits for its predecessors: weights are parameters.
//
//   up to 16 tokens   the CTA's warps hold all ranges of 16 * (8 / ranges) rows; the ranges' sums meet in shared memory
//   up to 64 tokens   the CTA's warps hold one range (grid.y) of 256 rows; sums of a range go to the workspace
//
// and in both the ranges are added as a tree (add_ranges): a row has the same bits with any number of tokens.
//
// x of the CTA's ranges lies in shared memory in the order that the weights' fragments want (weight_fragments.cuh);
// where it does not fit, it comes in windows of some pieces of every range.
//
// Shared memory: ring (8 warps x stages x (2 or 4 KiB and the pieces' FP4 scales)) | partial sums, two buffers | x |
// scales of x in fp32 [range][group of k][token]. Up to 16 tokens it is small enough for the next kernel of the stream
// to fill its own ring beside it.
//
// Floor: the weights, once, from memory. Of 64 tokens mma.sync of FP8 weights takes about as long as reading them.
#pragma once

#include <cuda_bf16.h>

#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/plan.h"

namespace dsv4 {

constexpr int kThreads = 32 * kWarps;
constexpr int kSumPitch = kTileRows + 4;  // fp32 numbers: a fragment's rows and tokens lie in different banks

// What a launch decides; the same for all CTAs.
struct Stream {
  Product product;
  int tokens;          // of this launch
  int64_t first_token;
  int ranges;          // of k
  int pieces;          // of a weight row
  int tiles;           // of a CTA's rows, in a group
  int tiles_of_cta;
  int window;          // pieces of a range whose x is in shared memory
  int x_pitch;         // bytes of a token in a window
  int x_groups;        // scale groups of x in a window
};

template <Format kFormat, int kTokenTiles>
class StreamingProduct {
  static constexpr FormatShape kShape = shape_of(kFormat);
  static constexpr bool kSplit = kTokenTiles > 2;  // one range a CTA
  static constexpr int kTiles = kSplit ? 2 : 1;    // of 16 rows, a warp
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStages = kSplit ? 3 : kShape.scale_bytes ? 4 : 5;
  static constexpr int kScaleBytes = kTileRows * kShape.scale_bytes;
  static constexpr int kStageBytes = kTiles * (kTileBytes + kScaleBytes);
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSumFloats = kSplit ? 0 : kWarps * kTokens * kSumPitch;  // of one of the two buffers

 public:
  static constexpr int kFixedBytes = kRingBytes + 2 * 4 * kSumFloats;
  static constexpr int kCtasOfAnSm = kSplit ? 1 : 2;

  // Bytes of shared memory behind the fixed ones, and the geometry of x that needs them.
  static int64_t plan_x(Stream& stream, int ranges_of_cta, int window) {
    stream.window = window;
    stream.x_pitch = window * kShape.x_piece_bytes + 16;  // rows of one chunk in different banks
    stream.x_groups = kFormat == Format::kFp8 || kFormat == Format::kMxfp4
                          ? window * kShape.piece_values / stream.product.x_group
                          : 0;
    return int64_t{ranges_of_cta} * (stream.tokens * stream.x_pitch + 4 * kTokens * stream.x_groups);
  }

  __device__ __forceinline__ StreamingProduct(const Stream& stream, uint8_t* shared) : s(stream), p(stream.product) {
    lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    ranges_here = kSplit ? 1 : s.ranges;
    subtiles = kWarps / ranges_here;
    range_here = warp / subtiles;
    subtile = warp % subtiles;
    range = kSplit ? blockIdx.y : range_here;
    begin = first_piece(range);
    end = first_piece(range + 1);
    tile_end = min(s.tiles, (static_cast<int>(blockIdx.x) + 1) * s.tiles_of_cta);
    next_tile = blockIdx.x * s.tiles_of_cta;
    next_piece = begin;
    ring = shared + warp * kStages * kStageBytes;
    sums = reinterpret_cast<float*>(shared + kRingBytes);
    x = shared + kFixedBytes;
    x_scales = reinterpret_cast<float*>(x + ranges_here * s.tokens * s.x_pitch);
  }

  // What does not depend on the kernels before: the first pieces of the weight and their scales.
  __device__ __forceinline__ void prefetch() {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) copy_next(stage);
    load_block_scales(blockIdx.x * s.tiles_of_cta, begin);
  }

  __device__ __forceinline__ void run() {
    const int longest = (s.pieces + s.ranges - 1) / s.ranges;
    const int windows = (longest + s.window - 1) / s.window;
    const int first_tile = blockIdx.x * s.tiles_of_cta;
    int stage = 0;
    for (int tile = first_tile; tile < tile_end; ++tile) {
      clear(total);
      for (int window = 0; window < windows; ++window) {
        if (windows > 1 || tile == first_tile) {
          if (windows > 1) __syncthreads();  // everyone is done with the window before
          stage_x(window * s.window);
          __syncthreads();
        }
        const int last = min(end, begin + (window + 1) * s.window);
        for (int piece = begin + window * s.window; piece < last; ++piece) {
          ptx::cp_async_wait<kStages - 1>();
          __syncwarp();
          multiply(ring + stage * kStageBytes, tile, piece, piece - begin - window * s.window);
          __syncwarp();
          copy_next(stage);
          stage = stage + 1 == kStages ? 0 : stage + 1;
        }
      }
      if (ranges_here > 1) {
        add_and_store(tile, (tile - first_tile) & 1);
      } else {
        store(tile);
      }
    }
    ptx::cp_async_wait<0>();
  }

 private:
  using Sums = float[kTiles][kTokenTiles][4];

  __device__ __forceinline__ int first_piece(int of) const {
    return static_cast<int>(static_cast<int64_t>(of) * s.pieces / s.ranges);
  }

  __device__ __forceinline__ int row_of(int tile) const {  // in the group; of the warp's first row
    return (tile * subtiles + subtile) * kTiles * kTileRows;
  }

  __device__ __forceinline__ static void clear(Sums& sums) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
  }

  // ---- Weights ----

  // Start to copy the warp's next piece, if there is one, into `stage`; one group of copies either way.
  __device__ __forceinline__ void copy_next(int stage) {
    if (next_tile < tile_end && begin < end) {
      constexpr int kBytes = kFormat == Format::kDense ? 2 : 1;
      const int row_bytes = static_cast<int>(packed(p.k) * kBytes) - next_piece * kTileRowBytes;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int row = row_of(next_tile) + m * kTileRows;
        const int rows = min(kTileRows, static_cast<int>(p.rows) - row);
        const int64_t first = blockIdx.z * p.rows + (rows > 0 ? row : 0);
        const uint8_t* const source =
            static_cast<const uint8_t*>(p.weight) + first * p.weight_stride * kBytes + next_piece * kTileRowBytes;
        uint8_t* const target = ring + stage * kStageBytes + m * kTileBytes;
        copy_tile(target, source, p.weight_stride * kBytes, rows, row_bytes, lane);
        if constexpr (kShape.scale_bytes > 0) copy_scales(stage, m, first, rows);
      }
      if (++next_piece == end) {
        next_piece = begin;
        ++next_tile;
      }
    }
    ptx::cp_async_commit();
  }

  // The FP4 scales of a piece, four bytes a copy.
  __device__ __forceinline__ void copy_scales(int stage, int m, int64_t first, int rows) {
    constexpr int kCopies = kShape.scale_bytes / 4;  // of a row
    constexpr int kGroup = kShape.piece_values / kShape.scale_bytes;
    const int row_bytes = static_cast<int>(p.k) / kGroup - next_piece * kShape.scale_bytes;
    const uint8_t* const source =
        static_cast<const uint8_t*>(p.weight_scale) + first * p.weight_scale_stride + next_piece * kShape.scale_bytes;
    uint8_t* const target = scales_of(stage) + m * kScaleBytes;
#pragma unroll
    for (int i = lane; i < kTileRows * kCopies; i += 32) {
      const int row = i / kCopies, byte = i % kCopies * 4;
      const bool there = row < rows && byte < row_bytes;
      ptx::cp_async_4(target + row * kShape.scale_bytes + byte,
                      there ? source + row * p.weight_scale_stride + byte : source, there ? 4 : 0);
    }
  }

  __device__ __forceinline__ uint8_t* scales_of(int stage) const {
    return ring + stage * kStageBytes + kTiles * kTileBytes;
  }

  // The scales of the FP8 blocks of `piece` for the lane's rows; they are loaded a piece ahead.
  __device__ __forceinline__ void load_block_scales(int tile, int piece) {
    if constexpr (kFormat == Format::kFp8) {
      if (piece == end) {
        piece = begin;
        ++tile;
      }
      if (tile >= tile_end || begin >= end) return;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = row_of(tile) + m * kTileRows + half * 8 + lane / 4;
          const int64_t at = (blockIdx.z * p.rows + min(row, p.rows - 1)) / 128 * p.weight_scale_stride + piece;
          block_scales[m][half] = p.fp32_weight_scale ? static_cast<const float*>(p.weight_scale)[at]
                                                      : decode_ue8m0(static_cast<const uint8_t*>(p.weight_scale)[at]);
        }
      }
    }
  }

  // ---- x ----

  // Elements of a row as they are stored.
  __device__ __forceinline__ static int64_t packed(int64_t k) {
    return kFormat == Format::kMxfp4 ? k / 2 : kFormat == Format::kNvfp4 ? k / 2 : k;
  }

  // x of pieces `offset` .. of every range of the CTA: codes (E4M3) or values (f16, bf16), and the scales of codes.
  __device__ __forceinline__ void stage_x(int offset) {
    constexpr int kUnitValues = kFormat == Format::kNvfp4 ? 32 : kFormat == Format::kDense ? 8 : 16;  // 16 bytes of x
    constexpr int kUnits = kShape.piece_values / kUnitValues;
    const int units = s.window * kUnits;
    for (int here = 0; here < ranges_here; ++here) {
      const int of = kSplit ? range : here;
      const int first = first_piece(of) + offset;
      const int valid = min(first_piece(of + 1) - first, s.window) * kUnits;
      for (int i = threadIdx.x; i < s.tokens * units; i += kThreads) {
        const int token = i / units, unit = i % units;
        const int64_t k = (static_cast<int64_t>(first) * kUnits + unit) * kUnitValues;
        const bool there = unit < valid && k < p.k;
        stage_unit(x + (here * s.tokens + token) * s.x_pitch, unit, x_row(token), k, there);
      }
      if constexpr (kFormat == Format::kFp8 || kFormat == Format::kMxfp4) {
        const int group0 = first * (kShape.piece_values / p.x_group), groups = static_cast<int>(p.k) / p.x_group;
        for (int i = threadIdx.x; i < s.x_groups * kTokens; i += kThreads) {
          const int token = i % kTokens, group = group0 + i / kTokens;
          const bool there = token < s.tokens && group < groups;
          const float scale = there ? decode_ue8m0(p.x_scale[x_row(token) * p.x_scale_stride + group]) : 0.0f;
          x_scales[here * s.x_groups * kTokens + i] = scale;
        }
      }
    }
  }

  __device__ __forceinline__ int64_t x_row(int token) const {
    return (s.first_token + token) * p.groups + blockIdx.z;
  }

  // 16 bytes of x, from value k on, to where the fragments want them in a token's row of shared memory.
  __device__ __forceinline__ void stage_unit(uint8_t* row, int unit, int64_t x_row, int64_t k, bool there) const {
    constexpr int kBytes = kFormat == Format::kDense ? 2 : 1;
    constexpr bool kPacked = kFormat == Format::kNvfp4;
    const uint8_t* const source =
        static_cast<const uint8_t*>(p.x) + (x_row * p.x_stride + (kPacked ? k / 2 : k)) * kBytes;
    const uint4 codes = there ? ptx::load_once(source) : uint4{};
    if constexpr (kFormat == Format::kMxfp4) {
      // 16 codes are half of the 32 of two chunks: two lanes' words in each.
      const uint2 one = fp4_order({codes.x, codes.y}), two = fp4_order({codes.z, codes.w});
      uint8_t* const target = row + unit / 2 * 32 + unit % 2 * 8;
      *reinterpret_cast<uint2*>(target) = {one.x, two.x};
      *reinterpret_cast<uint2*>(target + 16) = {one.y, two.y};
    } else if constexpr (kFormat == Format::kNvfp4) {
      const uint8_t* const scale = p.x_scale + x_row * p.x_scale_stride + k / 16;
      const __half2 low = nvfp4_factor(there ? scale[0] : 0), high = nvfp4_factor(there ? scale[1] : 0);
      uint32_t pairs[4][4];
      nvfp4_halves(pairs[0], codes.x, low);
      nvfp4_halves(pairs[1], codes.y, low);
      nvfp4_halves(pairs[2], codes.z, high);
      nvfp4_halves(pairs[3], codes.w, high);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint4*>(row + unit * 64 + i * 16) = {pairs[0][i], pairs[1][i], pairs[2][i], pairs[3][i]};
      }
    } else {
      *reinterpret_cast<uint4*>(row + unit * 16) = codes;
    }
  }

  // ---- Products ----

  // Chunks `chunk` and chunk + 1 (of the window's x) of all tokens: the words that stand against the weights' fragments.
  // Tokens that are not there repeat the last one; nobody stores their sums.
  __device__ __forceinline__ void load_x(uint32_t (&words)[kTokenTiles][2], int chunk) const {
    const uint8_t* const base = x + range_here * s.tokens * s.x_pitch;
    if constexpr (kTokenTiles == 1) {
      const int token = min(lane % 8, s.tokens - 1);
      ptx::ldmatrix_x2(words[0], base + token * s.x_pitch + (chunk + lane / 8 % 2) * 16);
    } else {
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += 2) {
        const int token = min(n * 8 + lane / 16 * 8 + lane % 8, s.tokens - 1);
        uint32_t four[4];
        ptx::ldmatrix_x4(four, base + token * s.x_pitch + (chunk + lane / 8 % 2) * 16);
        words[n][0] = four[0], words[n][1] = four[1], words[n + 1][0] = four[2], words[n + 1][1] = four[3];
      }
    }
  }

  // total += part * (weight scale * x scale) with the weight scales of the lane's rows and group `group` of x.
  __device__ __forceinline__ void promote(const Sums& part, const float (&weight_scales)[kTiles][2], int group) {
    const float* const scales = x_scales + (range_here * s.x_groups + group) * kTokens + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 of_x = *reinterpret_cast<const float2*>(scales + n * 8);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = __fmul_rn(weight_scales[m][i / 2], i % 2 ? of_x.y : of_x.x);
          total[m][n][i] = __fmaf_rn(part[m][n][i], scale, total[m][n][i]);
        }
      }
    }
  }

  // A piece of the warp's rows: `tile` and `piece` in the weight, `offset` in the window of x.
  __device__ __forceinline__ void multiply(const uint8_t* stage, int tile, int piece, int offset) {
    if constexpr (kFormat == Format::kFp8) {
      float scales[kTiles][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) scales[m][0] = block_scales[m][0], scales[m][1] = block_scales[m][1];
      load_block_scales(tile, piece + 1);
      if (p.x_group == 128) {
        multiply_fp8<4>(stage, scales, offset);
      } else if (p.x_group == 64) {
        multiply_fp8<2>(stage, scales, offset);
      } else {
        multiply_fp8<1>(stage, scales, offset);
      }
    } else if constexpr (kFormat == Format::kMxfp4) {
      multiply_mxfp4(stage, offset);
    } else if constexpr (kFormat == Format::kNvfp4) {
      multiply_nvfp4(stage, offset);
    } else {
      multiply_dense(stage, offset);
    }
  }

  // kSteps pairs of chunks are a scale group of x.
  template <int kSteps>
  __device__ __forceinline__ void multiply_fp8(const uint8_t* stage, const float (&scales)[kTiles][2], int offset) {
    constexpr int kGroups = kTileChunks / 2 / kSteps;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      Sums part;
      clear(part);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int chunk = 2 * (group * kSteps + step);
        uint32_t x_words[kTokenTiles][2], a[kTiles][2][4];
        load_x(x_words, offset * kTileChunks + chunk);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          uint32_t words[4];
          load_chunks(words, stage + m * kTileBytes, chunk, lane);
          e4m3_fragment(a[m][0], words[0], words[1]);
          e4m3_fragment(a[m][1], words[2], words[3]);
        }
        multiply_codes(part, a, x_words);
      }
      promote(part, scales, offset * kGroups + group);
    }
  }

  // Two fragments of the weight against two words of E4M3 codes of each token.
  __device__ __forceinline__ static void multiply_codes(Sums& part, const uint32_t (&a)[kTiles][2][4],
                                                        const uint32_t (&x_words)[kTokenTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b[2];
        e4m3_halves(b, x_words[n][half]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16_f16(part[m][n], a[m][half], b);
      }
    }
  }

  __device__ __forceinline__ void multiply_mxfp4(const uint8_t* stage, int offset) {
    constexpr int kGroup = 32;
    const uint8_t* const scales = stage + kTiles * kTileBytes + lane / 4 * kShape.scale_bytes;
    const int groups_of_scale = p.x_group / kGroup;  // 1, 2 or 4
#pragma unroll(kSplit ? 1 : 4)
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      uint32_t words[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_chunks(words[m], stage + m * kTileBytes, 2 * pair, lane);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = 2 * pair + j;  // of the weight: a group of 32 values, and two chunks of x
        uint32_t x_words[kTokenTiles][2], a[kTiles][2][4];
        load_x(x_words, 2 * (offset * kTileChunks + chunk));
        float weight_scales[kTiles][2];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          uint32_t up[4], low[4];
          e2m1_halves(up, words[m][2 * j]);
          e2m1_halves(low, words[m][2 * j + 1]);
          fp4_fragments(a[m], up, low);
          weight_scales[m][0] = decode_ue8m0(scales[m * kScaleBytes + chunk]);
          weight_scales[m][1] = decode_ue8m0(scales[m * kScaleBytes + 8 * kShape.scale_bytes + chunk]);
        }
        Sums part;
        clear(part);
        multiply_codes(part, a, x_words);
        promote(part, weight_scales, (offset * kTileChunks + chunk) / groups_of_scale);
      }
    }
  }

  __device__ __forceinline__ void multiply_nvfp4(const uint8_t* stage, int offset) {
    const uint8_t* const scales = stage + kTiles * kTileBytes + lane / 4 * kShape.scale_bytes + lane % 4 / 2;
#pragma unroll(kSplit ? 1 : 4)
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      uint32_t words[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_chunks(words[m], stage + m * kTileBytes, 2 * pair, lane);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = 2 * pair + j;  // 32 values: two groups of 16, of lanes 0, 1 and 2, 3 of a row
        uint32_t a[kTiles][2][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint8_t* const of_rows = scales + m * kScaleBytes + 2 * chunk;
          uint32_t up[4], low[4];
          nvfp4_halves(up, words[m][2 * j], nvfp4_factor(of_rows[0]));
          nvfp4_halves(low, words[m][2 * j + 1], nvfp4_factor(of_rows[8 * kShape.scale_bytes]));
          fp4_fragments(a[m], up, low);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t b[kTokenTiles][2];
          load_x(b, 4 * (offset * kTileChunks + chunk) + 2 * half);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16_f16(total[m][n], a[m][half], b[n]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_dense(const uint8_t* stage, int offset) {
#pragma unroll
    for (int chunk = 0; chunk < kTileChunks; chunk += 2) {
      uint32_t b[kTokenTiles][2], a[kTiles][4];
      load_x(b, offset * kTileChunks + chunk);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_chunks(a[m], stage + m * kTileBytes, chunk, lane);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16_bf16(total[m][n], a[m], b[n]);
      }
    }
  }

  // ---- Sums ----

  // Add the ranges of the CTA's rows and store them. `buffer` alternates: who writes to it has passed the barrier of the
  // tile between, behind which nobody reads it.
  __device__ __forceinline__ void add_and_store(int tile, int buffer) {
    float* const all = sums + buffer * kSumFloats;
    float* const mine = all + (range_here * subtiles + subtile) * kTokens * kSumPitch;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
        mine[token * kSumPitch + row] = total[0][n][i];
      }
    }
    __syncthreads();
    const int rows = subtiles * kTileRows;
    for (int i = threadIdx.x; i < rows * s.tokens; i += kThreads) {
      const int token = i / rows, row = i % rows;
      const int64_t row_of_group = static_cast<int64_t>(tile) * rows + row;
      if (row_of_group >= p.rows) continue;
      const float* const sum = all + (row / kTileRows * kTokens + token) * kSumPitch + row % kTileRows;
      const float value = add_ranges(s.ranges, sum, subtiles * kTokens * kSumPitch);
      store_product<kFormat>(p, s.first_token + token, blockIdx.z, row_of_group, value);
    }
  }

  // Store the warp's own sums: of all k, or of a range.
  __device__ __forceinline__ void store(int tile) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = n * 8 + lane % 4 * 2 + i % 2;
          const int64_t row = row_of(tile) + m * kTileRows + lane / 4 + i / 2 * 8;
          if (token >= s.tokens || row >= p.rows) continue;
          if (s.ranges > 1) {
            const int64_t at = (static_cast<int64_t>(range) * s.tokens + token) * p.groups + blockIdx.z;
            p.partials[at * p.rows + row] = total[m][n][i];
          } else {
            store_product<kFormat>(p, s.first_token + token, blockIdx.z, row, total[m][n][i]);
          }
        }
      }
    }
  }

  const Stream& s;
  const Product& p;
  int lane, subtile, subtiles, range, range_here, ranges_here;
  int begin, end;                        // pieces of the warp's range
  int tile_end, next_tile, next_piece;   // the next piece to copy
  uint8_t *ring, *x;
  float *sums, *x_scales;
  float block_scales[kTiles][2];
  Sums total;
};

// Launch `kernel` for up to 64 tokens.
template <Format kFormat, int kTokenTiles>
cudaError_t launch_stream(void (*kernel)(Stream), const Product& product, int64_t first_token, int tokens,
                          cudaStream_t stream) {
  using Kernel = StreamingProduct<kFormat, kTokenTiles>;
  constexpr int kMostShared = 227 * 1024;
  Stream plan{};
  plan.product = product;
  plan.tokens = tokens;
  plan.first_token = first_token;
  plan.ranges = ranges_of(kFormat, product);
  plan.pieces = pieces_of(kFormat, product);
  const bool split = kTokenTiles > 2;
  const int ranges_here = split ? 1 : plan.ranges;
  const int64_t rows = split ? 2 * kTileRows * kWarps : kTileRows * (kWarps / ranges_here);
  plan.tiles = static_cast<int>(ceil_divide(product.rows, rows));
  const int64_t columns = split ? plan.ranges : 1;
  plan.tiles_of_cta = static_cast<int>(ceil_divide(plan.tiles * columns * product.groups, kSms));
  int window = static_cast<int>(ceil_divide(plan.pieces, plan.ranges));
  while (window > 1 && Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window) > kMostShared) {
    window = (window + 1) / 2;
  }
  const int64_t shared = Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window);
  const dim3 grid(static_cast<unsigned>(ceil_divide(plan.tiles, plan.tiles_of_cta)), static_cast<unsigned>(columns),
                  static_cast<unsigned>(product.groups));
  return launch_kernel(kernel, {grid, dim3(kThreads), stream, static_cast<size_t>(shared)}, plan);
}

}  // namespace dsv4
