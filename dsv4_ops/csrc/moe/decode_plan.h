// The numbers that host and device agree on for a product of a decode step: who does what, and where it lies.
#pragma once

#include <cstdint>

#include "common/divisor.cuh"

namespace dsv4::moe {

// Rows of x that a stage of weights meets at once, and that a CTA holds in shared memory at most.
constexpr int kPassRows = 16, kMostRows = 32;

// A CTA is some teams of eight warps, which share the rows of x and take units in turn: two, or three where no group
// has more than kFewRows pairs. Then a thread needs 80 registers, not 128.
constexpr int kWarps = 8, kTeamThreads = 32 * kWarps;
constexpr int kFewRows = 4;
template <bool kFew>
constexpr int kTeams = kFew ? 3 : 2;
constexpr int kStages = 3;  // of 2 KiB a warp: one is multiplied with, two are under way

struct DecodePlan {
  int width;         // values of a row of x, and of the weight
  int steps;         // stages of a row
  int row_bytes;     // of the weight
  int teams;         // of a CTA
  int pass_rows;     // rows of x that a stage meets at once, at most
  int block_tokens;  // whose pairs are sorted together
  int capacity;      // rows of x in shared memory
  Divisor row_tiles{1};  // units of 32 weight rows of an expert
  Divisor ctas{1};       // of a block of tokens
  Divisor eighths{1};    // width / 8
  int64_t results;       // where they start in the workspace, in bytes
  // Bytes in shared memory (of a row of x, of a team's sums), and where its parts start. The ring of stages lies at 0.
  int x_stride, sums, partials, x, x_scales, row_facts, weight_scales, groups, size;

  // Rows for which there is a scale of x in shared memory: those of a pass may reach beyond the last one.
#ifdef __CUDACC__
  __host__ __device__
#endif
  int scale_slots() const { return capacity + pass_rows - 1; }
};

}  // namespace dsv4::moe
