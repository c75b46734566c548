// Scores of index keys on the tensor cores of Hopper: sum over 64 heads of w * relu(q . k), heads of 128.
//
// Keys lie on M, 64 a tile, heads on N: 64 of one token, or 128 of two. A CTA owns up to 8 neighbouring tokens of a sequence
// (one in decode) and a slice of its tiles. Its warpgroups take the tiles in turn and never meet after the queries are in
// place: a thread copies by cp.async exactly the 16-byte parts of keys that it later feeds to wgmma from its registers. That
// makes the order of k in a product free, as long as queries and keys agree: thread t of four takes the parts t and t + 4 of
// a key in FP8, the group t of 32 in FP4, and the queries are stored in shared memory in the order that follows from it.
//
//   fp8   wgmma E4M3, 4 steps of 32; the key's scale multiplies the sum over heads
//   fp4   E2M1 times its UE8M0 scale is exact in bf16; wgmma bf16, 8 steps of 16
//
// After the product a thread has 16 heads of two keys for each token. It adds w * relu in a fixed order, four neighbouring
// lanes add up, so a score depends on nothing but its query and its key.
//
// Shared memory, bytes:  rows * 64 * (128 fp8, 256 bf16)   queries, rows of 128 bytes in the 128-byte swizzle
//                        rows * 256 + 32                   weights; how many entries each row sees
//                        warpgroups * stages * 8704 (fp8) or 5120 (fp4)  keys and scales, a slot for each thread
// Floor: decode, the keys once: 132 (fp8) or 68 (fp4) bytes each from memory. Prefill, 16384 flops a score on the tensor
// cores; the two instructions a head and score of the sum hide behind the products of the other warpgroups.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90_index.cuh"
#include "common/reduce.cuh"
#include "indexer/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kHeads = 64;
constexpr int kDim = 128;
constexpr int kWarpgroup = 128;
constexpr int kMostRows = 8;
constexpr int kMultiprocessors = 132;

// n / divisor for 0 <= n < 2^31 by a multiplication: the high word of n * multiplier, plus n, shifted.
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  int shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

Divisor make_divisor(uint32_t value) {
  int shift = 0;
  while ((uint64_t{1} << shift) < value) ++shift;
  const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - value)) / value + 1;
  return {value, static_cast<uint32_t>(multiplier), shift};
}

template <IndexForm kForm>
struct Format;

template <>
struct Format<IndexForm::kFp8> {
  static constexpr int kKeyBytes = 128;      // of a key in the pool
  static constexpr int kScaleBytes = 4;
  static constexpr int kQueryBytes = 128;    // of a head in the pool of queries
  static constexpr int kPanels = 1;          // of 128 bytes, that a head has in shared memory
  static constexpr int kSteps = 4;           // of 32 bytes of k
  static constexpr int kParts = 4;           // 16-byte parts of keys that a thread takes of a tile
  static constexpr int kScales = 1;          // words of scales likewise
  static constexpr int kMostRows = 8;
};

template <>
struct Format<IndexForm::kFp4> {
  static constexpr int kKeyBytes = 64;
  static constexpr int kScaleBytes = 4;
  static constexpr int kQueryBytes = 64;
  static constexpr int kPanels = 2;
  static constexpr int kSteps = 8;
  static constexpr int kParts = 2;
  static constexpr int kScales = 2;
  static constexpr int kMostRows = 4;
};

// Tiles of a warpgroup that are in place or on their way.
template <bool kPaired>
constexpr int kStages = kPaired ? 3 : 4;

template <IndexForm kForm>
struct SharedMap {
  using F = Format<kForm>;
  static constexpr int kStageBytes = kWarpgroup * (16 * F::kParts + 4 * F::kScales);

  static int bytes(int rows, int warpgroups, int stages) {
    const int queries = rows * kHeads * (128 * F::kPanels);
    return queries + rows * kHeads * 4 + kMostRows * 4 + warpgroups * stages * kStageBytes;
  }
};

// ---- FP4 ----

