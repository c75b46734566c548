// The weights that one warp reads, in the order in which it needs them, as a ring of stages that runs ahead.
//
// A CTA has a range of units: 32 rows of a weight of one group of pairs (16 of w1 and the same 16 of w3, or 32 of w2).
// Its teams take them in turn, in one pass for every 16 pairs (the second finds the weights in L2). Each warp of a team
// has a part of k to itself, the same in every unit, so that warps wait for each other only where their sums meet.
// Fragment m of a stage of w1 and w3 is 8 rows of w1 above the same 8 rows of w3: then gate and up of an element meet
// in one lane.
#pragma once

#include "common/ptx.cuh"
#include "common/weight_fragments.cuh"
#include "moe/decode_formats.cuh"
#include "moe/decode_plan.h"
#include "moe/moe.h"
#include "moe/pairs.cuh"

namespace dsv4::moe {

// The CTA's units of all groups, as equal a share as possible.
struct Share {
  int begin, end;

  __device__ __forceinline__ Share(const DecodePlan& plan, const PairGroups& groups) {
    const int units = groups.count() * static_cast<int>(plan.row_tiles.value());
    const int share = plan.ctas.divide(units);
    const int more = units - share * static_cast<int>(gridDim.x);  // CTAs with one more
    const int cta = static_cast<int>(blockIdx.x);
    begin = cta * share + min(cta, more);
    end = begin + share + (cta < more);
  }
};

// Where a team stands in the share of its CTA.
struct Walk {
  int unit, end;    // of all groups
  int group, tile;  // unit = group * row_tiles + tile
  int pass, passes;

  __device__ __forceinline__ Walk(const DecodePlan& plan, const PairGroups& groups, const Share& share)
      : unit(share.begin + static_cast<int>(threadIdx.x) / kTeamThreads), end(share.end), pass(0) {
    group = plan.row_tiles.divide(unit);
    tile = unit - group * static_cast<int>(plan.row_tiles.value());
    look(groups);
  }

  __device__ __forceinline__ bool done() const { return unit >= end; }

  // To the next pass; whether that is another unit.
  __device__ __forceinline__ bool advance(const DecodePlan& plan, const PairGroups& groups) {
    if (++pass < passes) return false;
    pass = 0;
    unit += plan.teams;
    tile += plan.teams;
    if (tile >= static_cast<int>(plan.row_tiles.value())) {
      tile -= static_cast<int>(plan.row_tiles.value());
      ++group;
      look(groups);
    }
    return true;
  }

 private:
  __device__ __forceinline__ void look(const PairGroups& groups) {
    passes = done() ? 1 : (groups.pairs_of(group) + kPassRows - 1) / kPassRows;
  }
};

template <typename Format, bool kFirst>
class WeightStream {
 public:
  // `ring` has the stages of all warps; the stream begins where the team stands.
  __device__ __forceinline__ WeightStream(const Moe& moe, const DecodePlan& plan, const PairGroups& groups,
                                          const Walk& walk, uint8_t* ring)
      : moe_(moe), plan_(plan), groups_(groups), walk_(walk) {
    const int warp = threadIdx.x / kWarp % kWarps;
    ring_ = ring + threadIdx.x / kWarp * kStages * kBytes;
    first_step_ = warp * plan.steps / kWarps;
    end_step_ = (warp + 1) * plan.steps / kWarps;
    step_ = first_step_;
    if (first_step_ == end_step_) walk_.unit = walk_.end;
    locate();
  }

  // The first copies are under way. Once, before the first stage is asked for.
  __device__ __forceinline__ void start() {
#pragma unroll 1  // code that runs once is slow to come
    for (int i = 0; i < kStages - 1; ++i) copy_next(i * kBytes);
  }

  __device__ __forceinline__ int first_step() const { return first_step_; }
  __device__ __forceinline__ int end_step() const { return end_step_; }

  // The next stage, after its copy has arrived; starts the copy of a later one in place of the one before.
  __device__ __forceinline__ const uint8_t* next() {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();
    copy_next(written_);
    written_ = read_;
    read_ = read_ == (kStages - 1) * kBytes ? 0 : read_ + kBytes;
    return ring_ + written_;
  }

