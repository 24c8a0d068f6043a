// lora_shrink: u_t = Σ_k basis_a[k] (c_k ⊙ x_t), as ranks × tokens, summed over positions.
//
// A block has 16·MT ranks, a tile of tokens and a slice of the positions; its warps take chunks of 4·E positions in turn. For a
// chunk, a warp loads x once and passes over k = 0 … p: the coefficients scale x (one rounding), which then is operand B as it
// lies in the lanes; the basis is operand A. The warps' sums are added in order, and so are the slices': from sm_90 on by the
// blocks of a cluster, which read each other's, else by whoever reads them, with the same bits.

#include <algorithm>

#include "lora.cuh"
#include "reference.h"

namespace rmm {

constexpr int kShrinkStages = 4;

struct ShrinkArgs {
  Source x, basis, coeff;  // [T, 1, in], [p+1, r, in], [n, p, in]
  Ids ids;
  float* sums;            // [slices / cluster, T, r]; rows of tiles without a task are not written
  int64_t tasks, width;   // n, in
  int64_t slice;          // chunks of a block
  int ranks, components;  // r, p
  int tile;               // tokens of a block
  int cluster;            // blocks that share the tile and have neighbouring slices, whose sums they write as one
};

template <int MT>
constexpr int kShrinkWarps = MT == 1 ? 8 : 4;
template <int MT, bool Many>
constexpr int kShrinkItems = 2 * MT + (Many ? 4 : 1);  // packs of a lane in a stage: basis, then x or coefficients
template <int MT, bool Many>
constexpr int kShrinkRing = kShrinkStages * kShrinkItems<MT, Many> * kWarp;  // packs of a warp

// One chunk of positions, one component.
struct ShrinkStep {
  int64_t chunk;
  int k;

  __device__ void advance(int components, int warps) {
    if (++k > components) {
      k = 0;
      chunk += warps;
    }
  }
};

// sum += a (rows g and g + 8, one pack each) · z (column g, one pack).
template <class T>
__device__ __forceinline__ void add_product(float (&sum)[4], const uint4& a0, const uint4& a8, const uint4& z) {
  if constexpr (sizeof(T) == 4) {
    // Tensor cores round sums toward zero: no more than these few meet there before they are added properly.
    float few[4] = {};
    multiply<T>(few, operand<T>(a0.x, a0.y), operand<T>(a8.x, a8.y), operand<T>(z.x, z.y));
    multiply<T>(few, operand<T>(a0.z, a0.w), operand<T>(a8.z, a8.w), operand<T>(z.z, z.w));
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += few[c];
  } else {
    multiply<T>(sum, uint2{a0.x, a0.y}, uint2{a8.x, a8.y}, uint2{z.x, z.y});
    multiply<T>(sum, uint2{a0.z, a0.w}, uint2{a8.z, a8.w}, uint2{z.z, z.w});
  }
}

#if __CUDA_ARCH__ >= 900
// All threads of the cluster: what they wrote before is there for all after.
__device__ __forceinline__ void meet() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" : : : "memory");
}

