// The histogram of a row's scaled logits z = (logit - largest) / temperature <= 0, and where top-k and top-p cut it.
//
// Buckets. |z| from 2^-11 to 31.75 falls into 128 buckets an octave, the 7 leading bits of its mantissa; bucket 0 is
// what is below, so it holds the best token. A token with |z| >= 31.75 cannot win against the best one whatever their
// noise (kLargestNoise - kSmallestNoise is 25.9) and has no mass worth counting (e^-31.75 of the best one's; 2^20 of
// them change the sum by less than half an fp32 ulp): it is in no bucket, and its rank is behind all buckets.
//
// Mass. e^z = e^-edge e^-d, edge the bucket's end nearer to 0 and d < 1/8 exact. Only e^-d is summed, as q =
// round(2^22 e^-d), which lies in (2^22 - 2^19, 2^22]: a bucket counts its tokens and sums 2^22 - q, both in one word,
// with integer atomics, whose order does not matter. At most 8192 tokens of a CTA stay below 2^32, 2^20 tokens of a
// row below 2^40. The mass of a bucket is e^-edge times that integer in units of 2^-42 (the whole row stays below
// 2^63), so prefix sums are integers too, the same for any number of threads and CTAs.
//
// How exact is that? The mass of a token is off by at most 4e-7 of itself: half a unit of q, an ulp of expf(-d) and one
// of expf(-edge). The reference's is a quotient of fp32 numbers, of which the divisor is the sum of all exponentials in
// fp32, and is off by at least as much. So both cut at the same token unless a cumulative probability comes within
// about 1e-6 of top_p; cases that are exact in fp32, such as 2^n equal tokens, are exact here.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"
#include "sampling/row.cuh"

namespace dsv4 {

constexpr int kFirstCode = (127 - 11) * 128;  // exponent and 7 bits of mantissa of 2^-11
constexpr int kNoBucket = kBuckets - 1;       // of tokens that cannot win: bucket numbers end before it
constexpr uint32_t kWhole = 1u << 22;         // q of a token at its bucket's edge
constexpr int kCountShift = 40;

// NaN, which no finite temperature makes, is above every value.
__device__ __forceinline__ int bucket_of(float scaled) {
  const int code = static_cast<int>(magnitude_bits(scaled) >> 16);
  return scaled != scaled ? 0 : min(max(code - kFirstCode + 1, 0), kNoBucket);
}

__device__ __forceinline__ float edge_of(int bucket) {
  return bucket == 0 ? 0.0f : __uint_as_float(static_cast<uint32_t>(bucket - 1 + kFirstCode) << 16);
}

// 2^22 - q of a token in this bucket.
__device__ __forceinline__ uint32_t missing_mass(float scaled, int bucket) {
  if (scaled != scaled) return 0;
  return kWhole - __float2uint_rn(expf(scaled + edge_of(bucket)) * kWhole);
}

// Mass in units of 2^-42 of tokens of one bucket whose q add up to `sum`.
__device__ __forceinline__ uint64_t bucket_mass(int bucket, uint64_t sum) {
  return __double2ull_rn(static_cast<double>(expf(-edge_of(bucket))) * static_cast<double>(sum) * 0x1p20);
}

// A bucket and what is in front of it.
struct alignas(16) Bucket {
  uint64_t mass_before, mass;
  uint32_t count_before, count;
  int index;
  int unused;  // 0, as in Candidate
};

__device__ __forceinline__ uint32_t count_through(const Bucket& bucket) { return bucket.count_before + bucket.count; }
__device__ __forceinline__ uint64_t mass_through(const Bucket& bucket) { return bucket.mass_before + bucket.mass; }

// All buckets of a row in the shared memory of a CTA (24 KB): thread t owns kPerThread neighbouring ones and knows the
// sums in front of them.
template <int kCtaThreads>
class Histogram {
 public:
  static constexpr int kPerThread = kBuckets / kCtaThreads;
  static constexpr int kWarps = kCtaThreads / kWarp;
  struct Shared {
    uint64_t masses[kPerThread][kCtaThreads];  // of thread t in column t: no two lanes meet in a bank
    uint32_t counts[kPerThread][kCtaThreads];
    uint64_t warp_masses[kWarps];
    uint32_t warp_counts[kWarps];
    Bucket found[3];
  };

