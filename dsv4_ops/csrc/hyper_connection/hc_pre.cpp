// The launches of an op that computes `pre`: two, or three where hc_post cannot be part of the first.
#include "hyper_connection/hyper_connection.h"

namespace dsv4 {

cudaError_t launch_hc_pre(const Streams& x, const Post* post, const MixWeights& weights, float* workspace,
                          const Collapsed& out, cudaStream_t stream) {
  Streams mixed = x;
  if (post != nullptr) {
    mixed.data = post->streams;
    mixed.stride = x.width;
  }
  const bool post_inside = post != nullptr && x.streams == 4 && reads_vectors(x.width) && !mixes_many(x);
  if (post != nullptr && !post_inside) {
    const cudaError_t status = launch_hc_post(x, *post, stream);
    if (status != cudaSuccess) return status;
  }
  const cudaError_t status =
      launch_hc_mix(post_inside ? x : mixed, post_inside ? post : nullptr, weights, workspace, stream);
  if (status != cudaSuccess) return status;
  return launch_hc_collapse(mixed, weights, workspace, out, stream);
}

}  // namespace dsv4
