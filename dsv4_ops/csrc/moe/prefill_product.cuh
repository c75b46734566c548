// Weights times the rows of a block, on the tensor cores of Hopper: the device code of gate_up and down (prefill.h).
//
// A CTA takes tiles in turn: a block of up to 128 rows, of one expert, against two sets of 128 rows of its weights, w1
// and w3 or two neighbouring parts of w2. Weights lie on M and come from registers, tokens on N:
//
//   warps 0 .. 7   two warpgroups, each 64 rows of both sets: 2 wgmma m64n<rows>k16 a step, 2 x rows / 2 accumulators
//                  a thread. While one step is multiplied, the next one's weights are decoded.
//   warps 8 .. 11  copies. Weights by cp.async, so that every consumer finds its own 16-byte pieces, a warp for each of
//                  the rows row and row + 8 of both sets; panels of rows by bulk copies. They run ahead of the
//                  consumers, also from tile to tile.
//
// The rows of weights are dealt to M so that h comes out in the order of columns that w2 asks for (order.cuh).
//
// Shared memory (FP4; FP8 and bf16 in brackets): 7, folded 6 (5) panels of 16 KB, 32 KB for the output, 4 (3) stages of
// weights of 16 (32) KB, 16 (0) KB of scales: one CTA an SM.
//
// The first warpgroup is a stage ahead, and no barrier makes it wait for the other: while one is at its output, the
// other has the tensor cores. The second one stores the 128 columns of h that both have staged.
//
// What bounds it, in cycles of an SM for a step of 16 columns and a block of n rows: tensor cores 2n; L2, 2 KB of
// weights and 32n bytes of rows. A warp executes about 55 instructions a step, of which decoding FP4 is 34, and a
// scheduler has two such warps: latency between instructions counts as much as their number.
#pragma once

#include "common/quantise.cuh"
#include "common/swiglu.cuh"
#include "moe/prefill_copies.cuh"
#include "moe/prefill_fold.cuh"

