// Sparse attention on Hopper: bf16 queries over packed pools of head dimension 512 = 448 + 64, keys read as FP8.
//
// Keys are taken in units of 64, in the order of keys.cuh. Keys lie on the outer dimension of the products and heads on
// the inner one, so that any multiple of 8 heads runs without padding to 64:
//
//   scores [64 keys, heads] = K . Q^T          32 wgmma m64n<heads>k16; K and Q by dimensions
//   output [512 dims, heads] = K^T . weights   8 slabs of 64 dimensions x 4 wgmma; the same tile of K, read transposed
//
// The result of a row is a fold over its units: each has its own largest score, weights exp2(score - largest) in bf16,
// sum and output from zero, which are then added to what came before by one FMA (softmax.cuh). So the bits of a row are
// the same whether one CTA goes through all units, or the units are weighed by different CTAs; and whether a CTA has 8
// heads or 64. Who does what depends on the number of rows:
//
//   few rows       two kernels, sparse_attention_split.cu: where ops/attention_workspace.py gives room
//   otherwise      this kernel with the smallest tile of 16 or 32 heads (8 where there are 8) that gives each CTA an SM
//                  of its own
//   many           sparse_attention_wide.cu: 64 heads a CTA
//
// sparse_attention_kernel: a CTA owns kHeads heads of one row and all of its units. One CTA an SM:
//
//   warpgroup 0      output: weights . keys and the fold, in kHeads / 2 x 8 registers
//   1 or 2 more      scores and weights, two of them taking turns for up to 16 heads
//   the last two     producers: gather, unpack, write tiles (producer.cuh)
//
// Scores become weights by shuffles and shared memory, one after the other, each of which waits for the many accesses
// of the producers and of products: that takes longer than both products of a unit, so it has warps of its own.
//
// Shared memory: tiles of keys of 64 KB, 3 for up to 16 heads and 2 for 32; queries kHeads KB, in the end the staged
// output; for each tile weights and totals of kHeads x 136 bytes; largest scores and sums of each warp.
//
// Cost of a unit in cycles of an SM for kHeads = 16 (32). L1's data pipe, which shared memory is part of, bounds it:
//
//   keys from memory   37 KB: 1870 at 20 bytes a cycle, less where tiles of heads share them through L2
//   unpacking          8 instructions for 4 codes, 400 a warp and 8 keys with all else: 800 of each SM quarter
//   data pipe of L1    loads 600 at best, write K 512, read K twice 1024, read Q and weights 256 (512): 2400 (2650)
//   tensor cores       512 (1024)
#include "attention/output.cuh"
#include "attention/products.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

// How the threads of a CTA are shared out, and their registers.
template <int kHeads>
struct Roles {
  static constexpr int kScorers = kHeads <= 16 ? 2 : 1;  // warpgroups
  static constexpr int kProducerWarps = 8;
  static constexpr int kWarpgroups = 1 + kScorers + kProducerWarps / 4, kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kAdderRegisters = kHeads <= 16 ? 128 : 200, kScorerRegisters = 56;
  static constexpr int kProducerRegisters = kHeads <= 16 ? 120 : 128;
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8;  // at the start of the kernel
  static_assert(kAdderRegisters + kScorers * kScorerRegisters + 2 * kProducerRegisters <=
                kWarpgroups * kFirstRegisters);
};

// Named barriers: one of each scoring warpgroup, then
[[maybe_unused]] constexpr int kScorerBarrier = 1, kQueryBarrier = 3, kAdderBarrier = 4;

template <int kHeads>
constexpr int kRing = kHeads <= 16 ? 3 : 2;  // tiles

