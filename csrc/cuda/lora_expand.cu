// lora_expand_: y_t += scaling Σ_k c_k ⊙ (basis_b[k] u_t), as positions × tokens, summed over ranks.
//
// A warp has 8·E positions and a tile of tokens. Row g of the m-th tile of 16 positions is position E·g + 2m, row g + 8 the
// next one, so that a lane holds E consecutive positions of its two columns: coefficients and y are read and written as packs,
// 128 bytes of a row at a time. u is the sum of two values of T (fp16's scaled by a power of two, as u may exceed its range).

#include "lora.cuh"
#include "reference.h"

namespace rmm {

struct ExpandArgs {
  Source y, coeff;  // [T, 1, out], [n, q, out]
  Source basis;     // [q+1, r, out], or [q+1, out, r] with rank_inner
  bool rank_inner;
  Slices u;
  const float* scaling;
  int64_t scaling_stride;
  Ids ids;
  int64_t tasks, width;   // n, out
  int ranks, components;  // r, q
  int tile;               // tokens of a warp
  int token_warps;        // warps of a block that share positions, and have the next tiles each
  int token_blocks;       // blocks that do
};

template <bool Many>
constexpr int kExpandWarps = Many ? 2 : 4;
template <bool Many>
constexpr int kExpandStages = Many ? 3 : 4;
constexpr int kExpandBlock = 4;  // steps of ranks for which a warp keeps u at hand
template <class T, bool Many>
constexpr int kExpandItems = kPack<T> / 2 + (Many ? 8 : 2);  // packs of a lane in a stage: basis, then coefficients or y
template <class T, bool Many>
constexpr int kExpandRoom = (kExpandStages<Many> * kExpandItems<T, Many> + (Many ? 4 : 1) * kExpandBlock) * kWarp;

// One component at one step of 2·E ranks. Steps come in blocks of kExpandBlock; within one, the components are outermost, or
// for one task innermost, as its factor is rebuilt step by step.
struct ExpandStep {
  int step, k;

