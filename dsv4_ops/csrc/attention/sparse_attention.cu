#include <algorithm>

#include "attention/output.cuh"
#include "attention/producer.cuh"
#include "common/launch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kSplitHeads = 16;  // heads of a CTA where the units of a row are computed by different CTAs

// Shared memory of a consuming warpgroup.
template <int kHeads>
struct ConsumerMemory {
  static constexpr int kQueryBytes = (kHeads * kStagingStride<kDim> + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kHeads * kUnit * 2;
  alignas(1024) uint8_t query[kQueryBytes];  // 8 slabs of [kHeads][128 bytes]; in the end the output as [kHeads][512]
  alignas(128) uint8_t weights[kWeightBytes];  // core matrices of 8 keys x 8 heads: [kHeads / 8][8]
  float largest[4 * kHeads];  // of each warp
  float sum[4 * kHeads];
};

template <int kHeads, int kConsumers>
struct SharedMemory {
  alignas(1024) uint8_t keys[kStages * kTileBytes];
  ConsumerMemory<kHeads> consumer[kConsumers];
  alignas(8) uint64_t full[kStages];
  uint64_t empty[kStages];
  alignas(8) uint8_t valid[kStages * 8];
};

// Where the partial result of a unit lies: heads of a tile, as the threads of a warpgroup hold them.
template <int kHeads>
struct Partial {
  static constexpr int kFloats = kHeads * (kDim + 2);
  float* data;

