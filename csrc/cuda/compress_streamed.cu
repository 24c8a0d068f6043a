// compress of many more tasks than ranks: a position's tasks come by in chunks, and only the triangle R of their QR stays, with
// RᵀR = Σ xc_i xc_iᵀ. That is the Gram matrix without its squares, so that one is enough where Gram would take two passes. x
// comes three times: for the mean, for R, for the coefficients.

#include "compress_streamed.cuh"

namespace rmm {

constexpr int kChunk = 32;

// R and the rows of a chunk, a column per slot of a lane in `a`, to the R of both. Column c of R is the lane's own: above the
// diagonal at y + c · stride; the diagonal in registers, never negative, so that what a late chunk adds to a large R is a small
// correction (Parlett's reflection), rounded but once.
template <int Columns, class T>
__device__ __forceinline__ void append(const T& team, float (&a)[Columns][kChunk], float (&diagonal)[Columns], float* y,
                                       int stride, int r) {
  constexpr int kLanes = T::kGroup * T::kGroups;
#pragma unroll
  for (int slot = 0; slot < Columns; ++slot) {
#pragma unroll 1
    for (int owner = 0; owner < kLanes; ++owner) {
      const int j = slot * kLanes + owner;
      if (j >= r) break;
      float v[kChunk], along[Columns];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = __shfl_sync(team.team_mask, a[slot][i], owner, kLanes);
#pragma unroll
      for (int t = slot; t < Columns; ++t) {
        float even = 0, odd = 0;
#pragma unroll
        for (int i = 0; i < kChunk; i += 2) {
          even = fmaf(v[i], a[t][i], even);
          odd = fmaf(v[i + 1], a[t][i + 1], odd);
        }
        along[t] = even + odd;
      }
      const float below = __shfl_sync(team.team_mask, along[slot], owner, kLanes);
      const float first = __shfl_sync(team.team_mask, diagonal[slot], owner, kLanes);
      const bool live = below > kTiny;
      const float square = live ? fmaf(first, first, below) : 1.0f, norm = square * exact_rsqrt(square);
      const float head = live ? __fdividef(-below, norm + first) : 0.0f;  // first − norm
      const float turn = live ? __fdividef(2.0f, fmaf(head, head, below)) : 0.0f;
#pragma unroll
      for (int t = slot; t < Columns; ++t) {
        const int c = t * kLanes + team.lane;
        const bool after = c > j && c < r;
        const float top = after ? y[c * stride + j] : 0.0f, step = after ? turn * fmaf(head, top, along[t]) : 0.0f;
        if (after) y[c * stride + j] = fmaf(-step, head, top);
        if (c == j) diagonal[t] = first - head;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) a[t][i] = fmaf(-step, v[i], a[t][i]);
      }
    }
  }
}

// A position per team, with up to Columns · Lanes ranks. Shared memory: each team's.
template <int Lanes, int Group, int Columns>
__global__ void compress_streamed(const __grid_constant__ CompressStreamed args) {
  extern __shared__ float4 shared_memory[];
  float* const all = reinterpret_cast<float*>(shared_memory);
  const Directions& at = args.at;
  const int n = args.n, r = at.r, p = at.p;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), teams = threads / Lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * teams, left = args.x.view.size[1] - first;
  const int positions = left < teams ? static_cast<int>(left) : teams;
  const bool here = thread / Lanes < positions;
  const Team<Lanes, Group> team(thread);
  float* const memory = all + thread / Lanes * args.team_size;
  float *const tile = memory + args.tile, *const high_of = memory + args.taken, *const low_of = high_of + r;
  float *const mean_of = memory + args.mean, *const coefficients = memory + args.coefficients;
  float *const energies = memory + args.energies, *const found = energies + r;

  const auto load = [&](int begin, int count) {
    with_dtype(args.x.view.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      Plane chunk = args.x;
      chunk.view.data += begin * chunk.view.stride[0] * static_cast<int64_t>(sizeof(Element));
      each_loaded<Element, true>(chunk, count, first, positions, thread, threads,
                                 [&](int i, int position, int j, const float (&values)[kVector<Element>], int some) {
                                   float* const to = all + position * args.team_size + args.tile + i * args.tile_stride + j;
                                   to_tile(chunk, position, values, some, to, args.team_size);
                                 });
    });
  };

  // In fp64 no sum overflows, and that of equal values is exact.
  double sum[Columns] = {};
  float least[Columns], most[Columns];
