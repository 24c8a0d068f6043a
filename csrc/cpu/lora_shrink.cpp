// lora_shrink: u_t = Σ_k basis_a[k] (c_k ⊙ x_t), lanes over positions.

#include "lora.h"

namespace rmm {

struct ShrinkArgs {
  View x, basis, coeff;  // [T, in], [p+1, r, in], [n, p, in]
};

// Sums over positions begin … end of a chunk's tokens, into out [chunk.count, r] of the accumulator's dtype.
RMM_DECLARE_KERNEL(void lora_shrink(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end, void* out))

namespace RMM_ISA {

// sums[t][j] += Σ_segments Σ_positions w[segment][j] · z[t][segment], a segment being a block of positions: Tokens × Rows
// sums in registers.
template <class T, int Tokens, int Rows>
RMM_INLINE void shrink_tile(const T* w, int64_t row_stride, int64_t segment_stride, const T* const* z, int64_t segments,
                            Vec<T>* sums, int64_t sums_stride, Ahead& ahead) {
  Vec<T> sum[Tokens][Rows];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) sum[t][j] = sums[t * sums_stride + j];
  }
  for (int64_t s = 0; s < segments; ++s) {
    const T* const ws = w + s * segment_stride;
    ahead.step();
    for (int v = 0; v < kBlockVecs; ++v) {
      Vec<T> row[Rows];
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) row[j] = load(ws + j * row_stride + v * kLanes<T>);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const Vec<T> zt = load(z[t] + s * kBlock<T> + v * kLanes<T>);
#pragma GCC unroll 8
        for (int j = 0; j < Rows; ++j) sum[t][j] += zt * row[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < Rows; ++j) sums[t * sums_stride + j] = sum[t][j];
  }
}

// As shrink_tile, for 1 to Tokens tokens and any number of ranks.
template <class T, int Tokens>
void shrink_tokens(int64_t tokens, const T* w, int64_t row_stride, int64_t segment_stride, const T* const* z, int64_t segments,
                   int64_t r, Vec<T>* sums, Ahead& ahead) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) {
      return shrink_tokens<T, Tokens - 1>(tokens, w, row_stride, segment_stride, z, segments, r, sums, ahead);
    }
  }
  ahead.spread((r / 4 + r % 4) * segments);
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) {
    shrink_tile<T, Tokens, 4>(w + j * row_stride, row_stride, segment_stride, z, segments, sums + j, r, ahead);
  }
  for (; j < r; ++j) {
    shrink_tile<T, Tokens, 1>(w + j * row_stride, row_stride, segment_stride, z, segments, sums + j, r, ahead);
  }
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

// to[k] = c_k ⊙ x over `count` positions from `position` on, k = 0 … p and c_0 = 1; to[k] are `blocks` blocks apart.
template <class T>
void scale_row(const ShrinkArgs& args, const Chunk& chunk, int64_t token, int64_t position, int64_t count, int64_t blocks,
               Vec<T>* to, Vec<T>* room) {
  const View &x = args.x, &coeff = args.coeff;
  const T* const row = row_of<T>(x.dtype, x.at(chunk.order[token], position), x.stride[1], count, to);
  for (int64_t v = 0; v < blocks * kBlockVecs; ++v) to[v] = load(row + v * kLanes<T>);
  for (int64_t k = 0; k < coeff.size[1]; ++k) {
    Vec<T>* const product = to + (k + 1) * blocks * kBlockVecs;
    const T* const weight = row_of<T>(coeff.dtype, coeff.at(chunk.tasks[token], k, position), coeff.stride[2], count, room);
    for (int64_t v = 0; v < blocks * kBlockVecs; ++v) product[v] = to[v] * load(weight + v * kLanes<T>);
  }
}

// What scale_row will read.
template <class T>
void add_row(Ahead& ahead, const ShrinkArgs& args, const Chunk& chunk, int64_t token, int64_t position, int64_t count) {
  const View &x = args.x, &coeff = args.coeff;
  ahead.add(x.dtype, x.at(chunk.order[token], position), x.stride[1], count);
  for (int64_t k = 0; k < coeff.size[1]; ++k) {
    ahead.add(coeff.dtype, coeff.at(chunk.tasks[token], k, position), coeff.stride[2], count);
  }
}