  __device__ __forceinline__ Partial(float* partials, int64_t tile, int units, int unit)
      : data(partials + (tile * units + unit) * kFloats) {}
  __device__ __forceinline__ float4* output(int slab) const {  // [kHeads / 8][128 threads]
    return reinterpret_cast<float4*>(data) + slab * (kHeads / 8) * kWarpgroup;
  }
  __device__ __forceinline__ float* largest() const { return data + kHeads * kDim; }  // [kHeads]
  __device__ __forceinline__ float* sum() const { return data + kHeads * kDim + kHeads; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The queries of kHeads heads, of which the first `heads` exist, into the slabs of `query`.
template <int kHeads>
__device__ __forceinline__ void load_queries(const __nv_bfloat16* q, int64_t stride, int heads, uint8_t* query) {
  const int thread = threadIdx.x % kWarpgroup;
  const auto load = [&](int head, int chunk) {
    return head < heads ? ptx::load_once(q + head * stride + chunk * 8) : uint4{0, 0, 0, 0};
  };
  const auto store = [&](int head, int chunk, uint4 value) {
    const uint32_t slab = chunk / 8 * kHeads * kRowBytes;
    *reinterpret_cast<uint4*>(query + slab + chunk_offset(head, chunk % 8)) = value;
  };
#pragma unroll 7
  for (int i = thread; i < kHeads * kNopeChunks; i += kWarpgroup) {
    const int head = i / kNopeChunks, chunk = i % kNopeChunks;
    store(head, chunk, load(head, chunk));
  }
  for (int i = thread; i < kHeads * 4; i += kWarpgroup) {
    const int head = i / 4, chunk = kNopeChunks + i % 4 * 2;
    uint4 first = load(head, chunk), second = load(head, chunk + 1);
    split_pairs(first, second);
    store(head, chunk, first);
    store(head, chunk + 1, second);
  }
}

// scores [64 keys, kHeads] = keys . queries, under way until waited for
template <int kHeads>
__device__ __forceinline__ void multiply_queries(uint32_t keys, uint32_t query, float (&scores)[kHeads / 2]) {
  const uint64_t a = ptx::wgmma_descriptor(keys, 16, 1024, true);
  const uint64_t b = ptx::wgmma_descriptor(query, 16, 1024, true);
  ptx::pin_registers(scores);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int slab = step / 4, inside = step % 4 * 32;
    ptx::wgmma<kHeads, false, false>(scores, ptx::advance_descriptor(a, slab * kSlabBytes + inside),
                                     ptx::advance_descriptor(b, slab * kHeads * kRowBytes + inside), step > 0);
  }
  ptx::wgmma_commit();
}

// output [64 dimensions of a slab, kHeads] = keys^T . weights, under way until waited for
template <int kHeads>
__device__ __forceinline__ void multiply_weights(uint32_t keys, uint32_t weights, int slab, float (&output)[kHeads / 2]) {
  const uint64_t a = ptx::wgmma_descriptor(keys + slab * kSlabBytes, 16, 1024, true);
  const uint64_t b = ptx::wgmma_descriptor(weights, 128, kUnit / 8 * 128, false);
  ptx::pin_registers(output);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kUnit / 16; ++step) {
    ptx::wgmma<kHeads, true, true>(output, ptx::advance_descriptor(a, step * 2048),
                                   ptx::advance_descriptor(b, step * 256), step > 0);
  }
  ptx::wgmma_commit();
}

// Wait until at most `pending` slabs of output are under way; a constant once loops are unrolled.
__device__ __forceinline__ void wait_for_slab(int pending) {
  switch (pending) {
    case 0: return ptx::wgmma_wait<0>();
    case 1: return ptx::wgmma_wait<1>();
    case 2: return ptx::wgmma_wait<2>();
    default: return ptx::wgmma_wait<3>();
  }
}

// Weights exp2(score - largest) of a unit from its scores, to shared memory in bf16, and their sums of each warp; the largest
// scores of the thread's columns, and of the head that this thread keeps the total of.
template <int kHeads>
__device__ __forceinline__ void weigh(float (&scores)[kHeads / 2], uint64_t valid, float scale,
                                      ConsumerMemory<kHeads>& memory, int barrier, float (&largest)[kColumns<kHeads>],
                                      float& own_largest) {
  const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  float values[kColumns<kHeads>];
  if (valid != ~uint64_t{0}) {
    const uint64_t mine = valid >> (16 * warp + lane / 4);
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) scores[i] = mine >> (i / 2 % 2 * 8) & 1 ? scores[i] : -INFINITY;
  }
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    const int i = column / 2 * 4 + column % 2;
    values[column] = fmaxf(scores[i], scores[i + 2]);
  }
  reduce_columns<kHeads>(values, memory.largest + warp * kHeads, Larger());
  ptx::named_barrier(barrier, kWarpgroup);
  combine_warps<kHeads>(memory.largest, largest, Larger());
  if (thread < kHeads) own_largest = combine_warps<kHeads>(memory.largest, thread, Larger()) * scale;
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    largest[column] *= scale;
    const float offset = largest[column] == -INFINITY ? 0.0f : -largest[column];
    const int i = column / 2 * 4 + column % 2;
    scores[i] = ptx::ex2_approx_ftz(__fmaf_rn(scores[i], scale, offset));
    scores[i + 2] = ptx::ex2_approx_ftz(__fmaf_rn(scores[i + 2], scale, offset));
    values[column] = __fadd_rn(scores[i], scores[i + 2]);
  }
#pragma unroll
  for (int i = 0; i < kHeads / 2; i += 2) {
    const int core = i / 4 * (kUnit / 8) + 2 * warp + i / 2 % 2;
    *reinterpret_cast<uint32_t*>(memory.weights + core * 128 + lane * 4) = pack_bf16(scores[i], scores[i + 1]);
  }
  ptx::fence_async_proxy();
  reduce_columns<kHeads>(values, memory.sum + warp * kHeads, Sum());
  ptx::named_barrier(barrier, kWarpgroup);
}

// The result of one warpgroup: output sums, and in thread t < kHeads the total of head t.
template <int kHeads>
struct Result {
  float output[kSlabs][kHeads / 2];
  Total total;
};

