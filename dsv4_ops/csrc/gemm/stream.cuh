// Products of up to 64 tokens: weights stream through shared memory into the tensor cores: mma.sync, and wgmma for E4M3
// weights and more than 16 tokens, which gives the same bits (ptx_sm90_gemm.cuh).
//
// A CTA has 8 warps. A warp takes tiles of 16 (of more than 8 tokens: 32) rows of the weight and one of up to 8 ranges
// of k, and goes through it in pieces of 16 x 128 bytes, which it copies (cp.async) into a ring of its own, several
// pieces ahead and across the ends of its tiles. Nobody else waits for a piece, so the main loop has no barrier of the
// CTA, and the ring is filled before the kernel waits for its predecessors: weights are parameters.
//
//   up to 8 tokens    the CTA's warps hold all ranges of 16 * (8 / ranges) rows; the ranges' sums meet in shared memory
//   up to 64 tokens   the CTA's warps hold one range (grid.y) of 256 rows; sums of a range go to the workspace
//
// and in both the ranges are added as a tree (add_ranges): a row has the same bits with any number of tokens.
//
// x of the CTA's ranges lies in shared memory in the order that the weights' fragments want (weight_fragments.cuh);
// where it does not fit, it comes in windows of some pieces of every range.
//
// Shared memory: ring (8 warps x stages x (2 or 4 KiB and the pieces' FP4 scales)) | partial sums, two buffers | x |
// scales of x in fp32 [range][group of k][token]. Few tokens leave room for two CTAs an SM: of this kernel, or of this
// one and the next of the stream, which fills its ring as soon as a CTA of this one has ended.
//
// Floor: the weights, once, from memory. Of 64 tokens mma.sync of FP8 weights would take about as long as reading them,
// and its warps would convert x to f16 sixteen times for each eight times that they convert weights; wgmma takes half
// of that time and reads x, converted once a CTA, from shared memory.
//
// H200, 2026-11-25, us of FP8 weights cold (floor): one token 1536 x 4096 7.3 (1.3), 32768 x 1024 15.1 (7.2), 4096 x
// 8192 15.5 (7.1), 7168 x 16384 41.6 (25.0); 64 tokens of the second and third 25.8 (8.2) and 27.9 (7.4). One behind
// the other, so that the next one's ring fills meanwhile, the first three take 4.5, 7.7 and 7.9 warm.
#pragma once

#include <cuda_bf16.h>

#include "common/launch.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/half_products.cuh"
#include "gemm/staged_x.cuh"
#include "gemm/weight_ring.cuh"

namespace dsv4 {

constexpr int kSumPitch = kTileRows + 4;  // fp32 numbers: a fragment's rows and tokens lie in different banks

template <Format kFormat, int kTokenTiles>
class StreamingProduct {
 public:
  static constexpr bool kSplit = kTokenTiles > 1;  // one range a CTA

 private:
  static constexpr FormatShape kShape = shape_of(kFormat);
  static constexpr int kTiles = kSplit ? 2 : 1;    // of 16 rows, a warp
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kLoads = (kTokenTiles + 1) / 2;  // of a chunk pair of x
  // Many tokens of E4M3: x lies in shared memory as f16, so that it is converted once a CTA and not once a warp, and
  // four warps multiply 64 rows by wgmma, where there is that.
  static constexpr bool kHalves = kFormat == Format::kFp8 && kTokenTiles >= 4;
  using Staged = StagedX<kFormat, kHalves ? kTokens : 0>;
  using Products = HalfProducts<kHalves ? kTokenTiles : 4>;
  static constexpr int kStages = kSplit ? 3 : kShape.scale_bytes ? 4 : 5;
  using Ring = WeightRing<kFormat, kTiles, kStages>;
  static constexpr int kRingBytes = kWarps * Ring::kBytes;
  static constexpr int kSumFloats = kSplit ? 0 : kWarps * kTokens * kSumPitch;  // of one of the two buffers

 public:
  static constexpr int kFixedBytes = kRingBytes + 2 * 4 * kSumFloats;
  static constexpr int kCtasOfAnSm = kTokenTiles > 2 ? 1 : 2;

  // Bytes of shared memory behind the fixed ones, and the geometry of x that needs them.
  static int64_t plan_x(Stream& stream, int ranges_of_cta, int window) {
    stream.window = window;
    stream.units = Divisor(window * Staged::kUnits);
    stream.x_pitch = window * kShape.x_piece_bytes + 16;  // rows of one chunk in different banks
    stream.x_groups = stream.x_group_shift > 0 ? window * kShape.piece_values >> stream.x_group_shift : 0;
    return int64_t{ranges_of_cta} * (values_bytes(stream) + 4 * stream.scale_tokens * stream.x_groups);
  }