  __device__ int end(int steps) const {
    const int last = (step / kExpandBlock + 1) * kExpandBlock;
    return last < steps ? last : steps;
  }
  template <bool OneTask>
  __device__ void advance(int steps, int components) {
    if constexpr (OneTask) {
      if (++k > components) {
        k = 0;
        ++step;
      }
    } else {
      const int last = end(steps);
      if (++step == last) {
        if (++k > components) {
          k = 0;
        } else {
          step = (last - 1) / kExpandBlock * kExpandBlock;
        }
      }
    }
  }
};

// u of one token at the E/2 ranks from `rank` on.
template <class T>
__device__ __forceinline__ void load_u(const ExpandArgs& args, int64_t token, int rank, float (&u)[kPack<T> / 2]) {
  constexpr int kTerms = kPack<T> / 2;
  const float* const from = args.u.data + token * args.u.token + rank * args.u.rank;
#pragma unroll
  for (int e = 0; e < kTerms; ++e) u[e] = 0;
  const bool pack = args.u.packs && rank + kTerms <= args.ranks;
#pragma unroll 1
  for (int64_t first = 0; first < args.u.count; first += kTogether) {
    const int64_t last = first + kTogether < args.u.count ? first + kTogether : args.u.count;
    float some[kTerms] = {};
    if (pack) {
#pragma unroll 8
      for (int64_t s = first; s < last; ++s) {
        if constexpr (kTerms == 4) {
          const float4 v = *reinterpret_cast<const float4*>(from + s * args.u.stride);
          some[0] += v.x;
          some[1] += v.y;
          some[2] += v.z;
          some[3] += v.w;
        } else {
          const float2 v = *reinterpret_cast<const float2*>(from + s * args.u.stride);
          some[0] += v.x;
          some[1] += v.y;
        }
      }
    } else {
#pragma unroll 1
      for (int64_t s = first; s < last; ++s) {
#pragma unroll
        for (int e = 0; e < kTerms; ++e) {
          if (rank + e < args.ranks) some[e] += from[s * args.u.stride + e * args.u.rank];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kTerms; ++e) u[e] += some[e];
  }
}

// A power of two, u / which is in fp16's range.
__device__ __forceinline__ float range_of(const ExpandArgs& args, int64_t token, bool active) {
  float most = 0, u[4];
#pragma unroll 1
  for (int rank = threadIdx.x % 4 * 4; active && rank < args.ranks; rank += 16) {
    load_u<__half>(args, token, rank, u);
    most = fmaxf(fmaxf(fmaxf(fabsf(u[0]), fabsf(u[1])), fmaxf(fabsf(u[2]), fabsf(u[3]))), most);
  }
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
  const unsigned exponent = min(__float_as_uint(most) & 0x7f800000u, 0x7e800000u);
  return exponent == 0 ? 1 : __uint_as_float(exponent);
}

// u / range as operand B, each value as the sum of two.
template <class T>
__device__ __forceinline__ uint4 split(const float (&u)[kPack<T> / 2], float range) {
  if constexpr (sizeof(T) == 4) {
    const Halves b = split_tf32(u[0], u[1]);
    return {b.high.x, b.high.y, b.low.x, b.low.y};
  } else {
    const float down = __uint_as_float(0x7f000000u - __float_as_uint(range));  // 1 / range
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = u[e] * down;
    const uint32_t first = pack<T>(v[0], v[1]), second = pack<T>(v[2], v[3]);
    const float2 a = unpack<T>(first), b = unpack<T>(second);
    return {first, second, pack<T>(v[0] - a.x, v[1] - a.y), pack<T>(v[2] - b.x, v[3] - b.y)};
  }
}

// The basis at one step as operand A: a[m] of the m-th tile of positions, in the order of the instruction.
template <class T>
__device__ __forceinline__ void load_basis(const uint4* room, bool rank_inner, uint32_t (&a)[kPack<T> / 2][4]) {
  constexpr int E = kPack<T>;
  const int lane = threadIdx.x % kWarp;
  if (rank_inner) {
#pragma unroll
    for (int q = 0; q < E; ++q) {
      const uint2 v = reinterpret_cast<const uint2*>(room)[q * kWarp + lane];
      a[q / 2][q % 2] = v.x;
      a[q / 2][q % 2 + 2] = v.y;
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (sizeof(T) == 4) {
        const uint4 v = load_pack(room + h * kWarp + lane);
#pragma unroll
        for (int q = 0; q < E; ++q) a[q / 2][q % 2 + 2 * h] = word(v, q);
      } else {
        const uint4 v = load_pack(room + 2 * h * kWarp + lane), w = load_pack(room + (2 * h + 1) * kWarp + lane);
#pragma unroll
        for (int m = 0; m < E / 2; ++m) {
          a[m][2 * h] = __byte_perm(word(v, m), word(w, m), 0x5410);
          a[m][2 * h + 1] = __byte_perm(word(v, m), word(w, m), 0x7632);
        }
      }
    }
  }
}

// 8·E positions from `position` on, 8·NT tokens from `token` on.
template <class T, int NT, bool Many, bool OneTask>
__device__ __forceinline__ void expand_tile(const ExpandArgs& args, const Tile& tile, int64_t token, int64_t position,
                                            uint4* ring) {
  constexpr int E = kPack<T>, kItems = kExpandItems<T, Many>, kStages = kExpandStages<Many>, kTiles = E / 2;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int steps = (args.ranks + 2 * E - 1) / (2 * E), total = steps * (args.components + 1);
  const int64_t mine = position + E * g;  // the lane's positions
  uint4* const u_room = ring + kStages * kItems * kWarp + lane;
  int task[NT][2];
#pragma unroll
  for (int j = 0; j < NT; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) task[j][h] = tile.of(8 * j + 2 * t + h);
  }
  const int one = tile.any();

  const auto start_basis = [&](uint4* room, const ExpandStep& at) {
    const auto start_item = [&](int i, auto&& get) {
      if (args.rank_inner) {
        const int64_t p = position + E * (lane / 2 % 8) + 2 * i + lane / 16;
        get(room + i * kWarp, args.basis, row<T>(args.basis, at.k, p), at.step * 2 * E + lane % 2 * E,
            p < args.width ? args.ranks : 0);
      } else {
        const int rank = at.step * 2 * E + t * kTiles + i;
        get(room + i * kWarp, args.basis, row<T>(args.basis, at.k, rank), mine, rank < args.ranks ? args.width : 0);
      }
    };
    if (args.basis.packs) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        start_item(i, [](auto... arguments) { fetch<T, true>(arguments...); });
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kTiles; ++i) {
        start_item(i, [](auto... arguments) { gather<T>(arguments...); });
      }
    }
  };
  // The lane's tokens' packs of y, or of the coefficients of component k.
  const auto start_tokens = [&](uint4* room, const Source& of, int k) {
    const auto token_row = [&](int i, int task) {
      return k == 0 ? row<T>(of, token + 8 * (i / 2) + 2 * t + i % 2) : row<T>(of, task, k - 1);
    };
    if (of.packs) {
#pragma unroll
      for (int i = 0; i < 2 * NT; ++i) {
        const int of_token = task[i / 2][i % 2];
        fetch<T>(room + i * kWarp, of, token_row(i, of_token), mine, of_token >= 0 ? args.width : 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 2 * NT; ++i) {
        const int of_token = tile.of(8 * (i / 2) + 2 * t + i % 2);
        gather<T>(room + i * kWarp, of, token_row(i, of_token), mine, of_token >= 0 ? args.width : 0);
      }
    }
  };
  // The step after the last fetches y.
  const auto start = [&](int stage, int index, const ExpandStep& at) {
    uint4* const room = ring + stage * kItems * kWarp + lane;
    uint4* const tokens = room + kTiles * kWarp;
    if (index < total) {
      start_basis(room, at);
      if constexpr (OneTask) {
        if (at.k > 0) {
          const T* const from = row<T>(args.coeff, one, at.k - 1);
          args.coeff.packs ? fetch<T>(tokens, args.coeff, from, mine, args.width)
                           : gather<T>(tokens, args.coeff, from, mine, args.width);
        }
      } else {
        if (at.k > 0 && at.step + 1 == at.end(steps)) start_tokens(tokens, args.coeff, at.k);
      }
    } else if (index == total) {
      start_tokens(tokens, args.y, 0);
    }
    commit_copies();
  };

  ExpandStep ahead{0, 0}, at{0, 0};
  int next = 0, stage = 0;
#pragma unroll 1
  for (; next < kStages - 1; ++next) {
    start(next, next, ahead);
    ahead.advance<OneTask>(steps, args.components);
  }
#if defined(RMM_PDL) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // nothing before this comes from the shrink
#endif

  float range[NT];
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    range[j] = std::is_same_v<T, __half> ? range_of(args, token + 8 * j + g, tile.active >> (8 * j + g) & 1) : 1.f;
  }
  float delta[NT][kTiles][4] = {};
  [[maybe_unused]] float sums[NT][kTiles][4];
  [[maybe_unused]] float factor[kTiles][4][4 / sizeof(T)];
#pragma unroll 1
  for (int index = 0; index < total; ++index, at.advance<OneTask>(steps, args.components)) {
    const int in_block = at.step % kExpandBlock;
    if (at.k == 0 && in_block == 0) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const bool active = tile.active >> (8 * j + g) & 1;
#pragma unroll 1
        for (int s = 0; s < kExpandBlock; ++s) {
          const int rank = ((at.step + s) * 4 + t) * kTiles;
          float u[kTiles] = {};
          if (active && rank < args.ranks) load_u<T>(args, token + 8 * j + g, rank, u);
          u_room[(j * kExpandBlock + s) * kWarp] = split<T>(u, range[j]);
        }
      }
    }
    wait_copies<kStages - 2>();
    __syncwarp();
    start((stage + kStages - 1) % kStages, next++, ahead);
    ahead.advance<OneTask>(steps, args.components);
    const uint4* const room = ring + stage * kItems * kWarp;
    const uint4* const tokens = room + kTiles * kWarp + lane;
    stage = (stage + 1) % kStages;

    uint32_t a[kTiles][4];
    load_basis<T>(room, args.rank_inner, a);
    if constexpr (OneTask) {
      uint4 c{};
      if (at.k > 0) c = load_pack(tokens);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const float2 w = values<T>(c, m);
#pragma unroll
        for (int i = 0; i < 4; ++i) add_scaled<T>(factor[m][i], a[m][i], i % 2 == 0 ? w.x : w.y, at.k == 0);
      }
      if (at.k < args.components) continue;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = as_word<T>(factor[m][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const uint4 b = load_pack(u_room + (j * kExpandBlock + in_block) * kWarp);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float (&sum)[4] = OneTask ? delta[j][m] : sums[j][m];
        if (!OneTask && in_block == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
        multiply<T>(sum, operand<T>(a[m][0], a[m][2]), operand<T>(a[m][1], a[m][3]), Halves{{b.x, b.y}, {b.z, b.w}});
      }
    }
    if constexpr (!OneTask) {
      if (at.step + 1 < at.end(steps)) continue;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint4 c{};
          if (at.k > 0) c = load_pack(tokens + (2 * j + h) * kWarp);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            const float2 w = at.k > 0 ? values<T>(c, m) : float2{1, 1};
            delta[j][m][h] = fmaf(w.x, sums[j][m][h], delta[j][m][h]);
            delta[j][m][h + 2] = fmaf(w.y, sums[j][m][h + 2], delta[j][m][h + 2]);
          }
        }
      }
    }
  }

  wait_copies<0>();
  uint4* const y = ring + (stage * kItems + kTiles) * kWarp + lane;
  const int count = left<T>(mine, args.width);
