// compress, a position per thread or, where its ranks are more than 16, per 2 or 4 neighbouring lanes: up to K columns, n − 1
// of them, of up to 16 ranks a lane, in registers; what is beyond is 0. How they come and go: compress_thread_tile.cuh.
#pragma once

#include "compress_thread_tile.cuh"
#include "jacobi.cuh"
#include "launch.h"

namespace rmm {

// a · b from index `from` on, in two sums where there are many.
template <int N>
__device__ __forceinline__ float dot(const float (&a)[N], const float (&b)[N], int from = 0) {
  float even = 0, odd = 0;
#pragma unroll
  for (int i = from; i < N; ++i) {
    if (N > 8 && (i - from) % 2 == 1) {
      odd = fmaf(a[i], b[i], odd);
    } else {
      even = fmaf(a[i], b[i], even);
    }
  }
  return N > 8 ? even + odd : even;
}

// y = QR, as householder in team.cuh: of the own ranks, the vectors in y from their first rank on (0 before, or with a
// position's ranks all here, of no account), R's columns in upper.
template <int K, int Rows, int Lanes>
__device__ __forceinline__ void householder(const Share<Lanes>& share, float (&y)[K][kRanks], float (&tau)[K],
                                            float (&upper)[K][Rows]) {
#pragma unroll
  for (int j = 0; j < K; ++j) {
    constexpr bool kAll = Lanes == 1;
    const int from = kAll ? j : 0, owner = j / Rows, slot = j % Rows;
#pragma unroll
    for (int t = 0; t < Rows; ++t) {
      const bool above = share.rank(t) < j;
      upper[j][t] = above ? y[j][t] : 0.0f;
      if (!kAll) y[j][t] = above ? 0.0f : y[j][t];
    }
    const float square = share.sum(dot(y[j], y[j], from));
    const bool live = square > kTiny, mine = share.part() == owner;
    const float safe = live ? square : 1.0f, norm = safe * exact_rsqrt(safe), first = share.of(owner, y[j][slot]);
    tau[j] = live ? __fdividef(2.0f, safe + norm * (2.0f * fabsf(first) + norm)) : 0.0f;
    upper[j][slot] = !mine ? upper[j][slot] : live ? copysignf(norm, -first) : first;
    y[j][slot] = mine ? first + copysignf(norm, first) : y[j][slot];
#pragma unroll
    for (int c = j + 1; c < K; ++c) {
      const float step = tau[j] * share.sum(dot(y[j], y[c], from));
#pragma unroll
      for (int t = from; t < kRanks; ++t) y[c][t] = fmaf(-step, y[j][t], y[c][t]);
    }
  }
}

// One-sided Jacobi: rotates the columns until they are orthogonal. norms: squared.
template <int K, int Rows, int Lanes>
__device__ __forceinline__ void jacobi(const Share<Lanes>& share, float (&a)[K][Rows], float (&norms)[K]) {
  float total = 0;
#pragma unroll
  for (int c = 0; c < K; ++c) {
    norms[c] = share.sum(dot(a[c], a[c]));
    total += norms[c];
  }
  const float noise = kNoise * total * total;
#pragma unroll 1
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    float worst = 0;
#pragma unroll
    for (int round = 0; round < K; ++round) {
#pragma unroll
      for (int pair = 0; pair < meetings(K, round); ++pair) {
        const int p = column_of(K, meeting(K, round, pair).left), q = column_of(K, meeting(K, round, pair).right);
        const Turn turn(norms[p], norms[q], share.sum(dot(a[p], a[q])));
        worst = fmaxf(worst, turn.excess);
        norms[p] = turn.longer;
        norms[q] = turn.shorter;
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          const float about = fmaf(turn.half, a[q][i], a[p][i]);
          a[q][i] = fmaf(-turn.sine, about, a[q][i]);
          a[p][i] = fmaf(turn.half, a[q][i], about);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < K; ++c) norms[c] = share.sum(dot(a[c], a[c]));
    if (worst <= noise) break;
  }
}

// Direction c, c > 0 before it being orthonormal, becomes what is left of the unit vector of the first k that sticks out most
// of them (twice Gram–Schmidt). All lanes of a position do so, and keep their own rows.
template <int K, int Lanes>
__device__ void complete(const Tile<K, Lanes>& tile, int k, int c) {
  constexpr int kRows = Tile<K, Lanes>::kRows;
  tile.share.sync();
  int best = 0;
  float most = -1;
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    float left = 1;
#pragma unroll 1
    for (int b = 0; b < c; ++b) left = fmaf(-tile.any_direction(b, i), tile.any_direction(b, i), left);
    if (left > most + 1e-3f) {  // by a margin, so that rounding does not decide
      most = left;
      best = i;
    }
  }
  float column[K];
#pragma unroll
  for (int i = 0; i < K; ++i) column[i] = i == best ? 1.0f : 0.0f;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int b = 0; b < c; ++b) {
      float before[K];
#pragma unroll
      for (int i = 0; i < K; ++i) before[i] = tile.any_direction(b, i);
      const float along = dot(before, column);
#pragma unroll
      for (int i = 0; i < K; ++i) column[i] = fmaf(-along, before[i], column[i]);
    }
    const float inverse = exact_rsqrt(dot(column, column));