namespace dsv4 {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- products ----

// acc[matrix] [64 weight rows of this warpgroup, kN rows of the block].
template <MoeFormat kFormat, PrefillStep kStep, int kN>
__device__ __forceinline__ void multiply(const PrefillProduct& product, const Tile& tile,
                                         ProductMemory<kFormat>& memory, Rings<kFormat>& rings,
                                         float (&acc)[2][kN / 2]) {
  using Shape = WeightShape<kFormat>;
  const int lane = threadIdx.x % kWarp, t = lane % 4, slot = threadIdx.x / kWarp * 8 + lane / 4;
  const int chunks = product.k / Shape::kChunk;
  const uint8_t* block_scales[2];
  uint32_t ahead[2];
  if constexpr (kFormat == MoeFormat::kFp8) {
#pragma unroll
    for (int matrix = 0; matrix < 2; ++matrix) {
      const int64_t row = first_row<kStep>(product, tile.part, matrix) / 128;
      block_scales[matrix] = static_cast<const uint8_t*>(product.scale[matrix]) +
                             tile.block.expert * product.scale_expert + row * product.scale_pitch;
      ahead[matrix] = *block_scales[matrix];
    }
  }
  // Of a stage, what its first steps need: the pieces and the factors of their scales.
  const auto load_stage = [&](int chunk, uint4 (&pieces)[kRowSets], Factors<kFormat>& factors) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full_weights + rings.weights.stage), rings.weights.parity);
    if constexpr (Shape::kFp4) {
      factors.load(memory.scales[rings.scale_buffer], slot, chunk, t);
      if (chunk % Shape::kScaleSpan == Shape::kScaleSpan - 1 || chunk == chunks - 1) {
        rings.scale_buffer = rings.scale_buffer + 1 == Shape::kScaleBuffers ? 0 : rings.scale_buffer + 1;
      }
    } else if constexpr (kFormat == MoeFormat::kFp8) {
      factors.set(ahead[0], ahead[1]);
      const int next = min(chunk + 1, chunks - 1);
      ahead[0] = block_scales[0][next];
      ahead[1] = block_scales[1][next];
    }
    if constexpr (kFormat != MoeFormat::kDense) {
      load_weights<kFormat>(pieces, memory.weights[rings.weights.stage], 0);
    }
  };
  uint4 pieces[kRowSets];
  Factors<kFormat> factors;
  load_stage(0, pieces, factors);
  uint32_t a[2][2][4];  // of two steps
  uint32_t read_panel = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint4 next_pieces[kRowSets] = {};
    Factors<kFormat> next_factors{};
    uint64_t b = 0;
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      if ((step > 0 || kFormat == MoeFormat::kDense) && step % Shape::kStepsOfLoad == 0) {
        load_weights<kFormat>(pieces, memory.weights[rings.weights.stage], step);
      }
      if (step % 4 == 0) factors.prepare(step);
      decode_step<kFormat>(a[step % 2][0], pieces, 0, step, factors);
      decode_step<kFormat>(a[step % 2][1], pieces, 1, step, factors);
      if (factors.large()) [[unlikely]] apply_rest<kFormat>(a[step % 2], factors);
      if (step == Shape::kSteps - Shape::kStepsOfLoad) {
        ptx::mbarrier_arrive(
            ptx::shared_address(memory.empty_weights[rings.weights.stage] + threadIdx.x / kWarpgroup));
      }
      if (step % 4 == 0) {
        ptx::mbarrier_wait(ptx::shared_address(memory.full_panels + rings.panels.stage), rings.panels.parity);
        b = ptx::wgmma_descriptor(ptx::shared_address(memory.panels[rings.panels.stage]), 16, 1024, true);
      }
      ptx::wgmma_fence();
      ptx::wgmma_k16_bf16<kN>(acc[0], a[step % 2][0], ptx::advance_descriptor(b, step % 4 * 32), 1);
      ptx::wgmma_k16_bf16<kN>(acc[1], a[step % 2][1], ptx::advance_descriptor(b, step % 4 * 32), 1);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step % 4 == 0) {
        if (lane == 0 && (chunk > 0 || step > 0)) ptx::mbarrier_arrive(read_panel);
        read_panel = ptx::shared_address(memory.empty_panels + rings.panels.stage);
        rings.panels.advance();
      }
      if (step == Shape::kSteps - (kFormat == MoeFormat::kDense ? 1 : 2)) {
        rings.weights.advance();
        if (chunk + 1 < chunks) load_stage(chunk + 1, next_pieces, next_factors);
      }
    }
#pragma unroll
    for (int set = 0; set < kRowSets; ++set) pieces[set] = next_pieces[set];
    factors = next_factors;
  }
  ptx::wgmma_wait<0>();
  if (lane == 0) ptx::mbarrier_arrive(read_panel);
  ptx::pin_registers(acc[0]);
  ptx::pin_registers(acc[1]);
}

// ---- output ----

// A warpgroup's values [64, kN], as bf16 pairs of neighbouring columns, to its staging: [kN][64], swizzled as a panel.
// words[j][lower]: columns 8j + 2t and the next of rows row and row + 8.
template <int kN>
__device__ __forceinline__ void stage(uint8_t* staging, const uint32_t (&words)[kN / 8][2]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
  const int row = lane / 16 * 8 + lane % 8, chunk = (2 * warp + lane / 8 % 2) ^ (lane % 8);
  const uint32_t address = ptx::shared_address(staging) + row * 128 + chunk * 16;
#pragma unroll
  for (int j = 0; j < kN / 8; j += 2) {
    ptx::stmatrix_transposed(address + j * 1024, words[j][0], words[j][1], words[j + 1][0], words[j + 1][1]);
  }
}

using Chunk = Packed<__nv_bfloat16, 8>;

