// The routed experts where no tensor core serves: fp32, widths that are no multiples of 128, other groups of x.
//
// A warp computes one element: h of a pair and a column (two dot products of d), or the result of a pair and a column
// (one of `inner`), with operands read and dequantised value by value. Between the two a warp takes each row of h to
// its quantised values and back, in place; they are exact in bf16. Every dot product is a sum over lanes of sums over
// every 32nd value. Floor: none was aimed at; small models and fp32 checks run here.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/quantise.cuh"
#include "common/swiglu.cuh"
#include "common/vector.cuh"
#include "moe/moe.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

__device__ __forceinline__ float e2m1_at(const uint8_t* row, int column) {
  return decode_e2m1(row[column / 2] >> column % 2 * 4 & 15u);
}

template <typename T>
__device__ __forceinline__ const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

// A value of an expert's weight [rows, columns], without the global scale.
template <MoeFormat kFormat>
__device__ __forceinline__ float weight_at(const MoeWeight& w, int64_t expert, int64_t rows, int64_t columns,
                                           int64_t row, int column) {
  const int64_t line = expert * rows + row;
  if constexpr (kFormat == MoeFormat::kDense) {
    const int64_t at = line * columns + column;
    return w.dtype == Dtype::kBf16 ? to_float(as<__nv_bfloat16>(w.weight)[at]) : as<float>(w.weight)[at];
  } else if constexpr (kFormat == MoeFormat::kFp8) {
    const int64_t block_rows = (rows + 127) / 128, block_columns = (columns + 127) / 128;
    const int64_t block = (expert * block_rows + row / 128) * block_columns + column / 128;
    const float scale =
        w.dtype == Dtype::kFp32 ? as<float>(w.scale)[block] : decode_ue8m0(as<uint8_t>(w.scale)[block]);
    return decode_e4m3(as<uint8_t>(w.weight)[line * columns + column]) * scale;
  } else {
    constexpr int kGroup = kFormat == MoeFormat::kMxfp4 ? 32 : 16;
    const uint8_t scale = as<uint8_t>(w.scale)[line * (columns / kGroup) + column / kGroup];
    const float value = e2m1_at(as<uint8_t>(w.weight) + line * (columns / 2), column);
    return value * (kFormat == MoeFormat::kMxfp4 ? decode_ue8m0(scale) : decode_e4m3(scale));
  }
}

// A value of x, without the global scale.
template <MoeFormat kFormat>
__device__ __forceinline__ float x_at(const Moe& moe, int64_t token, int column) {
  const uint8_t* const row = as<uint8_t>(moe.x) + token * moe.x_stride;
  const uint8_t* const scales = as<uint8_t>(moe.x_scale) + token * moe.x_scale_stride;
  if constexpr (kFormat == MoeFormat::kDense) {
    return moe.x_dtype == Dtype::kBf16 ? to_float(as<__nv_bfloat16>(row)[column]) : as<float>(row)[column];
  } else if constexpr (kFormat == MoeFormat::kNvfp4) {
    return e2m1_at(row, column) * decode_e4m3(scales[column / 16]);
  } else {
    return decode_e4m3(row[column]) * decode_ue8m0(scales[column / moe.x_group]);
  }
}

// What a warp of a grid over pairs and columns computes.
struct Element {
  int64_t pair, token;
  int slot, column, expert;
  bool exists;  // and has an expert

  __device__ __forceinline__ Element(const Moe& moe, int columns) {
    const int blocks = (columns + kWarps - 1) / kWarps;
    pair = blockIdx.x / blocks;
    column = static_cast<int>(blockIdx.x % blocks) * kWarps + threadIdx.x / kWarp;
    token = pair / moe.k;
    slot = static_cast<int>(pair % moe.k);
    expert = moe.ids[token * moe.ids_stride + slot];
    exists = column < columns && expert >= 0 && expert < moe.experts;
  }
};

template <typename T, MoeFormat kFormat>
__global__ void __launch_bounds__(kThreads) moe_plain_first_kernel(const __grid_constant__ Moe moe) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const Element at(moe, moe.inner);
  if (!at.exists) return;
  float gate = 0.0f, up = 0.0f;
  for (int column = threadIdx.x % kWarp; column < moe.d; column += kWarp) {
    const float x = x_at<kFormat>(moe, at.token, column);
    gate = __fmaf_rn(x, weight_at<kFormat>(moe.w1, at.expert, moe.inner, moe.d, at.column, column), gate);
    up = __fmaf_rn(x, weight_at<kFormat>(moe.w3, at.expert, moe.inner, moe.d, at.column, column), up);
  }
  gate = sum_lanes(gate);
  up = sum_lanes(up);
  if constexpr (kFormat == MoeFormat::kNvfp4) {
    const float x_global = moe.x_global[at.token * moe.x_global_stride];
    gate *= x_global * moe.w1.global[at.expert];
    up *= x_global * moe.w3.global[at.expert];
  }
  const SwigluLimit limit(moe.limit);
  const float route_weight = moe.route_weights[at.token * moe.route_stride + at.slot];
  const float h = silu<T>(limit.gate(round_to<T>(gate))) * limit.up(round_to<T>(up)) * route_weight;
  if (threadIdx.x % kWarp == 0) {
    reinterpret_cast<T*>(moe.workspace)[at.pair * moe.inner + at.column] = from_float<T>(h);
  }
}

