// Products for many tokens on Hopper (sm_90a): the experts of `moe`, and FP4 linears, one expert for all rows.
//
// The pairs (token, slot) are sorted by expert, every expert's to a multiple of 16 rows, and its rows are cut into
// blocks of up to 128, which meet all rows of its weights:
//
//   sort      where each pair goes, and the list of blocks (prefill_sort.cu)
//   spread    x of every pair in bf16, exact, in panels; for MXFP4 experts in E4M3, as it came (prefill_spread.cu)
//   gate_up   h = swiglu(w1 x, w3 x) of every row, in FP8 formats quantised to E4M3 and, but for MXFP4 experts, back
//             (prefill_<format>.cu)
//   requant   NVFP4: h quantised with a global scale of its row, and back (prefill_requant.cu)
//   down      results = w2 h, scattered to their pairs (prefill_<format>.cu)
//   combine   the sum over the slots (launch_moe_combine)
//
// Panels: a matrix [rows, k] of bf16 lies as [k / 64][rows][64], so that 64 columns of a block's rows are one piece
// that a bulk copy brings, as wgmma wants them: the 16-byte chunk c of row r lies at place c ^ (r % 8), and columns
// stand in the order in which threads find weights in packed words (order.cuh). Of MXFP4 experts a panel has 128
// columns in E4M3, [k / 128][rows][128], and behind the panels lie the scales of their rows in fp32, [k / 128][rows].
// Linears with MXFP4 weights, whose sums are exact, have panels of bf16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "moe/moe.h"

namespace dsv4 {

constexpr int kPrefillGrain = 16;      // rows: an expert's are a multiple of it, and so is the size of a block
constexpr int kPrefillBlock = 128;     // rows of the largest block

// Rows of one expert that a CTA multiplies at a time.
struct PrefillBlock {
  int expert, first_row, rows, unused;
};

// The sorted rows. capacity: for any choice of experts.
struct PrefillRows {
  int64_t capacity;
  int* row_of_pair;      // [pairs], -1: no such expert
  int* pair_of_row;      // [capacity], -1: empty; null: the row itself
  float* route;          // [capacity]
  float* factor;         // [capacity], global scale of x
  PrefillBlock* blocks;  // [most_blocks]; null: one expert has all rows
  int* counts;           // blocks, rows
  int64_t most_blocks;
};

// Two matrices that a CTA multiplies with the same rows: w1 and w3, or two halves of the rows of one.
struct PrefillProduct {
  const uint8_t* panels;        // of all `capacity` rows: x, or h
  PrefillRows rows;
  int64_t used_rows;            // where pair_of_row is null
  const void* weight[2];        // [experts, out, k]
  const void* scale[2];
  const float* global[2];       // NVFP4
  int64_t weight_pitch, scale_pitch;    // bytes from row to row of one expert
  int64_t weight_expert, scale_expert;  // bytes from expert to expert
  const float* row_factor;      // NVFP4: global scale of each row; null: 1
  int64_t row_factor_stride;    // 0: one for all rows
  int k, out;                   // columns and rows of a weight
  float limit;                  // gate_up
  uint8_t* h;                   // gate_up: panels of `capacity` rows
  void* results;                // down: [pairs, out] bf16
};

enum class PrefillStep { kGateUp, kDown };

// prefill_<format>.cu
cudaError_t launch_prefill_dense(PrefillStep step, const PrefillProduct& product, cudaStream_t stream);
cudaError_t launch_prefill_fp8(PrefillStep step, const PrefillProduct& product, cudaStream_t stream);
cudaError_t launch_prefill_folded(PrefillStep step, const PrefillProduct& product, cudaStream_t stream);
cudaError_t launch_prefill_nvfp4(PrefillStep step, const PrefillProduct& product, cudaStream_t stream);
cudaError_t launch_prefill_mxfp4(const PrefillProduct& product, cudaStream_t stream);  // down, of linears

cudaError_t launch_prefill_sort(const Moe& moe, const PrefillRows& rows, cudaStream_t stream);

// x of `tokens` rows as they come in, and where they go: token t to the rows row_of_pair[t * k ..], or, where that is
// null, to row t.
struct PrefillSpread {
  MoeFormat format;
  const void* x;
  int64_t x_stride;  // bytes
  const void* x_scale;
  int64_t x_scale_stride;
  int x_group;
  int64_t tokens;
  int k, columns;
  const int* row_of_pair;
  uint8_t* panels;
  int64_t capacity;
};

cudaError_t launch_prefill_spread(const PrefillSpread& spread, cudaStream_t stream);

// Panels h [columns / 64][capacity][64] quantised to NVFP4 and back in place; the global scale of each row to `factor`.
cudaError_t launch_prefill_requant(uint8_t* h, float* factor, const PrefillRows& rows, int columns,
                                   cudaStream_t stream);

// Bytes of workspace of a prefill, as dsv4_ops/ops/moe_workspace.py computes them.
int64_t prefill_workspace_size(int64_t pairs, int64_t experts, int64_t d, int64_t inner);

// y [tokens, out] bf16 = x @ weight^T for FP4 weights, for many tokens.
struct LinearPrefill {
  MoeFormat format;  // kMxfp4 (x FP8) or kNvfp4 (x NVFP4)
  const void* x;
  int64_t x_stride;  // bytes, as all strides
  const void* x_scale;
  int64_t x_scale_stride;
  int x_group;              // MXFP4: of x
  const float* x_global;    // NVFP4
  int64_t x_global_stride;  // in floats; 0: one for all rows
  int64_t tokens;
  int k, out;
  const void* weight;  // [out, k / 2]
  int64_t weight_pitch;
  const void* weight_scale;
  int64_t scale_pitch;
  const float* weight_global;  // NVFP4: one
  void* y;                     // [tokens, out], contiguous
  uint8_t* workspace;          // linear_prefill_workspace_size bytes, at a multiple of 16
};

// Whether launch_linear_fp4_prefill takes it: on Hopper, more than 64 tokens, widths that are multiples of 128, rows
// that start at multiples of 16 bytes.
bool linear_prefill_serves(const LinearPrefill& linear);
int64_t linear_prefill_workspace_size(int64_t tokens, int64_t k);
cudaError_t launch_linear_fp4_prefill(const LinearPrefill& linear, cudaStream_t stream);

}  // namespace dsv4
