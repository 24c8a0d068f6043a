// The direct form of the forward: tokens of tasks that have too few of them in the chunk to be restored for. Several tokens'
// factors are restored in registers at once, so that what is loaded of the basis serves them all.
//
// Up to kHeld components (P of them, 1 to kHeld), a step of positions is finished for all ranks before the next one: its
// coefficients stay in registers, and rows of x, of y and of coefficients are read where they lie, each once.
// Of more (P = 0), four ranks at a time go over a piece of positions, small enough for the basis to stay in the first-level
// cache while groups of tokens take turns, and what is the tokens' to stay there for all ranks. That is copied: rows lie a
// power of two apart more often than not, and would share cache sets.
#pragma once

#include "lora.h"

namespace rmm {
namespace RMM_ISA {

// Tokens abreast: as many as leave their coefficients and factors of a rank, or their factors of four, in registers.
constexpr int abreast(int p) { return p == 0 ? kTokens : kBytes == 64 ? 9 - p : p == 1 ? 4 : 3; }
template <class E, int P>
constexpr int kAbreast = abreast(P) / kParts<E>;

// Tokens of a group, and positions of a piece.
template <class E, int P>
constexpr int64_t kLone = P == 0 ? 12 : kAbreast<E, P>;
constexpr int64_t kPiece = 64;

// Positions of a segment of `rows` rows of the basis, all components': half of kSegment where that brings them into the
// first-level cache, and most of the chunk's tokens take the direct form, in which every group reads all of them.
template <class E, int P>
int64_t segment_of(const Chunk& chunk, int64_t rows, int64_t width) {
  constexpr int64_t most = 48 << 10, comfortable = 32 << 10;  // bytes
  const int64_t bytes = rows * kSegment<E> * static_cast<int64_t>(sizeof(E));
  int64_t segment = kSegment<E>;
  if (P > 0 && bytes > comfortable && bytes / 2 <= most) {
    int64_t direct = 0, run;
    for (int64_t i = 0; i < chunk.count; i += run) {
      run = run_length(chunk, i);
      if (run < chunk.restored) direct += run;
    }
    if (2 * direct > chunk.count) segment /= 2;
  }
  return width < segment ? width : segment;
}

// Rows of the coefficients of a group at a segment, [P, tokens]: themselves or copies, `apart` elements apart.
template <class E>
void coefficient_rows(const View& coeff, const Chunk& chunk, const Group& group, int64_t position, int64_t count, E* copies,
                      int64_t apart, const E** rows) {
  for (int64_t k = 0; k < coeff.size[1]; ++k) {
    for (int64_t t = group.first; t < group.first + group.count; ++t, copies += apart) {
      *rows++ = row_of<E>(coeff.at(chunk.tasks[t], k, position), coeff.stride[2], count, copies);
    }
  }
}

// Those at a step, in registers. Meanwhile it asks for what comes after them.
template <class E, int Tokens, int P>
struct Coefficients {
  Wide<E> value[P][Tokens];

  RMM_INLINE Coefficients(const E* const* rows, int64_t at) {
#pragma GCC unroll 8
    for (int k = 0; k < P; ++k) {
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        value[k][t] = widen_step<E>(rows[k * Tokens + t] + at);
        __builtin_prefetch(rows[k * Tokens + t] + at + kAhead, 0, 2);
      }
    }
  }

  // As restore.
  template <int Rows>
  RMM_INLINE void restored(const Panel<E>& panel, const E* basis, Wide<E> (*w)[Rows]) const {
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) {
      w[0][j] = widen_step<E>(basis + j * panel.rank);
#pragma GCC unroll 8
      for (int t = 1; t < Tokens; ++t) w[t][j] = w[0][j];
    }
#pragma GCC unroll 8
    for (int k = 0; k < P; ++k) {
      basis += panel.component;
#pragma GCC unroll 4
      for (int j = 0; j < Rows; ++j) {
        const Wide<E> from = widen_step<E>(basis + j * panel.rank);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
          for (int q = 0; q < kParts<E>; ++q) w[t][j].part[q] += value[k][t].part[q] * from.part[q];
        }
      }
    }
  }
};

// kernel<E, P> of so many components.
#define RMM_OF_COMPONENTS(p, E, kernel, ...)             \
  switch (p) {                                           \
    case 1:                                              \
      return kernel<E, 1>(__VA_ARGS__);                  \
    case 2:                                              \
      return kernel<E, 2>(__VA_ARGS__);                  \
    case 3:                                              \
      return kernel<E, 3>(__VA_ARGS__);                  \
    case 4:                                              \
      return kernel<E, kHeld >= 4 ? 4 : 0>(__VA_ARGS__); \
    case 5:                                              \
      return kernel<E, kHeld >= 5 ? 5 : 0>(__VA_ARGS__); \
    default:                                             \
      return kernel<E, 0>(__VA_ARGS__);                  \
  }

}  // namespace RMM_ISA
}  // namespace rmm
