// Sparse attention of sparse_attention.cu for few rows: the work on a row is cut twice, each time along what that step
// of it does not sum over, so that few bytes pass from one step to the other. The same bits.
//
//   weigh_units_kernel  a CTA owns units (of 64 keys) of a row and a tile of heads: scores over all 512 dimensions,
//                       weights, largest scores and sums. It hands on 136 bytes a unit and head.
//   add_units_kernel    a CTA owns one slab of 64 dimensions of a row and a tile of heads, and all units: it multiplies
//                       its dimensions of the keys by the weights, and folds the units in order.
//
// Were a unit multiplied where it is weighed, its output would have to be handed on in fp32: 2048 bytes a head, which
// for 16 rows of 64 heads and 640 keys is 21 MB each way. Instead every key is gathered and unpacked twice, once by
// each kernel, an eighth of it by each CTA of the second; and that one does so while the first is still at work: it is
// launched after the wait of the first has returned, so all that kernels before the two wrote (pools, tables,
// positions, indices) may be read in front of its own wait. Only weights lie behind it.
//
// weigh_units_kernel: 384 threads. Warpgroup 0 has queries, scores and weights; warpgroups 1 and 2 are producers
// (producer.cuh), which hand over a tile in four parts, so that the scores of one are computed while the next is
// unpacked. Positions are guessed in front of the wait; after it the first lookups do not wait for the real ones. A CTA
// has one unit, or, where those of all rows would be more than SMs, as few as makes up for that. Shared memory: two
// tiles of keys 2 x 64 KB, queries kHeads KB, 32 bytes a head of what warps exchange.
//
// add_units_kernel: 384 threads: one or two consuming warpgroups of up to 32 heads each, the other warps gather keys. A
// stage is a unit: 8 KB of keys, 136 bytes a head of weights and totals, which are copied as one; there are 6 to 10 of
// them, so that two CTAs fit an SM. Where the output is quantised, two slabs share a scale: their CTAs are a cluster,
// and each reads the largest magnitudes of the other one's heads from its shared memory.
//
// What bounds it is latency, not bytes or flops. In the order of time, with what is under way at once in one step:
//
//   weigh_units_kernel   wait | position, index | page | key | a quarter of a tile unpacked (200 issue slots of each SM
//                        quarter) .. the last quarter | its 8 dependent wgmma | largest scores of four warps | weights
//                        | sums of four warps | end of the kernel
//   add_units_kernel     (before the wait: position, index, page, keys, unpacked) | weights | 4 wgmma and a fold a
//                        unit, in order | denominator | output through shared memory
//
// The fold is what grows with the number of keys; the rest is the same for 128 and for 640. For thousands of keys the
// gathering warps bound the second kernel, with 60 instructions for 8 keys. With 16 rows of 64 heads and 640 keys the
// first has 80 CTAs; 104 of the 128 of the second find room on other SMs, the last 24 start when the first ends, their
// keys still to come.
//
// H200, 2026-11-25, us warm, heads x keys, of 1 and 16 rows: 64 x 128 4.8 and 7.4, 64 x 640 8.4 and 22.0, 128 x 1152
// 15.2 and 39.7: one row of 64 heads takes 0.7 us more for each 100 keys.
#include <algorithm>

#include "attention/output.cuh"
#include "attention/products.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 3 * kWarpgroup;
[[maybe_unused]] constexpr int kBarrier = 1;  // of the first consuming warpgroup; the next has the next
constexpr int kHandedBytes = kUnit * 8 * 2 + 8 * sizeof(float2);  // of a unit and 8 heads, from one kernel to the other

// Heads for which a unit is handed on: as many as any choice of tiles reaches.
int padded_heads(int heads) { return heads <= 8 ? 8 : heads <= 16 ? 16 : heads <= 32 ? 32 : (heads + 63) / 64 * 64; }

int tiles_of(int heads, int tile) { return (heads + tile - 1) / tile; }

int units_of(const SparseAttention& attention) {
  return static_cast<int>((key_capacity(attention.keys) + kUnit - 1) / kUnit);
}

