// W8A16 products of 9 to 64 tokens on Hopper: weights stream through shared memory and registers into wgmma.
//
// As in stream.cuh a warp copies pieces of 16 or 32 weight rows x 128 bytes into a ring of its own and turns them into
// bf16 in registers, where they are the first operand of wgmma; only there the four warps of a warpgroup meet. Half of
// a piece (64 values of k) is under way in the tensor cores while a warp converts the next half. Nothing is left to do
// with the sums until the end, for a weight's scale is part of it.
//
// The order of sums is that of stream.cuh: the same steps of 16 values, the same ranges. So a token has the same bits
// with any number of tokens.
//
//   CTA     one range of k (grid.y) of 256 rows (kTiles 2) or 128 rows (kTiles 1); of up to 32 tokens two fit an SM
//   x       the even ones of 16 values, then the odd ones, as the weights' fragments have them (common/e4m3_bf16.cuh);
//           [64 values of k][token], 128-byte rows, swizzled
//   memory  x (256 bytes a token and piece: 16 KiB a piece of 64 tokens) | rings (8 warps x stages x 2 or 4 KiB)
//
// Floor: the weights, once, from memory. The loads of x at the start should hide behind the first pieces of the weight,
// which are asked for before them: a thread has up to 16 of them under way.
//
// H200, 2026-11-25, us (floor) of 8 and 16 groups of 1024 x 4096: 16 tokens warm 13.1 and 26.8, 64 tokens 20.9 and 43.6
// (7.1 and 14.3); bf16 weights take 21.3 and 38.7, 30.1 and 52.5. One token, by stream.cuh: 8.8 and 17.0 warm, 10.9 and
// 17.0 one behind the other.
#pragma once

#include "common/e4m3_bf16.cuh"
#include "common/ptx_sm90_moe.cuh"
#include "gemm/weight_ring.cuh"

namespace dsv4 {

template <int kTokens, int kTiles>
struct WideW8a16Shape {
  static constexpr int kStages = kTokens == 64 && kTiles == 1 ? 4 : 3;
  static constexpr int kBlockBytes = kTokens * 128;  // of x: 64 values of k
  static constexpr int kPieceBytesOfX = 2 * kBlockBytes;
  static constexpr int kRingBytes = kWarps * kStages * kTiles * kTileBytes;
  static constexpr int kRowsOfCta = kWarps * kTiles * kTileRows;
  static constexpr int kCtasOfAnSm = kTokens <= 32 && kTiles == 1 ? 2 : 1;

  static constexpr int64_t shared_bytes(int window) { return int64_t{window} * kPieceBytesOfX + kRingBytes; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kTokens, int kTiles>
class WideW8a16Product {
  using Shape = WideW8a16Shape<kTokens, kTiles>;
  using Ring = WeightRing<Format::kW8a16, kTiles, Shape::kStages>;
  static constexpr int kHalfSteps = 4;  // of k16, of half a piece
  static constexpr int kUnits = 16;     // 8 values of x, of a piece
  static constexpr int kBatch = kTokens == 64 ? 16 : 8;  // loads of a thread that are under way together

 public:
  __device__ __forceinline__ WideW8a16Product(const Stream& stream, uint8_t* shared_memory)
      : s(stream),
        p(stream.product),
        shared(shared_memory),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(s.first_piece(blockIdx.y)),
        end(s.first_piece(blockIdx.y + 1)),
        first_row((blockIdx.x * kWarps + warp) * Ring::kRows),
        load_lane(tile_offset(lane % kTileRows, lane / kTileRows)),
        ring(s, shared, s.window * Shape::kPieceBytesOfX + warp * Ring::kBytes, lane, 0, 1, 0, first_row, begin, end) {}

  // What does not depend on the kernels before: the first pieces of the weight and their scales.
  __device__ __forceinline__ void prefetch() { ring.fill(); }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) total[m][i] = 0.0f;
    }
    left = end - begin;
    for (int first = begin; first < end; first += s.window) {
      if (first > begin) __syncthreads();  // everyone is done with the window before
      load_x(first);
      ptx::fence_async_proxy();
      __syncthreads();
      if (first == begin) start_piece();
      const int last = min(end, first + s.window);
      for (int piece = first; piece < last; ++piece) multiply(piece - first);
      finish_products();
    }
    using Sums = float[kTiles][kTokens / 8][4];
    store_sums<Format::kW8a16>(s, reinterpret_cast<const Sums&>(total), first_row, s.range_shift > 0);
    ptx::cp_async_wait<0>();
  }

 private:
  using Half = uint32_t[kHalfSteps][4];  // fragments of half a piece

