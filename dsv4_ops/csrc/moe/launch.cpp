// Who serves a call: see moe.h.
#include "moe/moe.h"

namespace dsv4 {

cudaError_t launch_moe(const Moe& moe, cudaStream_t stream) {
  if (moe.tokens == 0 || moe.d == 0) return cudaSuccess;
  if (has_wide_rows(moe) && prefill_serves(moe)) return launch_moe_prefill(moe, stream);
  cudaError_t status = cudaSuccess;
  if (moe.k > 0 && moe.inner > 0) {
    status = has_wide_rows(moe) ? launch_moe_decode(moe, stream) : launch_moe_plain(moe, stream);
  }
  return status != cudaSuccess ? status : launch_moe_combine(moe, stream);
}

}  // namespace dsv4