  __device__ __forceinline__ StreamingProduct(const Stream& stream, uint8_t* shared_memory)
      : s(stream),
        p(stream.product),
        shared(shared_memory),
        lane(threadIdx.x % 32),
        ranges_here(kSplit ? 1 : 1 << s.range_shift),
        subtiles(kSplit ? kWarps : kWarps >> s.range_shift),
        range_here(kSplit ? 0 : threadIdx.x / 32 << s.range_shift >> 3),
        subtile(threadIdx.x / 32 - range_here * subtiles),
        range(kSplit ? blockIdx.y : range_here),
        begin(s.first_piece(range)),
        end(s.first_piece(range + 1)),
        first_tile(blockIdx.x * s.tiles_of_cta),
        tile_end(min(s.tiles, first_tile + s.tiles_of_cta)),
        x_values(kFixedBytes + range_here * s.tokens * s.x_pitch),
        x_scales(kFixedBytes + ranges_here * values_bytes(s) + range_here * s.x_groups * s.scale_tokens * 4),
        load_lane(tile_offset(lane % kTileRows, lane / kTileRows)),
        ring(s, shared, threadIdx.x / 32 * Ring::kBytes, lane, first_tile, tile_end, subtiles * Ring::kRows,
             subtile * Ring::kRows, begin, end) {}

  // What does not depend on the kernels before: the first pieces of the weight and their scales.
  __device__ __forceinline__ void prefetch() { ring.fill(); }

  __device__ __forceinline__ void run() {
    find_tokens();
    const int longest = (s.pieces + (1 << s.range_shift) - 1) >> s.range_shift;
    const int windows = (longest + s.window - 1) / s.window;
    for (int tile = first_tile; tile < tile_end; ++tile) {
      clear(total);
      for (int window = 0; window < windows; ++window) {
        if (windows > 1 || tile == first_tile) {
          if (windows > 1) __syncthreads();  // everyone is done with the window before
          Staged(s, shared + x_values, reinterpret_cast<float*>(shared + x_scales), subtile * 32 + lane, subtiles * 32)
              .load(begin + window * s.window, end);
          if constexpr (kHalves) ptx::fence_async_proxy();
          __syncthreads();
        }
        const int last = min(end, begin + (window + 1) * s.window);
        multiply_window(last - begin - window * s.window);
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

  // Of a window of x of one range, in shared memory.
  __host__ __device__ __forceinline__ static int values_bytes(const Stream& stream) {
    if constexpr (kHalves) return stream.window * (kShape.piece_values / Staged::kHalfSlab) * Staged::kHalfSlabBytes;
    return stream.tokens * stream.x_pitch;
  }

  __device__ __forceinline__ int row_of(int tile) const {  // in the group; of the warp's first row
    return (tile * subtiles + subtile) * Ring::kRows;
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

  // ---- Products ----

  // Chunks `chunk` (even) and chunk + 1 of tile m of the stage.
  __device__ __forceinline__ void load_weights(uint32_t (&words)[4], int stage, int m, int chunk) const {
    ptx::ldmatrix_x4(words, shared + ((stage + m * kTileBytes + load_lane) ^ chunk * 16));
  }

  // Where the lane's rows of x begin, of one or two tiles of tokens at a time. Tokens that are not there repeat the
  // last one; nobody stores their sums.
  __device__ __forceinline__ void find_tokens() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = kTokenTiles == 1 ? lane % 8 : 16 * i + lane / 16 * 8 + lane % 8;
      const int chunk = kTokenTiles == 1 ? lane / 8 : lane / 8 % 2;
      x_lanes[i] = x_values + min(token, s.tokens - 1) * s.x_pitch + chunk * 16;
    }
  }

  // Chunks `chunk` and chunk + 1 (of the window's x) of all tokens: the words that stand against the weights'
  // fragments.
  __device__ __forceinline__ void load_x(uint32_t (&words)[kTokenTiles][2], int chunk) const {
    if constexpr (kTokenTiles == 1) {
      ptx::ldmatrix_x2(words[0], shared + x_lanes[0] + chunk * 16);
    } else {
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += 2) {
        uint32_t four[4];
        ptx::ldmatrix_x4(four, shared + x_lanes[n / 2] + chunk * 16);
        words[n][0] = four[0], words[n][1] = four[1], words[n + 1][0] = four[2], words[n + 1][1] = four[3];
      }
    }
  }

  // The same of one tile of tokens and chunks `chunk` .. chunk + 3.
  __device__ __forceinline__ void load_x_twice(uint32_t (&words)[2][1][2], int chunk) const {
    uint32_t four[4];
    ptx::ldmatrix_x4(four, shared + x_lanes[0] + chunk * 16);
    words[0][0][0] = four[0], words[0][0][1] = four[1], words[1][0][0] = four[2], words[1][0][1] = four[3];
  }

  // The scales of the lane's two tokens of tile n, in group `group` of x.
  __device__ __forceinline__ float2 scales_of_x(int n, int group) const {
    const float* const scales = reinterpret_cast<const float*>(shared + x_scales) + group * s.scale_tokens;
    return *reinterpret_cast<const float2*>(scales + min(n * 8 + lane % 4 * 2, s.scale_tokens - 2));
  }

  // total += part * (weight scale * x scale) of one tile, with the weight scales of the lane's rows.
  __device__ __forceinline__ static void promote_tile(float (&total)[4], const float (&part)[4],
                                                      const float (&weight_scales)[2], float2 of_x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = __fmul_rn(weight_scales[i / 2], i % 2 ? of_x.y : of_x.x);
      total[i] = __fmaf_rn(part[i], scale, total[i]);
    }
  }

