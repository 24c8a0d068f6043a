// lora_expand_: y_t += scaling Σ_k c_k ⊙ (basis_b[k] u_t), lanes over positions.

#include "lora.h"

namespace rmm {

struct ExpandArgs {
  View y, u, basis, coeff, scaling;  // [T, out], [T, r], [p+1, out, r], [n, p, out], [n]
};

// Adds to y at positions begin … end for a chunk's tokens.
RMM_DECLARE_KERNEL(void lora_expand(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end))

namespace RMM_ISA {

// delta[t] += weight[t] ⊙ Σ_j u[t][j] · w[j] at `Vecs` vectors of positions; a weight of null is 1.
template <class T, int Tokens, int Vecs>
RMM_INLINE void expand_tile(const T* w, int64_t row_stride, int64_t r, const T* u, const T* const* weight, Vec<T>* delta) {
  Vec<T> sum[Tokens][Vecs] = {};
  for (int64_t j = 0; j < r; ++j) {
    Vec<T> row[Vecs];
    for (int v = 0; v < Vecs; ++v) row[v] = load(w + j * row_stride + v * kLanes<T>);
    for (int t = 0; t < Tokens; ++t) {
      const T ut = u[t * r + j];
      for (int v = 0; v < Vecs; ++v) sum[t][v] += ut * row[v];
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int v = 0; v < Vecs; ++v) {
      Vec<T>& to = delta[t * kBlockVecs + v];
      to += weight == nullptr ? sum[t][v] : load(weight[t] + v * kLanes<T>) * sum[t][v];
    }
  }
}

template <class T, int Tokens>
void expand_tokens(int64_t tokens, const T* w, int64_t row_stride, int64_t r, const T* u, const T* const* weight,
                   Vec<T>* delta) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return expand_tokens<T, Tokens - 1>(tokens, w, row_stride, r, u, weight, delta);
  }
  constexpr int vecs = 4;
  static_assert(kBlockVecs % vecs == 0);
  for (int v = 0; v < kBlockVecs; v += vecs) {
    const T* shifted[Tokens];
    for (int t = 0; t < Tokens; ++t) shifted[t] = weight == nullptr ? nullptr : weight[t] + v * kLanes<T>;
    expand_tile<T, Tokens, vecs>(w + v * kLanes<T>, row_stride, r, u, weight == nullptr ? nullptr : shifted, delta + v);
  }
}

template <class T>
void expand_chunk(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  const View &y = args.y, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[2], p = coeff.size[1];
  Scratch<T> scratch((p + 1) * r * kBlockVecs + r * kBlockVecs + (chunk.count + 2 + kTokens) * kBlockVecs +
                     (chunk.count * r) / kLanes<T> + 1);
  Vec<T>* const panel_scratch = scratch.take((p + 1) * r * kBlockVecs);
  Vec<T>* const factor = scratch.take(r * kBlockVecs);
  Vec<T>* const delta = scratch.take(chunk.count * kBlockVecs);
  Vec<T>* const row = scratch.take(kBlockVecs);
  Vec<T>* const c = scratch.take(kTokens * kBlockVecs);
  T* const u = reinterpret_cast<T*>(scratch.take((chunk.count * r) / kLanes<T> + 1));  // [chunk.count, r], scaled
  for (int64_t i = 0; i < chunk.count; ++i) {
    const T scale = *reinterpret_cast<const T*>(args.scaling.at(chunk.tasks[i]));
    for (int64_t j = 0; j < r; ++j) u[i * r + j] = scale * *reinterpret_cast<const T*>(args.u.at(chunk.order[i], j));
  }

  for (int64_t position = begin; position < end; position += kBlock<T>) {
    const int64_t count = end - position < kBlock<T> ? end - position : kBlock<T>;
    const Panel<T> panel = panel_of<T>(basis, 2, 1, 0, r, position, count, panel_scratch);
    for (int64_t i = 0; i < chunk.count * kBlockVecs; ++i) delta[i] = Vec<T>{};

    for (int64_t i = 0; i < chunk.count;) {
      const int64_t length = run_length(chunk, i);
      if (length > 1) {
        rebuild<T>(panel, r, coeff, chunk.tasks[i], position, count, c, factor);
        for (int64_t done = i; done < i + length; done += kTokens) {
          expand_tokens<T, kTokens>(i + length - done < kTokens ? i + length - done : kTokens,
                                    reinterpret_cast<const T*>(factor), kBlock<T>, r, u + done * r, nullptr,
                                    delta + done * kBlockVecs);
        }
        i += length;
        continue;
      }
      int64_t some = 1;
      while (some < kTokens && i + some < chunk.count && run_length(chunk, i + some) == 1) ++some;
      expand_tokens<T, kTokens>(some, panel.at(0, 0), panel.row_stride, r, u + i * r, nullptr, delta + i * kBlockVecs);
      for (int64_t k = 0; k < p; ++k) {
        const T* weight[kTokens];
        for (int64_t t = 0; t < some; ++t) {
          weight[t] = block_of<T>(coeff.dtype, coeff.at(chunk.tasks[i + t], k, position), coeff.stride[2], count,
                                  c + t * kBlockVecs);
        }
        expand_tokens<T, kTokens>(some, panel.at(k + 1, 0), panel.row_stride, r, u + i * r, weight, delta + i * kBlockVecs);
      }
      i += some;
    }

    for (int64_t i = 0; i < chunk.count; ++i) {
      char* const to = y.at(chunk.order[i], position);
      load_row<T>(y.dtype, to, y.stride[1], count, row);
      for (int v = 0; v < kBlockVecs; ++v) row[v] += delta[i * kBlockVecs + v];
      store_row<T>(y.dtype, to, y.stride[1], count, row);
    }
  }
}

void lora_expand(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  args.y.dtype == Dtype::f64 ? expand_chunk<double>(args, chunk, begin, end) : expand_chunk<float>(args, chunk, begin, end);
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
  const int64_t r = basis_b.size[2], width = y.size[1], chunks = plan.chunks();
  constexpr int64_t length = 512;  // positions of a unit of work
  const int64_t parts = (width + length - 1) / length;
  const auto kernel = RMM_KERNEL(lora_expand);
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * width;
  torch::stable::parallel_for(0, chunks * parts, work < 32768 ? chunks * parts : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t from = unit % parts * length;
      kernel(args, plan.chunk(unit / parts), from, std::min(from + length, width));
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
