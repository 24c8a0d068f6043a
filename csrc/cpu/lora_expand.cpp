// lora_expand_: y_t += scaling w u_t, w the task's restored lora_b, lanes over positions.

#include "lora.h"

namespace rmm {

struct ExpandArgs {
  View y, u, basis, coeff, scaling;  // [T, out], [T, r], [p+1, out, r], [n, p, out], [n]
};

// Adds to y at positions begin … end for a chunk's tokens.
RMM_DECLARE_KERNEL_BF16(void lora_expand(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end))

namespace RMM_ISA {

// Positions of vector `part` of a step, of kParts ranks at once; `Left` of them are there, the rest are 0.
template <class E, int Left>
RMM_INLINE Reg<E> fold(const Wide<E>* w, int part) {
  if constexpr (!kPairs<E>) {
    return w[0].part[0];
  } else if constexpr (Left == 1) {
    return pair_up(w[0].part[part], Vec<float>{});
  } else {
    return pair_up(w[0].part[part], w[1].part[part]);
  }
}

// y[t] += Σ_j u[t][j] · w[j] at `Regs` registers of positions, for Tokens tokens; w is [ranks] rows, `apart` elements apart.
template <class E, int Tokens, int Regs>
RMM_INLINE void expand_tile(const Held<E>* w, int64_t apart, int64_t ranks, const Held<E>* u, E* const* y, int64_t position,
                            Ahead& ahead) {
  constexpr int64_t held = kStep<E>;  // elements of a register
  Vec<Sum<E>> sum[Tokens][Regs] = {};
  for (int64_t j = 0; j < ranks; ++j) {
    ahead.step();
    Reg<E> row[Regs];
#pragma GCC unroll 8
    for (int v = 0; v < Regs; ++v) row[v] = load_held<E>(w + j * apart + v * held);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Reg<E> ut = spread<E>(u + (t * ranks + j) * kParts<E>);
#pragma GCC unroll 8
      for (int v = 0; v < Regs; ++v) sum[t][v] = add_products<E>(sum[t][v], row[v], ut);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int step = 0; step < Regs / kParts<E>; ++step) {
      E* const at = y[t] + position + step * kStep<E>;
      Wide<E> value = widen_step<E>(at);
#pragma GCC unroll 2
      for (int q = 0; q < kParts<E>; ++q) value.part[q] += sum[t][step * kParts<E> + q];
      store_step<E>(at, value);
    }
  }
}

// As expand_tile, for 1 to Tokens tokens and a segment of `steps` steps.
template <class E, int Tokens>
void expand_tokens(int64_t tokens, const Held<E>* w, int64_t apart, int64_t ranks, const Held<E>* u, E* const* y, int64_t steps,
                   Ahead& ahead) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return expand_tokens<E, Tokens - 1>(tokens, w, apart, ranks, u, y, steps, ahead);
  }
  constexpr int regs = 4, few = regs / kParts<E>;
  int64_t step = 0;
  for (; step + few <= steps; step += few) {
    expand_tile<E, Tokens, regs>(w + step * kParts<E> * kStep<E>, apart, ranks, u, y, step * kStep<E>, ahead);
  }
  for (; step < steps; ++step) {
    expand_tile<E, Tokens, kParts<E>>(w + step * kParts<E> * kStep<E>, apart, ranks, u, y, step * kStep<E>, ahead);
  }
}

// What one token needs of a segment.
template <class E>
struct Lone {
  const Held<E>* u;
  const E* c;  // [p]
  int64_t apart;
  Vec<Sum<E>>* sums;  // [steps · kParts]
};

// sums += Σ_j u[j] · w[j] for `Rows` ranks of a task that is restored in registers.
template <class E, int Rows, bool Far>
void expand_alone(const E* basis, const Panel<E>& panel, int64_t p, const Lone<E>& token, int64_t from, int64_t steps,
                  int64_t rank) {
  constexpr int folds = (Rows + kParts<E> - 1) / kParts<E>;
  Reg<E> u[folds];
#pragma GCC unroll 4
  for (int j = 0; j < folds; ++j) u[j] = spread<E>(token.u + rank + j * kParts<E>);
  for (int64_t step = from; step < from + steps; ++step) {
    Wide<E> w[Rows];
    restore<E, Rows, Far>(basis + step * kStep<E>, panel.component, panel.rank, p, token.c + step * kStep<E>, token.apart, w);
#pragma GCC unroll 2
    for (int q = 0; q < kParts<E>; ++q) {
      Vec<Sum<E>> sum = token.sums[step * kParts<E> + q];
#pragma GCC unroll 4
      for (int j = 0; j < folds; ++j) {
        sum = add_products<E>(sum, fold < E, Rows<kParts<E> ? 1 : 2>(w + j * kParts<E>, q), u[j]);
      }
      token.sums[step * kParts<E> + q] = sum;
    }
  }
}