  __device__ Histogram(const uint64_t* words, Shared& shared) : shared_(shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    load(words);
    // Sums of this thread and those before it in the warp, then of the warps before.
    uint32_t count = count_;
    uint64_t mass = mass_;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint32_t more = __shfl_up_sync(kAllLanes, count, distance);
      const uint64_t more_mass = __shfl_up_sync(kAllLanes, mass, distance);
      if (lane >= distance) count += more, mass += more_mass;
    }
    if (lane == kWarp - 1) shared.warp_counts[warp] = count, shared.warp_masses[warp] = mass;
    __syncthreads();
    count_before_ = count - count_;
    mass_before_ = mass - mass_;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) count_before_ += shared.warp_counts[i], mass_before_ += shared.warp_masses[i];
      total_count_ += shared.warp_counts[i], total_mass_ += shared.warp_masses[i];
    }
  }

  // The first bucket with `reached(tokens, mass)` through it, which must be monotonous and false for (0, 0);
  // kNoBucket, behind everything, if there is none. `place` 0 .. 2 must differ from that of the call before.
  template <typename Reached>
  __device__ Bucket find(int place, Reached reached) const {
    if (threadIdx.x == 0) shared_.found[place] = {total_mass_, 0, total_count_, 0, kNoBucket, 0};
    __syncthreads();
    if (reached(count_before_ + count_, mass_before_ + mass_) && !reached(count_before_, mass_before_)) {
      Bucket bucket = first();
      while (!reached(count_through(bucket), mass_through(bucket))) bucket = next(bucket);
      shared_.found[place] = bucket;
    }
    __syncthreads();
    return shared_.found[place];
  }

  // The bucket of this number. Between two calls with one place lies a barrier.
  __device__ Bucket at(int place, int index) const {
    if (index / kPerThread == threadIdx.x) {
      Bucket bucket = first();
      while (bucket.index != index) bucket = next(bucket);
      shared_.found[place] = bucket;
    }
    __syncthreads();
    return shared_.found[place];
  }

 private:
  __device__ void load(const uint64_t* words) {
    const int first = threadIdx.x * kPerThread;
    uint64_t loaded[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; i += 2) {
      const auto pair = *reinterpret_cast<const ulonglong2*>(words + first + i);
      loaded[i] = pair.x, loaded[i + 1] = pair.y;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t count = static_cast<uint32_t>(loaded[i] >> kCountShift);
      const uint64_t missing = loaded[i] & ((uint64_t{1} << kCountShift) - 1);
      const uint64_t mass = bucket_mass(first + i, static_cast<uint64_t>(count) * kWhole - missing);
      shared_.counts[i][threadIdx.x] = count;
      shared_.masses[i][threadIdx.x] = mass;
      count_ += count;
      mass_ += mass;
    }
  }

  // This thread's buckets, one after the other.
  __device__ Bucket first() const {
    const int index = threadIdx.x * kPerThread;
    return {mass_before_, shared_.masses[0][threadIdx.x], count_before_, shared_.counts[0][threadIdx.x], index, 0};
  }
  __device__ Bucket next(const Bucket& bucket) const {
    const int index = bucket.index + 1, i = index % kPerThread;
    return {mass_through(bucket), shared_.masses[i][threadIdx.x], count_through(bucket), shared_.counts[i][threadIdx.x],
            index, 0};
  }

  Shared& shared_;
  uint32_t count_ = 0, count_before_ = 0, total_count_ = 0;  // of this thread, of those before it, of all
  uint64_t mass_ = 0, mass_before_ = 0, total_mass_ = 0;
};

// What is decided by the histogram alone. Tokens of buckets [0, sure_end) are kept, of [sure_end, maybe_end) some are,
// and none behind. Deciding about those takes the ranks of the tokens in their buckets, and, if both filters are on
// and the bucket of the k-th best token is cut, those in that bucket, because the mass of the k best tokens is the
// whole of top-p.
struct Cut {
  int sure_end, maybe_end;
  Bucket rank;       // of the k-th best token; what is in front of everything that top-k drops if it cuts no bucket
  bool rank_is_cut;  // some tokens of `rank` are among the k best, some are not
  int also_listed;   // index of `rank` if its tokens have to be known too, else -1
  uint32_t listed;   // tokens of the buckets that have to be known

  __device__ bool lists(int bucket) const {
    return (bucket >= sure_end && bucket < maybe_end) || bucket == also_listed;
  }
};

// Whether `mass` reaches the share top_p of `whole`.
__device__ __forceinline__ bool reaches(uint64_t mass, float top_p, uint64_t whole) {
  return static_cast<double>(mass) >= static_cast<double>(top_p) * static_cast<double>(whole);
}

template <int kCtaThreads>
__device__ Cut find_cut(const Histogram<kCtaThreads>& histogram, const Row& row) {
  Cut cut;
  const uint32_t k = row.by_rank ? row.top_k : 0xFFFFFFFFu;
  cut.rank = histogram.find(0, [&](uint32_t count, uint64_t) { return count >= k; });
  cut.rank_is_cut = count_through(cut.rank) > k;
  cut.also_listed = -1;
  cut.listed = 0;
  if (!row.by_mass) {
    cut.maybe_end = min(cut.rank.index + 1, kNoBucket);
    cut.sure_end = cut.rank_is_cut ? cut.rank.index : cut.maybe_end;
    if (cut.rank_is_cut) cut.listed = cut.rank.count;
    return cut;
  }
  // The k best tokens have at least the mass in front of a bucket that is cut, and at most that through it.
  const uint64_t most = mass_through(cut.rank), least = cut.rank_is_cut ? cut.rank.mass_before : most;
  const auto reach = [&](uint64_t whole) {
    return [&row, whole](uint32_t, uint64_t mass) { return mass > 0 && reaches(mass, row.top_p, whole); };
  };
  const Bucket first = histogram.find(1, reach(least)), last = histogram.find(2, reach(most));
  cut.sure_end = first.index;
  cut.maybe_end = last.index + 1;
  if (first.index == last.index && first.count == 1)
    cut.sure_end = cut.maybe_end;  // what is in front falls short of top_p
  if (cut.sure_end == cut.maybe_end) return cut;
  cut.listed = count_through(last) - first.count_before;
  if (cut.rank_is_cut && cut.rank.index >= cut.maybe_end) {
    cut.also_listed = cut.rank.index;
    cut.listed += cut.rank.count;
  }
  return cut;
}

}  // namespace dsv4
