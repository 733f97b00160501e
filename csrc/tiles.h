// AMX: products of tiles of 16 rows by 16 words, pairs of bf16 that meet pairs and are summed in float32, or four int8 that meet four.
//
// A tile of A is 16 rows and 16 words of their depth, of B 16 steps of depth and 16 columns, of C 16 rows and columns: the words of both operands
// lie as vectors want them, too. One instruction adds all of A B to C in 16 cycles, whatever the tiles' heights are; its sum over a tile's depth
// does not depend on other rows.
#pragma once

#include "simd.h"

#if WHISPERS_LEVEL >= 3

namespace whispers::WHISPERS_ISA {

constexpr int64_t kTile = 16;  // rows, columns, and words of depth

// What a thread's eight tiles are: 64 bytes of all rows, but of fewer rows in those that hold A and C, the first `operands`, where less than a whole
// row of tiles is computed. While it lives, the thread has tiles, which make its context switches dearer.
class Tiles {
 public:
  Tiles() = default;
  explicit Tiles(int64_t rows, int operands = 5) : operands_(operands) { set(rows); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // For products of so many rows. Another number of them, under 16, takes 200 cycles.
  void set(int64_t rows) {
    rows = smaller(rows, kTile);
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.bytes[i] = 64;
      shape.rows[i] = static_cast<uint8_t>(i < operands_ ? rows : kTile);
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }

 private:
  int64_t rows_ = 0;
  int operands_ = 5;
};

// The compiler's own intrinsics do not say that they read memory (gcc 12): stores could come after them.
template <int tile>
inline void load_tile(const float* from, int64_t bytes_a_row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes_a_row), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(float* to, int64_t bytes_a_row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes_a_row), "i"(tile) : "memory");
}
template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// c += a b
template <int c, int a, int b>
inline void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// The same of four int8 a word, a's with a sign or without, summed in int32.
template <int c, int a, int b>
inline void multiply_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
inline void multiply_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// C of kTall by kWide tiles, in the first tiles: 1 by 4 at most, or 2 by 3, so that operands are left room for. Tile (i, j) is C j * kTall + i.
template <int kTall, int kWide, class F>
inline void each_tile(F&& f) {
  static_assert(kTall * kWide <= 6 && (kTall == 2 || kWide <= 4));
  const auto column = [&](auto j) {
    f(Number<0>{}, j, Number<kTall * j.value>{});
    if constexpr (kTall == 2) f(Number<1>{}, j, Number<kTall * j.value + 1>{});
  };
  column(Number<0>{});
  if constexpr (kWide > 1) column(Number<1>{});
  if constexpr (kWide > 2) column(Number<2>{});
  if constexpr (kWide > 3) column(Number<3>{});
}

// Adds one tile's depth: A's rows of tiles at a[i], B's columns of tiles at b[j]. The two rows of tiles meet a column in turn, each loaded anew
// where no tile is left to keep it: a load takes half as long as a product.
template <int kTall, int kWide>
inline void multiply_tiles(const float* const* a, int64_t a_bytes, const float* const* b, int64_t b_bytes) {
  if constexpr (kTall == 1) {
    load_tile<4>(a[0], a_bytes);
    load_tile<5>(b[0], b_bytes);
    multiply_tile<0, 4, 5>();
    if constexpr (kWide > 1) load_tile<6>(b[1], b_bytes), multiply_tile<1, 4, 6>();
    if constexpr (kWide > 2) load_tile<7>(b[2], b_bytes), multiply_tile<2, 4, 7>();
    if constexpr (kWide > 3) load_tile<5>(b[3], b_bytes), multiply_tile<3, 4, 5>();
  } else {
    load_tile<6>(a[0], a_bytes);
    load_tile<7>(b[0], b_bytes);
    multiply_tile<0, 6, 7>();
    if constexpr (kWide == 1) {
      load_tile<5>(a[1], a_bytes), multiply_tile<1, 5, 7>();
    } else if constexpr (kWide == 2) {
      load_tile<5>(a[1], a_bytes), multiply_tile<1, 5, 7>();
      load_tile<4>(b[1], b_bytes), multiply_tile<2, 6, 4>();
      multiply_tile<3, 5, 4>();
    } else {
      load_tile<6>(a[1], a_bytes), multiply_tile<1, 6, 7>();
      load_tile<7>(b[1], b_bytes), multiply_tile<3, 6, 7>();
      load_tile<6>(a[0], a_bytes), multiply_tile<2, 6, 7>();
      load_tile<7>(b[2], b_bytes), multiply_tile<4, 6, 7>();
      load_tile<6>(a[1], a_bytes), multiply_tile<5, 6, 7>();
    }
  }
}

// Adds one tile's depth of int8: 16 rows' high and low bytes, each with sums of its own, by up to 3 columns of tiles. Column j's are C 2 j and 2 j + 1.
// `meanwhile` is called after every product.
template <int kWide, class Meanwhile>
inline void multiply_bytes(const float* high, const float* low, int64_t a_bytes, const float* b, int64_t b_bytes, Meanwhile&& meanwhile) {
  static_assert(kWide <= 3);
  load_tile<6>(high, a_bytes), load_tile<7>(b, b_bytes);
  multiply_signed<0, 6, 7>(), meanwhile();
  load_tile<6>(low, a_bytes), multiply_unsigned<1, 6, 7>(), meanwhile();
  if constexpr (kWide > 1) {
    load_tile<7>(b + kTile, b_bytes), multiply_unsigned<3, 6, 7>(), meanwhile();
    load_tile<6>(high, a_bytes), multiply_signed<2, 6, 7>(), meanwhile();
  }
  if constexpr (kWide > 2) {
    load_tile<7>(b + 2 * kTile, b_bytes), multiply_signed<4, 6, 7>(), meanwhile();
    load_tile<6>(low, a_bytes), multiply_unsigned<5, 6, 7>(), meanwhile();
  }
}

}  // namespace whispers::WHISPERS_ISA

#endif
