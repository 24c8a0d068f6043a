// lora_shrink: u_t = w x_t, w the task's restored lora_a, lanes over positions.

#include "lora_direct.h"

namespace rmm {

struct ShrinkArgs {
  View x, basis, coeff, u;  // [T, in], [p+1, r, in], [n, p, in], [T, r] of the accumulator's dtype
};

// u of a chunk's tokens at ranks begin … end.
RMM_DECLARE_KERNEL_BF16(void lora_shrink(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end))

namespace RMM_ISA {

// A step of a restored row, as it is multiplied with x.
template <class E>
RMM_INLINE Reg<E> fold(const Wide<E>& w) {
  if constexpr (kPairs<E>) {
    return pair_up(w.part[0], w.part[1]);
  } else {
    return w.part[0];
  }
}

// sums[t][j] += Σ_positions w[j] · x[t], Tokens × Rows sums in registers, rows of sums `row` vectors apart in memory.
template <class E, int Tokens, int Rows>
RMM_INLINE void shrink_tile(const Held<E>* w, int64_t apart, const Held<E>* const* x, int64_t steps, Vec<Sum<E>>* sums,
                            int64_t row) {
  Vec<Sum<E>> sum[Tokens][Rows];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) sum[t][j] = sums[t * row + j];
  }
  for (int64_t at = 0; at < steps * kStep<E>; at += kStep<E>) {
    Reg<E> factor[Rows];
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) factor[j] = load_held<E>(w + j * apart + at);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Reg<E> xt = load_held<E>(x[t] + at);
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) sum[t][j] = add_products<E>(sum[t][j], factor[j], xt);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) sums[t * row + j] = sum[t][j];
  }
}

// As shrink_tile, for 1 to Tokens tokens and all ranks. Meanwhile, a share for every four ranks, it asks for `bytes` of `next`,
// the rows that are needed next: many requests at once would be waited for.
template <class E, int Tokens>
void shrink_tokens(int64_t tokens, const Held<E>* w, int64_t apart, const Held<E>* const* x, const char* const* next,
                   int64_t bytes, int64_t steps, int64_t r, Vec<Sum<E>>* sums, int64_t row, int64_t fours) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return shrink_tokens<E, Tokens - 1>(tokens, w, apart, x, next, bytes, steps, r, sums, row, fours);
  }
  int64_t j = 0, asked = 0;
  for (; j + 4 <= r; j += 4, sums += fours) {
    for (const int64_t share = bytes * (j + 4) / r; asked < share; asked += 64) {
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) __builtin_prefetch(next[t] + asked);
    }
    shrink_tile<E, Tokens, 4>(w + j * apart, apart, x, steps, sums, row);
  }
  for (; j < r; ++j, ++sums) shrink_tile<E, Tokens, 1>(w + j * apart, apart, x, steps, sums, row);
}

// The rows of one or two tasks over a segment, [Tasks, r], rows `apart` elements apart and tasks `factor`; c [Tasks, p], a
// segment apart.
template <class E, int Tasks, int Rows>
void shrink_rows(const Panel<E>& panel, int64_t rank, int64_t p, const Sum<E>* c, int64_t steps, Held<E>* to, int64_t apart,
                 int64_t factor) {
  const int64_t width = steps * kStep<E>;
  for (int64_t at = 0; at < width; at += kStep<E>) {
    Wide<E> w[Tasks][Rows];
    restore<E, Tasks, Rows>(panel, panel.at(rank) + at, p, c + at, width, p * width, w);
#pragma GCC unroll 2
    for (int t = 0; t < Tasks; ++t) {
#pragma GCC unroll 4
      for (int j = 0; j < Rows; ++j) store_held<E>(to + t * factor + (rank + j) * apart + at, fold<E>(w[t][j]));
    }
  }
}

template <class E, int Tasks>
void shrink_factors(const Panel<E>& panel, int64_t r, int64_t p, const Sum<E>* c, int64_t steps, Held<E>* to, int64_t apart,
                    int64_t factor) {
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) shrink_rows<E, Tasks, 4>(panel, j, p, c, steps, to, apart, factor);
  for (; j < r; ++j) shrink_rows<E, Tasks, 1>(panel, j, p, c, steps, to, apart, factor);
}

