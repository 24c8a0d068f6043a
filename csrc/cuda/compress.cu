// compress: mean, Helmert reduction, QR, one-sided Jacobi, basis and coefficients. Where n − 1 ≤ min(r, 7) and r ≤ 64, a
// position per thread or few lanes, all in registers (compress_thread.cuh); else per team of threads, in shared memory.

#include <cmath>
#include <tuple>

#include "compress_thread.cuh"
#include "directions.cuh"
#include "launch.h"
#include "reference.h"

namespace rmm {

struct Compress {
  Plane x, basis;      // [n, S, r], [p+1, S, r]
  View coeff, energy;  // [n, p, S], [S, K]
  Directions at;
  int n;
  float spread;                                         // 1 / (√n − 1)
  int mean, energies, coefficients, scales, team_size;  // where a team keeps them, and what it has, in floats
};

// x [n][r] of one position, at the start of the team's memory: scaled, centred; y its Helmert reduction
// y_i = x_i + x_0 / (√n − 1), i = 1 … n−1, as columns over ranks where Y is tall, over tasks where it is wide. The first task's
// vector goes first: exactly so where all share an offset, which then costs no accuracy, and equal vectors become
// exactly zero. Then the mean goes twice: what the first one rounds off, the second takes.
template <class T>
__device__ void centre(const T& team, const Compress& args, float* memory, const Scale& scale) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const Directions& at = args.at;
  const int n = args.n, r = at.r;
  const float share = 1.0f / static_cast<float>(n);
  float *const x = memory, *const y = memory + at.y, *const mean_of = memory + args.mean;
  uint32_t largest = 0;
  for (int j = team.lane; j < r; j += kLanes) {
    const float offset = x[j] * scale.up1 * scale.up2;
    float sum = 0;
    for (int i = 1; i < n; ++i) {
      const float value = x[i * r + j] * scale.up1 * scale.up2 - offset;
      x[i * r + j] = value;
      sum += value;
    }
    const float mean = share * sum;
    sum = -mean;
    for (int i = 1; i < n; ++i) {
      const float value = x[i * r + j] - mean;
      x[i * r + j] = value;
      sum += value;
    }
    const float rest = share * sum, first = -mean - rest, lift = args.spread * first;
    mean_of[j] = offset + (mean + rest);
    x[j] = first;
    for (int i = 1; i < n; ++i) {
      const float value = x[i * r + j] - rest, reduced = value + lift;
      x[i * r + j] = value;
      const uint32_t bits = magnitude_bits(reduced);
      largest = bits > largest ? bits : largest;
      y[at.tall() ? (i - 1) * at.y_stride + j : j * at.y_stride + (i - 1)] = reduced;
    }
  }
  // Scaled again: what tells the tasks apart may be much smaller than what they share.
  const Scale centred = scale_of(team.largest(largest));
  if (team.lane == 0) {
    memory[args.scales + 3] = centred.down1;
    memory[args.scales + 4] = centred.down2;
  }
  team.sync();
  for (int c = team.group; c < at.k; c += T::kGroups) {
    for (int i = team.in_group; i < at.rows; i += T::kGroup) y[c * at.y_stride + i] *= centred.up1 * centred.up2;
  }
  team.sync();
}

// coefficients[c · n + i] = u_c · x_i, energy found again from them where it is not negligible, then falling.
template <class T>
__device__ void project_tasks(const T& team, const Compress& args, float* memory) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const Directions& at = args.at;
  const int n = args.n, r = at.r, live = at.p < at.k ? at.p : at.k;
  const float *const x = memory, *const u = memory + at.u, *const kept = memory + at.kept;
  float *const coefficients = memory + args.coefficients, *const energies = memory + args.energies;
  const float centred1 = memory[args.scales + 3], centred2 = memory[args.scales + 4];
  for (int index = team.lane; index < n * at.p; index += kLanes) {
    const int i = index / at.p, c = index % at.p;
    float even = 0, odd = 0;
    for (int j = 0; j < r; j += 2) {
      even = fmaf(x[i * r + j], u[c * at.u_stride + j], even);
      if (j + 1 < r) odd = fmaf(x[i * r + j + 1], u[c * at.u_stride + j + 1], odd);
    }
    coefficients[c * n + i] = c < live ? (even + odd) * kept[c] : 0.0f;
  }
  team.sync();
  for (int c = team.lane; c < at.k; c += kLanes) {
    if (c < live && kept[c] > 0) {
      float total = 0;
      for (int begin = 0; begin < n; begin += 8) {  // a few long ones round less than one longer
        float some = 0;
        for (int i = begin; i < n && i < begin + 8; ++i) some = fmaf(coefficients[c * n + i], coefficients[c * n + i], some);
        total += some;
      }
      energies[c] = total;
    } else {
      energies[c] = energies[c] * centred2 * centred2 * centred1 * centred1;
    }
  }
  team.sync();
  float least = 0;
  for (int c = 0; c < at.k; ++c) {  // equal ones may differ by a rounding
    least = c == 0 || energies[c] < least ? energies[c] : least;
    if (c % kLanes == team.lane) memory[at.norms + c] = least;
  }
  team.sync();
}

