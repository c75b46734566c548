// Operands of the scoring kernel on the tensor cores (index_scores_tensor.cu): how queries come to shared memory and
// keys to registers, both in the kernel's order of k.
//
//   fp8   step s of 4 takes from a head, for t = 0 .. 3, the eight bytes from 64 * (s / 2) + 16 * t + 8 * (s % 2) on
//   fp4   step s of 8 takes from the group t the codes c, c + 4, c + 1, c + 5, with c = 8 * (s / 2) +
//         2 * (s % 2), as bf16
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/divisor.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "indexer/scoring.h"

namespace dsv4 {

constexpr int kHeads = 64;
constexpr int kDim = 128;
constexpr int kWarpgroup = 128;
constexpr int kMostRows = 8;

template <IndexForm kForm>
struct Format;

template <>
struct Format<IndexForm::kFp8> {
  static constexpr int kKeyBytes = 128;      // of a key in the pool
  static constexpr int kScaleBytes = 4;
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
  static constexpr int kPanels = 2;
  static constexpr int kSteps = 8;
  static constexpr int kParts = 2;
  static constexpr int kScales = 2;
  static constexpr int kMostRows = 4;
};

// Tiles of a warpgroup that are in place or on their way.
template <bool kPaired>
constexpr int kStages = kPaired ? 3 : 4;

// Of a CTA: as many as their registers allow. With one token a product, two CTAs share a multiprocessor.
template <IndexForm kForm, bool kPaired>
constexpr int kMostWarpgroups = !kPaired ? 2 : kForm == IndexForm::kFp8 ? 4 : 3;

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

// Of eight codes in `word`, the pair (code pair, code pair + 4) times `scale` as two bf16. A code's three bits are
// moved into the last exponent bits and the first mantissa bit of a bf16: that is its magnitude times 2^-126.
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

// Half a head on its way to shared memory: the channels of half the steps. Zero for a row that does not exist. Of the
// four parts (16 bytes of FP8, the halves of four groups of FP4) a chunk of 16 bytes of a line takes a word each, so a
// thread that has all four writes whole chunks.
template <IndexForm kForm>
struct QueryHalf {
  uint32_t words[4][kForm == IndexForm::kFp8 ? 4 : 2];
  uint32_t scales[kForm == IndexForm::kFp4 ? 4 : 1];

  // Number `index` of those of `rows` tokens from `token` on.
  __device__ __forceinline__ void load(const IndexScoring& in, int64_t token, int rows, int index) {
    const int half = index % 2, line = index / 2;
    const bool exists = line < rows * kHeads;
    const int64_t head = token * kHeads + line;
    const uint8_t* const q = in.q + head * in.q_stride + half * (kForm == IndexForm::kFp8 ? 64 : 8);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if constexpr (kForm == IndexForm::kFp8) {
        const uint4 four = exists ? *reinterpret_cast<const uint4*>(q + 16 * part) : uint4{};
        words[part][0] = four.x;
        words[part][1] = four.y;
        words[part][2] = four.z;
        words[part][3] = four.w;
      } else {
        const uint2 two = exists ? *reinterpret_cast<const uint2*>(q + 16 * part) : uint2{};
        words[part][0] = two.x;
        words[part][1] = two.y;
        scales[part] = exists ? in.scales[head * in.scales_stride + part] : 0;
      }
    }
  }

  __device__ __forceinline__ void store(uint8_t* queries, int all_rows, int index) const {
    const int half = index % 2, line = index / 2;
    const auto put = [&](uint8_t* panel, int chunk, uint4 four) {
      *reinterpret_cast<uint4*>(panel + line * 128 + (chunk ^ line % 8) * 16) = four;
    };
    if constexpr (kForm == IndexForm::kFp8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) put(queries, half * 4 + i, {words[0][i], words[1][i], words[2][i], words[3][i]});
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t four[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          four[part] = decode_pair(words[part][i / 4], i % 4, decode_scale(scales[part]));
        }
        put(queries + half * all_rows * kHeads * 128, i, {four[0], four[1], four[2], four[3]});
      }
    }
  }
};

// ---- weights and relu ----

// Twice relu, or relu: the first takes the pipe of additions, the second that of comparisons, which has half its rate.
// FP8 takes both in turn, the weights of the second sort doubled and sums halved at the end: exact. Products of FP8 are
// finite or NaN; with -inf, which FP4 may give, the first would be NaN.
template <IndexForm kForm>
constexpr bool kDoubles = kForm == IndexForm::kFp8;

template <IndexForm kForm, bool kOdd>
__device__ __forceinline__ float relu(float product) {
  return kDoubles<kForm> && !kOdd ? product + fabsf(product) : ptx::max_nan(product, 0.0f);
}

// A thread's 16 heads of a token lie together: those of part t = 0 .. 3 are 8 * i + 2 * t and the next, i = 0 .. 7.
template <IndexForm kForm>
__device__ __forceinline__ void store_weight(float* weights, int row, int head, float weight) {
  const bool odd = head % 2;
  weights[row * kHeads + head % 8 / 2 * 16 + head / 8 * 2 + odd] = kDoubles<kForm> && odd ? 2.0f * weight : weight;
}

// ---- keys ----

// The value, by way of a shuffle, behind which ptxas cannot look: it stays in a register instead of being computed anew
// for each tile.
__device__ __forceinline__ int keep(int value) { return __shfl_sync(kAllLanes, value, threadIdx.x % kWarp); }

