// How a CTA finds the k-th largest of its keys and notes the winners (index_select.cu): a histogram of bins, and a map
// of bits. All its kThreads threads call the functions that have a barrier.
#pragma once

#include <cstdint>

#include "common/ordered.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

constexpr int kBinBits = 10;
constexpr uint32_t kBins = 1u << kBinBits;
constexpr uint32_t kFew = 256;  // keys that are ranked against each other

// The bin with the wanted rank, keys above it and in it.
struct Cut {
  uint32_t bin, above, inside;
};

struct Exchange {
  uint32_t histogram[kBins + 1];  // the last one is not looked at
  uint32_t few[kFew], places[kFew];
  uint32_t of_warp[2][kWarp];
  uint32_t few_count, candidates;
  Cut cut;
};

__device__ __forceinline__ uint32_t sum_if(const uint32_t* of_warp, bool counts) {
  return __reduce_add_sync(kAllLanes, counts ? of_warp[threadIdx.x % kWarp] : 0u);
}

// Sum over the lanes before this one.
__device__ __forceinline__ uint32_t sum_of_lower_lanes(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
  uint32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - value;
}

// ---- the bin of the k-th largest ----

// Smallest and largest of some keys; 0 stands for no entry and is neither.
struct Range {
  uint32_t below = 0xFFFFFFFFu;  // the smallest, less one
  uint32_t high = 0;

  __device__ __forceinline__ void add(uint32_t key) {
    below = min(below, key - 1);
    high = max(high, key);
  }
};

// Over all threads; a barrier, after which the CTA also sees what was written to shared memory.
template <int kThreads>
__device__ __forceinline__ Range merge(Range own, Exchange& exchange) {
  constexpr int warps = kThreads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t below = __reduce_min_sync(kAllLanes, own.below), high = __reduce_max_sync(kAllLanes, own.high);
  if (lane == 0) {
    exchange.of_warp[0][warp] = below;
    exchange.of_warp[1][warp] = high;
  }
  __syncthreads();
  Range range;
  range.below = __reduce_min_sync(kAllLanes, lane < warps ? exchange.of_warp[0][lane] : 0xFFFFFFFFu);
  range.high = __reduce_max_sync(kAllLanes, lane < warps ? exchange.of_warp[1][lane] : 0u);
  return range;
}

// Bins of equal width between the smallest and the largest score.
struct ScoreBins {
  float bottom, bins_per_unit;

  __device__ __forceinline__ explicit ScoreBins(const Range& range) {
    bottom = from_ordered(range.below + 1);
    bins_per_unit = (kBins - 1) / (from_ordered(range.high) - bottom);
  }

  // Whether scores and widths are finite; false where one is NaN, and where all scores are equal.
  __device__ __forceinline__ bool usable() const {
    return bins_per_unit > 0.0f && bins_per_unit < __builtin_huge_valf() && bottom > -__builtin_huge_valf();
  }

  // The bin less `first`, modulo 2^32; a number above kBins for NaN and for what lies half a bin below the bottom. The
  // last bits of a sum with 2^23 are the integer next to the other summand.
  __device__ __forceinline__ uint32_t from(uint32_t first, float score) const {
    const float shifted = __fmaf_rn(__fsub_rn(score, bottom), bins_per_unit, 0x1p23f);
    return __float_as_uint(shifted) - (0x4B000000u + first);
  }
};

// visit(score, i) for each of `count` scores in shared memory, a multiple of 4.
template <int kThreads, typename Visit>
__device__ __forceinline__ void for_each_four(const float* scores, int count, Visit visit) {
#pragma unroll 4
  for (int i = 4 * threadIdx.x; i < count; i += 4 * kThreads) visit(*reinterpret_cast<const float4*>(scores + i), i);
}

// The bin with the `rank`-th largest. count_bins(histogram) counts; the histogram is zero before and after.
template <int kThreads, typename Count>
__device__ __forceinline__ Cut find_cut(const Count& count_bins, uint32_t rank, Exchange& exchange) {
  constexpr int kWarps = kThreads / kWarp, kOwn = kBins / kThreads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  count_bins(exchange.histogram);
  if (threadIdx.x == 0) exchange.few_count = 0;
  __syncthreads();

  uint32_t own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = exchange.histogram[threadIdx.x * kOwn + i];
    exchange.histogram[threadIdx.x * kOwn + i] = 0;
    sum += own[i];
  }
  uint32_t from_here = sum;  // bins of this lane and of higher ones
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_down_sync(kAllLanes, from_here, distance);
    if (lane + distance < kWarp) from_here += other;
  }
  if (lane == 0) exchange.of_warp[0][warp] = from_here;
  __syncthreads();
  uint32_t above = sum_if(exchange.of_warp[0], lane > warp && lane < kWarps) + from_here - sum;
  if (above < rank && rank <= above + sum) {
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      if (above < rank && rank <= above + own[i]) {
        exchange.cut = {static_cast<uint32_t>(threadIdx.x * kOwn + i), above, own[i]};
      }
      above += own[i];
    }
  }
  __syncthreads();
  return exchange.cut;
}

