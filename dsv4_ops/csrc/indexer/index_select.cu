// The k best entries of each row of scores, exactly: ties go to the lowest entry, entries come out in ascending order,
// then -1.
//
// A CTA owns a row. Scores arrive as integers in their order (common/ordered.cuh) and are looked at as numbers:
//
//   1. A histogram of 1024 bins of equal width between the smallest and the largest score says in which bin the k-th
//      largest lies. What lies in higher bins wins; the scores of that bin, usually a handful, are ranked against each
//      other, equal ones by entry. A winner is a bit in a map of the row, so threads may find winners in any order.
//   2. The map is written out as entries.
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
// Shared memory, bytes: 4 a key that fits and a quarter for its bit, in longer rows another quarter for the list of
// groups; 6432 histogram and exchange. Room for 32 * k keys, at least 16384: twice what k groups hold.
//
// Floor: 4 bytes a score, read once (long rows: 4 bytes for each 16, and 64 for each group that is looked at). A row
// has one CTA, so in decode it is the instructions of one multiprocessor that count: about 20 a key (4 to fetch it and
// find the range, 5 for the histogram, 9 for the map) and 250 a thread for the scans, and six barriers; in a longer row
// the same for the maxima, 12 for each key of a group that is looked at, and twelve barriers. 512 threads: half as many
// hide latency worse, twice as many pay the 250 twice. In prefill multiprocessors have many rows, latency is hidden,
// and 128 or 256 threads save most of the 250.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "indexer/index_bins.cuh"
#include "indexer/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kLeastRoom = 16384;  // keys in shared memory
constexpr int kMostRoom = 49152;
constexpr int kAhead = 4;

// ---- a row ----

// The first 4 * kAhead keys of each thread's part of a row, requested before it is known how many there are.
template <int kThreads>
struct Ahead {
  uint4 keys[kAhead];

  __device__ __forceinline__ void load(const uint32_t* from, int room) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int first = 4 * (threadIdx.x + i * kThreads);
      if (first < room) keys[i] = *reinterpret_cast<const uint4*>(from + first);
    }
  }
};

// Four keys to shared memory as scores; no entry becomes NaN.
__device__ __forceinline__ void put_four(uint4 four, float* to, Range& range) {
  range.add(four.x);
  range.add(four.y);
  range.add(four.z);
  range.add(four.w);
  *reinterpret_cast<float4*>(to) = {from_ordered(four.x), from_ordered(four.y), from_ordered(four.z),
                                    from_ordered(four.w)};
}

// `count` keys, a multiple of 4, to shared memory; load(i) are four of them.
template <int kThreads, typename Load>
__device__ __forceinline__ void fetch(const Load& load, int begin, int count, float* to, Range& range) {
#pragma unroll 4
  for (int i = begin + 4 * threadIdx.x; i < count; i += 4 * kThreads) put_four(load(i), to + i, range);
}

// The keys of a row. Whole tiles of them exist, zeros where there is no entry.
template <int kThreads>
__device__ __forceinline__ Range fetch_row(const Ahead<kThreads>& ahead, const uint32_t* from, int count, float* to) {
  Range range;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int first = 4 * (threadIdx.x + i * kThreads);
    if (first < count) put_four(ahead.keys[i], to + first, range);
  }
  const auto load = [=](int i) { return *reinterpret_cast<const uint4*>(from + i); };
  fetch<kThreads>(load, 4 * kAhead * kThreads, count, to, range);
  return range;
}

