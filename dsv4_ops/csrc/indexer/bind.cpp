#include "common/bind.h"
#include "common/bind_rope.h"
#include "indexer/indexer.h"

namespace dsv4 {
namespace {

// One output of codes for the queries: [B, S, Hi, width].
struct Codes {
  const char* name;
  const Tensor& tensor;
  ScalarType dtype;
  int64_t width;
};

void expect_output(const Call& call, const Tensor& q, const Codes& codes) {
  call.expect_tensor(codes.name, codes.tensor, {codes.dtype}, {q.size(0), q.size(1), q.size(2), codes.width});
  call.expect_contiguous(codes.name, codes.tensor);
}

// scales is null but for FP4.
void index_query(const Call& call, IndexForm form, const Tensor& q, const Tensor& weights, const Tensor& rope_table,
                 const Tensor& positions, const Codes& codes, uint8_t* scales, const Tensor& w) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), dim = q.size(3);
  const bool power = dim == 32 || dim == 64 || dim == 128 || dim == 256;
  call.expect(form == IndexForm::kPlain || power, "q", "[B, S, Hi, Di] with Di 32, 64, 128 or 256", q);
  call.expect(dim % 8 == 0, "q", "[B, S, Hi, Di] with Di a multiple of 8", q);
  call.expect_tensor("weights", weights, {kBfloat16, kFloat32}, {batch, tokens, heads});
  const Rows rows = call.rows("q", q, 16), weight_rows = call.rows("weights", weights, 1);
  const Rope rope = expect_rope(call, rope_table, positions, batch, tokens, dim);
  expect_output(call, q, codes);
  call.rows(codes.name, codes.tensor, 16);
  call.expect_tensor("w", w, {kFloat32}, {batch, tokens, heads});
  call.expect_contiguous("w", w);
  const IndexQuery query{q.const_data_ptr(),
                         dtype_of(q),
                         rows.count,
                         static_cast<int>(heads),
                         static_cast<int>(dim),
                         rows.stride,
                         weights.const_data_ptr(),
                         dtype_of(weights),
                         weight_rows.stride};
  call.check(launch_index_query(form, query, rope, codes.tensor.mutable_data_ptr(), scales, mutable_data<float>(w),
                                call.stream()));
}

// Width of the queries, known to be [B, S, Hi, Di].
int64_t query_dim(const Call& call, const Tensor& q) {
  call.expect_tensor("q", q, {kBfloat16, kFloat32}, {kAny, kAny, kAny, kAny});
  return q.size(3);
}

std::tuple<Tensor, Tensor> index_query_plain(const Tensor& q, const Tensor& weights, const Tensor& rope_table,
                                             const Tensor& positions, Tensor y, Tensor w) {
  const Call call("index_query_plain", q);
  const Codes codes{"y", y, kFloat32, query_dim(call, q)};
  index_query(call, IndexForm::kPlain, q, weights, rope_table, positions, codes, nullptr, w);
  return {y, w};
}

std::tuple<Tensor, Tensor> index_query_fp8(const Tensor& q, const Tensor& weights, const Tensor& rope_table,
                                           const Tensor& positions, Tensor q8, Tensor w) {
  const Call call("index_query_fp8", q);
  const Codes codes{"q8", q8, kE4m3, query_dim(call, q)};
  index_query(call, IndexForm::kFp8, q, weights, rope_table, positions, codes, nullptr, w);
  return {q8, w};
}

std::tuple<Tensor, Tensor, Tensor> index_query_fp4(const Tensor& q, const Tensor& weights, const Tensor& rope_table,
                                                   const Tensor& positions, Tensor q4, Tensor scale, Tensor w) {
  const Call call("index_query_fp4", q);
  const int64_t dim = query_dim(call, q);
  expect_output(call, q, {"scale", scale, kUint8, dim / 32});
  const Codes codes{"q4", q4, kUint8, dim / 2};
  index_query(call, IndexForm::kFp4, q, weights, rope_table, positions, codes, mutable_data<uint8_t>(scale), w);
  return {q4, scale, w};
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("index_query_plain.out", TORCH_BOX(&index_query_plain));
  m.impl("index_query_fp8.out", TORCH_BOX(&index_query_fp8));
  m.impl("index_query_fp4.out", TORCH_BOX(&index_query_fp4));
}

}  // namespace
}  // namespace dsv4
