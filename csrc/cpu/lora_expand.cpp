// lora_expand_: y_t += scaling w u_t, w the task's restored lora_b, lanes over positions.

#include "lora_direct.h"

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
// Meanwhile it asks for as much of `next`, the rows that are needed next.
template <class E, int Tokens, int Regs>
RMM_INLINE void expand_tile(const Held<E>* w, int64_t apart, int64_t ranks, const Held<E>* u, E* const* y,
                            const char* const* next, int64_t position) {
  constexpr int64_t held = kStep<E>;  // elements of a register
  constexpr int64_t size = sizeof(E), bytes = Regs / kParts<E> * kStep<E> * size;
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next[t] + position * size + line, 1);
  }
  Vec<Sum<E>> sum[Tokens][Regs] = {};
  for (int64_t j = 0; j < ranks; ++j) {
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
void expand_tokens(int64_t tokens, const Held<E>* w, int64_t apart, int64_t ranks, const Held<E>* u, E* const* y,
                   const char* const* next, int64_t steps) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return expand_tokens<E, Tokens - 1>(tokens, w, apart, ranks, u, y, next, steps);
  }
  constexpr int regs = 4, few = regs / kParts<E>;
  int64_t step = 0;
  for (; step + few <= steps; step += few) {
    expand_tile<E, Tokens, regs>(w + step * kParts<E> * kStep<E>, apart, ranks, u, y, next, step * kStep<E>);
  }
  for (; step < steps; ++step) {
    expand_tile<E, Tokens, kParts<E>>(w + step * kParts<E> * kStep<E>, apart, ranks, u, y, next, step * kStep<E>);
  }
}

// Rows of one or two tasks over a segment: [Tasks, ranks / kParts], rows `apart` elements apart and tasks `factor`; c
// [Tasks, p], a segment apart.
template <class E, int Tasks, int Rows>
void expand_rows(const Panel<E>& panel, int64_t rank, int64_t p, const Sum<E>* c, int64_t steps, Held<E>* to, int64_t apart,
                 int64_t factor) {
  const int64_t width = steps * kStep<E>;
  to += rank / kParts<E> * apart;
  for (int64_t step = 0; step < steps; ++step) {
    Wide<E> w[Tasks][Rows];
    restore<E, Tasks, Rows>(panel, panel.at(rank) + step * kStep<E>, p, c + step * kStep<E>, width, p * width, w);
#pragma GCC unroll 2
    for (int t = 0; t < Tasks; ++t) {
#pragma GCC unroll 4
      for (int j = 0; j < (Rows + kParts<E> - 1) / kParts<E>; ++j) {
#pragma GCC unroll 2
        for (int q = 0; q < kParts<E>; ++q) {
          store_held<E>(to + t * factor + j * apart + (step * kParts<E> + q) * kStep<E>, fold < E,
                        Rows<kParts<E> ? 1 : 2>(w[t] + j * kParts<E>, q));
        }
      }
    }
  }
}

template <class E, int Tasks>
void expand_factors(const Panel<E>& panel, int64_t r, int64_t p, const Sum<E>* c, int64_t steps, Held<E>* to, int64_t apart,
                    int64_t factor) {
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) expand_rows<E, Tasks, 4>(panel, j, p, c, steps, to, apart, factor);
  for (; j + kParts<E> <= r; j += kParts<E>) expand_rows<E, Tasks, kParts<E>>(panel, j, p, c, steps, to, apart, factor);
  for (; j < r; ++j) expand_rows<E, Tasks, 1>(panel, j, p, c, steps, to, apart, factor);
}

// sum[t] += Σ_j u[t][j] · w[j] at a step for `Rows` ranks; what is multiplied of u lies `along` apart for a token, `between`
// from token to token.
template <class E, int Tokens, int Rows>
RMM_INLINE void add_ranks(const Wide<E> (*w)[Rows], const Held<E>* u, int64_t along, int64_t between, Wide<E>* sum) {
  constexpr int folds = (Rows + kParts<E> - 1) / kParts<E>;
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int q = 0; q < kParts<E>; ++q) {
#pragma GCC unroll 4
      for (int j = 0; j < folds; ++j) {
        sum[t].part[q] = add_products<E>(sum[t].part[q], fold < E, Rows<kParts<E> ? 1 : 2>(w[t] + j * kParts<E>, q),
                                         spread<E>(u + t * between + j * along));
      }
    }
  }
}