constexpr int kTiles = 2;  // of weigh_units_kernel
constexpr int kParts = 4;  // in which it hands over a tile

template <int kHeads>
struct WeighMemory {
  StagedTiles<kTiles, kParts> tiles;
  alignas(1024) uint8_t query[kHeads * kDim * 2];  // 8 slabs of [kHeads][128 bytes]
  float largest[4 * kHeads];
  float sum[4 * kHeads];
};

// kHeads of a consuming warpgroup, kGroups of those.
template <int kHeads, int kGroups>
struct AddMemory {
  static constexpr int kAll = kHeads * kGroups;
  static constexpr int kGatherWarps = kThreads / 32 - 4 * kGroups;
  static_assert(kUnit % (kGatherWarps * 8) == 0, "whole blocks of a warp in a unit");
  static constexpr int kDepth = kAll == 64 ? 6 : kAll == 32 ? 8 : 10;  // stages
  struct Stage {
    alignas(1024) uint8_t keys[kSlabBytes];
    alignas(128) uint8_t weights[kAll / 8 * kHandedBytes];
  };
  Stage stages[kDepth];
  alignas(16) uint8_t staging[kGroups][kHeads * kStagingStride<kSlab>];
  float reciprocals[kAll];
  alignas(8) uint64_t full[kDepth];
  uint64_t empty[kDepth];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What is handed on about a unit of a row: for every 8 heads their weights, then of each the largest score and the sum.
struct UnitWeights {
  uint8_t* data;

  __device__ __forceinline__ UnitWeights(float* partials, int padded_heads, int64_t unit)
      : data(reinterpret_cast<uint8_t*>(partials) + unit * (padded_heads / 8 * kHandedBytes)) {}
  __device__ __forceinline__ uint8_t* of_heads(int first_head) const { return data + first_head / 8 * kHandedBytes; }
};

// Largest score and sum of head number `head` of those whose weights start at `weights`.
__device__ __forceinline__ float2* totals_of(uint8_t* weights, int head) {
  return reinterpret_cast<float2*>(weights + head / 8 * kHandedBytes + kWeightBytes) + head % 8;
}

// Where add_units_kernel gets what it adds up.
struct WeighedUnits {
  float* partials;
  int64_t first;  // unit of the row
  int padded, first_head;

