#include <optional>

#include "common/bind.h"
#include "common/bind_pool.h"
#include "indexer/indexer.h"

namespace dsv4 {
namespace {

constexpr int64_t kMostDim = 512;  // one tile of keys in shared memory

// Queries, keys and positions as every op of the family takes them.
struct Arguments {
  const char* q_name;
  const Tensor& q;
  const Tensor* scale;  // FP4
  const Tensor& w;
  const Tensor& key_pool;
  const Tensor& block_table;
  const Tensor& positions;
  int64_t ratio;
  int64_t page_size;
};

int64_t key_bytes(IndexForm form, int64_t dim) { return form == IndexForm::kFp8 ? dim + 4 : dim / 2 + dim / 32; }

IndexScoring check_scoring(const Call& call, IndexForm form, const Arguments& a) {
  const ScalarType dtype = form == IndexForm::kPlain ? kFloat32 : form == IndexForm::kFp8 ? kE4m3 : kUint8;
  call.expect_tensor("w", a.w, {kFloat32}, {kAny, kAny, kAny});
  const int64_t batch = a.w.size(0), tokens = a.w.size(1), heads = a.w.size(2);
  call.expect(heads >= 1, "w", "[B, S, Hi] with at least one head", a.w);
  call.expect_tensor(a.q_name, a.q, {dtype}, {batch, tokens, heads, kAny});
  const int64_t dim = a.q.size(3) * (form == IndexForm::kFp4 ? 2 : 1);
  const bool fits = dim >= 1 && dim <= kMostDim && (form != IndexForm::kFp4 || dim % 32 == 0);
  call.expect(fits, a.q_name, "of heads of at most 512 channels, in FP4 a multiple of 32", a.q);
  const Rows q = call.rows(a.q_name, a.q, static_cast<int>(a.q.element_size()));
  Rows scales{};
  if (a.scale != nullptr) {
    call.expect_tensor("scale", *a.scale, {kUint8}, {batch, tokens, heads, dim / 32});
    scales = call.rows("scale", *a.scale, 1);
  }
  const Rows w = call.rows("w", a.w, 4);
  call.expect_tensor("positions", a.positions, {kInt32}, {batch, tokens});
  const Rows positions = call.rows("positions", a.positions, 4);
  call.expect_rows("key_pool", a.key_pool, {form == IndexForm::kPlain ? kFloat32 : kUint8});
  const Pool keys = expect_pool(call, a.key_pool, a.block_table, batch, a.page_size, key_bytes(form, dim), dim,
                                form == IndexForm::kFp8 ? 4 : 1);
  call.expect(a.ratio >= 1 && a.ratio <= INT32_MAX, "positions",
              "counted in entries of at least one token (ratio here " + std::to_string(a.ratio) + ")", a.positions);
  call.expect(batch * tokens <= INT32_MAX / 4096, "w", "of at most 524287 tokens (split the chunk)", a.w);
  return {static_cast<const uint8_t*>(a.q.const_data_ptr()),
          q.stride * static_cast<int64_t>(a.q.element_size()),
          a.scale == nullptr ? nullptr : data<uint8_t>(*a.scale),
          scales.stride,
          data<float>(a.w),
          w.stride,
          keys,
          data<int32_t>(a.positions),
          positions.stride,
          static_cast<int>(batch),
          static_cast<int>(tokens),
          static_cast<int>(heads),
          static_cast<int>(dim),
          static_cast<int>(a.ratio)};
}

Tensor scores_of(const char* op, IndexForm form, const Arguments& arguments, Tensor scores) {
  const Call call(op, arguments.q);
  const IndexScoring scoring = check_scoring(call, form, arguments);
  call.expect_tensor("scores", scores, {kFloat32}, {scoring.batch, scoring.tokens, scoring.capacity()});
  call.expect_contiguous("scores", scores);
  call.check(launch_index_scores(form, scoring, mutable_data<float>(scores), call.stream()));
  return scores;
}

Tensor topk_of(const char* op, IndexForm form, const Arguments& arguments, int64_t k, Tensor indices,
               const std::optional<Tensor>& workspace) {
  const Call call(op, arguments.q);
  const IndexScoring scoring = check_scoring(call, form, arguments);
  call.expect(k >= 0 && k <= INT32_MAX, "indices", "for a k that is not negative (here " + std::to_string(k) + ")",
              indices);
  call.expect_tensor("indices", indices, {kInt32}, {scoring.batch, scoring.tokens, k});
  call.expect_contiguous("indices", indices);
  if (indices.numel() == 0) return indices;
  const int64_t row_words = index_topk_row_words(scoring.capacity(), static_cast<int>(k));
  const std::string wanted = "contiguous int32 with at least " + std::to_string(row_words) +
                             " elements at a multiple of 16 bytes, from the op's workspace function";
  call.expect(workspace.has_value(), "workspace", wanted, indices);
  call.expect_tensor("workspace", *workspace, {kInt32}, {kAny});
  const bool aligned = reinterpret_cast<uintptr_t>(workspace->const_data_ptr()) % 16 == 0;
  const bool fits = workspace->is_contiguous() && workspace->numel() >= row_words;
  call.expect(fits && aligned, "workspace", wanted, *workspace);
  call.check(launch_index_topk(form, scoring, static_cast<int>(k), mutable_data<uint32_t>(*workspace),
                               workspace->numel(), mutable_data<int32_t>(indices), call.stream()));
  return indices;
}

Tensor index_scores_plain(const Tensor& q, const Tensor& w, const Tensor& key_pool, const Tensor& block_table,
                          const Tensor& positions, int64_t ratio, int64_t page_size, Tensor scores) {
  return scores_of("index_scores_plain", IndexForm::kPlain,
                   {"q", q, nullptr, w, key_pool, block_table, positions, ratio, page_size}, scores);
}

Tensor index_scores_fp8(const Tensor& q8, const Tensor& w, const Tensor& key_pool, const Tensor& block_table,
                        const Tensor& positions, int64_t ratio, int64_t page_size, Tensor scores) {
  return scores_of("index_scores_fp8", IndexForm::kFp8,
                   {"q8", q8, nullptr, w, key_pool, block_table, positions, ratio, page_size}, scores);
}

Tensor index_scores_fp4(const Tensor& q4, const Tensor& scale, const Tensor& w, const Tensor& key_pool,
                        const Tensor& block_table, const Tensor& positions, int64_t ratio, int64_t page_size,
                        Tensor scores) {
  return scores_of("index_scores_fp4", IndexForm::kFp4,
                   {"q4", q4, &scale, w, key_pool, block_table, positions, ratio, page_size}, scores);
}

Tensor index_topk_plain(const Tensor& q, const Tensor& w, const Tensor& key_pool, const Tensor& block_table,
                        const Tensor& positions, int64_t ratio, int64_t page_size, int64_t k, Tensor indices,
                        std::optional<Tensor> workspace) {
  return topk_of("index_topk_plain", IndexForm::kPlain,
                 {"q", q, nullptr, w, key_pool, block_table, positions, ratio, page_size}, k, indices, workspace);
}

Tensor index_topk_fp8(const Tensor& q8, const Tensor& w, const Tensor& key_pool, const Tensor& block_table,
                      const Tensor& positions, int64_t ratio, int64_t page_size, int64_t k, Tensor indices,
                      std::optional<Tensor> workspace) {
  return topk_of("index_topk_fp8", IndexForm::kFp8,
                 {"q8", q8, nullptr, w, key_pool, block_table, positions, ratio, page_size}, k, indices, workspace);
}

Tensor index_topk_fp4(const Tensor& q4, const Tensor& scale, const Tensor& w, const Tensor& key_pool,
                      const Tensor& block_table, const Tensor& positions, int64_t ratio, int64_t page_size, int64_t k,
                      Tensor indices, std::optional<Tensor> workspace) {
  return topk_of("index_topk_fp4", IndexForm::kFp4,
                 {"q4", q4, &scale, w, key_pool, block_table, positions, ratio, page_size}, k, indices, workspace);
}

STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, m) {
  m.impl("index_scores_plain.out", TORCH_BOX(&index_scores_plain));
  m.impl("index_scores_fp8.out", TORCH_BOX(&index_scores_fp8));
  m.impl("index_scores_fp4.out", TORCH_BOX(&index_scores_fp4));
  m.impl("index_topk_plain.out", TORCH_BOX(&index_topk_plain));
  m.impl("index_topk_fp8.out", TORCH_BOX(&index_topk_fp8));
  m.impl("index_topk_fp4.out", TORCH_BOX(&index_topk_fp4));
}

}  // namespace
}  // namespace dsv4