// Of eight codes in `word`, the pair (code pair, code pair + 4) times `scale` as two bf16. A code's three bits are moved into
// the last exponent bits and the first mantissa bit of a bf16: that is its magnitude times 2^-126.
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, int pair, __nv_bfloat162 scale) {
  const uint32_t sign = (word << (12 - 4 * pair)) & 0x80008000u;
  const uint32_t moved = pair < 2 ? word << (6 - 4 * pair) : word >> (4 * pair - 6);
  const uint32_t bits = sign | (moved & 0x01C001C0u);
  const __nv_bfloat162 unit = __bfloat162bfloat162(__ushort_as_bfloat16(0x7E80));  // 2^126
  const __nv_bfloat162 value = __hmul2(__hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), unit), scale);
  return reinterpret_cast<const uint32_t&>(value);
}

// A UE8M0 byte as two bf16: byte 0 is the subnormal 2^-127, 255 is NaN.
__device__ __forceinline__ __nv_bfloat162 decode_scale(uint32_t byte) {
  const uint32_t bits = (byte << 7) + (byte == 0 || byte == 255 ? 1u << 6 : 0u);
  return __bfloat162bfloat162(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
}

// ---- queries ----

// 16 bytes of a head on their way to shared memory; all zero for a row that does not exist.
struct QueryPart {
  uint4 codes;
  uint32_t scale;
};

template <IndexForm kForm>
__device__ __forceinline__ QueryPart load_query(const IndexScoring& in, int64_t token, int rows, int index) {
  constexpr int kParts = Format<kForm>::kQueryBytes / 16;
  const int part = index % kParts, head = index / kParts % kHeads, row = index / kParts / kHeads;
  QueryPart loaded{};
  if (row >= rows) return loaded;
  const int64_t line = (token + row) * kHeads + head;
  loaded.codes = *reinterpret_cast<const uint4*>(in.q + line * in.q_stride + 16 * part);
  if constexpr (kForm == IndexForm::kFp4) loaded.scale = in.scales[line * in.scales_stride + part];
  return loaded;
}

// Word `place` of k step `step` of a head's line.
template <IndexForm kForm>
__device__ __forceinline__ uint32_t* query_word(uint8_t* queries, int all_rows, int line, int step, int place) {
  const int panel = step / 4, byte = (step % 4 * 32 + place * 4) ^ (line % 8 * 16);
  return reinterpret_cast<uint32_t*>(queries + (panel * all_rows * kHeads + line) * 128 + byte);
}

template <IndexForm kForm>
__device__ __forceinline__ void store_query(uint8_t* queries, int all_rows, int index, const QueryPart& loaded) {
  constexpr int kParts = Format<kForm>::kQueryBytes / 16;
  const int part = index % kParts, line = index / kParts;
  const uint32_t words[4] = {loaded.codes.x, loaded.codes.y, loaded.codes.z, loaded.codes.w};
  if constexpr (kForm == IndexForm::kFp8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *query_word<kForm>(queries, all_rows, line, part / 4 * 2 + i / 2, i % 2 * 4 + part % 4) = words[i];
    }
  } else {
    const __nv_bfloat162 scale = decode_scale(loaded.scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        *query_word<kForm>(queries, all_rows, line, 2 * i + pair / 2, pair % 2 * 4 + part) =
            decode_pair(words[i], pair, scale);
      }
    }
  }
}

// ---- keys ----

// Where a thread's two keys of a tile lie: rows `row` and `row` + 8.
struct KeyPlaces {
  int32_t page[2];
  int slot[2];
};

struct KeyReader {
  const IndexScoring& in;
  const Divisor& page_size;
  int64_t table;     // of the sequence
  int capacity;
  int row;           // of the tile
  int part;          // t

  __device__ __forceinline__ KeyPlaces find(int tile) const {
    KeyPlaces places;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto entry = static_cast<uint32_t>(min(tile * kTile + row + 8 * i, capacity - 1));
      const uint32_t page = page_size.quotient(entry);
      places.slot[i] = static_cast<int>(entry - page * page_size.value);
      places.page[i] = in.keys.table[table + page];
    }
    return places;
  }
};

// Copy a thread's parts of a tile to its slots; zeros for entries from `seen` on.
template <IndexForm kForm>
__device__ __forceinline__ void copy_keys(const KeyReader& reader, const KeyPlaces& places, int tile, int seen,
                                          int scale_row, uint8_t* stage) {
  using F = Format<kForm>;
  const int thread = threadIdx.x % kWarpgroup;
  const uint8_t* keys[2];
  const uint8_t* scales[2];
  int bytes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool exists = tile * kTile + reader.row + 8 * i < seen;
    bytes[i] = exists ? 16 : 0;
    const uint8_t* const page = reader.in.keys.data + (exists ? places.page[i] * reader.in.keys.page_stride : 0);
    keys[i] = page + static_cast<int64_t>(places.slot[i]) * F::kKeyBytes;
    scales[i] = page + static_cast<int64_t>(reader.in.keys.page_size) * F::kKeyBytes + places.slot[i] * F::kScaleBytes;
  }
