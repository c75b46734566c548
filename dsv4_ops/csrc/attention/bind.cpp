#include "common/bind.h"

#include <optional>

#include "attention/attention.h"
#include "attention/mixed_attention.h"
#include "common/bind_pool.h"
#include "common/bind_rope.h"

namespace dsv4 {
namespace {

constexpr int64_t kLargestDim = 512;

PageDivisor divisor(int64_t number) {
  int bits = 0;
  while (int64_t{1} << bits < number) ++bits;
  const int shift = 31 + bits;
  return {static_cast<uint32_t>(((int64_t{1} << shift) + number - 1) / number), shift};
}

// What a call writes: o and lse, or codes, scales and lse; and room for what its kernels hand on.
struct Outputs {
  const Tensor o;
  const std::optional<Tensor> o_scale;
  const Tensor lse;
  const std::optional<Tensor> workspace;

  Outputs(Tensor o, Tensor lse, std::optional<Tensor> workspace) : o(o), lse(lse), workspace(workspace) {}
  Outputs(Tensor o_codes, Tensor o_scale, Tensor lse, std::optional<Tensor> workspace)
      : o(o_codes), o_scale(o_scale), lse(lse), workspace(workspace) {}
};

void expect_outputs(const Call& call, const Tensor& q, const Outputs& outputs) {
  const int64_t dim = q.size(3);
  if (outputs.o_scale.has_value()) {
    call.expect(dim % kScaleGroup == 0, "q", "[B, S, H, D] with D a multiple of 128", q);
    call.expect_output("o_codes", outputs.o, kE4m3, q, dim);
    call.expect_output("o_scale", *outputs.o_scale, kUint8, q, dim / kScaleGroup);
  } else {
    call.expect_output("o", outputs.o, q.scalar_type(), q, dim);
  }
  call.expect_tensor("lse", outputs.lse, {kFloat32}, {q.size(0), q.size(1), q.size(2)});
  call.expect_contiguous("lse", outputs.lse);
}

// What all ops have in common; the compressed entries are added by the caller.
SparseAttention describe_call(const Call& call, const Tensor& q, const Tensor& window_pool, const Tensor& sink,
                              const Tensor& rope_table, const Tensor& window_table, const Tensor& positions,
                              int64_t window, int64_t page_size, const Outputs& outputs) {
  call.expect_tensor("q", q, {kBfloat16, kFloat32}, {kAny, kAny, kAny, kAny});
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), dim = q.size(3);
  call.expect(dim % 8 == 0 && dim >= 8 && dim <= kLargestDim, "q", "[B, S, H, D] with D a multiple of 8 up to 512", q);
  call.expect(heads >= 1 && batch * tokens * heads <= INT32_MAX, "q",
              "of at least one head and at most 2^31 - 1 vectors", q);
  const Rows rows = call.rows("q", q, 16);
  call.expect_tensor("sink", sink, {kFloat32}, {heads});
  call.expect_contiguous("sink", sink);
  const Rope rope = expect_rope(call, rope_table, positions, batch, tokens, dim);
  const int64_t entry_bytes = dim + rope.dim + (dim - rope.dim + 511) / 512 * 8;
  const Pool pool = expect_pool(call, window_pool, window_table, batch, page_size, entry_bytes, dim, 16);
  call.expect(pool.plain || (dim - rope.dim) % 64 == 0, "window_pool", "float32 where D - R is no multiple of 64",
              window_pool);
  call.expect(window >= 0 && window <= INT32_MAX / 2, "q", "used with a window from 0 to 2^30", q);
  const int64_t ring = static_cast<int64_t>(pool.max_pages) * pool.page_size;
  call.expect(ring >= window + tokens - 1 || batch * tokens == 0, "window_table",
              "a ring of at least window + S - 1 = " + std::to_string(window + tokens - 1) + " entries", window_table);
  expect_outputs(call, q, outputs);

