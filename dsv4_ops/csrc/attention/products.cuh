// The consuming warpgroups: queries in shared memory, scores and output by wgmma, weights of a unit.
#pragma once

#include "attention/producer.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "common/ptx_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace dsv4 {

// Of each thread of this warpgroup from here on; before it had kBefore.
template <int kBefore, int kRegisters>
__device__ __forceinline__ void change_registers() {
  if constexpr (kRegisters > kBefore) ptx::take_registers<kRegisters>();
  if constexpr (kRegisters < kBefore) ptx::give_registers<kRegisters>();
}

// The queries of kHeads heads, of which the first `heads` exist, into the slabs of `query`, by `threads` threads. All
// that a thread copies is under way at once.
template <int kHeads>
__device__ __forceinline__ void load_queries(const __nv_bfloat16* q, int64_t stride, int heads, uint8_t* query,
                                             int thread, int threads) {
  const auto place = [&](int head, int chunk) {
    return query + chunk / 8 * kHeads * kRowBytes + chunk_offset(head, chunk % 8);
  };
  const auto load = [&](int head, int chunk) {
    return head < heads ? ptx::load_once(q + head * stride + chunk * 8) : uint4{0, 0, 0, 0};
  };
  for (int i = thread; i < kHeads * kNopeChunks; i += threads) {
    const int head = i / kNopeChunks, chunk = i % kNopeChunks;
    const bool exists = head < heads;
    ptx::cp_async_16(place(head, chunk), exists ? q + head * stride + chunk * 8 : q, exists ? 16 : 0);
  }
  ptx::cp_async_commit();
  for (int i = thread; i < kHeads * 4; i += threads) {
    const int head = i / 4, chunk = kNopeChunks + i % 4 * 2;
    uint4 first = load(head, chunk), second = load(head, chunk + 1);
    split_pairs(first, second);
    *reinterpret_cast<uint4*>(place(head, chunk)) = first;
    *reinterpret_cast<uint4*>(place(head, chunk + 1)) = second;
  }
  ptx::cp_async_wait<0>();
}

// scores [64 keys, kHeads] = keys . queries over slabs kFirst .. kLast - 1, added to those of the slabs before; `keys`
// are those of slab kFirst, a slab of queries has kRows heads. Under way until waited for.
template <int kHeads, int kFirst, int kLast, int kRows = kHeads>
__device__ __forceinline__ void multiply_slabs(uint32_t keys, uint32_t query, float (&scores)[kHeads / 2]) {
  const uint64_t a = ptx::wgmma_descriptor(keys, 16, 1024, true);
  const uint64_t b = ptx::wgmma_descriptor(query, 16, 1024, true);
  ptx::pin_registers(scores);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = kFirst * 4; step < kLast * 4; ++step) {
    const int slab = step / 4, inside = step % 4 * 32;
    ptx::wgmma<kHeads, false, false>(scores, ptx::advance_descriptor(a, (slab - kFirst) * kSlabBytes + inside),
                                     ptx::advance_descriptor(b, slab * kRows * kRowBytes + inside), step > 0);
  }
  ptx::wgmma_commit();
}

template <int kHeads>
__device__ __forceinline__ void multiply_queries(uint32_t keys, uint32_t query, float (&scores)[kHeads / 2]) {
  multiply_slabs<kHeads, 0, kSlabs>(keys, query, scores);
}

// Weights of 8 heads and a unit: core matrices of 8 keys x 8 heads.
constexpr int kWeightBytes = kUnit * 8 * 2;

// output [64 dimensions of a slab, kHeads] = keys^T . weights, under way until waited for. From the weights of 8 heads
// to those of the next 8 are kStride bytes.
template <int kHeads, int kStride = kWeightBytes>
__device__ __forceinline__ void multiply_weights(uint32_t keys, uint32_t weights, int slab,
                                                 float (&output)[kHeads / 2]) {
  const uint64_t a = ptx::wgmma_descriptor(keys + slab * kSlabBytes, 16, 1024, true);
  const uint64_t b = ptx::wgmma_descriptor(weights, 128, kStride, false);
  ptx::pin_registers(output);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kUnit / 16; ++step) {
    ptx::wgmma<kHeads, true, true>(output, ptx::advance_descriptor(a, step * 2048),
                                   ptx::advance_descriptor(b, step * 256), step > 0);
  }
  ptx::wgmma_commit();
}

// Wait until at most `pending` slabs of output are under way; a constant once loops are unrolled.
__device__ __forceinline__ void wait_for_slab(int pending) {
  switch (pending) {
    case 0:
      return ptx::wgmma_wait<0>();
    case 1:
      return ptx::wgmma_wait<1>();
    case 2:
      return ptx::wgmma_wait<2>();
    default:
      return ptx::wgmma_wait<3>();
  }
}

// Where the warps of a warpgroup exchange what they find about a unit.
struct Exchange {
  uint8_t* weights;  // [kHeads / 8] times kWeightBytes, kStride bytes apart
  float* largest;    // [kHeads][4], of each warp
  float* sum;        // [kHeads][4]
};

// Weights exp2(score - largest) of a unit from its scores, to memory in bf16, and the sums of each warp's: to be read
// after the caller's barrier and, by wgmma, its fence. The largest score of head number thread % kHeads.
template <int kHeads, int kStride = kWeightBytes>
__device__ __forceinline__ float weigh(float (&scores)[kHeads / 2], uint64_t valid, const Exchange& memory,
                                       int barrier) {
  const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  float values[kColumns<kHeads>];
  if (valid != ~uint64_t{0}) {
    const uint64_t mine = valid >> (16 * warp + lane / 4);
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) scores[i] = mine >> (i / 2 % 2 * 8) & 1 ? scores[i] : -INFINITY;
  }
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    const int i = column / 2 * 4 + column % 2;
    values[column] = fmaxf(scores[i], scores[i + 2]);
  }
  reduce_columns<kHeads>(values, memory.largest, Larger());
  ptx::named_barrier(barrier, kWarpgroup);
  const float own_largest = combine_warps(memory.largest, thread % kHeads, Larger()) * kScoreScale;
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    const float largest = combine_warps(memory.largest, head_of_column(column, lane), Larger()) * kScoreScale;
    const float offset = largest == -INFINITY ? 0.0f : -largest;
    const int i = column / 2 * 4 + column % 2;
    scores[i] = ptx::ex2_approx_ftz(__fmaf_rn(scores[i], kScoreScale, offset));
    scores[i + 2] = ptx::ex2_approx_ftz(__fmaf_rn(scores[i + 2], kScoreScale, offset));
    values[column] = __fadd_rn(scores[i], scores[i + 2]);
  }
#pragma unroll
  for (int i = 0; i < kHeads / 2; i += 2) {
    const int place = i / 4 * kStride + (2 * warp + i / 2 % 2) * 128 + lane * 4;
    *reinterpret_cast<uint32_t*>(memory.weights + place) = pack_bf16(scores[i], scores[i + 1]);
  }
  reduce_columns<kHeads>(values, memory.sum, Sum());
  return own_largest;
}

}  // namespace dsv4
#endif  // __CUDA_ARCH_FEAT_SM90_ALL
