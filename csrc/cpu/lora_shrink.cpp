// lora_shrink: u_t = w x_t, w the task's restored lora_a, lanes over positions.

#include "lora.h"

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

// sums[t][j] += Σ_positions w[j] · x[t], Tokens × Rows sums in registers.
template <class E, int Tokens, int Rows>
RMM_INLINE void shrink_tile(const Held<E>* w, int64_t apart, const Held<E>* const* x, int64_t steps, Vec<Sum<E>>* sums,
                            int64_t r, Ahead& ahead) {
  Vec<Sum<E>> sum[Tokens][Rows];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) sum[t][j] = sums[t * r + j];
  }
  for (int64_t at = 0; at < steps * kStep<E>; at += kStep<E>) {
    ahead.step();
    Reg<E> row[Rows];
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) row[j] = load_held<E>(w + j * apart + at);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Reg<E> xt = load_held<E>(x[t] + at);
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) sum[t][j] = add_products<E>(sum[t][j], row[j], xt);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) sums[t * r + j] = sum[t][j];
  }
}

// As shrink_tile, for 1 to Tokens tokens and any number of ranks.
template <class E, int Tokens>
void shrink_tokens(int64_t tokens, const Held<E>* w, int64_t apart, const Held<E>* const* x, int64_t steps, int64_t r,
                   Vec<Sum<E>>* sums, Ahead& ahead) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return shrink_tokens<E, Tokens - 1>(tokens, w, apart, x, steps, r, sums, ahead);
  }
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) {
    shrink_tile<E, Tokens, 4>(w + j * apart, apart, x, steps, sums + j, r, ahead);
  }
  for (; j < r; ++j) shrink_tile<E, Tokens, 1>(w + j * apart, apart, x, steps, sums + j, r, ahead);
}

// What one token needs of a segment.
template <class E>
struct Lone {
  const Held<E>* x;
  const E* c;  // [p]
  int64_t apart;
  Vec<Sum<E>>* sums;
};

// sums[j] += Σ_positions w[j] · x for `Rows` ranks of a task that is restored in registers.
template <class E, int Rows, bool Far>
void shrink_alone(const E* basis, const Panel<E>& panel, int64_t p, const Lone<E>& token, int64_t from, int64_t steps,
                  int64_t rank) {
  Vec<Sum<E>> sum[Rows];
#pragma GCC unroll 4
  for (int j = 0; j < Rows; ++j) sum[j] = token.sums[rank + j];
  for (int64_t at = from; at < from + steps * kStep<E>; at += kStep<E>) {
    Wide<E> w[Rows];
    restore<E, Rows, Far>(basis + at, panel.component, panel.rank, p, token.c + at, token.apart, w);
    const Reg<E> x = load_held<E>(token.x + at);
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) sum[j] = add_products<E>(sum[j], fold<E>(w[j]), x);
  }
#pragma GCC unroll 4
  for (int j = 0; j < Rows; ++j) token.sums[rank + j] = sum[j];
}

template <class E, bool Far>
void shrink_lone(const Panel<E>& panel, int64_t r, int64_t p, const Lone<E>* tokens, int64_t count, int64_t steps,
                 Ahead& ahead) {
  // Where the basis is read in place, along whole segments; else in short pieces, that stay in the first-level cache for
  // all tokens.
  const int64_t piece = Far ? steps : 8;
  for (int64_t from = 0; from < steps; from += piece) {
    const int64_t some = steps - from < piece ? steps - from : piece, at = from * kStep<E>;
    int64_t j = 0;
    for (; j + 4 <= r; j += 4) {
      for (int64_t t = 0; t < count; ++t) {
        // Those after the first find the rows in a cache.
        if (Far && t == 0) {
          shrink_alone<E, 4, true>(panel.at(j), panel, p, tokens[t], at, some, j);
        } else {
          shrink_alone<E, 4, false>(panel.at(j), panel, p, tokens[t], at, some, j);
        }
        ahead.step();
      }
    }
    for (; j < r; ++j) {
      for (int64_t t = 0; t < count; ++t) shrink_alone<E, 1, false>(panel.at(j), panel, p, tokens[t], at, some, j);
    }
  }
}

// The rows of a task over a segment, `apart` elements apart.
template <class E, int Rows, bool Far>
void shrink_rows(const E* basis, const Panel<E>& panel, int64_t p, const E* c, int64_t c_apart, int64_t steps, Held<E>* to,
                 int64_t apart) {
  for (int64_t at = 0; at < steps * kStep<E>; at += kStep<E>) {
    Wide<E> w[Rows];
    restore<E, Rows, Far>(basis + at, panel.component, panel.rank, p, c + at, c_apart, w);
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) store_held<E>(to + j * apart + at, fold<E>(w[j]));
  }
}

template <class E>
void shrink_factor(const Panel<E>& panel, int64_t r, int64_t p, const E* c, int64_t c_apart, int64_t steps, Held<E>* to,
                   int64_t apart) {
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) {
    if (panel.in_place) {
      shrink_rows<E, 4, true>(panel.at(j), panel, p, c, c_apart, steps, to + j * apart, apart);
    } else {
      shrink_rows<E, 4, false>(panel.at(j), panel, p, c, c_apart, steps, to + j * apart, apart);
    }
  }
  for (; j < r; ++j) shrink_rows<E, 1, false>(panel.at(j), panel, p, c, c_apart, steps, to + j * apart, apart);
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

