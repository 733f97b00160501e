// The arguments of every operation, as the Python side packs them: fields of 8 bytes in this order. Sizes and strides count elements.
#pragma once

#include <cstdint>

namespace whispers {

struct EmbedRows {
  const int64_t* ids;  // [rows]; from `vocabulary` on, rows of `soft`
  const void* table;   // [vocabulary, hidden]
  const void* soft;    // [*, hidden], or null
  void* out;           // [rows, hidden]
  int64_t rows, vocabulary, hidden, table_row, soft_row, dtype, soft_dtype, out_dtype;
};

struct RmsNorm {
  const void* x;         // [rows, width]
  const void* residual;  // the same, or null
  const void* weight;    // [width]
  void* out;             // [rows, width]
  void* total;           // [rows, width] x + residual, where there is one
  int64_t rows, width, x_row, residual_row, dtype, weight_dtype;
  double eps;
};

// Strides of pages [N, page_size, kv_heads, dim]; the last is 1. Or pages are in panels, as the matrix products of attention want them, in words
// of n neighbours (two bf16, one float32): keys [N, kv_heads, dim / n, page_size, n], values [N, kv_heads, page_size / n, dim, n]; then
// `token` means nothing, page_size is 16, 32 or 64 and dim a multiple of 16.
struct PageLayout {
  int64_t page, token, head;
};

struct Attention {
  const void* q;        // [rows, q_heads, dim]
  const void* k_pages;  // [N, page_size, kv_heads, dim]
  const void* v_pages;  // the same
  const float* k_scale;  // [N, page_size, kv_heads], for fp8 pages
  const float* v_scale;  // the same
  void* out;             // [rows, q_heads, dim]
  float* lse;            // [rows, q_heads], or null
  const int32_t* position;  // [rows]; this and the next four: of the plan
  const int32_t* page_ptr;
  const int32_t* pages;
  const int32_t* length;
  const int32_t* key_begin;
  const int32_t* header;  // items, rows to merge; this and the rest: of the schedule
  const int32_t* items;   // [items, 6] row_begin, row_end, part_begin, part_end, slot, in_place
  const int32_t* parts;   // [*, 3] segment, first key, key after the last
  const int32_t* merge_rows;
  const int32_t* merge_ptr;
  const int32_t* merge_slots;
  int64_t q_heads, kv_heads, dim, page_size, tile_rows, slots;
  int64_t q_row, q_head;
  PageLayout k_layout, v_layout;
  int64_t dtype, page_dtype;
  int64_t in_panels;  // how pages lie
  int64_t window;  // 0: none
  double scale;
  double softcap;  // 0: none
};

struct RopeAndStore {
  const void* q;            // [rows, q_heads, dim]
  const void* k;            // [rows, kv_heads, dim]
  const void* v;            // the same
  const float* cos;         // [rows, dim / 2]
  const float* sin;         // the same
  const int64_t* slots;     // [rows]; -1: not stored
  void* out;                // [rows, q_heads, dim]
  void* k_pages;            // [N, page_size, kv_heads, dim]
  void* v_pages;            // the same
  float* k_scale;           // [N, page_size, kv_heads], for fp8 pages
  float* v_scale;           // the same
  int64_t rows, q_heads, kv_heads, dim, page_size, q_row, q_head, k_row, k_head, v_row, v_head, angle_row;
  PageLayout k_layout, v_layout;
  int64_t dtype, page_dtype;
  int64_t in_panels;  // how pages lie
};

struct SiluMul {
  const void* gate_up;  // [rows, 2 width], gate first
  void* out;            // [rows, width]
  int64_t rows, width, row_stride, dtype;
};

enum PoolRule : int64_t { kMixture = 0, kProduct = 1 };

struct PoolLogits {
  const void* logits;        // [rows, vocabulary]
  const float* weights;      // [rows]; a row of weight 0 is left out
  const int32_t* group_ptr;  // [groups + 1]
  float* out;                // [groups, vocabulary]
  int64_t rows, vocabulary, groups, row_stride, dtype, rule;
};

}  // namespace whispers