#pragma unroll
  for (int i = 0; i < F::kParts; ++i) {
    const int half = i / (F::kParts / 2), part = reader.part + i % (F::kParts / 2) * 4;
    ptx::cp_async_16(stage + (i * kWarpgroup + thread) * 16, keys[half] + 16 * part, bytes[half]);
  }
  uint8_t* const words = stage + kWarpgroup * 16 * F::kParts;
  if constexpr (kForm == IndexForm::kFp8) {
    ptx::cp_async_4(words + thread * 4, scale_row ? scales[1] : scales[0], (scale_row ? bytes[1] : bytes[0]) / 4);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::cp_async_4(words + (i * kWarpgroup + thread) * 4, scales[i], bytes[i] / 4);
    }
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A thread's share of a tile as the first operand of all k steps, and its scale (FP8).
template <IndexForm kForm>
struct KeyOperand {
  uint32_t values[Format<kForm>::kSteps][4];
  float scale;

  __device__ __forceinline__ void load(const uint8_t* stage, int part) {
    using F = Format<kForm>;
    const int thread = threadIdx.x % kWarpgroup;
    const auto* const parts = reinterpret_cast<const uint4*>(stage) + thread;
    const auto* const words = reinterpret_cast<const uint32_t*>(stage + kWarpgroup * 16 * F::kParts) + thread;
    if constexpr (kForm == IndexForm::kFp8) {
#pragma unroll
      for (int i = 0; i < F::kParts; ++i) {
        const uint4 four = parts[i * kWarpgroup];
        const int half = i / 2, step = i % 2 * 2;
        values[step][half] = four.x;
        values[step][half + 2] = four.y;
        values[step + 1][half] = four.z;
        values[step + 1][half + 2] = four.w;
      }
      scale = __uint_as_float(words[0]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 four = parts[half * kWarpgroup];
        const uint32_t codes[4] = {four.x, four.y, four.z, four.w};
        const __nv_bfloat162 factor = decode_scale(words[half * kWarpgroup] >> (8 * part) & 0xFFu);
#pragma unroll
        for (int step = 0; step < F::kSteps; ++step) {
          values[step][half] = decode_pair(codes[step / 2], step % 2 * 2, factor);
          values[step][half + 2] = decode_pair(codes[step / 2], step % 2 * 2 + 1, factor);
        }
      }
      scale = 1.0f;
    }
  }
};

