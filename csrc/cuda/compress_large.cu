// compress with a position per block (large.cuh), for what teams of lanes are too small for. Tasks come by in chunks, three
// times, from memory or from the tile that holds all of them: for the mean, for the columns of the matrix or their R, and for
// coefficients and energies.

#include "compress_large.cuh"

namespace rmm {

// The core and the vectors are in shared memory if Resident, else in the block's workspace.
template <bool Resident>
__global__ void __launch_bounds__(kLargeThreads, 2) compress_large(const __grid_constant__ CompressLarge args) {
  extern __shared__ float4 shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const Large& at = args.at;
  const int n = args.n, r = at.r, k = at.k, p = at.p, thread = static_cast<int>(threadIdx.x);
  const int64_t position = blockIdx.x;
  float* const memory = Resident ? shared + args.end : args.workspace + position * at.memory_end;
  float *const core = memory + at.core, *const u = memory + at.u;
  float *const mean_of = shared + args.mean, *const high_of = shared + args.taken, *const low_of = high_of + r;
  float *const lift_of = shared + args.lift, *const found = shared + args.found;
  const LargeTeam team(thread);

  const auto each_task = [&](bool again, const auto& work) {
    each_chunk(args.x, position, n, at, shared + at.tile, again, work);
  };

  // In fp64 no sum overflows, and that of equal values is exact. They are where the core will be.
  double* const sum_of = reinterpret_cast<double*>(core);
  float *const least_of = core + 2 * r, *const most_of = least_of + r;
  for (int j = thread; j < r; j += kLargeThreads) sum_of[j] = 0, least_of[j] = 3.4028235e38f, most_of[j] = -3.4028235e38f;
  each_task(false, [&](int, int count, const float* x) {
    for (int j = thread; j < r; j += kLargeThreads) {
      double sum = sum_of[j];
      float least = least_of[j], most = most_of[j];
      for (int i = 0; i < count; ++i) {
        const float value = x[i * at.tile_stride + j];
        sum += static_cast<double>(value);
        least = fminf(least, value);
        most = fmaxf(most, value);
      }
      sum_of[j] = sum, least_of[j] = least, most_of[j] = most;
    }
  });
  uint32_t largest = 0;
  bool bad = false;
  for (int j = thread; j < r; j += kLargeThreads) {
    const bool finite = isfinite(sum_of[j]);
    const uint32_t bits = magnitude_bits(finite ? 0.5f * most_of[j] - 0.5f * least_of[j] : 0.0f);
    bad = bad || !finite;
    largest = bits > largest ? bits : largest;
  }
  Streamed of{};
  of.finite = !team.any(bad);
  largest = largest_of_block(thread, largest, found);
  of.live = of.finite && largest > 0;
  of.scale = scale_of(of.live ? largest : 0);
  for (int j = thread; j < r; j += kLargeThreads) {
    const double mean = sum_of[j] / n, scaled = mean * of.scale.up1 * of.scale.up2;
    mean_of[j] = of.finite ? static_cast<float>(mean) : __int_as_float(0x7fffffff);
    high_of[j] = static_cast<float>(scaled);
    low_of[j] = static_cast<float>(scaled - high_of[j]);
  }
  const auto centred = [&](const float* x, int i, int j) {
    return of.centred(x[i * at.tile_stride + j], high_of[j], low_of[j]);
  };

  // Where the matrix is tall its columns are Helmert's, one less than there are tasks; R takes all tasks as they are.
  __syncthreads();  // the sums are read
  if (!at.tall) {
    for (int index = thread; index < k * at.stride; index += kLargeThreads) core[index] = 0;
  }
  for (int c = thread; c < k; c += kLargeThreads) found[c] = 0;
  each_task(true, [&](int begin, int count, const float* x) {
    if (!at.tall) {
      return add_columns(team, at, core, shared + at.reflector, begin, count, [&](int i, int j) { return centred(x, i, j); });
    }
    const int skipped = begin == 0 ? 1 : 0;
    if (begin == 0) {
      for (int j = thread; j < r; j += kLargeThreads) lift_of[j] = args.spread * centred(x, 0, j);
    }
    add_columns(team, at, core, shared + at.reflector, begin == 0 ? 0 : begin - 1, count - skipped,
                [&](int i, int j) { return centred(x, i + skipped, j) + lift_of[j]; });
  });
  __syncthreads();
  directions_of_core(team, at, shared, core, u, args.basis.view.dtype);

  const float spoil = of.finite ? 0.0f : __int_as_float(0x7fffffff);
  const float down1 = of.scale.down1, down2 = of.scale.down2;
  const float *const kept = shared + at.kept, *const norms = shared + at.norms;
  const int* const order = reinterpret_cast<const int*>(shared + at.order);
  float* const coefficients = reinterpret_cast<float*>(args.coeff.data) + position * args.coeff.stride[2];
  each_task(true, [&](int begin, int count, float* x) {
    for (int j = thread; j < r; j += kLargeThreads) {
      for (int i = 0; i < kLargeChunk; ++i) x[i * at.tile_stride + j] = i < count ? centred(x, i, j) : 0.0f;
    }
    __syncthreads();
    constexpr int kTogether = LargeTeam::kGroup;
    for (int c = team.group; c < p || c < k; c += LargeTeam::kGroups) {
      const bool wanted = c < p, negligible = c >= k || !(kept[c] > 0);
      const float* const vector = wanted ? u + c * at.stride : core + order[c] * at.stride;
      const float factor = negligible ? 0.0f : wanted ? 1.0f : exact_rsqrt(norms[order[c]]);
      float square = 0;
#pragma unroll 1
      for (int first = 0; first < count; first += kTogether) {
        float values[kTogether] = {};
        for (int j = team.in_group; j < r; j += LargeTeam::kGroup) {
          const float along = vector[j];
#pragma unroll
          for (int e = 0; e < kTogether; ++e) values[e] = fmaf(along, x[(first + e) * at.tile_stride + j], values[e]);
        }
        float some = 0, mine = 0;
#pragma unroll
        for (int e = 0; e < kTogether; ++e) {
          const float value = team.group_sum(values[e]) * factor;
          some = fmaf(value, value, some);
          mine = e == team.in_group ? value : mine;
        }
        square += some;
        const int i = first + team.in_group;
        if (wanted && i < count) coefficients[c + (begin + i) * args.coeff.stride[0]] = mine * down2 * down1 + spoil;
      }
      if (team.in_group == 0 && c < k) found[c] += negligible ? 0.0f : square;
    }
  });

  __syncthreads();
  float* const energy = reinterpret_cast<float*>(args.energy.data) + position * k;
  float least = 3.4028235e38f;
  for (int c = 0; c < k; ++c) {  // equal ones may differ by a rounding
    least = fminf(least, kept[c] > 0 ? found[c] : norms[order[c]]);
    if (c % kLargeThreads == thread) energy[c] = least * down2 * down2 * down1 * down1 + spoil;
  }
  with_dtype(args.basis.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    each_stored<Element>(args.basis, p + 1, position, 1, thread, kLargeThreads,
                         [&](int c, int, int j) { return c == 0 ? mean_of[j] : u[(c - 1) * at.stride + j] + spoil; });
  });
}

bool fits_large(CompressLarge& args, int64_t n, int64_t r, int64_t p, int64_t most_floats) {
  args.at = large_at(r, n - 1 <= r ? n - 1 : n, p);
  int64_t next = args.at.shared_end;
  args.mean = take_floats(next, r), args.taken = take_floats(next, 2 * r), args.lift = take_floats(next, r);
  args.found = take_floats(next, args.at.k);
  place_tile(args.at, n, next, most_floats);
  args.end = take_floats(next, 0);
  return args.at.k >= kLargeThreads / 32 && args.at.k <= kLargest && next <= most_floats;  // found: of warps, too
}

bool is_resident(const CompressLarge& args, int64_t most_floats) {
  return static_cast<int64_t>(args.end) + args.at.memory_end <= most_floats;
}

void launch_large(const Queue& queue, const CompressLarge& args, int64_t most_floats) {
  const bool resident = is_resident(args, most_floats);
  const int64_t floats = args.end + (resident ? static_cast<int64_t>(args.at.memory_end) : 0);
  queue.launch({blocks(args.x.view.size[0], 1), kLargeThreads, static_cast<size_t>(floats) * sizeof(float)},
               resident ? compress_large<true> : compress_large<false>, args);
}

}  // namespace rmm