// 16 bytes at place `chunk` of row `row` in the staging of a warpgroup.
template <typename Memory>
__device__ __forceinline__ Chunk& staged(Memory& memory, int warpgroup, int row, int chunk) {
  return *reinterpret_cast<Chunk*>(memory.staging[warpgroup] + row * 128 + chunk * 16);
}

// Rows that a thread of a warpgroup takes of a block, 16 apart, with seven neighbours.
constexpr int kRowStep = kWarpgroup / 8;

// quant_fp8 and back of 128 values that lie in eight lanes.
__device__ __forceinline__ void round_fp8(Chunk (&parts)[2]) {
  const uint32_t bits = max(parts[0].max_magnitude_bits(), parts[1].max_magnitude_bits());
  const uint32_t scale = fp8_group_scale(__uint_as_float(max_lanes<8>(bits)));
  const float inverse = invert_ue8m0(scale), factor = decode_ue8m0(scale);
#pragma unroll
  for (auto& part : parts) {
    const auto scaled = part.times_power_of_two(inverse);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 pair = scaled.pair(i), rounded = decode_e4m3x2(encode_e4m3x2(pair.x, pair.y));
      part.round_pair(i, {rounded.x * factor, rounded.y * factor});
    }
  }
}

// The 128 columns of h that both warpgroups have staged, by the second: quantised and back, and stored.
template <MoeFormat kFormat, int kN>
__device__ __forceinline__ void store_h(const PrefillProduct& product, const Tile& tile,
                                        ProductMemory<kFormat>& memory) {
  const int first = threadIdx.x % kWarpgroup / 8, chunk = threadIdx.x % 8;
  uint8_t* const h = product.h + (tile.part * 2 * product.rows.capacity + tile.block.first_row + first) * 128;
#pragma unroll 2
  for (int i = 0; i < kN / kRowStep; ++i) {
    const int row = first + i * kRowStep;
    Chunk parts[2] = {staged(memory, 0, row, chunk), staged(memory, 1, row, chunk)};
    if constexpr (kFormat == MoeFormat::kFp8) round_fp8(parts);
    uint8_t* const target = h + (row - first) * 128 + chunk * 16;
    ptx::store(target, parts[0].parts[0]);
    ptx::store(target + product.rows.capacity * 128, parts[1].parts[0]);
  }
}

// The same for a folded product with w2: codes in panels of 128 columns, and the scale of each row.
template <int kN>
__device__ __forceinline__ void store_codes_of_h(const PrefillProduct& product, const Tile& tile,
                                                 ProductMemory<MoeFormat::kMxfp4Folded>& memory) {
  const int first = threadIdx.x % kWarpgroup / 8, place = threadIdx.x % 8;
  const int64_t first_row = tile.part * product.rows.capacity + tile.block.first_row;
  float* const scales = row_scales(product.h, product.out, product.rows.capacity) + first_row;
#pragma unroll 2
  for (int i = 0; i < kN / kRowStep; ++i) {
    const int row = first + i * kRowStep, chunk = place ^ row % 8;  // 8 of the 64 columns of each warpgroup
    const Chunk parts[2] = {staged(memory, 0, row, place), staged(memory, 1, row, place)};
    const uint32_t bits = max(parts[0].max_magnitude_bits(), parts[1].max_magnitude_bits());
    const uint32_t scale = fp8_group_scale(__uint_as_float(max_lanes<8>(bits)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto scaled = parts[half].times_power_of_two(invert_ue8m0(scale));
      uint32_t words[2];
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const float2 low = scaled.pair(4 * word), high = scaled.pair(4 * word + 2);
        words[word] = encode_e4m3x2(low.x, low.y) | encode_e4m3x2(high.x, high.y) << 16;
      }
      uint8_t* const target = product.h + (first_row + row) * 128 + ((4 * half + chunk / 2) ^ row % 8) * 16;
      *reinterpret_cast<uint2*>(target + chunk % 2 * 8) = {words[0], words[1]};
    }
    if (place == 0) scales[row] = decode_ue8m0(scale);
  }
}

