// hc_post: x'_k = post_k f + sum_j comb_jk x_j, the streams after a sub-layer, with the roundings of torch.
//
// For n = 4 a thread owns 8 neighbouring columns of a token: it reads f and the four streams, 5 accesses of 16 bytes in
// bf16 that are all in flight at once, and the 20 weights of the token (from L1), and writes the four new streams. Nothing
// is shared. Other n, and rows that are not whole vectors, take one thread a column.
//
// Floor: (2 n + 1) d elements a token at the speed of a copy; 35 instructions a column leave that the bound.
#include "common/launch.cuh"
#include "hyper_connection/streams.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;

struct Arguments {
  const void* x;
  int64_t tokens;
  int streams;
  int width;
  int64_t stride;
  Post post;
};

// Vectors of all tokens fit in 32 bits: the streams of one are 64 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads) hc_post_kernel(const Arguments at) {
  constexpr int n = 4;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const unsigned vectors = at.width / kCount;
  const unsigned vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= at.tokens * vectors) return;
  const int64_t token = vector / vectors;
  const int column = vector % vectors * kCount;

  Columns<T> input, old[n];
  float4 comb[n];
  input.load_once(static_cast<const T*>(at.post.f) + token * at.post.f_stride + column);
  const T* const x = static_cast<const T*>(at.x) + token * n * at.stride + column;
#pragma unroll
  for (int j = 0; j < n; ++j) old[j].load_once(x + j * at.stride);
  const float4 post = reinterpret_cast<const float4*>(at.post.post)[token];
#pragma unroll
  for (int j = 0; j < n; ++j) comb[j] = reinterpret_cast<const float4*>(at.post.comb)[token * n + j];

  float f[kCount], values[n][kCount];
  input.to_floats(f);
#pragma unroll
  for (int j = 0; j < n; ++j) old[j].to_floats(values[j]);
  T* const streams = static_cast<T*>(at.post.streams) + token * n * at.width + column;
  const auto store = [&](int k, float of_f, const float(&of_x)[n]) {
    float result[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      result[i] = post_column(of_f, f[i], of_x, {values[0][i], values[1][i], values[2][i], values[3][i]});
    }
    store_floats(streams + k * at.width, result);
  };
  store(0, post.x, {comb[0].x, comb[1].x, comb[2].x, comb[3].x});
  store(1, post.y, {comb[0].y, comb[1].y, comb[2].y, comb[3].y});
  store(2, post.z, {comb[0].z, comb[1].z, comb[2].z, comb[3].z});
  store(3, post.w, {comb[0].w, comb[1].w, comb[2].w, comb[3].w});
}

template <typename T>
__global__ void __launch_bounds__(kThreads) hc_post_any_kernel(const Arguments at) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int n = at.streams;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= at.tokens * at.width) return;
  const int64_t token = index / at.width;
  const int column = static_cast<int>(index % at.width);
  const float f = to_float(static_cast<const T*>(at.post.f)[token * at.post.f_stride + column]);
  float x[kMaxStreams];
#pragma unroll
  for (int j = 0; j < kMaxStreams; ++j) {
    x[j] = j < n ? to_float(static_cast<const T*>(at.x)[(token * n + j) * at.stride + column]) : 0.0f;
  }
  for (int k = 0; k < n; ++k) {
    const float* const comb = at.post.comb + token * n * n + k;
    float mixed = first_weighted(comb[0], x[0]);
#pragma unroll
    for (int j = 1; j < kMaxStreams; ++j) {
      if (j < n) mixed = add_weighted(mixed, comb[j * n], x[j]);
    }
    const float sum = __fadd_rn(__fmul_rn(at.post.post[token * n + k], f), mixed);
    static_cast<T*>(at.post.streams)[(token * n + k) * at.width + column] = from_float<T>(sum);
  }
}

}  // namespace

cudaError_t launch_hc_post(const Streams& x, const Post& post, cudaStream_t stream) {
  const bool vectors = x.streams == 4 && reads_vectors(x.width);
  const int64_t threads = x.tokens * (vectors ? x.width / kCount : x.width);
  const Launch at{dim3((threads + kThreads - 1) / kThreads), dim3(kThreads), stream};
  const Arguments arguments{x.data, x.tokens, x.streams, x.width, x.stride, post};
  return with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(vectors ? hc_post_kernel<T> : hc_post_any_kernel<T>, at, arguments);
  });
}

}  // namespace dsv4