constexpr int64_t kFew = 4;  // blocks of a row that the restored form takes at once

template <class T>
void shrink_chunk(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end, T* out) {
  const View &x = args.x, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[1], p = coeff.size[1], count = end - begin, blocks = blocks_of(count, kBlock<T>);
  const int64_t rows = r * kBlockVecs, span = blocks * kBlockVecs, block_row = (p + 1) * kBlockVecs;
  const int64_t widest = (p + 1) * span > kFew * kBlockVecs ? (p + 1) * span : kFew * kBlockVecs;
  Scratch<T> scratch((p + 2) * blocks * rows + chunk.count * r + kTokens * widest + span + p * kBlockVecs);
  Vec<T>* const packed = scratch.take((p + 1) * blocks * rows);
  Vec<T>* const factor = scratch.take(blocks * rows);
  Vec<T>* const sums = scratch.take(chunk.count * r);
  Vec<T>* const scaled = scratch.take(kTokens * widest);
  Vec<T>* const room = scratch.take(span);
  Vec<T>* const c = scratch.take(p * kBlockVecs);
  const Panel<T> panel = pack<T>(basis, 1, 2, begin, count, chunk.count, packed);
  for (int64_t i = 0; i < chunk.count * r; ++i) sums[i] = Vec<T>{};

  const T* z[kTokens];
  Ahead ahead;
  for (int64_t i = 0, some; i < chunk.count; i += some) {
    some = singles(chunk, i, kTokens);
    if (some == 0) {
      some = run_length(chunk, i);
      const Panel<T> own = rebuild<T>(panel, r, coeff, chunk.tasks[i], begin, count, c, factor);
      for (int64_t done = 0; done < some; done += kTokens) {
        const int64_t tokens = some - done < kTokens ? some - done : kTokens;
        // A few blocks at a time, so that rows of x stay in the first-level cache while the factor passes.
        for (int64_t block = 0, few; block < blocks; block += few) {
          few = blocks - block < kFew ? blocks - block : kFew;
          const int64_t position = begin + block * kBlock<T>, most = kFew * kBlock<T>;
          const int64_t width = end - position < most ? end - position : most, left = end - position - width;
          ahead.clear();
          for (int64_t t = 0; t < tokens; ++t) {
            const char* const at = x.at(chunk.order[i + done + t], position);
            z[t] = row_of<T>(x.dtype, at, x.stride[1], width, scaled + t * kFew * kBlockVecs);
            ahead.add(x.dtype, at + width * element_size(x.dtype), x.stride[1], left < most ? left : most);
          }
          for (int64_t t = i + done + tokens; left == 0 && t < chunk.count && t < i + done + tokens + kTokens; ++t) {
            ahead.add(x.dtype, x.at(chunk.order[t], begin), x.stride[1], count < most ? count : most);
          }
          shrink_tokens<T, kTokens>(tokens, own.at(block, 0), own.rank, own.block, z, few, r, sums + (i + done) * r, ahead);
        }
      }
    } else if (panel.in_place) {
      // Row by row of the basis, each from end to end.
      for (int64_t t = 0; t < some; ++t) {
        scale_row<T>(args, chunk, i + t, begin, count, blocks, scaled + t * (p + 1) * span, room);
      }
      ahead.clear();
      for (int64_t k = 0; k <= p; ++k) {
        for (int64_t t = 0; t < some; ++t) z[t] = reinterpret_cast<const T*>(scaled + (t * (p + 1) + k) * span);
        shrink_tokens<T, kTokens>(some, panel.at(0, k), panel.rank, panel.block, z, blocks, r, sums + i * r, ahead);
      }
    } else {
      for (int64_t t = 0; t < some; ++t) z[t] = reinterpret_cast<const T*>(scaled + t * block_row);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t position = begin + block * kBlock<T>, width = end - position < kBlock<T> ? end - position : kBlock<T>;
        const int64_t left = end - position - width;
        ahead.clear();
        for (int64_t t = 0; t < some; ++t) {
          scale_row<T>(args, chunk, i + t, position, width, 1, scaled + t * block_row, room);
          add_row<T>(ahead, args, chunk, i + t, position + width, left < kBlock<T> ? left : kBlock<T>);
        }
        for (int64_t t = i + some; left == 0 && t < chunk.count && t < i + some + kTokens; ++t) {
          add_row<T>(ahead, args, chunk, t, begin, count < kBlock<T> ? count : kBlock<T>);
        }
        shrink_tokens<T, kTokens>(some, panel.at(block, 0), panel.rank, panel.component, z, p + 1, r, sums + i * r, ahead);
      }
    }
  }
  add_lanes<T>(sums, chunk.count * r, out);
}

