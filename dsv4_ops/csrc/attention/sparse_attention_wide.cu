// Sparse attention of sparse_attention.cu for tiles of 64 heads: large batches and prefill. Another division of labour:
// two warpgroups share the keys, which two of 32 heads each would read twice.
//
// Sequences of up to 8 rows have the bits of sparse_attention.cu: units are added by an FMA each. With more rows the
// tensor cores add them to the output that is there, relative to a reference that rises with the largest score.
//
// A CTA owns 64 heads of one row at a time and goes from row to row. 512 threads, one CTA an SM:
//
//   warpgroups 0, 1  scores and weights of every other unit for all heads (wide_consumer.cuh), and the output of 256 of
//                    the 512 dimensions for all units: 128 registers
//   warpgroups 2, 3  producers (wide_producer.cuh): keys from the packed pages, ahead by what is free, into the next
//                    row too; where those lie is looked up further ahead (wide_keys.cuh)
//
// Heads lie on the outer dimension of both products here (wgmma m64n64k16: scores = Q . K^T; m64n128k16: output =
// weights . K with the weights from registers), so rope dimensions stand as they are: a thread has both of a pair. The
// two warpgroups fall out of step by themselves, since the second tile is full later than the first: one multiplies
// while the other one takes its softmax.
//
//   warpgroup 0   scores 0 | weights 0 | output 0, left  | output 1, left
//   warpgroup 1     scores 1 | weights 1 | output 0, right | output 1, right
//
// A tile is handed over and back by quarters: one goes back to its producers as soon as its output is added, and scores
// start with the first while the others are on their way. The queries of the next row are copied while the last unit is
// added.
//
// Shared memory, 226 KB: two tiles of keys 2 x 64 KB; queries 64 KB; of two units weights 8 KB and totals 2 KB each;
// staged output 8 KB; keys that producers have looked up 6 KB.
//
// Cost of a unit in cycles of an SM:
//
//   keys from memory   37 KB: 1870 at 20 bytes a cycle in decode; rows of a prefill share most of them in L2
//   issue slots        of each SM quarter: unpacking 700, softmax and exchange 250, output sums 256
//   shared memory      write K 512, scores read K and Q 1024, output reads K 512, exchange of weights 128: 2180
//   tensor cores       2048, the floor
//
// What it takes (H100 at 1980 MHz, 2026-11-25, 4096 rows of 64 heads and 640 keys, 468 TFLOP/s; 128 heads and 1152 keys
// 510): by these two times 3800 cycles a unit and 9000 more a row. Clocks read in a CTA before codes went through L1: a
// row's store takes 4200 cycles, in which no product runs, and nothing overlaps a row's first scores; of the time of a
// pair a warpgroup waits more than a third for keys and weights, and producers more than a quarter for tiles. A tile
// comes back late because warpgroup 1 adds unit 0 after its own softmax, and a third tile has no room beside 64 KB of
// queries. Consumers alone, with tiles that are always full, reach 606 and 699 TFLOP/s.
//
// Tried on the same GPU, us of these two cases (735 and 2423 as it is), in this order, each with what the ones before
// it had shown. Writers pass the proxy fence 984 and 3257, readers 962 and 3055. Keys looked up by loads into
// registers: eight producing warps, which then spill, 1015 and 3193, four with twice the keys each 910 and 2835; by
// copies 840 and 2646; queries at an mbarrier and stores one step late 809 and 2567; products of 128 columns 806 and
// 2542; whole lines stored 805 and 2537. Warpgroup 1 adds unit 0 before its own scores 921 and 2925, or between scores
// and softmax, with weights read by wgmma from shared memory for want of registers, 862 and 2682; queries copied after
// the first keys 803 and 2530, and 2 % longer in decode. Codes past L1 (ld.global.L1::no_allocate) 808 and 2555,
// through it 735 and 2423. Decode of 128 rows of 64 heads and 640 keys takes 32.9 us with codes first to leave L1, 37.1
// with codes that stay, 35.0 past L1.
#include <algorithm>

#include "attention/wide_roles.cuh"

namespace dsv4 {
namespace {

using namespace wide;

constexpr int kMostApart = 8;  // rows of a sequence whose bits are those of a row alone: decode, speculation

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Queries in bf16, copied as they are.
struct Queries {
  __device__ __forceinline__ static void copy(const SparseAttention& attention, uint32_t row, int first_head,
                                              SharedMemory& memory) {
    const int64_t vector = static_cast<int64_t>(row) * attention.heads + first_head;
    const auto* const q = static_cast<const __nv_bfloat16*>(attention.q) + vector * attention.q_stride;
    const int heads = attention.heads - first_head, column = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kHeads; i += kConsumers / 8) {
      const int head = threadIdx.x / 8 + i;
      const __nv_bfloat16* const from = q + min(head, heads - 1) * attention.q_stride + column * 8;
      uint8_t* const to = memory.query + chunk_offset(head, column);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        ptx::cp_async_16(to + slab * kSlabBytes, from + slab * kSlab, head < heads ? 16 : 0);
      }
    }
    ptx::cp_async_arrive(memory.hand_overs.queries());
  }
  __device__ __forceinline__ void finish(const SparseAttention&, uint32_t, int, SharedMemory&) const {}

  __device__ __forceinline__ void multiply(const SharedMemory& memory, int stage, uint32_t parity,
                                           float (&scores)[32]) const {
    multiply_slabs<0, kSlabs>(memory, stage, parity, scores);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <Fold kFold, bool kQuantised>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_attention_wide_kernel(const __grid_constant__ SparseAttention attention) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  attend_rows<kFold, kQuantised, Queries>(attention, attention);
#else
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
#endif
}

template <Fold kFold>
cudaError_t launch(const SparseAttention& attention, const Launch& at) {
  return launch_kernel(attention.o_scale == nullptr ? sparse_attention_wide_kernel<kFold, false>
                                                    : sparse_attention_wide_kernel<kFold, true>,
                       at, attention);
}

}  // namespace

cudaError_t launch_sparse_attention_wide(const SparseAttention& attention, int processors, cudaStream_t stream) {
  const int64_t tiles = attention.rows * ((attention.heads + kHeads - 1) / kHeads);
  const Launch at{dim3(std::min<int64_t>(tiles, processors)), dim3(kThreads), stream, sizeof(SharedMemory)};
  return attention.rope.tokens > kMostApart ? launch<Fold::kRunning>(attention, at)
                                            : launch<Fold::kApart>(attention, at);
}

}  // namespace dsv4