  // One thread: weights and totals of a unit, for the heads of this CTA.
  template <typename Memory>
  __device__ __forceinline__ void copy(Memory& memory, int unit) const {
    constexpr uint32_t kBytes = sizeof(Memory::Stage::weights);
    typename Memory::Stage& stage = memory.stages[unit % Memory::kDepth];
    const uint32_t full = ptx::shared_address(memory.full + unit % Memory::kDepth);
    const UnitWeights from(partials, padded, first + unit);
    ptx::mbarrier_arrive_expect(full, kBytes);
    ptx::cp_async_bulk(ptx::shared_address(stage.weights), from.of_heads(first_head), kBytes, full);
  }
};

// A producing warp of add_units_kernel: one slab of all keys, in blocks of 8 as in producer.cuh. Lane l has key l / 4
// of a block and quarter l % 4 of its dimensions. It loads 128 bytes at once, of eight blocks or four of the rope slab;
// while those are handed over nothing is under way but the lookups of what follows (see producer.cuh).
// Where a stage is filled again, the wait for the weights has returned, and one thread has those copied too.
template <bool kRope, typename Memory>
__device__ __forceinline__ void gather_slab(const KeySources& sources, const RowKeys& row, Memory& memory,
                                            const WeighedUnits& weighed, int units, int slab, int warp) {
  using Keys = WarpKeys<Memory::kGatherWarps>;
  constexpr int kBlocks = Keys::kBlocks, kBatch = Keys::kBatch;
  constexpr int kLookups = kRope ? 1 : 2, kUnderWay = kLookups * kBatch, kPieces = kRope ? 2 : 1;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
  const uint32_t full = ptx::shared_address(memory.full), empty = ptx::shared_address(memory.empty);
  const Keys own(0, units, 1, warp);
  Lookup upcoming[kLookups], later[kLookups];
  KeyPlace places[kLookups];
  int batches = 0;  // looked up
  const auto find_entries = [&](Lookup(&found)[kLookups]) {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) found[i] = own.find_entry(sources, row, batches++);
  };
  const auto find_pages = [&] {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) find_page(sources, row, upcoming[i]);
  };
  uint4 parts[kUnderWay][kPieces];
  uint32_t scales[kUnderWay];
  find_entries(upcoming);
  find_entries(later);
  find_pages();
  for (int first = 0; first < own.blocks; first += kUnderWay) {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      places[i] = place_of(sources, row, upcoming[i]);
      upcoming[i] = later[i];
    }
    find_pages();
    find_entries(later);
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const KeyPlace& place = places[i / kBatch];
      const int source = i % kBatch * kBlock + column;
      const int offset = kRope ? kNope + quarter * 32 : slab * kSlab + quarter * 16;
      const uint8_t* const data = from_lane(place.data, source) + offset;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) parts[i][piece] = ptx::load_once(data + piece * 16);
      scales[i] = kRope ? 0 : from_lane(place.scales, source)[slab];
    }
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const int block = first + i, unit = block / kBlocks, stage = unit % Memory::kDepth, use = unit / Memory::kDepth;
      if (block >= own.blocks) break;
      if (block % kBlocks == 0 && use > 0) {
        ptx::mbarrier_wait(empty + 8 * stage, (use - 1) & 1);
        if (warp == 0 && lane == 0) weighed.copy(memory, unit);
      }
      uint4 a, b;
      if constexpr (kRope) {
        a = parts[i][0];
        b = parts[i][1];
        split_pairs(a, b);
      } else {
        unpack_e4m3(parts[i][0], first_factor(min(scales[i], kLargestScale)), a, b);
        if (scales[i] > kLargestScale) {
          multiply_chunk(a, second_factor(scales[i]));
          multiply_chunk(b, second_factor(scales[i]));
        }
      }
      const int key = (block % kBlocks * Memory::kGatherWarps + warp) * kBlock + column;
      uint8_t* const keys = memory.stages[stage].keys;
      *reinterpret_cast<uint4*>(keys + chunk_offset(key, 2 * quarter)) = a;
      *reinterpret_cast<uint4*>(keys + chunk_offset(key, 2 * quarter + 1)) = b;
      if (block % kBlocks == kBlocks - 1) {
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(full + 8 * stage);
      }
    }
  }
}

