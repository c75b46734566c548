// Products of 9 to 64 tokens with FP8 weights on Hopper: weights stream through shared memory and registers into wgmma.
// x is E4M3 (FP8) or bf16 (W8A16).
//
// As in stream.cuh a warp copies pieces of 16 or 32 weight rows x 128 bytes into a ring of its own and turns them into
// f16 (FP8) or, times their scale, into bf16 (W8A16) in registers, where they are the first operand of wgmma; only
// there the four warps of a warpgroup meet. Codes of x are turned into f16 once a CTA, when x is staged: in each warp,
// as mma.sync wants it, that was as much work as the products. Half of a piece (64 values of k) is under way in the
// tensor cores while a warp converts the next half. Of FP8 a scale group's sum is scaled and added in fp32, and while
// one of the CTA's two warpgroups does that, the other one's products run; of W8A16 nothing is left to do with the sums
// until the end, for a weight's scale is part of it.
//
// The order of sums is that of stream.cuh: the same steps of 16 values with the same order of k inside, whose sums
// wgmma rounds as mma.sync does; the same groups, scales and ranges. So a token has the same bits with any number of
// tokens.
//
//   CTA     one range of k (grid.y) of a tile of 256 rows (kTiles 2) or 128 rows (kTiles 1), of FP8 of one tile after
//           the other; of up to 32 tokens two fit an SM
//   memory  x (wide_x.cuh; 256 bytes a token and piece: 16 KiB a piece of 64 tokens) | rings (8 warps x stages x 2 or
//           4 KiB) | scales of x in fp32 [group][token]
//
// Floor: the weights, once, from memory. Of 64 tokens and 4096 x 8192 of FP8 an SM takes 13 thousand cycles to read its
// part, 8 for products, 2 for adding scaled sums, 2 to 4 to convert weights and 1 to convert x; they overlap but for
// the latency of x at the start (a thread loads its part of x in one batch, behind the first pieces of the weight) and
// of the sums at the end. Should be bound by memory, and add_ranges comes on top. Where x comes in windows, each tile
// of rows loads it again.
//
// H200, 2026-11-25, FP8, us one behind the other as in stream.cuh (floor), 64 tokens: 32768 x 1024 18.2 (8.2), 4096 x
// 8192 20.3 (7.4). By mma.sync, with x converted in every warp, they took 22.7 and 25.0. With another loop, in which
// both tiles of a warp are under way at once, the first took as long: what is left is not its order but staging x
// before the first product, and eight pieces a warp that hardly fill a ring of three. Codes multiplied as they are, by
// FP8 wgmma for all of 1 to 64 tokens, take 10 to 30 % less at 64 tokens (13.6 and 17.4) and 10 % less at 16, but 2 to
// 15 % more at one, and sums keep 13 bits below their largest term.
//
// W8A16, us (floor) of 8 and 16 groups of 1024 x 4096: 16 tokens warm 13.1 and 26.8, 64 tokens 20.9 and 43.6 (7.1 and
// 14.3); bf16 weights take 21.3 and 38.7, 30.1 and 52.5. One token, by stream.cuh: 8.8 and 17.0 warm, 10.9 and 17.0 one
// behind the other.
#pragma once

#include "common/ptx_sm90_wgmma.cuh"
#include "gemm/weight_ring.cuh"
#include "gemm/wide_x.cuh"