// What the block of that rank in the cluster has at this place in its shared memory.
__device__ __forceinline__ float value_of_peer(const float* at, int rank) {
  uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
#endif

// The slice's part of u for 8·NT tokens from `token` on and 16·MT ranks from `rank` on.
template <class T, int NT, int MT, bool Many, bool OneTask>
__device__ __forceinline__ void shrink_tile(const ShrinkArgs& args, const Tile& tile, int64_t token, int rank, uint4* rings) {
  constexpr int E = kPack<T>, kItems = kShrinkItems<MT, Many>, kRing = kShrinkRing<MT, Many>, kWarps = kShrinkWarps<MT>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t chunks = (args.width + 4 * E - 1) / (4 * E), from = blockIdx.y * args.slice;
  const int64_t to = from + args.slice < chunks ? from + args.slice : chunks;
  uint4* const ring = rings + warp * kRing;
  int task[NT];
#pragma unroll
  for (int j = 0; j < NT; ++j) task[j] = tile.of(8 * j + g);
  const int one = tile.any();

  const auto start = [&](int stage, const ShrinkStep& step) {
    if (step.chunk >= to) return commit_copies();
    uint4* const room = ring + stage * kItems * kWarp + lane;
    uint4* const tokens = room + 2 * MT * kWarp;
    const int64_t position = (step.chunk * 4 + t) * E;
    const auto basis_row = [&](int i) { return row<T>(args.basis, step.k, rank + 8 * i + g); };
    const auto basis_size = [&](int i) { return rank + 8 * i + g < args.ranks ? args.width : 0; };
    if (args.basis.packs) {
#pragma unroll
      for (int i = 0; i < 2 * MT && rank + i / 2 * 16 < args.ranks; ++i) {
        fetch<T>(room + i * kWarp, args.basis, basis_row(i), position, basis_size(i));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 2 * MT; ++i) gather<T>(room + i * kWarp, args.basis, basis_row(i), position, basis_size(i));
    }
    if (OneTask && step.k > 0) {
      const T* const from = row<T>(args.coeff, one, step.k - 1);
      args.coeff.packs ? fetch<T>(tokens, args.coeff, from, position, args.width)
                       : gather<T>(tokens, args.coeff, from, position, args.width);
    } else {
      const Source& of = step.k == 0 ? args.x : args.coeff;
      const auto token_row = [&](int j, int task) {
        return step.k == 0 ? row<T>(of, token + 8 * j + g) : row<T>(of, task, step.k - 1);
      };
      if (of.packs) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          fetch<T>(tokens + j * kWarp, of, token_row(j, task[j]), position, task[j] >= 0 ? args.width : 0);
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < NT; ++j) {
          const int of_token = tile.of(8 * j + g);
          gather<T>(tokens + j * kWarp, of, token_row(j, of_token), position, of_token >= 0 ? args.width : 0);
        }
      }
    }
    commit_copies();
  };

  float sums[MT][NT][4] = {};
  ShrinkStep step{from + warp, 0}, ahead = step;
  int stage = 0;
#pragma unroll 1
  for (int s = 0; s < kShrinkStages - 1; ++s) {
    start(s, ahead);
    ahead.advance(args.components, kWarps);
  }
  uint4 x[NT];
  [[maybe_unused]] float factor[MT][2][E];
#pragma unroll 1
  for (; step.chunk < to; step.advance(args.components, kWarps)) {
    wait_copies<kShrinkStages - 2>();
    start((stage + kShrinkStages - 1) % kShrinkStages, ahead);
    ahead.advance(args.components, kWarps);
    const uint4* const room = ring + stage * kItems * kWarp + lane;
    const uint4* const tokens = room + 2 * MT * kWarp;
    stage = (stage + 1) % kShrinkStages;

    if (step.k == 0) {
#pragma unroll
      for (int j = 0; j < NT; ++j) x[j] = load_pack(tokens + j * kWarp);
    }
    if constexpr (OneTask) {
      uint4 c{};
      if (step.k > 0) c = load_pack(tokens);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        if (rank + 16 * m >= args.ranks) break;
#pragma unroll
        for (int h = 0; h < 2; ++h) add_scaled<T>(factor[m][h], load_pack(room + (2 * m + h) * kWarp), c, step.k == 0);
        if (step.k < args.components) continue;
        const uint4 a0 = packed<T>(factor[m][0]), a8 = packed<T>(factor[m][1]);
#pragma unroll
        for (int j = 0; j < NT; ++j) add_product<T>(sums[m][j], a0, a8, x[j]);
      }
    } else {
      uint4 z[NT];
#pragma unroll
      for (int j = 0; j < NT; ++j) z[j] = step.k == 0 ? x[j] : times<T>(x[j], load_pack(tokens + j * kWarp));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        if (rank + 16 * m >= args.ranks) break;
        const uint4 a0 = load_pack(room + 2 * m * kWarp), a8 = load_pack(room + (2 * m + 1) * kWarp);
#pragma unroll
        for (int j = 0; j < NT; ++j) add_product<T>(sums[m][j], a0, a8, z[j]);
      }
    }
  }

  // The ring becomes room for the warp's sums, as they lie in the lanes.
  wait_copies<0>();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) reinterpret_cast<float*>(ring)[((m * NT + j) * 4 + c) * kWarp + lane] = sums[m][j][c];
    }
  }
  __syncthreads();
  float* const out = args.sums + blockIdx.y / args.cluster * args.ids.size * args.ranks;
  const int64_t last = token + args.tile < args.ids.size ? token + args.tile : args.ids.size;
  const auto of_warps = [&](int i) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += reinterpret_cast<const float*>(rings + w * kRing)[i * kWarp + lane];
    return total;
  };
  const auto store = [&](int i, const auto& total) {
    const int c = i % 4, j = i / 4 % NT, m = i / 4 / NT;
    const int64_t at = token + 8 * j + 2 * t + c % 2;
    const int r = rank + 16 * m + c / 2 * 8 + g;
    if (at >= last || r >= args.ranks) return;
    out[at * args.ranks + r] = total(i);
  };