// A consuming warpgroup: the fold over all units. Products of kTogether units are under way while the steps of the fold
// are computed; where fewer are left, the last one is multiplied again, and not added: a branch around products would
// make ptxas serialise them all.
template <int kHeads, int kTogether, typename Memory>
__device__ __forceinline__ void fold_units(Memory& memory, int units, int group, float (&output)[kHeads / 2],
                                           Total& total) {
  const int thread = threadIdx.x % kWarpgroup;
  float references[kColumns<kHeads>];
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) references[column] = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) output[i] = 0.0f;
  for (int first = 0; first < units; first += kTogether) {
    float parts[kTogether][kHeads / 2];
    Steps<kHeads> steps[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int unit = min(first + i, units - 1);
      ptx::mbarrier_wait(ptx::shared_address(memory.full + unit % Memory::kDepth), unit / Memory::kDepth & 1);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int stage = min(first + i, units - 1) % Memory::kDepth;
      uint8_t* const weights = memory.stages[stage].weights + group * (kHeads / 8 * kHandedBytes);
      multiply_weights<kHeads, kHandedBytes>(ptx::shared_address(memory.stages[stage].keys),
                                             ptx::shared_address(weights), 0, parts[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool exists = first + i < units;
      uint8_t* const weights = memory.stages[min(first + i, units - 1) % Memory::kDepth].weights +
                               group * (kHeads / 8 * kHandedBytes);
      float largest[kColumns<kHeads>];
#pragma unroll
      for (int column = 0; column < kColumns<kHeads>; ++column) {
        const float of_unit = totals_of(weights, head_of_column(column, threadIdx.x % kWarp))->x;
        largest[column] = exists ? of_unit : references[column];
      }
      steps[i] = Steps<kHeads>(references, largest);
      if (exists && thread < kHeads) {
        const float2 own = *totals_of(weights, thread);
        total.add(own.x, own.y);
      }
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= units) break;
      ptx::pin_registers(parts[i]);
      ptx::mbarrier_arrive(ptx::shared_address(memory.empty + (first + i) % Memory::kDepth));
      if (steps[i].rescale) rescale_output<kHeads>(output, steps[i]);
      add_output<kHeads>(output, parts[i], steps[i]);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    weigh_units_kernel(const __grid_constant__ SparseAttention attention, int units, int padded) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<WeighMemory<kHeads>*>(memory_start);
  constexpr int kProducerWarps = 8;
  const Tiles tiles = start_tiles(memory.tiles, kProducerWarps, kWarpgroup);
  const int head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t row = blockIdx.x / head_tiles, first_head = blockIdx.x % head_tiles * kHeads;
  const int first = blockIdx.y, step = gridDim.y, thread = threadIdx.x;
  const int32_t* const position = position_of(attention.rope, row);
  const int guess = guess_position(attention.rope, position);
  const bool producer = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0) != 0;  // known to be the same in all lanes
  RowKeys keys = keys_of_row(attention.keys, attention.rope, row, guess);
  WarpKeys<kProducerWarps> own(first, units_of_row(keys), step, threadIdx.x / kWarp - 4);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  if (producer) {
    const int actual = ptx::load_relaxed(position);
    FirstLookups lookups(attention.keys, keys, own);
    if (actual != guess) {
      keys = keys_of_row(attention.keys, attention.rope, row, actual);
      own = WarpKeys<kProducerWarps>(first, units_of_row(keys), step, own.warp);
      lookups = FirstLookups(attention.keys, keys, own);
    }
    if (own.blocks > 0) {
      produce<kProducerWarps, kTiles, kParts>(attention.keys, keys, tiles, own, lookups);
    }
    return;
  }
  const int row_units = units_of_row(keys_of_row(attention.keys, attention.rope, row));
  if (first >= row_units) return;
  const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;
  load_queries<kHeads>(static_cast<const __nv_bfloat16*>(attention.q) + vector * attention.q_stride, attention.q_stride,
                       attention.heads - first_head, memory.query, thread, kWarpgroup);
  ptx::fence_async_proxy();
  ptx::named_barrier(kBarrier, kWarpgroup);
  const uint32_t query = ptx::shared_address(memory.query);
  for (int unit = first, tile = 0; unit < row_units; unit += step, ++tile) {
    const int stage = tile % kTiles, parity = tile / kTiles & 1;
    const uint32_t tile_keys = ptx::shared_address(tiles.keys) + stage * kTileBytes;
    float scores[kHeads / 2], own_largest = -INFINITY;
    static_assert(kParts == 4 && kSlabs == 8, "two slabs a part");
    ptx::mbarrier_wait(tiles.full_barrier(stage * kParts), parity);
    multiply_slabs<kHeads, 0, 2>(tile_keys, query, scores);
    ptx::mbarrier_wait(tiles.full_barrier(stage * kParts + 1), parity);
    multiply_slabs<kHeads, 2, 4>(tile_keys, query, scores);
    ptx::mbarrier_wait(tiles.full_barrier(stage * kParts + 2), parity);
    multiply_slabs<kHeads, 4, 6>(tile_keys, query, scores);
    ptx::mbarrier_wait(tiles.full_barrier(stage * kParts + 3), parity);
    multiply_slabs<kHeads, 6, 8>(tile_keys, query, scores);
    const uint64_t valid = *reinterpret_cast<const uint64_t*>(tiles.valid + stage * 8);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    ptx::mbarrier_arrive(tiles.empty_barrier(stage));
    const int64_t result = static_cast<int64_t>(row) * units + unit;
    uint8_t* const weights = UnitWeights(attention.partials, padded, result).of_heads(first_head);
    weigh<kHeads, kHandedBytes>(scores, valid, Exchange{weights, memory.largest, memory.sum}, kBarrier, own_largest,
                                [](int, float) {});
    ptx::named_barrier(kBarrier, kWarpgroup);
    if (thread < kHeads) {
      *totals_of(weights, thread) = float2{own_largest, combine_warps<kHeads>(memory.sum, thread, Sum())};
    }
  }
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

// Quantised, two slabs share a scale: their CTAs are a cluster, and each looks up the other's largest magnitudes.
template <int kHeads, int kGroups, bool kQuantised>
__global__ void __launch_bounds__(kThreads, 2)
    add_units_kernel(const __grid_constant__ SparseAttention attention, int units, int padded) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  using Memory = AddMemory<kHeads, kGroups>;
  auto& memory = *reinterpret_cast<Memory*>(memory_start);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Memory::kDepth; ++stage) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + stage), Memory::kGatherWarps * kWarp + 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + stage), kGroups * kWarpgroup);
    }
    ptx::fence_async_proxy();  // bulk copies arrive there
  }
  __syncthreads();
  const int head_tiles = (attention.heads + Memory::kAll - 1) / Memory::kAll;
  const uint32_t row = blockIdx.x / head_tiles;
  const int slab = blockIdx.y, first_head = blockIdx.x % head_tiles * Memory::kAll;
  const int position = ptx::load_relaxed(position_of(attention.rope, row));
  const RowKeys keys = keys_of_row(attention.keys, attention.rope, row, position);
  const int row_units = units_of_row(keys);
  const WeighedUnits weighed{attention.partials, static_cast<int64_t>(row) * units, padded, first_head};
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
  if (warp >= 4 * kGroups) {
    const int gatherer = warp - 4 * kGroups;
    ptx::fence_gpu();  // no wait does this for what is read here: L1 may still hold what earlier kernels read
    if (slab == kSlabs - 1) {
      gather_slab<true>(attention.keys, keys, memory, weighed, row_units, slab, gatherer);
    } else {
      gather_slab<false>(attention.keys, keys, memory, weighed, row_units, slab, gatherer);
    }
  } else {
    const int group = kGroups == 1 ? 0 : warp / 4, thread = threadIdx.x % kWarpgroup;
    const int own_head = first_head + group * kHeads;
    const float sink = thread < kHeads ? sink_of(attention, own_head + thread) : 0.0f;
    const float2 turn = inverse_turn(attention.rope, position);
    ptx::wait_for_predecessors();
    ptx::launch_dependents();

    if (threadIdx.x < min(row_units, Memory::kDepth)) weighed.copy(memory, threadIdx.x);
    constexpr int kTogether = Memory::kAll >= 32 ? 1 : 2;  // as many as registers allow
    float output[kHeads / 2];
    Total total;
    fold_units<kHeads, kTogether>(memory, row_units, group, output, total);
    float* const reciprocals = memory.reciprocals + group * kHeads;
    if (thread < kHeads) {
      reciprocals[thread] = finish_head(attention, row, own_head + thread, sink, total, slab == 0);
    }
    ptx::named_barrier(kBarrier + group, kWarpgroup);
    float reciprocal[kColumns<kHeads>];
    load_columns<kHeads>(reciprocals, reciprocal);
    finish_slab<kHeads>(output, reciprocal, slab == kSlabs - 1, turn);
    stage_slab<kHeads, kSlab>(output, memory.staging[group], 0);
    ptx::named_barrier(kBarrier + group, kWarpgroup);
    const int64_t vector = static_cast<int64_t>(row) * attention.heads + own_head;
    if constexpr (kQuantised) {
      store_half_groups<kHeads>(memory.staging[group], reinterpret_cast<uint32_t*>(reciprocals), attention, vector,
                                attention.heads - own_head, slab);
    } else {
      store_rows<kHeads, kSlab>(memory.staging[group], attention, vector, attention.heads - own_head, slab * kSlab);
    }
  }
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