// All units of a row's keys, as the producers deliver them. The scores of the next unit are computed while this one's are
// turned into weights. kDepth slabs of output are under way at a time: more where the warpgroup has the tensor cores for
// itself.
template <int kHeads, int kDepth>
__device__ __forceinline__ void consume(const Tiles& tiles, ConsumerMemory<kHeads>& memory, int units, float scale,
                                        int barrier, Result<kHeads>& result) {
  float references[kColumns<kHeads>];
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) references[column] = -INFINITY;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) result.output[slab][i] = 0.0f;
  }
  const uint32_t query = ptx::shared_address(memory.query), weights = ptx::shared_address(memory.weights);
  const uint32_t tile = ptx::shared_address(tiles.keys);
  const int thread = threadIdx.x % kWarpgroup;
  float ahead[kHeads / 2], parts[kDepth][kHeads / 2];
  const auto start_scores = [&](int unit) {
    ptx::mbarrier_wait(tiles.full_barrier(unit % kStages), unit / kStages & 1);
    multiply_queries<kHeads>(tile + unit % kStages * kTileBytes, query, ahead);
  };
  if (units > 0) start_scores(0);
  for (int unit = 0; unit < units; ++unit) {
    const int stage = unit % kStages;
    const uint32_t keys = tile + stage * kTileBytes;
    ptx::wgmma_wait<0>();
    ptx::pin_registers(ahead);
#pragma unroll
    for (int i = 0; i < kHeads / 2; ++i) parts[0][i] = ahead[i];
    if (unit + 1 < units) start_scores(unit + 1);
    const uint64_t valid = *reinterpret_cast<const uint64_t*>(tiles.valid + stage * 8);
    float largest[kColumns<kHeads>], own_largest = -INFINITY;
    weigh<kHeads>(parts[0], valid, scale, memory, barrier, largest, own_largest);
#pragma unroll
    for (int slab = 0; slab < kDepth; ++slab) multiply_weights<kHeads>(keys, weights, slab, parts[slab]);
    if (thread < kHeads) result.total.add(own_largest, combine_warps<kHeads>(memory.sum, thread, Sum()));
    const Steps<kHeads> steps(references, largest);
    if (steps.rescale) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) rescale_output<kHeads>(result.output[slab], steps);
    }
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      wait_for_slab(slab + kDepth <= kSlabs ? kDepth - 1 : kSlabs - 1 - slab);
      if (slab == kSlabs - 1 && threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(tiles.empty_barrier(stage));
      ptx::pin_registers(parts[slab % kDepth]);
      add_output<kHeads>(result.output[slab], parts[slab % kDepth], steps);
      if (slab + kDepth < kSlabs) multiply_weights<kHeads>(keys, weights, slab + kDepth, parts[slab % kDepth]);
    }
  }
}

template <int kHeads>
__device__ __forceinline__ void store_partial(const Result<kHeads>& result, const Partial<kHeads>& partial) {
  const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
      const float* const four = result.output[slab] + 4 * i;
      partial.output(slab)[i * kWarpgroup + thread] = float4{four[0], four[1], four[2], four[3]};
    }
  }
  if (thread >= kHeads) return;
  partial.largest()[thread] = result.total.reference;
  partial.sum()[thread] = result.total.sum;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Head number `head` of the tile, by the thread that has its total: the reciprocal of its denominator, and its lse stored.
__device__ __forceinline__ float finish_head(const SparseAttention& attention, int64_t row, int head, const Total& total,
                                             bool store_lse) {
  if (head >= attention.heads) return 0.0f;
  if (store_lse) attention.lse[row * attention.heads + head] = log_sum_exp(total);
  return reciprocal_of_denominator(total, attention.sink[head]);
}

template <int kHeads>
__device__ __forceinline__ void load_columns(const float* heads, float (&values)[kColumns<kHeads>]) {
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    values[column] = heads[head_of_column(column, threadIdx.x % kWarp)];
  }
}

