// Which kernels a product takes: by its format, its widths and how its operands lie.
#include <algorithm>

#include "gemm/plan.h"

namespace dsv4 {
namespace {

cudaError_t launch_stream(Format format, const Product& product, int64_t first_token, int tokens,
                          cudaStream_t stream) {
  switch (format) {
    case Format::kDense: return launch_stream_dense(product, first_token, tokens, stream);
    case Format::kFp8: return launch_stream_fp8(product, first_token, tokens, stream);
    case Format::kMxfp4: return launch_stream_mxfp4(product, first_token, tokens, stream);
    case Format::kW8a16: return launch_stream_w8a16(product, first_token, tokens, stream);
    default: return launch_stream_nvfp4(product, first_token, tokens, stream);
  }
}

}  // namespace

int64_t partial_floats(Format format, const Product& product) {
  const int ranges = ranges_of(format, product);
  if (!can_stream(format, product) || !splits_ranges(product.tokens, ranges)) return 0;
  const int64_t tokens = std::min<int64_t>(product.tokens, kTokensAtOnce);
  return ranges * tokens * product.groups * product.rows;
}

cudaError_t launch_linear(Format format, const Product& product, cudaStream_t stream) {
  if (!can_stream(format, product)) return launch_linear_plain(format, product, stream);
  const int ranges = ranges_of(format, product);
  for (int64_t first = 0; first < product.tokens; first += kTokensAtOnce) {
    const int tokens = static_cast<int>(std::min<int64_t>(product.tokens - first, kTokensAtOnce));
    cudaError_t status = launch_stream(format, product, first, tokens, stream);
    if (status == cudaSuccess && splits_ranges(tokens, ranges)) {
      status = launch_add_ranges(format, product, first, tokens, ranges, stream);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace dsv4