template <MoeFormat kFormat, int kN>
__device__ __forceinline__ void finish_gate_up(const PrefillProduct& product, const Tile& tile,
                                               ProductMemory<kFormat>& memory, int warpgroup, bool last,
                                               const float (&acc)[2][kN / 2]) {
  const int t = threadIdx.x % 4;
  const SwigluLimit limit(product.limit);
  float global[2] = {1.0f, 1.0f};
  if constexpr (kFormat == MoeFormat::kNvfp4) {
    global[0] = product.global[0][tile.block.expert];
    global[1] = product.global[1][tile.block.expert];
  }
  uint32_t words[kN / 8][2];
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float2 route = *reinterpret_cast<const float2*>(memory.route[warpgroup] + 8 * j + 2 * t);
    float2 factor = {1.0f, 1.0f};
    if constexpr (kFormat == MoeFormat::kNvfp4) {
      factor = *reinterpret_cast<const float2*>(memory.factor[warpgroup] + 8 * j + 2 * t);
    }
    const auto activate = [&](float gate, float up, float row_factor, float weight) {
      if constexpr (kFormat == MoeFormat::kNvfp4) {
        gate *= row_factor * global[0] * WeightShape<kFormat>::kUnit;
        up *= row_factor * global[1] * WeightShape<kFormat>::kUnit;
      }
      gate = limit.gate(round_to<__nv_bfloat16>(gate));
      return silu<__nv_bfloat16>(gate) * limit.up(round_to<__nv_bfloat16>(up)) * weight;
    };
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int i = 4 * j + 2 * lower;
      words[j][lower] = pack_bf16x2(activate(acc[0][i], acc[1][i], factor.x, route.x),
                                    activate(acc[0][i + 1], acc[1][i + 1], factor.y, route.y));
    }
  }
  if (warpgroup == 0) ptx::named_barrier(kTakenBarrier, kConsumers);
  stage<kN>(memory.staging[warpgroup], words);
  if (warpgroup == 0) {
    ptx::named_barrier_arrive(kStagedBarrier, kConsumers);
  } else {
    ptx::named_barrier(kStagedBarrier, kConsumers);
    if constexpr (kFormat == MoeFormat::kMxfp4Folded) {
      store_codes_of_h<kN>(product, tile, memory);
    } else {
      store_h<kFormat, kN>(product, tile, memory);
    }
    if (!last) ptx::named_barrier_arrive(kTakenBarrier, kConsumers);
  }
}

template <MoeFormat kFormat, int kN>
__device__ __forceinline__ void finish_down(const PrefillProduct& product, const Tile& tile,
                                            ProductMemory<kFormat>& memory, int warpgroup,
                                            const float (&acc)[2][kN / 2]) {
  const int t = threadIdx.x % 4, first = threadIdx.x % kWarpgroup / 8, chunk = threadIdx.x % 8;
  int pairs[kN / kRowStep];
#pragma unroll
  for (int i = 0; i < kN / kRowStep; ++i) pairs[i] = memory.pair[warpgroup][first + i * kRowStep];
  uint32_t words[2][kN / 8][2];
#pragma unroll
  for (int matrix = 0; matrix < 2; ++matrix) {
    float global = 1.0f;
    if constexpr (kFormat == MoeFormat::kNvfp4) {
      global = product.global[matrix][tile.block.expert] * WeightShape<kFormat>::kUnit;
    }
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      float2 factor = {1.0f, 1.0f};
      if constexpr (kFormat == MoeFormat::kNvfp4) {
        factor = *reinterpret_cast<const float2*>(memory.factor[warpgroup] + 8 * j + 2 * t);
        factor.x *= global;
        factor.y *= global;
      }
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int i = 4 * j + 2 * lower;
        words[matrix][j][lower] = pack_bf16x2(acc[matrix][i] * factor.x, acc[matrix][i + 1] * factor.y);
      }
    }
  }