template <class E, bool Far>
void expand_lone(const Panel<E>& panel, int64_t r, int64_t p, const Lone<E>* tokens, int64_t count, int64_t steps,
                 Ahead& ahead) {
  const int64_t piece = Far ? steps : 8;  // as shrink_lone
  for (int64_t from = 0; from < steps; from += piece) {
    const int64_t some = steps - from < piece ? steps - from : piece;
    int64_t j = 0;
    for (; j + 4 <= r; j += 4) {
      for (int64_t t = 0; t < count; ++t) {
        if (Far && t == 0) {
          expand_alone<E, 4, true>(panel.at(j), panel, p, tokens[t], from, some, j);
        } else {
          expand_alone<E, 4, false>(panel.at(j), panel, p, tokens[t], from, some, j);
        }
        ahead.step();
      }
    }
    for (; j + kParts<E> <= r; j += kParts<E>) {
      for (int64_t t = 0; t < count; ++t) {
        expand_alone<E, kParts<E>, false>(panel.at(j), panel, p, tokens[t], from, some, j);
      }
    }
    for (; j < r; ++j) {
      for (int64_t t = 0; t < count; ++t) expand_alone<E, 1, false>(panel.at(j), panel, p, tokens[t], from, some, j);
    }
  }
}

// Rows of a task over a segment: [ranks / kParts] rows, `apart` elements apart.
template <class E, int Rows, bool Far>
void expand_rows(const E* basis, const Panel<E>& panel, int64_t p, const E* c, int64_t c_apart, int64_t steps, Held<E>* to,
                 int64_t apart) {
  for (int64_t step = 0; step < steps; ++step) {
    Wide<E> w[Rows];
    restore<E, Rows, Far>(basis + step * kStep<E>, panel.component, panel.rank, p, c + step * kStep<E>, c_apart, w);
#pragma GCC unroll 4
    for (int j = 0; j < (Rows + kParts<E> - 1) / kParts<E>; ++j) {
#pragma GCC unroll 2
      for (int q = 0; q < kParts<E>; ++q) {
        store_held<E>(to + j * apart + (step * kParts<E> + q) * kStep<E>, fold < E,
                      Rows<kParts<E> ? 1 : 2>(w + j * kParts<E>, q));
      }
    }
  }
}

template <class E>
void expand_factor(const Panel<E>& panel, int64_t r, int64_t p, const E* c, int64_t c_apart, int64_t steps, Held<E>* to,
                   int64_t apart) {
  int64_t j = 0;
  for (; j + 4 <= r; j += 4, to += 4 / kParts<E> * apart) {
    if (panel.in_place) {
      expand_rows<E, 4, true>(panel.at(j), panel, p, c, c_apart, steps, to, apart);
    } else {
      expand_rows<E, 4, false>(panel.at(j), panel, p, c, c_apart, steps, to, apart);
    }
  }
  for (; j + kParts<E> <= r; j += kParts<E>, to += apart) {
    expand_rows<E, kParts<E>, false>(panel.at(j), panel, p, c, c_apart, steps, to, apart);
  }
  for (; j < r; ++j, to += apart) expand_rows<E, 1, false>(panel.at(j), panel, p, c, c_apart, steps, to, apart);
}

