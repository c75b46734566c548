// Which rows a compressor's groups consist of, and their softmax per channel.
//
// A thread owns four neighbouring channels ("quad") of an entry and some of its group's rows. Rows are weighed as they
// arrive: `largest` is the largest score so far, `total` the sum of e^(score - largest), `weighted` the sum of these
// weights times kv; when a larger score comes, both sums are scaled down.
//
// As in torch's softmax, a channel with a score of NaN or +inf, or with no score above -inf, becomes NaN. `largest`
// starts at the smallest finite number, so that a score of -inf weighs nothing instead of NaN.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/divisor.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "compressor/compressor.h"

namespace dsv4 {

constexpr int kQuad = 4;        // channels of a thread
constexpr int kRowsAtOnce = 8;  // rows of a thread whose loads are in flight together

// The tokens of a sequence in a call: positions start ... start + rows - 1.
struct Chunk {
  int start;
  int rows;
};

// Tokens come first and rows at position -1 after them: every round of 32 probes leaves 1/32 of the candidates. Each
// warp searches for itself.
__device__ __forceinline__ Chunk find_chunk(const Rope& rope, int sequence) {
  const int32_t* const positions = rope.positions + sequence * rope.stride;
  const int lane = threadIdx.x % kWarp;
  const int start = positions[0];
  int low = 0, high = rope.tokens;  // the chunk has low ... high tokens
  while (low < high) {
    const int step = (high - low + kWarp - 1) / kWarp;
    const int row = low + (lane + 1) * step - 1;
    const int found = __popc(__ballot_sync(kAllLanes, row < high && positions[min(row, high - 1)] >= 0));
    low += found * step;
    high = min(high, low + step - 1);
  }
  return {max(start, 0), low};
}

// e^(score - largest), as 2^x. x is rounded, so the weight e^-y has an error of y * e^-y * 2^-24, at most 2^-25.
__device__ __forceinline__ float weigh(float score, float largest) {
  constexpr float kLog2E = 1.44269504088896341f;
  return ptx::ex2_approx_ftz((score - largest) * kLog2E);
}

template <int kCount>
class Softmax {
 public:
  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int k = 0; k < kCount; ++k) largest[k] = -FLT_MAX, total[k] = weighted[k] = 0.0f;
  }

  // What add() makes of the first rows.
  template <int kRows>
  __device__ __forceinline__ Softmax(const float (&kv)[kRows][kCount], const float (&score)[kRows][kCount])
      : Softmax() {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      largest[k] = largest_of(k, score);
      weigh_rows(k, kv, score);
    }
  }

  template <int kRows>
  __device__ __forceinline__ void add(const float (&kv)[kRows][kCount], const float (&score)[kRows][kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      scale_to(k, largest_of(k, score));
      weigh_rows(k, kv, score);
    }
  }

  // Add what another thread has weighed, three quads that lie `distance` apart.
  __device__ __forceinline__ void add(const float4* other, int distance) {
    float other_largest[kCount], other_total[kCount], other_weighted[kCount];
    load_floats(&other[0].x, other_largest);
    load_floats(&other[distance].x, other_total);
    load_floats(&other[2 * distance].x, other_weighted);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float maximum = fmaxf(largest[k], other_largest[k]);
      scale_to(k, maximum);
      const float scale = weigh(other_largest[k], maximum);
      total[k] = fmaf(other_total[k], scale, total[k]);
      weighted[k] = fmaf(other_weighted[k], scale, weighted[k]);
    }
  }

  __device__ __forceinline__ void store(float4* shared, int distance) const {
    store_floats(&shared[0].x, largest);
    store_floats(&shared[distance].x, total);
    store_floats(&shared[2 * distance].x, weighted);
  }

  // weighted / total. A total is at least 1, the weight of the largest score, or 0 or NaN, which both give NaN.
  __device__ __forceinline__ void mean(float (&values)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float guess = ptx::rcp_approx_ftz(total[k]);
      values[k] = weighted[k] * fmaf(guess, fmaf(-total[k], guess, 1.0f), guess);
    }
  }

 private:
  template <int kRows>
  __device__ __forceinline__ float largest_of(int k, const float (&score)[kRows][kCount]) const {
    float maximum = largest[k];
#pragma unroll
    for (int row = 0; row < kRows; ++row) maximum = fmaxf(maximum, score[row][k]);
    return maximum;
  }

  template <int kRows>
  __device__ __forceinline__ void weigh_rows(int k, const float (&kv)[kRows][kCount],
                                             const float (&score)[kRows][kCount]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float weight = weigh(score[row][k], largest[k]);
      total[k] += weight;
      weighted[k] = fmaf(weight, kv[row][k], weighted[k]);
    }
  }

  __device__ __forceinline__ void scale_to(int k, float maximum) {
    const float scale = weigh(largest[k], maximum);
    largest[k] = maximum;
    total[k] *= scale;
    weighted[k] *= scale;
  }

  float largest[kCount], total[kCount], weighted[kCount];
};

