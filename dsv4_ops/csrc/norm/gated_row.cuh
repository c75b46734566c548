// Rows of the gated activation: what swiglu and swiglu_quant_* share.
//
// A CTA works on a tile of one row, a thread on one or two vectors of 8 values of h in it: 32 bytes of bf16 to load for
// each vector, all of them before the first is used. Next to the bytes lies the rate of instructions: an element of h
// costs an SM as long as its bytes if it takes 35 of them. So for bf16 exp and the quotient are approximate, clamps
// take two elements at a time (common/swiglu.cuh), and the two vectors of a thread lie in one group of FP8, whose scale
// is then found once, half a group apart: a load of a warp reads whole lines.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/swiglu.cuh"

namespace dsv4 {

constexpr int kGatedCount = 8;                 // values of h in a vector
constexpr int64_t kGatedFewVectors = 1 << 17;  // what the SMs hold at once: up to here a thread has one vector

// kSpan: neighbouring columns whose vectors belong to one thread or to neighbouring ones, a divisor of the width; or 0,
// then the vectors of a thread lie blockDim.x vectors apart.
template <int kVectors, int kSpan, typename GateUp, typename T>
struct GatedTile {
  Packed<T, kGatedCount> h[kVectors];

  // Column of vector i of this thread in the tile that starts at `first`.
  __device__ __forceinline__ static unsigned column_of(unsigned first, int i) {
    if constexpr (kSpan == 0) {
      return first + (threadIdx.x + i * blockDim.x) * kGatedCount;
    } else {
      constexpr int kStep = kSpan / kVectors, kThreads = kStep / kGatedCount;  // of a span
      return first + threadIdx.x / kThreads * kSpan + threadIdx.x % kThreads * kGatedCount + i * kStep;
    }
  }

  // `row` holds gate and up of h [width]. Vectors past its end are copies of others, which must not be written.
  __device__ __forceinline__ void compute(const T* row, unsigned width, unsigned first, const float* route_weight,
                                          float limit) {
    GateUp loaded[kVectors];
    if constexpr (kSpan == 0) {
      const unsigned last = (width - 1) / kGatedCount * kGatedCount;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) loaded[i].load(row, width, min(column_of(first, i), last), 0);
    } else {
      const unsigned column = column_of(first, 0), source = column < width ? column : 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) loaded[i].load(row, width, source, i * (kSpan / kVectors));
    }
    const float weight = *route_weight;
    const SwigluLimit clamps(limit);
    if constexpr (sizeof(T) == 2 && GateUp::kPacked) {
      if (clamps.is_bf16()) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) h[i] = swiglu<true, T, kGatedCount>(loaded[i], weight, clamps);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) h[i] = swiglu<false, T, kGatedCount>(loaded[i], weight, clamps);
  }
};

// How the rows of a launch are divided: threads of a CTA with one or two vectors each, tiles of a row.
struct GatedTactic {
  int vectors, threads;
  int64_t tiles;
};

// `whole_rows`: one CTA for a row, in one tile or several.
inline GatedTactic gated_tactic(Rows rows, bool whole_rows) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t count = ceil_div(rows.width, kGatedCount);
  const bool few = rows.count * count <= kGatedFewVectors;
  const int vectors = few ? 1 : 2;
  const int most = whole_rows ? 512 : few ? 128 : 256;
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(count, vectors * kWarp) * kWarp, most));
  return {vectors, threads, ceil_div(count, vectors * threads)};
}

}  // namespace dsv4
