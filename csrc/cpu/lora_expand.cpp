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
RMM_INLINE void expand_tile(const T* w, int64_t row_stride, int64_t r, const T* u, const T* const* weight, int64_t offset,
                            Vec<T>* delta) {
  Vec<T> sum[Tokens][Vecs] = {};
  for (int64_t j = 0; j < r; ++j) {
    Vec<T> row[Vecs];
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) row[v] = load(w + j * row_stride + v * kLanes<T>);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const T ut = u[t * r + j];
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) sum[t][v] += ut * row[v];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      Vec<T>& to = delta[t * kBlockVecs + v];
      to += weight == nullptr ? sum[t][v] : load(weight[t] + offset + v * kLanes<T>) * sum[t][v];
    }
  }
}

// As expand_tile, for 1 to Tokens tokens and a whole block.
template <class T, int Tokens>
void expand_tokens(int64_t tokens, const T* w, int64_t row_stride, int64_t r, const T* u, const T* const* weight,
                   Vec<T>* delta) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return expand_tokens<T, Tokens - 1>(tokens, w, row_stride, r, u, weight, delta);
  }
  constexpr int vecs = 4;
  static_assert(kBlockVecs % vecs == 0);
  for (int v = 0; v < kBlockVecs; v += vecs) {
    expand_tile<T, Tokens, vecs>(w + v * kLanes<T>, row_stride, r, u, weight, v * kLanes<T>, delta + v);
  }
}

// y += delta over one block.
template <class T>
void add_block(Dtype dtype, char* y, int64_t stride, int64_t width, const Vec<T>* delta, Vec<T>* room) {
  const bool plain = element_size(dtype) == sizeof(T) && stride == 1 && width == kBlock<T>;
  if (!plain) load_row<T>(dtype, y, stride, width, room);
  T* const at = plain ? reinterpret_cast<T*>(y) : reinterpret_cast<T*>(room);
  for (int v = 0; v < kBlockVecs; ++v) store(at + v * kLanes<T>, load(at + v * kLanes<T>) + delta[v]);
  if (!plain) store_row<T>(dtype, y, stride, width, room);
}

// The next block of every row of a basis that is read where it is.
template <class T>
void fetch_rows(const Panel<T>& panel, int64_t block, int64_t k, int64_t r) {
  for (int64_t j = 0; j < r; ++j) {
    const char* const row = reinterpret_cast<const char*>(panel.at(block, k, j));
    for (int byte = 0; byte < kBlockBytes; byte += 64) __builtin_prefetch(row + byte);
  }
}

template <class T>
void expand_chunk(const ExpandArgs& args, const Chunk& chunk, int64_t begin, int64_t end) {
  const View &y = args.y, &basis = args.basis, &coeff = args.coeff;
  const int64_t r = basis.size[2], p = coeff.size[1], count = end - begin, blocks = blocks_of(count, kBlock<T>);
  const int64_t rows = r * kBlockVecs, u_vecs = (chunk.count * r) / kLanes<T> + 1;
  Scratch<T> scratch((p + 2) * blocks * rows + (2 * kTokens + 1 + p) * kBlockVecs + u_vecs);
  Vec<T>* const packed = scratch.take((p + 1) * blocks * rows);
  Vec<T>* const factor = scratch.take(blocks * rows);
  Vec<T>* const weights = scratch.take(kTokens * kBlockVecs);
  Vec<T>* const delta = scratch.take(kTokens * kBlockVecs);
  Vec<T>* const row = scratch.take(kBlockVecs);
  Vec<T>* const c = scratch.take(p * kBlockVecs);
  T* const u = reinterpret_cast<T*>(scratch.take(u_vecs));  // [chunk.count, r], scaled
  const Panel<T> panel = pack<T>(basis, 2, 1, begin, count, chunk.count, packed);
  for (int64_t i = 0; i < chunk.count; ++i) {
    const T scale = *reinterpret_cast<const T*>(args.scaling.at(chunk.tasks[i]));
    for (int64_t j = 0; j < r; ++j) u[i * r + j] = scale * *reinterpret_cast<const T*>(args.u.at(chunk.order[i], j));
  }

  for (int64_t i = 0, some; i < chunk.count; i += some) {
    const int64_t alone = singles(chunk, i, kTokens);
    some = alone > 0 ? alone : run_length(chunk, i);
    Panel<T> own{};
    if (alone == 0) own = rebuild<T>(panel, r, coeff, chunk.tasks[i], begin, count, c, factor);
    for (int64_t first = i; first < i + some; first += kTokens) {
      const int64_t tokens = i + some - first < kTokens ? i + some - first : kTokens;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t position = begin + block * kBlock<T>;
        const int64_t width = end - position < kBlock<T> ? end - position : kBlock<T>;
        for (int64_t v = 0; v < tokens * kBlockVecs; ++v) delta[v] = Vec<T>{};
        // Where this block's tokens, or the next ones, go on.
        const bool last = block + 1 == blocks;
        const int64_t ahead = last ? first + tokens : first, from = last ? begin : position + width;
        const int64_t until = ahead + kTokens < chunk.count ? ahead + kTokens : chunk.count;
        for (int64_t t = ahead; t < until; ++t) fetch_block(y.dtype, y.at(chunk.order[t], from), y.stride[1]);
        if (alone == 0) {
          expand_tokens<T, kTokens>(tokens, own.at(block, 0), own.rank, r, u + first * r, nullptr, delta);
        } else {
          if (panel.in_place && block + 1 < blocks) fetch_rows(panel, block + 1, 0, r);
          expand_tokens<T, kTokens>(tokens, panel.at(block, 0), panel.rank, r, u + first * r, nullptr, delta);
          for (int64_t k = 0; k < p; ++k) {
            for (int64_t t = ahead; t < until; ++t) {
              fetch_block(coeff.dtype, coeff.at(chunk.tasks[t], k, from), coeff.stride[2]);
            }
            const T* weight[kTokens];
            for (int64_t t = 0; t < tokens; ++t) {
              const char* const at = coeff.at(chunk.tasks[first + t], k, position);
              weight[t] = row_of<T>(coeff.dtype, at, coeff.stride[2], width, weights + t * kBlockVecs);
            }
            if (panel.in_place && block + 1 < blocks) fetch_rows(panel, block + 1, k + 1, r);
            expand_tokens<T, kTokens>(tokens, panel.at(block, k + 1), panel.rank, r, u + first * r, weight, delta);
          }
        }
        for (int64_t t = 0; t < tokens; ++t) {
          add_block<T>(y.dtype, y.at(chunk.order[first + t], position), y.stride[1], width, delta + t * kBlockVecs, row);
        }
      }
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
  const int64_t span = span_of(width), parts = (width + span - 1) / span;
  const auto kernel = RMM_KERNEL(lora_expand);
  const int64_t work = static_cast<int64_t>(plan.order.size()) * r * width;
  torch::stable::parallel_for(0, chunks * parts, work < 32768 ? chunks * parts : 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t from = unit % parts * span;
      kernel(args, plan.chunk(unit / parts), from, std::min(from + span, width));
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