// The bin with the `rank`-th largest of `count` scores in shared memory, a multiple of 4.
template <int kThreads>
__device__ __forceinline__ Cut find_cut(const float* scores, int count, const ScoreBins& bins, uint32_t rank,
                                        Exchange& exchange) {
  const auto count_bins = [&](uint32_t* histogram) {
    for_each_four<kThreads>(scores, count, [&](float4 four, int) {
      atomicAdd(histogram + min(bins.from(0, four.x), kBins), 1u);
      atomicAdd(histogram + min(bins.from(0, four.y), kBins), 1u);
      atomicAdd(histogram + min(bins.from(0, four.z), kBins), 1u);
      atomicAdd(histogram + min(bins.from(0, four.w), kBins), 1u);
    });
  };
  return find_cut<kThreads>(count_bins, rank, exchange);
}

// ---- the map of winners ----

// A byte has the bits of four neighbours, so that whoever looks at four writes a byte and nothing is combined.
constexpr int kMapWord = 16;  // entries of a word

__device__ __forceinline__ void set_bit(uint32_t* map, uint32_t place) {
  atomicOr(map + place / kMapWord, 1u << (place % kMapWord / 4 * 8 + place % 4));
}

// Put a score of the last bin on the list of those that are ranked.
__device__ __forceinline__ void put_few(Exchange& exchange, float score, uint32_t place) {
  const uint32_t i = atomicAdd(&exchange.few_count, 1u);
  exchange.few[i] = __float_as_uint(score);
  exchange.places[i] = place;
}

// The bits of the `wanted` best on the list, then a barrier.
template <int kThreads>
__device__ __forceinline__ void rank_few(uint32_t wanted, uint32_t* map, Exchange& exchange) {
  __syncthreads();
  const uint32_t count = exchange.few_count;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const float own = __uint_as_float(exchange.few[i]);
    const uint32_t place = exchange.places[i];
    uint32_t better = 0;
    for (uint32_t j = 0; j < count; ++j) {
      const float other = __uint_as_float(exchange.few[j]);
      better += other > own || (other == own && exchange.places[j] < place);
    }
    if (better < wanted) set_bit(map, place);
  }
  __syncthreads();
}

// The map of those of `count` scores whose bin, less `first`, is not above `most`, and visit(score, i) for those of bin
// `first` - 1. `count` is a multiple of 16.
template <int kThreads, typename Visit>
__device__ __forceinline__ void make_map(const float* scores, int count, const ScoreBins& bins, uint32_t first,
                                         uint32_t most, uint32_t* map, Visit visit) {
  constexpr uint32_t kBefore = 0xFFFFFFFFu;
  auto* const bytes = reinterpret_cast<uint8_t*>(map);
  for_each_four<kThreads>(scores, count, [&](float4 four, int i) {
    const uint32_t x = bins.from(first, four.x), y = bins.from(first, four.y);
    const uint32_t z = bins.from(first, four.z), w = bins.from(first, four.w);
    bytes[i / 4] = (x <= most ? 1 : 0) | (y <= most ? 2 : 0) | (z <= most ? 4 : 0) | (w <= most ? 8 : 0);
    if (max(max(x, y), max(z, w)) != kBefore) return;
    if (x == kBefore) visit(four.x, i);
    if (y == kBefore) visit(four.y, i + 1);
    if (z == kBefore) visit(four.z, i + 2);
    if (w == kBefore) visit(four.w, i + 3);
  });
}

// write(place, i) for each bit i of a map of `words` words, in order, with places from 0.
template <int kThreads, typename Write>
__device__ __forceinline__ void for_each_bit(const uint32_t* map, int words, Write write) {
  const int lane = threadIdx.x % kWarp;
  uint32_t before = 0;  // bits of this lane's words before `first`
  int next = lane;
  for (int first = threadIdx.x - lane; first < words; first += kThreads) {
#pragma unroll 4
    for (; next < first; next += kWarp) before += __popc(map[next]);
    uint32_t word = first + lane < words ? map[first + lane] : 0;
    uint32_t place = __reduce_add_sync(kAllLanes, before) + sum_of_lower_lanes(__popc(word));
    for (; word != 0; word &= word - 1) {
      const int bit = __ffs(word) - 1;
      write(place++, (first + lane) * kMapWord + bit / 8 * 4 + bit % 8);
    }
  }
}

}  // namespace dsv4
