// The k best entries of each row of scores, exactly: ties go to the lowest entry, entries come out in ascending order,
// then -1.
//
// A CTA owns a row. Scores arrive as integers in their order (common/ordered.cuh) and are looked at as numbers:
//
//   1. A histogram of 1024 bins of equal width, up to the largest score from one that k scores reach, says in which bin
//      the k-th largest lies. What lies in higher bins wins; the scores of that bin, usually a handful, are ranked
//      against each other, equal ones by entry. A winner is a bit in a map of the row, so threads may find winners in
//      any order.
//   2. The map is written out as entries.
//
// Of more than 8192 keys threads first take maxima of 16 in their registers. The histogram of these gives a bin that k
// keys reach; what reaches it, hardly more than k, is collected and goes through 1 and 2. That spares most atomics.
//
// A row that does not fit in shared memory takes three steps. Of every group of 16 entries the scoring kernel has left
// the largest key. The histogram of these gives the bin of the k-th largest of them: k entries lie in this bin or
// above, so the k best do too, and only in groups whose largest key does. On data without a pattern these are k groups
// and a few, and of their 16 * k entries hardly more than k lie in those bins. They are collected, and 1 and 2 follow.
//
// Scores that are not finite, more than 256 of them in the bin of the k-th (ties), more groups than fit: then
// histograms of ten key bits at a time, from the highest that differ, find the k-th key in memory. Rare; exact for any
// input.
//
// All loops around a barrier have bounds that are the same for the whole CTA. The atomics count, set bits and hand out
// places in lists whose order does not matter: in which order they happen does not show.
//
// Shared memory, bytes: 4 a key that fits, 1 for maxima and then places of candidates, a quarter for its bit, in longer
// rows another quarter for the list of groups; 6432 histogram and exchange. Room for 32 * k keys, at least 16384: twice
// what k groups hold.
//
// Floor: 4 bytes a score, read once (long rows: 4 bytes for each 16, and 64 for each group that is looked at). A row
// has one CTA, so in decode it is one multiprocessor that counts: about 20 instructions a key (4 to fetch it and find
// the range, 5 for the histogram, 9 for the map), 250 a thread for the scans, and the latency of six barriers and of
// atomics in shared memory; in a longer row the same for the maxima, 12 for each key of a group that is looked at, and
// twelve barriers. In a profile of 16 rows of 8192 keys no phase stood out: fetching, histogram, map and writing out
// took a sixth to a quarter each, most of it waiting for shared memory. 512 threads: half as many hide latency worse,
// twice as many pay the 250 twice. In prefill multiprocessors have many rows, and 128 or 256 threads save most of the
// 250.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "indexer/index_bins.cuh"
#include "indexer/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kLeastRoom = 16384;  // keys in shared memory
constexpr int kMostRoom = 36864;
constexpr int kFours = 4;  // vectors of four keys that a thread handles together
constexpr int kGroupedEntries = 8192;

struct Selection {
  const int32_t* positions;
  int64_t positions_stride;
  int tokens;  // of a sequence
  int ratio;
  int capacity;
  int64_t first_token;
  int k;
  int room;  // keys that fit in shared memory, a multiple of 64
};

// Dynamic shared memory.
struct Shared {
  float* scores;    // [room]
  float* maxima;    // [room / 4] of groups of a thread; when these are done with, places of candidates
  uint32_t* map;    // [room / 16]
  int32_t* list;    // [room / 16] of groups; only where a row does not fit

  static size_t bytes(int room, bool long_rows) {
    return sizeof(float) * (room + room / 4 + room / kMapWord + (long_rows ? room / kGroup : 0));
  }
  __device__ __forceinline__ Shared(float* memory, int room)
      : scores(memory),
        maxima(memory + room),
        map(reinterpret_cast<uint32_t*>(maxima + room / 4)),
        list(reinterpret_cast<int32_t*>(map + room / kMapWord)) {}
};

// Where a thread's vector number i of those from `begin` on lies.
template <int kThreads>
__device__ __forceinline__ int place_of(int begin, int i) {
  return begin + 4 * (threadIdx.x + i * kThreads);
}

// Keys of a thread.
template <int kThreads>
struct Keys {
  uint4 fours[kFours];

  // load(i) are the four keys from i on; zeros from `end` on.
  template <typename Load>
  __device__ __forceinline__ void load(const Load& load, int begin, int end) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int place = place_of<kThreads>(begin, i);
      fours[i] = place < end ? load(place) : uint4{};
    }
  }
};

__device__ __forceinline__ uint4 load_four(const uint32_t* keys) { return *reinterpret_cast<const uint4*>(keys); }

