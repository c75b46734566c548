// FP8 products of 9 to 64 tokens on Hopper: weights stream through shared memory and registers into wgmma.
//
// As in stream.cuh a warp copies pieces of 16 or 32 weight rows x 128 bytes into a ring of its own and turns them into
// f16 in registers, where they are the first operand of wgmma; only there the four warps of a warpgroup meet. x is
// turned into f16 once a CTA, when it is staged: in each warp, as mma.sync wants it, that was as much work as the
// products. A CTA has two warpgroups; while one adds its scaled sums the other one's products run. Half of a piece (64
// values of k) is under way in the tensor cores while a warp converts the next half.
//
// The order of sums is that of stream.cuh: the same steps of 16 values with the same order of k inside, whose sums
// wgmma rounds as mma.sync does; the same groups, scales and ranges. So a token has the same bits with any number of
// tokens.
//
//   CTA     one range of k (grid.y) of 256 rows (kTiles 2) or 128 rows (kTiles 1); of up to 32 tokens two fit an SM
//   x       values 16 i + (0, 1, 4, 5, 8, 9, 12, 13 | 2, 3, 6, 7, 10, 11, 14, 15) side by side, as the words of the
//           weights' fragments lie (weight_fragments.cuh); [64 values of k][token], 128-byte rows, swizzled
//   memory  x (256 bytes a token and piece: 16 KiB a piece of 64 tokens) | rings (8 warps x stages x 2 or 4 KiB) |
//           scales of x in fp32 [group][token]
//
// Floor: the weights, once, from memory. Of 64 tokens and 4096 x 8192 an SM takes 13 thousand cycles to read its part,
// 8 for products, 2 for adding scaled sums, 2 to 4 to convert weights and 1 to convert x; they overlap but for the
// latency of x at the start (a thread loads its part of x in one batch) and of the sums at the end. Should be bound by
// memory, and add_ranges comes on top. Where x comes in windows, each tile of rows loads it again.
//
// H200, 2026-11-25, us one behind the other as in stream.cuh (floor), 64 tokens: 32768 x 1024 18.2 (8.2), 4096 x 8192
// 20.3 (7.4). By mma.sync, with x converted in every warp, they took 22.7 and 25.0. With another loop, in which both
// tiles of a warp are under way at once, the first took as long: what is left is not its order but staging x before the
// first product, and eight pieces a warp that hardly fill a ring of three. Codes multiplied as they are, by FP8 wgmma
// for all of 1 to 64 tokens, take 10 to 30 % less at 64 tokens (13.6 and 17.4) and 10 % less at 16, but 2 to 15 % more
// at one, and sums keep 13 bits below their largest term.
#pragma once

#include "common/ptx_sm90_gemm.cuh"
#include "gemm/stream.cuh"

namespace dsv4 {

template <int kTokens, int kTiles>
struct WideShape {
  static constexpr int kStages = kTokens == 64 && kTiles == 1 ? 4 : 3;
  static constexpr int kBlockValues = 64;               // of k: a swizzled row of f16
  static constexpr int kBlockBytes = kTokens * 128;     // of x
  static constexpr int kPieceBytesOfX = 2 * kBlockBytes;
  static constexpr int kRingBytes = kWarps * kStages * kTiles * kTileBytes;
  static constexpr int kRowsOfCta = kWarps * kTiles * kTileRows;
  static constexpr int kCtasOfAnSm = kTokens <= 32 && kTiles == 1 ? 2 : 1;

