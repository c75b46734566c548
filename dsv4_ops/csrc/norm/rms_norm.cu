// rms_norm: the kernels of norm/rms_norm_rows.cuh with nothing behind them.
#include "norm/norm.h"
#include "norm/rms_norm_rows.cuh"

namespace dsv4 {

cudaError_t launch_rms_norm(const void* x, Dtype dtype, Rows rows, const void* weight, Dtype weight_dtype, float eps,
                            void* y, cudaStream_t stream) {
  return launch_rms_norm_rows(x, dtype, rows, weight, weight_dtype, eps, y, NotQuantised{}, stream);
}

}  // namespace dsv4
