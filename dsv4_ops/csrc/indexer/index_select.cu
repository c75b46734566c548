// The k best entries of each row of scores, exactly: ties go to the lowest entry, entries come out in ascending order,
// then -1.
//
// A CTA owns a row. Scores arrive as integers in their order (common/ordered.cuh). A row that fits lies in
// shared memory. Of a longer one only groups of 16 entries are looked at whose largest key is at least the k-th largest
// of all groups' largest keys: k entries are at least that large, so the k best are among them, and on data without a
// pattern few others. Their keys are gathered into shared memory in the order of entries. If they do not fit (many
// ties), keys stay in memory.
//
//   1. the k-th largest key: a histogram of 2048 bins between the smallest and the largest score; the keys of the bin
//      with the k-th (usually a handful) are ranked against each other. Where they are more than 256, histograms of key
//      bits, from the highest that differ to the lowest, narrow the interval 2048-fold each time.
//   2. every thread counts the winners and the ties of its part of the row, and writes them behind those of the parts
//      before.
//
// All loops around a barrier have bounds that are the same for the whole CTA. The atomics count, in integers: the order
// in which they happen does not show.
//
// Without equal maxima k groups are looked at, 16 * k entries. Rows of up to 32 * k entries are therefore read whole,
// and room for that many keys (between 16384 and 49152) leaves room for entries of groups that tie.
//
// Shared memory, bytes: 4 a key that fits; a sixteenth of that for the list of groups (longer rows); 9504 histogram and
// exchange. Floor: 4 bytes a score, read once (long rows: 4 bytes for each 16, and 64 for each group that is looked
// at). A row has one CTA: in decode it is latency, seven barriers a row that fits, twice as many a longer one; in
// prefill it is about 30 instructions a key.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "indexer/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kBins = 2048;
constexpr int kFew = 256;          // keys that are ranked against each other
constexpr int kManyKeys = 16384;   // in shared memory
constexpr int kMostKeys = 49152;
constexpr int kAhead = 2;
constexpr int kManyThreads = 1024;
constexpr int kFewThreads = 512;   // where there are more rows than multiprocessors

struct Exchange {
  uint32_t histogram[kBins + 1];  // the last one is not looked at
  uint32_t few[kFew];
  uint32_t of_warp[2][kWarp];
  uint32_t few_count;
  uint32_t bin, above, inside;  // the bin with the wanted rank, keys above it and in it
  uint32_t key, ties;
};

// Keys above `key` win, and the first `ties` keys that are equal to it.
struct Threshold {
  uint32_t key;
  int ties;
};

__device__ __forceinline__ uint32_t sum_if(const uint32_t* of_warp, bool counts) {
  return __reduce_add_sync(kAllLanes, counts ? of_warp[threadIdx.x % kWarp] : 0u);
}

// visit(key) for each of `count` keys, and for the zeros behind them up to a multiple of four. keys(i) are four keys.
template <typename Keys, typename Visit>
__device__ __forceinline__ void for_each_key(const Keys& keys, int count, Visit visit) {
#pragma unroll 2
  for (int i = threadIdx.x; i < (count + 3) / 4; i += blockDim.x) {
    const uint4 four = keys(i);
    visit(four.x);
    visit(four.y);
    visit(four.z);
    visit(four.w);
  }
}

// Histogram of bin_of(key), kBins for keys that do not count, and the bin that holds the `rank`-th largest of all that
// count. The histogram is zero before and after.
template <typename Keys, typename Bin>
__device__ __forceinline__ void find_bin(const Keys& keys, int count, uint32_t rank, Bin bin_of, Exchange& exchange) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for_each_key(keys, count, [&](uint32_t key) { atomicAdd(&exchange.histogram[bin_of(key)], 1u); });
  if (threadIdx.x == 0) exchange.few_count = 0;
  __syncthreads();

  const int own = kBins / blockDim.x, first = threadIdx.x * own;
  uint32_t sum = 0;
  for (int i = 0; i < own; ++i) sum += exchange.histogram[first + i];
  uint32_t from_here = sum;  // bins of this lane and of higher ones
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_down_sync(kAllLanes, from_here, distance);
    if (lane + distance < kWarp) from_here += other;
  }
  if (lane == 0) exchange.of_warp[0][warp] = from_here;
  __syncthreads();
  uint32_t above = sum_if(exchange.of_warp[0], lane > warp && lane < warps) + from_here - sum;
  for (int i = own - 1; i >= 0; --i) {
    const uint32_t inside = exchange.histogram[first + i];
    if (above < rank && rank <= above + inside) {
      exchange.bin = first + i;
      exchange.above = above;
      exchange.inside = inside;
    }
    above += inside;
    exchange.histogram[first + i] = 0;
  }
  __syncthreads();
}