#pragma unroll
    for (int i = 0; i < K; ++i) column[i] *= inverse;
  }
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (i / kRows == tile.share.part()) tile.direction(c, i % kRows) = column[i];
  }
}

// Whether the largest |y| leaves room on both sides for what is summed and squared on the way.
__device__ __forceinline__ bool within(uint32_t largest, int low, int high) {
  const int power = static_cast<int>(largest >> 23) - 127;
  return power >= low && power < high;
}

// y, the Helmert reduction of the own position's x, and its mean, to `rows`; the largest |y| as its bits. As centre in
// compress.cu: the first task's vector goes first, then the mean, then what the mean rounded off.
template <int K, int Lanes>
__device__ __forceinline__ uint32_t centre(const CompressThread& args, const Tile<K, Lanes>& tile, const Rows<Lanes>& rows,
                                           int ranks, float (&y)[K][kRanks]) {
  const int n = args.n;
  const float share = 1.0f / static_cast<float>(n);
  uint32_t largest = 0;
#pragma unroll
  for (int t = 0; t < kRanks; t += 4) {
    float mean[4] = {};
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[c][t + e] = 0;
    }
    if (tile.share.rank(t) < ranks) {
      float x[K + 1][4];
      tile.load(n, t, x);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float offset = x[0][e];
        float sum = 0;
#pragma unroll
        for (int i = 1; i <= K; ++i) {
          x[i][e] = i < n ? x[i][e] - offset : 0.0f;
          sum += x[i][e];
        }
        const float about = share * sum;
        sum = -about;
#pragma unroll
        for (int i = 1; i <= K; ++i) {
          x[i][e] = i < n ? x[i][e] - about : 0.0f;
          sum += x[i][e];
        }
        const float rest = share * sum;
        mean[e] = offset + (about + rest);
        const float lift = fmaf(args.spread, -about - rest, -rest);
#pragma unroll
        for (int i = 1; i <= K; ++i) {
          y[i - 1][t + e] = i < n ? x[i][e] + lift : 0.0f;
          largest = max(largest, magnitude_bits(y[i - 1][t + e]));
        }
      }
    }
    rows.put(tile.share, t, mean[0], mean[1], mean[2], mean[3]);
  }
  return tile.share.most(largest);
}

// The largest |value| of u is to be positive, as stored, the lowest index on ties.
template <int Lanes>
__device__ __forceinline__ bool points_down(const Share<Lanes>& share, const float (&u)[kRanks], float factor, Dtype stored) {
  float high = u[0], low = u[0];
#pragma unroll
  for (int t = 1; t < kRanks; ++t) {
    high = fmaxf(high, u[t]);
    low = fminf(low, u[t]);
  }
  high = as_stored(stored, share.most(high) * factor);
  low = as_stored(stored, share.least(low) * factor);
  bool down = -low > high;
  if (-low == high) {
    int peak = 2 * kRanks * Lanes;  // twice where it is, and whether it is negative
#pragma unroll
    for (int t = kRanks - 1; t >= 0; --t) {
      if (fabsf(as_stored(stored, u[t] * factor)) == high) peak = 2 * share.rank(t) + (u[t] < 0 ? 1 : 0);
    }
    down = share.least(peak) % 2 == 1;
  }
  return down;
}

