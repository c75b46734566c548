// The rows of x that groups of pairs multiply with: to shared memory, in the order that the products want.
//
// For w1 and w3 these are the tokens' rows of x; for w2 they are rows of h, which every CTA that needs one quantises
// for itself. They are brought for as many groups at a time as fit. Called by all threads of a CTA between two
// barriers.
#pragma once

#include <type_traits>

#include "common/number_formats.cuh"
#include "common/quantise.cuh"
#include "moe/decode_formats.cuh"
#include "moe/decode_plan.h"
#include "moe/moe.h"
#include "moe/pairs.cuh"

namespace dsv4::moe {

// What the sums of a row become (row_facts in shared memory, capacity slots of each).
struct RowFacts {
  int* pair;            // number of the pair in the call
  float* route_weight;  // w1 and w3
  float* gate_factor;   // what the sum is multiplied with (w2: this one)
  float* up_factor;
  uint32_t* amax;       // NVFP4 of h: bits of the row's largest magnitude

  static constexpr int kBytes = 20;  // of a slot

  __device__ __forceinline__ RowFacts(uint8_t* shared, int slots)
      : pair(reinterpret_cast<int*>(shared)),
        route_weight(reinterpret_cast<float*>(pair + slots)),
        gate_factor(route_weight + slots),
        up_factor(gate_factor + slots),
        amax(reinterpret_cast<uint32_t*>(up_factor + slots)) {}
};

// The rows in shared memory: those of the pairs at the places from `place` on, of whole groups.
struct StagedRows {
  const Moe& moe;
  const DecodePlan& plan;
  const PairGroups& groups;
  const Divisor& k;
  int64_t first_token;
  uint8_t* shared;
  int place = 0, count = 0;
  int end_group = 0;  // the first one whose rows are not there

  // As many groups as fit, from `group` to `last` at most.
  __device__ __forceinline__ void choose(int group, int last, bool one) {
    place = groups.place_of(group);
    end_group = group + 1;
    while (!one && end_group <= last && groups.place_of(end_group + 1) - place <= plan.capacity) ++end_group;
    count = groups.place_of(end_group) - place;
  }

  __device__ __forceinline__ int64_t pair(int row) const {
    return first_token * k.value() + groups.pair_at(place + row);
  }
  __device__ __forceinline__ int64_t token(int row) const {
    return first_token + k.divide(groups.pair_at(place + row));
  }
  __device__ __forceinline__ int expert(int row) const { return groups.expert_at(place + row); }
  __device__ __forceinline__ uint8_t* x(int row) const { return shared + plan.x + row * plan.x_stride; }
  __device__ __forceinline__ float* x_scales() const { return reinterpret_cast<float*>(shared + plan.x_scales); }
  __device__ __forceinline__ float* weight_scales() const {
    return reinterpret_cast<float*>(shared + plan.weight_scales);
  }
  __device__ __forceinline__ RowFacts facts() const { return {shared + plan.row_facts, plan.capacity}; }
};

constexpr int kBatch = 4;  // loads of a thread that are under way together

__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }

// store(row, j, load(row, j)) for every eight values j of every row, some loads at a time; meanwhile(), once in every
// thread, while the first of them are under way. kWhole: all lanes of a warp call `store` together, those without a
// value with zeros and `inside` false.
template <bool kWhole, typename Load, typename Store, typename Meanwhile>
__device__ __forceinline__ void for_eighths(const StagedRows& rows, Load load, Store store, Meanwhile meanwhile) {
  const int eighths = static_cast<int>(rows.plan.eighths.value()), count = rows.count * eighths;
  const int of_warp = threadIdx.x % kWarp;
  int first = threadIdx.x;
  do {
    decltype(load(0, 0)) values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * threads(), row = rows.plan.eighths.divide(at);
      values[i] = {};
      if (at < count) values[i] = load(row, at - row * eighths);
    }
    if (first == threadIdx.x) meanwhile();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * threads();
      const bool inside = at < count;
      const int row = inside ? rows.plan.eighths.divide(at) : 0;
      if (kWhole || inside) store(row, inside ? at - row * eighths : 0, values[i], inside);
    }
    first += kBatch * threads();
  } while (first - of_warp < count);
}

template <bool kWhole, typename Load, typename Store>
__device__ __forceinline__ void for_eighths(const StagedRows& rows, Load load, Store store) {
  for_eighths<kWhole>(rows, load, store, [] {});
}

