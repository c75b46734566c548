// The rotation of an op's tokens as launchers see it. No torch header, no device code.
#pragma once

#include <cstdint>

namespace dsv4 {

struct Rope {
  const float* table;        // [max_pos, dim]: (cos, sin) of the pairs
  int dim;                   // rotated channels, the last of a row
  const int32_t* positions;  // [B, tokens], -1: no token
  int64_t stride;            // elements from one sequence to the next
  int tokens;                // rows of a sequence
  int rows;                  // max_pos
};

}  // namespace dsv4
