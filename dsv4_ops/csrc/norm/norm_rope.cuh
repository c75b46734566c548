// What the three kernels around queries and the window KV are made of: one warp normalises and rotates a row (or
// several heads of one token) in registers, reading and writing every element once.
//
//   heads   y = rope(x / rms(x)), rounded once                          one warp: kRows neighbouring heads of a token
//   window  entry = pack(round(rope(round(weight * x / rms(x)))))       one warp: the row of a token
//
// A lane holds 8 neighbouring columns ("octet") of every 256 ("chunk"), so that an access of a warp is 512 consecutive
// bytes of bf16. Chunks of heads end at the end of the row: the rotated channels, at most 256, then lie in the last
// one, whatever the width. Chunks of a window row begin at its start: groups of 64 then lie in 8 neighbouring lanes.
//
// What bounds it: a token's chain of dependent reads, position -> row of the rope table; then, from a few thousand
// heads on, reading and writing every head once. The sum of a row has one order: over a lane's columns, then over lanes
// 16, 8, 4, 2, 1 apart, for any kRows.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "common/pages.cuh"
#include "common/ptx.cuh"
#include "common/rope.cuh"
#include "common/vector.cuh"
#include "norm/rope.h"

namespace dsv4 {

constexpr int kNormRopeThreads = 128;
constexpr int kNormRopeWarps = kNormRopeThreads / kWarp;
constexpr int kOctet = 8;               // columns of a lane in one chunk
constexpr int kChunk = kWarp * kOctet;  // columns of a warp in one chunk

// Up to so many heads every head has a warp of its own, and 132 SMs hold all of them at once; beyond, a warp takes four
// heads of a token, which again all are there at once up to 128 tokens of 128 heads.
constexpr int64_t kManyHeads = 4096;
constexpr int kHeadsOfAWarp = 4;

// 32 warps of an SM, 64 registers a thread: where a row is short enough for that.
template <typename T, int kChunks>
constexpr int kCtasOfAnSm = sizeof(T) == 2 && kChunks == 2 ? 8 : 1;

// Eight elements as they lie in memory.
template <typename T>
struct Octet {
  uint4 words[sizeof(T) / 2];
};

// Eight elements at `address`, zeros where `inside` is false.
template <typename T>
__device__ __forceinline__ Octet<T> load_octet(const T* address, bool inside) {
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
    octet.words[i] = inside ? reinterpret_cast<const uint4*>(address)[i] : uint4{0, 0, 0, 0};
  }
  return octet;
}

__device__ __forceinline__ void unpack(const Octet<float>& octet, float (&values)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; i += 4) {
    const uint4 words = octet.words[i / 4];
    values[i] = __uint_as_float(words.x);
    values[i + 1] = __uint_as_float(words.y);
    values[i + 2] = __uint_as_float(words.z);
    values[i + 3] = __uint_as_float(words.w);
  }
}

__device__ __forceinline__ void unpack(const Octet<__nv_bfloat16>& octet, float (&values)[kOctet]) {
  const uint32_t pairs[] = {octet.words[0].x, octet.words[0].y, octet.words[0].z, octet.words[0].w};
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    values[i] = __uint_as_float(pairs[i / 2] << 16);
    values[i + 1] = __uint_as_float(pairs[i / 2] & 0xFFFF0000u);
  }
}

// The same values by other instructions. Between two calls of `unpack` the compiler keeps what the first one made: 64
// registers for four heads, which then spill.
__device__ __forceinline__ void unpack_again(const Octet<__nv_bfloat16>& octet, float (&values)[kOctet]) {
  const uint32_t pairs[] = {octet.words[0].x, octet.words[0].y, octet.words[0].z, octet.words[0].w};
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    values[i] = __uint_as_float(__byte_perm(pairs[i / 2], 0, 0x1044));
    values[i + 1] = __uint_as_float(__byte_perm(pairs[i / 2], 0, 0x3244));
  }
}

__device__ __forceinline__ void unpack_again(const Octet<float>& octet, float (&values)[kOctet]) {
  unpack(octet, values);
}