// A position per team. Shared memory: sums over the block [8], then each team's.
template <int Lanes>
__global__ void compress_team(const __grid_constant__ Compress args) {
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const Directions& at = args.at;
  const int n = args.n, r = at.r, p = at.p, k = at.k;
  const int teams = static_cast<int>(blockDim.x) / Lanes, thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * teams, left = args.x.view.size[1] - first;
  const int positions = left < teams ? static_cast<int>(left) : teams;
  float* const all = shared + 8;
  float* const memory = all + thread / Lanes * args.team_size;
  const Team<Lanes> team(thread, shared);

  with_dtype(args.x.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    each_loaded<Element>(args.x, n, first, positions, thread, static_cast<int>(blockDim.x),
                         [&](int i, int position, int j, const float (&values)[kVector<Element>], int count) {
                           if (!args.x.positions_inside && count == kVector<Element> && r % 4 == 0) {
                             float* const to = all + position * args.team_size + i * r + j;
#pragma unroll
                             for (int e = 0; e < kVector<Element>; e += 4) {
                               store_shared(to + e, values[e], values[e + 1], values[e + 2], values[e + 3]);
                             }
                             return;
                           }
#pragma unroll
                           for (int e = 0; e < kVector<Element>; ++e) {
                             // From another neighbour in each position's turn: else all would meet one bank.
                             const int mine =
                                 args.x.positions_inside ? (e + position / kVector<Element>) % kVector<Element> : e;
                             float value = values[0];
#pragma unroll
                             for (int other = 1; other < kVector<Element>; ++other) {
                               if (other == mine) value = values[other];
                             }
                             const int at_position = args.x.positions_inside ? position + mine : position;
                             const int at_rank = args.x.positions_inside ? j : j + mine;
                             if (mine < count) all[at_position * args.team_size + i * r + at_rank] = value;
                           }
                         });
  });
  __syncthreads();

  if (thread / Lanes < positions) {
    uint32_t largest = 0;
    for (int index = team.lane; index < n * r; index += Lanes) {
      const uint32_t bits = magnitude_bits(memory[index]);
      largest = bits > largest ? bits : largest;
    }
    largest = team.largest(largest);
    const bool finite = is_finite(largest);
    if (!finite) {
      for (int index = team.lane; index < n * r; index += Lanes) memory[index] = 0;
    }
    team.sync();
    const Scale scale = scale_of(finite ? largest : 0);
    if (team.lane == 0) {
      memory[args.scales] = scale.down1;
      memory[args.scales + 1] = scale.down2;
      memory[args.scales + 2] = finite ? 0.0f : __int_as_float(0x7fffffff);
    }
    centre(team, args, memory, scale);
    find_directions(team, at, memory, memory + args.energies, args.basis.view.dtype);
    project_tasks(team, args, memory);
  }
  __syncthreads();

  // NaN in what is not finite spoils all of it.
  with_dtype(args.x.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    const int threads = static_cast<int>(blockDim.x);
    each_stored<Element>(args.basis, p + 1, first, positions, thread, threads, [&](int c, int position, int j) {
      const float* const of = all + position * args.team_size;
      const float value =
          c == 0 ? of[args.mean + j] * of[args.scales + 1] * of[args.scales] : of[at.u + (c - 1) * at.u_stride + j];
      return value + of[args.scales + 2];
    });
    Element* const coeff = reinterpret_cast<Element*>(args.coeff.data);
    for (int index = thread; index < n * p * positions; index += threads) {
      const int position = index % positions, row = index / positions, i = row / p, c = row % p;
      const float* const of = all + position * args.team_size;
      const float value = of[args.coefficients + c * n + i] * of[args.scales + 1] * of[args.scales] + of[args.scales + 2];
      coeff[i * args.coeff.stride[0] + c * args.coeff.stride[1] + first + position] = Storage<Element>::narrow(value);
    }
    float* const energy = reinterpret_cast<float*>(args.energy.data) + first * k;
    for (int index = thread; index < positions * k; index += threads) {
      const float* const of = all + index / k * args.team_size;
      const float down1 = of[args.scales], down2 = of[args.scales + 1];
      energy[index] = of[at.norms + index % k] * down2 * down2 * down1 * down1 + of[args.scales + 2];
    }
  });
}