#if __CUDA_ARCH__ >= 900
  if (args.cluster > 1) {
    float* const kept = reinterpret_cast<float*>(rings);
#pragma unroll 1
    for (int i = warp; i < MT * NT * 4; i += kWarps) kept[i * kWarp + lane] = of_warps(i);
    meet();
    const auto of_cluster = [&](int i) {
      float total = 0;
#pragma unroll 1
      for (int s = 0; s < args.cluster; ++s) total += value_of_peer(kept + i * kWarp + lane, s);
      return total;
    };
    const int mine = blockIdx.y % args.cluster;
#pragma unroll 1
    for (int i = warp * args.cluster + mine; i < MT * NT * 4; i += kWarps * args.cluster) store(i, of_cluster);
    meet();  // all have been read
    return;
  }
#endif
#pragma unroll 1
  for (int i = warp; i < MT * NT * 4; i += kWarps) store(i, of_warps);
}

// Grid: tiles of tokens, slices, tiles of ranks.
template <class T, int MT, bool Many>
__global__ void __launch_bounds__(kShrinkWarps<MT>* kWarp, 2) lora_shrink_kernel(const __grid_constant__ ShrinkArgs args) {
  extern __shared__ uint4 rings[];
  const int rank = blockIdx.z * 16 * MT;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * args.tile;
  const Tile tile = inspect(args.ids, args.tasks, token, args.tile);
  if (tile.active == 0) return;
  if constexpr (!Many) {
    shrink_tile<T, 1, MT, Many, false>(args, tile, token, rank, rings);
  } else if (tile.one) {
    shrink_tile<T, 4, MT, Many, true>(args, tile, token, rank, rings);
  } else {
#pragma unroll 1
    for (int first = 0; first < args.tile; first += kSome) {
      const Tile part = tile.part(first);
      if (part.active == 0) continue;
      shrink_tile<T, 2, MT, Many, false>(args, part, token + first, rank, rings);
      __syncthreads();  // the rings are read
    }
  }
}

// u [T, r] = the sum of the slices, 0 in rows without a task.
__global__ void __launch_bounds__(256, 4)
    lora_sum_kernel(const float* sums, int64_t slices, const __grid_constant__ Ids ids, int64_t tasks, int ranks, float* u) {
  const int64_t size = ids.size * ranks, at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (at >= size) return;
  u[at] = task_of(ids, tasks, at / ranks) >= 0 ? sum_slices(sums + at, size, slices) : 0.f;
}

void check_shrink(const View& x, const View& basis_a, const View& coeff_a, const Ids& ids) {
  check_same(basis_a.size[0] == coeff_a.size[1] + 1 && basis_a.size[2] == x.size[1] && coeff_a.size[2] == x.size[1] &&
                 ids.size == x.size[0] && basis_a.dtype == x.dtype && coeff_a.dtype == x.dtype,
             "x [T, in], basis_a [p+1, r, in], coeff_a [n, p, in], task_ids [T]");
  STD_TORCH_CHECK(coeff_a.size[0] <= INT_MAX && basis_a.size[0] <= INT_MAX && basis_a.size[1] <= 65535 * 16,
                  "too many tasks, components or ranks");
}