template <int kHeads, int kConsumers>
__global__ void __launch_bounds__(kThreads, 1) sparse_attention_kernel(const __grid_constant__ SparseAttention attention) {
  ptx::launch_dependents();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<SharedMemory<kHeads, kConsumers>*>(memory_start);
  constexpr int kProducerWarps = 4 * (3 - kConsumers);
  const Tiles tiles{memory.keys, memory.valid, ptx::shared_address(memory.full), ptx::shared_address(memory.empty)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(tiles.full_barrier(stage), kProducerWarps);
      ptx::mbarrier_init(tiles.empty_barrier(stage), 4 * kConsumers);
    }
  }
  __syncthreads();
  ptx::wait_for_predecessors();

  constexpr int kCtaHeads = kHeads * kConsumers;
  const int head_tiles = (attention.heads + kCtaHeads - 1) / kCtaHeads;
  const uint32_t row = blockIdx.x / head_tiles, head_tile = blockIdx.x % head_tiles;
  const RowKeys keys = keys_of_row(attention.keys, attention.rope, row);
  const int row_units = (keys.count + kUnit - 1) / kUnit;
  const bool split = gridDim.y > 1;
  const int first = split ? blockIdx.y : 0, last = split ? min(first + 1, row_units) : row_units;
  // The same in all lanes, and known to be: what follows from it lies in uniform registers.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (split && first >= row_units) return;

  if (warpgroup >= kConsumers) {
    ptx::give_registers<kConsumers == 2 ? 96 : 144>();
    produce<kProducerWarps>(attention.keys, keys, tiles, first, last, threadIdx.x / kWarp - 4 * kConsumers);
    return;
  }
  ptx::take_registers<kConsumers == 2 ? 208 : 224>();
  const int first_head = head_tile * kCtaHeads + warpgroup * kHeads, heads = attention.heads - first_head;
  const int barrier = 1 + warpgroup;
  const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;  // of q and o
  const float scale = kLog2E * rsqrtf(static_cast<float>(kDim));
  ConsumerMemory<kHeads>& mine = memory.consumer[warpgroup];
  load_queries<kHeads>(static_cast<const __nv_bfloat16*>(attention.q) + vector * attention.q_stride, attention.q_stride,
                       heads, mine.query);
  ptx::fence_async_proxy();
  ptx::named_barrier(barrier, kWarpgroup);
  Result<kHeads> result;
  constexpr int kDepth = kHeads == 32 ? 2 : 4;
  consume<kHeads, kDepth>(tiles, mine, last - first, scale, barrier, result);

  if (split) {
    const Partial<kHeads> partial(attention.partials, blockIdx.x, gridDim.y, first);
    store_partial<kHeads>(result, partial);
    return;
  }
  const int thread = threadIdx.x % kWarpgroup;
  if (thread < kHeads) mine.largest[thread] = finish_head(attention, row, first_head + thread, result.total, true);
  ptx::named_barrier(barrier, kWarpgroup);
  float reciprocal[kColumns<kHeads>];
  load_columns<kHeads>(mine.largest, reciprocal);
  const float2 turn = inverse_turn(attention.rope, keys.position);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    finish_slab<kHeads>(result.output[slab], reciprocal, slab == kSlabs - 1, turn);
    stage_slab<kHeads, kDim>(result.output[slab], mine.query, slab * kSlab);
  }
  ptx::named_barrier(barrier, kWarpgroup);
  store_rows<kHeads, kDim>(mine.query, static_cast<__nv_bfloat16*>(attention.o) + vector * kDim, heads, 0);
#else
  ptx::wait_for_predecessors();
#endif
}

// Adds up the units of a row and writes one slab of the output of kHeads heads.
template <int kHeads>
__global__ void __launch_bounds__(kWarpgroup)
    add_units_kernel(const __grid_constant__ SparseAttention attention, int units) {
  ptx::launch_dependents();
  ptx::wait_for_predecessors();
  __shared__ alignas(16) uint8_t staging[kHeads * kStagingStride<kSlab>];
  const int head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t row = blockIdx.x / head_tiles, head_tile = blockIdx.x % head_tiles;
  const int slab = blockIdx.y, first_head = head_tile * kHeads, heads = attention.heads - first_head;
  const RowKeys keys = keys_of_row(attention.keys, attention.rope, row);
  const int row_units = (keys.count + kUnit - 1) / kUnit;
  __shared__ float reciprocals[kHeads];
  const int thread = threadIdx.x;
  float references[kColumns<kHeads>], output[kHeads / 2] = {};
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) references[column] = -INFINITY;
  Total total;
