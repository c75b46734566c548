// Checks of a paged pool with its block table, and the view that launchers take. For bind.cpp files.
#pragma once

#include "common/bind.h"
#include "common/pool.h"

namespace dsv4 {

// Pool [pages, page stride] uint8 with `packed_bytes` bytes an entry, or float32 with `dim` values an entry, and its
// block table [batch, max_pages] int32. Pages must start at multiples of `alignment` bytes (16 in a plain pool).
inline Pool expect_pool(const Call& call, const Tensor& pool, const Tensor& block_table, int64_t batch,
                        int64_t page_size, int64_t packed_bytes, int64_t dim, int alignment) {
  const bool plain = pool.scalar_type() == kFloat32;
  const auto element = static_cast<int64_t>(pool.element_size());
  call.expect(page_size >= 1, "pool", "read with a page_size of at least 1 (here " + std::to_string(page_size) + ")",
              pool);
  const int64_t page = page_size * (plain ? dim : packed_bytes);
  call.expect_rows("pool", pool, {kUint8, kFloat32});
  call.expect(pool.dim() == 2 && pool.size(1) >= page, "pool",
              "[pages, page stride >= " + std::to_string(page) + "] uint8 (packed) or float32 (plain)", pool);
  const Rows pages = call.rows("pool", pool, plain ? 16 : alignment);
  call.expect_tensor("block_table", block_table, {kInt32}, {batch, kAny});
  const Rows tables = call.rows("block_table", block_table, 4);
  const bool reachable = tables.width >= 1 && tables.width * page_size <= INT32_MAX;
  call.expect(reachable || batch == 0, "block_table", "at least one page and at most 2^31 - 1 entries a sequence",
              block_table);
  return {static_cast<uint8_t*>(pool.mutable_data_ptr()),
          pages.stride * element,
          static_cast<int>(page_size),
          plain,
          data<int32_t>(block_table),
          tables.stride,
          static_cast<int>(tables.width)};
}

}  // namespace dsv4