template <int kHeads>
struct SharedMemory {
  static constexpr int kQueryBytes = (kHeads * kStagingStride<kDim> + 1023) / 1024 * 1024;
  StagedTiles<kRing<kHeads>> tiles;
  alignas(1024) uint8_t query[kQueryBytes];  // 8 slabs of [kHeads][128 bytes]; in the end the output as [kHeads][512]
  alignas(128) uint8_t weights[kRing<kHeads>][kHeads * kUnit * 2];
  float2 totals[kRing<kHeads>][kHeads];  // largest score and sum
  alignas(16) float largest[Roles<kHeads>::kScorers][kHeads * kWarpsOfGroup];
  alignas(16) float sum[Roles<kHeads>::kScorers][kHeads * kWarpsOfGroup];
  uint64_t weighed[kRing<kHeads>];  // mbarriers: weights and totals of the tile are written
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A scoring warpgroup: its units of a row's keys, as the producers deliver them.
template <int kHeads>
__device__ __forceinline__ void score_units(const Tiles& tiles, SharedMemory<kHeads>& memory, int units, int scorer) {
  constexpr int kCount = kRing<kHeads>;
  const int thread = threadIdx.x % kWarpgroup;
  for (int unit = scorer; unit < units; unit += Roles<kHeads>::kScorers) {
    const int stage = unit % kCount;
    float scores[kHeads / 2];
    ptx::mbarrier_wait(tiles.full_barrier(stage), unit / kCount & 1);
    ptx::fence_async_proxy();  // also for the adding warpgroup, which waits for what comes of this
    multiply_queries<kHeads>(ptx::shared_address(tiles.keys) + stage * kTileBytes, ptx::shared_address(memory.query),
                             scores);
    const uint64_t valid = *reinterpret_cast<const uint64_t*>(tiles.valid + stage * 8);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    const Exchange exchange{memory.weights[stage], memory.largest[scorer], memory.sum[scorer]};
    const float own_largest = weigh<kHeads>(scores, valid, exchange, kScorerBarrier + scorer);
    ptx::fence_async_proxy();
    ptx::named_barrier(kScorerBarrier + scorer, kWarpgroup);
    if (thread < kHeads) {
      memory.totals[stage][thread] = {own_largest, combine_warps(memory.sum[scorer], thread, Sum())};
    }
    ptx::mbarrier_arrive(ptx::shared_address(memory.weighed + stage));
  }
}

// Output sums of the adding warpgroup, and in thread t the total of head t % kHeads.
template <int kHeads>
struct Result {
  float output[kSlabs][kHeads / 2];
  Total total;
};

// The adding warpgroup: all units, as they are weighed. kDepth slabs of output are under way at a time.
template <int kHeads, int kDepth>
__device__ __forceinline__ void add_units(const Tiles& tiles, SharedMemory<kHeads>& memory, int units,
                                          Result<kHeads>& result) {
  constexpr int kCount = kRing<kHeads>;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) result.output[slab][i] = 0.0f;
  }
  float parts[kDepth][kHeads / 2];
  for (int unit = 0; unit < units; ++unit) {
    const int stage = unit % kCount;
    const uint32_t keys = ptx::shared_address(tiles.keys) + stage * kTileBytes;
    const uint32_t weights = ptx::shared_address(memory.weights[stage]);
    ptx::mbarrier_wait(ptx::shared_address(memory.weighed + stage), unit / kCount & 1);
#pragma unroll
    for (int slab = 0; slab < kDepth; ++slab) multiply_weights<kHeads>(keys, weights, slab, parts[slab]);
    const float2 of_unit = memory.totals[stage][threadIdx.x % kHeads];
    const Steps<kHeads> steps(result.total.add(of_unit.x, of_unit.y));
    if (steps.rescale) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) rescale_output<kHeads>(result.output[slab], steps);
    }
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      wait_for_slab(slab + kDepth <= kSlabs ? kDepth - 1 : kSlabs - 1 - slab);
      if (slab == kSlabs - 1) ptx::mbarrier_arrive(tiles.empty_barrier(stage));
      ptx::pin_registers(parts[slab % kDepth]);
      add_output<kHeads>(result.output[slab], parts[slab % kDepth], steps);
      if (slab + kDepth < kSlabs) multiply_weights<kHeads>(keys, weights, slab + kDepth, parts[slab % kDepth]);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kHeads>
