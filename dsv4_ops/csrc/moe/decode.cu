// The routed experts of a decode step, from x to the result of every pair (a slot of a token): two launches, each of
// which streams the weights of every chosen expert once for all of its pairs.
//
//   1. h = swiglu(w1 x, w3 x) * route weight     experts_first_kernel    64 KiB of weights a unit (4096 wide, FP4)
//   2. results = w2 quantise(h)                  experts_second_kernel
//
// One CTA stays on each SM and takes its share of all units: a unit is 32 rows of the weights of one group of up to
// `capacity` pairs of an expert, in one pass for each 16 pairs. Work is thus divided by bytes, to 32 rows. Every CTA
// finds the groups for itself from the ids (pairs.cuh). Its teams of 8 warps, two or, where groups have up to 4
// pairs, three, take units in turn; each warp of a team multiplies a part of k of its own, so that a sum is made of the
// same terms in the same order whoever else is in the batch; the eight sums of an element meet in shared memory, where
// two warps in turn add them in the order of the warps and finish 16 rows by 8 pairs each while the others go on.
//
//   HBM -> (cp.async, ring of 3 stages of 2 KiB a warp) -> ldmatrix -> codes to f16 in registers -> mma.sync
//   x, h -> (8-bit codes, f16 or bf16 in shared memory, once for several groups) -> B operand
//
// Shared memory: ring 57 KiB a team (MXFP4; 60 NVFP4, 54 otherwise) | sums of the warps, 16 KiB a team, 8 with three |
// rows of x | their scales | row facts | block scales of an FP8 expert | groups of pairs. The ids are older than the
// first kernel, so the second one starts to stream w2 on every SM that the first has left, before it waits.
//
// Floor: the bytes of the chosen experts (MXFP4 17/32 of a byte a weight, NVFP4 9/16) over the memory's speed. Next is
// the issue of instructions: at that speed an SM gets 18 bytes, 34 codes, a cycle. 4096 of them are a warp's 310
// instructions with up to 4 pairs (330 with up to 8, 400 with up to 16), 145 of which are integer instructions that
// issue every other cycle: a scheduler has 484 cycles for them. Two warps a scheduler reach half of its slots, four 70
// % of them; six have room for the registers of up to 4 pairs only. These leave every other column of a fragment free,
// so that each lane scales the sums of one pair.
//
// What comes before the first product is a quarter of the first kernel at one token, and mostly waiting: so the groups
// of up to 32 pairs are found with one barrier, and the rows of x are asked for before the weights.
//
// H200, 2026-11-25, us warm (floor): one token MXFP4 4096 x 2048 38.7 (17.1), 7168 x 3072 74.2 (44.8), NVFP4 41.7
// (18.1) and 81.5 (47.4); MXFP4, 16 tokens on 256 experts 359 (273), 64 on 32 experts 254, one behind the other with
// weights of their own 215 (91). What was tried: 8 warps an SM instead of 16 is 10 to 15 % slower; deeper rings and
// scales decoded once a stage give 3 to 7 % at 16 and 64 tokens and take 5 % at one; reading the ids, and starting on
// w1 and w3, before the wait changed nothing; three teams instead of two take 6 to 8 % off MXFP4 4096 x 2048 at 16 and
// 64 tokens on 256 experts, change nothing at one token, and lose 4 % at MXFP4 7168 x 3072 and up to 15 % with NVFP4,
// where fewer rows fit beside a third ring.
#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "common/swiglu.cuh"
#include "common/vector.cuh"
#include "moe/decode_formats.cuh"
#include "moe/decode_inputs.cuh"
#include "moe/decode_plan.h"
#include "moe/decode_stream.cuh"
#include "moe/moe.h"
#include "moe/pairs.cuh"

namespace dsv4 {
namespace moe {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kSharedMost = 227 * 1024;
constexpr int kRowsInHalves = 12;

// What the CTA knows of where it is.
struct Cta {
  const Moe& moe;
  const DecodePlan& plan;
  uint8_t* shared;
  int turn = 0;  // of the warps that finish sums