// acc = keys * queries over all of k; `queries` is the descriptor of the first step, `panel` the distance of panels in it.
template <IndexForm kForm, int kN>
__device__ __forceinline__ void multiply(float (&acc)[kN / 2], const KeyOperand<kForm>& keys, uint64_t queries,
                                         uint64_t panel) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Format<kForm>::kSteps; ++step) {
    const uint64_t operand = queries + step / 4 * panel + step % 4 * 2;  // 32 bytes
    if constexpr (kForm == IndexForm::kFp8) {
      ptx::wgmma_k32_e4m3<kN>(acc, keys.values[step], operand, step > 0);
    } else {
      ptx::wgmma_k16_bf16<kN>(acc, keys.values[step], operand, step > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(acc);
}

// Sum over a thread's 16 heads of w * relu for its two keys, for the token whose columns start at acc[kFirst].
template <int kFirst, int kCount>
__device__ __forceinline__ float2 sum_heads(const float (&acc)[kCount], const float* weights, int part) {
  float2 low{0.0f, 0.0f}, high{0.0f, 0.0f};  // even and odd columns
#pragma unroll
  for (int block = 0; block < kHeads / 8; ++block) {
    const float2 w = *reinterpret_cast<const float2*>(weights + block * 8 + part * 2);
    const int i = kFirst + block * 4;
    low.x = __fmaf_rn(w.x, ptx::max_nan(acc[i], 0.0f), low.x);
    low.y = __fmaf_rn(w.y, ptx::max_nan(acc[i + 1], 0.0f), low.y);
    high.x = __fmaf_rn(w.x, ptx::max_nan(acc[i + 2], 0.0f), high.x);
    high.y = __fmaf_rn(w.y, ptx::max_nan(acc[i + 3], 0.0f), high.y);
  }
  return {low.x + low.y, high.x + high.y};
}

// Of two values a lane keeps the one that `upper` says, adds the other lane's of the same kind, and gives the other one away.
__device__ __forceinline__ float exchange(float lower, float upper, bool keep_upper, int distance) {
  const float sent = __shfl_xor_sync(kAllLanes, keep_upper ? lower : upper, distance);
  return (keep_upper ? upper : lower) + sent;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// kPaired: two tokens a product, else a block has one token.
template <IndexForm kForm, bool kPaired>
__global__ void __launch_bounds__(kPaired ? 4 * kWarpgroup : 2 * kWarpgroup, kPaired ? 1 : 2)
    index_scores_tensor_kernel(IndexScoring in, ScoreTask task, ScoreSink sink, Divisor page_size) {
  ptx::launch_dependents();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using F = Format<kForm>;
  constexpr int kN = kPaired ? 2 * kHeads : kHeads;
  constexpr int kBatch = 4;  // parts of queries that a thread loads together
  extern __shared__ __align__(1024) uint8_t shared[];

  // 1. this CTA's tokens, its slice of tiles, this thread's keys
  const int blocks_of_sequence = (in.tokens + task.rows - 1) / task.rows;
  const int block = task.first_block + blockIdx.x / task.slices, slice = blockIdx.x % task.slices;
  const int sequence = block / blocks_of_sequence, first_row = block % blocks_of_sequence * task.rows;
  const int rows = min(task.rows, in.tokens - first_row), all_rows = kPaired ? (rows + 1) / 2 * 2 : 1;
  const int64_t token = static_cast<int64_t>(sequence) * in.tokens + first_row;
  const int tiles_of_slice = (task.tiles + task.slices - 1) / task.slices;
  const int first_tile = slice * tiles_of_slice, last_tile = min(first_tile + tiles_of_slice, task.tiles);
  const int warpgroups = blockDim.x / kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
  const int lane = threadIdx.x % kWarp, part = lane % 4;
  const int row = threadIdx.x % kWarpgroup / kWarp * kGroup + lane / 4;
  const int own_half = kPaired ? part / 2 : part % 2;  // the key whose score this lane ends up with is row + 8 * own_half
  const KeyReader reader{in, page_size, sequence * in.keys.table_stride, task.capacity, row, part};

  uint8_t* const queries = shared;
  auto* const weights = reinterpret_cast<float*>(shared + all_rows * kHeads * 128 * F::kPanels);
  auto* const seen_by = reinterpret_cast<int*>(weights + all_rows * kHeads);
  uint8_t* const stages =
      reinterpret_cast<uint8_t*>(seen_by + kMostRows) + warpgroup * kStages<kPaired> * SharedMap<kForm>::kStageBytes;
  ptx::wait_for_predecessors();

  // 2. everything that is waited for together: positions, the first pages, the first queries
  const int32_t* const positions = in.positions + sequence * in.positions_stride + first_row;
  int seen = 0;  // by any row
  for (int i = 0; i < rows; ++i) seen = max(seen, visible_entries(positions[i], in.ratio, task.capacity));
  KeyPlaces places[kStages<kPaired>];
#pragma unroll
  for (int i = 0; i < kStages<kPaired>; ++i) places[i] = reader.find(first_tile + warpgroup + i * warpgroups);
  const int query_parts = all_rows * kHeads * (F::kQueryBytes / 16);
  QueryPart batch[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    if (index < query_parts) batch[i] = load_query<kForm>(in, token, rows, index);
  }
  if (seen <= task.enough) return;

  // 3. the first keys on their way, queries in place
  const int end_tile = min(last_tile, (seen + kTile - 1) / kTile);
  const int tiles = max(end_tile - first_tile - warpgroup + warpgroups - 1, 0) / warpgroups;  // of this warpgroup
#pragma unroll
  for (int i = 0; i < kStages<kPaired>; ++i) {
    const int tile = first_tile + warpgroup + i * warpgroups;
    if (i < tiles) {
      copy_keys<kForm>(reader, places[i], tile, seen, own_half, stages + i * SharedMap<kForm>::kStageBytes);
    }
    ptx::cp_async_commit();
  }
  for (int first = threadIdx.x; first < query_parts; first += kBatch * blockDim.x) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * blockDim.x;
      if (index < query_parts) store_query<kForm>(queries, all_rows, index, batch[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + (kBatch + i) * blockDim.x;
      if (index < query_parts) batch[i] = load_query<kForm>(in, token, rows, index);
    }
  }
  for (int i = threadIdx.x; i < all_rows * kHeads; i += blockDim.x) {
    weights[i] = i < rows * kHeads ? in.w[(token + i / kHeads) * in.w_stride + i % kHeads] : 0.0f;
  }
  if (threadIdx.x < all_rows) {
    const bool exists = threadIdx.x < rows;
    seen_by[threadIdx.x] = exists ? visible_entries(positions[threadIdx.x], in.ratio, task.capacity) : 0;
  }
  ptx::fence_async_proxy();
  __syncthreads();

  // 4. tiles
  const uint64_t first_queries = ptx::wgmma_descriptor(ptx::shared_address(queries), 16, 1024, true);
  const uint64_t panel = all_rows * kHeads * 128 / 16;
  const int64_t sink_row = token - task.first_token;
  int tile = first_tile + warpgroup, stage = 0;
  KeyPlaces next = reader.find(tile + kStages<kPaired> * warpgroups);
  for (int i = 0; i < tiles; ++i, tile += warpgroups) {
    KeyOperand<kForm> keys;
    uint8_t* const own_stage = stages + stage * SharedMap<kForm>::kStageBytes;
    ptx::cp_async_wait<kStages<kPaired> - 1>();
    keys.load(own_stage, part);
    if (i + kStages<kPaired> < tiles) {
      copy_keys<kForm>(reader, next, tile + kStages<kPaired> * warpgroups, seen, own_half, own_stage);
      next = reader.find(tile + (kStages<kPaired> + 1) * warpgroups);
    }
    ptx::cp_async_commit();
    stage = stage + 1 == kStages<kPaired> ? 0 : stage + 1;
    const int entry = tile * kTile + row + 8 * own_half;
    for (int first = 0; first < all_rows; first += kN / kHeads) {
      float acc[kN / 2];
      multiply<kForm, kN>(acc, keys, first_queries + first * (kHeads * 128 / 16), panel);
      float2 sums = sum_heads<0>(acc, weights + first * kHeads, part);
      int own_row = first;
      float score;
      if constexpr (kPaired) {
        const float2 others = sum_heads<kHeads / 2>(acc, weights + (first + 1) * kHeads, part);
        const bool second = part % 2;
        sums = {exchange(sums.x, others.x, second, 1), exchange(sums.y, others.y, second, 1)};
        score = exchange(sums.x, sums.y, own_half, 2);
        own_row += second;
      } else {
        score = exchange(sums.x, sums.y, own_half, 1);
        score += __shfl_xor_sync(kAllLanes, score, 2);
      }
      const bool exists = own_row < rows && (kPaired || part < 2);
      const bool sees = entry < seen_by[own_row];
      uint32_t key = 0;
      if (exists) key = put_score(sink, sink_row + own_row, entry, task.capacity, score * keys.scale, sees);
      if (sink.maxima != nullptr) {
        // Lanes of one row: in a pair those that agree in bit 0.
#pragma unroll
        for (int distance = kPaired ? 2 : 1; distance < kWarp; distance *= 2) {
          key = max(key, __shfl_xor_sync(kAllLanes, key, distance));
        }
        if (exists && lane < kN / kHeads) {
          sink.maxima[(sink_row + own_row) * (sink.stride / kGroup) + tile * (kTile / kGroup) + row / kGroup] = key;
        }
      }
    }
  }

  // 5. entries that no row sees
  if (sink.scores == nullptr) return;
  const int begin = max(end_tile, first_tile) * kTile, end = min(last_tile * kTile, task.capacity);
  for (int i = 0; i < rows; ++i) {
    for (int entry = begin + threadIdx.x; entry < end; entry += blockDim.x) {
      sink.scores[(sink_row + i) * sink.stride + entry] = kUnseen;
    }
  }
#else
  ptx::wait_for_predecessors();
#endif
}

// What a multiprocessor is thought to need, in cycles, when it has `resident` CTAs of `warpgroups` at a time.
struct Costs {
  int warpgroups;
  int resident;
  double tile;       // a tile, where enough of them are under way
  double lone_tile;  // a tile, where the multiprocessor has one CTA
  int most_tiles;    // of a slice: more would leave multiprocessors idle at the end
};

// Into how many slices the tiles of a block are cut: the number that is done first by that account.
int slices_of(int blocks, int tiles, const Costs& costs) {
  constexpr double kPrologue = 3000;
  constexpr int kMostSlices = 4096;
  double best = 0;
  int slices = 1;
  for (int candidate = 1; candidate <= std::min(tiles, kMostSlices); ++candidate) {
    const int tiles_of_slice = (tiles + candidate - 1) / candidate;
    if ((candidate - 1) * tiles_of_slice >= tiles) continue;  // the last slice would be empty
    if (tiles_of_slice > costs.most_tiles && candidate < std::min(tiles, kMostSlices)) continue;
    const double ctas_of_each = static_cast<double>(blocks) * candidate / kMultiprocessors;
    const double rounds = std::ceil(ctas_of_each);
    const double together = std::min<double>(costs.resident, std::max(1.0, ctas_of_each));
    const double busy = std::min(1.0, (tiles_of_slice + 1.0) / (costs.warpgroups + 1.0));
    const double cycles = std::max(costs.tile, costs.lone_tile / (together * busy));
    const double total = std::max(1.0, rounds / costs.resident) * kPrologue + rounds * tiles_of_slice * cycles;
    if (best == 0 || total < best * 0.99) {
      best = total;
      slices = candidate;
    }
  }
  return slices;
}

template <IndexForm kForm, bool kPaired>
Costs costs_of(int rows) {
  constexpr bool kFp4 = kForm == IndexForm::kFp4;
  if (kPaired) {
    const double products = (rows + 1) / 2 * (kFp4 ? 600.0 : 320.0);  // 64 keys x 128 columns each
    return {4, 1, products, products, INT32_MAX};
  }
  return {2, 2, kFp4 ? 330.0 : 420.0, 900.0, 64};  // unpacking in FP4; in FP8 bytes at the memory's speed
}

template <IndexForm kForm, bool kPaired>
cudaError_t launch(const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink, cudaStream_t stream) {
  const Costs costs = costs_of<kForm, kPaired>(task.rows);
  task.slices = slices_of(task.blocks, task.tiles, costs);
  const int warpgroups = std::min(costs.warpgroups, (task.tiles + task.slices - 1) / task.slices);
  const int all_rows = kPaired ? (task.rows + 1) / 2 * 2 : 1;
  const auto shared = static_cast<size_t>(SharedMap<kForm>::bytes(all_rows, warpgroups, kStages<kPaired>));
  const Launch at{dim3(static_cast<unsigned>(static_cast<int64_t>(task.blocks) * task.slices)),
                  dim3(warpgroups * kWarpgroup), stream, shared};
  return launch_kernel(index_scores_tensor_kernel<kForm, kPaired>, at, scoring, task, sink,
                       make_divisor(scoring.keys.page_size));
}

bool is_multiple(const void* pointer, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride % bytes == 0;
}

}  // namespace

bool fits_tensor_cores(IndexForm form, const IndexScoring& scoring) {
  if (form == IndexForm::kPlain || scoring.heads != kHeads || scoring.dim != kDim) return false;
  if (!is_multiple(scoring.q, scoring.q_stride, 16)) return false;
  if (!is_multiple(scoring.keys.data, scoring.keys.page_stride, 16)) return false;
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  return major == 9;
}

int rows_of_tensor_block(IndexForm form, int tokens) {
  return std::min(tokens, form == IndexForm::kFp8 ? Format<IndexForm::kFp8>::kMostRows
                                                  : Format<IndexForm::kFp4>::kMostRows);
}

cudaError_t launch_scores_tensor(IndexForm form, const IndexScoring& scoring, ScoreTask task, const ScoreSink& sink,
                                 cudaStream_t stream) {
  if (form == IndexForm::kFp8) {
    return task.rows == 1 ? launch<IndexForm::kFp8, false>(scoring, task, sink, stream)
                          : launch<IndexForm::kFp8, true>(scoring, task, sink, stream);
  }
  return task.rows == 1 ? launch<IndexForm::kFp4, false>(scoring, task, sink, stream)
                        : launch<IndexForm::kFp4, true>(scoring, task, sink, stream);
}

}  // namespace dsv4