  // Bytes of shared memory, and what a window of x needs to know.
  static int64_t plan_x(Stream& stream, int window) {
    stream.window = window;
    stream.x_groups = window * shape_of(Format::kFp8).piece_values >> stream.x_group_shift;
    return int64_t{window} * kPieceBytesOfX + kRingBytes + 4 * stream.x_groups * kTokens;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kTokens, int kTiles>
class WideProduct {
  using Shape = WideShape<kTokens, kTiles>;
  using Ring = WeightRing<Format::kFp8, kTiles, Shape::kStages>;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kHalfSteps = 4;  // of k16, of half a piece
  static constexpr int kUnits = 8;      // 16 codes of x, of a piece
  static constexpr int kBatch = kTokens / 4;  // loads of a thread that are under way together
  static constexpr int kScaleBatch = 2;

 public:
  __device__ __forceinline__ WideProduct(const Stream& stream, uint8_t* shared_memory)
      : s(stream),
        p(stream.product),
        shared(shared_memory),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(s.first_piece(blockIdx.y)),
        end(s.first_piece(blockIdx.y + 1)),
        first_tile(blockIdx.x * s.tiles_of_cta),
        tile_end(min(s.tiles, first_tile + s.tiles_of_cta)),
        rings(s.window * Shape::kPieceBytesOfX),
        load_lane(tile_offset(lane % kTileRows, lane / kTileRows)),
        ring(s, shared, rings + warp * Ring::kBytes, lane, first_tile, tile_end, Shape::kRowsOfCta, warp * Ring::kRows,
             begin, end) {}

  // What does not depend on the kernels before: the first pieces of the weight and their scales.
  __device__ __forceinline__ void prefetch() { ring.fill(); }

  __device__ __forceinline__ void run() {
    const int longest = (s.pieces + (1 << s.range_shift) - 1) >> s.range_shift;
    const int windows = (longest + s.window - 1) / s.window;
    left = (tile_end - first_tile) * (end - begin);
    for (int tile = first_tile; tile < tile_end; ++tile) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][n][i] = 0.0f;
        }
      }
      for (int window = 0; window < windows; ++window) {
        const int first = begin + window * s.window;
        if (windows > 1 || tile == first_tile) {
          if (windows > 1) __syncthreads();  // everyone is done with the window before
          load_x(first);
          ptx::fence_async_proxy();
          __syncthreads();
          if (tile == first_tile && window == 0) start_piece();
        }
        const int last = min(end, first + s.window);
        for (int piece = first; piece < last; ++piece) {
          const float scale = ring.take_block_scale();
          if (p.x_group == 128) {
            multiply<8>(scale, piece - first);
          } else if (p.x_group == 64) {
            multiply<4>(scale, piece - first);
          } else {
            multiply<2>(scale, piece - first);
          }
        }
      }
      store_sums<Format::kFp8>(s, total, (tile * kWarps + warp) * Ring::kRows, s.range_shift > 0);
    }
    ptx::cp_async_wait<0>();
  }

 private:
  using Half = uint32_t[kHalfSteps][4];  // fragments of half a piece

  // ---- x ----

  // The window of x that begins with piece `piece`, in f16. Tokens that are not there repeat the last one; nobody
  // stores their sums.
  __device__ __forceinline__ void load_x(int piece) const {
    const int64_t x_row = s.first_token * p.groups + blockIdx.z;
    const int k = piece * kTileRowBytes, pieces = min(s.window, end - piece);
    const int there = min(pieces * kTileRowBytes, static_cast<int>(p.k) - k);
    const auto* const scale_source = p.x_scale + x_row * p.x_scale_stride + (k >> s.x_group_shift);
    uint32_t scale_codes[kScaleBatch];
    load_scales(scale_codes, 0, there, scale_source);

    // A token's 128 bytes of a piece are units of eight threads, so the CTA takes 32 tokens at a time.
    constexpr int kTokensOfPass = kThreads / kUnits;
    const int unit = threadIdx.x % kUnits, all = pieces * kTokens;
    const auto* const source = static_cast<const uint8_t*>(p.x) + x_row * p.x_stride + k + unit * 16;
    for (int first = threadIdx.x / kUnits; first < all; first += kBatch * kTokensOfPass) {
      uint4 codes[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kTokensOfPass, offset = at / kTokens * kTileRowBytes;
        const int token = min(at % kTokens, s.tokens - 1);
        codes[i] = {};
        if (offset + unit * 16 < there) {
          codes[i] = ptx::load_once(source + static_cast<int64_t>(token) * s.x_step + offset);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kTokensOfPass;
        if (at < all) store_unit(at / kTokens, at % kTokens, unit, codes[i]);
      }
    }
    for (int first = 0; first < s.x_groups * kTokens; first += kScaleBatch * kThreads) {
      if (first > 0) load_scales(scale_codes, first, there, scale_source);
      store_scales(scale_codes, first);
    }
  }

  // 16 codes of x in f16: two chunks of a swizzled row.
  __device__ __forceinline__ void store_unit(int piece, int token, int unit, const uint4& codes) const {
    uint32_t a[2], b[2], c[2], d[2];
    e4m3_halves(a, codes.x);
    e4m3_halves(b, codes.y);
    e4m3_halves(c, codes.z);
    e4m3_halves(d, codes.w);
    uint8_t* const block = shared + piece * Shape::kPieceBytesOfX + unit / 4 * Shape::kBlockBytes;
    const int chunk = unit % 4 * 2;
    *reinterpret_cast<uint4*>(block + tile_offset(token, chunk)) = {a[0], b[0], c[0], d[0]};
    *reinterpret_cast<uint4*>(block + tile_offset(token, chunk + 1)) = {a[1], b[1], c[1], d[1]};
  }

  static constexpr uint32_t kNoScale = 256;

  // Scale i is that of token i % kTokens in group i / kTokens; groups beyond the `there` values of k have 0.
  __device__ __forceinline__ void load_scales(uint32_t (&codes)[kScaleBatch], int first, int there,
                                              const uint8_t* source) const {
    const int groups = there >> s.x_group_shift;
#pragma unroll
    for (int j = 0; j < kScaleBatch; ++j) {
      const int i = first + j * kThreads + threadIdx.x, group = i / kTokens;
      const int token = min(i % kTokens, s.tokens - 1);
      codes[j] = group < groups ? source[static_cast<int64_t>(token) * s.x_scale_step + group] : kNoScale;
    }
  }

  __device__ __forceinline__ void store_scales(const uint32_t (&codes)[kScaleBatch], int first) const {
#pragma unroll
    for (int j = 0; j < kScaleBatch; ++j) {
      const int i = first + j * kThreads + threadIdx.x;
      if (i < s.x_groups * kTokens) x_scales()[i] = codes[j] == kNoScale ? 0.0f : decode_ue8m0(codes[j]);
    }
  }

  __device__ __forceinline__ float* x_scales() const {
    return reinterpret_cast<float*>(shared + rings + Shape::kRingBytes);
  }

  // ---- Products ----

  // The next piece of the ring, if there is one: its first half becomes fragments.
  __device__ __forceinline__ void start_piece() {
    if (left == 0) return;
    --left;
    stage = ring.wait();
    convert(halves[0], 0, 0);
  }

  // Half `half` of tile m of the stage, as fragments.
  __device__ __forceinline__ void convert(Half& fragments, int m, int half) const {
#pragma unroll
    for (int pair = 0; pair < kHalfSteps / 2; ++pair) {
      uint32_t words[4];
      const int chunk = half * kHalfSteps + 2 * pair;
      ptx::ldmatrix_x4(words, shared + ((stage + m * kTileBytes + load_lane) ^ chunk * 16));
      e4m3_fragment(fragments[2 * pair], words[0], words[1]);
      e4m3_fragment(fragments[2 * pair + 1], words[2], words[3]);
    }
  }

  // What follows half `half` of tile m becomes fragments.
  __device__ __forceinline__ void convert_next(int m, int half) {
    if (half == 0) {
      convert(halves[1], m, 1);
    } else if (m + 1 < kTiles) {
      convert(halves[0], m + 1, 0);
    } else {
      start_piece();
    }
    if (half == 0 && m + 1 == kTiles) ring.advance();  // all of the stage is in registers
  }

  // The piece whose first half lies in halves[0], the `offset`th in the window of x. kSteps of 16 values are a scale
  // group of x. halves[0] and halves[1] take turns: one is read by products that are under way, one is written.
  template <int kSteps>
  __device__ __forceinline__ void multiply(float scale, int offset) {
    constexpr int kGroups = 8 / kSteps, kStepsAtOnce = kSteps < kHalfSteps ? kSteps : kHalfSteps;
    const uint32_t x_at = ptx::shared_address(shared) + offset * Shape::kPieceBytesOfX;
    const uint64_t x = ptx::wgmma_descriptor(x_at, 16, 1024, true);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int first = 0; first < 8; first += kStepsAtOnce) {
        const int half = first / kHalfSteps;
        const bool ends_half = (first + kStepsAtOnce) % kHalfSteps == 0;
        ptx::wgmma_fence();
#pragma unroll
        for (int step = first; step < first + kStepsAtOnce; ++step) {
          const uint32_t at = half * Shape::kBlockBytes + step % kHalfSteps * 32;
          ptx::wgmma_k16_f16<kTokens>(part, halves[half][step % kHalfSteps], ptx::advance_descriptor(x, at),
                                      step % kSteps > 0);
        }
        ptx::wgmma_commit();
        if (kSteps == 8 && half == 1) ptx::wgmma_wait<1>();  // the products of the half before
        if (ends_half) convert_next(m, half);
        if (kSteps < 8 || half == 1) {
          ptx::wgmma_wait<0>();
          ptx::pin_registers(part);
          promote(m, scale, offset * kGroups + first / kSteps);
        }
      }
    }
  }

  // total += part * (weight scale * x scale of group `group`).
  __device__ __forceinline__ void promote(int m, float weight_scale, int group) {
    const float* const scales = x_scales() + group * kTokens + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 of_x = *reinterpret_cast<const float2*>(scales + n * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = __fmul_rn(weight_scale, i % 2 ? of_x.y : of_x.x);
        total[m][n][i] = __fmaf_rn(part[4 * n + i], scale, total[m][n][i]);
      }
    }
  }

  const Stream& s;
  const Product& p;
  uint8_t* shared;
  int lane, warp;
  int begin, end;            // pieces of the range
  int first_tile, tile_end;  // of the CTA
  int rings;                 // where they begin in shared memory, behind x
  int load_lane;             // the lane's place in a tile
  Ring ring;
  int left;   // pieces of the warp that have not become fragments
  int stage;  // of the piece that becomes fragments
  Half halves[2];
  float part[kTokens / 2];  // sums of a scale group
  float total[kTiles][kTokenTiles][4];
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Shared memory of a CTA that keeps x of its whole range.
template <int kTokens, int kTiles>
int64_t whole_range_bytes(const Product& product) {
  Stream plan = plan_stream(Format::kFp8, product, 0, kTokens);
  const int64_t pieces = ceil_divide(plan.pieces, 1 << plan.range_shift);
  return WideShape<kTokens, kTiles>::plan_x(plan, static_cast<int>(pieces));
}

// Launch `kernel` for up to kTokens tokens.
template <int kTokens, int kTiles>
cudaError_t launch_wide(void (*kernel)(Stream), const Product& product, int64_t first_token, int tokens,
                        cudaStream_t stream) {
  using Shape = WideShape<kTokens, kTiles>;
  Stream plan = plan_stream(Format::kFp8, product, first_token, tokens);
  const int ranges = 1 << plan.range_shift;
  plan.tiles = static_cast<int>(ceil_divide(product.rows, Shape::kRowsOfCta));
  int window = static_cast<int>(ceil_divide(plan.pieces, ranges));
  while (Shape::plan_x(plan, window) > kMostShared) window = (window + 1) / 2;
  const int64_t shared = Shape::plan_x(plan, window);
  return launch_tiles(kernel, plan, ranges, shared, Shape::kCtasOfAnSm, stream);
}

}  // namespace dsv4