  // Where the sums of the thread's team meet.
  __device__ __forceinline__ uint8_t* sums(int buffer) const {
    const int team = threadIdx.x / kTeamThreads;
    return shared + plan.partials + (team * 2 + buffer) * plan.sums;
  }
};

// What a lane has of a unit's fragment: rows lane / 4 and lane / 4 + 8 of one or two pairs.
template <bool kFew>
using LaneSums = std::conditional_t<kFew, float2, float4>;

template <bool kFew>
constexpr int kSumsBytes = kWarps * 2 * kWarp * sizeof(LaneSums<kFew>);  // of a team: a unit and 4 or 8 pairs

template <bool kFew>
__device__ __forceinline__ LaneSums<kFew> lane_sums(const float (&sum)[4]) {
  if constexpr (kFew) {
    return {sum[0], sum[2]};
  } else {
    return {sum[0], sum[1], sum[2], sum[3]};
  }
}

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Sum i of a lane's pairs: gate and up, or two rows of w2.
__device__ __forceinline__ float2 of_pair(float2 sum, int) { return sum; }
__device__ __forceinline__ float2 of_pair(float4 sum, int i) {
  return i == 0 ? float2{sum.x, sum.z} : float2{sum.y, sum.w};
}

// Sums of fragment m of a unit -> h of the lane's pairs, or results of them.
template <typename Format, bool kFirst, bool kFew>
__device__ __forceinline__ void finish(const StagedRows& rows, const Walk& walk, int m, int first_row, int end_row,
                                       LaneSums<kFew> sum) {
  constexpr int kPairs = kFew ? 1 : 2;
  const int lane = threadIdx.x % kWarp;
  const RowFacts facts = rows.facts();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int row = first_row + lane % 4 * kPairs + i;
    if (row >= end_row) continue;
    float upper = of_pair(sum, i).x, lower = of_pair(sum, i).y;
    if constexpr (Format::kFormat == MoeFormat::kNvfp4) {
      upper *= facts.gate_factor[row];
      lower *= kFirst ? facts.up_factor[row] : facts.gate_factor[row];
    }
    if constexpr (Format::kFormat == MoeFormat::kMxfp4) {  // a scale that is NaN: see Mxfp4::scale_of
      upper = __fmaf_rn(upper, 0.0f, upper);
      lower = __fmaf_rn(lower, 0.0f, lower);
    }
    const int64_t pair = facts.pair[row];
    if constexpr (kFirst) {
      const SwigluLimit limit(rows.moe.limit);
      const float gate = limit.gate(round_to<bf16>(upper)), up = limit.up(round_to<bf16>(lower));
      auto* const h = reinterpret_cast<bf16*>(rows.moe.workspace) + pair * rows.moe.inner;
      h[walk.tile * 16 + m * 8 + lane / 4] = from_float<bf16>(silu<bf16>(gate) * up * facts.route_weight[row]);
    } else {
      auto* const results = reinterpret_cast<bf16*>(rows.moe.workspace + rows.plan.results);
      bf16* const at = results + pair * rows.moe.d + walk.tile * 32 + m * 16 + lane / 4;
      at[0] = from_float<bf16>(upper);
      at[8] = from_float<bf16>(lower);
    }
  }
}

// One pass over a unit: the rows of x from `first_row` to `end_row`, at most 8 * kTiles. kFew: at most kFewRows, which
// take the columns 0, 2, 4 and 6 of the products, so that a lane has sums of one of them. The columns between are the
// same again, and nothing is done with them.
template <typename Format, bool kFirst, int kTiles, bool kFew = false>
__device__ __forceinline__ void multiply(Cta& cta, WeightStream<Format, kFirst>& stream, const StagedRows& rows,
                                         const Walk& walk, int first_row, int end_row) {
  const int warp = threadIdx.x / kWarp % kWarps, lane = threadIdx.x % kWarp;
  LaneRows<kTiles> x{};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int column = lane / 4;
    x.rows[tile] = rows.x(min(first_row + 8 * tile + (kFew ? column / 2 : column), end_row - 1)) + lane % 4 * 16;
  }
  x.scales = rows.x_scales() + first_row + lane % 4 * (kFew ? 1 : 2);
  x.scale_stride = cta.plan.scale_slots();
  if constexpr (Format::kFormat == MoeFormat::kFp8) {
    const int blocks = cta.plan.width / kMoeWidth, unit_rows = kFirst ? kStageRows / 2 : kStageRows;
    x.upper_scales = rows.weight_scales() + walk.tile * unit_rows / kMoeWidth * blocks;
    x.lower_scales = x.upper_scales + (kFirst ? cta.plan.row_tiles.value() * unit_rows / kMoeWidth * blocks : 0);
  }
  Sums<kTiles> sums = {};
#pragma unroll 1
  for (int step = stream.first_step(); step < stream.end_step(); ++step) {
    Format::step(sums, stream.next(), x, step, lane);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    auto* const of_warps = reinterpret_cast<LaneSums<kFew>*>(cta.sums(cta.turn % 2)) + lane;
#pragma unroll
    for (int m = 0; m < 2; ++m) of_warps[(warp * 2 + m) * kWarp] = lane_sums<kFew>(sums[tile][m]);
    // One barrier is enough: who writes to this buffer again has passed the barrier of the other one, and who reads it
    // now comes to that barrier afterwards.
    ptx::named_barrier(1 + threadIdx.x / kTeamThreads, kTeamThreads);
    if (warp / 2 == cta.turn % (kWarps / 2)) {
      const int m = warp % 2;
      LaneSums<kFew> total = of_warps[m * kWarp];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) total = total + of_warps[(other * 2 + m) * kWarp];
      finish<Format, kFirst, kFew>(rows, walk, m, first_row + 8 * tile, end_row, total);
    }
    ++cta.turn;
  }
}

