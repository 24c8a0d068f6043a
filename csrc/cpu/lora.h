// What shrink and expand share: tokens grouped by task, and a factor's block of positions laid out for the inner loops.
//
// Both work through blocks of positions small enough that a block of the basis stays in the first-level cache while all
// tokens of a chunk pass over it. A task with one token in the chunk takes the direct form, p+1 products with the shared
// basis; a task with more has its own factor rebuilt for the block first, which costs p products, and then takes one
// product per token. On a CPU the rebuilt form needs fewer operations from two tokens on.
#pragma once

#include "tile.h"

namespace rmm {

// Tokens of one task, order[begin … end).
struct Run {
  int64_t task, begin, end;
};

// The active tokens (id ≥ 0) sorted by task, at most kChunk of them.
constexpr int64_t kChunk = 64;
struct Chunk {
  const int64_t* order;  // rows of x and y
  const int64_t* tasks;  // task of order[i]
  int64_t count;
};

namespace RMM_ISA {

constexpr int kBlockBytes = 512;
template <class T>
constexpr int kBlock = kBlockBytes / static_cast<int>(sizeof(T));  // positions in a block
constexpr int kBlockVecs = kBlockBytes / kBytes;

// Tokens an inner loop takes at once: as many as leave their sums in registers.
constexpr int kTokens = kBytes == 64 ? 6 : 3;

// How many of chunk's tokens from `first` on are of one task.
inline int64_t run_length(const Chunk& chunk, int64_t first) {
  int64_t last = first + 1;
  while (last < chunk.count && chunk.tasks[last] == chunk.tasks[first]) ++last;
  return last - first;
}

// A block of a factor: row j of component k is `row_stride` and `component_stride` elements on, positions innermost.
template <class T>
struct Panel {
  const T* data;
  int64_t row_stride, component_stride;

  const T* at(int64_t k, int64_t j) const { return data + k * component_stride + j * row_stride; }
};

// Rows first … first + rows of every component of factor [p+1, ., .] at `count` positions from `position` on. The axes of
// ranks and positions are given, so that lora_a and lora_b are the same to it. Points into the factor where that is laid
// out so already, else fills `scratch`, components × rows × kBlockVecs.
template <class T>
Panel<T> panel_of(const View& factor, int rank_axis, int position_axis, int64_t first, int64_t rows, int64_t position,
                  int64_t count, Vec<T>* scratch) {
  const int64_t components = factor.size[0];
  const int64_t along_rank = factor.stride[rank_axis], along_position = factor.stride[position_axis];
  const int64_t offset = first * along_rank + position * along_position, size = element_size(factor.dtype);
  if (size == sizeof(T) && along_position == 1 && count == kBlock<T>) {
    return {reinterpret_cast<const T*>(factor.data) + offset, along_rank, factor.stride[0]};
  }
  constexpr int W = kLanes<T>;
  for (int64_t k = 0; k < components; ++k) {
    char* const from = factor.at(k) + offset * size;
    Vec<T>* const to = scratch + k * rows * kBlockVecs;
    if (along_position <= along_rank) {
      for (int64_t j = 0; j < rows; ++j) {
        for (int v = 0; v < kBlockVecs; ++v) to[j * kBlockVecs + v] = Vec<T>{};
        load_row<T>(factor.dtype, from + j * along_rank * size, along_position, count, to + j * kBlockVecs);
      }
    } else {
      for (int v = 0; v < kBlockVecs; ++v) {
        const int64_t left = count - v * W;
        const int lanes = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
        Vec<T> tile[16];
        for (int64_t j = 0; j < rows; j += 16) {
          const int64_t some = rows - j < 16 ? rows - j : 16;
          char* const at = from + (v * W * along_position + j * along_rank) * size;
          load_tile<T>(factor.dtype, at, along_position, along_rank, lanes, some, tile);
          for (int64_t i = 0; i < some; ++i) to[(j + i) * kBlockVecs + v] = tile[i];
        }
      }
    }
  }
  return {reinterpret_cast<const T*>(scratch), kBlock<T>, rows * kBlock<T>};
}

// A row's values at a block of positions; points into the tensor where it can, else fills `scratch`.
template <class T>
const T* block_of(Dtype dtype, const char* from, int64_t stride, int64_t count, Vec<T>* scratch) {
  if (element_size(dtype) == sizeof(T) && stride == 1 && count == kBlock<T>) return reinterpret_cast<const T*>(from);
  for (int v = 0; v < kBlockVecs; ++v) scratch[v] = Vec<T>{};
  load_row<T>(dtype, from, stride, count, scratch);
  return reinterpret_cast<const T*>(scratch);
}

// The factor of one task at a block of positions: factor[j] = panel[0][j] + Σ_k c_k ⊙ panel[k + 1][j].
template <class T>
void rebuild(const Panel<T>& panel, int64_t rows, const View& coeff, int64_t task, int64_t position, int64_t count, Vec<T>* c,
             Vec<T>* factor) {
  const int64_t p = coeff.size[1];
  for (int64_t j = 0; j < rows; ++j) {
    for (int v = 0; v < kBlockVecs; ++v) factor[j * kBlockVecs + v] = load(panel.at(0, j) + v * kLanes<T>);
  }
  for (int64_t k = 0; k < p; ++k) {
    const T* const weights = block_of<T>(coeff.dtype, coeff.at(task, k, position), coeff.stride[2], count, c);
    Vec<T> weight[kBlockVecs];
    for (int v = 0; v < kBlockVecs; ++v) weight[v] = load(weights + v * kLanes<T>);
    for (int64_t j = 0; j < rows; ++j) {
      const T* const from = panel.at(k + 1, j);
      for (int v = 0; v < kBlockVecs; ++v) factor[j * kBlockVecs + v] += weight[v] * load(from + v * kLanes<T>);
    }
  }
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <cstddef>
#include <vector>

#include "../common/tensor.h"

namespace rmm {

// Every active token, sorted by task (stable), cut into chunks.
struct TokenPlan {
  std::vector<int64_t> order, tasks;
  int64_t chunks() const { return (static_cast<int64_t>(order.size()) + kChunk - 1) / kChunk; }
  Chunk chunk(int64_t i) const {
    const int64_t left = static_cast<int64_t>(order.size()) - i * kChunk;
    return {order.data() + i * kChunk, tasks.data() + i * kChunk, left < kChunk ? left : kChunk};
  }
};

// Checks the ids, so it comes before anything is written.
TokenPlan plan_tokens(const Ids& task_ids, int64_t n);

// u [T, r], contiguous, of the accumulator's dtype; rows of inactive tokens are left alone.
void run_shrink(const TokenPlan& plan, const View& x, const View& basis_a, const View& coeff_a, const View& u);
void run_expand(const TokenPlan& plan, const View& y, const View& u, const View& basis_b, const View& coeff_b,
                const View& scaling);

void check_shrink(const View& x, const View& basis_a, const View& coeff_a, const Ids& task_ids);
void check_expand(const View& y, const View& basis_b, const View& coeff_b, const Ids& task_ids, const View& scaling);

}  // namespace rmm
#endif
