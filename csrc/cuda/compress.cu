// compress: mean, Helmert reduction, QR, one-sided Jacobi, basis and coefficients. Where n − 1 ≤ min(r, 7) and r ≤ 64, a
// position per thread or few lanes, all in registers (compress_thread.cuh); else per team of 8 or 32 lanes, in shared memory;
// where n ≫ r, the tasks come by in chunks (compress_streamed.cu); what is too large for that takes a block a position
// (compress_large.cu). Blocks of so few positions that these don't fill a sector of 32 bytes work on transposed copies.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "compress_large.cuh"
#include "compress_streamed.cuh"
#include "compress_thread.cuh"
#include "directions.cuh"
#include "launch.h"
#include "reference.h"
#include "turn.cuh"

namespace rmm {

struct Compress {
  Plane x, basis;      // [n, S, r], [p+1, S, r]
  View coeff, energy;  // [n, p, S], [S, K]
  Directions at;
  int n;
  float spread;                                         // 1 / (√n − 1)
  int mean, energies, coefficients, scales, team_size;  // where a team keeps them, and what it has, in floats
  int place_size;                                       // of a position, for x [n][r] and then the results, in floats
  int teams, positions;                                 // of a block

  // In a position's place: basis [p+1][r], then these.
  __host__ __device__ int coefficients_at() const { return (at.p + 1) * at.r; }  // [p][n]
  __host__ __device__ int energies_at() const { return coefficients_at() + at.p * n; }
};

// x [n][r] of one position: scaled, centred; y its Helmert reduction
// y_i = x_i + x_0 / (√n − 1), i = 1 … n−1, as columns over ranks where Y is tall, over tasks where it is wide. The first task's
// vector goes first: exactly so where all share an offset, which then costs no accuracy, and equal vectors become
// exactly zero. Then the mean goes twice: what the first one rounds off, the second takes.
template <class T>
__device__ void centre(const T& team, const Compress& args, float* x, float* memory, const Scale& scale) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const Directions& at = args.at;
  const int n = args.n, r = at.r;
  const float share = 1.0f / static_cast<float>(n);
  float *const y = memory + at.y, *const mean_of = memory + args.mean;
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
      y[at.tall ? (i - 1) * at.y_stride + j : j * at.y_stride + (i - 1)] = reduced;
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
__device__ void project_tasks(const T& team, const Compress& args, const float* x, float* memory) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const Directions& at = args.at;
  const int n = args.n, r = at.r, live = at.p < at.k ? at.p : at.k;
  const float *const u = memory + at.u, *const kept = memory + at.kept;
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

// x of one position in its place, to what is stored of it, there too. NaN in what is not finite spoils all of it.
template <class T>
__device__ void compress_position(const T& team, const Compress& args, float* place, float* memory) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const Directions& at = args.at;
  const int n = args.n, r = at.r, p = at.p;
  uint32_t largest = 0;
  for (int index = team.lane; index < n * r; index += kLanes) {
    const uint32_t bits = magnitude_bits(place[index]);
    largest = bits > largest ? bits : largest;
  }
  largest = team.largest(largest);
  const bool finite = is_finite(largest);
  if (!finite) {
    for (int index = team.lane; index < n * r; index += kLanes) place[index] = 0;
  }
  team.sync();
  const Scale scale = scale_of(finite ? largest : 0);
  if (team.lane == 0) {
    memory[args.scales] = scale.down1;
    memory[args.scales + 1] = scale.down2;
    memory[args.scales + 2] = finite ? 0.0f : __int_as_float(0x7fffffff);
  }
  centre(team, args, place, memory, scale);
  find_directions(team, at, memory, memory + args.energies, args.basis.view.dtype);
  project_tasks(team, args, place, memory);

  const float down1 = memory[args.scales], down2 = memory[args.scales + 1], spoil = memory[args.scales + 2];
  for (int j = team.lane; j < r; j += kLanes) place[j] = memory[args.mean + j] * down2 * down1 + spoil;
  for (int c = 0; c < p; ++c) {
    for (int j = team.lane; j < r; j += kLanes) place[(c + 1) * r + j] = memory[at.u + c * at.u_stride + j] + spoil;
  }
  for (int index = team.lane; index < p * n; index += kLanes) {
    place[args.coefficients_at() + index] = memory[args.coefficients + index] * down2 * down1 + spoil;
  }
  for (int c = team.lane; c < at.k; c += kLanes) {
    place[args.energies_at() + c] = memory[at.norms + c] * down2 * down2 * down1 * down1 + spoil;
  }
  team.sync();
}