// All units of the CTA, for as many groups at a time as their rows fit into shared memory. `rows` has none yet. kFew:
// no group has more than kFewRows pairs.
template <typename Format, bool kFirst, bool kFew>
__device__ __forceinline__ void multiply_all(Cta& cta, WeightStream<Format, kFirst>& stream, StagedRows& rows,
                                             const Share& share, Walk walk) {
  const DecodePlan& plan = cta.plan;
  const int last_group = plan.row_tiles.divide(max(share.end - 1, 0));
  for (int first = share.begin; first < share.end;) {
    if (first > share.begin) __syncthreads();  // nobody reads the rows before any more
    rows.choose(plan.row_tiles.divide(first), last_group, Format::kFormat == MoeFormat::kFp8);  // block scales of one
    if constexpr (kFirst) {
      // Behind the loads of x, which would come late if they queued behind weights.
      fill_from_x<Format>(rows, [&] {
        if (first == share.begin) stream.start();
      });
    } else {
      fill_from_h<Format>(rows);
    }
    __syncthreads();
    const int end = min(share.end, rows.end_group * static_cast<int>(plan.row_tiles.value()));
    while (walk.unit < end) {
      const int first_row = rows.groups.place_of(walk.group) - rows.place + walk.pass * kPassRows;
      const int end_row = min(rows.groups.place_of(walk.group + 1) - rows.place, first_row + kPassRows);
      if (kFew || end_row - first_row <= kFewRows) {
        multiply<Format, kFirst, 1, true>(cta, stream, rows, walk, first_row, end_row);
      } else if (end_row - first_row <= 8) {
        multiply<Format, kFirst, 1>(cta, stream, rows, walk, first_row, end_row);
      } else {
        multiply<Format, kFirst, 2>(cta, stream, rows, walk, first_row, end_row);
      }
      walk.advance(plan, rows.groups);
    }
    first = end;
  }
}

// The block of tokens of a CTA.
struct Block {
  int64_t first_token;
  int pairs;