#pragma unroll
  for (int t = 0; t < Columns; ++t) least[t] = 3.4028235e38f, most[t] = -3.4028235e38f;
  each_chunk<kChunk>(n, load, [&](int, int count) {
    if (!here) return;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int t = 0; t < Columns; ++t) {
        const int c = t * Lanes + team.lane;
        const float value = c < r ? tile[i * args.tile_stride + c] : 0.0f;
        sum[t] += static_cast<double>(value);
        least[t] = fminf(least[t], value);
        most[t] = fmaxf(most[t], value);
      }
    }
  });
  Streamed position{};
  if (here) {
    uint32_t largest = 0;
    bool bad = false;
#pragma unroll
    for (int t = 0; t < Columns; ++t) {
      const bool finite = isfinite(sum[t]);
      const uint32_t bits = magnitude_bits(finite ? 0.5f * most[t] - 0.5f * least[t] : 0.0f);
      bad = bad || !finite;
      largest = bits > largest ? bits : largest;
    }
    largest = team.largest(largest);
    position.finite = !team.any(bad);
    position.live = position.finite && largest > 0;
    position.scale = scale_of(position.live ? largest : 0);
#pragma unroll
    for (int t = 0; t < Columns; ++t) {
      const int c = t * Lanes + team.lane;
      if (c >= r) continue;
      const double mean = sum[t] / n, scaled = mean * position.scale.up1 * position.scale.up2;
      mean_of[c] = position.finite ? static_cast<float>(mean) : __int_as_float(0x7fffffff);
      high_of[c] = static_cast<float>(scaled);
      low_of[c] = static_cast<float>(scaled - high_of[c]);
      for (int j = 0; j < c; ++j) memory[at.y + c * at.y_stride + j] = 0;
    }
  }

  float diagonal[Columns] = {};
  each_chunk<kChunk>(n, load, [&](int, int count) {
    if (!here) return;
    float a[Columns][kChunk];
#pragma unroll
    for (int t = 0; t < Columns; ++t) {
      const int c = t * Lanes + team.lane;
      const float high = c < r ? high_of[c] : 0.0f, low = c < r ? low_of[c] : 0.0f;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        a[t][i] = c < r && i < count ? position.centred(tile[i * args.tile_stride + c], high, low) : 0.0f;
      }
    }
    append(team, a, diagonal, memory + at.y, at.y_stride, r);
  });
  if (here) {
#pragma unroll
    for (int t = 0; t < Columns; ++t) {
      const int c = t * Lanes + team.lane;
      if (c < r) memory[at.diagonal + c] = diagonal[t];
    }
    team.sync();
    directions_of_triangle(team, at, memory, energies, args.basis.view.dtype);
    if (team.lane == 0) {
      for (int c = 0; c < p; ++c) found[c] = 0;
    }
  }

  const float spoil = position.finite ? 0.0f : __int_as_float(0x7fffffff);
  const float down1 = position.scale.down1, down2 = position.scale.down2;
  const float* const kept = memory + at.kept;
  each_chunk<kChunk>(n, load, [&](int begin, int count) {
    if (here) {
#pragma unroll
      for (int t = 0; t < Columns; ++t) {
        const int c = t * Lanes + team.lane;
        if (c >= args.tile_stride) continue;
        const float high = c < r ? high_of[c] : 0.0f, low = c < r ? low_of[c] : 0.0f;
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          float& value = tile[i * args.tile_stride + c];
          value = c < r ? position.centred(value, high, low) : 0.0f;
        }
      }
      team.sync();
      for (int c = 0; c < p; ++c) {
        const float* const u = memory + at.u + c * at.u_stride;
        const float factor = kept[c];
        float square = 0;
        for (int i = team.lane; i < count; i += Lanes) {
          const float4* const x = reinterpret_cast<const float4*>(tile + i * args.tile_stride);
          float even = 0, odd = 0;
          for (int j = 0; j < r; j += 4) {
            const float4 four = x[j / 4];
            even = fmaf(four.x, u[j], even);
            if (j + 1 < r) odd = fmaf(four.y, u[j + 1], odd);
            if (j + 2 < r) even = fmaf(four.z, u[j + 2], even);
            if (j + 3 < r) odd = fmaf(four.w, u[j + 3], odd);
          }
          const float value = (even + odd) * factor;
          square = fmaf(value, value, square);
          coefficients[c * (kChunk + 1) + i] = value * down2 * down1 + spoil;
        }
        square = team.sum(square);
        if (team.lane == 0) found[c] += square;
      }
    }
    __syncthreads();
    with_dtype(args.x.view.dtype, [&](auto dtype) {
      using Element = decltype(dtype);
      store_coefficients<Element>(args.coeff, begin, count, p, first, positions, thread, threads, [&](int i, int c, int of) {
        return all[of * args.team_size + args.coefficients + c * (kChunk + 1) + i];
      });
    });
  });

  if (here) {
    team.sync();
    float energy = 3.4028235e38f;
    for (int c = 0; c < r; ++c) {  // equal ones may differ by a rounding
      energy = fminf(energy, c < p && kept[c] > 0 ? found[c] : energies[c]);
      if (c % Lanes == team.lane) memory[at.norms + c] = energy * down2 * down2 * down1 * down1 + spoil;
    }
    for (int c = 0; c < p; ++c) {
      for (int j = team.lane; j < r; j += Lanes) memory[at.u + c * at.u_stride + j] += spoil;
    }
  }
  __syncthreads();
  with_dtype(args.x.view.dtype, [&](auto dtype) {
    using Element = decltype(dtype);
    each_stored<Element>(args.basis, p + 1, first, positions, thread, threads, [&](int c, int of, int j) {
      const float* const from = all + of * args.team_size;
      return c == 0 ? from[args.mean + j] : from[at.u + (c - 1) * at.u_stride + j];
    });
    float* const energy = reinterpret_cast<float*>(args.energy.data) + first * r;
    for (int index = thread; index < positions * r; index += threads) {
      energy[index] = all[index / r * args.team_size + at.norms + index % r];
    }
  });
}

