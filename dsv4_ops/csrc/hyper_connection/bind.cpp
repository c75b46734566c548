#include "common/bind.h"

#include <optional>
#include <vector>

#include "hyper_connection/hyper_connection.h"

namespace dsv4 {
namespace {

using Workspace = std::optional<Tensor>;
using Results3 = std::tuple<Tensor, Tensor, Tensor>;
using Results4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Results5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Results6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Results7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

int alignment_of(const Tensor& x, int64_t width) {
  return reads_vectors(static_cast<int>(width)) ? 16 : static_cast<int>(x.element_size());
}

void expect_aligned(const Call& call, const char* name, const Tensor& tensor, int alignment) {
  const bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0;
  call.expect(fits, name, "at a multiple of " + std::to_string(alignment) + " bytes", tensor);
}

int checked_iterations(const char* op, int64_t iterations) {
  const bool fits = iterations >= 1 && iterations <= INT32_MAX;
  STD_TORCH_CHECK(fits, "dsv4::", op, ": iterations must be at least 1, got ", iterations);
  return static_cast<int>(iterations);
}

// x [..., n, d], whose n * d rows lie at one distance.
Streams streams_of(const Call& call, const Tensor& x) {
  call.expect_rows("x", x, {kBfloat16, kFloat32});
  const bool fits = x.dim() >= 2 && x.size(x.dim() - 2) >= 1 && x.size(x.dim() - 2) <= kMaxStreams &&
                    x.size(x.dim() - 1) >= 1 && x.size(x.dim() - 1) <= INT32_MAX / kMaxStreams;
  call.expect(fits, "x", "[..., n, d] with n from 1 to 16 and d at least 1", x);
  const int64_t n = x.size(x.dim() - 2), width = x.size(x.dim() - 1);
  const Rows rows = call.rows("x", x, alignment_of(x, width));
  return {x.const_data_ptr(), dtype_of(x), rows.count / n, static_cast<int>(n), static_cast<int>(width), rows.stride};
}

// A contiguous tensor with the leading dimensions of x [..., n, d], then `last`, at a multiple of `alignment` bytes.
void expect_like(const Call& call, const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& x,
                 const std::vector<int64_t>& last, int alignment = 1) {
  call.expect_rows(name, tensor, {dtype});
  const auto leading = static_cast<size_t>(x.dim() - 2);
  bool fits = static_cast<size_t>(tensor.dim()) == leading + last.size() && tensor.is_contiguous();
  std::string wanted = "contiguous [";
  for (size_t i = 0; i < leading + last.size(); ++i) {
    const int64_t size = i < leading ? x.size(static_cast<int64_t>(i)) : last[i - leading];
    fits = fits && tensor.size(static_cast<int64_t>(i)) == size;
    wanted += (i ? ", " : "") + std::to_string(size);
  }
  call.expect(fits, name, wanted + "]", tensor);
  expect_aligned(call, name, tensor, alignment);
}

// post [..., n] and comb [..., n, n]: for n = 4 four values are read and written at once.
void expect_post(const Call& call, const Tensor& x, int n, const Tensor& post, const Tensor& comb) {
  const int alignment = n == 4 ? 16 : 4;
  expect_like(call, "post", post, kFloat32, x, {n}, alignment);
  expect_like(call, "comb", comb, kFloat32, x, {n, n}, alignment);
}

MixWeights weights_of(const Call& call, const Streams& x, int outputs, const Tensor& fn, const Tensor& scale,
                      const Tensor& base, double norm_eps, double hc_eps, int iterations) {
  call.expect_tensor("fn", fn, {kFloat32}, {outputs, static_cast<int64_t>(x.streams) * x.width});
  call.expect_tensor("scale", scale, {kFloat32}, {outputs == x.streams ? 1 : 3});
  call.expect_tensor("base", base, {kFloat32}, {outputs});
  call.expect_contiguous("fn", fn);
  call.expect_contiguous("scale", scale);
  call.expect_contiguous("base", base);
  expect_aligned(call, "fn", fn, alignment_of(fn, x.width));
  return {data<float>(fn),  data<float>(scale),          data<float>(base),
          outputs,          static_cast<float>(norm_eps), static_cast<float>(hc_eps),
          iterations};
}

Post post_of(const Call& call, const Tensor& x, const Streams& of, const Tensor& f, const Tensor& post,
             const Tensor& comb, const Tensor& streams) {
  const ScalarType dtype = x.scalar_type();
  call.expect_rows("f", f, {dtype}, of.width);
  const Rows rows = call.rows("f", f, alignment_of(f, of.width));
  bool fits = f.dim() == x.dim() - 1;
  for (int64_t i = 0; fits && i + 1 < f.dim(); ++i) fits = f.size(i) == x.size(i);
  call.expect(fits, "f", "[..., d] with the leading dimensions of x [..., n, d] (" + describe(x) + ")", f);
  expect_post(call, x, of.streams, post, comb);
  expect_like(call, "streams", streams, dtype, x, {of.streams, of.width}, alignment_of(x, of.width));
  return {f.const_data_ptr(), rows.stride, data<float>(post), data<float>(comb), streams.mutable_data_ptr()};
}

float* workspace_of(const char* op, const Call& call, const Streams& x, int outputs, const Workspace& workspace) {
  const int64_t size = workspace_size(x.tokens, x.width, outputs);
  const std::string wanted = "[" + std::to_string(size) + "] float32 or longer (the functional op allocates it)";
  STD_TORCH_CHECK(workspace.has_value(), "dsv4::", op, ": workspace must be ", wanted, ", got None");
  call.expect_tensor("workspace", *workspace, {kFloat32}, {kAny});
  call.expect_contiguous("workspace", *workspace);
  call.expect(workspace->numel() >= size, "workspace", wanted, *workspace);
  return mutable_data<float>(*workspace);
}

// y, post and comb, and the norm where there is one.
Collapsed collapsed_of(const Call& call, const Tensor& x, const Streams& of, const Tensor* norm_weight, const Tensor& y,
                       const Tensor& post, const Tensor& comb) {
  expect_like(call, "y", y, x.scalar_type(), x, {of.width}, alignment_of(x, of.width));
  expect_post(call, x, of.streams, post, comb);
  Collapsed out{};
  out.y = y.mutable_data_ptr();
  out.post = mutable_data<float>(post);
  out.comb = mutable_data<float>(comb);
  if (norm_weight == nullptr) return out;
  call.expect_tensor("norm_weight", *norm_weight, {kBfloat16, kFloat32}, {of.width});
  call.expect_contiguous("norm_weight", *norm_weight);
  expect_aligned(call, "norm_weight", *norm_weight, alignment_of(*norm_weight, of.width));
  out.tail = Tail::kNorm;
  out.norm_weight = norm_weight->const_data_ptr();
  out.norm_dtype = dtype_of(*norm_weight);
  return out;
}

void quantise_fp8(const Call& call, const Tensor& x, const Streams& of, int64_t group, const Tensor& q,
                  const Tensor& q_scale, Collapsed& out) {
  call.expect((group == 32 || group == 64 || group == 128) && of.width % group == 0, "x",
              "[..., n, d] with d a multiple of the group (32, 64 or 128; here " + std::to_string(group) + ")", x);
  expect_like(call, "q", q, kE4m3, x, {of.width}, 8);
  expect_like(call, "q_scale", q_scale, kUint8, x, {of.width / group});
  out.tail = Tail::kNormFp8;
  out.group = static_cast<int>(group);
  out.q = mutable_data<uint8_t>(q);
  out.q_scale = mutable_data<uint8_t>(q_scale);
}

void quantise_nvfp4(const Call& call, const Tensor& x, const Streams& of, const Tensor& q, const Tensor& q_scale,
                    const Tensor& global_scale, Collapsed& out) {
  call.expect(of.width % 16 == 0, "x", "[..., n, d] with d a multiple of 16", x);
  expect_like(call, "q", q, kUint8, x, {of.width / 2}, 4);
  expect_like(call, "q_scale", q_scale, kE4m3, x, {of.width / 16});
  expect_like(call, "global_scale", global_scale, kFloat32, x, {1});
  out.tail = Tail::kNormNvfp4;
  out.q = mutable_data<uint8_t>(q);
  out.q_scale = static_cast<uint8_t*>(q_scale.mutable_data_ptr());
  out.global_scale = mutable_data<float>(global_scale);
}

// What every op that computes `pre` from x has in common: the checks, then the launches once `out` is complete.
struct Pre {
  Pre(const char* op, const Tensor& tensor, const Tensor& fn, const Tensor& scale, const Tensor& base, double norm_eps,
      double hc_eps, int64_t iterations, const Workspace& scratch)
      : call(op, tensor), x(streams_of(call, tensor)) {
    weights = weights_of(call, x, (2 + x.streams) * x.streams, fn, scale, base, norm_eps, hc_eps,
                         checked_iterations(op, iterations));
    workspace = workspace_of(op, call, x, weights.outputs, scratch);
  }