  __device__ __forceinline__ void promote(const Sums& part, const float (&weight_scales)[kTiles][2], int group) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 of_x = scales_of_x(n, group);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) promote_tile(total[m][n], part[m][n], weight_scales[m], of_x);
    }
  }

  // The next `pieces` pieces of the warp's rows with the window of x.
  __device__ __forceinline__ void multiply_window(int pieces) {
    if constexpr (kHalves) {
      if (p.x_group == 128) {
        multiply_halves<8>(pieces);
      } else if (p.x_group == 64) {
        multiply_halves<4>(pieces);
      } else {
        multiply_halves<2>(pieces);
      }
    } else {
      for (int offset = 0; offset < pieces; ++offset) multiply(ring.wait(), offset);
    }
  }

  // A piece, the `offset`th in the window of x.
  __device__ __forceinline__ void multiply(int stage, int offset) {
    if constexpr (kFormat == Format::kFp8) {
      const float scale = ring.take_block_scale();
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

  // What a warp reads of a stage at once: up to 8 tokens all of it, so that the stage can be copied to while the warp
  // multiplies; beyond there are too few registers.
  using Words = uint32_t[kSplit ? 1 : kTileChunks / 2][kTiles][4];

  __device__ __forceinline__ void load_all(Words& all, int stage) {
    if constexpr (!kSplit) {
#pragma unroll
      for (int pair = 0; pair < kTileChunks / 2; ++pair) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) load_weights(all[pair][m], stage, m, 2 * pair);
      }
      ring.advance();
    }
  }

  // The words of pair `pair` of chunks.
  __device__ __forceinline__ const uint32_t (&words_of(Words& all, int stage, int pair) const)[kTiles][4] {
    if constexpr (kSplit) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_weights(all[0][m], stage, m, 2 * pair);
      return all[0];
    } else {
      return all[pair];
    }
  }

  // A window of E4M3 weights with x in f16: kSteps steps of 16 values are a scale group. While the products of one tile
  // are under way, the sums of the other one are scaled and the next fragments converted.
  template <int kSteps>
  __device__ __forceinline__ void multiply_halves(int pieces) {
    constexpr int kGroups = kTileChunks / kSteps;  // of a piece
    const Products products{shared + x_values, lane};
    const auto convert = [&](uint32_t(&a)[kSteps][4], int stage, int m, int first_chunk) {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t words[4];
        load_weights(words, stage, m, first_chunk + step);
        e4m3_fragment(a[step], words[0], words[1]);
        e4m3_fragment(a[step + 1], words[2], words[3]);
      }
    };
    const auto add = [&](Sums& sums, int m, const float(&part)[4 * kTokenTiles], float scale, int group) {
      const float scales[2] = {scale, scale};
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const float tile[4] = {part[4 * n], part[4 * n + 1], part[4 * n + 2], part[4 * n + 3]};
        promote_tile(sums[m][n], tile, scales, scales_of_x(n, group));
      }
    };
    const int groups = pieces * kGroups;
    uint32_t a[kTiles][kSteps][4];
    int stage = ring.wait();
    float scale = ring.take_block_scale();
    convert(a[0], stage, 0, 0);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      float part[kTiles][4 * kTokenTiles];
      const bool ends_piece = group % kGroups == kGroups - 1, more = group + 1 < groups;
      products.start(part[0], a[0], group * kSteps);
      convert(a[1], stage, 1, group % kGroups * kSteps);
      if (ends_piece) ring.advance();
      products.start(part[1], a[1], group * kSteps);
      Products::template wait<1>(part[0]);
      add(total, 0, part[0], scale, group);
      if (more) {
        if (ends_piece) stage = ring.wait();
        convert(a[0], stage, 0, (group + 1) % kGroups * kSteps);
      }
      Products::template wait<0>(part[1]);
      add(total, 1, part[1], scale, group);
      if (ends_piece && more) scale = ring.take_block_scale();
    }
  }

  // kSteps pairs of chunks are a scale group of x.
  template <int kSteps>
  __device__ __forceinline__ void multiply_fp8(int stage, float scale, int offset) {
    constexpr int kGroups = kTileChunks / 2 / kSteps;
    Words all;
    load_all(all, stage);
#pragma unroll(kSplit ? 1 : kGroups)
    for (int group = 0; group < kGroups; ++group) {
      Sums part;
      clear(part);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int pair = group * kSteps + step;
        uint32_t x_words[kTokenTiles][2], a[kTiles][2][4];
        load_x(x_words, offset * kTileChunks + 2 * pair);
        const auto& words = words_of(all, stage, pair);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          e4m3_fragment(a[m][0], words[m][0], words[m][1]);
          e4m3_fragment(a[m][1], words[m][2], words[m][3]);
        }
        multiply_codes(part, a, x_words);
      }
      float scales[kTiles][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) scales[m][0] = scales[m][1] = scale;
      promote(part, scales, offset * kGroups + group);
    }
    if constexpr (kSplit) ring.advance();
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
    const uint8_t* const scales = shared + stage + kTiles * kTileBytes + lane / 4 * kShape.scale_bytes;
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
          weight_scales[m][0] = decode_ue8m0(scales[m * Ring::kScaleBytes + chunk]);
          weight_scales[m][1] = decode_ue8m0(scales[m * Ring::kScaleBytes + 8 * kShape.scale_bytes + chunk]);
        }
        uint32_t x_words[kTokenTiles][2];
        load_x(x_words, 2 * (offset * kTileChunks + chunk));
        Sums part;
        clear(part);
        multiply_codes(part, a, x_words);
        promote(part, weight_scales, (offset * kTileChunks + chunk) >> (s.x_group_shift - 5));
      }
    }
    ring.advance();
  }

  __device__ __forceinline__ void multiply_nvfp4(int stage, int offset) {
    uint32_t scales[kTiles][2][2];  // codes, of the lane's two rows of a tile, of chunks 0 .. 3 and 4 .. 7
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = stage + kTiles * kTileBytes + m * Ring::kScaleBytes + (half * 8 + lane / 4) * kShape.scale_bytes;
        const uint4 all = *reinterpret_cast<const uint4*>(shared + at);
        const uint32_t mine = lane % 4 < 2 ? 0x6420 : 0x7531;  // a chunk is two groups: of lanes 0, 1 and 2, 3 of a row
        scales[m][half][0] = __byte_perm(all.x, all.y, mine);
        scales[m][half][1] = __byte_perm(all.z, all.w, mine);
      }
    }
    Words all;
    load_all(all, stage);