  __device__ __forceinline__ Block(const Moe& moe, const DecodePlan& plan)
      : first_token(static_cast<int64_t>(blockIdx.y) * plan.block_tokens),
        pairs(static_cast<int>(min(moe.tokens - first_token, static_cast<int64_t>(plan.block_tokens))) * moe.k) {}
};

template <typename Format, bool kFew>
__global__ void __launch_bounds__(kTeams<kFew> * kTeamThreads, 1)
    experts_first_kernel(const __grid_constant__ Moe moe, const __grid_constant__ DecodePlan plan,
                         const __grid_constant__ PairIds ids) {
  extern __shared__ __align__(16) uint8_t shared[];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const Block block(moe, plan);
  PairGroups groups(shared + plan.groups, plan.block_tokens * moe.k);
  groups.find(ids, block.first_token, block.pairs);
  Cta cta{moe, plan, shared};
  StagedRows rows{moe, plan, groups, ids.k, block.first_token, shared};
  const Share share(plan, groups);
  const Walk walk(plan, groups, share);
  WeightStream<Format, true> stream(moe, plan, groups, walk, shared);
  multiply_all<Format, true, kFew>(cta, stream, rows, share, walk);
}

template <typename Format, bool kFew>
__global__ void __launch_bounds__(kTeams<kFew> * kTeamThreads, 1)
    experts_second_kernel(const __grid_constant__ Moe moe, const __grid_constant__ DecodePlan plan,
                          const __grid_constant__ PairIds ids) {
  extern __shared__ __align__(16) uint8_t shared[];
  // The ids may be read before the wait. The kernel in front of this one on the stream, experts_first_kernel, lets this
  // one start only after its own wait, that is when everything before it, the router too, has finished and can be seen.
  const Block block(moe, plan);
  PairGroups groups(shared + plan.groups, plan.block_tokens * moe.k);
  groups.find(ids, block.first_token, block.pairs);
  Cta cta{moe, plan, shared};
  StagedRows rows{moe, plan, groups, ids.k, block.first_token, shared};
  const Share share(plan, groups);
  const Walk walk(plan, groups, share);
  WeightStream<Format, false> stream(moe, plan, groups, walk, shared);
  stream.start();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  multiply_all<Format, false, kFew>(cta, stream, rows, share, walk);
}

// As many rows of x as an expert can have, and two even with one token: a CTA whose share ends in another expert than
// it begins has both at once.
int wanted_capacity(const Moe& moe) { return static_cast<int>(std::clamp<int64_t>(moe.tokens, 2, kMostRows)); }

template <typename Format, bool kFirst, bool kFew>
DecodePlan plan_of(const Moe& moe) {
  DecodePlan plan{};
  plan.teams = kTeams<kFew>;
  plan.sums = kSumsBytes<kFew>;
  plan.pass_rows = kFew ? kFewRows : kPassRows;
  plan.width = kFirst ? moe.d : moe.inner;
  plan.steps = plan.width / Format::kStep;
  plan.row_bytes = plan.steps * kStageRowBytes;
  plan.block_tokens = static_cast<int>(std::min<int64_t>(moe.tokens, std::max(1, kBlockPairs / moe.k)));
  plan.eighths = Divisor(plan.width / 8);
  plan.results = workspace_of(moe).results;
  plan.x_stride = plan.width / 8 * Format::kEightBytes + kPartBytes;
  const int blocks = plan.width / kMoeWidth;
  const auto lay_out = [&](int capacity) {
    plan.capacity = capacity;
    plan.partials = plan.teams * kWarps * kStages * kStageBytes<Format>;
    plan.x = plan.partials + plan.teams * 2 * plan.sums;
    plan.x_scales = plan.x + capacity * plan.x_stride;
    plan.row_facts = plan.x_scales + (Format::kBlockScales ? plan.scale_slots() * blocks * 4 : 0);
    plan.weight_scales = plan.row_facts + capacity * RowFacts::kBytes;
    const int expert_blocks = (kFirst ? 2 * moe.inner : moe.d) / kMoeWidth * blocks;
    plan.groups = (plan.weight_scales + (Format::kFormat == MoeFormat::kFp8 ? expert_blocks * 4 : 0) + 15) / 16 * 16;
    plan.size = plan.groups + PairGroups::shared_bytes(plan.block_tokens * moe.k);
  };
  int capacity = std::min(wanted_capacity(moe), kFew ? kFewRows : kMostRows);
  for (lay_out(capacity); capacity > 1 && plan.size > kSharedMost;) lay_out(--capacity);
  return plan;
}

