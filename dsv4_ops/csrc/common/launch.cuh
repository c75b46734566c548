// Launching with programmatic dependent launch, and choosing a template by the dtype of the activations.
//
// A kernel that is launched here may start before its predecessors have ended. It therefore
//   1. may first load parameters of the model (weights, scales, rope table: nothing that a kernel of the step writes),
//   2. calls ptx::wait_for_predecessors() in every thread that goes on, and in at least one thread of every CTA, before
//      it reads activations, state, positions or block tables, and before it writes anything at all,
//      Two exceptions: a position may be guessed before the wait (guess_position in rope.cuh), to choose what to
//      load; it is read again after the wait, and a wrong guess loads again. And the second kernel of an op may read
//      what no kernel of the op writes, after ptx::fence_gpu(): rule 3 lets it start only when all that was before the
//      first has finished.
//   3. calls ptx::launch_dependents() right after that,
// also where it has nothing to do: the next kernel's wait covers the kernels before this one only through this one's.
//
// Why not the other way round, the launch first: then the kernel after the next may start too, and the CTAs of the two
// that wait gather on the few SMs that are free when they come. H200, 2026-11-25, chains of one op, us a launch with
// the launch first and last: rms_norm_quant_nvfp4 of 128 rows of 7168 6.2 and 3.3, hc_post of 16 rows 2.1 and 1.3; what
// it costs is at most 0.25 us, in kernels that do next to nothing (csa_compress_append without an entry 0.98 and 1.17).
// What it reads after the wait it reads by plain loads or ptx::load_once: ptxas may move a load of data that it takes
// for constant (__ldg, ld.global.nc, a const __restrict__ parameter) above the wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>

#include "common/types.h"

namespace dsv4 {

struct Launch {
  dim3 grid;
  dim3 block;
  cudaStream_t stream;
  size_t shared_bytes = 0;  // dynamic shared memory
  unsigned cluster = 1;     // CTAs next to each other in y that run at the same time
};

// Launch `kernel`; an empty grid launches nothing. Legal during stream capture.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& at, Arguments... arguments) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return cudaSuccess;
  // Without this a kernel gets 48 KiB, its static shared memory included.
  if (at.shared_bytes > 0) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t status = cudaFuncSetAttribute(kernel, limit, static_cast<int>(at.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, at.cluster, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared_bytes;
  config.stream = at.stream;
  config.attrs = attributes;
  config.numAttrs = at.cluster == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// function(T{}) with T the element type of `dtype`.
template <typename Function>
cudaError_t with_dtype(Dtype dtype, Function function) {
  return dtype == Dtype::kBf16 ? function(__nv_bfloat16{}) : function(float{});
}

}  // namespace dsv4