namespace dsv4 {

// Whether a CTA goes on to other tiles of rows. For W8A16 that would take registers that it does not have.
constexpr bool walks(Format format) { return format == Format::kFp8; }

template <int kTokens, int kTiles>
struct WideShape {
  static constexpr int kStages = kTokens == 64 && kTiles == 1 ? 4 : 3;
  static constexpr int kRingBytes = kWarps * kStages * kTiles * kTileBytes;
  static constexpr int kRowsOfCta = kWarps * kTiles * kTileRows;
  static constexpr int kCtasOfAnSm = kTokens <= 32 && kTiles == 1 ? 2 : 1;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <Format kFormat, int kTokens, int kTiles>
class WideProduct {
  using Shape = WideShape<kTokens, kTiles>;
  using Ring = WeightRing<kFormat, kTiles, Shape::kStages>;
  using X = WideX<kFormat, kTokens>;
  static constexpr bool kWalks = walks(kFormat);
  static constexpr int kHalfSteps = 4;       // of k16, of half a piece
  static constexpr int kSums = kTokens / 2;  // of a thread, of 16 rows of each warp

 public:
  __device__ __forceinline__ WideProduct(const Stream& stream, uint8_t* shared_memory)
      : s(stream),
        p(stream.product),
        shared(shared_memory),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(s.first_piece(blockIdx.y)),
        end(s.first_piece(blockIdx.y + 1)),
        first_tile(kWalks ? blockIdx.x * s.tiles_of_cta : 0),
        tile_end(kWalks ? min(s.tiles, first_tile + s.tiles_of_cta) : 1),
        first_row(warp * Ring::kRows + (kWalks ? 0 : blockIdx.x * Shape::kRowsOfCta)),
        rings(s.window * X::kPieceBytes),
        load_lane(tile_offset(lane % kTileRows, lane / kTileRows)),
        ring(s, shared, rings + warp * Ring::kBytes, lane, first_tile, tile_end, Shape::kRowsOfCta, first_row, begin,
             end) {}

  // What does not depend on the kernels before: the first pieces of the weight and their scales.
  __device__ __forceinline__ void prefetch() { ring.fill(); }

  __device__ __forceinline__ void run() {
    left = (tile_end - first_tile) * (end - begin);
    for (int tile = first_tile; tile < tile_end; ++tile) {
      clear_total();
      for (int first = begin; first < end; first += s.window) {
        const bool at_start = tile == first_tile && first == begin;
        if (at_start || end - begin > s.window) {  // a window that has the whole range serves all tiles
          if (!at_start) __syncthreads();          // everyone is done with the window before
          X(s, shared, x_scales()).load(first, end);
          ptx::fence_async_proxy();
          __syncthreads();
          if (at_start) start_piece();
        }
        const int last = min(end, first + s.window);
        for (int piece = first; piece < last; ++piece) multiply(piece - first);
        if constexpr (kFormat == Format::kW8a16) finish_products();
      }
      using Sums = float[kTiles][kTokens / 8][4];
      store_sums<kFormat>(s, reinterpret_cast<const Sums&>(total), tile * Shape::kRowsOfCta + first_row,
                          s.range_shift > 0);
    }
    ptx::cp_async_wait<0>();
  }

 private:
  using Half = uint32_t[kHalfSteps][4];  // fragments of half a piece