#pragma unroll
  for (int j = 0; j < NT; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float up = __shfl_sync(kAllLanes, range[j], 4 * (2 * t + h));
      if (task[j][h] < 0 || count == 0) continue;
      const float scaling = args.scaling[task[j][h] * args.scaling_stride];
      const uint4 before = load_pack(y + (2 * j + h) * kWarp);
      float after[E];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const float2 v = values<T>(before, m);
        after[2 * m] = fmaf(scaling, delta[j][m][h] * up, v.x);
        after[2 * m + 1] = fmaf(scaling, delta[j][m][h + 2] * up, v.y);
      }
      const uint4 both = packed<T>(after);
      if (args.y.packs && count == E) {
        store_pack(row<T>(args.y, token + 8 * j + 2 * t + h) + mine, both);
      } else {
        y[(2 * j + h) * kWarp] = both;
        T* const to = row<T>(args.y, token + 8 * j + 2 * t + h) + mine * args.y.stride[2];
        const T* const each = reinterpret_cast<const T*>(y + (2 * j + h) * kWarp);
#pragma unroll 1
        for (int e = 0; e < count; ++e) to[e * args.y.stride[2]] = each[e];
      }
    }
  }
}

// Grid: tiles of positions, and within those tiles of tokens, so that blocks which share the basis run together.
template <class T, bool Many>
__global__ void __launch_bounds__(kExpandWarps<Many>* kWarp, Many ? 4 : 3)
    lora_expand_kernel(const __grid_constant__ ExpandArgs args) {
  constexpr int kWarps = kExpandWarps<Many>;
  extern __shared__ uint4 rings[];
  const int warp = threadIdx.x / kWarp;
  const int64_t block = blockIdx.x % args.token_blocks, positions = blockIdx.x / args.token_blocks;
  const int64_t token = (block * args.token_warps + warp % args.token_warps) * args.tile;
  const int64_t position = (positions * (kWarps / args.token_warps) + warp / args.token_warps) * 8 * kPack<T>;
  const Tile tile = inspect(args.ids, args.tasks, token, args.tile);
  if (tile.active == 0 || position >= args.width) return;
  uint4* const ring = rings + warp * kExpandRoom<T, Many>;
  if constexpr (!Many) {
    expand_tile<T, 1, Many, false>(args, tile, token, position, ring);
  } else if (tile.one) {
    expand_tile<T, 4, Many, true>(args, tile, token, position, ring);
  } else {
#pragma unroll 1
    for (int first = 0; first < args.tile; first += kSome) {
      const Tile part = tile.part(first);
      if (part.active == 0) continue;
      expand_tile<T, 2, Many, false>(args, part, token + first, position, ring);
      __syncwarp();  // the ring is read
    }
  }
}