template <typename Format, bool kFirst, bool kFew>
cudaError_t launch_teams(const Moe& moe, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  DecodePlan plan = plan_of<Format, kFirst, kFew>(moe);
  const int row_tiles = kFirst ? moe.inner / (kStageRows / 2) : moe.d / kStageRows;
  const int64_t units = static_cast<int64_t>(plan.block_tokens) * moe.k * row_tiles;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(processors, units));
  const auto blocks = static_cast<unsigned>((moe.tokens + plan.block_tokens - 1) / plan.block_tokens);
  plan.row_tiles = Divisor(row_tiles);
  plan.ctas = Divisor(ctas);
  const PairIds ids{moe.ids, moe.ids_stride, Divisor(moe.k), moe.experts, plan.capacity};
  const Launch at{dim3(ctas, blocks), dim3(kTeams<kFew> * kTeamThreads), stream, static_cast<size_t>(plan.size)};
  const auto kernel = kFirst ? experts_first_kernel<Format, kFew> : experts_second_kernel<Format, kFew>;
  return launch_kernel(kernel, at, moe, plan, ids);
}

// Whether three teams serve: for MXFP4, whose instructions weigh most, where the rows of a full group fit. Their groups
// have few pairs, so an expert with more is read again for each group: worth it where experts have half as many on
// average, since few have more, and those who have took them from others.
template <typename Format, bool kFirst>
bool few_pairs(const Moe& moe) {
  return plan_of<Format, kFirst, true>(moe).capacity == kFewRows && 2 * moe.tokens * moe.k <= kFewRows * moe.experts;
}

template <typename Format, bool kFirst>
cudaError_t launch_product(const Moe& moe, cudaStream_t stream) {
  if constexpr (Format::kFormat == MoeFormat::kMxfp4) {
    if (few_pairs<Format, kFirst>(moe)) return launch_teams<Format, kFirst, true>(moe, stream);
  }
  return launch_teams<Format, kFirst, false>(moe, stream);
}

// x as f16 where enough of its rows fit so that hardly an expert has more.
template <bool kFirst>
cudaError_t launch_mxfp4(const Moe& moe, cudaStream_t stream) {
  const bool fits =
      few_pairs<Mxfp4<true>, kFirst>(moe) ||
      plan_of<Mxfp4<true>, kFirst, false>(moe).capacity >= std::min<int64_t>(moe.tokens, kRowsInHalves);
  return fits ? launch_product<Mxfp4<true>, kFirst>(moe, stream) : launch_product<Mxfp4<false>, kFirst>(moe, stream);
}

template <bool kFirst>
cudaError_t launch(const Moe& moe, cudaStream_t stream) {
  switch (moe.format) {
    case MoeFormat::kDense: return launch_product<Dense, kFirst>(moe, stream);
    case MoeFormat::kFp8: return launch_product<Fp8, kFirst>(moe, stream);
    case MoeFormat::kMxfp4: return launch_mxfp4<kFirst>(moe, stream);
    case MoeFormat::kNvfp4: return launch_product<Nvfp4, kFirst>(moe, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace moe

cudaError_t launch_moe_decode(const Moe& moe, cudaStream_t stream) {
  const cudaError_t status = moe::launch<true>(moe, stream);
  return status != cudaSuccess ? status : moe::launch<false>(moe, stream);
}

}  // namespace dsv4