void place_streamed(CompressStreamed& args, int64_t r, int64_t p, int64_t most_floats) {
  args.tile_stride = static_cast<int>((r + 3) / 8 * 8 + 4);  // 16 bytes of 8 tasks side by side meet all banks
  args.at = triangle_at(r, p, kChunk * args.tile_stride + 3);
  args.tile = (args.at.core + 3) / 4 * 4;
  int next = args.at.end;
  const auto take = [&next](int64_t count) {
    const int at = next;
    next += static_cast<int>(count);
    return at;
  };
  const int64_t of_chunk = p * (kChunk + 1);
  args.coefficients = of_chunk <= args.at.core - args.at.y ? args.at.y : take(of_chunk);  // R has had its time
  args.mean = take(r), args.taken = take(2 * r), args.energies = take(2 * r);
  args.team_size = (next + 31) / 32 * 32 + 8;
  args.teams = r <= 16 ? 16 : 8;
  while (args.teams > 1 && static_cast<int64_t>(args.teams) * args.team_size > most_floats) args.teams /= 2;
}

void launch_streamed(const Queue& queue, const CompressStreamed& args) {
  const int64_t r = args.x.view.size[2];
  const auto launch = [&](auto kernel, int lanes) {
    queue.launch({blocks(args.x.view.size[1], args.teams), static_cast<unsigned>(args.teams * lanes),
                  static_cast<size_t>(args.teams) * args.team_size * sizeof(float)},
                 kernel, args);
  };
  if (r <= 16) {
    launch(compress_streamed<8, team_group(16), 2>, 8);
  } else if (r <= 32) {
    launch(compress_streamed<32, team_group(32), 1>, 32);
  } else {
    launch(compress_streamed<32, team_group(64), 2>, 32);
  }
}

}  // namespace rmm