// The `rank`-th largest of the keys for which `counts` holds, of which there are at most kFew.
template <typename Keys, typename Counts>
__device__ __forceinline__ Threshold rank_few(const Keys& keys, int count, uint32_t rank, Counts counts,
                                              Exchange& exchange) {
  for_each_key(keys, count, [&](uint32_t key) {
    if (counts(key)) exchange.few[atomicAdd(&exchange.few_count, 1u)] = key;
  });
  __syncthreads();
  const uint32_t some = exchange.few_count;
  if (threadIdx.x < some) {
    const uint32_t key = exchange.few[threadIdx.x];
    uint32_t greater = 0, equal = 0;
    bool first = true;
    for (uint32_t i = 0; i < some; ++i) {
      const uint32_t other = exchange.few[i];
      greater += other > key;
      equal += other == key;
      first = first && !(other == key && i < threadIdx.x);
    }
    if (first && greater < rank && rank <= greater + equal) {
      exchange.key = key;
      exchange.ties = rank - greater;
    }
  }
  __syncthreads();
  return {exchange.key, static_cast<int>(exchange.ties)};
}

// Smallest and largest of some keys.
struct Range {
  uint32_t low = 0xFFFFFFFFu;
  uint32_t high = 0;

  __device__ __forceinline__ void add(uint32_t key) {
    low = min(low, key);
    high = max(high, key);
  }
};

// Over all threads; a barrier, after which the CTA also sees what was written to shared memory.
__device__ __forceinline__ Range merge(Range own, Exchange& exchange) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const uint32_t low = __reduce_min_sync(kAllLanes, own.low), high = __reduce_max_sync(kAllLanes, own.high);
  if (lane == 0) {
    exchange.of_warp[0][warp] = low;
    exchange.of_warp[1][warp] = high;
  }
  __syncthreads();
  return {__reduce_min_sync(kAllLanes, lane < warps ? exchange.of_warp[0][lane] : 0xFFFFFFFFu),
          __reduce_max_sync(kAllLanes, lane < warps ? exchange.of_warp[1][lane] : 0u)};
}

