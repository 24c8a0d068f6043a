// truncated_svd: a matrix per team of threads. Its left vectors come as compress's do, without centring (directions.cuh); Uᵀ X
// is then formed from X itself, free of what QR and rotations rounded: its rows' norms are σ, and its normalised rows, made
// orthonormal once more, the right vectors.

#include <tuple>

#include "directions.cuh"
#include "launch.h"
#include "reference.h"

namespace rmm {

struct Svd {
  Plane x;          // [B, m, k]
  View u, s, vh;    // [B, m, rank], [B, rank], [B, rank, k]
  Directions at;    // of m × k
  int v, v_stride;  // [rank][k], where a team keeps them, and σ and the scale; what it has, in floats
  int sigma, scales, team_size;
};

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
                             if (e >= count) continue;
                             const uint32_t bits = magnitude_bits(values[e]);
                             largest = bits > largest ? bits : largest;
                             x[plane.positions_inside ? (row + e) * k + column : row * k + column + e] = values[e];
                           }
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
  float least = 0;
  for (int c = 0; c < rank; ++c) {
    float* const vector = v + c * args.v_stride;
    const float square = team.dot(vector, vector, 0, k);
    const float inverse = square > kTiny ? exact_rsqrt(square) : 0.0f;
    least = c == 0 || square * inverse < least ? square * inverse : least;  // equal ones may differ by a rounding
    team.sync();
    if (team.lane == 0) sigma[c] = least;
    for (int i = team.lane; i < k; i += Lanes) vector[i] *= inverse;
    team.sync();
    // In falling order of σ, so that the large ones stay as they are.
    for (int pass = 0; pass < 2; ++pass) {
      subtract(team, v, args.v_stride, k, c, vector, memory + at.room);
      if (team.dot(vector, vector, 0, k) > 1e4f * kEpsilon * kEpsilon) {
        normalise(team, vector, k);
      } else {
        team.sync();
        complete(team, v, args.v_stride, k, c, memory + at.room);
      }
    }
  }

  const float spoil = finite ? 0.0f : __int_as_float(0x7fffffff);
  for (int index = team.lane; index < m * rank; index += Lanes) {
    const int i = index / rank, c = index % rank;
    store_as(args.u.dtype, args.u.data, matrix * m * rank + index, u[c * at.u_stride + i] + spoil);
  }
  for (int index = team.lane; index < rank * k; index += Lanes) {
    const int c = index / k, i = index % k;
    store_as(args.vh.dtype, args.vh.data, matrix * rank * k + index, v[c * args.v_stride + i] + 0.0f + spoil);
  }
  float* const s = reinterpret_cast<float*>(args.s.data) + matrix * rank;
  for (int c = team.lane; c < rank; c += Lanes) s[c] = sigma[c] * scale.down2 * scale.down1 + spoil;
}

template <int Lanes, int Group>
void launch_svd(const Queue& queue, const Svd& args, int most_teams, int64_t most_floats) {
  int teams = most_teams;
  while (teams > 1 && static_cast<int64_t>(teams) * args.team_size > most_floats) teams /= 2;
  queue.launch({blocks(args.x.view.size[0], teams), static_cast<unsigned>(teams * Lanes),
                static_cast<size_t>(teams) * args.team_size * sizeof(float)},
               truncated_svd<Lanes, Group>, args);
}

std::tuple<Tensor, Tensor, Tensor> truncated_svd_op(Tensor x, int64_t rank) {
  const View in = view(x, 3, "x");
  const int64_t batch = in.size[0], m = in.size[1], k = in.size[2], shorter = m < k ? m : k;
  check_same(rank >= 0 && rank <= m && rank <= k, "x [B, m, k] with rank up to min(m, k)");
  const auto reference = [&] {
    const auto results = call_reference<3>("truncated_svd", x, rank);
    return std::make_tuple(tensor_of(results[0]), tensor_of(results[1]), tensor_of(results[2]));
  };
  if (in.dtype == Dtype::f64 || shorter > 64) return reference();

  Svd args{};
  args.at = directions_at(m * k, m, k, rank, k);
  args.v = args.at.end, args.v_stride = static_cast<int>(k | 1);
  args.sigma = args.v + static_cast<int>(rank * (k | 1));
  args.scales = args.sigma + static_cast<int>(shorter);
  args.team_size = static_cast<int>((static_cast<int64_t>(args.scales) + 31) / 32 * 32 + 8);
  Tensor u = torch::stable::new_empty(x, {batch, m, rank});
  Tensor s = torch::stable::new_empty(x, {batch, rank}, ScalarType::Float);
  Tensor vh = torch::stable::new_empty(x, {batch, rank, k});
  const Queue queue{x, u, s, vh};
  const int64_t most_floats = queue.device().shared_bytes / static_cast<int64_t>(sizeof(float));
  if (static_cast<int64_t>(args.team_size) > most_floats) return reference();
  if (rank == 0) return {u, s, vh};
  args.x = plane_of(in);
  args.u = view(u, 3, "u"), args.s = view(s, 2, "s"), args.vh = view(vh, 3, "vh");
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