#pragma unroll
  for (int matrix = 0; matrix < 2; ++matrix) {
    const int column = tile.part * 256 + matrix * 128 + warpgroup * 64;
    if (column >= product.out) break;
    if (matrix == 1) meet(warpgroup);
    stage<kN>(memory.staging[warpgroup], words[matrix]);
    meet(warpgroup);
    auto* const results = static_cast<__nv_bfloat16*>(product.results) + column + (chunk ^ first % 8) * 8;
#pragma unroll
    for (int i = 0; i < kN / kRowStep; ++i) {
      const Chunk& values = staged(memory, warpgroup, first + i * kRowStep, chunk);
      if (pairs[i] >= 0) ptx::store(results + static_cast<int64_t>(pairs[i]) * product.out, values.parts[0]);
    }
  }
}

// What the epilogue needs of each row, to the warpgroup's places in shared memory; complete after cp_async_wait.
template <MoeFormat kFormat, PrefillStep kStep>
__device__ __forceinline__ void load_rows(const PrefillProduct& product, const Tile& tile,
                                          ProductMemory<kFormat>& memory, int warpgroup) {
  const int row = threadIdx.x % kWarpgroup, place = tile.block.first_row + row;
  const bool listed = product.rows.pair_of_row != nullptr;
  const bool exists = row < tile.block.rows && (listed || place < product.used_rows);
  if constexpr (kStep == PrefillStep::kGateUp) {
    ptx::cp_async_4(memory.route[warpgroup] + row, product.rows.route + place, exists ? 4 : 0);
  } else if (listed) {
    ptx::cp_async_4(memory.pair[warpgroup] + row, product.rows.pair_of_row + place, exists ? 4 : 0);
  } else {
    memory.pair[warpgroup][row] = exists ? place : -1;
  }
  if constexpr (kFormat == MoeFormat::kNvfp4) {
    ptx::cp_async_4(memory.factor[warpgroup] + row, product.row_factor + place * product.row_factor_stride,
                    exists ? 4 : 0);
  }
  ptx::cp_async_commit();
}

template <MoeFormat kFormat, PrefillStep kStep, int kN>
__device__ __forceinline__ void consume_tile(const PrefillProduct& product, const Tile& tile,
                                             ProductMemory<kFormat>& memory, Rings<kFormat>& rings, int warpgroup,
                                             bool last) {
  load_rows<kFormat, kStep>(product, tile, memory, warpgroup);
  float acc[2][kN / 2];  // zeros, so that ptxas does not keep the last tile's for what might be read
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[0][i] = acc[1][i] = 0.0f;
  if constexpr (kFormat == MoeFormat::kMxfp4Folded) {
    multiply_folded<kN>(product, memory, rings, warpgroup, acc);
  } else {
    multiply<kFormat, kStep, kN>(product, tile, memory, rings, acc);
  }
  ptx::cp_async_wait<0>();
  meet(warpgroup);  // rows are complete, and nobody reads the last tile's staging any more
  if constexpr (kStep == PrefillStep::kGateUp) {
    finish_gate_up<kFormat, kN>(product, tile, memory, warpgroup, last, acc);
  } else {
    finish_down<kFormat, kN>(product, tile, memory, warpgroup, acc);
  }
}