// sums[t][j] += w[j] · x[t] over a segment for all ranks of Tokens tokens whose tasks are restored in registers; x [Tokens] and
// coefficients c [P, Tokens] are rows. The sums stay in memory: registers are full of coefficients.
template <class E, int P, int Tokens>
void shrink_steps(const Panel<E>& panel, int64_t r, const E* const* x, const E* const* c, int64_t steps, Vec<Sum<E>>* sums,
                  int64_t row) {
  for (int64_t at = 0; at < steps * kStep<E>; at += kStep<E>) {
    const Coefficients<E, Tokens, P> coefficients(c, at);
    Reg<E> xs[Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      xs[t] = held_step<E>(x[t] + at);
      __builtin_prefetch(x[t] + at + kAhead, 0, 2);
    }
    for (int64_t j = 0; j < r; ++j) {
      Wide<E> w[Tokens][1];
      coefficients.restored(panel, panel.at(j) + at, w);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) sums[t * row + j] = add_products<E>(sums[t * row + j], fold<E>(w[t][0]), xs[t]);
    }
  }
}

// As shrink_steps, for 1 to Tokens tokens.
template <class E, int P, int Tokens = kAbreast<E, P>>
void shrink_group(int64_t tokens, const Panel<E>& panel, int64_t r, const E* const* x, const E* const* c, int64_t steps,
                  Vec<Sum<E>>* sums, int64_t row) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return shrink_group<E, P, Tokens - 1>(tokens, panel, r, x, c, steps, sums, row);
  }
  shrink_steps<E, P, Tokens>(panel, r, x, c, steps, sums, row);
}

// What a group's tokens need of a piece.
template <class E>
struct Piece {
  Held<E>* x;         // [kLone, kPiece]
  Sum<E>* c;          // [p, kLone, kPiece]
  Vec<Sum<E>>* sums;  // [kLone, 4]
  int64_t steps;
};

// sums[t][j] += Σ_positions w[j] · x[t] over a piece for `Rows` ranks of Tokens tokens from `token` on.
template <class E, int Tokens, int Rows>
void shrink_abreast(const Panel<E>& panel, const E* basis, int64_t p, const Piece<E>& piece, int64_t token) {
  constexpr int64_t lone = kLone<E, 0>;
  const Sum<E>* c = piece.c + token * kPiece;
  const Held<E>* x = piece.x + token * kPiece;
  Vec<Sum<E>>* sums = piece.sums + token * 4;
  for (int64_t step = 0; step < piece.steps; ++step, basis += kStep<E>, c += kStep<E>, x += kStep<E>) {
    asm("" : "+r"(sums));  // else GCC keeps an address for each, in memory
    Wide<E> w[Tokens][Rows];
    restore<E, Tokens, Rows>(panel, basis, p, c, lone * kPiece, kPiece, w);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Reg<E> xt = load_held<E>(x + t * kPiece);
#pragma GCC unroll 4
      for (int j = 0; j < Rows; ++j) sums[t * 4 + j] = add_products<E>(sums[t * 4 + j], fold<E>(w[t][j]), xt);
    }
  }
}

// As shrink_abreast, for all tokens from `token` on, `Tokens` of them at once.
template <class E, int Rows, int Tokens = kAbreast<E, 0>>
void shrink_piece(const Panel<E>& panel, const E* basis, int64_t p, const Piece<E>& piece, int64_t token, int64_t tokens) {
  for (; token + Tokens <= tokens; token += Tokens) shrink_abreast<E, Tokens, Rows>(panel, basis, p, piece, token);
  if constexpr (Tokens > 1) shrink_piece<E, Rows, Tokens - 1>(panel, basis, p, piece, token, tokens);
}

// out[i] = the sum of v[i]'s lanes.
template <class T>
void add_lanes(const Vec<T>* v, int64_t count, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < count; i += W) {
    Vec<T> rows[W];
    for (int l = 0; l < W; ++l) rows[l] = i + l < count ? v[i + l] : Vec<T>{};
    transpose<T>(rows);
    Vec<T> total{};
    for (int l = 0; l < W; ++l) total += rows[l];
    if (i + W <= count) {
      store(out + i, total);
    } else {
      for (int64_t l = 0; i + l < count; ++l) out[i + l] = total[l];
    }
  }
}

