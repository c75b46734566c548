// y = the results of a token's pairs added in the order of its slots, in fp32; a slot without an expert adds nothing.
// What the shared expert made of the token, where it is given, is added last, and the sum rounded once to its dtype.
//
// One thread adds neighbouring columns of a token: eight, or two where a decode step has so few that its threads would
// fill a few CTAs only (one, where d is no multiple of eight). All loads of a thread are under way together. Floor: a
// launch and one read; the results, 12 d bytes a token with 6 slots, lie in L2. In a decode step its CTAs have room for
// their registers beside the last of the experts' kernels, and wait there for its end.
#include <type_traits>

#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "moe/moe.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kSlotsAtOnce = 8;  // whose loads are under way together
constexpr int kSms = 132;        // of an H200
constexpr int kCtasOfFew = 16;   // on an SM, where a thread has few columns: 32 registers each

struct Combine {
  const uint8_t* results;
  const int* ids;
  int64_t ids_stride;
  int k, experts;
  int64_t d, vectors;  // all vectors of y
  Divisor row_vectors;
  const void* shared;
  int64_t shared_stride;
  void* y;
};

template <typename T, int kCount, bool kShared>
__global__ void __launch_bounds__(kThreads, kCount < 8 ? kCtasOfFew : 1)
    moe_combine_kernel(const __grid_constant__ Combine in) {
  using Output = std::conditional_t<kShared, T, float>;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= in.vectors) return;
  const auto per_row = static_cast<int64_t>(in.row_vectors.value());
  const int64_t token = vector < (1ll << 31) ? in.row_vectors.divide(static_cast<int>(vector)) : vector / per_row;
  const int64_t column = (vector - token * per_row) * kCount;
  const int* const ids = in.ids + token * in.ids_stride;
  const T* const results = reinterpret_cast<const T*>(in.results) + token * in.k * in.d + column;
  float shared[kCount];
  if constexpr (kShared) load_floats(static_cast<const T*>(in.shared) + token * in.shared_stride + column, shared);
  float sum[kCount] = {};
  for (int first = 0; first < in.k; first += kSlotsAtOnce) {
    float values[kSlotsAtOnce][kCount];
    bool valid[kSlotsAtOnce];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      const int slot = min(first + i, in.k - 1), id = ids[slot];
      valid[i] = first + i < in.k && id >= 0 && id < in.experts;
      load_floats(results + slot * in.d, values[i]);  // of memory that nobody wrote, if it is not valid
    }
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] += valid[i] ? values[i][j] : 0.0f;
    }
  }
  if constexpr (kShared) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum[j] += shared[j];
  }
  store_floats(static_cast<Output*>(in.y) + token * in.d + column, sum);
}

template <int kCount>
cudaError_t launch_columns(const Moe& moe, cudaStream_t stream) {
  const int64_t vectors = moe.tokens * moe.d / kCount;
  const Combine in{moe.workspace + workspace_of(moe).results,
                   moe.ids,
                   moe.ids_stride,
                   moe.k,
                   moe.experts,
                   moe.d,
                   vectors,
                   Divisor(static_cast<uint32_t>(moe.d / kCount)),
                   moe.shared,
                   moe.shared_stride,
                   moe.y};
  const Launch at{dim3(static_cast<unsigned>((vectors + kThreads - 1) / kThreads)), dim3(kThreads), stream};
  return with_dtype(moe.x_dtype, [&](auto element) {
    using T = decltype(element);
    return moe.shared != nullptr ? launch_kernel(moe_combine_kernel<T, kCount, true>, at, in)
                                 : launch_kernel(moe_combine_kernel<T, kCount, false>, at, in);
  });
}

}  // namespace

cudaError_t launch_moe_combine(const Moe& moe, cudaStream_t stream) {
  if (moe.d % 8 != 0) return launch_columns<1>(moe, stream);
  const bool few = moe.tokens * moe.d / 2 <= kSms * kThreads;
  return few ? launch_columns<2>(moe, stream) : launch_columns<8>(moe, stream);
}

}  // namespace dsv4