// The first warpgroup has taken its second stage of weights before the other starts. It keeps this lead, so that one
// multiplies while the other is at its output.
template <MoeFormat kFormat, PrefillStep kStep>
__device__ __forceinline__ void consume(const PrefillProduct& product, const ProductTiles& tiles,
                                        ProductMemory<kFormat>& memory, int tile_count, int warpgroup) {
  Rings<kFormat> rings;
  const int first = blockIdx.x, step = gridDim.x;
  if (warpgroup == 1 && first < tile_count) {
    if constexpr (kStep == PrefillStep::kGateUp) ptx::named_barrier_arrive(kTakenBarrier, kConsumers);
    if (product.k > WeightShape<kFormat>::kChunk) {
      ptx::mbarrier_wait(ptx::shared_address(&memory.empty_weights[1][0]), 0);
    }
  }
  for (int index = first; index < tile_count; index += step) {
    const Tile tile = tile_at(product, tiles, index);
    const bool last = index + step >= tile_count;
    switch (tile.block.rows) {
      case 16: consume_tile<kFormat, kStep, 16>(product, tile, memory, rings, warpgroup, last); break;
      case 32: consume_tile<kFormat, kStep, 32>(product, tile, memory, rings, warpgroup, last); break;
      case 48: consume_tile<kFormat, kStep, 48>(product, tile, memory, rings, warpgroup, last); break;
      case 64: consume_tile<kFormat, kStep, 64>(product, tile, memory, rings, warpgroup, last); break;
      case 80: consume_tile<kFormat, kStep, 80>(product, tile, memory, rings, warpgroup, last); break;
      case 96: consume_tile<kFormat, kStep, 96>(product, tile, memory, rings, warpgroup, last); break;
      case 112: consume_tile<kFormat, kStep, 112>(product, tile, memory, rings, warpgroup, last); break;
      default: consume_tile<kFormat, kStep, 128>(product, tile, memory, rings, warpgroup, last); break;
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// The CTA's shared memory, its barriers ready.
template <MoeFormat kFormat>
__device__ __forceinline__ ProductMemory<kFormat>& start_memory() {
  extern __shared__ __align__(1024) uint8_t memory_start[];
  auto& memory = *reinterpret_cast<ProductMemory<kFormat>*>(memory_start);
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : memory.full_weights) ptx::mbarrier_init(ptx::shared_address(&barrier), kProducers);
    for (auto& barriers : memory.empty_weights) {
      for (uint64_t& barrier : barriers) ptx::mbarrier_init(ptx::shared_address(&barrier), kWarpgroup);
    }
    for (uint64_t& barrier : memory.full_panels) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
    for (uint64_t& barrier : memory.empty_panels) {
      const int readers = WeightShape<kFormat>::kFolded ? kConsumers : kConsumers / kWarp;
      ptx::mbarrier_init(ptx::shared_address(&barrier), readers);
    }
    ptx::fence_async_proxy();
  }
  __syncthreads();
  return memory;
}

// All tiles of this CTA. Only Hopper is asked to (prefill_serves).
template <MoeFormat kFormat, PrefillStep kStep>
__device__ __forceinline__ void multiply_tiles(const PrefillProduct& product, const ProductTiles& tiles,
                                               ProductMemory<kFormat>& memory) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int tile_count = block_count(product) * static_cast<int>(tiles.parts.value());
  // The same in all lanes, and known to be.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 2) {
    ptx::give_registers<ProductRegisters<kFormat>::kProducer>();
    produce<kFormat, kStep>(product, tiles, memory, tile_count);
  } else {
    ptx::take_registers<ProductRegisters<kFormat>::kConsumer>();
    consume<kFormat, kStep>(product, tiles, memory, tile_count, warpgroup);
  }
#endif
}

// One CTA an SM, or one a tile where these are fewer.
template <MoeFormat kFormat, typename Kernel>
cudaError_t launch_product(Kernel kernel, PrefillStep step, const PrefillProduct& product, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  const int rows = step == PrefillStep::kGateUp ? 128 : 256, parts = (product.out + rows - 1) / rows;
  const int64_t most_tiles = product.rows.most_blocks * parts;
  const ProductTiles tiles{Divisor(parts), rows};
  const Launch at{dim3(static_cast<unsigned>(most_tiles < processors ? most_tiles : processors)),
                  dim3(kProductThreads), stream, sizeof(ProductMemory<kFormat>)};
  return launch_kernel(kernel, at, product, tiles);
}

}  // namespace dsv4
