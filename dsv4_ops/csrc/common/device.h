// What a launcher asks about the current GPU.
#pragma once

#include <cuda_runtime_api.h>

namespace dsv4 {

// Compute capability 9.0: kernels of sm_90a, with wgmma, run.
inline bool on_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

}  // namespace dsv4