 private:
  static constexpr int kBytes = kStageBytes<Format>;
  static constexpr int kUnitRows = kFirst ? kStageRows / 2 : kStageRows;  // of each weight that is read
  static constexpr int kFragmentRows = kUnitRows / 2;                     // from fragment 0 of a stage to fragment 1

  // Addresses of this lane in the current unit at step 0: its row (lane / 4) of the upper and of the lower half of a
  // fragment, and the scales of its row (lane) of the stage.
  __device__ __forceinline__ void locate() {
    if (walk_.done()) return;
    const int lane = threadIdx.x % kWarp, row = lane / 4, half = lane / 8 % 2, expert = groups_.expert_of(walk_.group);
    const int64_t first = (static_cast<int64_t>(expert) * plan_.row_tiles.value() + walk_.tile) * kUnitRows;
    const MoeWeight& above = kFirst ? moe_.w1 : moe_.w2;
    const MoeWeight& below = kFirst ? moe_.w3 : moe_.w2;
    const int column = lane % kStageChunks * 16;
    upper_ = static_cast<const uint8_t*>(above.weight) + (first + row) * plan_.row_bytes + column;
    lower_ = static_cast<const uint8_t*>(below.weight) + (first + row + (kFirst ? 0 : 8)) * plan_.row_bytes + column;
    if constexpr (Format::kScaleBytes > 0) {
      const int64_t scale_row = first + lane / 16 * kFragmentRows + lane % 8 + (kFirst ? 0 : half * 8);
      const auto* const scales = static_cast<const uint8_t*>((kFirst && half == 1 ? below : above).scale);
      scales_ = scales + scale_row * plan_.steps * Format::kScaleBytes;
    }
  }

  // To the stage at `at` of the warp's ring. Addresses are products of the step with a constant, of one instruction
  // each: they need no pointers that move.
  __device__ __forceinline__ void copy_next(int at) {
    if (!walk_.done()) {
      const int lane = threadIdx.x % kWarp;
      const int64_t column = static_cast<int64_t>(step_) * kStageRowBytes;
      const int64_t fragment = static_cast<int64_t>(kFragmentRows) * plan_.row_bytes;
      const uint8_t *const upper = upper_ + column, *const lower = lower_ + column;
      uint8_t* const stage = ring_ + at;
      uint8_t* const to = stage + lane / 4 * kStagePitch + lane % kStageChunks * 16;
      ptx::cp_async_16(to, upper, 16);
      ptx::cp_async_16(to + 8 * kStagePitch, lower, 16);
      ptx::cp_async_16(to + kStageRowBytes, upper + fragment, 16);
      ptx::cp_async_16(to + 8 * kStagePitch + kStageRowBytes, lower + fragment, 16);
      uint8_t* const scale = stage + kStageScales + lane * Format::kScaleBytes;
      const uint8_t* const scales = scales_ + static_cast<int64_t>(step_) * Format::kScaleBytes;
      if constexpr (Format::kScaleBytes == 4) ptx::cp_async_4(scale, scales, 4);
      if constexpr (Format::kScaleBytes == 8) ptx::cp_async_8(scale, scales);
      if (++step_ == end_step_) advance_pass();
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void advance_pass() {
    step_ = first_step_;
    const int group = walk_.group;
    const bool another_unit = walk_.advance(plan_, groups_);
    if (walk_.group != group) return locate();
    const int64_t rows = another_unit ? plan_.teams * kUnitRows : 0;
    upper_ += rows * plan_.row_bytes;
    lower_ += rows * plan_.row_bytes;
    scales_ += rows * plan_.steps * Format::kScaleBytes;
  }

  const Moe& moe_;
  const DecodePlan& plan_;
  const PairGroups& groups_;
  Walk walk_;  // of the copies
  uint8_t* ring_;
  int first_step_, end_step_, step_;
  int read_ = 0, written_ = (kStages - 1) * kBytes;  // stages to read next, and to write next
  const uint8_t* upper_ = nullptr;
  const uint8_t* lower_ = nullptr;
  const uint8_t* scales_ = nullptr;
};

}  // namespace dsv4::moe
