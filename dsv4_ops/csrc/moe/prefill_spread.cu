// x of a prefill in bf16, to the panels of all rows that a token's pairs have (prefill.h). Values times their scales
// are exact: E4M3 times a power of two, E2M1 times E4M3.
//
// A thread takes the 32 columns of a token that two steps of the product need (order.cuh): four pieces of eight
// neighbouring columns. They make 64 bytes of a panel's row, written for each slot; two neighbours share theirs out so
// that they write neighbouring 16 bytes, 32 together. What bounds it: 2 bytes written a column and pair.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "moe/order.cuh"
#include "moe/prefill.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kThreadColumns = 32;

// Eight neighbouring columns of a token.
template <MoeFormat kFormat>
__device__ __forceinline__ void load_eight(const PrefillSpread& spread, const uint8_t* row, const uint8_t* scales,
                                           int column, float (&values)[8]) {
  if constexpr (kFormat == MoeFormat::kDense) {
    Packed<__nv_bfloat16, 8> packed;
    packed.load(reinterpret_cast<const __nv_bfloat16*>(row) + column);
    packed.to_floats(values);
  } else if constexpr (kFormat == MoeFormat::kNvfp4) {
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(row + column / 2);
    const float scale = decode_e4m3(scales[column / 16]);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = decode_e2m1(codes >> 4 * i) * scale;
  } else {
    const uint2 codes = *reinterpret_cast<const uint2*>(row + column);
    const float scale = decode_ue8m0(scales[column / spread.x_group]);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 pair = decode_e4m3x2((i < 4 ? codes.x : codes.y) >> 8 * (i % 4) & 0xFFFFu);
      values[i] = pair.x * scale;
      values[i + 1] = pair.y * scale;
    }
  }
}

// What the lane beside this one has.
__device__ __forceinline__ uint4 from_neighbour(uint4 value) {
  return {__shfl_xor_sync(kAllLanes, value.x, 1), __shfl_xor_sync(kAllLanes, value.y, 1),
          __shfl_xor_sync(kAllLanes, value.z, 1), __shfl_xor_sync(kAllLanes, value.w, 1)};
}

template <MoeFormat kFormat>
__global__ void __launch_bounds__(kThreads) prefill_spread_kernel(const __grid_constant__ PrefillSpread spread) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t token = blockIdx.x;
  const int units = spread.columns / kThreadColumns, own = blockIdx.y * kThreads + threadIdx.x;
  const int unit = min(own, units - 4 + own % 4);  // of 32 columns
  const int chunk = unit / 4, two_steps = unit % 4;
  const auto* const row = static_cast<const uint8_t*>(spread.x) + token * spread.x_stride;
  const auto* const scales = static_cast<const uint8_t*>(spread.x_scale) + token * spread.x_scale_stride;
  float values[4][8];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    load_eight<kFormat>(spread, row, scales, chunk * 128 + Order<kFormat>::first(two_steps, t), values[t]);
  }
  uint4 parts[4];  // [step % 2][half]
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    uint32_t words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int first = Order<kFormat>::among_eight(part / 2, part % 2, 0);
      const int second = Order<kFormat>::among_eight(part / 2, part % 2, 1);
      words[t] = pack_bf16x2(values[t][first], values[t][second]);
    }
    parts[part] = {words[0], words[1], words[2], words[3]};
  }
  const int odd = two_steps % 2;
  const uint4 received[2] = {from_neighbour(odd ? parts[0] : parts[1]), from_neighbour(odd ? parts[2] : parts[3])};
  const uint4 places[4] = {odd ? received[0] : parts[0], odd ? received[1] : parts[2],  // odd, odd + 2, ..
                           odd ? parts[1] : received[0], odd ? parts[3] : received[1]};
  if (own != unit) return;
  const int64_t panel = (chunk * 2 + two_steps / 2) * spread.capacity;
  for (int slot = 0; slot < spread.k; ++slot) {
    const int64_t to = spread.row_of_pair != nullptr ? spread.row_of_pair[token * spread.k + slot] : token;
    if (to < 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = (2 * i + odd) ^ static_cast<int>(to % 8);
      ptx::store(spread.panels + (panel + to) * 128 + place * 16, places[i]);
    }
  }
}

// The codes of x as they are, for a folded product, and the scales of their 128 columns behind them. A thread takes the
// 32 columns of a token that a step needs and writes them as neighbouring 32 bytes.
__global__ void __launch_bounds__(kThreads) prefill_spread_codes_kernel(const __grid_constant__ PrefillSpread spread) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t token = blockIdx.x;
  const int unit = blockIdx.y * kThreads + threadIdx.x, chunk = unit / 4, step = unit % 4;
  if (unit >= spread.columns / kThreadColumns) return;
  const auto* const row = static_cast<const uint8_t*>(spread.x) + token * spread.x_stride + chunk * 128 + step * 8;
  const auto* const scales = static_cast<const uint8_t*>(spread.x_scale) + token * spread.x_scale_stride;
  uint32_t halves[2][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const uint2 codes = *reinterpret_cast<const uint2*>(row + 32 * t);
    halves[0][t] = __byte_perm(codes.x, codes.y, 0x6420);
    halves[1][t] = __byte_perm(codes.x, codes.y, 0x7531);
  }
  const float scale = decode_ue8m0(scales[chunk]);
  auto* const panel_scales = reinterpret_cast<float*>(spread.panels + spread.columns * spread.capacity);
  for (int slot = 0; slot < spread.k; ++slot) {
    const int64_t to = spread.row_of_pair[token * spread.k + slot];
    if (to < 0) continue;
    const int64_t place = chunk * spread.capacity + to;
    if (step == 0) panel_scales[place] = scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 words = {halves[half][0], halves[half][1], halves[half][2], halves[half][3]};
      ptx::store(spread.panels + place * 128 + ((2 * step + half) ^ static_cast<int>(to % 8)) * 16, words);
    }
  }
}

}  // namespace

cudaError_t launch_prefill_spread(const PrefillSpread& spread, cudaStream_t stream) {
  const int units = spread.columns / kThreadColumns;
  const dim3 grid(static_cast<unsigned>(spread.tokens), (units + kThreads - 1) / kThreads);
  const Launch at{grid, dim3(kThreads), stream};
  switch (spread.format) {
    case MoeFormat::kDense:
      return launch_kernel(prefill_spread_kernel<MoeFormat::kDense>, at, spread);
    case MoeFormat::kFp8:
      return launch_kernel(prefill_spread_kernel<MoeFormat::kFp8>, at, spread);
    case MoeFormat::kMxfp4:
      return launch_kernel(prefill_spread_kernel<MoeFormat::kMxfp4>, at, spread);
    case MoeFormat::kMxfp4Folded:
      return launch_kernel(prefill_spread_codes_kernel, at, spread);
    default:
      return launch_kernel(prefill_spread_kernel<MoeFormat::kNvfp4>, at, spread);
  }
}

}  // namespace dsv4