template <int K, int Lanes>
__device__ __forceinline__ void compress_positions(const CompressThread& args, float* memory, int thread, int64_t first) {
  using Positions = Tile<K, Lanes>;
  constexpr int kRows = Positions::kRows;
  const int n = args.n, r = static_cast<int>(args.x.view.size[2]), p = static_cast<int>(args.coeff.size[1]);
  const int k = n - 1, position = thread / Lanes, ranks = (r + 3) / 4 * 4;
  const Dtype dtype = args.x.view.dtype;
  const int64_t left = args.x.view.size[1] - first;
  const int positions = left < 32 ? static_cast<int>(left) : 32;
  const Share<Lanes> share(thread);
  const Rows<Lanes> rows{memory, position, args.basis.positions_inside};
  const Positions tile{memory + Rows<Lanes>::kFloats, thread, share, args.x.positions_inside};
  with_dtype(dtype, [&](auto element) { load_positions<decltype(element)>(args, tile, first, positions); });
  sync_positions<Lanes>();

  float y[K][kRanks];
  uint32_t largest;
  float down1 = 1, down2 = 1, spoil = 0;  // what was divided by, in two factors; NaN spoils all where an entry is not finite
  bool scaled = false;
#pragma unroll 1
  while (true) {
    largest = centre(args, tile, rows, ranks, y);
    if (scaled || within(largest, -64, 64)) break;
    // Sums of so large values may overflow, differences of so small ones lose bits: once more, with x scaled.
    uint32_t largest_x = 0;
    tile.each(n, ranks, [&](float& value) { largest_x = max(largest_x, magnitude_bits(value)); });
    largest_x = share.most(largest_x);
    const bool finite = is_finite(largest_x);
    const Scale scale = scale_of(finite ? largest_x : 0);
    tile.each(n, ranks, [&](float& value) { value = finite ? value * scale.up1 * scale.up2 : 0.0f; });
    down1 = scale.down1;
    down2 = scale.down2;
    spoil = finite ? 0.0f : __int_as_float(0x7fffffff);
    scaled = true;
  }
  if (scaled) {
#pragma unroll 1
    for (int t = 0; t < kRanks; ++t) rows.at(share, t) = rows.at(share, t) * down2 * down1 + spoil;
  }
  with_dtype(dtype, [&](auto element) { store_rows<decltype(element)>(args, rows, thread, first, positions, 0); });
  if (!within(largest, -2, 12)) {  // what tells the tasks apart may be much smaller than what they share
    const Scale centred = scale_of(largest);
    down1 *= centred.down2;
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int t = 0; t < kRanks; ++t) y[c][t] *= centred.up2;
    }
  }

  float tau[K], upper[K][kRows], core[K][kRows], norms[K];
  householder(share, y, tau, upper);
#pragma unroll
  for (int c = 0; c < K; ++c) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) core[c][t] = upper[c][t];
  }
  jacobi(share, core, norms);

  // To shared memory, by falling norm. All have read their x, which lay across.
  sync_positions<Lanes>();
  float longest = 0;
#pragma unroll
  for (int c = 0; c < K; ++c) longest = fmaxf(longest, norms[c]);
  int live = 0;  // columns, the first ones, whose σ is not negligible
#pragma unroll
  for (int c = 0; c < K; ++c) {
    int place = 0;
#pragma unroll
    for (int b = 0; b < K; ++b) {
      if (b != c) place += (b < c ? norms[b] >= norms[c] : norms[b] > norms[c]) ? 1 : 0;
    }
    live += norms[c] > kDeficient * kDeficient * longest && norms[c] > kTiny ? 1 : 0;
    const float inverse = exact_rsqrt(fmaxf(norms[c], kTiny));
#pragma unroll
    for (int t = 0; t < kRows; ++t) tile.direction(place, t) = core[c][t] * inverse;
    tile.norm(place) = norms[c];
  }
#pragma unroll 1
  for (int c = live; c < p && c < k; ++c) complete(tile, k, c);

  float* const energies = tile.memory + Positions::kEnergies;
  float energy = 3e38f;
#pragma unroll 1
  for (int c = 0; c < p || c < k; ++c) {
    float w[kRows], along[K], square = 0, sum = 0;
#pragma unroll
    for (int t = 0; t < kRows; ++t) w[t] = c < k ? tile.direction(c, t) : 0.0f;
#pragma unroll
    for (int i = 0; i < K; ++i) {  // (Rᵀw)_i = (Yᵀu)_i: the columns' own norms carry what all rotations rounded
      float some = 0;
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        if (Lanes > 1 || t <= i) some = fmaf(upper[i][t], w[t], some);
      }
      along[i] = share.sum(some);
      square = fmaf(along[i], along[i], square);
      sum += along[i];
    }
    if (c < k) {
      energy = fminf(energy, c < live ? square : tile.norm(c));  // equal ones may differ by a rounding
      if (share.part() == 0) energies[position * (k | 1) + c] = energy * down1 * down2 * down1 * down2 + spoil;
    }
    if (c >= p) continue;

    float u[kRanks];