// The k-th largest of `count` > k keys, all of them in `range`.
template <typename Keys>
__device__ __forceinline__ Threshold find_threshold(const Keys& keys, int count, Range range, int k,
                                                    Exchange& exchange) {
  uint32_t low = range.low, high = range.high;
  if (low == high) {
    __syncthreads();  // exchange.of_warp is written again
    return {low, k};
  }

  // 1. bins of equal width between the smallest and the largest score, where these are finite. The last bits of a sum
  // with 2^23 are the integer next to the other summand.
  constexpr float kInfinity = __builtin_huge_valf();
  const float bottom = from_ordered(low), width = from_ordered(high) - bottom, bins_per_unit = (kBins - 1) / width;
  if (width < kInfinity && bins_per_unit < kInfinity) {  // both false for NaN
    const auto bin_of = [=](uint32_t key) {
      const float shifted = __fmaf_rn(__fsub_rn(from_ordered(key), bottom), bins_per_unit, 0x1p23f);
      return min(__float_as_uint(shifted) - 0x4B000000u, static_cast<uint32_t>(kBins));  // no entry is NaN: kBins
    };
    find_bin(keys, count, k, bin_of, exchange);
    if (exchange.inside <= kFew) {
      const uint32_t bin = exchange.bin;
      const auto counts = [=](uint32_t key) { return bin_of(key) == bin; };
      return rank_few(keys, count, k - exchange.above, counts, exchange);
    }
  }

  // 2. bins of key bits; every round leaves the keys of one bin, [low, high]
  uint32_t rank = k;
  while (true) {
    const int shift = max(21 - __clz(high - low), 0);  // leaves at most 11 bits
    const auto bin_of = [=](uint32_t key) {
      return key >= low && key <= high ? (key - low) >> shift : static_cast<uint32_t>(kBins);
    };
    find_bin(keys, count, rank, bin_of, exchange);
    rank -= exchange.above;
    low += exchange.bin << shift;
    if (shift == 0) return {low, static_cast<int>(rank)};
    high = low + min(high - low, (1u << shift) - 1);
    if (exchange.inside <= kFew) {
      const uint32_t from = low, to = high;
      const auto counts = [=](uint32_t key) { return key >= from && key <= to; };
      return rank_few(keys, count, rank, counts, exchange);
    }
  }
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

// write(place, i) for each winner, in order, with places from 0; returns how many there are. Every thread has a part of
// the keys; parts are odd multiples of 16 bytes, so that the lanes of a warp read different banks.
template <typename Keys, typename Write>
__device__ __forceinline__ int write_winners(const Keys& keys, int count, Threshold threshold, Write write,
                                             Exchange& exchange) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int fours = (count + 3) / 4, part = ((fours + blockDim.x - 1) / blockDim.x) | 1;
  const int begin = min(threadIdx.x * part, fours), end = min(begin + part, fours);
  uint32_t greater = 0, equal = 0;
  for (int i = begin; i < end; ++i) {
    const uint4 four = keys(i);
    const uint32_t each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      greater += each[j] > threshold.key;
      equal += each[j] == threshold.key;
    }
  }
  uint32_t greater_before = sum_of_lower_lanes(greater), equal_before = sum_of_lower_lanes(equal);
  if (lane == kWarp - 1) {
    exchange.of_warp[0][warp] = greater_before + greater;
    exchange.of_warp[1][warp] = equal_before + equal;
  }
  __syncthreads();
  const int all = sum_if(exchange.of_warp[0], lane < warps), all_equal = sum_if(exchange.of_warp[1], lane < warps);
  greater_before += sum_if(exchange.of_warp[0], lane < warp);
  equal_before += sum_if(exchange.of_warp[1], lane < warp);
  const uint32_t ties = threshold.ties;
  uint32_t place = greater_before + min(equal_before, ties);
  if (greater + equal > 0) {
    for (int i = begin; i < end; ++i) {
      const uint4 four = keys(i);
      const uint32_t each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool ties_in = each[j] == threshold.key && equal_before < ties;
        equal_before += each[j] == threshold.key;
        if (each[j] > threshold.key || ties_in) write(place++, 4 * i + j);
      }
    }
  }
  __syncthreads();
  return all + min(all_equal, threshold.ties);
}

// The first 4 * kAhead keys of each thread's part of a row, requested before it is known how many there are.
struct Ahead {
  uint4 keys[kAhead];

  __device__ __forceinline__ void load(const uint32_t* from, int room) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int first = 4 * (threadIdx.x + i * blockDim.x);
      if (first < room) keys[i] = *reinterpret_cast<const uint4*>(from + first);
    }
  }
};

// `count` keys to shared memory. Both lie at multiples of 16 bytes, and behind the last key zeros fill its tile.
__device__ __forceinline__ Range fetch(const Ahead& ahead, const uint32_t* from, int count, uint32_t* to) {
  Range range;
  const auto put = [&](int first, uint4 four) {
    const uint32_t keys[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < count) range.add(keys[i]);
    }
    *reinterpret_cast<uint4*>(to + first) = four;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int first = 4 * (threadIdx.x + i * blockDim.x);
    if (first < count) put(first, ahead.keys[i]);
  }
#pragma unroll 4
  for (int first = 4 * (threadIdx.x + kAhead * blockDim.x); first < count; first += 4 * blockDim.x) {
    put(first, *reinterpret_cast<const uint4*>(from + first));
  }
  return range;
}

// The largest key of every `merged` neighbouring groups, and zeros up to a multiple of four.
__device__ __forceinline__ Range fetch_maxima(const uint32_t* maxima, int groups, int merged, uint32_t* to) {
  const int count = (groups + merged - 1) / merged;
  Range range;
#pragma unroll 4
  for (int i = threadIdx.x; i < (count + 3) / 4 * 4; i += blockDim.x) {
    uint32_t largest = 0;
    for (int j = i * merged; j < min((i + 1) * merged, groups); ++j) largest = max(largest, maxima[j]);
    if (i < count) range.add(largest);
    to[i] = largest;
  }
  return range;
}

struct Selection {
  const int32_t* positions;
  int64_t positions_stride;
  int tokens;  // of a sequence
  int ratio;
  int capacity;
  int64_t first_token;
  int k;
  int room;  // keys that fit in shared memory
};

