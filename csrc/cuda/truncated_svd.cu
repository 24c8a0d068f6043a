// truncated_svd: a matrix per team of lanes, a large one per block (large.cuh). Its left vectors come as compress's do, without
// centring (directions.cuh); Uᵀ X is then formed from X itself, free of what QR and rotations rounded: its rows' norms are σ,
// and its normalised rows, made orthonormal once more, the right vectors.

#include <algorithm>
#include <tuple>

#include "large.cuh"
#include "reference.h"

namespace rmm {

struct Svd {
  Plane x;          // [B, m, k]
  View u, s, vh;    // [B, m, rank], [B, rank], [B, rank, k]
  Directions at;    // of m × k
  int v, v_stride;  // [rank][k], where a team keeps them, and σ and the scale; what it has, in floats
  int sigma, scales, team_size;
};

// Uᵀ X, whose rows are v_c, → σ, falling, and orthonormal right vectors. room: for k values.
template <class T>
__device__ void right_vectors(const T& team, float* v, int v_stride, int k, int rank, float* sigma, float* room) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  float least = 0;
  for (int c = 0; c < rank; ++c) {
    float* const vector = v + c * v_stride;
    const float square = team.dot(vector, vector, 0, k);
    const float inverse = square > kTiny ? exact_rsqrt(square) : 0.0f;
    least = c == 0 || square * inverse < least ? square * inverse : least;  // equal ones may differ by a rounding
    team.sync();
    if (team.lane == 0) sigma[c] = least;
    for (int i = team.lane; i < k; i += kLanes) vector[i] *= inverse;
    team.sync();
    orthonormalise(team, v, v_stride, k, c, room);
  }
}

// NaN where the matrix is not finite.
template <class T>
__device__ void store_triplets(const T& team, const View& u_out, const View& s_out, const View& vh_out, int64_t matrix,
                               const float* u, int u_stride, const float* v, int v_stride, const float* sigma,
                               const Scale& scale, bool finite) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const int m = static_cast<int>(u_out.size[1]), rank = static_cast<int>(u_out.size[2]), k = static_cast<int>(vh_out.size[2]);
  const float spoil = finite ? 0.0f : __int_as_float(0x7fffffff);
  for (int index = team.lane; index < m * rank; index += kLanes) {
    const int i = index / rank, c = index % rank;
    store_as(u_out.dtype, u_out.data, matrix * m * rank + index, u[c * u_stride + i] + spoil);
  }
  for (int index = team.lane; index < rank * k; index += kLanes) {
    const int c = index / k, i = index % k;
    store_as(vh_out.dtype, vh_out.data, matrix * rank * k + index, v[c * v_stride + i] + 0.0f + spoil);
  }
  float* const s = reinterpret_cast<float*>(s_out.data) + matrix * rank;
  for (int c = team.lane; c < rank; c += kLanes) s[c] = sigma[c] * scale.down2 * scale.down1 + spoil;
}

// One matrix per team. Shared memory: each team's, which starts with its x [m][k].
template <int Lanes, int Group>
__global__ void truncated_svd(const __grid_constant__ Svd args) {
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const Directions& at = args.at;
  const int m = at.r, k = at.columns, rank = at.p;
  const int teams = static_cast<int>(blockDim.x) / Lanes, thread = static_cast<int>(threadIdx.x);
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * teams + thread / Lanes;
  if (matrix >= args.x.view.size[0]) return;
  float* const memory = shared + thread / Lanes * args.team_size;
  const Team<Lanes, Group> team(thread);
  float *const x = memory, *const y = memory + at.y, *const u = memory + at.u, *const v = memory + args.v;
  float* const sigma = memory + args.sigma;

  uint32_t largest = 0;
  with_dtype(args.x.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    // One matrix as its m rows, or columns, of a plane with one leading row.
    Plane plane = args.x;
    plane.view.data += matrix * plane.view.stride[0] * static_cast<int64_t>(sizeof(Element));
    each_loaded<Element>(plane, 1, 0, m, team.lane, Lanes,
                         [&](int, int row, int column, const float (&values)[kVector<Element>], int count) {
#pragma unroll
                           for (int e = 0; e < kVector<Element>; ++e) {
                             const uint32_t bits = e < count ? magnitude_bits(values[e]) : 0;
                             largest = bits > largest ? bits : largest;
                           }
                           to_tile(plane, row, values, count, x + row * k + column, k, k % 4 == 0);
                         });
  });
  largest = team.largest(largest);
  const bool finite = is_finite(largest);
  const Scale scale = scale_of(finite ? largest : 0);
  team.sync();
  for (int index = team.lane; index < m * k; index += Lanes) {
    const float value = finite ? x[index] * scale.up1 * scale.up2 : 0.0f;
    const int row = index / k, column = index % k;
    x[index] = value;
    y[at.tall ? column * at.y_stride + row : row * at.y_stride + column] = value;
  }
  team.sync();
  find_directions(team, at, memory, sigma, args.u.dtype);

  for (int index = team.lane; index < rank * k; index += Lanes) {
    const int c = index / k, column = index % k;
    float total = 0;
    for (int begin = 0; begin < m; begin += 8) {  // eight at a time rounds less than one by one
      float some = 0;
      for (int i = begin; i < m && i < begin + 8; ++i) some = fmaf(x[i * k + column], u[c * at.u_stride + i], some);
      total += some;
    }
    v[c * args.v_stride + column] = total;
  }
  team.sync();
  right_vectors(team, v, args.v_stride, k, rank, sigma, memory + at.room);
  store_triplets(team, args.u, args.s, args.vh, matrix, u, at.u_stride, v, args.v_stride, sigma, scale, finite);
}