// At least k keys lie in bins from `cut.bin` on.
struct Bound {
  ScoreBins bins;
  Cut cut;
  bool usable;

  __device__ __forceinline__ uint32_t most() const { return kBins - 1 - cut.bin; }
  __device__ __forceinline__ bool holds(float score) const { return bins.from(cut.bin, score) <= most(); }
};

// Groups of a thread's 16 keys are worth it where they leave few keys to a second histogram and spare many atomics.
__device__ __forceinline__ bool in_groups(int entries, int k) {
  return entries > kGroupedEntries && entries / (4 * kFours) >= 2 * k;
}

// Brings `end` keys, of which the first `seen` are entries, to shared memory as scores, NaN behind them up to `count`,
// a multiple of 16, and finds the bin of the k-th largest, or, in_groups(seen, k), of the k-th largest maximum of
// groups. `keys` has the first ones. Bins start at a score that k others reach: the smallest of k maxima or more, those
// of all threads if they are as many, else those of fours.
template <int kThreads, typename Load>
__device__ __forceinline__ Bound find_bound(Keys<kThreads> keys, const Load& load, int end, int count, int seen, int k,
                                            const Shared& shared, Exchange& exchange) {
  const bool grouped = in_groups(seen, k);
  const bool of_threads = k <= kThreads && k <= seen / 4, of_fours = k <= seen / 4;
  uint32_t of_thread = 0;
  Range range;
  int written = 0;
  for (int begin = 0; begin < count; begin += 4 * kFours * kThreads) {
    if (begin > 0) keys.load(load, begin, end);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int place = place_of<kThreads>(begin, i);
      if (place >= count) break;
      const uint4 four = place < end ? keys.fours[i] : uint4{};
      *reinterpret_cast<float4*>(shared.scores + place) = {from_ordered(four.x), from_ordered(four.y),
                                                           from_ordered(four.z), from_ordered(four.w)};
      const uint32_t of_four = max(max(four.x, four.y), max(four.z, four.w));
      largest = max(largest, of_four);
      if (of_fours) {
        if (!grouped && !of_threads) range.add(of_four);
      } else {
        range.add(four.x);
        range.add(four.y);
        range.add(four.z);
        range.add(four.w);
      }
    }
    if (grouped) {
      range.add(largest);
      shared.maxima[written + threadIdx.x] = from_ordered(largest);
      written += kThreads;
    }
    of_thread = max(of_thread, largest);
  }
  if (of_threads && !grouped) range.add(of_thread);
  const ScoreBins bins(merge<kThreads>(range, exchange));
  if (!bins.usable()) return {bins, {}, false};
  const Cut cut =
      find_cut<kThreads>(grouped ? shared.maxima : shared.scores, grouped ? written : count, bins, k, exchange);
  return {bins, cut, true};
}

// Scores that may be among the k best, in any order.
struct Candidates {
  uint16_t* places;
  int room;
};

// The places of those of `count` scores, a multiple of 4, that the bound holds for. fours(i) are four scores from place
// i on, NaN where there is no entry; score(i) is one. put(to, score) sees each that is put on the list.
template <int kThreads, typename Fours, typename Score, typename Put>
__device__ __forceinline__ Range collect(const Fours& fours, const Score& score, int count, const Bound& bound,
                                         const Candidates& candidates, Exchange& exchange, Put put) {
  const int lane = threadIdx.x % kWarp;
  Range range;
  for (int begin = 0; begin < count; begin += 4 * kFours * kThreads) {
    float4 all[kFours];
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int place = place_of<kThreads>(begin, i);
      const float none = __uint_as_float(0xFFFFFFFFu);
      all[i] = place < count ? fours(place) : float4{none, none, none, none};
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      bits |= bound.holds(all[i].x) ? 1u << 4 * i : 0;
      bits |= bound.holds(all[i].y) ? 2u << 4 * i : 0;
      bits |= bound.holds(all[i].z) ? 4u << 4 * i : 0;
      bits |= bound.holds(all[i].w) ? 8u << 4 * i : 0;
    }
    const uint32_t own = __popc(bits), before = sum_of_lower_lanes(own);
    uint32_t to = lane == kWarp - 1 ? atomicAdd(&exchange.candidates, before + own) : 0;
    to = __shfl_sync(kAllLanes, to, kWarp - 1) + before;
    for (; bits != 0; bits &= bits - 1, ++to) {
      const int bit = __ffs(bits) - 1, place = place_of<kThreads>(begin, bit / 4) + bit % 4;
      const float value = score(place);
      range.add(ordered(value));
      if (to >= candidates.room) continue;
      candidates.places[to] = place;
      put(to, value);
    }
  }
  return range;
}

