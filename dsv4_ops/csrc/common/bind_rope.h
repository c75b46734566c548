// Checks of a rope table with the positions of an op's tokens, and the view that launchers take. For bind.cpp files.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/bind.h"
#include "common/rope.h"

namespace dsv4 {

// Table [max_pos, R] float32 with R even and at most `largest`, positions [batch, tokens] int32.
inline Rope expect_rope(const Call& call, const Tensor& table, const Tensor& positions, int64_t batch, int64_t tokens,
                        int64_t largest) {
  call.expect_tensor("rope_table", table, {kFloat32}, {kAny, kAny});
  const int64_t dim = table.size(1);
  call.expect(dim % 2 == 0 && dim >= 2 && dim <= largest, "rope_table",
              "[max_pos, R] float32 with R even and at most " + std::to_string(largest), table);
  call.expect(table.size(0) >= 1 || batch * tokens == 0, "rope_table", "of at least one position", table);
  call.expect_contiguous("rope_table", table);
  call.rows("rope_table", table, 8);
  call.expect_tensor("positions", positions, {kInt32}, {batch, tokens});
  const Rows rows = call.rows("positions", positions, 4);
  const int table_rows = static_cast<int>(std::min<int64_t>(table.size(0), INT32_MAX));
  return {data<float>(table), static_cast<int>(dim),    data<int32_t>(positions),
          rows.stride,        static_cast<int>(tokens), table_rows};
}

}  // namespace dsv4