__global__ void __launch_bounds__(Roles<kHeads>::kThreads, 1)
    sparse_attention_kernel(const __grid_constant__ SparseAttention attention) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<SharedMemory<kHeads>*>(memory_start);
  using Role = Roles<kHeads>;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : memory.weighed) ptx::mbarrier_init(ptx::shared_address(&barrier), kWarpgroup);
  }
  const Tiles tiles = start_tiles(memory.tiles, Role::kProducerWarps, kWarpgroup);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();

  const int head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t row = blockIdx.x / head_tiles, head_tile = blockIdx.x % head_tiles;
  const RowKeys keys = keys_of_row(attention.keys, attention.rope, row);
  const int units = units_of_row(keys), thread = threadIdx.x % kWarpgroup;
  const int first_head = head_tile * kHeads, heads = attention.heads - first_head;
  const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;  // of q and o

  // The same in all lanes, and known to be: what follows from it lies in uniform registers.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (warpgroup > Role::kScorers) {
    change_registers<Role::kFirstRegisters, Role::kProducerRegisters>();
    const WarpKeys<Role::kProducerWarps> own(0, units, 1, threadIdx.x / kWarp - 4 * (1 + Role::kScorers));
    const Lookups lookups(attention.keys, keys, own);
    produce<Role::kProducerWarps, kRing<kHeads>>(attention.keys, keys, tiles, own, lookups);
    return;
  }
  if (warpgroup > 0) {
    change_registers<Role::kFirstRegisters, Role::kScorerRegisters>();
    if (units == 0) return;  // the output is staged where queries would still be on their way
    constexpr int kTogether = Role::kScorers * kWarpgroup;
    load_queries<kHeads>(static_cast<const __nv_bfloat16*>(attention.q) + vector * attention.q_stride,
                         attention.q_stride, heads, memory.query, threadIdx.x - kWarpgroup, kTogether);
    ptx::fence_async_proxy();
    ptx::named_barrier(kQueryBarrier, kTogether);
    score_units<kHeads>(tiles, memory, units, warpgroup - 1);
    return;
  }
  change_registers<Role::kFirstRegisters, Role::kAdderRegisters>();
  Result<kHeads> result;
  const int head = first_head + thread % kHeads;  // whose total this thread has
  const float sink = sink_of(attention, head);
  const float2 turn = inverse_turn(attention.rope, keys.position);
  add_units<kHeads, kHeads == 32 ? 2 : 4>(tiles, memory, units, result);

  float reciprocal[kColumns<kHeads>];
  take_columns<kHeads>(finish_head(attention, row, head, sink, result.total, thread < kHeads), reciprocal);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    finish_slab<kHeads>(result.output[slab], reciprocal, slab == kSlabs - 1, turn);
    stage_slab<kHeads, kDim>(result.output[slab], memory.query, slab * kSlab);
  }
  ptx::named_barrier(kAdderBarrier, kWarpgroup);
  store_rows<kHeads, kDim>(memory.query, attention, vector, heads, 0);
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

int tiles_of(int heads, int tile) { return (heads + tile - 1) / tile; }

template <int kHeads>
cudaError_t launch(const SparseAttention& attention, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(attention.rows * tiles_of(attention.heads, kHeads));
  const Launch at{dim3(tiles), dim3(Roles<kHeads>::kThreads), stream, sizeof(SharedMemory<kHeads>)};
  return launch_kernel(sparse_attention_kernel<kHeads>, at, attention);
}

}  // namespace

bool on_tensor_cores(const SparseAttention& attention) {
  const bool packed = !attention.keys.window_pool.plain && !attention.keys.compressed_pool.plain;
  const bool fits =
      attention.dtype == Dtype::kBf16 && attention.dim == kDim && attention.rope.dim == kRopeDim && packed;
  int device = 0, major = 0;
  return fits && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

cudaError_t launch_sparse_attention(const SparseAttention& attention, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  if (attention.partials != nullptr) return launch_sparse_attention_split(attention, processors, stream);
  const int heads = attention.heads;
  const auto fits = [&](int tile) { return heads <= tile || attention.rows * tiles_of(heads, tile) <= processors; };
  if (heads <= 8) return launch<8>(attention, stream);
  if (fits(16)) return launch<16>(attention, stream);
  if (fits(32)) return launch<32>(attention, stream);
  return launch_sparse_attention_wide(attention, processors, stream);
}

}  // namespace dsv4