template <int Lanes>
void launch_team(const Queue& queue, const Compress& args, int most_teams, int64_t most_floats) {
  const int64_t positions = args.x.view.size[1];
  int teams = most_teams;
  while (teams > 1 && (8 + static_cast<int64_t>(teams) * args.team_size > most_floats)) teams /= 2;
  queue.launch({blocks(positions, teams), static_cast<unsigned>(teams * Lanes),
                static_cast<size_t>(8 + teams * args.team_size) * sizeof(float)},
               compress_team<Lanes>, args);
}

std::tuple<Tensor, Tensor, Tensor> compress_op(Tensor x, int64_t components) {
  const View in = view(x, 3, "x");
  const int64_t n = in.size[0], positions = in.size[1], r = in.size[2];
  check_same(n >= 1 && components >= 0 && components <= r, "x [n, S, r] with n >= 1, components from 0 to r");
  const int64_t k = r < n - 1 ? r : n - 1;
  const auto reference = [&] {
    const auto results = call_reference<3>("compress", x, components);
    return std::make_tuple(tensor_of(results[0]), tensor_of(results[1]), tensor_of(results[2]));
  };
  if (in.dtype == Dtype::f64 || k > 64) return reference();

  // The team's memory: x [n][r], what finding directions takes, then the rest; the coefficients go where y was.
  Compress args{};
  args.n = static_cast<int>(n);
  args.spread = n > 1 ? static_cast<float>(1.0 / (std::sqrt(static_cast<double>(n)) - 1.0)) : 0.0f;
  args.at = directions_at(n * r, r, n - 1, components, 0);
  const bool spare = n * components > args.at.core - args.at.y;  // no room in y
  args.coefficients = spare ? args.at.end : args.at.y;
  args.mean = args.at.end + static_cast<int>(spare ? n * components : 0);
  args.energies = args.mean + static_cast<int>(r);
  args.scales = args.energies + static_cast<int>(k);
  const int64_t size = (static_cast<int64_t>(args.scales) + 5 + 31) / 32 * 32 + 8;  // teams of 8 side by side meet all banks
  args.team_size = static_cast<int>(size);

  Tensor basis = like_layout(x, components + 1);
  Tensor coeff = torch::stable::new_empty(x, {n, components, positions});
  Tensor energy = torch::stable::new_empty(x, {positions, k}, ScalarType::Float);
  const Queue queue{x, basis, coeff, energy};
  const int64_t most_floats = queue.device().shared_bytes / static_cast<int64_t>(sizeof(float));
  const bool per_thread = k >= 1 && k <= kThreadColumns && n - 1 <= r && r <= kThreadRanks;
  if (!per_thread && 8 + size > most_floats) return reference();
  args.x = plane_of(in);
  args.basis = plane_of(view(basis, 3, "basis"));
  args.coeff = view(coeff, 3, "coeff");
  args.energy = view(energy, 2, "energy");
  if (per_thread) {
    const float share = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
    launch_thread(queue, CompressThread{args.x, args.basis, args.coeff, args.energy, args.n, args.spread, share});
  } else if (team_lanes(k) == 8) {
    launch_team<8>(queue, args, 16, most_floats / 2);
  } else if (team_lanes(k) == 32) {
    launch_team<32>(queue, args, 8, most_floats / 2);
  } else {
    launch_team<256>(queue, args, 1, most_floats);
  }
  return {basis, coeff, energy};
}

RMM_CUDA_OP("compress", compress_op)

}  // namespace rmm
