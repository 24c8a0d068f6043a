// What shrink and expand share: tokens grouped by task, and a task's factor restored from the basis.
//
// A token's update is that of its task's restored factors, w = basis[0] + Σ_k c_k ⊙ basis[k + 1], which are never whole
// anywhere: a task with few tokens in the chunk has them made in registers and used at once (the direct form, lora_direct.h), a
// task with more has a segment of them kept in the cache for all of its tokens (the restored form). Both round alike, in the
// same order, so a row of the result keeps every bit whatever else is in the batch, and which form a task takes is a matter of
// speed alone: kRestored below.
//
// A unit of work takes a chunk of tokens over some positions (expand) or some ranks (shrink), segment by segment. The basis of
// a segment is copied once into rows an odd number of cache lines apart (rows of a factor lie a power of two apart more often
// than not, and would share cache sets); so are the coefficients and rows of x that are walked through more than once.
//
// Sums are kept in fp32, fp64 for fp64. Where the CPU multiplies pairs of bf16 (kPairs), bf16 stays bf16: restored factors
// are rounded to it, as an adapter's own factors in bf16 are, and u is. Elsewhere bf16 and fp16 are widened as they are read.
#pragma once

#include "tile.h"

namespace rmm {

// So many of the active tokens (id ≥ 0), which are sorted by task, share a copy of the basis.
constexpr int64_t kChunk = 256;

struct Chunk {
  const int64_t* order;  // rows of x and y
  const int64_t* tasks;  // task of order[i]
  int64_t count;
  int64_t restored;  // tokens from which on a task's factors are restored to the cache; 0: kRestored
};

namespace RMM_ISA {

// Tokens an inner loop takes at once: as many as leave their sums, or their restored factors, of 4 ranks in registers.
constexpr int kTokens = kBytes == 64 ? 6 : 3;

// Positions by which what is read of a row is asked for ahead, where hardware does not see it coming.
constexpr int64_t kAhead = 64;

// ---- values of E, how they are multiplied

#if defined(__AVX512BF16__)
template <class E>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<BF16> = true;
#else
template <class E>
constexpr bool kPairs = false;
#endif

template <class E>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class E>
using Sum = typename SumOf<E>::type;

// What factors, rows of x and u are multiplied as.
template <class E>
struct HeldOf {
  using type = Sum<E>;
  using reg = Vec<Sum<E>>;
};
#if defined(__AVX512BF16__)
template <>
struct HeldOf<BF16> {
  using type = BF16;
  using reg = U32;  // 16 pairs
};
#endif
template <class E>
using Held = typename HeldOf<E>::type;
template <class E>
using Reg = typename HeldOf<E>::reg;

template <class E>
constexpr int kParts = kPairs<E> ? 2 : 1;  // factors in a product of registers; vectors of sums for a step of positions
template <class E>
constexpr int kStep = kParts<E> * kLanes<Sum<E>>;  // positions that the loops go on by: a register of Held
template <class E>
constexpr int64_t kSegment = 1024 / static_cast<int64_t>(sizeof(Held<E>));  // positions

// Components up to which the direct form of the forward has the coefficients of several tokens in registers.
constexpr int kHeld = kBytes == 64 ? 5 : 3;

// From how many tokens of a task on the restored form is the faster one, of P components, 0: of more than kHeld or of none. For
// every value of a factor and m tokens, the direct form takes m (p + 1) products, the restored form p, a store, m loads and m
// products: widths, ranks and the number of tokens cancel. `python -m benchmarks.serving forms` shows what the choice costs.
template <class E, int P>
constexpr int64_t kRestored = (kBytes == 64 && !kPairs<E> ? 3 : 2) + (P > 0 && (P <= 3 || !kPairs<E>) ? 1 : 0);

// A step of positions, widened. Of pairs, part[0] has the even ones, part[1] the odd ones.
template <class E>
struct Wide {
  Vec<Sum<E>> part[kParts<E>];
};

template <class E>
RMM_INLINE Wide<E> widen_step(const E* from) {
  if constexpr (kPairs<E>) {
    U32 bits;
    memcpy(&bits, from, sizeof bits);
    return {{(Vec<float>)(bits << 16), (Vec<float>)(bits & 0xffff0000u)}};
  } else {
    return {{load_as<Sum<E>>(from)}};
  }
}

#if defined(__AVX512BF16__)
// Pairs (low, high), rounded to bf16, in one register. No vector expression of a compiler gives this instruction,
// or that of add_products.
RMM_INLINE U32 pair_up(Vec<float> low, Vec<float> high) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves all = (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (U32)__builtin_shufflevector(all, all, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

// sum + a · b in every lane; of pairs, both products.
template <class E>
RMM_INLINE Vec<Sum<E>> add_products(Vec<Sum<E>> sum, Reg<E> a, Reg<E> b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<E>) return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  if constexpr (!kPairs<E>) return sum + a * b;
}

// As stored: rounded to E.
template <class E>
RMM_INLINE void store_step(E* to, const Wide<E>& wide) {
  if constexpr (kPairs<E>) {
    const U32 bits = pair_up(wide.part[0], wide.part[1]);
    memcpy(to, &bits, sizeof bits);
  } else {
    store_as<Sum<E>>(to, wide.part[0]);
  }
}

template <class E>
RMM_INLINE Reg<E> load_held(const Held<E>* from) {
  Reg<E> reg;
  memcpy(&reg, from, sizeof reg);
  return reg;
}

template <class E>
RMM_INLINE void store_held(Held<E>* to, Reg<E> reg) {
  memcpy(to, &reg, sizeof reg);
}

// The value or pair at `from`, in every lane.
template <class E>
RMM_INLINE Reg<E> spread(const Held<E>* from) {
  if constexpr (kPairs<E>) {
    uint32_t pair;
    memcpy(&pair, from, sizeof pair);
    return U32{} + pair;
  } else {
    return splat<Sum<E>>(*from);
  }
}

// ---- rows

constexpr int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Elements between rows of `count` values: whole steps, an odd number of cache lines.
template <class E>
int64_t apart(int64_t count, int64_t size) {
  const int64_t line = 64 / size, lines = (padded(count, kStep<E>) + line - 1) / line;
  return (lines | 1) * line;
}

// `count` values of a row in memory order, padded with 0 to whole steps: the row itself where it is like that, else a copy.
template <class E>
const E* row_of(const char* from, int64_t stride, int64_t count, E* copy) {
  const E* const row = reinterpret_cast<const E*>(from);
  if (stride == 1 && count % kStep<E> == 0) return row;
  for (int64_t i = 0; i < count; ++i) copy[i] = row[i * stride];
  for (int64_t i = count; i < padded(count, kStep<E>); ++i) copy[i] = E{};
  return copy;
}

// A step as it is multiplied.
template <class E>
RMM_INLINE Reg<E> held_step(const E* from) {
  if constexpr (sizeof(Held<E>) == sizeof(E)) {
    return load_held<E>(reinterpret_cast<const Held<E>*>(from));
  } else {
    return load_as<Sum<E>>(from);
  }
}

// As row_of, as it is multiplied: always a copy. What comes after it is asked for: the rows of x and of coefficients are far
// apart, and the hardware's prefetcher starts anew on each.
template <class E>
void hold_row(const char* from, int64_t stride, int64_t count, E* copy, Held<E>* held) {
  const E* const row = row_of<E>(from, stride, count, copy);
  for (int64_t i = 0; i < count; i += kStep<E>) {
    __builtin_prefetch(row + i + kAhead);
    store_held<E>(held + i, held_step(row + i));
  }
}

// As hold_row, the row itself where it is like that.
template <class E>
const Held<E>* held_row(const char* from, int64_t stride, int64_t count, E* copy, Held<E>* held) {
  if constexpr (sizeof(Held<E>) == sizeof(E)) {
    return reinterpret_cast<const Held<E>*>(row_of<E>(from, stride, count, copy));
  } else {
    hold_row(from, stride, count, copy, held);
    return held;
  }
}

// How many of chunk's tokens from `first` on are of one task.
inline int64_t run_length(const Chunk& chunk, int64_t first) {
  int64_t last = first + 1;
  while (last < chunk.count && chunk.tasks[last] == chunk.tasks[first]) ++last;
  return last - first;
}

// Some tokens of a chunk that are treated together: a run of one task's, or some whose tasks are too short of tokens to be
// restored.
struct Group {
  int64_t first, count;
  bool restored;
};

// The group at `first`, of at most `most` tokens where it is not restored.
inline Group group_at(const Chunk& chunk, int64_t first, int64_t most) {
  const int64_t run = run_length(chunk, first);
  if (run >= chunk.restored) return {first, run, true};
  int64_t count = run;
  while (first + count < chunk.count && count < most) {
    const int64_t next = run_length(chunk, first + count);
    if (next >= chunk.restored) break;
    count += next;
  }
  return {first, count < most ? count : most, false};
}

// That group and, where both are restored, the one after it: two tasks' factors are restored together.
struct Groups {
  Group group[2];
  int count;

  int64_t end() const { return group[count - 1].first + group[count - 1].count; }
};

inline Groups groups_at(const Chunk& chunk, int64_t first, int64_t most) {
  const Group group = group_at(chunk, first, most);
  const int64_t next = first + group.count;
  if (!group.restored || next == chunk.count) return {{group, {}}, 1};
  const Group other = group_at(chunk, next, most);
  return {{group, other}, other.restored ? 2 : 1};
}

// Where a token's row begins that is needed later, to be asked for: token i's of the chunk, or, past its tokens, that of one of
// the first, `count` positions on.
inline const char* row_ahead(const View& rows, const Chunk& chunk, int64_t i, int64_t position, int64_t count) {
  return i < chunk.count ? rows.at(chunk.order[i], position) : rows.at(chunk.order[i - chunk.count], position + count);
}

// ---- the basis

// The basis [p+1, ranks, positions] over a segment, positions innermost, the rest by strides in elements.
template <class E>
struct Panel {
  const E* data;
  int64_t component, rank;

  const E* at(int64_t j) const { return data + j * rank; }
};

// `ranks` rows of the factor from `rank` on, over `count` positions from `position` on, copied to `room` of (p + 1) · ranks
// rows.
template <class E>
Panel<E> panel_of(const View& factor, int rank_axis, int position_axis, int64_t rank, int64_t ranks, int64_t position,
                  int64_t count, E* room) {
  using T = Sum<E>;
  constexpr int W = kLanes<T>;
  const int64_t size = sizeof(E), along_rank = factor.stride[rank_axis], along_position = factor.stride[position_axis];
  const char* const first = factor.data + (rank * along_rank + position * along_position) * size;
  const int64_t row = apart<E>(count, size), full = padded(count, kStep<E>);
  const Panel<E> panel{room, ranks * row, row};
  for (int64_t k = 0; k < factor.size[0]; ++k) {
    const char* const from = first + k * factor.stride[0] * size;
    if (along_position <= along_rank || ranks == 1) {
      for (int64_t j = 0; j < ranks; ++j, room += row) {
        const E* const found = row_of<E>(from + j * along_rank * size, along_position, count, room);
        for (int64_t i = 0; found != room && i < count; i += kStep<E>) {
          __builtin_prefetch(found + 4 * along_rank + i);
          memcpy(room + i, found + i, kStep<E> * size);
        }
      }
      continue;
    }
    for (int64_t i = 0; i < full; i += W) {
      const int64_t left = count - i;
      const int lanes = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;
      Vec<T> tile[W];
      for (int64_t j = 0; j < ranks; j += W) {
        const int64_t rows = ranks - j < W ? ranks - j : W;
        load_tile<T>(reinterpret_cast<const E*>(from) + i * along_position + j * along_rank, along_position, along_rank, lanes,
                     rows, tile);
        for (int64_t l = 0; l < rows; ++l) store_as<T>(room + (j + l) * row + i, tile[l]);
      }
    }
    room += ranks * row;
  }
  return panel;
}

// Coefficients of a task at `count` positions, widened, in rows [p] of whole steps, `apart` values apart.
template <class E>
void widen_coefficients(const View& coeff, int64_t task, int64_t position, int64_t count, E* copy, Sum<E>* to, int64_t apart) {
  for (int64_t k = 0; k < coeff.size[1]; ++k, to += apart) {
    const E* const row = row_of<E>(coeff.at(task, k, position), coeff.stride[2], count, copy);
    for (int64_t i = 0; i < count; i += kStep<E>) {
      __builtin_prefetch(row + i + kAhead);
      memcpy(to + i, widen_step(row + i).part, sizeof(Wide<E>));
    }
  }
}

// w[t][j] = basis[0][j] + Σ_k c_k ⊙ basis[k + 1][j] at a step of positions, for `Rows` ranks from `basis` on and the tasks of
// `Tokens` tokens: what is loaded of the basis serves them all. c is [p, Tokens], rows of components `apart` values apart,
// those of tokens `between`.
template <class E, int Tokens, int Rows>
RMM_INLINE void restore(const Panel<E>& panel, const E* basis, int64_t p, const Sum<E>* c, int64_t apart, int64_t between,
                        Wide<E> (*w)[Rows]) {
#pragma GCC unroll 4
  for (int j = 0; j < Rows; ++j) {
    w[0][j] = widen_step<E>(basis + j * panel.rank);
#pragma GCC unroll 8
    for (int t = 1; t < Tokens; ++t) w[t][j] = w[0][j];
  }
  for (int64_t k = 0; k < p; ++k, c += apart) {
    basis += panel.component;
    Wide<E> from[Rows];
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) from[j] = widen_step<E>(basis + j * panel.rank);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
      for (int q = 0; q < kParts<E>; ++q) {
        const Vec<Sum<E>> weight = load(c + t * between + q * kLanes<Sum<E>>);
#pragma GCC unroll 4
        for (int j = 0; j < Rows; ++j) w[t][j].part[q] += weight * from[j].part[q];
      }
    }
  }
}

// Coefficients of the tasks of a group whose factors are restored together, [tasks, p], as widen_coefficients has them, `width`
// values apart.
template <class E>
void widen_groups(const View& coeff, const Chunk& chunk, const Groups& groups, int64_t position, int64_t count, E* copy,
                  Sum<E>* to, int64_t width) {
  for (int t = 0; t < groups.count; ++t) {
    widen_coefficients<E>(coeff, chunk.tasks[groups.group[t].first], position, count, copy, to, width);
    to += coeff.size[1] * width;
  }
}

// Scratch of bytes, handed out in pieces of whole cache lines.
class Room {
 public:
  // A piece of `count` values.
  template <class V>
  static int64_t bytes(int64_t count) {
    return padded(count * static_cast<int64_t>(sizeof(V)) + 64, 64);  // and a line more, whole registers past the end
  }

