// Launcher of the family `compressor`; shapes and dtypes are those of dsv4_ops/ops/compressor.py.
#pragma once

#include <cuda_runtime_api.h>

#include "common/pool.h"
#include "common/rope.h"
#include "common/types.h"

namespace dsv4 {

// What an entry goes through after pool, norm and rope.
enum class EntryForm {
  kPlain,     // fp32 from end to end
  kKv,        // bf16 in front of norm, rope and quantiser; packed KV page
  kIndexFp8,  // bf16 likewise; Hadamard; E4M3 with an fp32 scale
  kIndexFp4,  // bf16 likewise; Hadamard; E2M1 with a UE8M0 scale per 32
};

constexpr int kCompressorMaxDim = 1024;    // D
constexpr int kCompressorMaxGrid = 65535;  // sequences, and slots of the state

// Operands of one call. width = halves * dim and slots = halves * ratio, where halves is 2 if groups overlap (CSA and
// index keys).
struct Compressor {
  float* state;        // [sequences, slots, 2, width]
  const float* kv;     // [sequences, rope.tokens, width]
  const float* score;  // likewise
  int kv_stride;       // elements from one token to the next
  int score_stride;
  const float* ape;         // [ratio, width]
  const void* norm_weight;  // [dim]
  Dtype norm_dtype;
  Rope rope;
  Pool pool;
  int sequences;
  int dim;
  int ratio;
  float eps;
};

// Up to 8 tokens a sequence: one launch. More: a second one that writes the state.
cudaError_t launch_compress_append(const Compressor& compressor, int halves, EntryForm form, cudaStream_t stream);

// One token a sequence, in groups of 4 that overlap: what `launch_compress_append` launches for the released models.
inline bool is_a_model_token(const Compressor& compressor, int halves, EntryForm form) {
  const bool shape = halves == 2 && compressor.ratio == 4 && compressor.rope.tokens == 1;
  return shape && form != EntryForm::kPlain && compressor.dim == (form == EntryForm::kKv ? 512 : 128);
}

cudaError_t launch_compress_token(const Compressor& compressor, EntryForm form, cudaStream_t stream);

}  // namespace dsv4