template <class E>
void shrink_chunk(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  using T = Sum<E>;
  const View &x = args.x, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = end - begin, p = coeff.size[1], width = basis.size[2], size = sizeof(E);
  const int64_t segment = width < kSegment<E> ? width : kSegment<E>;
  const int64_t apart_e = apart<E>(segment, size), apart_held = apart<E>(segment, sizeof(Held<E>));
  const bool in_place = passes_of(chunk) <= kPasses && readable<E>(basis, 2, width);
  const int64_t packed_rows = in_place ? 0 : (p + 1) * r;
  Room room(Room::bytes<E>(packed_rows * apart_e) + Room::bytes<Held<E>>(r * apart_held) +
            Room::bytes<E>(kTokens * p * apart_e) + Room::bytes<E>(kTokens * apart_e) +
            Room::bytes<Held<E>>(kTokens * apart_held) + Room::bytes<Vec<T>>(chunk.count * r) +
            Room::bytes<T>(chunk.count * r));
  E* const packed = room.take<E>(packed_rows * apart_e);
  Held<E>* const factor = room.take<Held<E>>(r * apart_held);
  E* const weights = room.take<E>(kTokens * p * apart_e);
  E* const copies = room.take<E>(kTokens * apart_e);
  Held<E>* const helds = room.take<Held<E>>(kTokens * apart_held);
  Vec<T>* const sums = room.take<Vec<T>>(chunk.count * r);
  T* const u = room.take<T>(chunk.count * r);
  for (int64_t i = 0; i < chunk.count * r; ++i) sums[i] = Vec<T>{};

  Ahead ahead;
  for (int64_t position = 0; position < width; position += segment) {
    const int64_t count = width - position < segment ? width - position : segment;
    const int64_t steps = padded(count, kStep<E>) / kStep<E>;
    const Panel<E> panel = panel_of<E>(basis, 1, 2, begin, r, position, count, in_place, packed);
    for (int64_t i = 0; i < chunk.count;) {
      const Group group = group_at(chunk, i);
      int64_t c_apart;
      if (group.restored) {
        const E* const c = coefficients<E>(coeff, chunk.tasks[i], position, count, weights, &c_apart);
        shrink_factor<E>(panel, r, p, c, c_apart, steps, factor, apart_held);
      }
      for (int64_t done = 0; done < group.count; done += kTokens) {
        const int64_t first = i + done, left = group.count - done, tokens = left < kTokens ? left : kTokens;
        // What the next tokens read.
        ahead.clear();
        const int64_t next = first + tokens, last = next + kTokens < chunk.count ? next + kTokens : chunk.count;
        for (int64_t t = next; t < last; ++t) {
          ahead.add(x.at(chunk.order[t], position), x.stride[1], count, size);
          for (int64_t k = 0; k < p && (t == next || chunk.tasks[t] != chunk.tasks[t - 1]); ++k) {
            ahead.add(coeff.at(chunk.tasks[t], k, position), coeff.stride[2], count, size);
          }
        }
        const Held<E>* rows[kTokens];
        for (int64_t t = 0; t < tokens; ++t) {
          rows[t] = held_row<E>(x.at(chunk.order[first + t], position), x.stride[1], count, copies + t * apart_e,
                                helds + t * apart_held);
        }
        if (group.restored) {
          ahead.spread((r / 4 + r % 4) * steps);
          shrink_tokens<E, kTokens>(tokens, factor, apart_held, rows, steps, r, sums + first * r, ahead);
          continue;
        }
        Lone<E> lone[kTokens];
        for (int64_t t = 0; t < tokens; ++t) {
          const E* const c =
              coefficients<E>(coeff, chunk.tasks[first + t], position, count, weights + t * p * apart_e, &c_apart);
          lone[t] = {rows[t], c, c_apart, sums + (first + t) * r};
        }
        ahead.spread(r / 4 * tokens * (in_place ? 1 : steps / 8));
        if (in_place) {
          shrink_lone<E, true>(panel, r, p, lone, tokens, steps, ahead);
        } else {
          shrink_lone<E, false>(panel, r, p, lone, tokens, steps, ahead);
        }
      }
      i += group.count;
    }
  }
  add_lanes<T>(sums, chunk.count * r, u);
  for (int64_t i = 0; i < chunk.count; ++i) {
    memcpy(args.u.at(chunk.order[i], begin), u + i * r, r * sizeof(T));
  }
}

void lora_shrink(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  RMM_OF_DTYPE(args.x.dtype, shrink_chunk, args, chunk, begin, end)
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "../common/tensor.h"

namespace rmm {

int64_t parts_of(int64_t chunks, int64_t most) {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  if (chunks % threads == 0 || chunks >= 8 * threads) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(most, threads));
}

namespace {
int64_t forced = 0;
}

int64_t force_restored(int64_t tokens) { return std::exchange(forced, tokens); }

TokenPlan plan_tokens(const Ids& task_ids, int64_t n) {
  check_ids(task_ids, n, -1);
  TokenPlan plan;
  plan.forced = forced;
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
  const int64_t parts = work < 32768 ? 1 : parts_of(chunks, fours), units = chunks * parts;
  const auto kernel = RMM_KERNEL_BF16(lora_shrink);
  torch::stable::parallel_for(0, units, work < 32768 ? units : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit % parts, from = part * fours / parts * 4, to = (part + 1) * fours / parts * 4;
      if (from < r) kernel(args, plan.chunk(unit / parts, coeff_a.size[1], coeff_a.dtype), from, std::min(to, r));
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