// y[t] += Σ_j u[t][j] · w[j] over a segment for Tokens tokens whose tasks are restored in registers; y [Tokens] and
// coefficients c [P, Tokens] are rows, u is [Tokens, ranks, kParts].
template <class E, int P, int Tokens>
void expand_steps(const Panel<E>& panel, int64_t r, const Held<E>* u, int64_t ranks, E* const* y, const E* const* c,
                  int64_t steps) {
  constexpr int parts = kParts<E>;
  for (int64_t at = 0; at < steps * kStep<E>; at += kStep<E>) {
    const Coefficients<E, Tokens, P> coefficients(c, at);
    Wide<E> sum[Tokens] = {};
    int64_t j = 0;
    for (; j + parts <= r; j += parts) {
      Wide<E> w[Tokens][parts];
      coefficients.restored(panel, panel.at(j) + at, w);
      add_ranks<E, Tokens, parts>(w, u + j, parts, ranks * parts, sum);
    }
    if (parts > 1 && j < r) {
      Wide<E> w[Tokens][1];
      coefficients.restored(panel, panel.at(j) + at, w);
      add_ranks<E, Tokens, 1>(w, u + j, parts, ranks * parts, sum);
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      Wide<E> value = widen_step<E>(y[t] + at);
      __builtin_prefetch(y[t] + at + kAhead, 1, 2);
#pragma GCC unroll 2
      for (int q = 0; q < parts; ++q) value.part[q] += sum[t].part[q];
      store_step<E>(y[t] + at, value);
    }
  }
}

// As expand_steps, for 1 to Tokens tokens.
template <class E, int P, int Tokens = kAbreast<E, P>>
void expand_group(int64_t tokens, const Panel<E>& panel, int64_t r, const Held<E>* u, int64_t ranks, E* const* y,
                  const E* const* c, int64_t steps) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return expand_group<E, P, Tokens - 1>(tokens, panel, r, u, ranks, y, c, steps);
  }
  expand_steps<E, P, Tokens>(panel, r, u, ranks, y, c, steps);
}

// What a group's tokens need of a piece.
template <class E>
struct Piece {
  Held<E>* u;    // [ranks, kLone, kParts]
  Sum<E>* c;     // [p, kLone, kPiece]
  Sum<E>* sums;  // [kLone, kPiece]
  int64_t steps;
};

// sums[t] += Σ_j u[t][j] · w[j] over a piece for `Rows` ranks, whose u is `u`, of Tokens tokens from `token` on.
template <class E, int Tokens, int Rows>
void expand_abreast(const Panel<E>& panel, const E* basis, int64_t p, const Piece<E>& piece, const Held<E>* u, int64_t token) {
  using T = Sum<E>;
  constexpr int64_t lone = kLone<E, 0>;
  const T* c = piece.c + token * kPiece;
  T* sums = piece.sums + token * kPiece;
  u += token * kParts<E>;
  for (int64_t step = 0; step < piece.steps; ++step, basis += kStep<E>, c += kStep<E>, sums += kStep<E>) {
    Wide<E> w[Tokens][Rows], sum[Tokens];
    restore<E, Tokens, Rows>(panel, basis, p, c, lone * kPiece, kPiece, w);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) memcpy(sum[t].part, sums + t * kPiece, sizeof(Wide<E>));
    add_ranks<E, Tokens, Rows>(w, u, lone * kParts<E>, kParts<E>, sum);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) memcpy(sums + t * kPiece, sum[t].part, sizeof(Wide<E>));
  }
}

// As expand_abreast, for all tokens from `token` on, `Tokens` of them at once.
template <class E, int Rows, int Tokens = kAbreast<E, 0>>
void expand_piece(const Panel<E>& panel, const E* basis, int64_t p, const Piece<E>& piece, const Held<E>* u, int64_t token,
                  int64_t tokens) {
  for (; token + Tokens <= tokens; token += Tokens) expand_abreast<E, Tokens, Rows>(panel, basis, p, piece, u, token);
  if constexpr (Tokens > 1) expand_piece<E, Rows, Tokens - 1>(panel, basis, p, piece, u, token, tokens);
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

// Back from a copy that row_of made.
template <class E>
void put_row(const E* row, char* to, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) reinterpret_cast<E*>(to)[i * stride] = row[i];
}

