// Keys of a chunk of many rows, unpacked once: every entry that the chunk's block tables reach, from its packed form to
// bf16 in workspace, which sparse_attention_wide.cu then copies to its tiles. A row of a prefill sees hundreds of keys
// and shares most of them with other rows: unpacking a tile takes longer than multiplying it.
//
// A warp takes an entry at a time, four under way. Lane l < 28 has 16 codes of group l / 4, the others 16 rope
// dimensions each, which are split into pairs as tile.cuh wants them; either is 32 bytes of what is written.
//
// Block tables may hold anything where a sequence has no page yet. Pages that the pool has not are skipped: nobody
// reads what is not written.
//
// Bounded by memory: 584 bytes read and 1024 written an entry.
#include "attention/attention.h"
#include "attention/keys.cuh"
#include "attention/tile.cuh"
#include "attention/unpacked.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kAtOnce = 4;  // entries of a warp
constexpr int kBlockEntries = kWarps * kAtOnce;
constexpr int kCodeLanes = kNope / 16;
static_assert(kCodeLanes + kRopeDim / 16 == kWarp);

// What a lane has of an entry.
struct Piece {
  bool exists = false;
  uint4 first, second;  // sixteen codes, or sixteen rope dimensions
  uint32_t scale;       // byte of the group

  __device__ __forceinline__ void load(const SparseAttention& attention, uint32_t sequence, int entry, int lane) {
    const KeySources& keys = attention.keys;
    const int ring = ring_entries(keys);
    const bool window = entry < ring;
    const Pool& pool = window ? keys.window_pool : keys.compressed_pool;
    const int in_pool = window ? entry : entry - ring;
    const int place = divide(in_pool, window ? keys.window_page : keys.compressed_page);
    const int slot = in_pool - place * pool.page_size;
    const int page = pool.table[sequence * pool.table_stride + place];
    exists = page >= 0 && page < (window ? attention.unpacked.window_pages : attention.unpacked.compressed_pages);
    if (!exists) return;
    const uint8_t* const at = pool.data + page * pool.page_stride;
    const uint8_t* const data = at + static_cast<int64_t>(slot) * kEntryBytes;
    const bool rope = lane >= kCodeLanes;
    first = ptx::load_once(data + (rope ? kNope + (lane - kCodeLanes) * 32 : lane * 16));
    if (rope) second = ptx::load_once(data + kNope + (lane - kCodeLanes) * 32 + 16);
    scale = at[static_cast<int64_t>(pool.page_size) * kEntryBytes + slot * kScaleBytes + lane / 4];
  }

  __device__ __forceinline__ void store(uint8_t* to, int lane) {
    if (!exists) return;
    if (lane < kCodeLanes) {
      const uint4 codes = first;
      unpack_e4m3(codes, first_factor(min(scale, kLargestScale)), first, second);
      if (scale > kLargestScale) {
        multiply_chunk(first, second_factor(scale));
        multiply_chunk(second, second_factor(scale));
      }
    } else {
      split_pairs(first, second);
    }
    ptx::store(to + lane * 32, first);
    ptx::store(to + lane * 32 + 16, second);
  }
};

__global__ void __launch_bounds__(kWarps* kWarp) unpack_keys_kernel(const __grid_constant__ SparseAttention attention,
                                                                   uint32_t batch) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t lane = threadIdx.x % kWarp, entries = entries_of_sequence(attention.keys);
  const uint32_t begin = blockIdx.x * kBlockEntries + threadIdx.x / kWarp * kAtOnce;
  uint8_t* const unpacked = attention.unpacked.entries;
  if (blockIdx.x == 0 && threadIdx.x < kUnpackedBytes / 16) {
    ptx::store(unpacked + kAbsentEntry * kUnpackedBytes + threadIdx.x * 16, uint4{0, 0, 0, 0});
  }
  Piece pieces[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const uint32_t number = begin + i;
    if (number < batch * entries) pieces[i].load(attention, number / entries, number % entries, lane);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    pieces[i].store(unpacked + (kFirstEntry + int64_t{begin} + i) * kUnpackedBytes, lane);
  }
}

int64_t all_entries(const SparseAttention& attention) {
  return attention.rows / attention.rope.tokens * entries_of_sequence(attention.keys);
}

}  // namespace

int64_t unpacked_floats(const SparseAttention& attention) {
  return (kFirstEntry + all_entries(attention)) * (kUnpackedBytes / 4);
}

cudaError_t launch_unpack_keys(const SparseAttention& attention, cudaStream_t stream) {
  const int64_t blocks = (all_entries(attention) + kBlockEntries - 1) / kBlockEntries;
  const Launch at{dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarp), stream};
  return launch_kernel(unpack_keys_kernel, at, attention,
                       static_cast<uint32_t>(attention.rows / attention.rope.tokens));
}

}  // namespace dsv4
