#include "common/bind.h"

#include <algorithm>

namespace dsv4 {
namespace {

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

template <typename Size>
std::string list(int64_t count, Size size) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + size(i);
  return text + "]";
}

std::string dtype_names(std::initializer_list<ScalarType> dtypes) {
  std::string text;
  for (const ScalarType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(name_of(dtype));
  return text;
}

bool has_dtype(const Tensor& tensor, std::initializer_list<ScalarType> dtypes) {
  return std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int32_t device_of(const char* op, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), "dsv4::", op, ": the first tensor must be on a CUDA device, got ",
                  describe(tensor));
  return tensor.get_device_index();
}

}  // namespace

std::string describe(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  std::string text = list(dims, [&](int64_t i) { return std::to_string(tensor.size(i)); });
  text += std::string(" ") + name_of(tensor.scalar_type());
  if (!tensor.is_contiguous()) {
    text += " with strides " + list(dims, [&](int64_t i) { return std::to_string(tensor.stride(i)); });
  }
  return text + " on " + (tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "the CPU");
}

Call::Call(const char* op, const Tensor& first)
    : op_(op), device_(device_of(op, first)), guard_(device_), stream_(current_stream(device_)) {}

void Call::expect(bool fits, const char* name, const std::string& wanted, const Tensor& got) const {
  STD_TORCH_CHECK(fits, "dsv4::", op_, ": ", name, " must be ", wanted, ", got ", describe(got));
}

void Call::expect_device(const char* name, const Tensor& tensor) const {
  const bool fits = tensor.is_cuda() && tensor.get_device_index() == device_;
  expect(fits, name, "on cuda:" + std::to_string(device_) + " like the other tensors", tensor);
}

void Call::expect_tensor(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                         std::initializer_list<int64_t> shape) const {
  expect_device(name, tensor);
  const auto dims = static_cast<int64_t>(shape.size());
  bool fits = has_dtype(tensor, dtypes) && tensor.dim() == dims;
  for (int64_t i = 0; fits && i < dims; ++i) {
    const int64_t size = shape.begin()[i];
    fits = size == kAny || tensor.size(i) == size;
  }
  if (fits) return;  // the text below is only made for an error
  const auto size = [&](int64_t i) { return shape.begin()[i] == kAny ? "*" : std::to_string(shape.begin()[i]); };
  expect(false, name, list(dims, size) + " " + dtype_names(dtypes), tensor);
}

void Call::expect_rows(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                       int64_t width) const {
  expect_device(name, tensor);
  const bool fits = has_dtype(tensor, dtypes) && tensor.dim() >= 1 &&
                    (width == kAny || tensor.size(tensor.dim() - 1) == width);
  if (fits) return;
  expect(false, name, "[..., " + (width == kAny ? "*" : std::to_string(width)) + "] " + dtype_names(dtypes), tensor);
}

void Call::expect_rows_like(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                            const Tensor& x, int64_t width) const {
  expect_device(name, tensor);
  const int64_t dims = x.dim();
  const auto wanted = [&](int64_t i) { return i + 1 < dims ? x.size(i) : width; };
  bool fits = has_dtype(tensor, dtypes) && tensor.dim() == dims;
  for (int64_t i = 0; fits && i < dims; ++i) fits = tensor.size(i) == wanted(i);
  if (fits) return;
  const auto size = [&](int64_t i) { return std::to_string(wanted(i)); };
  expect(false, name, list(dims, size) + " " + dtype_names(dtypes), tensor);
}

void Call::expect_contiguous(const char* name, const Tensor& tensor) const {
  expect(tensor.is_contiguous(), name, "contiguous (call .contiguous() on it)", tensor);
}

void Call::expect_output(const char* name, const Tensor& out, ScalarType dtype, const Tensor& x, int64_t width) const {
  expect_device(name, out);
  const int64_t dims = x.dim();
  bool fits = has_dtype(out, {dtype}) && out.dim() == dims && out.is_contiguous();
  for (int64_t i = 0; fits && i < dims; ++i) fits = out.size(i) == (i + 1 < dims ? x.size(i) : width);
  if (fits) return;
  const auto size = [&](int64_t i) { return std::to_string(i + 1 < dims ? x.size(i) : width); };
  expect(false, name, "contiguous " + list(dims, size) + " " + name_of(dtype), out);
}

Rows Call::rows(const char* name, const Tensor& tensor, int alignment) const {
  const int64_t last = tensor.dim() - 1;
  Rows rows{row_count(tensor), tensor.size(last), tensor.size(last)};
  if (rows.count == 0 || rows.width == 0) return rows;
  const char* const wanted = "rows at one distance from each other (call .contiguous() on it)";
  expect(tensor.stride(last) == 1 || rows.width == 1, name, wanted, tensor);
  int64_t next = kAny;  // stride that the next dimension outwards must have
  for (int64_t i = last - 1; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (next == kAny) rows.stride = tensor.stride(i);
    expect(next == kAny || tensor.stride(i) == next, name, wanted, tensor);
    next = tensor.stride(i) * tensor.size(i);
  }
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0 &&
                       (rows.count == 1 || rows.stride * bytes % alignment == 0);
  expect(aligned, name, "rows that start at multiples of " + std::to_string(alignment) + " bytes", tensor);
  return rows;
}

void Call::check(cudaError_t status) const {
  STD_TORCH_CHECK(status == cudaSuccess, "dsv4::", op_, ": launch failed on cuda:", device_, ": ",
                  cudaGetErrorString(status));
}

Dtype dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 ? Dtype::kBf16 : Dtype::kFp32;
}

int64_t row_count(const Tensor& tensor) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) count *= tensor.size(i);
  return count;
}

}  // namespace dsv4