template <class E, int P>
void expand_chunk(const ExpandArgs& args, Chunk chunk, int64_t begin, int64_t end) {
  using T = Sum<E>;
  if (chunk.restored == 0) chunk.restored = kRestored<E, P>;
  const View &y = args.y, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[2], p = coeff.size[1], width = end - begin, size = sizeof(E);
  const int64_t ranks = (r + kParts<E> - 1) / kParts<E>;  // rows of factors
  const int64_t segment = segment_of<E, P>(chunk, (p + 1) * r, width), most = padded(segment, kStep<E>);
  const int64_t apart_e = apart<E>(segment, size), apart_held = apart<E>(most * kParts<E>, sizeof(Held<E>));
  constexpr int64_t lone = kLone<E, P>, copied = P > 0 && lone > kTokens ? lone : kTokens, pieces = P > 0 ? 0 : lone * kPiece;
  Room room(Room::bytes<E>((p + 1) * r * apart_e) + Room::bytes<E>(copied * apart_e) + Room::bytes<E>(P * lone * apart_e) +
            Room::bytes<Held<E>>(2 * ranks * apart_held) + Room::bytes<T>(2 * p * most) + Room::bytes<T>(p * pieces) +
            Room::bytes<T>(pieces) + Room::bytes<Held<E>>(lone * ranks * kParts<E>) + Room::bytes<T>(padded(r, kLanes<T>)) +
            Room::bytes<Held<E>>(chunk.count * ranks * kParts<E>));
  E* const packed = room.take<E>((p + 1) * r * apart_e);
  E* const copies = room.take<E>(copied * apart_e);
  E* const copies_c = room.take<E>(P * lone * apart_e);
  Held<E>* const factors = room.take<Held<E>>(2 * ranks * apart_held);
  T* const weights = room.take<T>(2 * p * most);
  T* const piece_c = room.take<T>(p * pieces);
  T* const piece_sums = room.take<T>(pieces);
  Held<E>* const piece_u = room.take<Held<E>>(lone * ranks * kParts<E>);
  T* const row = room.take<T>(padded(r, kLanes<T>));
  Held<E>* const u = room.take<Held<E>>(chunk.count * ranks * kParts<E>);
  scaled_rows<E>(args, chunk, r, ranks, row, u);

  for (int64_t position = begin; position < end; position += segment) {
    const int64_t count = end - position < segment ? end - position : segment;
    const int64_t steps = padded(count, kStep<E>) / kStep<E>;
    const Panel<E> panel = panel_of<E>(basis, 2, 1, 0, r, position, count, packed);
    // Rows of y of `tokens` tokens from i on, and, once they are changed, what of them is a copy put back.
    const auto get_rows = [&](int64_t i, int64_t tokens, E** rows) {
      for (int64_t t = 0; t < tokens; ++t) {
        const char* const at = y.at(chunk.order[i + t], position);
        rows[t] = const_cast<E*>(row_of<E>(at, y.stride[1], count, copies + t * apart_e));
      }
    };
    const auto put_rows = [&](int64_t i, int64_t tokens, E* const* rows) {
      for (int64_t t = 0; t < tokens; ++t) {
        if (rows[t] == copies + t * apart_e) put_row(rows[t], y.at(chunk.order[i + t], position), y.stride[1], count);
      }
    };
    const auto add_run = [&](const Group& run, const Held<E>* factor) {
      int64_t tokens;
      for (int64_t i = run.first; i < run.first + run.count; i += tokens) {
        tokens = run.first + run.count - i < kTokens ? run.first + run.count - i : kTokens;
        E* rows[kTokens];
        const char* next[kTokens];
        get_rows(i, tokens, rows);
        for (int64_t t = 0; t < tokens; ++t) next[t] = row_ahead(y, chunk, i + tokens + t, position, count);
        expand_tokens<E, kTokens>(tokens, factor, apart_held, ranks, u + i * ranks * kParts<E>, rows, next, steps);
        put_rows(i, tokens, rows);
      }
    };
    Groups now;
    for (int64_t i = 0; i < chunk.count; i = now.end()) {
      now = groups_at(chunk, i, lone);
      const Group& group = now.group[0];
      if (group.restored) {
        const int64_t values = steps * kStep<E>, factor = ranks * apart_held;
        widen_groups<E>(coeff, chunk, now, position, count, copies, weights, values);
        now.count == 2 ? expand_factors<E, 2>(panel, r, p, weights, steps, factors, apart_held, factor)
                       : expand_factors<E, 1>(panel, r, p, weights, steps, factors, apart_held, factor);
        for (int t = 0; t < now.count; ++t) add_run(now.group[t], factors + t * factor);
      } else if constexpr (P > 0) {
        E* rows[lone];
        const E* rows_c[P * lone];
        get_rows(i, group.count, rows);
        coefficient_rows<E>(coeff, chunk, group, position, count, copies_c, apart_e, rows_c);
        expand_group<E, P>(group.count, panel, r, u + i * ranks * kParts<E>, ranks, rows, rows_c, steps);
        put_rows(i, group.count, rows);
      } else {
        for (int64_t j = 0; j < ranks; ++j) {
          for (int64_t t = 0; t < group.count; ++t) {
            memcpy(piece_u + (j * lone + t) * kParts<E>, u + ((i + t) * ranks + j) * kParts<E>, kParts<E> * sizeof(Held<E>));
          }
        }
        for (int64_t at = 0; at < count; at += kPiece) {
          const int64_t left = count - at < kPiece ? count - at : kPiece;
          const Piece<E> piece{piece_u, piece_c, piece_sums, padded(left, kStep<E>) / kStep<E>};
          for (int64_t t = 0; t < group.count; ++t) {
            widen_coefficients<E>(coeff, chunk.tasks[i + t], position + at, left, copies, piece.c + t * kPiece, lone * kPiece);
          }
          memset(piece.sums, 0, group.count * kPiece * sizeof(T));
          const Held<E>* us = piece.u;
          int64_t j = 0;
          for (; j + 4 <= r; j += 4, us += 4 * lone) {
            expand_piece<E, 4>(panel, panel.at(j) + at, p, piece, us, 0, group.count);
          }
          for (; j + kParts<E> <= r; j += kParts<E>, us += lone * kParts<E>) {
            expand_piece<E, kParts<E>>(panel, panel.at(j) + at, p, piece, us, 0, group.count);
          }
          for (; j < r; ++j) expand_piece<E, 1>(panel, panel.at(j) + at, p, piece, us, 0, group.count);
          for (int64_t t = 0; t < group.count; ++t) {
            char* const to = y.at(chunk.order[i + t], position + at);
            E* const values = const_cast<E*>(row_of<E>(to, y.stride[1], left, copies));
            for (int64_t from = 0; from < left; from += kStep<E>) {
              Wide<E> value = widen_step<E>(values + from);
              for (int q = 0; q < kParts<E>; ++q) value.part[q] += load(piece.sums + t * kPiece + from + q * kLanes<T>);
              store_step<E>(values + from, value);
            }
            if (values == copies) put_row(values, to, y.stride[1], left);
          }
        }
      }
    }
  }
}

template <class E>
void expand_of(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  RMM_OF_COMPONENTS(args.coeff.size[1], E, expand_chunk, args, chunk, begin, end)
}

void lora_expand(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  RMM_OF_DTYPE(args.y.dtype, expand_of, args, chunk, begin, end)
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <algorithm>

#include "parallel.h"

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
  const int64_t parts = work < 32768 ? 1 : parts_of(chunks, pieces, std::min(pieces / 4, work / 32768)), units = chunks * parts;
  const auto kernel = RMM_KERNEL_BF16(lora_expand);
  parallel_shares(units, work < 32768 ? units : 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit % parts, from = part * pieces / parts * least, to = (part + 1) * pieces / parts * least;
      if (from < width) kernel(args, plan.chunk(unit / parts), from, std::min(to, width));
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