// 0 for the slots behind the last row, which belong to no pair.
__device__ __forceinline__ void clear_x_scales(const StagedRows& rows) {
  const int slots = rows.plan.scale_slots(), behind = slots - rows.count, blocks = rows.plan.width / kMoeWidth;
  for (int i = threadIdx.x; i < behind * blocks; i += threads()) {
    const int block = i / behind;
    rows.x_scales()[block * slots + rows.count + i - block * behind] = 0.0f;
  }
}

// Scales of x: scales[block][slot] = scale(row, block) times `unit` for every 128 values of a row.
template <typename Scale>
__device__ __forceinline__ void fill_x_scales(const StagedRows& rows, float unit, float first, Scale scale) {
  const int slots = rows.plan.scale_slots(), blocks = rows.plan.width / kMoeWidth;
  for (int i = threadIdx.x; i < rows.count * blocks; i += threads()) {
    const int row = i / blocks, block = i - row * blocks;
    const float value = i == threadIdx.x ? first : scale(row, block);
    rows.x_scales()[block * slots + row] = value * unit;
  }
  clear_x_scales(rows);
}

// FP8: the scales of the expert's 128 x 128 blocks, of w1 and then w3, or of w2.
template <bool kFirst>
__device__ __forceinline__ void fill_weight_scales(const StagedRows& rows) {
  const int unit_rows = kFirst ? kStageRows / 2 : kStageRows;
  const int blocks = rows.plan.row_tiles.value() * unit_rows / kMoeWidth * (rows.plan.width / kMoeWidth);
  const int64_t first = static_cast<int64_t>(rows.expert(0)) * blocks;
  for (int i = threadIdx.x; i < (kFirst ? 2 : 1) * blocks; i += threads()) {
    const MoeWeight& weight = !kFirst ? rows.moe.w2 : i < blocks ? rows.moe.w1 : rows.moe.w3;
    const int64_t at = first + i % blocks;
    const bool fp32 = weight.dtype == Dtype::kFp32;
    rows.weight_scales()[i] = fp32 ? static_cast<const float*>(weight.scale)[at]
                                   : decode_ue8m0(static_cast<const uint8_t*>(weight.scale)[at]);
  }
}

__device__ __forceinline__ void fill_pairs(const StagedRows& rows) {
  static_assert(kMostRows <= kTeamThreads, "a thread a row");
  if (threadIdx.x < rows.count) rows.facts().pair[threadIdx.x] = static_cast<int>(rows.pair(threadIdx.x));
}

// What w1 and w3 need to know of the thread's row, on its way from memory.
struct RowLoads {
  float route_weight = 0.0f, x_global = 0.0f, gate_global = 0.0f, up_global = 0.0f;

  __device__ __forceinline__ explicit RowLoads(const StagedRows& rows) {
    const int row = threadIdx.x;
    if (row >= rows.count) return;
    const int64_t token = rows.token(row), slot = rows.pair(row) - token * rows.k.value();
    route_weight = rows.moe.route_weights[token * rows.moe.route_stride + slot];
    if (rows.moe.format != MoeFormat::kNvfp4) return;
    x_global = rows.moe.x_global[token * rows.moe.x_global_stride];
    gate_global = rows.moe.w1.global[rows.expert(row)];
    up_global = rows.moe.w3.global[rows.expert(row)];
  }

  __device__ __forceinline__ void store(const StagedRows& rows) const {
    const int row = threadIdx.x;
    if (row >= rows.count) return;
    const RowFacts facts = rows.facts();
    facts.route_weight[row] = route_weight;
    facts.gate_factor[row] = x_global * gate_global * Nvfp4::kUnit;
    facts.up_factor[row] = x_global * up_global * Nvfp4::kUnit;
  }
};

// ---- rows of x, for w1 and w3 ----

