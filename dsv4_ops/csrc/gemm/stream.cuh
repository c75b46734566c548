// Products of up to 64 tokens: weights stream through shared memory into mma.sync.
//
// A CTA has 8 warps. A warp takes tiles of 16 (of more than 8 tokens: 32) rows of the weight and one of up to 8 ranges
// of k, and goes through it in pieces of 16 x 128 bytes, which it copies (cp.async) into a ring of its own, several
// pieces ahead and across the ends of its tiles. Nobody else waits for a piece, so the main loop has no barrier of the
// CTA, and the ring is filled before the kernel waits for its predecessors: weights are parameters.
//
//   up to 8 tokens    the CTA's warps hold all ranges of 16 * (8 / ranges) rows; the ranges' sums meet in shared memory
//   up to 64 tokens   the CTA's warps hold one range (grid.y) of 256 rows; sums of a range go to the workspace
//
// and in both the ranges are added as a tree (add_ranges): a row has the same bits with any number of tokens. More than
// 8 tokens of FP8 weights go through wgmma on Hopper: wide_stream.cuh.
//
// x of the CTA's ranges lies in shared memory in the order that the weights' fragments want (weight_fragments.cuh);
// where it does not fit, it comes in windows of some pieces of every range.
//
// Shared memory: ring (8 warps x stages x (2 or 4 KiB and the pieces' FP4 scales)) | partial sums, two buffers | x |
// scales of x in fp32 [range][group of k][token]. Few tokens leave room for two CTAs an SM: of this kernel, or of this
// one and the next of the stream, which fills its ring as soon as a CTA of this one has ended.
//
// Floor: the weights, once, from memory. Of 64 tokens the instructions take longer: every warp converts x for itself.
//
// H200, 2026-11-25, us of FP8 weights cold (floor), one token: 1536 x 4096 7.3 (1.3), 32768 x 1024 15.1 (7.2), 4096 x
// 8192 15.5 (7.1), 7168 x 16384 41.6 (25.0). One behind the other with weights of their own, none of them in L2, so
// that the next one's ring fills meanwhile, they take 3.9, 9.7, 10.0 and 30.4.
#pragma once

#include <cuda_bf16.h>

#include "gemm/staged_x.cuh"
#include "gemm/weight_ring.cuh"

namespace dsv4 {

constexpr int kSumPitch = kTileRows + 4;  // fp32 numbers: a fragment's rows and tokens lie in different banks

template <Format kFormat, int kTokenTiles>
class StreamingProduct {
  static constexpr FormatShape kShape = shape_of(kFormat);
  static constexpr int kTiles = kTokenTiles > 1 ? 2 : 1;  // of 16 rows, a warp
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kLoads = (kTokenTiles + 1) / 2;  // of a chunk pair of x
  static constexpr int kStages = kTokenTiles > 1 ? 3 : kShape.scale_bytes ? 4 : 5;
  using Ring = WeightRing<kFormat, kTiles, kStages>;
  static constexpr int kRingBytes = kWarps * Ring::kBytes;
  static constexpr int kSumFloats = kTokenTiles > 1 ? 0 : kWarps * kTokens * kSumPitch;  // of one of the two buffers

 public:
  static constexpr bool kSplit = kTokenTiles > 1;  // one range a CTA
  static constexpr int kFixedBytes = kRingBytes + 2 * 4 * kSumFloats;
  static constexpr int kCtasOfAnSm = kTokenTiles > 2 ? 1 : 2;