// As many positions a block as give coalesced access where they are innermost; its teams take them in turn. Shared memory: the
// positions' places, then the teams'.
template <int Lanes, int Group>
__global__ void compress_team(const __grid_constant__ Compress args) {
  extern __shared__ float4 shared_memory[];
  float* const places = reinterpret_cast<float*>(shared_memory);
  const Directions& at = args.at;
  const int n = args.n, r = at.r, p = at.p, k = at.k, place_size = args.place_size;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.positions, left = args.x.view.size[1] - first;
  const int positions = left < args.positions ? static_cast<int>(left) : args.positions;

  with_dtype(args.x.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    each_loaded<Element, true>(args.x, n, first, positions, thread, threads,
                               [&](int i, int position, int j, const float (&values)[kVector<Element>], int count) {
                                 float* const to = places + position * place_size + i * r + j;
                                 to_tile(args.x, position, values, count, to, place_size, r % 4 == 0);
                               });
  });
  __syncthreads();

  const Team<Lanes, Group> team(thread);
  float* const memory = places + args.positions * place_size + thread / Lanes * args.team_size;
  for (int position = thread / Lanes; position < positions; position += threads / Lanes) {
    compress_position(team, args, places + position * place_size, memory);
  }
  __syncthreads();

  with_dtype(args.x.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    each_stored<Element>(args.basis, p + 1, first, positions, thread, threads,
                         [&](int c, int position, int j) { return places[position * place_size + c * r + j]; });
    store_coefficients<Element>(args.coeff, 0, n, p, first, positions, thread, threads, [&](int i, int c, int position) {
      return places[position * place_size + args.coefficients_at() + c * n + i];
    });
    float* const energy = reinterpret_cast<float*>(args.energy.data) + first * k;
    for (int index = thread; index < positions * k; index += threads) {
      energy[index] = places[index / k * place_size + args.energies_at() + index % k];
    }
  });
}

// Of `most` teams and positions a block as many as have room, teams first.
void share(Compress& args, int most, int64_t most_floats) {
  const auto fits = [&](int64_t teams, int64_t positions) {
    return teams * args.team_size + positions * args.place_size <= most_floats;
  };
  args.teams = most;
  while (args.teams > 1 && !fits(args.teams, args.teams)) args.teams /= 2;
  args.positions = args.teams;
  while (args.positions < most && fits(args.teams, 2 * args.positions)) args.positions *= 2;
}

void launch_team(const Queue& queue, const Compress& args) {
  const auto launch = [&](auto kernel, int lanes) {
    const int64_t floats = static_cast<int64_t>(args.teams) * args.team_size + args.positions * args.place_size;
    queue.launch({blocks(args.x.view.size[1], args.positions), static_cast<unsigned>(args.teams * lanes),
                  static_cast<size_t>(floats) * sizeof(float)},
                 kernel, args);
  };
  if (args.at.k <= 16) {
    launch(compress_team<8, team_group(16)>, 8);
  } else if (args.at.k <= 32) {
    launch(compress_team<32, team_group(32)>, 32);
  } else {
    launch(compress_team<32, team_group(64)>, 32);
  }
}