__global__ void __launch_bounds__(kManyThreads)
    index_select_kernel(Selection in, ScoreSink sink, int32_t* indices) {
  __shared__ Exchange exchange;
  extern __shared__ __align__(16) uint32_t select_shared[];
  uint32_t* const shared_keys = select_shared;
  uint32_t* const list = select_shared + in.room;  // of groups; only where a row does not fit
  for (int i = threadIdx.x; i <= kBins; i += blockDim.x) exchange.histogram[i] = 0;
  const int64_t row = blockIdx.x, token = in.first_token + row;
  const int32_t* const position = in.positions + token / in.tokens * in.positions_stride + token % in.tokens;
  const uint32_t* const row_keys = sink.keys + row * sink.stride;
  const uint32_t* const maxima = sink.maxima + row * (sink.stride / kGroup);
  int32_t* const picks = indices + token * in.k;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Ahead ahead;
  ahead.load(row_keys, in.room);
  const int seen = visible_entries(*position, in.ratio, in.capacity), k = in.k;

  if (seen <= k) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) picks[i] = i < seen ? i : -1;
    return;
  }
  const auto in_shared = [=](int i) { return reinterpret_cast<const uint4*>(shared_keys)[i]; };
  if (seen <= in.room) {
    const Range range = merge(fetch(ahead, row_keys, seen, shared_keys), exchange);
    const Threshold threshold = find_threshold(in_shared, seen, range, k, exchange);
    write_winners(in_shared, seen, threshold, [=](int place, int i) { picks[place] = i; }, exchange);
    return;
  }

  const int groups = (seen + kGroup - 1) / kGroup, merged = (groups + in.room - 1) / in.room;
  const int merged_groups = (groups + merged - 1) / merged, entries = merged * kGroup;
  if (k < merged_groups) {
    const Range range = merge(fetch_maxima(maxima, groups, merged, shared_keys), exchange);
    const Threshold bound = find_threshold(in_shared, merged_groups, range, k, exchange);
    const auto put_in_list = [=](int place, int group) {
      if (place < in.room / kGroup) list[place] = group;
    };
    const int found = write_winners(in_shared, merged_groups, {bound.key, merged_groups}, put_in_list, exchange);
    if (static_cast<int64_t>(found) * entries <= in.room) {
      const int count = found * entries;
      const auto entry_of = [=](int i) { return static_cast<int>(list[i / entries]) * entries + i % entries; };
      Range own;
#pragma unroll 8
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int entry = entry_of(i);
        const uint32_t key = entry < seen ? row_keys[entry] : 0;  // no entry: below every key, and never among the k
        if (entry < seen) own.add(key);
        shared_keys[i] = key;
      }
      const Threshold threshold = find_threshold(in_shared, count, merge(own, exchange), k, exchange);
      write_winners(in_shared, count, threshold, [=](int place, int i) { picks[place] = entry_of(i); }, exchange);
      return;
    }
  }
  const auto in_memory = [=](int i) { return reinterpret_cast<const uint4*>(row_keys)[i]; };
  Range own;
  for (int i = threadIdx.x; i < seen; i += blockDim.x) own.add(row_keys[i]);
  const Threshold threshold = find_threshold(in_memory, seen, merge(own, exchange), k, exchange);
  write_winners(in_memory, seen, threshold, [=](int place, int i) { picks[place] = i; }, exchange);
}

}  // namespace

int keys_in_shared_memory(int64_t capacity, int k) {
  int64_t keys = std::clamp<int64_t>(2 * kGroup * static_cast<int64_t>(k), kManyKeys, kMostKeys);
  if (capacity > keys * kGroup) keys = kMostKeys;
  return static_cast<int>(std::min((capacity + 3) / 4 * 4, keys));
}

bool wants_maxima(int64_t capacity, int k) { return capacity > keys_in_shared_memory(capacity, k); }

cudaError_t launch_select(const IndexScoring& scoring, const ScoreSink& sink, int64_t first_token, int64_t rows, int k,
                          int32_t* indices, cudaStream_t stream) {
  const int capacity = scoring.capacity();
  const int room = keys_in_shared_memory(capacity, k);
  const Selection selection{scoring.positions, scoring.positions_stride, scoring.tokens, scoring.ratio, capacity,
                            first_token,       k,                        room};
  const size_t shared = sizeof(uint32_t) * (room + (wants_maxima(capacity, k) ? room / kGroup : 0));
  const int threads = rows > 132 ? kFewThreads : kManyThreads;
  const Launch at{dim3(static_cast<unsigned>(rows)), dim3(threads), stream, shared};
  return launch_kernel(index_select_kernel, at, selection, sink, indices);
}

}  // namespace dsv4