  __device__ __forceinline__ void clear_total() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) total[m][i] = 0.0f;
    }
  }

  __device__ __forceinline__ float* x_scales() const {
    return reinterpret_cast<float*>(shared + rings + Shape::kRingBytes);
  }

  // ---- Fragments ----

  // The next piece of the ring, if there is one: its first half becomes fragments.
  __device__ __forceinline__ void start_piece() {
    if (left == 0) return;
    --left;
    stage = ring.wait();
    if constexpr (kFormat == Format::kW8a16) scale = Bf16Scale(ring.take_block_scale());
    convert(halves[0], 0, 0);
  }

  // Half `half` of tile m of the stage, as fragments.
  __device__ __forceinline__ void convert(Half& fragments, int m, int half) const {
    if (kFormat == Format::kW8a16 && scale.large) {
      convert_as<true>(fragments, m, half);
    } else {
      convert_as<false>(fragments, m, half);
    }
  }

  template <bool kLargeScale>
  __device__ __forceinline__ void convert_as(Half& fragments, int m, int half) const {
#pragma unroll
    for (int pair = 0; pair < kHalfSteps / 2; ++pair) {
      uint32_t words[4];
      const int chunk = half * kHalfSteps + 2 * pair;
      ptx::ldmatrix_x4(words, shared + ((stage + m * kTileBytes + load_lane) ^ chunk * 16));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kFormat == Format::kFp8) {
          e4m3_fragment(fragments[2 * pair + i], words[2 * i], words[2 * i + 1]);
        } else {
          e4m3_bf16_fragment<kLargeScale>(fragments[2 * pair + i], words[2 * i], words[2 * i + 1], scale.factor);
        }
      }
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

  // ---- Products ----

  // The piece whose first half lies in halves[0], the `offset`th in the window of x. halves[0] and halves[1] take
  // turns: one is read by products that are under way, one is written.
  __device__ __forceinline__ void multiply(int offset) {
    if constexpr (kFormat == Format::kW8a16) {
      multiply_w8a16(offset);
    } else {
      const float weight_scale = ring.take_block_scale();
      if (p.x_group == 128) {
        multiply_fp8<8>(weight_scale, offset);
      } else if (p.x_group == 64) {
        multiply_fp8<4>(weight_scale, offset);
      } else {
        multiply_fp8<2>(weight_scale, offset);
      }
    }
  }

  __device__ __forceinline__ uint64_t x_of(int offset) const {
    return ptx::wgmma_descriptor(ptx::shared_address(shared) + offset * X::kPieceBytes, 16, 1024, true);
  }

  // kSteps of 16 values are a scale group of x.
  template <int kSteps>
  __device__ __forceinline__ void multiply_fp8(float weight_scale, int offset) {
    constexpr int kGroups = 8 / kSteps, kStepsAtOnce = kSteps < kHalfSteps ? kSteps : kHalfSteps;
    const uint64_t x = x_of(offset);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int first = 0; first < 8; first += kStepsAtOnce) {
        const int half = first / kHalfSteps;
        const bool ends_half = (first + kStepsAtOnce) % kHalfSteps == 0;
        ptx::wgmma_fence();
#pragma unroll
        for (int step = first; step < first + kStepsAtOnce; ++step) {
          const uint32_t at = half * X::kBlockBytes + step % kHalfSteps * 32;
          ptx::wgmma_k16_f16<kTokens>(part, halves[half][step % kHalfSteps], ptx::advance_descriptor(x, at),
                                      step % kSteps > 0);
        }
        ptx::wgmma_commit();
        if (kSteps == 8 && half == 1) ptx::wgmma_wait<1>();  // the products of the half before
        if (ends_half) convert_next(m, half);
        if (kSteps < 8 || half == 1) {
          ptx::wgmma_wait<0>();
          ptx::pin_registers(part);
          promote(total[m], weight_scale, offset * kGroups + first / kSteps);
        }
      }
    }
  }

  // sums += part * (weight scale * x scale of group `group`).
  __device__ __forceinline__ void promote(float (&sums)[kSums], float weight_scale, int group) {
    const float* const scales = x_scales() + group * kTokens + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      const float2 of_x = *reinterpret_cast<const float2*>(scales + 2 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scale = __fmul_rn(weight_scale, j % 2 ? of_x.y : of_x.x);
        sums[i + j] = __fmaf_rn(part[i + j], scale, sums[i + j]);
      }
    }
  }

  __device__ __forceinline__ void multiply_w8a16(int offset) {
    const uint64_t x = x_of(offset);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHalfSteps; ++step) {
          const uint64_t at = ptx::advance_descriptor(x, half * X::kBlockBytes + step * 32);
          ptx::wgmma_k16_bf16<kTokens>(total[m], halves[half][step], at, 1);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the products of the half before
        convert_next(m, half);
      }
    }
  }

  __device__ __forceinline__ void finish_products() {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) ptx::pin_registers(total[m]);
  }

  const Stream& s;
  const Product& p;
  uint8_t* shared;
  int lane, warp;
  int begin, end;            // pieces of the range
  int first_tile, tile_end;  // of the CTA
  int first_row;             // of the warp, in tile 0
  int rings;                 // where they begin in shared memory, behind x
  int load_lane;             // the lane's place in a tile
  Ring ring;
  int left;                           // pieces of the warp that have not become fragments
  int stage;                          // of the piece that becomes fragments
  Bf16Scale scale = Bf16Scale(1.0f);  // W8A16: and its scale
  Half halves[2];
  float part[kSums];                  // FP8: sums of a scale group
  float total[kTiles][kSums];
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// ---- Launch ----