  // Bytes of shared memory behind the fixed ones, and the geometry of x that needs them.
  static int64_t plan_x(Stream& stream, int ranges_of_cta, int window) {
    stream.window = window;
    stream.units = Divisor(window * StagedX<kFormat>::kUnits);
    stream.x_pitch = window * kShape.x_piece_bytes + 16;  // rows of one chunk in different banks
    stream.x_groups = stream.x_group_shift > 0 ? window * kShape.piece_values >> stream.x_group_shift : 0;
    return int64_t{ranges_of_cta} * (stream.tokens * stream.x_pitch + 4 * stream.scale_tokens * stream.x_groups);
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
        x_scales(kFixedBytes + ranges_here * s.tokens * s.x_pitch + range_here * s.x_groups * s.scale_tokens * 4),
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
          StagedX<kFormat>(s, shared + x_values, reinterpret_cast<float*>(shared + x_scales), subtile * 32 + lane,
                           subtiles * 32)
              .load(begin + window * s.window, end);
          __syncthreads();
        }
        const int last = min(end, begin + (window + 1) * s.window);
        for (int piece = begin + window * s.window; piece < last; ++piece) {
          multiply(ring.wait(), piece - begin - window * s.window);
        }
      }
      if (ranges_here > 1) {
        add_and_store(tile, (tile - first_tile) & 1);
      } else {
        store_sums<kFormat>(s, total, row_of(tile), kSplit && s.range_shift > 0);
      }
    }
    ptx::cp_async_wait<0>();
  }

 private:
  using Sums = float[kTiles][kTokenTiles][4];

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

  // The same of chunks `chunk` .. chunk + 3: of two steps of k.
  __device__ __forceinline__ void load_x_twice(uint32_t (&words)[2][kTokenTiles][2], int chunk) const {
    if constexpr (kTokenTiles == 1) {
      uint32_t four[4];
      ptx::ldmatrix_x4(four, shared + x_lanes[0] + chunk * 16);
      words[0][0][0] = four[0], words[0][0][1] = four[1], words[1][0][0] = four[2], words[1][0][1] = four[3];
    } else {
      load_x(words[0], chunk);
      load_x(words[1], chunk + 2);
    }
  }

  // total += part * (weight scale * x scale) with the weight scales of the lane's rows and group `group` of x.
  __device__ __forceinline__ void promote(const Sums& part, const float (&weight_scales)[kTiles][2], int group) {
    const float* const scales = reinterpret_cast<const float*>(shared + x_scales) + group * s.scale_tokens;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = min(n * 8 + lane % 4 * 2, s.scale_tokens - 2);
      const float2 of_x = *reinterpret_cast<const float2*>(scales + token);
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
    } else if constexpr (kFormat == Format::kW8a16) {
      const Bf16Scale scale(ring.take_block_scale());
      if (scale.large) {
        multiply_w8a16<true>(stage, scale.factor, offset);
      } else {
        multiply_w8a16<false>(stage, scale.factor, offset);
      }
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
        load_x_twice(b, 4 * chunk);
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

  template <bool kLargeScale>
  __device__ __forceinline__ void multiply_w8a16(int stage, uint32_t factor, int offset) {
    Words all;
    load_all(all, stage);
#pragma unroll
    for (int pair = 0; pair < kTileChunks / 2; ++pair) {
      const auto& words = words_of(all, stage, pair);
      uint32_t b[2][kTokenTiles][2];
      load_x_twice(b, 2 * (offset * kTileChunks + 2 * pair));
#pragma unroll
      for (int step = 0; step < 2; ++step) {  // a chunk of the weight, two of x
        uint32_t a[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          e4m3_bf16_fragment<kLargeScale>(a[m], words[m][2 * step], words[m][2 * step + 1], factor);
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16_bf16(total[m][n], a[m], b[step][n]);
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

// Kernels of StreamingProduct<kFormat, 1>, <.., 2>, <.., 4> and <.., 8>: of so many tokens at the most.
struct StreamKernels {
  StreamKernel of8, of16, of32, of64;
};

template <Format kFormat, int kTokenTiles>
cudaError_t launch_stream_of(StreamKernel kernel, const Product& product, int64_t first_token, int tokens,
                             cudaStream_t stream) {
  using Kernel = StreamingProduct<kFormat, kTokenTiles>;
  Stream plan = plan_stream(kFormat, product, first_token, tokens);
  constexpr bool kSplit = Kernel::kSplit;
  const int ranges = 1 << plan.range_shift, ranges_here = kSplit ? 1 : ranges;
  const int64_t rows = kSplit ? 2 * kTileRows * kWarps : kTileRows * (kWarps / ranges_here);
  plan.tiles = static_cast<int>(ceil_divide(product.rows, rows));
  int window = static_cast<int>(ceil_divide(plan.pieces, ranges));
  while (window > 1 && Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window) > kMostShared) {
    window = (window + 1) / 2;
  }
  const int64_t shared = Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window);
  return launch_tiles(kernel, plan, kSplit ? ranges : 1, shared, Kernel::kCtasOfAnSm, stream);
}

// Launch the kernel that serves up to 64 tokens.
template <Format kFormat>
cudaError_t launch_stream(const StreamKernels& kernels, const Product& product, int64_t first_token, int tokens,
                          cudaStream_t stream) {
  if (tokens <= 8) return launch_stream_of<kFormat, 1>(kernels.of8, product, first_token, tokens, stream);
  if (tokens <= 16) return launch_stream_of<kFormat, 2>(kernels.of16, product, first_token, tokens, stream);
  if (tokens <= 32) return launch_stream_of<kFormat, 4>(kernels.of32, product, first_token, tokens, stream);
  return launch_stream_of<kFormat, 8>(kernels.of64, product, first_token, tokens, stream);
}

}  // namespace dsv4
