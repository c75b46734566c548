// A paged pool as launchers see it: dsv4_ops/ops/pages.py. No torch header, no device code.
#pragma once

#include <cstdint>

namespace dsv4 {

struct Pool {
  uint8_t* data;         // page p starts at data + p * page_stride
  int64_t page_stride;   // bytes
  int page_size;         // entries of a page
  bool plain;            // fp32 entries; else packed
  const int32_t* table;  // [B, max_pages]: pages of a sequence
  int64_t table_stride;  // elements from one sequence to the next
  int max_pages;         // of a sequence
};

}  // namespace dsv4