  SparseAttention attention{};
  attention.q = q.const_data_ptr();
  attention.dtype = dtype_of(q);
  attention.q_stride = rows.stride;
  attention.rows = batch * tokens;
  attention.heads = static_cast<int>(heads);
  attention.dim = static_cast<int>(dim);
  attention.sink = data<float>(sink);
  attention.rope = rope;
  attention.keys.window_pool = pool;
  attention.keys.window_page = divisor(page_size);
  attention.keys.compressed_pool.page_size = 1;
  attention.keys.window = static_cast<int>(window);
  attention.o = outputs.o.mutable_data_ptr();
  attention.o_scale = outputs.o_scale.has_value() ? mutable_data<uint8_t>(*outputs.o_scale) : nullptr;
  attention.lse = mutable_data<float>(outputs.lse);
  return attention;
}

void add_compressed_pool(const Call& call, SparseAttention& attention, const Tensor& q, const Tensor& pool,
                         const Tensor& table, int64_t page_size) {
  const int64_t dim = q.size(3), rope_dim = attention.rope.dim,
                entry_bytes = dim + rope_dim + (dim - rope_dim + 511) / 512 * 8;
  attention.keys.compressed_pool = expect_pool(call, pool, table, q.size(0), page_size, entry_bytes, dim, 16);
  attention.keys.compressed_page = divisor(page_size);
  call.expect(attention.keys.compressed_pool.plain || (dim - rope_dim) % 64 == 0, "compressed_pool",
              "float32 where D - R is no multiple of 64", pool);
}

void add_selected(const Call& call, SparseAttention& attention, const Tensor& q, const Tensor& pool,
                  const Tensor& table, const Tensor& indices, int64_t page_size) {
  add_compressed_pool(call, attention, q, pool, table, page_size);
  call.expect_tensor("indices", indices, {kInt32}, {q.size(0), q.size(1), kAny});
  const Rows rows = call.rows("indices", indices, 4);
  call.expect(rows.width <= INT32_MAX / 2, "indices", "[B, S, k] with k at most 2^30", indices);
  attention.keys.indices = data<int32_t>(indices);
  attention.keys.indices_stride = rows.stride;
  attention.keys.k = static_cast<int>(rows.width);
}

// Room for what one kernel hands to the next, if it is enough; without it every row is computed by one CTA, and has the
// same bits.
float* room_for_partials(const Call& call, const std::optional<Tensor>& workspace, const SparseAttention& attention) {
  if (!workspace.has_value()) return nullptr;
  call.expect_rows("workspace", *workspace, {kFloat32});
  call.expect_contiguous("workspace", *workspace);
  call.rows("workspace", *workspace, 16);
  const bool enough = workspace->numel() > 0 && workspace->numel() >= partial_floats(attention);
  return enough ? mutable_data<float>(*workspace) : nullptr;
}

void launch(const Call& call, SparseAttention attention, const std::optional<Tensor>& workspace) {
  if (attention.rows == 0) return;
  if (!on_tensor_cores(attention)) return call.check(launch_sparse_attention_plain(attention, call.stream()));
  attention.partials = room_for_partials(call, workspace, attention);
  call.check(launch_sparse_attention(attention, call.stream()));
}

// The three ops, which return what they write: o and lse, or, quantised, codes, scales and lse.
template <typename... Written>
struct Ops {
  using Result = std::tuple<Written...>;
  static constexpr bool kQuantised = sizeof...(Written) == 3;

  static Result window(const Tensor& q, const Tensor& window_pool, const Tensor& sink, const Tensor& rope_table,
                       const Tensor& window_table, const Tensor& positions, int64_t window, int64_t window_page_size,
                       Written... written, std::optional<Tensor> workspace) {
    const Call call(kQuantised ? "sparse_attention_window_quant_fp8" : "sparse_attention_window", q);
    const SparseAttention attention = describe_call(call, q, window_pool, sink, rope_table, window_table, positions,
                                                    window, window_page_size, Outputs(written..., workspace));
    launch(call, attention, workspace);
    return {written...};
  }

  static Result selected(const Tensor& q, const Tensor& window_pool, const Tensor& compressed_pool, const Tensor& sink,
                         const Tensor& rope_table, const Tensor& window_table, const Tensor& compressed_table,
                         const Tensor& indices, const Tensor& positions, int64_t window, int64_t window_page_size,
                         int64_t compressed_page_size, Written... written, std::optional<Tensor> workspace) {
    const Call call(kQuantised ? "sparse_attention_selected_quant_fp8" : "sparse_attention_selected", q);
    SparseAttention attention = describe_call(call, q, window_pool, sink, rope_table, window_table, positions, window,
                                              window_page_size, Outputs(written..., workspace));
    add_selected(call, attention, q, compressed_pool, compressed_table, indices, compressed_page_size);
    launch(call, attention, workspace);
    return {written...};
  }