  explicit Room(int64_t bytes) : data_(static_cast<char*>(aligned_alloc(64, padded(bytes + 64, 64)))), at_(data_) {
    if (data_ == nullptr) abort();  // a few hundred KiB: the process is out of memory
  }
  ~Room() { free(data_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  template <class V>
  V* take(int64_t count) {
    V* const taken = reinterpret_cast<V*>(at_);
    at_ += bytes<V>(count);
    return taken;
  }

 private:
  char* data_;
  char* at_;
};

// kernel<E> of a dtype.
#define RMM_OF_DTYPE(dtype, kernel, ...)  \
  switch (dtype) {                        \
    case Dtype::f64:                      \
      return kernel<double>(__VA_ARGS__); \
    case Dtype::f32:                      \
      return kernel<float>(__VA_ARGS__);  \
    case Dtype::bf16:                     \
      return kernel<BF16>(__VA_ARGS__);   \
    case Dtype::f16:                      \
      return kernel<F16>(__VA_ARGS__);    \
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
  int64_t restored;  // as in Chunk; for benchmarks

  int64_t chunks() const { return (static_cast<int64_t>(order.size()) + kChunk - 1) / kChunk; }
  Chunk chunk(int64_t i) const {
    const int64_t left = static_cast<int64_t>(order.size()) - i * kChunk;
    return {order.data() + i * kChunk, tasks.data() + i * kChunk, left < kChunk ? left : kChunk, restored};
  }
};

// Checks the ids, so it comes before anything is written.
TokenPlan plan_tokens(const Ids& task_ids, int64_t n);

// Into how many parts each of `chunks` chunks is cut: at most `most`, so that every thread has something to do; or up to
// `fine`, which cost next to nothing, so that a thread that is done can take from the others.
int64_t parts_of(int64_t chunks, int64_t most, int64_t fine);

// u [T, r], contiguous, of the accumulator's dtype; rows of inactive tokens are left alone.
void run_shrink(const TokenPlan& plan, const View& x, const View& basis_a, const View& coeff_a, const View& u);
void run_expand(const TokenPlan& plan, const View& y, const View& u, const View& basis_b, const View& coeff_b,
                const View& scaling);

void check_shrink(const View& x, const View& basis_a, const View& coeff_a, const Ids& task_ids);
void check_expand(const View& y, const View& basis_b, const View& coeff_b, const Ids& task_ids, const View& scaling);

}  // namespace rmm
#endif
