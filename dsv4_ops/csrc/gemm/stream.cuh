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
#include "gemm/epilogue.cuh"
#include "gemm/staged_x.cuh"

namespace dsv4 {

constexpr int kSumPitch = kTileRows + 4;  // fp32 numbers: a fragment's rows and tokens lie in different banks

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
    stream.units = Divisor(window * StagedX<kFormat, kTokens>::kUnits);
    stream.tokens_divisor = Divisor(stream.tokens);
    stream.x_pitch = window * kShape.x_piece_bytes + 16;  // rows of one chunk in different banks
    stream.x_groups = kFormat == Format::kFp8 || kFormat == Format::kMxfp4
                          ? window * kShape.piece_values / stream.product.x_group
                          : 0;
    return int64_t{ranges_of_cta} * (stream.tokens * stream.x_pitch + 4 * kTokens * stream.x_groups);
  }

  __device__ __forceinline__ StreamingProduct(const Stream& stream, uint8_t* shared_memory)
      : s(stream), p(stream.product), shared(shared_memory) {
    lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    ranges_here = kSplit ? 1 : 1 << s.range_shift;
    subtiles = kSplit ? kWarps : kWarps >> s.range_shift;
    range_here = kSplit ? 0 : warp << s.range_shift >> 3;
    subtile = warp - range_here * subtiles;
    range = kSplit ? blockIdx.y : range_here;
    begin = s.first_piece(range);
    end = s.first_piece(range + 1);
    tile_end = min(s.tiles, (static_cast<int>(blockIdx.x) + 1) * s.tiles_of_cta);
    ring = warp * kStages * kStageBytes;
    x_scales = kFixedBytes + ranges_here * s.tokens * s.x_pitch;
    load_lane = tile_offset(lane % kTileRows, lane / kTileRows);
    x_lane = kFixedBytes + range_here * s.tokens * s.x_pitch + lane / 8 % 2 * 16;
    start_tile(blockIdx.x * s.tiles_of_cta);
    start_scales(blockIdx.x * s.tiles_of_cta);
  }

  // What does not depend on the kernels before: the first pieces of the weight and their scales.
  __device__ __forceinline__ void prefetch() {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) copy_next(ring + stage * kStageBytes);
    load_block_scale();
  }

  __device__ __forceinline__ void run() {
    const int longest = (s.pieces + (1 << s.range_shift) - 1) >> s.range_shift;
    const int windows = (longest + s.window - 1) / s.window;
    const int first_tile = blockIdx.x * s.tiles_of_cta;
    int stage = ring;
    for (int tile = first_tile; tile < tile_end; ++tile) {
      clear(total);
      for (int window = 0; window < windows; ++window) {
        if (windows > 1 || tile == first_tile) {
          if (windows > 1) __syncthreads();  // everyone is done with the window before
          StagedX<kFormat, kTokens>(s, shared + kFixedBytes, reinterpret_cast<float*>(shared + x_scales),
                                    kSplit ? range : 0, ranges_here)
              .load(window * s.window);
          __syncthreads();
        }
        const int last = min(end, begin + (window + 1) * s.window);
        for (int piece = begin + window * s.window; piece < last; ++piece) {
          ptx::cp_async_wait<kStages - 1>();
          __syncwarp();
          multiply(stage, piece - begin - window * s.window);
          __syncwarp();
          copy_next(stage);
          stage += kStageBytes;
          if (stage == ring + kStages * kStageBytes) stage = ring;
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

  // The first piece of a tile is the next to copy.
  __device__ __forceinline__ void start_tile(int tile) {
    next_tile = tile;
    next_piece = begin;
    const int row = row_of(tile);
    next_rows = min(kTiles * kTileRows, static_cast<int>(p.rows) - row);
    const int64_t first = blockIdx.z * p.rows + (next_rows > 0 ? row : 0);
    next_source = static_cast<const uint8_t*>(p.weight) + (first + lane / kTileChunks) * s.row_pitch +
                  begin * kTileRowBytes + lane % kTileChunks * 16;
    if constexpr (kShape.scale_bytes > 0) {
      next_scales = static_cast<const uint8_t*>(p.weight_scale) + first * p.weight_scale_stride +
                    begin * kShape.scale_bytes;
    }
  }

  // Start to copy the warp's next piece, if there is one, to `stage`; one group of copies either way.
  __device__ __forceinline__ void copy_next(int stage) {
    if (next_tile < tile_end) {
      const bool whole = next_piece < s.whole_pieces && next_rows == kTiles * kTileRows;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint8_t* const source = next_source + m * kTileRows * s.row_pitch;
        if (whole) {
          copy_whole_tile(shared, stage + m * kTileBytes, source, 4 * s.row_pitch, lane);
        } else {
          copy_tile(shared + stage + m * kTileBytes, source, s.row_pitch, next_rows - m * kTileRows,
                    s.row_bytes - next_piece * kTileRowBytes, lane);
        }
      }
      if constexpr (kShape.scale_bytes > 0) {
        copy_scales(shared + stage + kTiles * kTileBytes);
        next_scales += kShape.scale_bytes;
      }
      next_source += kTileRowBytes;
      if (++next_piece == end) start_tile(next_tile + 1);
    }
    ptx::cp_async_commit();
  }

  // The FP4 scales of a piece, four bytes a copy.
  __device__ __forceinline__ void copy_scales(uint8_t* target) {
    constexpr int kCopies = kShape.scale_bytes / 4, kRows = 32 / kCopies;  // copies of a row, rows at a time
    constexpr int kGroup = kShape.piece_values / kShape.scale_bytes;
    const int byte = lane % kCopies * 4;
    const bool inside = next_piece * kShape.scale_bytes + byte < static_cast<int>(p.k) / kGroup;
    const uint8_t* source = next_scales + lane / kCopies * p.weight_scale_stride + byte;
#pragma unroll
    for (int row = lane / kCopies, i = 0; i < kTiles * kTileRows; i += kRows) {
      ptx::cp_async_4(target + (row + i) * kShape.scale_bytes + byte, source, inside && row + i < next_rows ? 4 : 0);
      source += kRows * p.weight_scale_stride;
    }
  }

  // ---- The scale of an FP8 block: its bits are loaded a piece ahead ----

  __device__ __forceinline__ void start_scales(int tile) {
    if constexpr (kFormat == Format::kFp8) {
      scale_tile = tile;
      scale_piece = begin;
      const int64_t row = blockIdx.z * p.rows + min(static_cast<int64_t>(row_of(tile)), p.rows - 1);
      next_scales = static_cast<const uint8_t*>(p.weight_scale) +
                    (row / 128 * p.weight_scale_stride + begin) * (p.fp32_weight_scale ? 4 : 1);
    }
  }

  // The bits for the next piece.
  __device__ __forceinline__ void load_block_scale() {
    if constexpr (kFormat == Format::kFp8) {
      if (scale_tile >= tile_end) return;
      if (p.fp32_weight_scale) {
        block_scale = *reinterpret_cast<const uint32_t*>(next_scales);
        next_scales += 4;
      } else {
        block_scale = *next_scales;
        next_scales += 1;
      }
      if (++scale_piece == end) start_scales(scale_tile + 1);
    }
  }

  // ---- Products ----

  // Chunks `chunk` (even) and chunk + 1 of tile m of the stage.
  __device__ __forceinline__ void load_weights(uint32_t (&words)[4], int stage, int m, int chunk) const {
    ptx::ldmatrix_x4(words, shared + ((stage + m * kTileBytes + load_lane) ^ chunk * 16));
  }

  // Chunks `chunk` and chunk + 1 (of the window's x) of all tokens: the words that stand against the weights' fragments.
  // Tokens that are not there repeat the last one; nobody stores their sums.
  __device__ __forceinline__ void load_x(uint32_t (&words)[kTokenTiles][2], int chunk) const {
    const uint8_t* const base = shared + x_lane + chunk * 16;
    if constexpr (kTokenTiles == 1) {
      ptx::ldmatrix_x2(words[0], base + min(lane % 8, s.tokens - 1) * s.x_pitch);
    } else {
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += 2) {
        const int token = min(n * 8 + lane / 16 * 8 + lane % 8, s.tokens - 1);
        uint32_t four[4];
        ptx::ldmatrix_x4(four, base + token * s.x_pitch);
        words[n][0] = four[0], words[n][1] = four[1], words[n + 1][0] = four[2], words[n + 1][1] = four[3];
      }
    }
  }

  // total += part * (weight scale * x scale) with the weight scales of the lane's rows and group `group` of x.
  __device__ __forceinline__ void promote(const Sums& part, const float (&weight_scales)[kTiles][2], int group) {
    const int first = (range_here * s.x_groups + group) * kTokens + lane % 4 * 2;
    const float* const scales = reinterpret_cast<const float*>(shared + x_scales) + first;
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

  // A piece of the warp's rows, the `offset`th in the window of x.
  __device__ __forceinline__ void multiply(int stage, int offset) {
    if constexpr (kFormat == Format::kFp8) {
      const float scale = p.fp32_weight_scale ? __uint_as_float(block_scale) : decode_ue8m0(block_scale);
      load_block_scale();
      if (p.x_group == 128) {
        multiply_fp8<4>(stage, scale, offset);
      } else if (p.x_group == 64) {
        multiply_fp8<2>(stage, scale, offset);
      } else {
        multiply_fp8<1>(stage, scale, offset);
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
  __device__ __forceinline__ void multiply_fp8(int stage, float scale, int offset) {
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
          load_weights(words, stage, m, chunk);
          e4m3_fragment(a[m][0], words[0], words[1]);
          e4m3_fragment(a[m][1], words[2], words[3]);
        }
        multiply_codes(part, a, x_words);
      }
      float scales[kTiles][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) scales[m][0] = scales[m][1] = scale;
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

  __device__ __forceinline__ void multiply_mxfp4(int stage, int offset) {
    constexpr int kGroup = 32;
    const uint8_t* const scales = shared + stage + kTiles * kTileBytes + lane / 4 * kShape.scale_bytes;
    const int groups_of_scale = p.x_group / kGroup;  // 1, 2 or 4
#pragma unroll(kSplit ? 1 : 2)
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      uint32_t words[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_weights(words[m], stage, m, 2 * pair);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = 2 * pair + j;  // of the weight: a group of 32 values, and two chunks of x
        uint32_t a[kTiles][2][4];
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
        uint32_t x_words[kTokenTiles][2];
        load_x(x_words, 2 * (offset * kTileChunks + chunk));
        Sums part;
        clear(part);
        multiply_codes(part, a, x_words);
        promote(part, weight_scales, (offset * kTileChunks + chunk) / groups_of_scale);
      }
    }
  }

  __device__ __forceinline__ void multiply_nvfp4(int stage, int offset) {
    const uint8_t* const scales = shared + stage + kTiles * kTileBytes + lane / 4 * kShape.scale_bytes + lane % 4 / 2;
#pragma unroll(kSplit ? 1 : 4)
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      uint32_t words[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_weights(words[m], stage, m, 2 * pair);
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

  __device__ __forceinline__ void multiply_dense(int stage, int offset) {
#pragma unroll
    for (int chunk = 0; chunk < kTileChunks; chunk += 2) {
      uint32_t b[kTokenTiles][2], a[kTiles][4];
      load_x(b, offset * kTileChunks + chunk);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_weights(a[m], stage, m, chunk);
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
    float* const all = reinterpret_cast<float*>(shared + kRingBytes) + buffer * kSumFloats;
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
    const int row_shift = 7 - s.range_shift;  // 16 * 8 / ranges rows
    for (int i = threadIdx.x; i < s.tokens << row_shift; i += kThreads) {
      const int token = i >> row_shift, row = i & ((1 << row_shift) - 1);
      const int64_t row_of_group = (static_cast<int64_t>(tile) << row_shift) + row;
      if (row_of_group >= p.rows) continue;
      const float* const sum = all + (row / kTileRows * kTokens + token) * kSumPitch + row % kTileRows;
      const float value = add_ranges(ranges_here, sum, subtiles * kTokens * kSumPitch);
      store_product<kFormat>(p, (s.first_token + token) * p.groups + blockIdx.z, row_of_group, value);
    }
  }

  // Store the warp's own sums: of all k, or of a range.
  __device__ __forceinline__ void store(int tile) const {
    const int64_t first_row = row_of(tile) + lane / 4;
    const auto for_all = [&](auto store_sum) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int token = n * 8 + lane % 4 * 2 + odd;
          if (token >= s.tokens) continue;
#pragma unroll
          for (int i = 0; i < 2 * kTiles; ++i) {
            const int64_t row = first_row + i * 8;
            if (row < p.rows) store_sum(token, row, total[i / 2][n][i % 2 * 2 + odd]);
          }
        }
      }
    };
    if (kSplit && s.range_shift > 0) {
      float* const sums = p.partials + (static_cast<int64_t>(range) * s.tokens * p.groups + blockIdx.z) * p.rows;
      for_all([&](int token, int64_t row, float sum) { sums[token * p.groups * p.rows + row] = sum; });
    } else {
      for_all([&](int token, int64_t row, float sum) {
        store_product<kFormat>(p, (s.first_token + token) * p.groups + blockIdx.z, row, sum);
      });
    }
  }

  const Stream& s;
  const Product& p;
  uint8_t* shared;
  int lane, subtile, subtiles, range, range_here, ranges_here;
  int begin, end;                        // pieces of the warp's range
  int tile_end;
  int next_tile, next_piece, next_rows;  // the next piece to copy, and how many rows of the tile there are
  const uint8_t *next_source, *next_scales;  // the lane's first 16 bytes of it, and the scales
  int scale_tile, scale_piece;  // the piece whose FP8 scale is loaded next
  uint32_t block_scale;
  int ring, load_lane, x_lane, x_scales;  // offsets in shared memory: the warp's, the lane's in a stage and in x; of all
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
  const int ranges = ranges_of(kFormat, product);
  while (1 << plan.range_shift < ranges) ++plan.range_shift;
  plan.pieces = pieces_of(kFormat, product);
  const bool split = kTokenTiles > 2;
  const int ranges_here = split ? 1 : ranges;
  const int64_t rows = split ? 2 * kTileRows * kWarps : kTileRows * (kWarps / ranges_here);
  plan.tiles = static_cast<int>(ceil_divide(product.rows, rows));
  const int64_t columns = split ? ranges : 1;
  plan.tiles_of_cta = static_cast<int>(ceil_divide(plan.tiles * columns * product.groups, kSms));
  const int64_t bytes = kFormat == Format::kDense ? 2 : 1;
  plan.row_bytes = static_cast<int>(kFormat == Format::kMxfp4 || kFormat == Format::kNvfp4 ? product.k / 2
                                                                                         : product.k * bytes);
  plan.row_pitch = product.weight_stride * bytes;
  plan.whole_pieces = plan.row_bytes / kTileRowBytes;
  int window = static_cast<int>(ceil_divide(plan.pieces, ranges));
  while (window > 1 && Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window) > kMostShared) {
    window = (window + 1) / 2;
  }
  const int64_t shared = Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window);
  const dim3 grid(static_cast<unsigned>(ceil_divide(plan.tiles, plan.tiles_of_cta)), static_cast<unsigned>(columns),
                  static_cast<unsigned>(product.groups));
  return launch_kernel(kernel, {grid, dim3(kThreads), stream, static_cast<size_t>(shared)}, plan);
}

}  // namespace dsv4
