// Rows of the gated activation: what swiglu and swiglu_quant_* share.
//
// A CTA works on a tile of one row, a thread on one or two vectors of 8 values of h in it, blockDim.x vectors apart: 32
// bytes of bf16 to load for each vector, all of them before the first is used. Next to the bytes lies the rate of
// instructions: an element of h costs an SM as long as its bytes if it takes 35 of them, so exp and the quotient are
// approximate for bf16 (common/swiglu.cuh).
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/swiglu.cuh"

namespace dsv4 {

constexpr int kGatedCount = 8;                 // values of h in a vector
constexpr int64_t kGatedFewVectors = 1 << 17;  // what the SMs hold at once: up to here a thread has one vector

template <int kVectors, typename GateUp>
struct GatedTile {
  float h[kVectors][kGatedCount];

  // Column of vector i of this thread in the tile that starts at `first`.
  __device__ __forceinline__ static unsigned column_of(unsigned first, int i) {
    return first + (threadIdx.x + i * blockDim.x) * kGatedCount;
  }

  // `row` holds gate and up of h [width]. Threads past its end work on its last vector, which they must not write.
  template <typename T>
  __device__ __forceinline__ void compute(const T* row, unsigned width, unsigned first, const float* route_weight,
                                          float limit) {
    const unsigned last = (width - 1) / kGatedCount * kGatedCount;
    GateUp loaded[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) loaded[i].load(row, width, min(column_of(first, i), last));
    const float weight = *route_weight;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float gate[kGatedCount], up[kGatedCount];
      loaded[i].to_floats(gate, up);
      swiglu<T>(gate, up, weight, limit, h[i]);
    }
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
