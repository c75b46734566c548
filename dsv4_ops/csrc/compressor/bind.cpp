#include "common/bind.h"
#include "common/bind_pool.h"
#include "common/bind_rope.h"
#include "compressor/compressor.h"

namespace dsv4 {
namespace {

// Bytes of a packed entry, and the multiple of bytes at which its page must start.
struct Packed {
  int64_t entry_bytes;
  int alignment;
};

Packed packed_of(EntryForm form, int64_t dim, int64_t rope_dim) {
  const int64_t nope = dim - rope_dim;
  switch (form) {
    case EntryForm::kKv: return {nope + 2 * rope_dim + 8 * ((nope + 511) / 512), 8};
    case EntryForm::kIndexFp8: return {dim + 4, 4};
    case EntryForm::kIndexFp4: return {dim / 2 + dim / 32, 2};
    default: return {4 * dim, 16};
  }
}

int stride_of(const Call& call, const char* name, const Tensor& tensor) {
  const Rows rows = call.rows(name, tensor, 16);
  call.expect(rows.stride <= INT32_MAX, name, "with less than 2^31 elements from one row to the next", tensor);
  return static_cast<int>(rows.stride);
}

void expect_dim(const Call& call, EntryForm form, const Tensor& norm_weight, int64_t rope_dim) {
  const int64_t dim = norm_weight.size(0), nope = dim - rope_dim;
  call.expect(dim % 4 == 0 && dim >= 4 && dim <= kCompressorMaxDim, "norm_weight",
              "[D] with D a multiple of 4, at most " + std::to_string(kCompressorMaxDim), norm_weight);
  if (form == EntryForm::kKv) {
    call.expect(
        nope >= 64 && nope % 64 == 0 && rope_dim % 4 == 0, "norm_weight",
        "[D] with D - R a multiple of 64 and R of 4 for a packed pool (here R = " + std::to_string(rope_dim) + ")",
        norm_weight);
  } else if (form != EntryForm::kPlain) {
    call.expect(dim == 32 || dim == 64 || dim == 128, "norm_weight", "[D] with D 32, 64 or 128", norm_weight);
  }
}

// An op: `halves` is 2 where groups overlap, `form` is that of a uint8 pool.
struct Variant {
  const char* op;
  int halves;
  EntryForm form;
};

constexpr Variant kCsa{"csa_compress_append", 2, EntryForm::kKv};
constexpr Variant kHca{"hca_compress_append", 1, EntryForm::kKv};
constexpr Variant kIndexPlain{"index_compress_append_plain", 2, EntryForm::kPlain};
constexpr Variant kIndexFp8{"index_compress_append_fp8", 2, EntryForm::kIndexFp8};
constexpr Variant kIndexFp4{"index_compress_append_fp4", 2, EntryForm::kIndexFp4};

template <const Variant& kVariant>
void compress_append(const Tensor& state, const Tensor& pool, const Tensor& kv, const Tensor& score, const Tensor& ape,
                     const Tensor& norm_weight, const Tensor& rope_table, const Tensor& block_table,
                     const Tensor& positions, double eps, int64_t ratio, int64_t page_size) {
  const Call call(kVariant.op, state);
  constexpr int halves = kVariant.halves;
  const bool plain = kVariant.form == EntryForm::kKv && pool.scalar_type() == kFloat32;
  const EntryForm form = plain ? EntryForm::kPlain : kVariant.form;
  call.expect_tensor("norm_weight", norm_weight, {kBfloat16, kFloat32}, {kAny});
  call.expect_tensor("kv", kv, {kFloat32}, {kAny, kAny, kAny});
  const int64_t dim = norm_weight.size(0), width = halves * dim, batch = kv.size(0), tokens = kv.size(1);
  call.expect(ratio >= 1 && halves * ratio <= kCompressorMaxGrid, "state",
              "that of a ratio from 1 to " + std::to_string(kCompressorMaxGrid / halves) + " (here " +
                  std::to_string(ratio) + ")",
              state);
  call.expect(batch <= kCompressorMaxGrid, "kv", "of at most " + std::to_string(kCompressorMaxGrid) + " sequences", kv);
  call.expect(tokens <= INT32_MAX / 2, "kv", "of less than 2^30 rows a sequence", kv);
  call.expect_tensor("state", state, {kFloat32}, {batch, halves * ratio, 2, width});
  call.expect_contiguous("state", state);
  call.rows("state", state, 16);
  call.expect_tensor("kv", kv, {kFloat32}, {batch, tokens, width});
  call.expect_tensor("score", score, {kFloat32}, {batch, tokens, width});
  call.expect_tensor("ape", ape, {kFloat32}, {ratio, width});
  call.expect_contiguous("ape", ape);
  call.rows("ape", ape, 16);
  call.expect_contiguous("norm_weight", norm_weight);
  call.rows("norm_weight", norm_weight, 16);
  const Rope rope = expect_rope(call, rope_table, positions, batch, tokens, dim);
  expect_dim(call, form, norm_weight, rope.dim);
  const bool packed = form != EntryForm::kPlain;
  call.expect(pool.scalar_type() == (packed ? kUint8 : kFloat32), "pool", packed ? "uint8" : "float32", pool);
  const Packed entry = packed_of(form, dim, rope.dim);
  const Pool pages = expect_pool(call, pool, block_table, batch, page_size, entry.entry_bytes, dim, entry.alignment);
  const Compressor compressor{mutable_data<float>(state),
                              data<float>(kv),
                              data<float>(score),
                              stride_of(call, "kv", kv),
                              stride_of(call, "score", score),
                              data<float>(ape),
                              norm_weight.const_data_ptr(),
                              dtype_of(norm_weight),
                              rope,
                              pages,
                              static_cast<int>(batch),
                              static_cast<int>(dim),
                              static_cast<int>(ratio),
                              static_cast<float>(eps)};
  call.check(launch_compress_append(compressor, halves, form, call.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("csa_compress_append", TORCH_BOX(&compress_append<kCsa>));
  m.impl("hca_compress_append", TORCH_BOX(&compress_append<kHca>));
  m.impl("index_compress_append_plain", TORCH_BOX(&compress_append<kIndexPlain>));
  m.impl("index_compress_append_fp8", TORCH_BOX(&compress_append<kIndexFp8>));
  m.impl("index_compress_append_fp4", TORCH_BOX(&compress_append<kIndexFp4>));
}

}  // namespace
}  // namespace dsv4