// u of a chunk's tokens, scaled, as it is multiplied: [count, ranks · kParts], 0 past r. `row` is room for one.
template <class E>
void scaled_rows(const ExpandArgs& args, const Chunk& chunk, int64_t r, int64_t ranks, Sum<E>* row, Held<E>* to) {
  for (int64_t i = 0; i < chunk.count; ++i, to += ranks * kParts<E>) {
    const Sum<E> scale = *reinterpret_cast<const Sum<E>*>(args.scaling.at(chunk.tasks[i]));
    for (int64_t j = 0; j < r; ++j) row[j] = scale * *reinterpret_cast<const Sum<E>*>(args.u.at(chunk.order[i], j));
    if constexpr (kPairs<E>) {
      for (int64_t j = r; j < padded(r, kLanes<float>); ++j) row[j] = 0.0f;
      for (int64_t j = 0; j < ranks * 2; j += kLanes<float>) {
        const U16 bits = narrow(load(row + j), BF16{});
        const int64_t left = ranks * 2 - j;
        memcpy(to + j, &bits, (left < kLanes<float> ? left : kLanes<float>)*sizeof(BF16));
      }
    } else {
      memcpy(to, row, r * sizeof(Sum<E>));
    }
  }
}

template <class E>
void expand_chunk(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  using T = Sum<E>;
  const View &y = args.y, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[2], p = coeff.size[1], width = end - begin, size = sizeof(E);
  const int64_t ranks = (r + kParts<E> - 1) / kParts<E>;  // rows of factors
  const int64_t segment = width < kSegment<E> ? width : kSegment<E>, most = padded(segment, kStep<E>);
  const int64_t apart_e = apart<E>(segment, size), apart_held = apart<E>(most * kParts<E>, sizeof(Held<E>));
  const bool in_place = passes_of(chunk) <= kPasses && readable<E>(basis, 1, width);
  const int64_t packed_rows = in_place ? 0 : (p + 1) * r;
  Room room(Room::bytes<E>(packed_rows * apart_e) + Room::bytes<Held<E>>(ranks * apart_held) +
            Room::bytes<E>(kTokens * p * apart_e) + Room::bytes<E>(kTokens * apart_e) + Room::bytes<T>(kTokens * most) +
            Room::bytes<T>(padded(r, kLanes<T>)) + Room::bytes<Held<E>>(chunk.count * ranks * kParts<E>));
  E* const packed = room.take<E>(packed_rows * apart_e);
  Held<E>* const factor = room.take<Held<E>>(ranks * apart_held);
  E* const weights = room.take<E>(kTokens * p * apart_e);
  E* const copies = room.take<E>(kTokens * apart_e);
  Vec<T>* const sums = reinterpret_cast<Vec<T>*>(room.take<T>(kTokens * most));
  T* const row = room.take<T>(padded(r, kLanes<T>));
  Held<E>* const u = room.take<Held<E>>(chunk.count * ranks * kParts<E>);
  scaled_rows<E>(args, chunk, r, ranks, row, u);

  Ahead ahead;
  for (int64_t position = begin; position < end; position += segment) {
    const int64_t count = end - position < segment ? end - position : segment;
    const int64_t steps = padded(count, kStep<E>) / kStep<E>;
    const Panel<E> panel = panel_of<E>(basis, 2, 1, 0, r, position, count, in_place, packed);
    for (int64_t i = 0; i < chunk.count;) {
      const Group group = group_at(chunk, i);
      int64_t c_apart;
      if (group.restored) {
        const E* const c = coefficients<E>(coeff, chunk.tasks[i], position, count, weights, &c_apart);
        expand_factor<E>(panel, r, p, c, c_apart, steps, factor, apart_held);
      }
      for (int64_t done = 0; done < group.count; done += kTokens) {
        const int64_t first = i + done, left = group.count - done, tokens = left < kTokens ? left : kTokens;
        // What the next tokens read.
        ahead.clear();
        const int64_t next = first + tokens, last = next + kTokens < chunk.count ? next + kTokens : chunk.count;
        for (int64_t t = next; t < last; ++t) {
          ahead.add(y.at(chunk.order[t], position), y.stride[1], count, size);
          for (int64_t k = 0; k < p && (t == next || chunk.tasks[t] != chunk.tasks[t - 1]); ++k) {
            ahead.add(coeff.at(chunk.tasks[t], k, position), coeff.stride[2], count, size);
          }
        }
        E* rows[kTokens];
        for (int64_t t = 0; t < tokens; ++t) {
          char* const at = y.at(chunk.order[first + t], position);
          rows[t] = const_cast<E*>(row_of<E>(at, y.stride[1], count, copies + t * apart_e));
        }
        const Held<E>* const us = u + first * ranks * kParts<E>;
        if (group.restored) {
          ahead.spread(steps * kParts<E> / 4 * ranks);
          expand_tokens<E, kTokens>(tokens, factor, apart_held, ranks, us, rows, steps, ahead);
        } else {
          Lone<E> lone[kTokens];
          for (int64_t t = 0; t < tokens; ++t) {
            const E* const c =
                coefficients<E>(coeff, chunk.tasks[first + t], position, count, weights + t * p * apart_e, &c_apart);
            lone[t] = {us + t * ranks * kParts<E>, c, c_apart, sums + t * most / kLanes<T>};
            for (int64_t v = 0; v < steps * kParts<E>; ++v) lone[t].sums[v] = Vec<T>{};
          }
          ahead.spread(r / 4 * tokens * (in_place ? 1 : steps / 8));
          if (in_place) {
            expand_lone<E, true>(panel, r, p, lone, tokens, steps, ahead);
          } else {
            expand_lone<E, false>(panel, r, p, lone, tokens, steps, ahead);
          }
          for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t step = 0; step < steps; ++step) {
              Wide<E> value = widen_step<E>(rows[t] + step * kStep<E>);
              for (int q = 0; q < kParts<E>; ++q) value.part[q] += lone[t].sums[step * kParts<E> + q];
              store_step<E>(rows[t] + step * kStep<E>, value);
            }
          }
        }
        for (int64_t t = 0; t < tokens; ++t) {
          if (rows[t] != copies + t * apart_e) continue;
          E* const to = reinterpret_cast<E*>(y.at(chunk.order[first + t], position));
          for (int64_t at = 0; at < count; ++at) to[at * y.stride[1]] = rows[t][at];
        }
      }
      i += group.count;
    }
  }
}