  // The window of x that begins with piece `piece`. Tokens that are not there repeat the last one; nobody stores their
  // sums. A token's 256 bytes of a piece are units of 16 threads, so the CTA takes 16 tokens at a time.
  __device__ __forceinline__ void load_x(int piece) const {
    constexpr int kTokensOfPass = kThreads / kUnits;
    const int64_t x_row = s.first_token * p.groups + blockIdx.z;
    const int k = piece * kTileRowBytes, pieces = min(s.window, end - piece);
    const int unit = threadIdx.x % kUnits, all = pieces * kTokens, there = static_cast<int>(p.k) - k - unit * 8;
    const auto* const source = static_cast<const uint8_t*>(p.x) + (x_row * p.x_stride + k + unit * 8) * 2;
    for (int first = threadIdx.x / kUnits; first < all; first += kBatch * kTokensOfPass) {
      uint4 values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kTokensOfPass, offset = at / kTokens * kTileRowBytes;
        const int token = min(at % kTokens, s.tokens - 1);
        values[i] = {};
        if (at < all && offset < there) {
          values[i] = ptx::load_once(source + static_cast<int64_t>(token) * s.x_step + offset * 2);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kTokensOfPass;
        if (at < all) store_unit(at / kTokens, at % kTokens, unit, values[i]);
      }
    }
  }

  // Eight values of x: half of two chunks of a swizzled row.
  __device__ __forceinline__ void store_unit(int piece, int token, int unit, const uint4& values) const {
    uint2 even, odd;
    split_even_odd(even, odd, values);
    uint8_t* const block = shared + piece * Shape::kPieceBytesOfX + unit / 8 * Shape::kBlockBytes;
    const int chunk = unit % 8 / 2 * 2, half = unit % 2 * 8;
    *reinterpret_cast<uint2*>(block + tile_offset(token, chunk) + half) = even;
    *reinterpret_cast<uint2*>(block + tile_offset(token, chunk + 1) + half) = odd;
  }

  // The next piece of the ring, if there is one: its first half becomes fragments.
  __device__ __forceinline__ void start_piece() {
    if (left == 0) return;
    --left;
    stage = ring.wait();
    scale = Bf16Scale(ring.take_block_scale());
    convert(halves[0], 0, 0);
  }

  // Half `half` of tile m of the stage, as fragments.
  __device__ __forceinline__ void convert(Half& fragments, int m, int half) const {
    if (scale.large) {
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
      e4m3_bf16_fragment<kLargeScale>(fragments[2 * pair], words[0], words[1], scale.factor);
      e4m3_bf16_fragment<kLargeScale>(fragments[2 * pair + 1], words[2], words[3], scale.factor);
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

  // The piece whose first half lies in halves[0], the `offset`th in the window of x. halves[0] and halves[1] take
  // turns: one is read by products that are under way, one is written.
  __device__ __forceinline__ void multiply(int offset) {
    const uint32_t x_at = ptx::shared_address(shared) + offset * Shape::kPieceBytesOfX;
    const uint64_t x = ptx::wgmma_descriptor(x_at, 16, 1024, true);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHalfSteps; ++step) {
          const uint64_t at = ptx::advance_descriptor(x, half * Shape::kBlockBytes + step * 32);
          ptx::wgmma_rows<kTokens>(total[m], halves[half][step], at, 1);
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
  int begin, end;  // pieces of the range
  int first_row;   // of the warp, in the group
  int load_lane;   // its lane's place in a tile
  Ring ring;
  int left;   // pieces of the warp that have not become fragments
  int stage;  // of the piece that becomes fragments
  Bf16Scale scale = Bf16Scale(1.0f);  // and its scale
  Half halves[2];
  float total[kTiles][kTokens / 2];
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Shared memory of a CTA that keeps x of its whole range.
template <int kTokens, int kTiles>
int64_t whole_range_bytes_w8a16(const Product& product) {
  const Format format = Format::kW8a16;
  const int64_t pieces = ceil_divide(pieces_of(format, product), ranges_of(format, product));
  return WideW8a16Shape<kTokens, kTiles>::shared_bytes(static_cast<int>(pieces));
}

// Launch `kernel` for up to kTokens tokens: a CTA for each range of kRowsOfCta rows.
template <int kTokens, int kTiles>
cudaError_t launch_wide_w8a16(void (*kernel)(Stream), const Product& product, int64_t first_token, int tokens,
                              cudaStream_t stream) {
  using Shape = WideW8a16Shape<kTokens, kTiles>;
  Stream plan = plan_stream(Format::kW8a16, product, first_token, tokens);
  const int ranges = 1 << plan.range_shift;
  plan.window = static_cast<int>(ceil_divide(plan.pieces, ranges));
  while (Shape::shared_bytes(plan.window) > kMostShared) plan.window = (plan.window + 1) / 2;
  const dim3 grid(static_cast<unsigned>(ceil_divide(product.rows, Shape::kRowsOfCta)), ranges,
                  static_cast<unsigned>(product.groups));
  const auto shared = static_cast<size_t>(Shape::shared_bytes(plan.window));
  const cudaError_t status = take_all_shared_memory(reinterpret_cast<const void*>(kernel));
  return status != cudaSuccess ? status : launch_kernel(kernel, {grid, dim3(kThreads), stream, shared}, plan);
}

}  // namespace dsv4