// The largest keys of every 2^merged neighbouring groups, and zeros up to `count`.
template <int kThreads>
__device__ __forceinline__ Range fetch_maxima(const uint32_t* maxima, int groups, int merged, int count, float* to) {
  const auto largest = [=](int i) {
    uint32_t key = 0;
    for (int j = i << merged; j < min((i + 1) << merged, groups); ++j) key = max(key, maxima[j]);
    return key;
  };
  const auto load = [=](int i) {  // groups of whole tiles: a multiple of 4
    return i < groups ? *reinterpret_cast<const uint4*>(maxima + i) : uint4{};
  };
  const auto load_merged = [=](int i) { return uint4{largest(i), largest(i + 1), largest(i + 2), largest(i + 3)}; };
  Range range;
  if (merged == 0) {
    fetch<kThreads>(load, 0, count, to, range);
  } else {
    fetch<kThreads>(load_merged, 0, count, to, range);
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
  int room;  // keys that fit in shared memory, a multiple of 64
};

// Dynamic shared memory.
struct Shared {
  float* scores;   // [room]
  uint32_t* map;   // [room / 16]
  int32_t* list;   // [room / 16] of groups; only where a row does not fit
};

// A row of seen <= room entries; false if it takes select_from_memory.
template <int kThreads>
__device__ __forceinline__ bool select_short(const Ahead<kThreads>& ahead, const uint32_t* row_keys, int seen, int k,
                                             const Shared& shared, int32_t* picks, Exchange& exchange) {
  const int count = (seen + kTile - 1) / kTile * kTile;
  const ScoreBins bins(merge<kThreads>(fetch_row(ahead, row_keys, count, shared.scores), exchange));
  if (!bins.usable()) return false;
  const Cut cut = find_cut<kThreads>(shared.scores, count, bins, k, exchange);
  if (cut.inside > kFew) return false;
  make_map<kThreads>(shared.scores, count, bins, cut.bin + 1, kBins - 1 - cut.bin, shared.map,
                     [&](float score, int i) { put_few(exchange, score, i); });
  rank_few<kThreads>(k - cut.above, shared.map, exchange);
  for_each_bit<kThreads>(shared.map, count / kMapWord, [=](uint32_t place, int i) { picks[place] = i; });
  return true;
}

// A longer row; false if it takes select_from_memory.
template <int kThreads>
__device__ __forceinline__ bool select_long(const Selection& in, const uint32_t* row_keys, const uint32_t* maxima,
                                            int seen, int k, const Shared& shared, int32_t* picks,
                                            Exchange& exchange) {
  // 1. the list of groups
  const int tiles_end = (seen + kTile - 1) / kTile * kTile, groups = tiles_end / kGroup;
  int merged = 0;
  while ((groups - 1) >> merged >= in.room) ++merged;
  if ((seen - 1) / kGroup >> merged < k) return false;  // not more than k groups have entries
  const int padded = (((groups - 1) >> merged) / kMapWord + 1) * kMapWord;
  const ScoreBins bins(
      merge<kThreads>(fetch_maxima<kThreads>(maxima, groups, merged, padded, shared.scores), exchange));
  if (!bins.usable()) return false;
  const Cut cut = find_cut<kThreads>(shared.scores, padded, bins, k, exchange);
  const int found = cut.above + cut.inside;
  if (found > in.room / kGroup >> merged) return false;
  const uint32_t most = kBins - 1 - cut.bin;
  make_map<kThreads>(shared.scores, padded, bins, cut.bin, most, shared.map, [](float, int) {});
  __syncthreads();
  for_each_bit<kThreads>(shared.map, padded / kMapWord,
                         [&](uint32_t place, int group) { shared.list[place] = group; });
  __syncthreads();

  // 2. their entries in the bin of the k-th or above; an entry's place is that in the groups of the list
  const int bits = 4 + merged, room = in.room / 2;
  const auto entry_of = [&](int place) { return shared.list[place >> bits] << bits | (place & ((1 << bits) - 1)); };
  float* const candidates = shared.scores;
  auto* const places = reinterpret_cast<int32_t*>(shared.scores + room);
  Range range;
#pragma unroll 4
  for (int place = 4 * threadIdx.x; place < found << bits; place += 4 * kThreads) {
    const int entry = entry_of(place);
    if (entry >= tiles_end) continue;
    const uint4 four = *reinterpret_cast<const uint4*>(row_keys + entry);
    const uint32_t keys[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score = from_ordered(keys[i]);
      if (bins.from(cut.bin, score) > most) continue;
      range.add(keys[i]);
      const int to = atomicAdd(&exchange.candidates, 1u);
      if (to >= room) continue;
      candidates[to] = score;
      places[to] = place + i;
    }
  }
  const int words = (found << bits) / kMapWord;
  for (int i = threadIdx.x; i < words; i += kThreads) shared.map[i] = 0;

  // 3. the best of these
  const ScoreBins fine(merge<kThreads>(range, exchange));
  const int some = exchange.candidates;
  if (some > room || !fine.usable()) return false;
  const auto count_bins = [&](uint32_t* histogram) {
    for (int i = threadIdx.x; i < some; i += kThreads) {
      atomicAdd(histogram + min(fine.from(0, candidates[i]), kBins), 1u);
    }
  };
  const Cut last = find_cut<kThreads>(count_bins, k, exchange);
  if (last.inside > kFew) return false;
  for (int i = threadIdx.x; i < some; i += kThreads) {
    const uint32_t from = fine.from(last.bin, candidates[i]);
    if (from == 0) {
      put_few(exchange, candidates[i], places[i]);
    } else if (from < kBins) {
      set_bit(shared.map, places[i]);
    }
  }
  rank_few<kThreads>(k - last.above, shared.map, exchange);
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
  if (lane == kWarp - 1) {
    exchange.of_warp[0][warp] = greater_before + greater;
    exchange.of_warp[1][warp] = equal_before + equal;
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
  auto* const map = reinterpret_cast<uint32_t*>(select_shared + in.room);
  const Shared shared{select_shared, map, reinterpret_cast<int32_t*>(map + in.room / kMapWord)};
  for (int i = threadIdx.x; i <= kBins; i += kThreads) exchange.histogram[i] = 0;
  if (threadIdx.x == 0) exchange.candidates = 0;
  const int64_t row = blockIdx.x, token = in.first_token + row;
  const int32_t* const position = in.positions + token / in.tokens * in.positions_stride + token % in.tokens;
  const uint32_t* const row_keys = sink.keys + row * sink.stride;
  int32_t* const picks = indices + token * in.k;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  Ahead<kThreads> ahead;
  ahead.load(row_keys, in.room);
  const int seen = visible_entries(*position, in.ratio, in.capacity), k = in.k;

  if (seen <= k) {
    for (int i = threadIdx.x; i < k; i += kThreads) picks[i] = i < seen ? i : -1;
    return;
  }
  const uint32_t* const maxima = sink.maxima + row * (sink.stride / kGroup);
  const bool done = seen <= in.room
                        ? select_short<kThreads>(ahead, row_keys, seen, k, shared, picks, exchange)
                        : select_long<kThreads>(in, row_keys, maxima, seen, k, shared, picks, exchange);
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
  const size_t shared = sizeof(uint32_t) * (room + room / kMapWord + (wants_maxima(capacity, k) ? room / kGroup : 0));
  const auto launch = [&](auto kernel, int threads) {
    return launch_kernel(kernel, {dim3(static_cast<unsigned>(rows)), dim3(threads), stream, shared}, selection, sink,
                         indices);
  };
  // Where multiprocessors have several rows each, those of a few thousand keys take few threads: see the top.
  if (rows <= 132 || capacity > 16384) return launch(index_select_kernel<512>, 512);
  return capacity > 4096 ? launch(index_select_kernel<256>, 256) : launch(index_select_kernel<128>, 128);
}

}  // namespace dsv4