template <class E, int P>
void shrink_chunk(const ShrinkArgs& args, Chunk chunk, int64_t begin, int64_t end) {
  using T = Sum<E>;
  if (chunk.restored == 0) chunk.restored = kRestored<E, P>;
  const View &x = args.x, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = end - begin, p = coeff.size[1], width = basis.size[2], size = sizeof(E);
  const int64_t segment = segment_of<E, P>(chunk, (p + 1) * r, width), most = padded(segment, kStep<E>);
  const int64_t apart_e = apart<E>(segment, size), apart_held = apart<E>(segment, sizeof(Held<E>));
  constexpr int64_t lone = kLone<E, P>, copied = P > 0 && lone > kTokens ? lone : kTokens, pieces = P > 0 ? 0 : lone * kPiece;
  // Sums of fours of ranks lie together, those of a token, an odd number of vectors apart from the next one's, or of the group.
  const int64_t row = P > 0 ? r | 1 : 4, fours = P > 0 ? 4 : chunk.count * 4;
  const int64_t all = P > 0 ? chunk.count * row : (r + 3) / 4 * fours;
  Room room(Room::bytes<E>((p + 1) * r * apart_e) + Room::bytes<E>(copied * apart_e) + Room::bytes<E>(P * lone * apart_e) +
            Room::bytes<Held<E>>(2 * r * apart_held) + Room::bytes<Held<E>>(kTokens * apart_held) +
            Room::bytes<Held<E>>(pieces) + Room::bytes<T>(2 * p * most) + Room::bytes<T>(p * pieces) +
            Room::bytes<Vec<T>>(all) + Room::bytes<T>(all));
  E* const packed = room.take<E>((p + 1) * r * apart_e);
  E* const copies = room.take<E>(copied * apart_e);
  E* const copies_c = room.take<E>(P * lone * apart_e);
  Held<E>* const factors = room.take<Held<E>>(2 * r * apart_held);
  Held<E>* const helds = room.take<Held<E>>(kTokens * apart_held);
  Held<E>* const piece_x = room.take<Held<E>>(pieces);
  T* const weights = room.take<T>(2 * p * most);
  T* const piece_c = room.take<T>(p * pieces);
  Vec<T>* const sums = room.take<Vec<T>>(all);
  T* const u = room.take<T>(all);
  for (int64_t i = 0; i < all; ++i) sums[i] = Vec<T>{};

  for (int64_t position = 0; position < width; position += segment) {
    const int64_t count = width - position < segment ? width - position : segment;
    const int64_t steps = padded(count, kStep<E>) / kStep<E>;
    const Panel<E> panel = panel_of<E>(basis, 1, 2, begin, r, position, count, packed);
    const auto add_run = [&](const Group& run, const Held<E>* factor) {
      int64_t tokens;
      for (int64_t i = run.first; i < run.first + run.count; i += tokens) {
        tokens = run.first + run.count - i < kTokens ? run.first + run.count - i : kTokens;
        const Held<E>* rows[kTokens];
        const char* next[kTokens];
        for (int64_t t = 0; t < tokens; ++t) {
          rows[t] =
              held_row<E>(x.at(chunk.order[i + t], position), x.stride[1], count, copies + t * apart_e, helds + t * apart_held);
          next[t] = row_ahead(x, chunk, i + tokens + t, position, count);
        }
        shrink_tokens<E, kTokens>(tokens, factor, apart_held, rows, next, count * size, steps, r, sums + i * row, row, fours);
      }
    };
    Groups now;
    for (int64_t i = 0; i < chunk.count; i = now.end()) {
      now = groups_at(chunk, i, lone);
      const Group& group = now.group[0];
      if (group.restored) {
        const int64_t values = steps * kStep<E>, factor = r * apart_held;
        widen_groups<E>(coeff, chunk, now, position, count, copies, weights, values);
        now.count == 2 ? shrink_factors<E, 2>(panel, r, p, weights, steps, factors, apart_held, factor)
                       : shrink_factors<E, 1>(panel, r, p, weights, steps, factors, apart_held, factor);
        for (int t = 0; t < now.count; ++t) add_run(now.group[t], factors + t * factor);
      } else if constexpr (P > 0) {
        const E *rows[lone], *rows_c[P * lone];
        for (int64_t t = 0; t < group.count; ++t) {
          rows[t] = row_of<E>(x.at(chunk.order[i + t], position), x.stride[1], count, copies + t * apart_e);
        }
        coefficient_rows<E>(coeff, chunk, group, position, count, copies_c, apart_e, rows_c);
        shrink_group<E, P>(group.count, panel, r, rows, rows_c, steps, sums + i * row, row);
      } else {
        for (int64_t at = 0; at < count; at += kPiece) {
          const int64_t left = count - at < kPiece ? count - at : kPiece;
          Piece<E> piece{piece_x, piece_c, sums + i * row, padded(left, kStep<E>) / kStep<E>};
          for (int64_t t = 0; t < group.count; ++t) {
            hold_row<E>(x.at(chunk.order[i + t], position + at), x.stride[1], left, copies, piece.x + t * kPiece);
            widen_coefficients<E>(coeff, chunk.tasks[i + t], position + at, left, copies, piece.c + t * kPiece, lone * kPiece);
          }
          int64_t j = 0;
          for (; j + 4 <= r; j += 4, piece.sums += fours) {
            shrink_piece<E, 4>(panel, panel.at(j) + at, p, piece, 0, group.count);
          }
          for (; j < r; ++j, ++piece.sums) shrink_piece<E, 1>(panel, panel.at(j) + at, p, piece, 0, group.count);
        }
      }
    }
  }
  add_lanes<T>(sums, all, u);
  for (int64_t i = 0; i < chunk.count; ++i) {
    T* const to = reinterpret_cast<T*>(args.u.at(chunk.order[i], begin));
    for (int64_t j = 0; j < r; ++j) to[j] = u[j / 4 * fours + i * row + j % 4];
  }
}