  void launch(const Collapsed& out, const Post* post = nullptr) const {
    call.check(launch_hc_pre(x, post, weights, workspace, out, call.stream()));
  }

  Call call;
  Streams x;
  MixWeights weights;
  float* workspace;
};

Tensor sinkhorn(const Tensor& logits, double eps, int64_t iterations, Tensor comb) {
  const Call call("sinkhorn", logits);
  call.expect_rows("logits", logits, {kFloat32});
  const int64_t n = logits.size(logits.dim() - 1);
  const bool fits = logits.dim() >= 2 && logits.size(logits.dim() - 2) == n && n >= 1 && n <= kMaxStreams;
  call.expect(fits, "logits", "[..., n, n] with n from 1 to 16", logits);
  expect_like(call, "comb", comb, kFloat32, logits, {n, n}, n == 4 ? 16 : 4);
  call.check(launch_sinkhorn(data<float>(logits), call.rows("logits", logits, 4), static_cast<int>(n),
                             static_cast<float>(eps), checked_iterations("sinkhorn", iterations),
                             mutable_data<float>(comb), call.stream()));
  return comb;
}

Tensor hc_post(const Tensor& f, const Tensor& x, const Tensor& post, const Tensor& comb, Tensor y) {
  const Call call("hc_post", x);
  const Streams streams = streams_of(call, x);
  call.check(launch_hc_post(streams, post_of(call, x, streams, f, post, comb, y), call.stream()));
  return y;
}

Tensor hc_head(const Tensor& x, const Tensor& fn, const Tensor& scale, const Tensor& base, double norm_eps,
               double hc_eps, Tensor y, const Workspace& workspace) {
  const Call call("hc_head", x);
  const Streams streams = streams_of(call, x);
  const MixWeights weights = weights_of(call, streams, streams.streams, fn, scale, base, norm_eps, hc_eps, 1);
  expect_like(call, "y", y, x.scalar_type(), x, {streams.width}, alignment_of(x, streams.width));
  Collapsed out{};
  out.y = y.mutable_data_ptr();
  float* const partial = workspace_of("hc_head", call, streams, weights.outputs, workspace);
  call.check(launch_hc_pre(streams, nullptr, weights, partial, out, call.stream()));
  return y;
}

Results3 hc_pre(const Tensor& x, const Tensor& fn, const Tensor& scale, const Tensor& base, double norm_eps,
                double hc_eps, int64_t iterations, Tensor y, Tensor post, Tensor comb, const Workspace& workspace) {
  const Pre pre("hc_pre", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  pre.launch(collapsed_of(pre.call, x, pre.x, nullptr, y, post, comb));
  return {y, post, comb};
}

Results3 hc_pre_rms_norm(const Tensor& x, const Tensor& fn, const Tensor& scale, const Tensor& base,
                         const Tensor& norm_weight, double norm_eps, double hc_eps, int64_t iterations, Tensor y,
                         Tensor post, Tensor comb, const Workspace& workspace) {
  const Pre pre("hc_pre_rms_norm", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  pre.launch(collapsed_of(pre.call, x, pre.x, &norm_weight, y, post, comb));
  return {y, post, comb};
}

Results5 hc_pre_rms_norm_quant_fp8(const Tensor& x, const Tensor& fn, const Tensor& scale, const Tensor& base,
                                   const Tensor& norm_weight, double norm_eps, double hc_eps, int64_t iterations,
                                   int64_t group, Tensor y, Tensor post, Tensor comb, Tensor q, Tensor q_scale,
                                   const Workspace& workspace) {
  const Pre pre("hc_pre_rms_norm_quant_fp8", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  Collapsed out = collapsed_of(pre.call, x, pre.x, &norm_weight, y, post, comb);
  quantise_fp8(pre.call, x, pre.x, group, q, q_scale, out);
  pre.launch(out);
  return {y, post, comb, q, q_scale};
}

Results6 hc_pre_rms_norm_quant_nvfp4(const Tensor& x, const Tensor& fn, const Tensor& scale, const Tensor& base,
                                     const Tensor& norm_weight, double norm_eps, double hc_eps, int64_t iterations,
                                     Tensor y, Tensor post, Tensor comb, Tensor q, Tensor q_scale, Tensor global_scale,
                                     const Workspace& workspace) {
  const Pre pre("hc_pre_rms_norm_quant_nvfp4", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  Collapsed out = collapsed_of(pre.call, x, pre.x, &norm_weight, y, post, comb);
  quantise_nvfp4(pre.call, x, pre.x, q, q_scale, global_scale, out);
  pre.launch(out);
  return {y, post, comb, q, q_scale, global_scale};
}

Results4 hc_post_pre(const Tensor& f, const Tensor& x, const Tensor& post, const Tensor& comb, const Tensor& fn,
                     const Tensor& scale, const Tensor& base, double norm_eps, double hc_eps, int64_t iterations,
                     Tensor streams, Tensor y, Tensor post_next, Tensor comb_next, const Workspace& workspace) {
  const Pre pre("hc_post_pre", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  const Post before = post_of(pre.call, x, pre.x, f, post, comb, streams);
  pre.launch(collapsed_of(pre.call, x, pre.x, nullptr, y, post_next, comb_next), &before);
  return {streams, y, post_next, comb_next};
}

Results4 hc_post_pre_rms_norm(const Tensor& f, const Tensor& x, const Tensor& post, const Tensor& comb,
                              const Tensor& fn, const Tensor& scale, const Tensor& base, const Tensor& norm_weight,
                              double norm_eps, double hc_eps, int64_t iterations, Tensor streams, Tensor y,
                              Tensor post_next, Tensor comb_next, const Workspace& workspace) {
  const Pre pre("hc_post_pre_rms_norm", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  const Post before = post_of(pre.call, x, pre.x, f, post, comb, streams);
  pre.launch(collapsed_of(pre.call, x, pre.x, &norm_weight, y, post_next, comb_next), &before);
  return {streams, y, post_next, comb_next};
}

Results6 hc_post_pre_rms_norm_quant_fp8(const Tensor& f, const Tensor& x, const Tensor& post, const Tensor& comb,
                                        const Tensor& fn, const Tensor& scale, const Tensor& base,
                                        const Tensor& norm_weight, double norm_eps, double hc_eps, int64_t iterations,
                                        int64_t group, Tensor streams, Tensor y, Tensor post_next, Tensor comb_next,
                                        Tensor q, Tensor q_scale, const Workspace& workspace) {
  const Pre pre("hc_post_pre_rms_norm_quant_fp8", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  const Post before = post_of(pre.call, x, pre.x, f, post, comb, streams);
  Collapsed out = collapsed_of(pre.call, x, pre.x, &norm_weight, y, post_next, comb_next);
  quantise_fp8(pre.call, x, pre.x, group, q, q_scale, out);
  pre.launch(out, &before);
  return {streams, y, post_next, comb_next, q, q_scale};
}

Results7 hc_post_pre_rms_norm_quant_nvfp4(const Tensor& f, const Tensor& x, const Tensor& post, const Tensor& comb,
                                          const Tensor& fn, const Tensor& scale, const Tensor& base,
                                          const Tensor& norm_weight, double norm_eps, double hc_eps, int64_t iterations,
                                          Tensor streams, Tensor y, Tensor post_next, Tensor comb_next, Tensor q,
                                          Tensor q_scale, Tensor global_scale, const Workspace& workspace) {
  const Pre pre("hc_post_pre_rms_norm_quant_nvfp4", x, fn, scale, base, norm_eps, hc_eps, iterations, workspace);
  const Post before = post_of(pre.call, x, pre.x, f, post, comb, streams);
  Collapsed out = collapsed_of(pre.call, x, pre.x, &norm_weight, y, post_next, comb_next);
  quantise_nvfp4(pre.call, x, pre.x, q, q_scale, global_scale, out);
  pre.launch(out, &before);
  return {streams, y, post_next, comb_next, q, q_scale, global_scale};
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("sinkhorn.out", TORCH_BOX(&sinkhorn));
  m.impl("hc_pre.out", TORCH_BOX(&hc_pre));
  m.impl("hc_post.out", TORCH_BOX(&hc_post));
  m.impl("hc_post_pre.out", TORCH_BOX(&hc_post_pre));
  m.impl("hc_pre_rms_norm.out", TORCH_BOX(&hc_pre_rms_norm));
  m.impl("hc_post_pre_rms_norm.out", TORCH_BOX(&hc_post_pre_rms_norm));
  m.impl("hc_head.out", TORCH_BOX(&hc_head));
  m.impl("hc_pre_rms_norm_quant_fp8.out", TORCH_BOX(&hc_pre_rms_norm_quant_fp8));
  m.impl("hc_pre_rms_norm_quant_nvfp4.out", TORCH_BOX(&hc_pre_rms_norm_quant_nvfp4));
  m.impl("hc_post_pre_rms_norm_quant_fp8.out", TORCH_BOX(&hc_post_pre_rms_norm_quant_fp8));
  m.impl("hc_post_pre_rms_norm_quant_nvfp4.out", TORCH_BOX(&hc_post_pre_rms_norm_quant_nvfp4));
}

}  // namespace
}  // namespace dsv4