void check_expand(const View& y, const View& basis_b, const View& coeff_b, const Ids& ids, const View& scaling) {
  check_same(basis_b.size[0] == coeff_b.size[1] + 1 && basis_b.size[1] == y.size[1] && coeff_b.size[2] == y.size[1] &&
                 ids.size == y.size[0] && scaling.size[0] == coeff_b.size[0] && basis_b.dtype == y.dtype &&
                 coeff_b.dtype == y.dtype && scaling.dtype == (y.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
             "y [T, out], basis_b [p+1, out, r], coeff_b [n, p, out], task_ids [T], scaling [n]");
  STD_TORCH_CHECK(coeff_b.size[0] <= INT_MAX && basis_b.size[0] <= INT_MAX && basis_b.size[2] <= INT_MAX / basis_b.size[0],
                  "too many tasks, components or ranks");
}

namespace {

template <class T, bool Many>
void launch_expand(const Queue& queue, ExpandArgs args, [[maybe_unused]] bool after_own) {
  constexpr int kWarps = kExpandWarps<Many>;
  const int64_t tiles = blocks(args.ids.size, args.tile);
  while (args.token_warps < kWarps && args.token_warps < tiles) args.token_warps *= 2;
  args.token_blocks = static_cast<int>(blocks(tiles, args.token_warps));
  const int64_t positions = blocks(args.width, kWarps / args.token_warps * 8 * kPack<T>);
  Grid grid{blocks(positions * args.token_blocks, 1), kWarps * kWarp, kWarps * kExpandRoom<T, Many> * sizeof(uint4)};
#ifdef RMM_PDL
  grid.dependent = after_own && queue.device().arch >= 90;
#endif
  queue.launch(grid, lora_expand_kernel<T, Many>, args);
}

}  // namespace

void run_expand(const Queue& queue, const View& y, const Slices& u, const View& basis_b, const View& coeff_b, const Ids& ids,
                const View& scaling, bool after_own) {
  const bool rank_inner = basis_b.stride[2] < basis_b.stride[1];
  const ExpandArgs args{source(y, 0, 2, 1),
                        source(coeff_b, 0, 1, 2),
                        rank_inner ? source(basis_b, 0, 1, 2) : source(basis_b, 0, 2, 1),
                        rank_inner,
                        u,
                        reinterpret_cast<const float*>(scaling.data),
                        scaling.stride[0],
                        ids,
                        coeff_b.size[0],
                        y.size[1],
                        static_cast<int>(basis_b.size[2]),
                        static_cast<int>(coeff_b.size[1]),
                        tile_of(y.size[0]),
                        1,
                        1};
  with_type(y.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.tile == kFew ? launch_expand<T, false>(queue, args, after_own) : launch_expand<T, true>(queue, args, after_own);
  });
}

