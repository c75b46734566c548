// swiglu: the kernel of norm/swiglu_rows.cuh with h stored as it is.
#include "norm/norm.h"
#include "norm/swiglu_rows.cuh"

namespace dsv4 {
namespace {

// h [rows, width] of T.
template <typename T>
struct StoredRow {
  static constexpr bool kNeedsAmax = false;
  T* h;

  __device__ void begin(int64_t row, int width) { h += row * width; }

  template <int kCount>
  __device__ __forceinline__ void store(int column, const float (&values)[kCount], bool inside) const {
    if (inside) store_floats(h + column, values);
  }
};

// The same for rows that are no whole vectors or start anywhere.
template <typename T>
struct AnyStoredRow {
  static constexpr bool kNeedsAmax = false;
  T* h;
  int width_;  // set by begin

  __device__ void begin(int64_t row, int width) {
    h += row * width;
    width_ = width;
  }

  template <int kCount>
  __device__ __forceinline__ void store(int column, const float (&values)[kCount], bool) const {
    store_some(h + column, width_ - column, values);
  }
};

template <typename T, int kCount>
struct AnyHalves {
  float gates[kCount], ups[kCount];

  __device__ __forceinline__ void load(const T* row, int width, int column) {
    load_some(row + column, width - column, gates);
    load_some(row + width + column, width - column, ups);
  }

  __device__ __forceinline__ void to_floats(float (&gate)[kCount], float (&up)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gate[i] = gates[i];
      up[i] = ups[i];
    }
  }
};

}  // namespace

cudaError_t launch_swiglu(const void* gate_up, Dtype dtype, Rows rows, const float* route_weight, float limit, void* h,
                          cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
    const auto* source = static_cast<const T*>(gate_up);
    auto* const target = static_cast<T*>(h);
    const bool whole = rows.width % kGatedCount == 0 && aligned(source) && aligned(target) &&
                       rows.stride * sizeof(T) % 16 == 0;
    using Any = AnyHalves<T, kGatedCount>;
    return whole ? launch_swiglu_rows<Halves<T, kGatedCount>>(source, rows, route_weight, limit, StoredRow<T>{target},
                                                              stream)
                 : launch_swiglu_rows<Any>(source, rows, route_weight, limit, AnyStoredRow<T>{target}, stream);
  });
}

}  // namespace dsv4
