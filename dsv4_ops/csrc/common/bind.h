// What every bind.cpp uses: checks of arguments with messages that name the op, what was expected and what came, the
// device guard, the current stream, and the result of a launch. Compiled by the host compiler, through torch's stable
// ABI: one library serves torch 2.11 to 2.13.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>

#include "common/types.h"

namespace dsv4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr auto kBfloat16 = ScalarType::BFloat16;
constexpr auto kFloat32 = ScalarType::Float;
constexpr auto kE4m3 = ScalarType::Float8_e4m3fn;
constexpr auto kUint8 = ScalarType::Byte;
constexpr auto kInt32 = ScalarType::Int;
constexpr auto kInt64 = ScalarType::Long;

constexpr int64_t kAny = -1;  // a size that is not checked

// "[4, 4096] bfloat16 with strides [4096, 1] on cuda:0"
std::string describe(const Tensor& tensor);

// One call of an op on a GPU: makes the device of `first` current while it lives, and knows its current stream.
class Call {
 public:
  Call(const char* op, const Tensor& first);

  cudaStream_t stream() const { return stream_; }

  // Raise unless `fits`: "dsv4::<op>: <name> must be <wanted>, got <tensor>".
  void expect(bool fits, const char* name, const std::string& wanted, const Tensor& got) const;

  // Raise unless the tensor lies on the call's GPU and has one of the dtypes and the shape (kAny: any size).
  void expect_tensor(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                     std::initializer_list<int64_t> shape) const;

  // The same for a tensor [..., width] of any number of leading dimensions (at least one dimension in all).
  void expect_rows(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                   int64_t width = kAny) const;

  // The same, and the leading dimensions must be those of `x`.
  void expect_rows_like(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                        const Tensor& x, int64_t width) const;

  // Raise unless the tensor is contiguous. Outputs that `alloc` made are.
  void expect_contiguous(const char* name, const Tensor& tensor) const;

  // Raise unless `out` is a contiguous tensor of the dtype whose shape is that of `x` but for the last size, `width`.
  void expect_output(const char* name, const Tensor& out, ScalarType dtype, const Tensor& x, int64_t width) const;

  // View [..., width] as rows at one distance; raise if the strides do not allow that, or if a row does not start at a
  // multiple of `alignment` bytes.
  Rows rows(const char* name, const Tensor& tensor, int alignment) const;

  // Raise if a launch failed.
  void check(cudaError_t status) const;

 private:
  void expect_device(const char* name, const Tensor& tensor) const;

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

Dtype dtype_of(const Tensor& tensor);  // bf16 or fp32, which the caller has checked

// Element count of all dimensions but the last.
int64_t row_count(const Tensor& tensor);

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace dsv4