// The smallest tile of heads, but not of 8 where there are more, with which `count` CTAs a row and tile are no more
// than `room`; or 64.
int choose_tile(const SparseAttention& attention, int64_t count, int64_t room) {
  for (const int tile : {8, 16, 32}) {
    if (attention.heads <= tile) return tile;
    if (tile > 8 && attention.rows * tiles_of(attention.heads, tile) * count <= room) return tile;
  }
  return 64;
}

// An SM has to be idle to change how its memory is shared out, so both kernels ask for the same.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_in_turn(void (*kernel)(Parameters...), const Launch& at, Arguments... arguments) {
  const auto division = cudaFuncAttributePreferredSharedMemoryCarveout;
  const cudaError_t status = cudaFuncSetAttribute(kernel, division, cudaSharedmemCarveoutMaxShared);
  return status == cudaSuccess ? launch_kernel(kernel, at, arguments...) : status;
}

template <int kHeads>
cudaError_t launch_weigh(const SparseAttention& attention, int units, int processors, cudaStream_t stream) {
  const int64_t tiles = attention.rows * tiles_of(attention.heads, kHeads);
  // No more CTAs than the largest number of units of one asks for: add_units_kernel starts where SMs are idle.
  const int most = static_cast<int>(std::max<int64_t>(processors / tiles, 1)), rounds = (units + most - 1) / most;
  const auto groups = static_cast<unsigned>((units + rounds - 1) / rounds);
  const Launch at{dim3(tiles, groups), dim3(kThreads), stream, sizeof(WeighMemory<kHeads>)};
  return launch_in_turn(weigh_units_kernel<kHeads>, at, attention, units, padded_heads(attention.heads));
}

