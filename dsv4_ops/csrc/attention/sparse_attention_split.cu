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
// Both keep to half of the registers of an SM and share its memory, so that an SM has one CTA of each at a time
// (launch_add), and the second kernel is all there, its keys gathered, when the first ends. Positions are guessed
// in front of the wait of the first; after it the first lookups do not wait for the real ones. Its CTA has one unit,
// or, where those of all rows would be more than SMs, as few as makes up for that.
//
// What bounds it is latency and, in the second kernel, the instructions of the fold; not bytes or flops. In the order
// of time, with what is under way at once in one step:
//
//   weigh_units_kernel   wait | position, index | page | key | a quarter of a unit unpacked (200 issue slots of each SM
//                        quarter) .. the last quarter | its 8 dependent wgmma | largest scores of four warps | weights
//                        | sums of four warps | end of the kernel
//   add_units_kernel     (before the wait: position, index, page, keys, unpacked) | weights | 4 wgmma and a fold for
//                        each unit, in order | denominator | output through shared memory
//
// The fold is what grows with the number of keys; the rest is the same for 128 and for 640. For thousands of keys the
// gathering warps bound the second kernel.
//
// H200, 2026-11-25, us warm, heads x keys: one row 64 x 128 4.9, 64 x 640 6.8, 128 x 1152 9.6, 64 x 8320 52; 16 rows
// 64 x 640 14.7: their queries arrive 2.7 us after the wait, later than the keys, and two units take 0.7 us to fold.
// Where more CTAs want to be on an SM than fit, the form with one kernel is faster (ops/attention_workspace.py).
//
// Tried: units added as soon as flags in memory say that they are weighed, while the first kernel runs, 9.9 us for one
// row of 64 x 640 where it took 8.1, 20.0 for 16 rows where it took 16.2.
#include <algorithm>

#include "attention/add_units.cuh"
#include "attention/weigh_units.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

// Named barriers: of the first consuming warpgroup, the next has the next; and of both for the queries.
[[maybe_unused]] constexpr int kBarrier = 1, kQueryBarrier = 3;

// Heads for which a unit is handed on: as many as any choice of tiles reaches.
int padded_heads(int heads) { return heads <= 8 ? 8 : heads <= 16 ? 16 : heads <= 32 ? 32 : (heads + 63) / 64 * 64; }

int tiles_of(int heads, int tile) { return (heads + tile - 1) / tile; }

int units_of(const SparseAttention& attention) {
  return static_cast<int>((key_capacity(attention.keys) + kUnit - 1) / kUnit);
}

template <int kHeads>
__global__ void __launch_bounds__(WeighRoles<kHeads>::kThreads, 2)
    weigh_units_kernel(const __grid_constant__ SparseAttention attention, int units, int padded) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<WeighMemory<kHeads>*>(memory_start);
  using Role = WeighRoles<kHeads>;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < WeighMemory<kHeads>::kSlots; ++slot) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + slot), Role::kProducerWarps * kWarp);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + slot), Role::kGroups * kWarpgroup);
    }
  }
  __syncthreads();
  const int head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t row = blockIdx.x / head_tiles, first_head = blockIdx.x % head_tiles * kHeads;
  const int first = blockIdx.y, step = gridDim.y;
  const int32_t* const position = position_of(attention.rope, row);
  const int guess = guess_position(attention.rope, position);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);  // known to be the same in all lanes
  RowKeys keys = keys_of_row(attention.keys, attention.rope, row, guess);
  WarpKeys<Role::kProducerWarps> own(first, units_of_row(keys), step, threadIdx.x / kWarp - 4 * Role::kGroups);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  if (group >= Role::kGroups) {
    change_registers<Role::kFirstRegisters, Role::kProducerRegisters>();
    const int actual = ptx::load_relaxed(position);
    Lookups lookups(attention.keys, keys, own);
    if (actual != guess) {
      keys = keys_of_row(attention.keys, attention.rope, row, actual);
      own = WarpKeys<Role::kProducerWarps>(first, units_of_row(keys), step, own.warp);
      lookups = Lookups(attention.keys, keys, own);
    }
    produce_parts(attention.keys, keys, memory, own, lookups);
    return;
  }
  change_registers<Role::kFirstRegisters, Role::kConsumerRegisters>();
  const int actual = ptx::load_relaxed(position);  // under way while queries are copied
  const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;
  load_queries<kHeads>(static_cast<const __nv_bfloat16*>(attention.q) + vector * attention.q_stride, attention.q_stride,
                       attention.heads - first_head, memory.query, threadIdx.x, Role::kGroups * kWarpgroup);
  ptx::fence_async_proxy();
  ptx::named_barrier(kQueryBarrier, Role::kGroups * kWarpgroup);
  const int row_units = units_of_row(keys_of_row(attention.keys, attention.rope, row, actual));
  constexpr int kOwn = Role::kHeadsOfGroup;
  const uint32_t query = ptx::shared_address(memory.query) + group * (kOwn * kRowBytes);
  float* const sums = memory.sum + group * kOwn * kWarpsOfGroup;
  const int thread = threadIdx.x % kWarpgroup;
  for (int unit = first, count = 0; unit < row_units; unit += step, ++count) {
    float scores[kOwn / 2];
    score_parts<kHeads>(memory, query, count, scores);
    const uint64_t valid = memory.valid[count % 2];
    const HandedUnit handed(attention.partials, padded, static_cast<int64_t>(row) * units + unit);
    uint8_t* const weights = handed.of_heads(first_head + group * kOwn);
    const Exchange exchange{weights, memory.largest + group * kOwn * kWarpsOfGroup, sums};
    const float own_largest = weigh<kOwn, kHandedBytes>(scores, valid, exchange, kBarrier + group);
    ptx::named_barrier(kBarrier + group, kWarpgroup);
    if (thread < kOwn) *totals_of(weights, thread) = float2{own_largest, combine_warps(sums, thread, Sum())};
  }
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