// Sum of squares of this lane's columns of a row.
template <typename T, int kChunks>
__device__ __forceinline__ float square_sum(const Octet<T> (&row)[kChunks]) {
  float sum = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    float values[kOctet];
    unpack(row[chunk], values);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sum = fmaf(values[i], values[i], sum);
  }
  return sum;
}

// 1 / rms from the sum of squares, with the roundings of torch: mean, eps, root, reciprocal.
__device__ __forceinline__ float inverse_rms(float sum, int width, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(width)), eps)));
}

// sums[row] of all lanes -> 1 / rms of every row in every lane. Halves of the warp swap rows until a lane has one left,
// so four rows cost six exchanges and one root; each row is summed in the order of sum_lanes.
template <int kRows>
__device__ __forceinline__ void inverse_rms_of_rows(float (&sums)[kRows], int width, float eps) {
  static_assert((kRows & (kRows - 1)) == 0 && kRows <= kWarp, "a power of two of rows");
  int distance = kWarp / 2;
#pragma unroll
  for (int rows = kRows; rows > 1; rows /= 2, distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int row = 0; row < rows / 2; ++row) {
      const float kept = upper ? sums[row + rows / 2] : sums[row];
      const float given = upper ? sums[row] : sums[row + rows / 2];
      sums[row] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
  const float inverse = inverse_rms(sum_lanes<kWarp / kRows>(sums[0]), width, eps);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    sums[row] = kRows == 1 ? inverse : __shfl_sync(kAllLanes, inverse, row * (kWarp / kRows));
  }
}

// Which heads a warp owns: kRows neighbouring ones of one token. Warps past the last token own none.
struct HeadsOfWarp {
  uint32_t token;
  int head;  // the first one
  const int32_t* position;
};

template <int kRows>
__device__ __forceinline__ HeadsOfWarp heads_of_warp(const Heads& q, const Rope& rope, uint32_t warp) {
  const uint32_t warps_of_token = (q.heads + kRows - 1) / kRows;
  const uint32_t token = warp / warps_of_token;
  return {token, static_cast<int>(warp % warps_of_token * kRows), position_of(rope, token)};
}

template <typename T, int kChunks, int kRows>
__device__ __forceinline__ void norm_rope_heads(const Heads& q, const Rope& rope, float eps, const HeadsOfWarp& own) {
  if (own.token >= q.tokens) return;
  const int64_t row = own.token * static_cast<int64_t>(q.heads) + own.head;
  const int first = q.dim - kChunks * kChunk + threadIdx.x % kWarp * kOctet;  // column of chunk 0; negative: none
  const int first_rotated = first + (kChunks - 1) * kChunk - (q.dim - rope.dim);

  // 1. Everything is on its way before anything is used.
  const float* const angles = rope_row(rope.table, rope.dim, *own.position);
  const T* x = static_cast<const T*>(q.x) + row * q.stride + first;
  Octet<T> rows[kRows][kChunks];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const bool inside = own.head + r < q.heads && first + chunk * kChunk >= 0;
      rows[r][chunk] = load_octet(x + chunk * kChunk, inside);
    }
    x += q.stride;
  }
  float2 turns[kOctet / 2];
  load_turns<kOctet>(angles, first_rotated, turns);

  // 2. 1 / rms.
  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) scale[r] = square_sum(rows[r]);
  inverse_rms_of_rows(scale, q.dim, eps);

  // 3. Scaled, rotated, rounded.
  T* y = static_cast<T*>(q.y) + row * q.out_stride + first;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float values[kOctet];
      unpack_again(rows[r][chunk], values);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = __fmul_rn(values[i], scale[r]);
      if (chunk == kChunks - 1) rotate(values, first_rotated, turns);
      const bool inside = own.head + r < q.heads && first + chunk * kChunk >= 0;
      if (inside) store_floats(y + chunk * kChunk, values);
    }
    y += q.out_stride;
  }
}

// What a warp of a window row knows before the row is there.
template <int kChunks>
struct WindowRowOfWarp {
  uint32_t token;
  const int32_t* position;
  float weights[kChunks][kOctet];  // zeros past the end of the row
};