// meanwhile(), once in every thread, while the loads are under way.
template <typename Format, typename Meanwhile>
__device__ __forceinline__ void fill_from_x(const StagedRows& rows, Meanwhile meanwhile) {
  fill_pairs(rows);
  const RowLoads loads(rows);
  const auto source = [&](int row) {
    return static_cast<const uint8_t*>(rows.moe.x) + rows.token(row) * rows.moe.x_stride;
  };
  const auto scales = [&](int row) {
    return static_cast<const uint8_t*>(rows.moe.x_scale) + rows.token(row) * rows.moe.x_scale_stride;
  };
  const auto x_scale = [&](int row, int block) { return decode_ue8m0(scales(row)[block]); };
  float first_scale = 0.0f;  // of this thread: loaded together with the rows
  if constexpr (Format::kBlockScales) {
    const int blocks = rows.plan.width / kMoeWidth, row = threadIdx.x / blocks;
    if (row < rows.count) first_scale = x_scale(row, threadIdx.x - row * blocks);
  }
  if constexpr (Format::kFormat == MoeFormat::kNvfp4) {
    for_eighths<false>(
        rows,
        [&](int row, int j) {
          return uint2{*reinterpret_cast<const uint32_t*>(source(row) + 4 * j), scales(row)[j / 2]};
        },
        [&](int row, int j, uint2 value, bool) { Nvfp4::store(rows.x(row), j, value.x, value.y); }, meanwhile);
  } else {
    using Eight = std::conditional_t<Format::kFormat == MoeFormat::kDense, uint4, uint2>;
    for_eighths<false>(
        rows, [&](int row, int j) { return *reinterpret_cast<const Eight*>(source(row) + sizeof(Eight) * j); },
        [&](int row, int j, Eight value, bool) { Format::store(rows.x(row), j, value); }, meanwhile);
  }
  loads.store(rows);
  if constexpr (Format::kBlockScales) fill_x_scales(rows, Format::kUnit, first_scale, x_scale);
  if constexpr (Format::kFormat == MoeFormat::kFp8) fill_weight_scales<true>(rows);
}

// ---- rows of h, for w2 ----

__device__ __forceinline__ void unpack_eight(uint4 packed, float (&values)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_bf16x2(words[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

// FP8 in groups of 128, which 16 neighbouring lanes hold.
template <typename Format, typename Load>
__device__ __forceinline__ void fill_fp8(const StagedRows& rows, Load load) {
  const int slots = rows.plan.scale_slots();
  for_eighths<true>(rows, load, [&](int row, int j, uint4 packed, bool inside) {
    float values[8];
    alignas(8) uint8_t codes[8];
    unpack_eight(packed, values);
    const uint32_t scale = quantise_fp8<kMoeWidth>(values, codes);
    if (!inside) return;
    Format::store(rows.x(row), j, reinterpret_cast<const uint2&>(codes));
    if (j % 16 == 0) rows.x_scales()[j / 16 * slots + row] = decode_ue8m0(scale) * Format::kUnit;
  });
  clear_x_scales(rows);
}

// NVFP4 with a global scale for each row: its values wait in their place for the largest of them.
template <typename Load>
__device__ __forceinline__ void fill_nvfp4(const StagedRows& rows, Load load) {
  const RowFacts facts = rows.facts();
  for (int row = threadIdx.x; row < rows.count; row += threads()) facts.amax[row] = 0;
  __syncthreads();
  for_eighths<true>(rows, load, [&](int row, int j, uint4 packed, bool inside) {
    float values[8];
    unpack_eight(packed, values);
    const uint32_t amax = max_lanes<16>(max_magnitude_bits(values));
    if (!inside) return;
    *reinterpret_cast<uint4*>(rows.x(row) + 16 * j) = packed;
    if (j % 16 == 0) atomicMax(&facts.amax[row], amax);
  });
  __syncthreads();
  const auto from_shared = [&](int row, int j) { return *reinterpret_cast<const uint4*>(rows.x(row) + 16 * j); };
  for_eighths<true>(rows, from_shared, [&](int row, int j, uint4 packed, bool inside) {
    float values[8];
    alignas(4) uint8_t codes[4];
    unpack_eight(packed, values);
    const float global = nvfp4_global_scale(__uint_as_float(facts.amax[row]));
    const uint32_t scale = quantise_nvfp4(values, Nvfp4Global(global), codes);
    if (!inside) return;
    Nvfp4::store(rows.x(row), j, reinterpret_cast<const uint32_t&>(codes), scale);
    if (j == 0) facts.gate_factor[row] = global * rows.moe.w2.global[rows.expert(row)] * Nvfp4::kUnit;
  });
}

template <typename Format>
__device__ __forceinline__ void fill_from_h(const StagedRows& rows) {
  fill_pairs(rows);
  const auto load = [&](int row, int j) {
    return ptx::load_once(rows.moe.workspace + 2 * (rows.pair(row) * rows.plan.width + 8 * j));
  };
  if constexpr (Format::kFormat == MoeFormat::kNvfp4) {
    fill_nvfp4(rows, load);
  } else if constexpr (Format::kBlockScales) {
    fill_fp8<Format>(rows, load);
  } else {
    for_eighths<false>(rows, load,
                       [&](int row, int j, uint4 value, bool) { Dense::store(rows.x(row), j, value); });
  }
  if constexpr (Format::kFormat == MoeFormat::kFp8) fill_weight_scales<false>(rows);
}

}  // namespace dsv4::moe