// What a sequence's rows are read from and written to, for the channels of a thread: `column` on in both halves.
struct Channels {
  float* state;
  const float *kv, *score;  // of the chunk's first token
  const float* ape;
  int dim;    // from one half of a row to the other
  int width;  // from kv to score in the state, and from one row of ape to the next

  __device__ __forceinline__ Channels of_half(int half) const {
    const int shift = half * dim;
    return {state + shift, kv + shift, score + shift, ape + shift, dim, width};
  }
};

// One half of a group's rows: row i is token i of the group that the half belongs to. Rows before `kept_rows` are in
// the state, the others in the chunk.
struct Half {
  int slot;   // of row 0
  int token;  // of row 0, counted from the chunk's first
  int kept_rows;
  int rows;  // ratio, or 0 where the group has no predecessor
};

__device__ __forceinline__ Half find_half(int owner, int halves, int ratio, int start) {
  const int rows = owner < 0 ? 0 : ratio;
  return {owner % halves * ratio, owner * ratio - start, min(start - owner * ratio, rows), rows};
}

__device__ __forceinline__ void load_kept(const Channels& from, int slot, float (&kv)[kQuad], float (&score)[kQuad]) {
  const float* const row = from.state + slot * (2 * from.width);
  load_floats(row, kv);
  load_floats(row + from.width, score);
}

// Rows first, first + step, ... of a half -> kv and score + ape; a row past its end weighs nothing. `from` holds the
// half's channels.
template <int kRows>
__device__ __forceinline__ void load_rows(const Compressor& c, const Channels& from, const Half& half, int first,
                                          int step, float (*kv)[kQuad], float (*score)[kQuad]) {
  if (first + (kRows - 1) * step < half.kept_rows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_kept(from, half.slot + first + i * step, kv[i], score[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * step;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) kv[i][k] = 0.0f, score[i][k] = -INFINITY;
    if (row < half.kept_rows) load_kept(from, half.slot + row, kv[i], score[i]);
    if (row < half.kept_rows || row >= half.rows) continue;
    load_floats(from.kv + static_cast<int64_t>(half.token + row) * c.kv_stride, kv[i]);
    load_floats(from.score + static_cast<int64_t>(half.token + row) * c.score_stride, score[i]);
  }
  constexpr int kBiases = 4;  // rows at a time: more would not fit into the registers
#pragma unroll
  for (int i = 0; i < kRows; i += kBiases) {
    float bias[kBiases][kQuad] = {};
#pragma unroll
    for (int j = 0; j < kBiases; ++j) {
      const int row = first + (i + j) * step;
      if (row >= half.kept_rows && row < half.rows) load_floats(from.ape + row * from.width, bias[j]);
    }
#pragma unroll
    for (int j = 0; j < kBiases; ++j) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) score[i + j][k] += bias[j][k];
    }
  }
}

// Softmax over rows lane, lane + lanes, ... of the halves of `group`.
template <int kHalves>
__device__ __forceinline__ Softmax<kQuad> pool_rows(const Compressor& c, const Channels& from, int start, int group,
                                                    int lane, int lanes) {
  constexpr int kRows = kRowsAtOnce / kHalves;
  Half halves[kHalves];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) halves[h] = find_half(group + 1 - kHalves + h, kHalves, c.ratio, start);
  Softmax<kQuad> softmax;
#pragma unroll 1
  for (int first = lane; first < c.ratio; first += lanes * kRows) {
    float kv[kRowsAtOnce][kQuad], score[kRowsAtOnce][kQuad];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      load_rows<kRows>(c, from.of_half(h), halves[h], first, lanes, kv + h * kRows, score + h * kRows);
    }
    softmax.add(kv, score);
  }
  return softmax;
}

}  // namespace dsv4
