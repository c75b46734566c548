// Launchers of the family `attention`; shapes and dtypes are those of dsv4_ops/ops/attention.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/pool.h"
#include "common/rope.h"
#include "common/types.h"

namespace dsv4 {

// n / divisor for 0 <= n < 2^31 as a product: n * multiplier >> shift with multiplier = ceil(2^shift / divisor) and
// shift = 31 + ceil(log2(divisor)); the multiplier exceeds the true one by less than 2^-31 of it.
struct PageDivisor {
  uint32_t multiplier;
  int shift;
};

// The keys that rows may see. Without compressed entries k and ratio are 0.
struct KeySources {
  Pool window_pool;
  Pool compressed_pool;
  PageDivisor window_page;  // page_size of the pools
  PageDivisor compressed_page;
  int window;
  const int32_t* indices;  // [B, S, k] or null
  int64_t indices_stride;  // elements from one row to the next
  int k;
  int ratio;  // all complete entries: positions of an entry; else 0
};

struct SparseAttention {
  const void* q;     // [B, S, H, D]
  Dtype dtype;       // of q and o
  int64_t q_stride;  // elements from one head to the next, and H times that from one row to the next
  int64_t rows;      // B * S
  int heads;
  int dim;
  const float* sink;  // [H]
  Rope rope;          // rope.tokens is S
  KeySources keys;
  void* o;           // [B, S, H, D], or E4M3 codes of it where o_scale is given
  float* lse;        // [B, S, H]
  float* partials;   // null, or room for partial_floats(...) of them
  uint8_t* o_scale;  // null, or [B, S, H, D / kScaleGroup] UE8M0
};

constexpr int kScaleGroup = 128;  // dimensions of a head's output that share a scale
constexpr int kUnit = 64;         // keys whose softmax is taken together: what is added to a row's result in one step

// Keys that a row sees at most, from shapes alone.
inline int64_t key_capacity(const KeySources& keys) {
  const int64_t entries = static_cast<int64_t>(keys.compressed_pool.max_pages) * keys.compressed_pool.page_size;
  return keys.window + (keys.ratio > 0 ? entries : keys.k);
}

// Whether the tensor-core kernel of this GPU takes these operands; all others go to the plain kernel.
bool on_tensor_cores(const SparseAttention& attention);

// Floats of workspace with which few rows are computed by many CTAs; the results have the same bits without.
int64_t partial_floats(const SparseAttention& attention);

// On tensor cores, and its forms for few rows, which needs attention.partials, and with tiles of 64 heads, on a GPU of
// so many SMs.
cudaError_t launch_sparse_attention(const SparseAttention& attention, cudaStream_t stream);
cudaError_t launch_sparse_attention_split(const SparseAttention& attention, int processors, cudaStream_t stream);
cudaError_t launch_sparse_attention_wide(const SparseAttention& attention, int processors, cudaStream_t stream);

// Any form.
cudaError_t launch_sparse_attention_plain(const SparseAttention& attention, cudaStream_t stream);

}  // namespace dsv4
