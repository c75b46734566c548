// Which experts a block of tokens takes, and with which pairs: found by every CTA for itself, from the ids.
//
// A pair is one slot of one token, numbered token * k + slot. Pairs sorted by expert, and by their number where the
// expert is the same, are cut into groups of one expert of at most `capacity` pairs. The order depends on nothing but
// the ids, and a pair's rank is counted, not scanned for: everybody compares its pair with all others.
#pragma once

#include <cstdint>

#include "common/divisor.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "moe/moe.h"

namespace dsv4::moe {

constexpr int kBlockPairs = 2048;  // pairs that are sorted together
constexpr int kExpertsMost = 1 << 16;

// ids of all tokens, and the pairs of a block among them.
struct PairIds {
  const int* ids;
  int64_t stride;  // ids from token to token
  Divisor k;
  int experts;
  int capacity;
};

class PairGroups {
 public:
  // Bytes of shared memory for `pairs` pairs, a multiple of 16.
  __host__ __device__ static int shared_bytes(int pairs) { return padded(pairs) * 4 + padded(2 * pairs + 1) * 2; }

  __device__ __forceinline__ PairGroups(uint8_t* shared, int most_pairs)
      : keys_(reinterpret_cast<uint32_t*>(shared)),
        order_(reinterpret_cast<uint16_t*>(keys_ + padded(most_pairs))),
        heads_(order_ + most_pairs) {}

  // The pairs first .. first + pairs - 1. Called by all threads of a CTA together; ends with a barrier.
  __device__ __forceinline__ void find(const PairIds& in, int64_t first_token, int pairs) {
    if (pairs <= kWarp) {
      find_few(in, first_token, pairs);
    } else {
      find_many(in, first_token, pairs);
    }
  }

  __device__ __forceinline__ int count() const { return groups_; }
  __device__ __forceinline__ int pairs_of(int group) const { return heads_[group + 1] - heads_[group]; }
  __device__ __forceinline__ int expert_of(int group) const { return expert_at(place_of(group)); }
  // Where a group starts in the order; the group `count()` would start behind all pairs that have an expert.
  __device__ __forceinline__ int place_of(int group) const { return heads_[group]; }
  // Number in the block of the pair at a place, and its expert.
  __device__ __forceinline__ int pair_at(int place) const { return order_[place] & ~kHead; }
  __device__ __forceinline__ int expert_at(int place) const { return keys_[pair_at(place)] >> kPairBits; }

 private:
  static constexpr int kPairBits = 11;
  static constexpr uint32_t kNobody = 1u << 31;  // above every expert
  static constexpr uint16_t kHead = 1u << 15, kNoPair = 0xFFFF;
  static_assert(kBlockPairs == 1 << kPairBits && (int64_t{kExpertsMost} << kPairBits) <= kNobody, "keys of 32 bits");

  static __device__ __forceinline__ uint32_t key_of(const PairIds& in, int64_t first_token, int pair) {
    const int token = in.k.divide(pair), slot = pair - token * static_cast<int>(in.k.value());
    const int id = ptx::load_relaxed(in.ids + (first_token + token) * in.stride + slot);
    return (id >= 0 && id < in.experts ? static_cast<uint32_t>(id) << kPairBits : kNobody) | pair;
  }

  // A pair a lane: every warp finds all groups, so that one barrier is enough, and the first writes them down.
  __device__ __forceinline__ void find_few(const PairIds& in, int64_t first_token, int pairs) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t key = lane < pairs ? key_of(in, first_token, lane) : ~0u;
    const uint32_t expert = key >> kPairBits << kPairBits;
    int rank = 0, others = 0;  // pairs in front of this one, and those of them with another expert
    for (int i = 0; i < pairs; ++i) {
      const uint32_t other = __shfl_sync(kAllLanes, key, i);
      rank += other < key;
      others += other < expert;
    }
    const bool valid = key < kNobody, head = valid && (rank - others) % in.capacity == 0;
    const uint32_t heads = __reduce_or_sync(kAllLanes, head ? 1u << rank : 0);  // of places
    const int all_valid = __popc(__ballot_sync(kAllLanes, valid));
    groups_ = __popc(heads);
    if (threadIdx.x < kWarp) {
      if (lane < pairs) {
        keys_[lane] = key;
        order_[rank] = valid ? static_cast<uint16_t>(lane | (head ? kHead : 0)) : kNoPair;
      }
      if (head) heads_[__popc(heads & ((1u << rank) - 1))] = rank;
      if (lane == 0) heads_[groups_] = all_valid;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void find_many(const PairIds& in, int64_t first_token, int pairs) {
    const int threads = static_cast<int>(blockDim.x);
    for (int pair = threadIdx.x; pair < padded(pairs); pair += threads) {
      keys_[pair] = pair < pairs ? key_of(in, first_token, pair) : ~0u;
    }
    __syncthreads();
    for (int pair = threadIdx.x; pair < pairs; pair += threads) {
      const uint32_t key = keys_[pair], expert = key >> kPairBits << kPairBits;
      int rank = 0, others = 0;  // as in find_few
      for (int i = 0; i < padded(pairs); i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys_ + i);
        rank += (four.x < key) + (four.y < key) + (four.z < key) + (four.w < key);
        others += (four.x < expert) + (four.y < expert) + (four.z < expert) + (four.w < expert);
      }
      const bool head = (rank - others) % in.capacity == 0;
      order_[rank] = key >= kNobody ? kNoPair : static_cast<uint16_t>(pair | (head ? kHead : 0));
    }
    __syncthreads();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    groups_ = 0;
    int valid = 0;
    for (int word = 0; word * kWarp < pairs; ++word) {
      const int place = word * kWarp + lane;
      const uint16_t entry = place < pairs ? order_[place] : kNoPair;
      const bool head = entry != kNoPair && (entry & kHead) != 0;
      const uint32_t heads = __ballot_sync(kAllLanes, head);
      if (head && word % (threads / kWarp) == warp) heads_[groups_ + __popc(heads & ((1u << lane) - 1))] = place;
      groups_ += __popc(heads);
      valid += __popc(__ballot_sync(kAllLanes, entry != kNoPair));
    }
    if (threadIdx.x == 0) heads_[groups_] = valid;
    __syncthreads();
  }

  __host__ __device__ static int padded(int count) { return (count + 7) / 8 * 8; }

  uint32_t* keys_;   // expert and number of every pair
  uint16_t* order_;  // pairs by expert; the first of a group is marked
  uint16_t* heads_;  // where in `order_` each group starts, and where the last one ends
  int groups_ = 0;
};

}  // namespace dsv4::moe