#pragma unroll
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      const auto& words = words_of(all, stage, pair);
      __half2 factors[kTiles][2];  // of the pair's chunks in the halves
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t codes = scales[m][half][pair / 2] >> pair % 2 * 16;
          factors[m][half] = ptx::cvt_half2(static_cast<uint16_t>(codes));
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = offset * kTileChunks + 2 * pair + j;  // 32 values: two fragments, four chunks of x
        uint32_t a[kTiles][2][4], b[2][kTokenTiles][2];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const auto factor = [j](__half2 both) { return j ? __high2half2(both) : __low2half2(both); };
          uint32_t up[4], low[4];
          nvfp4_halves(up, words[m][2 * j], factor(factors[m][0]));
          nvfp4_halves(low, words[m][2 * j + 1], factor(factors[m][1]));
          fp4_fragments(a[m], up, low);
        }
        if constexpr (kTokenTiles == 1) {
          load_x_twice(b, 4 * chunk);
        } else {
          load_x(b[0], 4 * chunk);
          load_x(b[1], 4 * chunk + 2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16_f16(total[m][n], a[m][half], b[half][n]);
          }
        }
      }
    }
    if constexpr (kSplit) ring.advance();
  }

  __device__ __forceinline__ void multiply_dense(int stage, int offset) {
    Words all;
    load_all(all, stage);
#pragma unroll
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      uint32_t b[kTokenTiles][2];
      load_x(b, offset * kTileChunks + 2 * pair);
      const auto& words = words_of(all, stage, pair);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16_bf16(total[m][n], words[m], b[n]);
      }
    }
    if constexpr (kSplit) ring.advance();
  }

  // ---- Sums ----

  // Add the ranges of the CTA's rows and store them. `buffer` alternates: who writes to it has passed the barrier of
  // the tile between, behind which nobody reads it.
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
  int lane, ranges_here, subtiles, range_here, subtile, range;
  int begin, end;            // pieces of the warp's range
  int first_tile, tile_end;  // of the CTA
  int x_values, x_scales;  // offsets in shared memory, of the warp's range
  int load_lane;           // the lane's in a tile
  int x_lanes[kLoads];     // and in x
  Ring ring;
  Sums total;
};

}  // namespace dsv4
