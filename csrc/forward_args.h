// A decoder as `whispers_kernels/cpp/forward.py` lays it out, and the arguments of one step.
#pragma once

#include "args.h"
#include "linear_args.h"

namespace whispers {

struct ForwardLayer {
  const void* attn_norm;  // [hidden]
  const void* mlp_norm;   // [hidden]
  const void* q_norm;     // [dim], or null, as k_norm
  const void* k_norm;     // [dim]
  Packed qkv;             // [(q_heads + 2 kv_heads) dim, hidden]
  Packed out;             // [hidden, q_heads dim]
  Packed gate_up;         // [2 intermediate, hidden], gated
  Packed down;            // [hidden, intermediate]
};

// Rows whose final hidden states somebody reads: of the others the last layer computes keys and values alone.
struct Wanted {
  const int64_t* rows;  // [count], ascending
  int64_t count;        // -1: all rows, and the rest means nothing
  const int32_t* position;  // [count]; this and the rest: as an Attention's, over these rows
  const int32_t* header;
  const int32_t* items;
  const int32_t* parts;
  const int32_t* merge_rows;
  const int32_t* merge_ptr;
  const int32_t* merge_slots;
  int64_t slots;
};

struct Forward {
  const ForwardLayer* layers;  // [count]
  int64_t count;
  const void* norm;          // [hidden], the last one
  void* const* taps;         // [count + 1] where the hidden states before each layer, and the last ones, go; null: nowhere
  float* hidden;             // [rows, hidden] the residual stream, while it runs
  void* out;                 // [rows, hidden], or as many as are wanted: the result
  void* normed;              // [rows, hidden]; this and the next four: room
  void* qkv;                 // [rows, (q_heads + 2 kv_heads) dim]
  void* q;                   // [rows, q_heads, dim]
  void* attended;            // [rows, q_heads, dim]
  void* gated;               // [rows, intermediate]
  const float* inverse;      // [dim / 2] radians a position
  float* angles;             // [2, rows, dim / 2] room for their cosines and sines
  int64_t rows, width, intermediate, weight_dtype;
  int64_t layer_stride;      // bytes from a layer's pages to the next one's, keys and values alike
  double eps;
  EmbedRows embed;           // a plain table, or null there and
  UnpackRows unpack;         // a packed one
  RopeAndStore rope;         // of the first layer, but for its angles
  Attention attention;       // likewise
  Wanted wanted;
};

}  // namespace whispers