template <int kChunks>
__device__ __forceinline__ WindowRowOfWarp<kChunks> window_row_of_warp(const WindowRows& kv, const Rope& rope,
                                                                       uint32_t warp) {
  WindowRowOfWarp<kChunks> own{warp, position_of(rope, warp), {}};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int column = threadIdx.x % kWarp * kOctet + chunk * kChunk;
    const bool inside = column < kv.dim;
    if (kv.weight_dtype == Dtype::kBf16) {
      unpack(load_octet(static_cast<const __nv_bfloat16*>(kv.weight) + column, inside), own.weights[chunk]);
    } else {
      unpack(load_octet(static_cast<const float*>(kv.weight) + column, inside), own.weights[chunk]);
    }
  }
  return own;
}

template <typename T, int kChunks>
__device__ __forceinline__ void norm_rope_append_row(const WindowRows& kv, const Rope& rope, float eps,
                                                     const WindowRowOfWarp<kChunks>& own) {
  if (own.token >= kv.tokens) return;
  const int first = threadIdx.x % kWarp * kOctet;  // column of chunk 0
  const int nope = kv.dim - rope.dim;

  // 1. Everything is on its way before anything is used.
  const int32_t position = *own.position;
  const T* const x = static_cast<const T*>(kv.x) + own.token * kv.stride + first;
  Octet<T> row[kChunks];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    row[chunk] = load_octet(x + chunk * kChunk, first + chunk * kChunk < kv.dim);
  }
  if (position < 0) return;  // the whole warp
  const int ring = kv.pool.max_pages * kv.pool.page_size;
  const Entry entry = find_entry(kv.pool, own.token / rope.tokens, position % ring);
  const float* const angles = rope_row(rope.table, rope.dim, position);
  float2 turns[kChunks][kOctet / 2];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int column = first + chunk * kChunk;
    load_turns<kOctet>(angles, column < kv.dim ? column - nope : -kOctet, turns[chunk]);
  }

  // 2. Normed and rounded, rotated and rounded, quantised.
  const float scale = inverse_rms(sum_lanes(square_sum(row)), kv.dim, eps);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int column = first + chunk * kChunk;
    float values[kOctet];
    unpack_again(row[chunk], values);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      values[i] = round_to<T>(__fmul_rn(own.weights[chunk][i], __fmul_rn(values[i], scale)));
    }
    rotate(values, column - nope, turns[chunk]);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[i] = round_to<T>(values[i]);
    write_kv(kv.pool, entry, kv.dim, rope.dim, column, values, column < kv.dim);
  }
}

// ---- launching ----

// Warps that cover the heads, `kRows` of one token each.
template <int kRows>
int64_t warps_of(const Heads& q) {
  return q.tokens * ((q.heads + kRows - 1) / kRows);
}

// CTAs that hold so many warps.
inline int64_t ctas_of(int64_t warps) { return (warps + kNormRopeWarps - 1) / kNormRopeWarps; }

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// function(Constant<chunks>{}): how many chunks a lane has of a row of `dim` columns.
template <typename Function>
cudaError_t with_chunks(int dim, Function function) {
  static_assert(kNormRopeMaxDim == 4 * kChunk && kNormRopeMaxRopeDim == kChunk, "what bind_rope.cpp lets through");
  return dim <= 2 * kChunk ? function(Constant<2>{}) : function(Constant<4>{});
}

// function(element of q, Constant<chunks>{}, Constant<rows of a warp>{}).
template <typename Function>
cudaError_t with_heads_tactic(const Heads& q, Function function) {
  if (q.tokens * q.heads >= INT32_MAX) return cudaErrorInvalidValue;  // the kernels count heads in 32 bits
  return with_dtype(q.dtype, [&](auto element) {
    return with_chunks(q.dim, [&](auto chunks) {
      if constexpr (sizeof(element) == 2 && chunks == 2) {
        if (q.tokens * q.heads > kManyHeads) return function(element, chunks, Constant<kHeadsOfAWarp>{});
      }
      return function(element, chunks, Constant<1>{});
    });
  });
}

}  // namespace dsv4