// run(x, basis, coeff, energy, workspace) on some positions at a time of `x`, as it is in memory for them: with ranks
// innermost, and coefficients as store_coefficients keeps them in a workspace. `floats` is what run wants of its own for each
// position.
template <class Run>
void run_turned(Queue& queue, const Tensor& like, const View& x, const View& basis, const View& coeff, const View& energy,
                int64_t floats, const Run& run) {
  const int64_t n = x.size[0], positions = x.size[1], r = x.size[2], p = coeff.size[1];
  const bool inside = plane_of(x).positions_inside;
  const int64_t copies = inside ? (n + p + 1) * r * element_size(x.dtype) : 0;
  const int64_t some = at_a_time(positions, copies + (n * p + floats) * static_cast<int64_t>(sizeof(float)));
  const Tensor x_copy = torch::stable::new_empty(like, {inside ? n : 0, some, r});
  const Tensor basis_copy = torch::stable::new_empty(like, {inside ? p + 1 : 0, some, r});
  const Tensor coeff_copy = torch::stable::new_empty(like, {some, n, p}, ScalarType::Float);
  const Tensor workspace = torch::stable::new_empty(like, {some, floats}, ScalarType::Float);
  for (const Tensor& tensor : {x_copy, basis_copy, coeff_copy, workspace}) queue.touches(tensor);
  for (int64_t first = 0; first < positions; first += some) {
    const int64_t count = std::min(some, positions - first);
    View of_x = narrowed(x, 1, first, count), of_basis = narrowed(basis, 1, first, count);
    const View to_basis = of_basis, to_coeff = narrowed(coeff, 2, first, count);
    const View of_coeff = permuted(narrowed(view(coeff_copy, 3, "coefficients"), 0, 0, count), 1, 2, 0);
    if (inside) {
      of_x = narrowed(view(x_copy, 3, "x"), 1, 0, count), of_basis = narrowed(view(basis_copy, 3, "basis"), 1, 0, count);
      turn(queue, permuted(narrowed(x, 1, first, count), 0, 2, 1), permuted(of_x, 0, 2, 1));
    }
    run(of_x, of_basis, of_coeff, narrowed(energy, 0, first, count), static_cast<float*>(workspace.data_ptr()));
    if (inside) turn(queue, of_basis, to_basis);
    const auto matrix = [&](const View& of) {  // [1, S, n p]
      return View{of.data, of.dtype, {1, count, n * p}, {0, of.stride[2], of.stride[1]}};
    };
    turn(queue, matrix(of_coeff), matrix(to_coeff));
  }
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
  if (in.dtype == Dtype::f64 || k > kLargest) return reference();

  // A team's memory: what finding directions takes, then the rest; the coefficients go where y was.
  Compress args{};
  args.n = static_cast<int>(n);
  args.spread = n > 1 ? static_cast<float>(1.0 / (std::sqrt(static_cast<double>(n)) - 1.0)) : 0.0f;
  args.at = directions_at(0, r, n - 1, components, 0);
  const bool spare = n * components > args.at.core - args.at.y;  // no room in y
  args.coefficients = spare ? args.at.end : args.at.y;
  args.mean = args.at.end + static_cast<int>(spare ? n * components : 0);
  args.energies = args.mean + static_cast<int>(r);
  args.scales = args.energies + static_cast<int>(k);
  const auto padded = [](int64_t size) { return (size + 31) / 32 * 32 + 8; };  // teams of 8 side by side meet all banks
  const int64_t team = padded(static_cast<int64_t>(args.scales) + 5);
  const int64_t place = padded(std::max(n * r, (components + 1) * r + components * n + k));

  Tensor basis = like_layout(x, components + 1);
  Tensor coeff = torch::stable::new_empty(x, {n, components, positions});
  Tensor energy = torch::stable::new_empty(x, {positions, k}, ScalarType::Float);
  Queue queue{x, basis, coeff, energy};
  const View out = view(basis, 3, "basis"), coefficients = view(coeff, 3, "coeff"), energies = view(energy, 2, "energy");
  const int64_t most_floats = queue.device().shared_bytes / static_cast<int64_t>(sizeof(float));
  if (k >= 1 && k <= kThreadColumns && n - 1 <= r && r <= kThreadRanks) {
    const float share = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
    launch_thread(queue, CompressThread{plane_of(in), plane_of(out), coefficients, energies, args.n, args.spread, share});
    return {basis, coeff, energy};
  }

  const auto launch_all = [&](int64_t in_block, int64_t floats, const auto& run) {
    if (in_block * element_size(in.dtype) >= 32) {
      run(in, out, coefficients, energies, nullptr);
    } else {
      run_turned(queue, x, in, out, coefficients, energies, floats, run);
    }
    return std::make_tuple(basis, coeff, energy);
  };
  const bool fits = k <= 64 && place + team <= most_floats;
  if (fits) {
    args.team_size = static_cast<int>(team), args.place_size = static_cast<int>(place);
    share(args, k <= 16 ? 16 : 8, most_floats);
  }
  if (r >= 1 && r <= kStreamedRanks && n > r && (n > kStreamedTasks * r || !fits || args.positions < 8)) {
    CompressStreamed streamed{};
    streamed.n = args.n;
    place_streamed(streamed, r, components, most_floats);
    return launch_all(streamed.teams, 0, [&](const View& x, const View& basis, const View& coeff, const View& energy, float*) {
      streamed.x = plane_of(x), streamed.basis = plane_of(basis), streamed.coeff = coeff, streamed.energy = energy;
      launch_streamed(queue, streamed);
    });
  }
  if (fits) {
    return launch_all(args.positions, 0, [&](const View& x, const View& basis, const View& coeff, const View& energy, float*) {
      args.x = plane_of(x), args.basis = plane_of(basis), args.coeff = coeff, args.energy = energy;
      launch_team(queue, args);
    });
  }
  CompressLarge large{};
  large.n = args.n, large.spread = args.spread;
  if (!fits_large(large, n, r, components, most_floats)) return reference();
  const int64_t floats = is_resident(large, most_floats) ? 0 : large.at.memory_end;
  return launch_all(0, floats, [&](const View& x, const View& basis, const View& coeff, const View& energy, float* workspace) {
    large.x = plane_of(permuted(x, 1, 0, 2)), large.basis = plane_of(basis), large.coeff = coeff, large.energy = energy;
    large.workspace = workspace;
    launch_large(queue, large, most_floats);
  });
}

RMM_CUDA_OP("compress", compress_op)

}  // namespace rmm