struct SvdLarge {
  Plane x;        // [B, k, m]
  View u, s, vh;  // [B, m, rank], [B, rank], [B, rank, k]
  Large at;
  int v, v_stride, memory_end;  // [rank][k], where core and left vectors are
  int sigma, room, end;         // [rank], [k], in shared memory
  float* workspace;             // [B][memory_end], unless that is in shared memory too
};

// One matrix per block, its columns in chunks, three times, from memory or from the tile that holds all of them: for their
// scale, for the core, for the right vectors. The core and the vectors are in shared memory if Resident, else in the block's
// workspace.
template <bool Resident>
__global__ void __launch_bounds__(kLargeThreads, 2) truncated_svd_large(const __grid_constant__ SvdLarge args) {
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const Large& at = args.at;
  const int m = at.r, k = at.columns, rank = at.p, thread = static_cast<int>(threadIdx.x);
  const int64_t matrix = blockIdx.x;
  float* const memory = Resident ? shared + args.end : args.workspace + matrix * args.memory_end;
  float *const core = memory + at.core, *const u = memory + at.u, *const v = memory + args.v;
  float *const sigma = shared + args.sigma, *const room = shared + args.room;
  const LargeTeam team(thread);

  const auto each_column = [&](bool again, const auto& work) {
    each_chunk(args.x, matrix, k, at, shared + at.tile, again, work);
  };

  uint32_t largest = 0;
  each_column(false, [&](int, int count, const float* x) {
    for (int j = thread; j < m; j += kLargeThreads) {
      for (int i = 0; i < count; ++i) {
        const uint32_t bits = magnitude_bits(x[i * at.tile_stride + j]);
        largest = bits > largest ? bits : largest;
      }
    }
  });
  largest = largest_of_block(thread, largest, shared + at.norms);
  const bool finite = is_finite(largest);
  const Scale scale = scale_of(finite ? largest : 0);
  const auto scaled = [&](const float* x, int i, int j) {
    return finite ? x[i * at.tile_stride + j] * scale.up1 * scale.up2 : 0.0f;
  };
  if (!at.tall) {
    for (int index = thread; index < at.k * at.stride; index += kLargeThreads) core[index] = 0;
  }
  each_column(true, [&](int begin, int count, const float* x) {
    add_columns(team, at, core, shared + at.reflector, begin, count, [&](int i, int j) { return scaled(x, i, j); });
  });
  __syncthreads();
  directions_of_core(team, at, shared, core, u, args.u.dtype);

  each_column(true, [&](int begin, int count, const float* x) {
    for (int index = team.group; index < rank * count; index += LargeTeam::kGroups) {
      const int c = index / count, i = index % count;
      float even = 0, odd = 0;
      for (int j = team.in_group; j < m; j += 2 * LargeTeam::kGroup) {
        const int next = j + LargeTeam::kGroup;
        even = fmaf(scaled(x, i, j), u[c * at.stride + j], even);
        if (next < m) odd = fmaf(scaled(x, i, next), u[c * at.stride + next], odd);
      }
      const float value = team.group_sum(even + odd);
      if (team.in_group == 0) v[c * args.v_stride + begin + i] = value;
    }
  });
  __syncthreads();
  right_vectors(team, v, args.v_stride, k, rank, sigma, room);
  store_triplets(team, args.u, args.s, args.vh, matrix, u, at.stride, v, args.v_stride, sigma, scale, finite);
}

template <int Lanes, int Group>
void launch_svd(const Queue& queue, const Svd& args, int most_teams, int64_t most_floats) {
  int teams = most_teams;
  while (teams > 1 && static_cast<int64_t>(teams) * args.team_size > most_floats) teams /= 2;
  queue.launch({blocks(args.x.view.size[0], teams), static_cast<unsigned>(teams * Lanes),
                static_cast<size_t>(teams) * args.team_size * sizeof(float)},
               truncated_svd<Lanes, Group>, args);
}