// Bits in the map, which is zero, for the k best candidates; score(i) is that of candidate i. False if it cannot tell.
template <int kThreads, typename Score>
__device__ __forceinline__ bool mark_best(const Candidates& candidates, const Score& score, Range own, int k,
                                          uint32_t* map, Exchange& exchange) {
  const ScoreBins bins(merge<kThreads>(own, exchange));
  const int count = exchange.candidates;
  if (count > candidates.room || !bins.usable()) return false;
  const auto count_bins = [&](uint32_t* histogram) {
    for (int i = threadIdx.x; i < count; i += kThreads) bins.count(score(i), histogram);
  };
  const Cut cut = find_cut<kThreads>(count_bins, k, exchange);
  if (cut.inside > kFew) return false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t from = bins.from(cut.bin, score(i));
    if (from == 0) {
      put_few(exchange, score(i), candidates.places[i]);
    } else if (from < kBins) {
      set_bit(map, candidates.places[i]);
    }
  }
  rank_few<kThreads>(k - cut.above, map, exchange);
  return true;
}

// Sum over the CTA; a barrier.
__device__ __forceinline__ int sum_threads(int own, Exchange& exchange) {
  own = __reduce_add_sync(kAllLanes, own);
  if (threadIdx.x % kWarp == 0) atomicAdd(&exchange.found, own);
  __syncthreads();
  return exchange.found;
}

template <int kThreads>
__device__ __forceinline__ void clear(uint32_t* map, int words) {
  for (int i = threadIdx.x; i < words; i += kThreads) map[i] = 0;
}

// ---- a row ----

// A row of seen <= room entries, the first keys of which are `ahead`; false if it takes select_from_memory.
template <int kThreads>
__device__ __forceinline__ bool select_short(const Selection& in, const Keys<kThreads>& ahead, const uint32_t* row_keys,
                                             int seen, const Shared& shared, int32_t* picks, Exchange& exchange) {
  const int count = (seen + kTile - 1) / kTile * kTile, words = count / kMapWord;
  const auto load = [=](int i) { return load_four(row_keys + i); };
  const Bound bound = find_bound(ahead, load, count, count, seen, in.k, shared, exchange);
  if (!bound.usable) return false;
  if (!in_groups(seen, in.k)) {
    if (bound.cut.inside > kFew) return false;
    make_map<kThreads>(shared.scores, count, bound.bins, bound.cut.bin + 1, bound.most(), shared.map,
                       [&](float score, int i) { put_few(exchange, score, i); });
    rank_few<kThreads>(in.k - bound.cut.above, shared.map, exchange);
    for_each_bit<kThreads>(shared.map, words, [=](uint32_t place, int i) { picks[place] = i; });
    return true;
  }
  clear<kThreads>(shared.map, words);
  const Candidates candidates{reinterpret_cast<uint16_t*>(shared.maxima), in.room / 2};
  const auto fours = [&](int i) { return *reinterpret_cast<const float4*>(shared.scores + i); };
  const auto score = [&](int i) { return shared.scores[i]; };
  const Range range = collect<kThreads>(fours, score, count, bound, candidates, exchange, [](uint32_t, float) {});
  const auto score_of = [&](int i) { return shared.scores[candidates.places[i]]; };
  if (!mark_best<kThreads>(candidates, score_of, range, in.k, shared.map, exchange)) return false;
  for_each_bit<kThreads>(shared.map, words, [=](uint32_t place, int i) { picks[place] = i; });
  return true;
}

