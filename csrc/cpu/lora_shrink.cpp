// lora_shrink: u_t = Σ_k basis_a[k] (c_k ⊙ x_t), lanes over positions.

#include "lora.h"

namespace rmm {

struct ShrinkArgs {
  View x, basis, coeff;  // [T, in], [p+1, r, in], [n, p, in]
};

// Sums over positions begin … end of a chunk's tokens, into out [chunk.count, r] of the accumulator's dtype.
RMM_DECLARE_KERNEL(void lora_shrink(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end, void* out))

namespace RMM_ISA {

constexpr int kRows = 16;  // ranks whose block of the basis is kept in the first-level cache at once

// sums[t][j] += Σ_segments Σ_positions w[segment][j] · z[t][segment]: Tokens × Rows sums in registers.
template <class T, int Tokens, int Rows>
RMM_INLINE void shrink_tile(const T* w, int64_t row_stride, int64_t segment_stride, const T* const* z, int64_t z_segment_stride,
                            int64_t segments, Vec<T>* sums, int64_t sums_stride) {
  Vec<T> sum[Tokens][Rows];
  for (int t = 0; t < Tokens; ++t) {
    for (int j = 0; j < Rows; ++j) sum[t][j] = sums[t * sums_stride + j];
  }
  for (int64_t s = 0; s < segments; ++s) {
    const T* const ws = w + s * segment_stride;
    for (int v = 0; v < kBlockVecs; ++v) {
      Vec<T> row[Rows];
      for (int j = 0; j < Rows; ++j) row[j] = load(ws + j * row_stride + v * kLanes<T>);
      for (int t = 0; t < Tokens; ++t) {
        const Vec<T> zt = load(z[t] + s * z_segment_stride + v * kLanes<T>);
        for (int j = 0; j < Rows; ++j) sum[t][j] += zt * row[j];
      }
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int j = 0; j < Rows; ++j) sums[t * sums_stride + j] = sum[t][j];
  }
}

template <class T, int Tokens>
void shrink_tokens(int64_t tokens, const T* w, int64_t row_stride, int64_t segment_stride, const T* const* z,
                   int64_t z_segment_stride, int64_t segments, int64_t rows, Vec<T>* sums, int64_t sums_stride) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) {
      return shrink_tokens<T, Tokens - 1>(tokens, w, row_stride, segment_stride, z, z_segment_stride, segments, rows, sums,
                                          sums_stride);
    }
  }
  int64_t j = 0;
  for (; j + 4 <= rows; j += 4) {
    shrink_tile<T, Tokens, 4>(w + j * row_stride, row_stride, segment_stride, z, z_segment_stride, segments, sums + j,
                              sums_stride);
  }
  for (; j < rows; ++j) {
    shrink_tile<T, Tokens, 1>(w + j * row_stride, row_stride, segment_stride, z, z_segment_stride, segments, sums + j,
                              sums_stride);
  }
}

template <class T>
void shrink_chunk(const ShrinkArgs& args, const Chunk& chunk, int64_t begin, int64_t end, T* out) {
  const View &x = args.x, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[1], p = coeff.size[1];
  const int64_t panel_size = (p + 1) * kRows * kBlockVecs, direct_size = (p + 1) * kBlockVecs;
  Scratch<T> scratch(chunk.count * r + panel_size + kTokens * direct_size + (kRows + 1 + kTokens) * kBlockVecs);
  Vec<T>* const sums = scratch.take(chunk.count * r);
  Vec<T>* const panel_scratch = scratch.take(panel_size);
  Vec<T>* const scaled = scratch.take(kTokens * direct_size);
  Vec<T>* const factor = scratch.take(kRows * kBlockVecs);
  Vec<T>* const c = scratch.take(kBlockVecs);
  Vec<T>* const tokens = scratch.take(kTokens * kBlockVecs);
  for (int64_t i = 0; i < chunk.count * r; ++i) sums[i] = Vec<T>{};

  for (int64_t position = begin; position < end; position += kBlock<T>) {
    const int64_t count = end - position < kBlock<T> ? end - position : kBlock<T>;
    const auto token_at = [&](int64_t i, Vec<T>* room) __attribute__((always_inline)) {
      return block_of<T>(x.dtype, x.at(chunk.order[i], position), x.stride[1], count, room);
    };
    for (int64_t first = 0; first < r; first += kRows) {
      const int64_t rows = r - first < kRows ? r - first : kRows;
      const Panel<T> panel = panel_of<T>(basis, 1, 2, first, rows, position, count, panel_scratch);

      // Direct form: tokens alone with their task. Their sums are not neighbours, so each is its own tile of one token
      // unless the next is alone too.
      for (int64_t i = 0; i < chunk.count;) {
        const int64_t length = run_length(chunk, i);
        if (length > 1) {
          rebuild<T>(panel, rows, coeff, chunk.tasks[i], position, count, c, factor);
          for (int64_t done = 0; done < length; done += kTokens) {
            const int64_t some = length - done < kTokens ? length - done : kTokens;
            const T* z[kTokens];
            for (int64_t t = 0; t < some; ++t) z[t] = token_at(i + done + t, tokens + t * kBlockVecs);
            shrink_tokens<T, kTokens>(some, reinterpret_cast<const T*>(factor), kBlock<T>, 0, z, 0, 1, rows,
                                      sums + (i + done) * r + first, r);
          }
          i += length;
          continue;
        }
        int64_t some = 0;
        const T* z[kTokens];
        while (some < kTokens && i + some < chunk.count && run_length(chunk, i + some) == 1) {
          Vec<T>* const zt = scaled + some * direct_size;
          const T* const xt = token_at(i + some, tokens);
          for (int v = 0; v < kBlockVecs; ++v) zt[v] = load(xt + v * kLanes<T>);
          for (int64_t k = 0; k < p; ++k) {
            const T* const weights =
                block_of<T>(coeff.dtype, coeff.at(chunk.tasks[i + some], k, position), coeff.stride[2], count, c);
            for (int v = 0; v < kBlockVecs; ++v) zt[(k + 1) * kBlockVecs + v] = zt[v] * load(weights + v * kLanes<T>);
          }
          z[some++] = reinterpret_cast<const T*>(zt);
        }
        shrink_tokens<T, kTokens>(some, panel.data, panel.row_stride, panel.component_stride, z, kBlock<T>, p + 1, rows,
                                  sums + i * r + first, r);
        i += some;
      }
    }
  }
  for (int64_t i = 0; i < chunk.count * r; ++i) {
    T total = 0;
    for (int l = 0; l < kLanes<T>; ++l) total += sums[i][l];
    out[i] = total;
  }
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
  // Few tokens: several threads share a chunk, each on its part of the positions; the parts are summed in order. How many
  // parts depends on the shapes only, so that results do not depend on the threads.
  const int64_t parts = x.size[0] <= kChunk ? std::clamp<int64_t>(width / 1024, 1, 8) : 1;
  const int64_t length = (width / parts + 127) / 128 * 128, room = kChunk * r;
  std::vector<T> sums(chunks * parts * room);
  const auto kernel = RMM_KERNEL(lora_shrink);
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * width;
  torch::stable::parallel_for(0, chunks * parts, work < 32768 ? chunks * parts : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t from = unit % parts * length, to = unit % parts + 1 == parts ? width : std::min(from + length, width);
      kernel(args, plan.chunk(unit / parts), from, to, sums.data() + unit * room);
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