void lora_shrink(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end, void* out) {
  if (args.x.dtype == Dtype::f64) {
    shrink_chunk<double>(args, chunk, begin, end, static_cast<double*>(out));
  } else {
    shrink_chunk<float>(args, chunk, begin, end, static_cast<float*>(out));
  }
}

}  // namespace RMM_ISA
}  // namespace rmm

#ifdef RMM_OPS
#include <algorithm>
#include <numeric>

#include "../common/tensor.h"

namespace rmm {

TokenPlan plan_tokens(const Ids& task_ids, int64_t n) {
  check_ids(task_ids, n, -1);
  TokenPlan plan;
  plan.order.reserve(task_ids.size);
  for (int64_t t = 0; t < task_ids.size; ++t) {
    if (task_ids[t] >= 0) plan.order.push_back(t);
  }
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) { return task_ids[a] < task_ids[b]; });
  plan.tasks.reserve(plan.order.size());
  for (const int64_t t : plan.order) plan.tasks.push_back(task_ids[t]);
  return plan;
}

void check_shrink(const View& x, const View& basis_a, const View& coeff_a, const Ids& task_ids) {
  check_same(basis_a.size[0] == coeff_a.size[1] + 1 && basis_a.size[2] == x.size[1] && coeff_a.size[2] == x.size[1] &&
                 task_ids.size == x.size[0] && basis_a.dtype == x.dtype && coeff_a.dtype == x.dtype,
             "x [T, in], basis_a [p+1, r, in], coeff_a [n, p, in], task_ids [T]");
}

namespace {

template <class T>
void shrink(const TokenPlan& plan, const View& x, const View& basis_a, const View& coeff_a, const View& u) {
  const ShrinkArgs args{x, basis_a, coeff_a};
  const int64_t r = basis_a.size[1], width = x.size[1], chunks = plan.chunks();
  // The spans' sums are added in order. How many there are depends on the shapes only, so that results do not depend on the
  // threads.
  const int64_t span = span_of(width), parts = std::max<int64_t>(1, (width + span - 1) / span), room = kChunk * r;
  std::vector<T> sums(chunks * parts * room);
  const auto kernel = RMM_KERNEL(lora_shrink);
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * width;
  torch::stable::parallel_for(0, chunks * parts, work < 32768 ? chunks * parts : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t from = unit % parts * span;
      kernel(args, plan.chunk(unit / parts), from, std::min(from + span, width), sums.data() + unit * room);
    }
  });
  for (int64_t i = 0; i < static_cast<int64_t>(plan.order.size()); ++i) {
    const T* const from = sums.data() + i / kChunk * parts * room + i % kChunk * r;
    T* const to = reinterpret_cast<T*>(u.at(plan.order[i]));
    for (int64_t j = 0; j < r; ++j) {
      T total = from[j];
      for (int64_t part = 1; part < parts; ++part) total += from[part * room + j];
      to[j] = total;
    }
  }
}

}  // namespace

void run_shrink(const TokenPlan& plan, const View& x, const View& basis_a, const View& coeff_a, const View& u) {
  x.dtype == Dtype::f64 ? shrink<double>(plan, x, basis_a, coeff_a, u) : shrink<float>(plan, x, basis_a, coeff_a, u);
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
