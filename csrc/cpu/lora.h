// What shrink and expand share: tokens grouped by task, and a span of a factor laid out for the inner loops.
//
// A unit of work takes a chunk of tokens over a span of positions. The basis of the span is copied once into blocks of
// consecutive memory (rows of a factor lie a power of two apart more often than not, and would share cache sets), small
// enough to stay in the second-level cache, and the tokens pass over it a few at a time. So few tokens that they pass once
// or twice read the basis where it is. What a token alone needs (its row, its task's coefficients) is fetched a block ahead.
//
// A task with one token in the chunk takes the direct form, p+1 products with the shared basis. A task with more has its
// own factor rebuilt for the span first, which costs p products, and then takes one product per token. On a CPU that needs
// fewer operations from two tokens on.
#pragma once

#include "tile.h"

namespace rmm {

// Some of the active tokens (id ≥ 0), which are sorted by task.
constexpr int64_t kChunk = 256;
constexpr int64_t kSpan = 1024;  // positions of a unit of work, at most

// Positions of a unit of work: narrow layers are halved, so that two threads have something to do. Of the width alone: the
// sums of a row do not depend on what else is in the batch.
inline int64_t span_of(int64_t width) {
  if (width > kSpan) return kSpan;
  const int64_t half = (width + 255) / 256 * 128;
  return half < 128 ? 128 : half;
}

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

inline int64_t blocks_of(int64_t positions, int64_t block) { return (positions + block - 1) / block; }

// How many of chunk's tokens from `first` on are of one task.
inline int64_t run_length(const Chunk& chunk, int64_t first) {
  int64_t last = first + 1;
  while (last < chunk.count && chunk.tasks[last] == chunk.tasks[first]) ++last;
  return last - first;
}

// How many tokens from `first` on, at most `most`, are each alone with their task.
inline int64_t singles(const Chunk& chunk, int64_t first, int64_t most) {
  int64_t count = 0;
  while (count < most && first + count < chunk.count && run_length(chunk, first + count) == 1) ++count;
  return count;
}

// `count` values of a row, in memory order and padded with 0 to whole blocks: the tensor itself where it is like that, else
// a copy in `scratch`.
template <class T>
const T* row_of(Dtype dtype, const char* from, int64_t stride, int64_t count, Vec<T>* scratch) {
  if (element_size(dtype) == sizeof(T) && stride == 1 && count % kBlock<T> == 0) return reinterpret_cast<const T*>(from);
  if (count % kBlock<T> != 0) {
    Vec<T>* const last = scratch + count / kBlock<T> * kBlockVecs;
    for (int v = 0; v < kBlockVecs; ++v) last[v] = Vec<T>{};
  }
  load_row<T>(dtype, from, stride, count, scratch);
  return reinterpret_cast<const T*>(scratch);
}

// A factor over a span: blocks of positions, positions innermost, the rest by strides in elements.
template <class T>
struct Panel {
  const T* data;
  int64_t block, component, rank;

  bool in_place;  // not a copy: `block` is kBlock, a row goes on where its block ends

  const T* at(int64_t b, int64_t k, int64_t j = 0) const { return data + b * block + k * component + j * rank; }
};

// Memory that will be read soon, fetched to the first-level cache a few lines at a time from inside the inner loops: the
// rows are far apart, and the hardware's prefetcher starts anew on each; all at once they would wait for each other.
class Ahead {
 public:
  void clear() { rows_ = at_ = 0, lines_ = 0; }

  // The `count` values of a row from `from` on.
  void add(Dtype dtype, const char* from, int64_t stride, int64_t count) {
    if (stride != 1 || rows_ == kRows || count <= 0) return;
    begin_[rows_] = from;
    end_[rows_++] = from + count * element_size(dtype);
    lines_ += (count * element_size(dtype) + 63) / 64;
  }

  // What is there is fetched in `steps` steps.
  void spread(int64_t steps) { step_ = steps > 0 ? (lines_ + steps - 1) / steps : lines_; }

  RMM_INLINE void step() {
    for (int64_t line = 0; line < step_ && at_ < rows_; ++line) {
      __builtin_prefetch(begin_[at_]);
      if ((begin_[at_] += 64) >= end_[at_]) ++at_;
    }
  }

