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
                            Vec<T>* sums, int64_t sums_stride) {
  Vec<T> sum[Tokens][Rows] = {};
  for (int64_t s = 0; s < segments; ++s) {
    const T* const ws = w + s * segment_stride;
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
    for (int j = 0; j < Rows; ++j) sums[t * sums_stride + j] += sum[t][j];
  }
}

// As shrink_tile, for 1 to Tokens tokens and any number of ranks.
template <class T, int Tokens>
void shrink_tokens(int64_t tokens, const T* w, int64_t row_stride, int64_t segment_stride, const T* const* z, int64_t segments,
                   int64_t r, Vec<T>* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return shrink_tokens<T, Tokens - 1>(tokens, w, row_stride, segment_stride, z, segments, r, sums);
  }
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) {
    shrink_tile<T, Tokens, 4>(w + j * row_stride, row_stride, segment_stride, z, segments, sums + j, r);
  }
  for (; j < r; ++j) {
    shrink_tile<T, Tokens, 1>(w + j * row_stride, row_stride, segment_stride, z, segments, sums + j, r);
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

template <class T>
void shrink_chunk(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end, T* out) {
  const View &x = args.x, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[1], p = coeff.size[1], count = end - begin, blocks = blocks_of(count, kBlock<T>);
  const int64_t rows = r * kBlockVecs, span = blocks * kBlockVecs, scaled = (p + 1) * kBlockVecs;
  Scratch<T> scratch((p + 2) * blocks * rows + chunk.count * r + kTokens * (scaled + span) + kBlockVecs);
  Vec<T>* const packed = scratch.take((p + 1) * blocks * rows);
  Vec<T>* const factor = scratch.take(blocks * rows);
  Vec<T>* const sums = scratch.take(chunk.count * r);
  Vec<T>* const products = scratch.take(kTokens * scaled);
  Vec<T>* const copies = scratch.take(kTokens * span);
  Vec<T>* const c = scratch.take(kBlockVecs);
  const Panel<T> panel = pack<T>(basis, 1, 2, begin, count, chunk.count, packed);
  for (int64_t i = 0; i < chunk.count * r; ++i) sums[i] = Vec<T>{};

  for (int64_t i = 0, some; i < chunk.count; i += some) {
    const T* z[kTokens];
    const auto row = [&](int64_t t) {
      return row_of<T>(x.dtype, x.at(chunk.order[i + t], begin), x.stride[1], count, copies + t % kTokens * span);
    };
    some = singles(chunk, i, kTokens);
    if (some == 0) {
      some = run_length(chunk, i);
      const Panel<T> own = rebuild<T>(panel, r, coeff, chunk.tasks[i], begin, count, c, factor);
      for (int64_t done = 0; done < some; done += kTokens) {
        const int64_t tokens = some - done < kTokens ? some - done : kTokens;
        for (int64_t t = 0; t < tokens; ++t) z[t] = row(done + t);
        shrink_tokens<T, kTokens>(tokens, own.data, own.rank, own.block, z, blocks, r, sums + (i + done) * r);
      }
      continue;
    }
    const T* from[kTokens];
    for (int64_t t = 0; t < some; ++t) {
      from[t] = row(t);
      z[t] = reinterpret_cast<const T*>(products + t * scaled);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t position = begin + block * kBlock<T>, width = end - position < kBlock<T> ? end - position : kBlock<T>;
      for (int64_t t = 0; t < some; ++t) {
        Vec<T>* const product = products + t * scaled;
        for (int v = 0; v < kBlockVecs; ++v) product[v] = load(from[t] + block * kBlock<T> + v * kLanes<T>);
        for (int64_t k = 0; k < p; ++k) {
          const char* const at = coeff.at(chunk.tasks[i + t], k, position);
          const T* const weight = row_of<T>(coeff.dtype, at, coeff.stride[2], width, c);
          for (int v = 0; v < kBlockVecs; ++v) {
            product[(k + 1) * kBlockVecs + v] = product[v] * load(weight + v * kLanes<T>);
          }
        }
      }
      shrink_tokens<T, kTokens>(some, panel.at(block, 0), panel.rank, panel.component, z, p + 1, r, sums + i * r);
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
  const int64_t parts = std::max<int64_t>(1, (width + kSpan - 1) / kSpan), room = kChunk * r;
  std::vector<T> sums(chunks * parts * room);
  const auto kernel = RMM_KERNEL(lora_shrink);
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * width;
  torch::stable::parallel_for(0, chunks * parts, work < 32768 ? chunks * parts : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t from = unit % parts * kSpan;
      kernel(args, plan.chunk(unit / parts), from, std::min(from + kSpan, width), sums.data() + unit * room);
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