#pragma unroll
    for (int t = 0; t < kRanks; ++t) u[t] = t < kRows ? w[t < kRows ? t : 0] : 0.0f;
    if (c >= k) {
#pragma unroll
      for (int t = 0; t < kRanks; ++t) u[t] = share.rank(t) == c ? 1.0f : 0.0f;
    }
    // Qu, and a Newton step towards norm 1.
#pragma unroll
    for (int j = K - 1; j >= 0; --j) {
      const int from = Lanes == 1 ? j : 0;
      const float step = tau[j] * share.sum(dot(y[j], u, from));
#pragma unroll
      for (int t = from; t < kRanks; ++t) u[t] = fmaf(-step, y[j][t], u[t]);
    }
    float factor = fmaf(-0.5f, share.sum(dot(u, u)), 1.5f);
    if (points_down(share, u, factor, dtype)) factor = -factor;
#pragma unroll
    for (int t = 0; t < kRanks; ++t) u[t] = fmaf(u[t], factor, spoil);  // + 0: no −0
#pragma unroll
    for (int t = 0; t < kRanks; t += 4) rows.put(share, t, u[t], u[t + 1], u[t + 2], u[t + 3]);
    with_dtype(dtype, [&](auto element) { store_rows<decltype(element)>(args, rows, thread, first, positions, c + 1); });

    // Σ y_i = √n x_0 and y_i = x_i + x_0 / (√n − 1).
    const float head = args.share * sum, lift = args.spread * head, down = c < live ? copysignf(down2, factor) : 0.0f;
    if (position < positions) {
      with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        Element* at = reinterpret_cast<Element*>(args.coeff.data) + c * args.coeff.stride[1] + first + position;
        if (share.part() == 0) *at = Storage<Element>::narrow(fmaf(head * down1, down, spoil));
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (i >= k) break;
          at += args.coeff.stride[0];
          if (share.part() == (i + 1) % Lanes) *at = Storage<Element>::narrow(fmaf((along[i] - lift) * down1, down, spoil));
        }
      });
    }
  }

  sync_positions<Lanes>();
  float* const to = reinterpret_cast<float*>(args.energy.data) + first * k;
  const float per_position = 1.0f / static_cast<float>(k);
  for (int index = thread; index < positions * k; index += Positions::kThreads) {
    const int at = quotient(index, per_position);
    to[index] = energies[at * (k | 1) + index - at * k];
  }
}

// Lanes warps share 32 positions; so many such are a block.
template <int Lanes>
constexpr int kSets = Lanes == 1 ? 2 : 1;

template <int K, int Lanes>
constexpr int kSetFloats = Rows<Lanes>::kFloats + Tile<K, Lanes>::kFloats;

template <int K, int Lanes>
__global__ void __launch_bounds__(32 * Lanes * kSets<Lanes>) compress_thread(const __grid_constant__ CompressThread args) {
  extern __shared__ float4 shared_memory[];
  constexpr int kThreads = 32 * Lanes;
  const int set = static_cast<int>(threadIdx.x) / kThreads, thread = static_cast<int>(threadIdx.x) % kThreads;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kSets<Lanes> + set) * 32;
  if (first >= args.x.view.size[1]) return;
  compress_positions<K, Lanes>(args, reinterpret_cast<float*>(shared_memory) + set * kSetFloats<K, Lanes>, thread, first);
}

// The most columns n − 1: registers do not hold 8. The most ranks: 4 lanes'.
constexpr int kThreadColumns = 7, kThreadRanks = 4 * kRanks;

template <int K, int Lanes>
void launch_thread(const Queue& queue, const CompressThread& args) {
  constexpr int kEach = kSets<Lanes>;
  const Grid grid{blocks(args.x.view.size[1], 32 * kEach), 32 * Lanes * kEach, sizeof(float) * kEach * kSetFloats<K, Lanes>};
  queue.launch(grid, compress_thread<K, Lanes>, args);
}

// n − 1 columns, in room for the next of 4, 6 and 7; for 7 where a position has several lanes.
inline void launch_thread(const Queue& queue, const CompressThread& args) {
  const int64_t k = args.n - 1, r = args.x.view.size[2];
  const auto launch = r > 2 * kRanks ? launch_thread<7, 4>
                      : r > kRanks   ? launch_thread<7, 2>
                      : k <= 4       ? launch_thread<4, 1>
                      : k <= 6       ? launch_thread<6, 1>
                                     : launch_thread<7, 1>;
  launch(queue, args);
}

}  // namespace rmm