 private:
  static constexpr int kRows = 64;
  const char* begin_[kRows];
  const char* end_[kRows];
  int rows_ = 0, at_ = 0;
  int64_t lines_ = 0, step_ = 0;
};

// A block of a row, all at once. Past the row's end it fetches what is there, which does no harm.
RMM_INLINE void fetch_block(Dtype dtype, const char* from, int64_t stride) {
  if (stride != 1) return;
  const int bytes = element_size(dtype) == 2 ? kBlockBytes / 2 : kBlockBytes;
  for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
}

// The factor [p+1, ., .] over `count` positions from `position` on, copied to `packed` as [block][component][rank]; or, for
// `tokens` that pass over it once or twice, where it is, if that is laid out so. The axes of ranks and positions are given, so
// that lora_a and lora_b are the same to it.
template <class T>
Panel<T> pack(const View& factor, int rank_axis, int position_axis, int64_t position, int64_t count, int64_t tokens,
              Vec<T>* packed) {
  constexpr int W = kLanes<T>;
  const int64_t components = factor.size[0], ranks = factor.size[rank_axis], size = element_size(factor.dtype);
  const int64_t along_rank = factor.stride[rank_axis], along_position = factor.stride[position_axis];
  if (tokens <= 2 * kTokens && size == sizeof(T) && along_position == 1 && count % kBlock<T> == 0) {
    return {reinterpret_cast<const T*>(factor.data) + position, kBlock<T>, factor.stride[0], along_rank, true};
  }
  const T* const data = reinterpret_cast<const T*>(packed);
  const Panel<T> panel{data, components * ranks * kBlock<T>, ranks * kBlock<T>, kBlock<T>, false};
  for (int64_t done = 0; done < count; done += kBlock<T>) {
    const int64_t some = count - done < kBlock<T> ? count - done : kBlock<T>;
    for (int64_t k = 0; k < components; ++k) {
      char* const from = factor.at(k) + (position + done) * along_position * size;
      if (along_position <= along_rank) {
        for (int64_t j = 0; j < ranks; ++j, packed += kBlockVecs) {
          const T* const row = row_of<T>(factor.dtype, from + j * along_rank * size, along_position, some, packed);
          if (row == reinterpret_cast<const T*>(packed)) continue;
          for (int v = 0; v < kBlockVecs; ++v) packed[v] = load(row + v * W);
        }
      } else {
        for (int v = 0; v < kBlockVecs; ++v) {
          const int64_t left = some - v * W;
          const int lanes = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
          Vec<T> tile[W];
          for (int64_t j = 0; j < ranks; j += W) {
            const int64_t rows = ranks - j < W ? ranks - j : W;
            load_tile<T>(factor.dtype, from + (v * W * along_position + j * along_rank) * size, along_position, along_rank,
                         lanes, rows, tile);
            for (int64_t i = 0; i < rows; ++i) packed[(j + i) * kBlockVecs + v] = tile[i];
          }
        }
        packed += ranks * kBlockVecs;
      }
    }
  }
  return panel;
}

// Rows rows of a block of one task's factor: basis[0] + Σ_k c_k ⊙ basis[k + 1], c [p][block].
template <class T, int Rows>
RMM_INLINE void rebuild_rows(const T* basis, int64_t component, int64_t rank, int64_t p, const Vec<T>* c, Vec<T>* factor) {
  for (int v = 0; v < kBlockVecs; ++v) {
    Vec<T> row[Rows];
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) row[j] = load(basis + j * rank + v * kLanes<T>);
    for (int64_t k = 0; k < p; ++k) {
      const T* const from = basis + (k + 1) * component + v * kLanes<T>;
      const Vec<T> weight = c[k * kBlockVecs + v];
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) row[j] += weight * load(from + j * rank);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) factor[j * kBlockVecs + v] = row[j];
  }
}

// One task's factor from the basis, as [block][rank]. `c` is room for p blocks.
template <class T>
Panel<T> rebuild(const Panel<T>& basis, int64_t ranks, const View& coeff, int64_t task, int64_t position, int64_t count,
                 Vec<T>* c, Vec<T>* factor) {
  const int64_t p = coeff.size[1];
  const Panel<T> panel{reinterpret_cast<const T*>(factor), ranks * kBlock<T>, 0, kBlock<T>, false};
  for (int64_t done = 0, b = 0; done < count; done += kBlock<T>, ++b) {
    const int64_t some = count - done < kBlock<T> ? count - done : kBlock<T>;
    for (int64_t k = 0; k < p; ++k) {
      Vec<T>* const to = c + k * kBlockVecs;
      const T* const weights = row_of<T>(coeff.dtype, coeff.at(task, k, position + done), coeff.stride[2], some, to);
      for (int v = 0; v < kBlockVecs; ++v) to[v] = load(weights + v * kLanes<T>);
    }
    int64_t j = 0;
    for (; j + 4 <= ranks; j += 4, factor += 4 * kBlockVecs) {
      rebuild_rows<T, 4>(basis.at(b, 0, j), basis.component, basis.rank, p, c, factor);
    }
    for (; j < ranks; ++j, factor += kBlockVecs) {
      rebuild_rows<T, 1>(basis.at(b, 0, j), basis.component, basis.rank, p, c, factor);
    }
  }
  return panel;
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