  static Result compressed(const Tensor& q, const Tensor& window_pool, const Tensor& compressed_pool,
                           const Tensor& sink, const Tensor& rope_table, const Tensor& window_table,
                           const Tensor& compressed_table, const Tensor& positions, int64_t window, int64_t ratio,
                           int64_t window_page_size, int64_t compressed_page_size, Written... written,
                           std::optional<Tensor> workspace) {
    const Call call(kQuantised ? "sparse_attention_compressed_quant_fp8" : "sparse_attention_compressed", q);
    SparseAttention attention = describe_call(call, q, window_pool, sink, rope_table, window_table, positions, window,
                                              window_page_size, Outputs(written..., workspace));
    add_compressed_pool(call, attention, q, compressed_pool, compressed_table, compressed_page_size);
    call.expect(ratio >= 1 && ratio <= INT32_MAX, "q", "used with a ratio of at least 1", q);
    attention.keys.ratio = static_cast<int>(ratio);
    launch(call, attention, workspace);
    return {written...};
  }
};

using Plain = Ops<Tensor, Tensor>;
using Quantised = Ops<Tensor, Tensor, Tensor>;

// A part of queries [B, S, H, ...] with any strides but the last one's, whose vectors start at multiples of 16 bytes.
VectorStrides expect_part(const Call& call, const char* name, const Tensor& part, ScalarType dtype, const Tensor& o,
                          int64_t width) {
  call.expect_tensor(name, part, {dtype}, {o.size(0), o.size(1), o.size(2), width});
  const VectorStrides strides{part.stride(0), part.stride(1), part.stride(2)};
  const int64_t element = dtype == kE4m3 ? 1 : 2;
  const auto aligned = [&](int dim) { return part.size(dim) <= 1 || part.stride(dim) * element % 16 == 0; };
  const bool fits = (part.stride(3) == 1 || width == 1) && aligned(0) && aligned(1) && aligned(2) &&
                    reinterpret_cast<uintptr_t>(part.const_data_ptr()) % 16 == 0;
  call.expect(fits, name, "vectors with last stride 1 that start at multiples of 16 bytes", part);
  return strides;
}

std::tuple<Tensor, Tensor> sparse_attention_mixed(
    const Tensor& q_nope, const Tensor& q_scale, const Tensor& q_rope, const Tensor& window_pool,
    const Tensor& compressed_pool, const Tensor& sink, const Tensor& rope_table, const Tensor& window_table,
    const Tensor& compressed_table, const Tensor& indices, const Tensor& positions, int64_t window,
    int64_t window_page_size, int64_t compressed_page_size, Tensor o, Tensor lse) {
  const Call call("sparse_attention_mixed", o);
  call.expect_tensor("o", o, {kBfloat16}, {kAny, kAny, kAny, kAny});
  MixedAttention mixed{};
  mixed.attention = describe_call(call, o, window_pool, sink, rope_table, window_table, positions, window,
                                  window_page_size, Outputs(o, lse, {}));
  mixed.attention.q = nullptr;
  add_selected(call, mixed.attention, o, compressed_pool, compressed_table, indices, compressed_page_size);
  const int64_t rope = mixed.attention.rope.dim;
  call.expect(!mixed.attention.keys.window_pool.plain, "window_pool", "uint8 (packed)", window_pool);
  call.expect(!mixed.attention.keys.compressed_pool.plain, "compressed_pool", "uint8 (packed)", compressed_pool);
  mixed.queries.nope_strides = expect_part(call, "q_nope", q_nope, kE4m3, o, o.size(3) - rope);
  mixed.queries.rope_strides = expect_part(call, "q_rope", q_rope, kBfloat16, o, rope);
  call.expect_tensor("q_scale", q_scale, {kFloat32}, {o.size(0), o.size(1), o.size(2)});
  mixed.queries.scale_strides = {q_scale.stride(0), q_scale.stride(1), q_scale.stride(2)};
  mixed.queries.nope = static_cast<const uint8_t*>(q_nope.const_data_ptr());
  mixed.queries.scale = data<float>(q_scale);
  mixed.queries.rope = q_rope.const_data_ptr();
  if (mixed.attention.rows == 0) return {o, lse};
  call.check(on_tensor_cores(mixed.attention) ? launch_sparse_attention_mixed(mixed, call.stream())
                                              : launch_sparse_attention_mixed_plain(mixed, call.stream()));
  return {o, lse};
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("sparse_attention_window.out", TORCH_BOX(&Plain::window));
  m.impl("sparse_attention_selected.out", TORCH_BOX(&Plain::selected));
  m.impl("sparse_attention_compressed.out", TORCH_BOX(&Plain::compressed));
  m.impl("sparse_attention_window_quant_fp8.out", TORCH_BOX(&Quantised::window));
  m.impl("sparse_attention_selected_quant_fp8.out", TORCH_BOX(&Quantised::selected));
  m.impl("sparse_attention_compressed_quant_fp8.out", TORCH_BOX(&Quantised::compressed));
  m.impl("sparse_attention_mixed.out", TORCH_BOX(&sparse_attention_mixed));
}

}  // namespace
}  // namespace dsv4