__device__ __forceinline__ void requantise_fp8(__nv_bfloat16* row, int width) {
  const int group = width % 128 == 0 ? 128 : width % 64 == 0 ? 64 : 32, lane = threadIdx.x % kWarp;
  for (int first = 0; first < width; first += group) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = 32 * i < group ? to_float(row[first + 32 * i + lane]) : 0.0f;
    const uint32_t scale = fp8_group_scale(__uint_as_float(max_lanes(max_magnitude_bits(values))));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (32 * i >= group) continue;
      const float code = decode_e4m3(encode_e4m3(values[i] * invert_ue8m0(scale)));
      row[first + 32 * i + lane] = __float2bfloat16_rn(code * decode_ue8m0(scale));
    }
  }
}

__device__ __forceinline__ void requantise_nvfp4(__nv_bfloat16* row, int width, float* step) {
  const int lane = threadIdx.x % kWarp;
  uint32_t amax = 0;
  for (int column = lane; column < width; column += kWarp) amax = max(amax, magnitude_bits(to_float(row[column])));
  const float global = nvfp4_global_scale(__uint_as_float(max_lanes(amax)));
  if (lane == 0) *step = global;
  for (int first = 0; first < width; first += 2 * kWarp) {
    const int column = first + 2 * lane;
    float values[2];
    load_some(row + column, width - column, values);
    uint8_t codes[1];
    const float scale = decode_e4m3(quantise_nvfp4(values, Nvfp4Global(global), codes));
    const float exact[2] = {decode_e2m1(codes[0] & 15u) * scale, decode_e2m1(codes[0] >> 4) * scale};
    store_some(row + column, width - column, exact);
  }
}

// One warp a pair.
template <MoeFormat kFormat>
__global__ void __launch_bounds__(kThreads) moe_plain_requantise_kernel(const __grid_constant__ Moe moe, float* steps) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (pair >= moe.tokens * moe.k) return;
  const int expert = moe.ids[pair / moe.k * moe.ids_stride + pair % moe.k];
  if (expert < 0 || expert >= moe.experts) return;
  auto* const row = reinterpret_cast<__nv_bfloat16*>(moe.workspace) + pair * moe.inner;
  if constexpr (kFormat == MoeFormat::kNvfp4) {
    requantise_nvfp4(row, moe.inner, steps + pair);
  } else {
    requantise_fp8(row, moe.inner);
  }
}

template <typename T, MoeFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    moe_plain_second_kernel(const __grid_constant__ Moe moe, T* results, const float* steps) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const Element at(moe, moe.d);
  if (!at.exists) return;
  const T* const h = reinterpret_cast<const T*>(moe.workspace) + at.pair * moe.inner;
  float sum = 0.0f;
  for (int column = threadIdx.x % kWarp; column < moe.inner; column += kWarp) {
    sum = __fmaf_rn(to_float(h[column]),
                    weight_at<kFormat>(moe.w2, at.expert, moe.d, moe.inner, at.column, column), sum);
  }
  sum = sum_lanes(sum);
  if constexpr (kFormat == MoeFormat::kNvfp4) sum *= steps[at.pair] * moe.w2.global[at.expert];
  if (threadIdx.x % kWarp == 0) results[at.pair * moe.d + at.column] = from_float<T>(sum);
}

template <typename T, MoeFormat kFormat>
cudaError_t launch(const Moe& moe, cudaStream_t stream) {
  const int64_t pairs = moe.tokens * moe.k;
  const MoeWorkspace parts = workspace_of(moe);
  auto* const results = reinterpret_cast<T*>(moe.workspace + parts.results);
  auto* const steps = reinterpret_cast<float*>(moe.workspace + parts.steps);
  const auto at = [&](int64_t blocks) { return Launch{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream}; };
  const auto elements = [&](int columns) { return at(pairs * ((columns + kWarps - 1) / kWarps)); };
  cudaError_t status = launch_kernel(moe_plain_first_kernel<T, kFormat>, elements(moe.inner), moe);
  if constexpr (kFormat != MoeFormat::kDense) {
    const Launch rows = at((pairs + kWarps - 1) / kWarps);
    if (status == cudaSuccess) status = launch_kernel(moe_plain_requantise_kernel<kFormat>, rows, moe, steps);
  }
  if (status != cudaSuccess) return status;
  return launch_kernel(moe_plain_second_kernel<T, kFormat>, elements(moe.d), moe, results, steps);
}

}  // namespace

cudaError_t launch_moe_plain(const Moe& moe, cudaStream_t stream) {
  using bf16 = __nv_bfloat16;
  switch (moe.format) {
    case MoeFormat::kDense:
      return with_dtype(moe.x_dtype,
                        [&](auto element) { return launch<decltype(element), MoeFormat::kDense>(moe, stream); });
    case MoeFormat::kFp8: return launch<bf16, MoeFormat::kFp8>(moe, stream);
    case MoeFormat::kMxfp4: return launch<bf16, MoeFormat::kMxfp4>(moe, stream);
    case MoeFormat::kNvfp4: return launch<bf16, MoeFormat::kNvfp4>(moe, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
