#include "common/bind.h"
#include "common/bind_pool.h"
#include "common/bind_rope.h"
#include "norm/rope.h"

namespace dsv4 {
namespace {

int64_t kv_entry_bytes(int64_t dim, int64_t rope_dim) {
  const int64_t nope = dim - rope_dim;
  return nope + 2 * rope_dim + 8 * ((nope + 511) / 512);
}

void expect_dim(const Call& call, const char* name, const Tensor& tensor, const Rope& rope) {
  const int64_t dim = tensor.size(tensor.dim() - 1);
  call.expect(dim % 8 == 0 && dim <= kNormRopeMaxDim && dim >= rope.dim, name,
              "of a width that is a multiple of 8, at least R = " + std::to_string(rope.dim) + " and at most " +
                  std::to_string(kNormRopeMaxDim),
              tensor);
}

Rope rope_of(const Call& call, const Tensor& x, const Tensor& rope_table, const Tensor& positions) {
  return expect_rope(call, rope_table, positions, x.size(0), x.size(1), kNormRopeMaxRopeDim);
}

// q [B, S, H, D], read at q and written at y.
Heads heads_of(const Call& call, const Tensor& q, const Tensor& y, const Rope& rope) {
  expect_dim(call, "q", q, rope);
  const Rows rows = call.rows("q", q, 16), out = call.rows("y", y, 16);
  return {q.const_data_ptr(),
          y.mutable_data_ptr(),
          dtype_of(q),
          q.size(0) * q.size(1),
          static_cast<int>(q.size(2)),
          static_cast<int>(rows.width),
          rows.stride,
          out.stride};
}

WindowRows window_rows_of(const Call& call, const Tensor& pool, const Tensor& kv, const Tensor& weight,
                          const Tensor& block_table, const Rope& rope, int64_t page_size) {
  expect_dim(call, "kv", kv, rope);
  const Rows rows = call.rows("kv", kv, 16);
  call.expect_tensor("weight", weight, {kBfloat16, kFloat32}, {rows.width});
  call.rows("weight", weight, 16);
  const bool fits = pool.scalar_type() != kUint8 || (rows.width - rope.dim) % 64 == 0;
  call.expect(fits, "kv", "[B, S, " + std::to_string(rope.dim) + " + a multiple of 64] for a packed pool", kv);
  const Pool pages = expect_pool(call, pool, block_table, kv.size(0), page_size, kv_entry_bytes(rows.width, rope.dim),
                                 rows.width, 8);
  const int64_t ring = static_cast<int64_t>(pages.max_pages) * page_size;
  call.expect(kv.size(1) <= ring || rows.count == 0, "kv",
              "[B, S <= " + std::to_string(ring) +
                  ", D], no more rows than the ring has entries (split the chunk or give each sequence more pages)",
              kv);
  return {kv.const_data_ptr(),         dtype_of(kv),      rows.count, static_cast<int>(rows.width), rows.stride,
          weight.const_data_ptr(), dtype_of(weight), pages};
}

Tensor q_norm_rope(const Tensor& q, const Tensor& rope_table, const Tensor& positions, double eps, Tensor y) {
  const Call call("q_norm_rope", q);
  call.expect_tensor("q", q, {kBfloat16, kFloat32}, {kAny, kAny, kAny, kAny});
  call.expect_tensor("y", y, {q.scalar_type()}, {q.size(0), q.size(1), q.size(2), q.size(3)});
  call.expect_contiguous("y", y);
  const Rope rope = rope_of(call, q, rope_table, positions);
  call.check(launch_q_norm_rope(heads_of(call, q, y, rope), rope, static_cast<float>(eps), call.stream()));
  return y;
}

void kv_norm_rope_append(const Tensor& pool, const Tensor& kv, const Tensor& weight, const Tensor& rope_table,
                         const Tensor& block_table, const Tensor& positions, double eps, int64_t page_size) {
  const Call call("kv_norm_rope_append", kv);
  call.expect_tensor("kv", kv, {kBfloat16, kFloat32}, {kAny, kAny, kAny});
  const Rope rope = rope_of(call, kv, rope_table, positions);
  const WindowRows rows = window_rows_of(call, pool, kv, weight, block_table, rope, page_size);
  call.check(launch_kv_norm_rope_append(rows, rope, static_cast<float>(eps), call.stream()));
}

void qkv_norm_rope_append(const Tensor& pool, const Tensor& q, const Tensor& kv, const Tensor& weight,
                          const Tensor& rope_table, const Tensor& block_table, const Tensor& positions, double eps,
                          int64_t page_size) {
  const Call call("qkv_norm_rope_append", q);
  call.expect_tensor("q", q, {kBfloat16, kFloat32}, {kAny, kAny, kAny, kAny});
  call.expect_tensor("kv", kv, {q.scalar_type()}, {q.size(0), q.size(1), q.size(3)});
  const Rope rope = rope_of(call, q, rope_table, positions);
  const Heads heads = heads_of(call, q, q, rope);
  const bool apart = q.size(0) * q.size(1) * q.size(2) <= 1 || heads.stride >= heads.dim;
  call.expect(apart, "q", "heads that do not overlap: they are written in place", q);
  const WindowRows rows = window_rows_of(call, pool, kv, weight, block_table, rope, page_size);
  call.check(launch_qkv_norm_rope_append(heads, rows, rope, static_cast<float>(eps), call.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("q_norm_rope.out", TORCH_BOX(&q_norm_rope));
  m.impl("kv_norm_rope_append", TORCH_BOX(&kv_norm_rope_append));
  m.impl("qkv_norm_rope_append", TORCH_BOX(&qkv_norm_rope_append));
}

}  // namespace
}  // namespace dsv4