template <class E>
void shrink_of(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  RMM_OF_COMPONENTS(args.coeff.size[1], E, shrink_chunk, args, chunk, begin, end)
}

void lora_shrink(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  RMM_OF_DTYPE(args.x.dtype, shrink_of, args, chunk, begin, end)
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <algorithm>
#include <numeric>
#include <utility>

#include "../common/tensor.h"
#include "parallel.h"

namespace rmm {

int64_t parts_of(int64_t chunks, int64_t most, int64_t fine) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || chunks >= 8 * threads) return 1;
  const int64_t parts = chunks % threads == 0 ? 1 : std::min(most, threads);
  return std::max({int64_t(1), parts, std::min(fine, 8 * threads / chunks)});
}

namespace {
int64_t forced = 0;
}

int64_t force_restored(int64_t tokens) { return std::exchange(forced, tokens); }

TokenPlan plan_tokens(const Ids& task_ids, int64_t n) {
  check_ids(task_ids, n, -1);
  TokenPlan plan;
  plan.restored = forced;
  if (n > 4 * task_ids.size) {
    for (int64_t t = 0; t < task_ids.size; ++t) {
      if (task_ids[t] >= 0) plan.order.push_back(t);
    }
    std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) { return task_ids[a] < task_ids[b]; });
  } else {
    std::vector<int64_t> begin(n + 1);  // where each task's tokens go, the next one first
    for (int64_t t = 0; t < task_ids.size; ++t) {
      if (task_ids[t] >= 0) ++begin[task_ids[t] + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    plan.order.resize(begin[n]);
    for (int64_t t = 0; t < task_ids.size; ++t) {
      if (task_ids[t] >= 0) plan.order[begin[task_ids[t]]++] = t;
    }
  }
  plan.tasks.reserve(plan.order.size());
  for (const int64_t t : plan.order) plan.tasks.push_back(task_ids[t]);
  return plan;
}

void check_shrink(const View& x, const View& basis_a, const View& coeff_a, const Ids& task_ids) {
  check_same(basis_a.size[0] == coeff_a.size[1] + 1 && basis_a.size[2] == x.size[1] && coeff_a.size[2] == x.size[1] &&
                 task_ids.size == x.size[0] && basis_a.dtype == x.dtype && coeff_a.dtype == x.dtype,
             "x [T, in], basis_a [p+1, r, in], coeff_a [n, p, in], task_ids [T]");
}

void run_shrink(const TokenPlan& plan, const View& x, const View& basis_a, const View& coeff_a, const View& u) {
  const ShrinkArgs args{x, basis_a, coeff_a, u};
  const int64_t r = basis_a.size[1], fours = (r + 3) / 4, chunks = plan.chunks();
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * x.size[1];
  // A row's sums are its own, so that neither the chunks nor the parts have a say in the results.
  const int64_t parts = work < 32768 ? 1 : parts_of(chunks, fours, 1), units = chunks * parts;
  const auto kernel = RMM_KERNEL_BF16(lora_shrink);
  parallel_shares(units, work < 32768 ? units : 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit % parts, from = part * fours / parts * 4, to = (part + 1) * fours / parts * 4;
      if (from < r) kernel(args, plan.chunk(unit / parts), from, std::min(to, r));
    }
  });
}

Tensor lora_shrink_op(Tensor x, Tensor basis_a, Tensor coeff_a, Tensor task_ids) {
  const View in = view(x, 2, "x"), basis = view(basis_a, 3, "basis_a"), coeff = view(coeff_a, 3, "coeff_a");
  const Ids tasks = ids(task_ids);
  check_shrink(in, basis, coeff, tasks);
  const TokenPlan plan = plan_tokens(tasks, coeff.size[0]);
  Tensor u = torch::stable::new_zeros(x, {in.size[0], basis.size[1]}, accumulator(x));
  run_shrink(plan, in, basis, coeff, view(u, 2, "u"));
  return u;
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink_op));
  m.impl("lora_shrink.cpu", TORCH_BOX(&lora_shrink_op));
}

}  // namespace rmm
#endif