template <int kHeads, int kGroups>
cudaError_t launch_add(const SparseAttention& attention, int units, cudaStream_t stream) {
  using Memory = AddMemory<kHeads, kGroups>;
  const auto tiles = static_cast<unsigned>(attention.rows * tiles_of(attention.heads, Memory::kAll));
  const bool quantised = attention.o_scale != nullptr;
  const Launch at{dim3(tiles, kSlabs), dim3(kThreads), stream, sizeof(Memory), quantised ? 2u : 1u};
  return launch_in_turn(quantised ? add_units_kernel<kHeads, kGroups, true> : add_units_kernel<kHeads, kGroups, false>,
                        at, attention, units, padded_heads(attention.heads));
}

}  // namespace

int64_t partial_floats(const SparseAttention& attention) {
  return attention.rows * units_of(attention) * padded_heads(attention.heads) / 8 * (kHandedBytes / 4);
}

cudaError_t launch_sparse_attention_split(const SparseAttention& attention, int processors, cudaStream_t stream) {
  const int units = units_of(attention);
  const int add_tile = choose_tile(attention, kSlabs, processors);
  // Two of its CTAs fit an SM, and they are to find some that the first kernel leaves to them.
  const int64_t room = processors - attention.rows * tiles_of(attention.heads, add_tile) * kSlabs / 2;
  const auto weigh = [&] {
    switch (choose_tile(attention, units, room)) {
      case 8:
        return launch_weigh<8>(attention, units, processors, stream);
      case 16:
        return launch_weigh<16>(attention, units, processors, stream);
      case 32:
        return launch_weigh<32>(attention, units, processors, stream);
      default:
        return launch_weigh<64>(attention, units, processors, stream);
    }
  };
  const cudaError_t status = weigh();
  if (status != cudaSuccess) return status;
  switch (add_tile) {
    case 8:
      return launch_add<8, 1>(attention, units, stream);
    case 16:
      return launch_add<16, 1>(attention, units, stream);
    case 32:
      return launch_add<32, 1>(attention, units, stream);
    default:
      return launch_add<32, 2>(attention, units, stream);
  }
}

}  // namespace dsv4