void lora_expand_op(Tensor y, Tensor u, Tensor basis_b, Tensor coeff_b, Tensor task_ids, Tensor scaling) {
  const View out = view(y, 2, "y"), from = view(u, 2, "u"), basis = view(basis_b, 3, "basis_b");
  const View coeff = view(coeff_b, 3, "coeff_b"), scales = view(scaling, 1, "scaling");
  const Ids tasks = ids(task_ids);
  check_expand(out, basis, coeff, tasks, scales);
  check_same(from.size[0] == out.size[0] && from.size[1] == basis.size[2] && from.dtype == scales.dtype,
             "u [T, r] and basis_b [p+1, out, r]");
  if (out.dtype == Dtype::f64) {
    call_reference<0>("lora_expand_", y, u, basis_b, coeff_b, task_ids, scaling);
    return;
  }
  const Queue queue{y, u, basis_b, coeff_b, task_ids, scaling};
  const bool packs = from.stride[1] == 1 && from.stride[0] % 4 == 0 && reinterpret_cast<uintptr_t>(from.data) % 16 == 0;
  run_expand(queue, out, {reinterpret_cast<const float*>(from.data), 1, 0, from.stride[0], from.stride[1], packs}, basis, coeff,
             tasks, scales, false);
}

RMM_CUDA_OP("lora_expand_", lora_expand_op)

}  // namespace rmm