template <int kHeads, int kGroups, bool kQuantised>
__global__ void __launch_bounds__(kAddThreads, 2)
    add_units_kernel(const __grid_constant__ SparseAttention attention, int units, int padded) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  using Memory = AddMemory<kHeads, kGroups>;
  auto& memory = *reinterpret_cast<Memory*>(memory_start);
  const int head_tiles = (attention.heads + Memory::kAll - 1) / Memory::kAll;
  const uint32_t row = blockIdx.x / head_tiles;
  const int position = ptx::load_relaxed(position_of(attention.rope, row));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Memory::kDepth; ++stage) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + stage), Memory::kGatherWarps * kWarp + 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + stage), kGroups * kWarpgroup);
    }
    ptx::fence_async_proxy();  // bulk copies arrive there
  }
  // No wait does this for what is read in front of it: L1 may still hold what earlier kernels read. One thread does it
  // for all of the SM.
  if (threadIdx.x == kWarp) ptx::fence_gpu();
  __syncthreads();
  const int slab = blockIdx.y, first_head = blockIdx.x % head_tiles * Memory::kAll;
  const RowKeys keys = keys_of_row(attention.keys, attention.rope, row, position);
  const int row_units = units_of_row(keys);
  const WeighedUnits weighed{attention.partials, static_cast<int64_t>(row) * units, padded, first_head};
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
  if (warp >= 4 * kGroups) {
    const int gatherer = warp - 4 * kGroups;
    if (slab == kSlabs - 1) {
      SlabGatherer<true, Memory>(attention.keys, keys, memory, weighed, row_units, slab, gatherer).gather();
    } else {
      SlabGatherer<false, Memory>(attention.keys, keys, memory, weighed, row_units, slab, gatherer).gather();
    }
  } else {
    const int group = kGroups == 1 ? 0 : warp / 4, thread = threadIdx.x % kWarpgroup;
    const int own_head = first_head + group * kHeads, head = own_head + thread % kHeads;
    const float sink = sink_of(attention, head);
    const float2 turn = inverse_turn(attention.rope, position);
    ptx::wait_for_predecessors();
    ptx::launch_dependents();

    if (threadIdx.x % kWarp == 0) {  // the lanes of one warp would take turns
      for (int unit = warp; unit < min(row_units, Memory::kDepth); unit += 4 * kGroups) weighed.copy(memory, unit);
    }
    constexpr int kTogether = kHeads == 32 ? 2 : 4;  // as many as registers allow
    float output[kHeads / 2];
    Total total;
    fold_units<kHeads, kTogether>(memory, row_units, group, output, total);
    float reciprocal[kColumns<kHeads>];
    take_columns<kHeads>(finish_head(attention, row, head, sink, total, slab == 0 && thread < kHeads), reciprocal);
    finish_slab<kHeads>(output, reciprocal, slab == kSlabs - 1, turn);
    stage_slab<kHeads, kSlab>(output, memory.staging[group], 0);
    ptx::named_barrier(kBarrier + group, kWarpgroup);
    const int64_t vector = static_cast<int64_t>(row) * attention.heads + own_head;
    if constexpr (kQuantised) {
      store_half_groups<kHeads>(memory.staging[group], memory.magnitudes[group], attention, vector,
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

constexpr size_t kSharedOfTwo = 226 * 1024;  // bytes that two CTAs of an SM may ask for
constexpr size_t kHalfOfShared = kSharedOfTwo / 2;

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
  // No more CTAs than the largest number of units of one asks for.
  const int most = static_cast<int>(std::max<int64_t>(processors / tiles, 1)), rounds = (units + most - 1) / most;
  const auto groups = static_cast<unsigned>((units + rounds - 1) / rounds);
  const Launch at{dim3(tiles, groups), dim3(WeighRoles<kHeads>::kThreads), stream, sizeof(WeighMemory<kHeads>)};
  return launch_in_turn(weigh_units_kernel<kHeads>, at, attention, units, padded_heads(attention.heads));
}

// Two CTAs of add_units_kernel with 32 heads or more fit an SM, but where there are SMs enough each asks for more than
// half of the memory: two on one would take twice as long, while the SM of a CTA of the first kernel waits for work.
template <int kHeads, int kGroups>
cudaError_t launch_add(const SparseAttention& attention, int units, int processors, cudaStream_t stream) {
  using Memory = AddMemory<kHeads, kGroups>;
  constexpr size_t kAlone = std::max(sizeof(Memory), kHalfOfShared + 16);
  static_assert(kAlone + sizeof(WeighMemory<64>) <= kSharedOfTwo);
  const auto tiles = static_cast<unsigned>(attention.rows * tiles_of(attention.heads, Memory::kAll));
  const bool alone = static_cast<int64_t>(tiles) * kSlabs <= processors;
  const bool quantised = attention.o_scale != nullptr;
  const Launch at{dim3(tiles, kSlabs), dim3(kAddThreads), stream, alone ? kAlone : sizeof(Memory),
                  quantised ? 2u : 1u};
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
  const auto weigh = [&] {
    switch (choose_tile(attention, units, processors)) {
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
      return launch_add<8, 1>(attention, units, processors, stream);
    case 16:
      return launch_add<16, 1>(attention, units, processors, stream);
    case 32:
      return launch_add<32, 1>(attention, units, processors, stream);
    default:
      return launch_add<32, 2>(attention, units, processors, stream);
  }
}

}  // namespace dsv4