// A longer row; `ahead` has maxima of its first groups. False if it takes select_from_memory.
template <int kThreads>
__device__ __forceinline__ bool select_long(const Selection& in, Keys<kThreads> ahead, const uint32_t* row_keys,
                                            const uint32_t* maxima, int seen, const Shared& shared, int32_t* picks,
                                            Exchange& exchange) {
  // 1. the groups of 16 entries in question, in order; neighbours merged where they are more than fit
  const int tiles_end = (seen + kTile - 1) / kTile * kTile, groups = tiles_end / kGroup;  // a multiple of 4
  int merged = 0;
  while ((groups - 1) >> merged >= in.room) ++merged;
  const int some = ((seen - 1) / kGroup >> merged) + 1, count = (((groups - 1) >> merged) / kMapWord + 1) * kMapWord;
  if (some <= in.k) return false;
  const auto largest = [=](int i) {
    uint32_t key = 0;
    for (int j = i << merged; j < min((i + 1) << merged, groups); ++j) key = max(key, maxima[j]);
    return key;
  };
  const auto load = [=](int i) {
    if (merged > 0) return uint4{largest(i), largest(i + 1), largest(i + 2), largest(i + 3)};
    return load_four(maxima + i);
  };
  if (merged > 0) ahead.load(load, 0, count);
  const Bound bound = find_bound(ahead, load, merged > 0 ? count : groups, count, some, in.k, shared, exchange);
  if (!bound.usable) return false;
  const int own = make_map<kThreads>(shared.scores, count, bound.bins, bound.cut.bin, bound.most(), shared.map,
                                     [](float, int) {});
  const int found = sum_threads(own, exchange);
  if (found > in.room / kGroup >> merged) return false;
  for_each_bit<kThreads>(shared.map, count / kMapWord,
                         [&](uint32_t place, int group) { shared.list[place] = group; });
  __syncthreads();

  // 2. their entries that the bound holds for; an entry's place is that in the groups of the list
  const int bits = 4 + merged, words = (found << bits) / kMapWord;
  const auto entry_of = [&](int place) { return shared.list[place >> bits] << bits | (place & ((1 << bits) - 1)); };
  clear<kThreads>(shared.map, words);
  float* const values = shared.scores;
  const Candidates candidates{reinterpret_cast<uint16_t*>(shared.maxima), in.room / 2};
  const auto fours = [&](int place) {
    const int entry = entry_of(place);
    const uint4 four = entry < tiles_end ? load_four(row_keys + entry) : uint4{};
    return float4{from_ordered(four.x), from_ordered(four.y), from_ordered(four.z), from_ordered(four.w)};
  };
  const auto score = [&](int place) { return from_ordered(row_keys[entry_of(place)]); };
  const auto put = [&](uint32_t to, float value) { values[to] = value; };
  const Range range = collect<kThreads>(fours, score, found << bits, bound, candidates, exchange, put);
  const auto score_of = [&](int i) { return values[i]; };
  if (!mark_best<kThreads>(candidates, score_of, range, in.k, shared.map, exchange)) return false;
  for_each_bit<kThreads>(shared.map, words, [&](uint32_t place, int i) { picks[place] = entry_of(i); });
  return true;
}

// ---- any row, from memory ----

// visit(key, entry) for the keys of four neighbours; zeros behind the last entry too.
template <typename Visit>
__device__ __forceinline__ void visit_four(const uint32_t* keys, int first, Visit visit) {
  const uint4 four = *reinterpret_cast<const uint4*>(keys + first);
  visit(four.x, first);
  visit(four.y, first + 1);
  visit(four.z, first + 2);
  visit(four.w, first + 3);
}

// The k-th largest key, and how many of those that are equal to it win.
struct Threshold {
  uint32_t key, ties;
};

template <int kThreads>
__device__ __forceinline__ Threshold find_threshold(const uint32_t* keys, int seen, int k, Exchange& exchange) {
  Range own;
  for (int i = 4 * threadIdx.x; i < seen; i += 4 * kThreads) {
    visit_four(keys, i, [&](uint32_t key, int) { own.add(key); });
  }
  __syncthreads();  // exchange.of_warp may still be read
  const Range range = merge<kThreads>(own, exchange);
  uint32_t low = range.below + 1, high = range.high, rank = k;
  while (true) {  // every round leaves the keys of one bin, [low, high]
    const int shift = max(32 - kBinBits - __clz(high - low), 0);
    const auto count_bins = [&](uint32_t* histogram) {
      for (int i = 4 * threadIdx.x; i < seen; i += 4 * kThreads) {
        visit_four(keys, i, [&](uint32_t key, int) {
          if (key >= low && key <= high) atomicAdd(histogram + ((key - low) >> shift), 1u);
        });
      }
    };
    const Cut cut = find_cut<kThreads>(count_bins, rank, exchange);
    rank -= cut.above;
    low += cut.bin << shift;
    if (shift == 0) return {low, rank};
    high = low + min(high - low, (1u << shift) - 1);
  }
}

