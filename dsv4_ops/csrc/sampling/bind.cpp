#include "common/bind.h"

#include <optional>

#include "sampling/sample.h"

namespace dsv4 {
namespace {

template <typename T>
const T* setting(const Call& call, const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows) {
  call.expect_tensor(name, tensor, {dtype}, {rows});
  call.expect_contiguous(name, tensor);
  return data<T>(tensor);
}

Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& seed, const Tensor& counter, Tensor token, std::optional<Tensor> workspace) {
  const Call call("sample", logits);
  call.expect_tensor("logits", logits, {kFloat32}, {kAny, kAny});
  const int64_t vocabulary = logits.size(1);
  call.expect(vocabulary >= 1 && vocabulary <= kMaxVocabulary, "logits",
              "[B, V] with 1 <= V <= " + std::to_string(kMaxVocabulary), logits);
  const Rows rows = call.rows("logits", logits, 4);
  const SampleSettings settings{setting<float>(call, "temperature", temperature, kFloat32, rows.count),
                                setting<int>(call, "top_k", top_k, kInt32, rows.count),
                                setting<float>(call, "top_p", top_p, kFloat32, rows.count),
                                setting<int64_t>(call, "seed", seed, kInt64, rows.count),
                                setting<int64_t>(call, "counter", counter, kInt64, rows.count)};
  call.expect_tensor("token", token, {kInt64}, {rows.count});
  call.expect_contiguous("token", token);
  const std::string wanted = "given, [B, " + std::to_string(workspace_words(vocabulary)) + "] int64, contiguous";
  call.expect(workspace.has_value(), "workspace", wanted, logits);
  call.expect_tensor("workspace", *workspace, {kInt64}, {rows.count, workspace_words(vocabulary)});
  call.expect_contiguous("workspace", *workspace);
  call.rows("workspace", *workspace, 16);
  call.check(launch_sample(data<float>(logits), rows, settings, mutable_data<uint64_t>(*workspace),
                           mutable_data<int64_t>(token), call.stream()));
  return token;
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) { m.impl("sample.out", TORCH_BOX(&sample)); }

}  // namespace
}  // namespace dsv4
