// Packed weights, and the arguments of a linear over them, as the Python side (`whispers_kernels/cpp/linear.py`) lays them out.
//
// A word is 32 bits of one output: one float32, two neighbours in depth of bf16, or four of int8; a matrix [outputs, depth] has
// steps = ceil(depth / numbers a word) words an output, zeros behind the end. Of four int8 the middle two have changed places: the even
// bytes, widened, then meet two neighbours of x, and the odd ones the next two. Outputs come in panels of 48, the last one narrower (a
// multiple of 16): panel p holds words [steps, 48], so that a thread reads its panels as one stream, and one load meets one word of x.
// In a gated matrix every 16 outputs are 8 gates and the 8 ups of the same index.
//
// Short weights are bf16 in 12 bits, exactly. The high bytes of a matrix (sign, 7 bits of the exponent) are nearly all among the 16
// commonest: each is a code of 4 bits, the low byte stays, and the few weights without a code are 0 there and in a list beside it. Four
// steps of a panel lie together as [3, 48] words: codes, low bytes of the first two steps, of the other two. Byte i of 16 outputs' 64 is
// output i / 16 * 4 + i % 8 / 2, step i / 8 % 2, number i % 2; a code is the low half of that byte for the first two steps. So two unpackings
// of low and high bytes give two steps' words. A last group's steps behind the end are zeros.
//
// Grid weights are bf16 that come from 4 or 8 bits, exactly (but for the sign of a zero, which no sum shows): 32 neighbours in depth of an
// output are bf16(scale * code + minimum), scale and minimum float16 (blocks of GGUF's Q4_1; of Q4_0, whose minimum is -8 scales; of Q8_0,
// -128). Sixteen steps of a panel lie together as [1 + bits, 48] words. Of 16 outputs the first are the scales and behind them the minima, the
// next bits / 2 codes of the outputs 0 to 7, the last of 8 to 15: word i has those of output i / 2, number i % 2, of 32 / bits steps, the first
// in its lowest bits. So what one vector unpacks lies as tiles want it.
#pragma once

#include <cstdint>

namespace whispers {

constexpr int64_t kOutputs = 16;                      // outputs come in multiples of this
constexpr int64_t kPanelBlocks = 3;                   // 8 rows x 3 vectors: 24 accumulators, 3 weights, 1 of x, of AVX-512's 32 registers
constexpr int64_t kPanelOutputs = kPanelBlocks * kOutputs;

enum WeightKind : int64_t { kFloatWeights = 0, kBf16Weights = 1, kInt8Weights = 2, kShortWeights = 3, kGrid4Weights = 4, kGrid8Weights = 5 };

// A short weight that has no code: a word in which the other number is 0.
struct Rare {
  int32_t output;  // of its block of kOutputs
  int32_t step;
  uint32_t word;
};

struct Packed {
  const float* words;  // the panels, one after the other
  const float* scale;  // [blocks * 16] of int8 weights: weight = number * scale
  const float* bias;   // [blocks * 16], or null
  const uint8_t* highs;       // [16] of short weights: the high bytes that their codes stand for, 0 first
  const Rare* rare;           // of short weights, block by block, each in the order of steps
  const int32_t* rare_begin;  // [blocks + 1] in `rare`
  int64_t outputs;     // of the matrix before padding; of a gated one, gates and ups together
  int64_t depth;
  int64_t kind;
  int64_t gated;  // y[i] = silu(gate[i]) * up[i]: outputs / 2 columns
};

struct Linear {
  Packed weights;
  const void* x;         // [rows, depth]
  const void* residual;  // [rows, columns] in out's dtype, added to the result; may be `out`; or null, as of a gated matrix
  void* out;             // [rows, columns]
  const Packed* next;    // the matrix that is read after this one: each thread fetches the beginning of its share meanwhile; or null
  int64_t rows, x_row, residual_row, out_row, x_dtype, out_dtype;
};

struct Likeliest {
  Linear head;         // the product that makes float32 logits, without its result; of no outputs: they are there
  const void* logits;  // [rows, vocabulary], or null
  int64_t* tokens;     // [rows]
  float* logprobs;     // [rows]
  int64_t rows, vocabulary, row_stride, dtype;
};

struct Shorten {
  const uint32_t* words;  // the panels of bf16 weights
  const uint8_t* codes;   // [256] of the high bytes; 16: none
  uint8_t* out;           // the panels of short ones
  Rare* rare;             // [blocks, room]
  int32_t* count;         // [blocks] of those without a code; where it is more than `room`, the rest of them is lost
  int64_t outputs, depth, room;
};

struct FitGrid {
  const uint32_t* words;  // the panels of bf16 weights
  uint32_t* out;          // the panels of grid weights
  int32_t* fits;          // [panels] 1: all of its weights lie on grids; where a panel's don't, those of others may not have been looked at
  int64_t outputs, depth, bits;
};

struct UnpackRows {
  Packed weights;      // as a table [outputs, depth], not gated
  const int64_t* ids;  // [rows]; from `outputs` on, rows of `soft`
  const void* soft;    // [*, depth], or null
  void* out;           // [rows, depth]
  int64_t rows, soft_row, soft_dtype, out_dtype;
};

}  // namespace whispers