__device__ __forceinline__ const uint8_t* keep(const uint8_t* address) {
  const auto bits = reinterpret_cast<uint64_t>(address);
  const uint64_t high = static_cast<uint32_t>(keep(static_cast<int>(bits >> 32)));
  return reinterpret_cast<const uint8_t*>(high << 32 | static_cast<uint32_t>(keep(static_cast<int>(bits))));
}

// How a thread copies its parts of a tile, of keys `row` and `row` + 8, to its slots of a stage. Find() reads the block
// table and may come long before copy().
//
// Pages of one tile, less than 2^32 bytes apart: every tile that a row sees is a page that exists, so nothing is looked
// at but the page's number.
template <IndexForm kForm>
struct TilePages {
  using F = Format<kForm>;
  using Places = uint32_t;  // the page

  const int32_t* table;  // of the sequence
  const uint8_t* keys;   // the thread's parts in page 0
  const uint8_t* scales;
  uint32_t page_stride;
  int tiles;  // of the capacity

  __device__ __forceinline__ TilePages(const IndexScoring& in, const Divisor&, int64_t sequence, int capacity, int row,
                                       int part, int scale_row)
      : table(in.keys.table + sequence * in.keys.table_stride),
        keys(keep(in.keys.data + row * F::kKeyBytes + 16 * part)),
        scales(keep(in.keys.data + kTile * F::kKeyBytes +
                    (kForm == IndexForm::kFp8 ? row + 8 * scale_row : row) * F::kScaleBytes)),
        page_stride(static_cast<uint32_t>(in.keys.page_stride)),
        tiles(capacity / kTile) {}

  // Not a plain load: those of the first stages shall be under way together, and nvcc would move them to their copies.
  __device__ __forceinline__ Places find(int tile) const {
    return tile < tiles ? static_cast<uint32_t>(ptx::load_relaxed(table + tile)) : 0;
  }

  __device__ __forceinline__ void copy(Places page, int, int, uint8_t* slot, uint8_t* scale_slot) const {
    const uint64_t offset = static_cast<uint64_t>(page) * page_stride;
#pragma unroll
    for (int i = 0; i < F::kParts; ++i) {
      const int half = i / (F::kParts / 2), part = i % (F::kParts / 2) * 4;
      ptx::cp_async_16(slot + i * kWarpgroup * 16, keys + offset + (half * 8 * F::kKeyBytes + 16 * part), 16);
    }
#pragma unroll
    for (int i = 0; i < F::kScales; ++i) {
      ptx::cp_async_4(scale_slot + i * kWarpgroup * 4, scales + offset + i * 8 * F::kScaleBytes, 4);
    }
  }
};

// Pages of any size.
template <IndexForm kForm>
struct AnyPages {
  using F = Format<kForm>;
  struct Places {  // of the two keys
    int32_t page[2];
    int slot[2];
  };

  const IndexScoring& in;
  const Divisor& page_size;
  const int32_t* table;
  int capacity, row, part, scale_row;

  __device__ __forceinline__ AnyPages(const IndexScoring& in, const Divisor& page_size, int64_t sequence, int capacity,
                                      int row, int part, int scale_row)
      : in(in),
        page_size(page_size),
        table(in.keys.table + sequence * in.keys.table_stride),
        capacity(capacity),
        row(row),
        part(part),
        scale_row(scale_row) {}

  __device__ __forceinline__ Places find(int tile) const {
    Places places;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int entry = min(tile * kTile + row + 8 * i, capacity - 1), page = page_size.divide(entry);
      places.slot[i] = entry - page * in.keys.page_size;
      places.page[i] = table[page];
    }
    return places;
  }

  // Zeros for entries from `seen` on.
  __device__ __forceinline__ void copy(const Places& places, int tile, int seen, uint8_t* slot,
                                       uint8_t* scale_slot) const {
    const uint8_t* keys[2];
    const uint8_t* scales[2];
    int bytes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = tile * kTile + row + 8 * i < seen;
      bytes[i] = exists ? 16 : 0;
      const uint8_t* const page = in.keys.data + (exists ? places.page[i] * in.keys.page_stride : 0);
      keys[i] = page + static_cast<int64_t>(places.slot[i]) * F::kKeyBytes + 16 * part;
      scales[i] = page + static_cast<int64_t>(in.keys.page_size) * F::kKeyBytes + places.slot[i] * F::kScaleBytes;
    }
#pragma unroll
    for (int i = 0; i < F::kParts; ++i) {
      const int half = i / (F::kParts / 2);
      ptx::cp_async_16(slot + i * kWarpgroup * 16, keys[half] + i % (F::kParts / 2) * 64, bytes[half]);
    }
    if constexpr (kForm == IndexForm::kFp8) {
      ptx::cp_async_4(scale_slot, scale_row ? scales[1] : scales[0], (scale_row ? bytes[1] : bytes[0]) / 4);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::cp_async_4(scale_slot + i * kWarpgroup * 4, scales[i], bytes[i] / 4);
    }
  }
};

// A thread's share of a tile as the first operand of all k steps, and the factor of its sums over heads.
template <IndexForm kForm>
struct KeyOperand {
  uint32_t values[Format<kForm>::kSteps][4];
  float scale;

  __device__ __forceinline__ void load(const uint8_t* slot, const uint8_t* scale_slot, int part) {
    using F = Format<kForm>;
    const auto* const parts = reinterpret_cast<const uint4*>(slot);
    const auto* const words = reinterpret_cast<const uint32_t*>(scale_slot);
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
      scale = __uint_as_float(words[0]) * (kDoubles<kForm> ? 0.5f : 1.0f);
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

}  // namespace dsv4
