// hc_post: x'_k = post_k f + sum_j comb_jk x_j, the streams after a sub-layer, with the roundings of torch.
//
// For n = 4 a thread owns 8 neighbouring columns of a token: it reads f and the four streams, 5 accesses of 16 bytes in
// bf16 that are all in flight at once, and the 20 weights of the token (from L1), and writes the four new streams, 16
// bytes each. Nothing is shared. Other n, and rows that are not whole vectors, take one thread a column.
//
// Floor: (2 n + 1) d elements a token at the speed of a copy; 53 instructions a column leave that the bound. 4096
// tokens of 7168: floor 122 us, measured 130 (H200, 2026-11-25); stores kept whole brought it from 133, and 128 tokens
// of 4096 from 3.9 to 2.8.
#include "common/launch.cuh"
#include "common/row_vectors.cuh"
#include "hyper_connection/streams.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kCtas = 7;  // of an SM, so that 128 tokens of 7168 are there at once

struct Arguments {
  const void* x;
  int64_t tokens;
  int streams;
  int width;
  int64_t stride;
  Post post;
};

// Vectors of all tokens number less than 2^31: the streams of one, read and written, are 128 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? kCtas : 1)
    hc_post_kernel(const Arguments at, const Divisor vectors) {
  constexpr int n = 4;
  const unsigned vector = blockIdx.x * kThreads + threadIdx.x;
  const int64_t token = vectors.quotient(vector);
  const unsigned column = (vector - static_cast<unsigned>(token) * vectors.value()) * kCount;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  if (token >= at.tokens) return;

  Columns<T> input, streams[n];  // old streams, then new ones
  float4 comb[n];
  input.load_once(static_cast<const T*>(at.post.f) + token * at.post.f_stride + column);
  const T* const source = static_cast<const T*>(at.x) + token * n * at.stride + column;
#pragma unroll
  for (int j = 0; j < n; ++j) streams[j].load_once(source + j * at.stride);
  const float4 post = reinterpret_cast<const float4*>(at.post.post)[token];
#pragma unroll
  for (int j = 0; j < n; ++j) comb[j] = reinterpret_cast<const float4*>(at.post.comb)[token * n + j];

  // A pair of columns at a time, each new pair in the place of the old one.
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const float2 f = input.pair(i);
    const float2 x[n] = {streams[0].pair(i), streams[1].pair(i), streams[2].pair(i), streams[3].pair(i)};
    const auto mix = [&](int k, float of_f, const float(&of_x)[n]) {
      streams[k].round_pair(i, {post_column(of_f, f.x, of_x, {x[0].x, x[1].x, x[2].x, x[3].x}),
                                post_column(of_f, f.y, of_x, {x[0].y, x[1].y, x[2].y, x[3].y})});
    };
    mix(0, post.x, {comb[0].x, comb[1].x, comb[2].x, comb[3].x});
    mix(1, post.y, {comb[0].y, comb[1].y, comb[2].y, comb[3].y});
    mix(2, post.z, {comb[0].z, comb[1].z, comb[2].z, comb[3].z});
    mix(3, post.w, {comb[0].w, comb[1].w, comb[2].w, comb[3].w});
  }
  T* const target = static_cast<T*>(at.post.streams) + token * n * at.width + column;
#pragma unroll
  for (int k = 0; k < n; ++k) streams[k].store(target + k * at.width);
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
    if (!vectors) return launch_kernel(hc_post_any_kernel<T>, at, arguments);
    return launch_kernel(hc_post_kernel<T>, at, arguments, Divisor(x.width / kCount));
  });
}

}  // namespace dsv4