void lora_expand(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  RMM_OF_DTYPE(args.y.dtype, expand_chunk, args, chunk, begin, end)
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <algorithm>

namespace rmm {

void check_expand(const View& y, const View& basis_b, const View& coeff_b, const Ids& task_ids, const View& scaling) {
  const Dtype wide = y.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  check_same(basis_b.size[0] == coeff_b.size[1] + 1 && basis_b.size[1] == y.size[1] && coeff_b.size[2] == y.size[1] &&
                 task_ids.size == y.size[0] && scaling.size[0] == coeff_b.size[0] && basis_b.dtype == y.dtype &&
                 coeff_b.dtype == y.dtype && scaling.dtype == wide,
             "y [T, out], basis_b [p+1, out, r], coeff_b [n, p, out], task_ids [T], scaling [n]");
}

void run_expand(const TokenPlan& plan, const View& y, const View& u, const View& basis_b, const View& coeff_b,
                const View& scaling) {
  const ExpandArgs args{y, u, basis_b, coeff_b, scaling};
  constexpr int64_t least = 64;  // positions; whole steps of every dtype
  const int64_t r = basis_b.size[2], width = y.size[1], pieces = (width + least - 1) / least, chunks = plan.chunks();
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * width;
  const int64_t parts = work < 32768 ? 1 : parts_of(chunks, pieces), units = chunks * parts;
  const auto kernel = RMM_KERNEL_BF16(lora_expand);
  torch::stable::parallel_for(0, units, work < 32768 ? units : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit % parts, from = part * pieces / parts * least, to = (part + 1) * pieces / parts * least;
      if (from < width) kernel(args, plan.chunk(unit / parts, coeff_b.size[1], coeff_b.dtype), from, std::min(to, width));
    }
  });
}

void lora_expand_op(Tensor y, Tensor u, Tensor basis_b, Tensor coeff_b, Tensor task_ids, Tensor scaling) {
  const View out = view(y, 2, "y"), from = view(u, 2, "u"), basis = view(basis_b, 3, "basis_b");
  const View coeff = view(coeff_b, 3, "coeff_b"), scales = view(scaling, 1, "scaling");
  const Ids tasks = ids(task_ids);
  check_expand(out, basis, coeff, tasks, scales);
  check_same(from.size[0] == out.size[0] && from.size[1] == basis.size[2] && from.dtype == scales.dtype,
             "u [T, r] and basis_b [p+1, out, r]");
  run_expand(plan_tokens(tasks, coeff.size[0]), out, from, basis, coeff, scales);
}

STABLE_TORCH_LIBRARY_IMPL(rmm_kernels, CPU, m) {
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_op));
  m.impl("lora_expand_.cpu", TORCH_BOX(&lora_expand_op));
}

}  // namespace rmm
#endif