template <int kThreads>
__device__ __forceinline__ void select_from_memory(const uint32_t* keys, int seen, int k, int32_t* picks,
                                                   Exchange& exchange) {
  const Threshold threshold = find_threshold<kThreads>(keys, seen, k, exchange);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int fours = (seen + 3) / 4, part = (fours + kThreads - 1) / kThreads;  // of the row: a thread's
  const int begin = 4 * min(static_cast<int>(threadIdx.x) * part, fours), end = min(begin + 4 * part, 4 * fours);
  uint32_t greater = 0, equal = 0;
  for (int i = begin; i < end; i += 4) {
    visit_four(keys, i, [&](uint32_t key, int) {
      greater += key > threshold.key;
      equal += key == threshold.key;
    });
  }
  uint32_t greater_before = sum_of_lower_lanes(greater), equal_before = sum_of_lower_lanes(equal);
  const uint32_t all_greater = __reduce_add_sync(kAllLanes, greater), all_equal = __reduce_add_sync(kAllLanes, equal);
  if (lane == 0) {
    exchange.of_warp[0][warp] = all_greater;
    exchange.of_warp[1][warp] = all_equal;
  }
  __syncthreads();
  greater_before += sum_if(exchange.of_warp[0], lane < warp);
  equal_before += sum_if(exchange.of_warp[1], lane < warp);
  if (greater + equal == 0) return;
  uint32_t place = greater_before + min(equal_before, threshold.ties);
  for (int i = begin; i < end; i += 4) {
    visit_four(keys, i, [&](uint32_t key, int entry) {
      const bool tie_wins = key == threshold.key && equal_before < threshold.ties;
      equal_before += key == threshold.key;
      if (key > threshold.key || tie_wins) picks[place++] = entry;
    });
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    index_select_kernel(Selection in, ScoreSink sink, int32_t* indices) {
  __shared__ Exchange exchange;
  extern __shared__ __align__(16) float select_shared[];
  const Shared shared(select_shared, in.room);
  for (int i = threadIdx.x; i < kBins; i += kThreads) exchange.histogram[i] = 0;
  if (threadIdx.x == 0) exchange.candidates = exchange.found = 0;
  const int64_t row = blockIdx.x, token = in.first_token + row;
  const int32_t* const position = in.positions + token / in.tokens * in.positions_stride + token % in.tokens;
  const uint32_t* const row_keys = sink.keys + row * sink.stride;
  int32_t* const picks = indices + token * in.k;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  // The first keys, or maxima where rows may be long, are requested before it is known how many there are.
  const bool long_rows = in.capacity > in.room;
  const uint32_t* const maxima = sink.maxima + row * (sink.stride / kGroup);
  const auto load = [=](int i) { return load_four(row_keys + i); };
  const auto load_maxima = [=](int i) { return load_four(maxima + i); };
  Keys<kThreads> ahead;
  if (long_rows) {
    ahead.load(load_maxima, 0, static_cast<int>(sink.stride / kGroup));
  } else {
    ahead.load(load, 0, in.room);
  }
  const int seen = visible_entries(*position, in.ratio, in.capacity), k = in.k;

  if (seen <= k) {
    for (int i = threadIdx.x; i < k; i += kThreads) picks[i] = i < seen ? i : -1;
    return;
  }
  bool done;
  if (seen > in.room) {
    done = select_long<kThreads>(in, ahead, row_keys, maxima, seen, shared, picks, exchange);
  } else {
    if (long_rows) ahead.load(load, 0, in.room);
    done = select_short<kThreads>(in, ahead, row_keys, seen, shared, picks, exchange);
  }
  if (!done) select_from_memory<kThreads>(row_keys, seen, k, picks, exchange);
}

}  // namespace

int keys_in_shared_memory(int64_t capacity, int k) {
  int64_t keys = std::clamp<int64_t>(2 * kGroup * static_cast<int64_t>(k), kLeastRoom, kMostRoom);
  if (capacity > keys * kGroup) keys = kMostRoom;
  return static_cast<int>((std::min(capacity, keys) + kTile - 1) / kTile * kTile);
}

bool wants_maxima(int64_t capacity, int k) { return capacity > keys_in_shared_memory(capacity, k); }

cudaError_t launch_select(const IndexScoring& scoring, const ScoreSink& sink, int64_t first_token, int64_t rows, int k,
                          int32_t* indices, cudaStream_t stream) {
  const int capacity = scoring.capacity();
  const int room = keys_in_shared_memory(capacity, k);
  const Selection selection{scoring.positions, scoring.positions_stride, scoring.tokens, scoring.ratio, capacity,
                            first_token,       k,                        room};
  const size_t shared = Shared::bytes(room, wants_maxima(capacity, k));
  const auto launch = [&](auto kernel, int threads) {
    return launch_kernel(kernel, {dim3(static_cast<unsigned>(rows)), dim3(threads), stream, shared}, selection, sink,
                         indices);
  };
  // Where multiprocessors have several rows each, those of a few thousand keys take few threads: see the top.
  if (rows <= 132 || capacity > 16384) return launch(index_select_kernel<512>, 512);
  return capacity > 4096 ? launch(index_select_kernel<256>, 256) : launch(index_select_kernel<128>, 128);
}

}  // namespace dsv4
