// h of a prefill quantised to NVFP4 with a global scale of its row, and back, in place (prefill.h): as bf16 the product
// of a code and its block scale is exact, the global scale stays a factor of the row.
//
// A CTA owns a row of panels, a thread groups of 16 columns in the order of FP4 (order.cuh): of a panel's 128 bytes the
// words t, t + 4, ... t + 28 hold the columns of group t. Bound by memory: 2 bytes read and 2 written a column.
#include "common/launch.cuh"
#include "common/quantise.cuh"
#include "common/vector.cuh"
#include "moe/order.cuh"
#include "moe/prefill.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 16;
using Fp4Order = Order<MoeFormat::kNvfp4>;

// Word `step`, `half` of the group's eight, in a row with this number.
__device__ __forceinline__ uint32_t* word_at(uint8_t* h, int64_t capacity, int64_t row, int group, int step, int half) {
  const int place = (2 * step + half) ^ static_cast<int>(row % 8);
  return reinterpret_cast<uint32_t*>(h + (group / 4 * capacity + row) * 128 + place * 16 + group % 4 * 4);
}

// Groups are numbered by panel and t; their columns are 32 t + 16 (panel % 2) .. of the panel's 128.
__device__ __forceinline__ void load_group(uint8_t* h, int64_t capacity, int64_t row, int group,
                                           float (&values)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const int step = i / 2, half = i % 2;
    const float2 pair = unpack_bf16x2(*word_at(h, capacity, row, group, step, half));
    values[step / 2 * 8 + Fp4Order::among_eight(step, half, 0)] = pair.x;
    values[step / 2 * 8 + Fp4Order::among_eight(step, half, 1)] = pair.y;
  }
}

__global__ void __launch_bounds__(kThreads)
    prefill_requant_kernel(uint8_t* h, float* factor, const int* counts, int64_t capacity, int groups) {
  __shared__ uint32_t scratch[kThreads / kWarp];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = blockIdx.x;
  if (row >= counts[1]) return;
  float values[kGroup];
  uint32_t bits = 0;
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    load_group(h, capacity, row, group, values);
    bits = max(bits, max_magnitude_bits(values));
  }
  const Nvfp4Global global(nvfp4_global_scale(__uint_as_float(max_cta<kThreads / kWarp>(bits, scratch))));
  if (threadIdx.x == 0) factor[row] = global.scale;
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    load_group(h, capacity, row, group, values);
    uint8_t packed[kGroup / 2];
    const float scale = decode_e4m3(quantise_nvfp4(values, global, packed));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = decode_e2m1(packed[i / 2] >> 4 * (i % 2)) * scale;
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      const int step = i / 2, half = i % 2;
      *word_at(h, capacity, row, group, step, half) =
          pack_bf16x2(values[step / 2 * 8 + Fp4Order::among_eight(step, half, 0)],
                      values[step / 2 * 8 + Fp4Order::among_eight(step, half, 1)]);
    }
  }
}

}  // namespace

cudaError_t launch_prefill_requant(uint8_t* h, float* factor, const PrefillRows& rows, int columns,
                                   cudaStream_t stream) {
  const Launch at{dim3(static_cast<unsigned>(rows.capacity)), dim3(kThreads), stream};
  return launch_kernel(prefill_requant_kernel, at, h, factor, rows.counts, rows.capacity, columns / kGroup);
}

}  // namespace dsv4