// Sets what of `args` is about a block's memory; whether there is room for it.
bool place_large(SvdLarge& args, int64_t m, int64_t k, int64_t rank, int64_t most_floats) {
  args.at = large_at(m, k, rank), args.at.deficient = 0;
  args.v_stride = static_cast<int>(k | 1);
  int64_t next = args.at.memory_end;
  args.v = take_floats(next, rank * args.v_stride), args.memory_end = take_floats(next, 0);
  next = args.at.shared_end;
  args.sigma = take_floats(next, rank), args.room = take_floats(next, k);
  place_tile(args.at, k, next, most_floats);
  args.end = take_floats(next, 0);
  return args.at.k >= kLargeThreads / 32 && next <= most_floats;
}

void launch_large(Queue& queue, const Tensor& like, const View& x, const View& u, const View& s, const View& vh, SvdLarge args,
                  int64_t most_floats) {
  const bool resident = static_cast<int64_t>(args.end) + args.memory_end <= most_floats;
  const int64_t batch = x.size[0], floats = resident ? 0 : args.memory_end;
  const int64_t some = at_a_time(batch, floats * static_cast<int64_t>(sizeof(float)));
  const Tensor workspace = torch::stable::new_empty(like, {some, floats}, ScalarType::Float);
  queue.touches(workspace);
  args.workspace = static_cast<float*>(workspace.data_ptr());
  for (int64_t first = 0; first < batch; first += some) {
    const int64_t count = std::min(some, batch - first);
    args.x = plane_of(permuted(narrowed(x, 0, first, count), 0, 2, 1)), args.u = narrowed(u, 0, first, count);
    args.s = narrowed(s, 0, first, count), args.vh = narrowed(vh, 0, first, count);
    queue.launch(
        {blocks(count, 1), kLargeThreads, (args.end + (resident ? static_cast<size_t>(args.memory_end) : 0)) * sizeof(float)},
        resident ? truncated_svd_large<true> : truncated_svd_large<false>, args);
  }
}

std::tuple<Tensor, Tensor, Tensor> truncated_svd_op(Tensor x, int64_t rank) {
  const View in = view(x, 3, "x");
  const int64_t batch = in.size[0], m = in.size[1], k = in.size[2], shorter = m < k ? m : k;
  check_same(rank >= 0 && rank <= m && rank <= k, "x [B, m, k] with rank up to min(m, k)");
  const auto reference = [&] {
    const auto results = call_reference<3>("truncated_svd", x, rank);
    return std::make_tuple(tensor_of(results[0]), tensor_of(results[1]), tensor_of(results[2]));
  };
  if (in.dtype == Dtype::f64 || shorter > kLargest) return reference();

  Svd args{};
  args.at = directions_at(m * k, m, k, rank, k), args.at.deficient = 0;
  args.v = args.at.end, args.v_stride = static_cast<int>(k | 1);
  args.sigma = args.v + static_cast<int>(rank * (k | 1));
  args.scales = args.sigma + static_cast<int>(shorter);
  args.team_size = static_cast<int>((static_cast<int64_t>(args.scales) + 31) / 32 * 32 + 8);
  Tensor u = torch::stable::new_empty(x, {batch, m, rank});
  Tensor s = torch::stable::new_empty(x, {batch, rank}, ScalarType::Float);
  Tensor vh = torch::stable::new_empty(x, {batch, rank, k});
  Queue queue{x, u, s, vh};
  if (rank == 0) return {u, s, vh};
  const int64_t most_floats = queue.device().shared_bytes / static_cast<int64_t>(sizeof(float));
  const View left = view(u, 3, "u"), values = view(s, 2, "s"), right = view(vh, 3, "vh");
  if (shorter > 64 || static_cast<int64_t>(args.team_size) > most_floats) {
    SvdLarge large{};
    if (!place_large(large, m, k, rank, most_floats)) return reference();
    launch_large(queue, x, in, left, values, right, large, most_floats);
    return {u, s, vh};
  }
  args.x = plane_of(in), args.u = left, args.s = values, args.vh = right;
  if (shorter <= 16) {
    launch_svd<8, team_group(16)>(queue, args, 16, most_floats / 2);
  } else if (shorter <= 32) {
    launch_svd<32, team_group(32)>(queue, args, 8, most_floats / 2);
  } else {
    launch_svd<32, team_group(64)>(queue, args, 8, most_floats);
  }
  return {u, s, vh};
}

RMM_CUDA_OP("truncated_svd", truncated_svd_op)

}  // namespace rmm