#pragma unroll 4
  for (int unit = 0; unit < row_units; ++unit) {
    const Partial<kHeads> partial(attention.partials, blockIdx.x, units, unit);
    float largest[kColumns<kHeads>], part[kHeads / 2];
    load_columns<kHeads>(partial.largest(), largest);
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
      const float4 four = partial.output(slab)[i * kWarpgroup + thread];
      part[4 * i] = four.x;
      part[4 * i + 1] = four.y;
      part[4 * i + 2] = four.z;
      part[4 * i + 3] = four.w;
    }
    if (thread < kHeads) total.add(partial.largest()[thread], partial.sum()[thread]);
    const Steps<kHeads> steps(references, largest);
    if (steps.rescale) rescale_output<kHeads>(output, steps);
    add_output<kHeads>(output, part, steps);
  }
  if (thread < kHeads) reciprocals[thread] = finish_head(attention, row, first_head + thread, total, slab == 0);
  __syncthreads();
  float reciprocal[kColumns<kHeads>];
  load_columns<kHeads>(reciprocals, reciprocal);
  finish_slab<kHeads>(output, reciprocal, slab == kSlabs - 1, inverse_turn(attention.rope, keys.position));
  stage_slab<kHeads, kSlab>(output, staging, 0);
  __syncthreads();
  const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;
  store_rows<kHeads, kSlab>(staging, static_cast<__nv_bfloat16*>(attention.o) + vector * kDim, heads, slab * kSlab);
}

int tiles_of(int heads, int tile) { return (heads + tile - 1) / tile; }

int units_of(const SparseAttention& attention) {
  return static_cast<int>((key_capacity(attention.keys) + kUnit - 1) / kUnit);
}

template <int kHeads, int kConsumers>
cudaError_t launch(const SparseAttention& attention, int units, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(attention.rows * tiles_of(attention.heads, kHeads * kConsumers));
  const size_t shared = sizeof(SharedMemory<kHeads, kConsumers>);
  const Launch at{dim3(tiles, units), dim3(kThreads), stream, shared};
  return launch_kernel(sparse_attention_kernel<kHeads, kConsumers>, at, attention);
}

template <int kHeads>
cudaError_t launch_split(const SparseAttention& attention, int units, cudaStream_t stream) {
  const cudaError_t status = launch<kHeads, 1>(attention, units, stream);
  if (status != cudaSuccess) return status;
  const Launch at{dim3(attention.rows * tiles_of(attention.heads, kHeads), kSlabs), dim3(kWarpgroup), stream};
  return launch_kernel(add_units_kernel<kHeads>, at, attention, units);
}

}  // namespace

bool on_tensor_cores(const SparseAttention& attention) {
  const bool packed = !attention.keys.window_pool.plain && !attention.keys.compressed_pool.plain;
  if (attention.dtype != Dtype::kBf16 || attention.dim != kDim || attention.rope.dim != kRopeDim || !packed) return false;
  int device = 0, major = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
  return known && major == 9;
}

int64_t partial_floats(const SparseAttention& attention) {
  const int tile = attention.heads <= 8 ? 8 : kSplitHeads;
  return attention.rows * tiles_of(attention.heads, tile) * units_of(attention) * tile * (kDim + 2);
}

cudaError_t launch_sparse_attention(const SparseAttention& attention, cudaStream_t stream) {
  const int units = units_of(attention), heads = attention.heads;
  constexpr int kLargestGrid = 65535;
  if (attention.partials != nullptr && units <= kLargestGrid) {
    return heads <= 8 ? launch_split<8>(attention, units, stream) : launch_split<16>(attention, units, stream);
  }
  // The largest tile of heads that still gives most SMs a CTA: every tile unpacks the keys for itself.
  constexpr int kCtas = 96;
  if (heads <= 8) return launch<8, 1>(attention, 1, stream);
  if (heads <= 16 || attention.rows * tiles_of(heads, 32) < kCtas) return launch<16, 1>(attention, 1, stream);
  if (heads <= 32 || attention.rows * tiles_of(heads, 64) < kCtas) return launch<32, 1>(attention, 1, stream);
  return launch<32, 2>(attention, 1, stream);
}

}  // namespace dsv4