// Kernels of WideProduct<kFormat, ..> by its shape. half: of half the rows.
struct WideKernels {
  StreamKernel of16, half_of32, of32, half_of64, of64;  // <16, 1>, <32, 1>, <32, 2>, <64, 1>, <64, 2>
};

// Bytes of shared memory with so many pieces in a window of x, and what a window needs to know.
template <Format kFormat, int kTokens, int kTiles>
int64_t plan_wide_x(Stream& stream, int64_t window) {
  stream.window = static_cast<int>(window);
  stream.x_groups = stream.x_group_shift > 0 ? stream.window * kTileRowBytes >> stream.x_group_shift : 0;
  return window * WideX<kFormat, kTokens>::kPieceBytes + WideShape<kTokens, kTiles>::kRingBytes +
         4 * stream.x_groups * kTokens;
}

template <Format kFormat, int kTokens, int kTiles>
cudaError_t launch_wide_shape(StreamKernel kernel, const Product& product, int64_t first_token, int tokens,
                              cudaStream_t stream) {
  using Shape = WideShape<kTokens, kTiles>;
  const auto plan_x = plan_wide_x<kFormat, kTokens, kTiles>;
  Stream plan = plan_stream(kFormat, product, first_token, tokens);
  const int ranges = 1 << plan.range_shift;
  plan.tiles = static_cast<int>(ceil_divide(product.rows, Shape::kRowsOfCta));
  if (!walks(kFormat)) plan.tiles_of_cta = 1;
  int64_t window = ceil_divide(plan.pieces, ranges);
  while (plan_x(plan, window) > kMostShared) window = (window + 1) / 2;
  const int64_t shared = plan_x(plan, window);
  return launch_tiles(kernel, plan, ranges, shared, Shape::kCtasOfAnSm, stream);
}

// Launch the kernel that serves 9 to 64 tokens.
template <Format kFormat>
cudaError_t launch_wide(const WideKernels& kernels, const Product& product, int64_t first_token, int tokens,
                        cudaStream_t stream) {
  const auto launch = [&]<int kTokens, int kTiles>(StreamKernel kernel, WideShape<kTokens, kTiles>) {
    return launch_wide_shape<kFormat, kTokens, kTiles>(kernel, product, first_token, tokens, stream);
  };
  if (tokens <= 16) return launch(kernels.of16, WideShape<16, 1>());
  Stream plan = plan_stream(kFormat, product, first_token, tokens);
  const int64_t ranges = 1 << plan.range_shift;
  if (tokens <= 32) {
    // Two small CTAs an SM, where x of a whole range fits, or a large one.
    const int64_t shared = plan_wide_x<kFormat, 32, 1>(plan, ceil_divide(plan.pieces, ranges));
    return shared <= kMostOfTwo ? launch(kernels.half_of32, WideShape<32, 1>())
                                : launch(kernels.of32, WideShape<32, 2>());
  }
  // CTAs of half the rows where whole ones would leave more than half of the SMs idle.
  const int64_t ctas = ceil_divide(product.rows, WideShape<64, 2>::kRowsOfCta) * product.groups * ranges;
  return 2 * ctas <= kSms ? launch(kernels.half_of64, WideShape<64, 1>()) : launch(kernels.of64, WideShape<64, 2>());
}

}  // namespace dsv4