namespace {

constexpr int64_t kMostSlices = 32;     // what expand has to add up for each of its tiles
constexpr int64_t kEnoughBlocks = 512;  // more slices than make up so many only cost

template <class T, int MT, bool Many>
void launch_shrink(const Queue& queue, const ShrinkArgs& args, int64_t slices) {
  Grid grid{{blocks(args.ids.size, args.tile), static_cast<unsigned>(slices), blocks(args.ranks, 16 * MT)},
            kShrinkWarps<MT> * kWarp,
            kShrinkWarps<MT> * kShrinkRing<MT, Many> * sizeof(uint4)};
  grid.cluster = static_cast<unsigned>(args.cluster);
  queue.launch(grid, lora_shrink_kernel<T, MT, Many>, args);
}

}  // namespace

Tensor run_shrink(Queue& queue, const Tensor& like, const View& x, const View& basis_a, const View& coeff_a, const Ids& ids,
                  Slices& u) {
  const int64_t tokens = x.size[0], ranks = basis_a.size[1], width = x.size[1], chunk = 64 / element_size(x.dtype);
  const bool narrow = ranks <= 16;
  const int tile = tile_of(tokens), warps = narrow ? kShrinkWarps<1> : kShrinkWarps<4>;
  const int64_t others = std::max<int64_t>(1, static_cast<int64_t>(blocks(tokens, tile)) * blocks(ranks, narrow ? 16 : 64));
  const int64_t most = std::max<int64_t>(1, std::min(kMostSlices, kEnoughBlocks / others)) * warps;
  const int64_t chunks = (width + chunk - 1) / chunk, slice = std::max<int64_t>(1, (chunks + most - 1) / most) * warps;
  const int64_t slices = std::max<int64_t>(1, (chunks + slice - 1) / slice);
  int cluster = 1;
  while (queue.device().arch >= 90 && cluster < kTogether && cluster < slices) cluster *= 2;
  const int64_t groups = (slices + cluster - 1) / cluster;
  const Tensor sums = torch::stable::new_empty(like, {groups, tokens, ranks}, ScalarType::Float);
  queue.touches(sums);
  float* const to = static_cast<float*>(sums.data_ptr());
  u = {to, groups, tokens * ranks, ranks, 1, ranks % 4 == 0};
  const ShrinkArgs args{source(x, 0, 2, 1),
                        source(basis_a, 0, 1, 2),
                        source(coeff_a, 0, 1, 2),
                        ids,
                        to,
                        coeff_a.size[0],
                        width,
                        slice,
                        static_cast<int>(ranks),
                        static_cast<int>(coeff_a.size[1]),
                        tile,
                        cluster};
  with_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (tile == kFew) {
      narrow ? launch_shrink<T, 1, false>(queue, args, groups * cluster)
             : launch_shrink<T, 4, false>(queue, args, groups * cluster);
    } else {
      narrow ? launch_shrink<T, 1, true>(queue, args, groups * cluster)
             : launch_shrink<T, 4, true>(queue, args, groups * cluster);
    }
  });
  return sums;
}

Tensor run_sum(Queue& queue, const Tensor& like, const Ids& ids, int64_t tasks, Slices& u) {
  const int64_t ranks = u.token, size = ids.size * ranks;
  const Tensor result = torch::stable::new_empty(like, {ids.size, ranks}, ScalarType::Float);
  queue.touches(result);
  float* const to = static_cast<float*>(result.data_ptr());
  queue.launch({blocks(size, 256), 256}, lora_sum_kernel, u.data, u.count, ids, tasks, static_cast<int>(ranks), to);
  u = {to, 1, 0, ranks, 1, u.packs};
  return result;
}

Tensor lora_shrink_op(Tensor x, Tensor basis_a, Tensor coeff_a, Tensor task_ids) {
  const View in = view(x, 2, "x"), basis = view(basis_a, 3, "basis_a"), coeff = view(coeff_a, 3, "coeff_a");
  const Ids tasks = ids(task_ids);
  check_shrink(in, basis, coeff, tasks);
  if (in.dtype == Dtype::f64) return tensor_of(call_reference<1>("lora_shrink", x, basis_a, coeff_a, task_ids)[0]);
  Queue queue{x, basis_a, coeff_a, task_ids};
  Slices slices;
  const Tensor sums = run_shrink(queue, x, in, basis, coeff, tasks, slices);
  return run_sum(queue, x, tasks, coeff.size[0], slices);
}

RMM_CUDA_OP("lora_shrink", lora_shrink_op)

}  // namespace rmm
