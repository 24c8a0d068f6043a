// compress, a position per thread: up to K columns, n − 1 of them, of up to 16 ranks, in registers; what is beyond is 0. A warp
// brings in and takes out its 32 positions through shared memory of its own, 16 bytes a thread.
#pragma once

#include "jacobi.cuh"
#include "launch.h"
#include "tile.cuh"

namespace rmm {

struct CompressThread {
  Plane x, basis;      // [n, S, r], [p+1, S, r]
  View coeff, energy;  // [n, p, S], [S, K]
  int n;
  float spread, share;  // 1 / (√n − 1), 1 / √n
};

constexpr int kRanks = 16;      // of a column in registers; what is beyond r is 0
constexpr int kRowStride = 20;  // floats from one position's row of ranks to the next: 16-byte accesses then meet all banks

// Where a warp keeps x while it brings it in, K + 1 tasks of kRanks ranks: positions side by side if they are so in memory, and
// a thread reads its own 4 bytes; else a position's values side by side, an odd number of 16-byte units apart, and a thread
// reads 16 bytes. Later a thread's own column of the same memory holds the directions that it found, [K][K].
template <int K>
struct WarpTile {
  static constexpr int kPositionStride = (K + 1) * kRanks + 4;
  static constexpr int kFloats = 32 * kPositionStride;

  float* memory;
  int lane;
  bool flat;  // positions side by side

  __device__ __forceinline__ float4* at(int i, int j) const {
    return reinterpret_cast<float4*>(memory + lane * kPositionStride + i * kRanks + j);
  }
  __device__ __forceinline__ float* flat_at(int i, int j) const { return memory + (i * kRanks + j) * 32 + lane; }
  __device__ __forceinline__ float& direction(int c, int i) const { return memory[(c * K + i) * 32 + lane]; }

  // x of the own position at ranks j … j + 3 of the first n tasks, 0 for the others.
  __device__ __forceinline__ void load(int n, int j, float (&x)[K + 1][4]) const {
#pragma unroll
    for (int i = 0; i <= K; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][e] = 0;
    }
    if (flat) {
#pragma unroll
      for (int i = 0; i <= K; ++i) {
        if (i >= n) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][e] = *flat_at(i, j + e);
      }
    } else {
#pragma unroll
      for (int i = 0; i <= K; ++i) {
        if (i >= n) break;
        const float4 four = *at(i, j);
        x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
      }
    }
  }

  template <class Change>
  __device__ void each(int n, int ranks, const Change& change) const {
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
#pragma unroll 1
      for (int j = 0; j < ranks; ++j) change(flat ? *flat_at(i, j) : reinterpret_cast<float*>(at(i, 0))[j]);
    }
  }
};

// Where a lane's part of eight positions side by side, which meet all banks, lies: 16 bytes, in a warp's `step`-th turn.
template <class T>
struct Part {
  static constexpr int kChunks = kRanks / kVector<T>;  // of a position
  static constexpr int kSteps = kChunks;               // that a warp takes for 32 positions
  int position, rank;
  __device__ __forceinline__ Part(int lane, int step) {
    const int part = step * 4 + lane / 8;
    position = part / kChunks * 8 + lane % 8;
    rank = part % kChunks * kVector<T>;
  }
};

// x of up to 32 positions from `first` on; what is beyond them, and beyond r up to a multiple of 4, is 0.
template <class T, int K>
__device__ __forceinline__ void load_warp(const CompressThread& args, const WarpTile<K>& tile, int64_t first, int positions) {
  constexpr int kWidth = kVector<T>;
  const View& view = args.x.view;
  const int r = static_cast<int>(view.size[2]), n = args.n, lane = tile.lane, ranks = (r + 3) / 4 * 4;
  const T* const from = reinterpret_cast<const T*>(view.data) + first * view.stride[1];
  const auto bring = [&](const T* at, float* to, int64_t step, int count) {
    float values[kWidth];
    if (args.x.aligned && count >= kWidth) {
      load_vector(at, values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) values[e] = e < count ? Storage<T>::widen(at[e * step]) : 0.0f;
    }
    if constexpr (kWidth == 4) {
      store_shared(to, values[0], values[1], values[2], values[3]);
    } else {  // some lanes their second half first: two rows side by side then meet all banks
      const bool second = args.x.positions_inside && lane / 4 % 2 == 1;
      float half[4];
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        const bool upper = second != (turn == 1);
#pragma unroll
        for (int e = 0; e < 4; ++e) half[e] = upper ? values[e + 4] : values[e];
        store_shared(to + (upper ? 4 : 0), half[0], half[1], half[2], half[3]);
      }
    }
  };
  if (args.x.positions_inside) {
    constexpr int kChunks = 32 / kWidth, kRows = kWidth;  // of a row of 32 positions; rows in a turn
    const int position = lane % kChunks * kWidth, row = lane / kChunks;
    const T* of_task = from + position * view.stride[1] + row * view.stride[2];
    float* to = tile.memory + row * 32 + position;
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < kRanks; j += kRows) {
        if (j + row >= ranks) break;
        bring(of_task + j * view.stride[2], to + j * 32, view.stride[1], j + row < r ? positions - position : 0);
      }
      of_task += view.stride[0];
      to += kRanks * 32;
    }
  } else {
#pragma unroll
    for (int step = 0; step < Part<T>::kSteps; ++step) {
      const Part<T> part(lane, step);
      const int count = part.position < positions ? r - part.rank : 0;
      const T* of_task = from + part.position * view.stride[1] + part.rank * view.stride[2];
      float* to = tile.memory + part.position * WarpTile<K>::kPositionStride + part.rank;
      if (part.rank >= ranks) continue;
#pragma unroll 4
      for (int i = 0; i < n; ++i) {
        bring(of_task, to, view.stride[2], count);
        of_task += view.stride[0];
        to += kRanks;
      }
    }
  }
}

// basis[c] of up to 32 positions, from rows [32][kRowStride] in shared memory.
template <class T>
__device__ __forceinline__ void store_rows(const CompressThread& args, const float* rows, int lane, int64_t first,
                                           int positions, int c) {
  constexpr int kWidth = kVector<T>;
  const View& view = args.basis.view;
  const int r = static_cast<int>(view.size[2]);
  T* const to = reinterpret_cast<T*>(view.data) + c * view.stride[0] + first * view.stride[1];
  if (args.basis.positions_inside) {
    if (lane >= positions) return;
    T* at = to + lane * view.stride[1];
#pragma unroll
    for (int j = 0; j < kRanks; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(rows + lane * kRowStride + j);
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (j + e >= r) return;
        *at = Storage<T>::narrow(values[e]);
        at += view.stride[2];
      }
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (int step = 0; step < Part<T>::kSteps; ++step) {
    const Part<T> part(lane, step);
    if (part.position >= positions || part.rank >= r) continue;
    float values[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(rows + part.position * kRowStride + part.rank + e);
      values[e] = four.x, values[e + 1] = four.y, values[e + 2] = four.z, values[e + 3] = four.w;
    }
    T* const at = to + part.position * view.stride[1] + part.rank * view.stride[2];
    if (args.basis.aligned && part.rank + kWidth <= r) {
      store_vector(at, values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (part.rank + e < r) at[e * view.stride[2]] = Storage<T>::narrow(values[e]);
      }
    }
  }
  __syncwarp();
}

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

// y = QR, as householder in team.cuh.
template <int K>
__device__ __forceinline__ void householder(float (&y)[K][kRanks], float (&tau)[K], float (&diagonal)[K]) {
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const float square = dot(y[j], y[j], j);
    const bool live = square > kTiny;
    const float safe = live ? square : 1.0f, norm = safe * exact_rsqrt(safe), first = y[j][j];
    tau[j] = live ? __fdividef(2.0f, safe + norm * (2.0f * fabsf(first) + norm)) : 0.0f;
    diagonal[j] = live ? copysignf(norm, -first) : first;
    y[j][j] = first + copysignf(norm, first);
#pragma unroll
    for (int c = j + 1; c < K; ++c) {
      const float step = tau[j] * dot(y[j], y[c], j);
#pragma unroll
      for (int i = j; i < kRanks; ++i) y[c][i] = fmaf(-step, y[j][i], y[c][i]);
    }
  }
}

// One-sided Jacobi: rotates the columns until they are orthogonal. norms: squared.
template <int K>
__device__ __forceinline__ void jacobi(float (&a)[K][K], float (&norms)[K]) {
  float total = 0;
#pragma unroll
  for (int c = 0; c < K; ++c) {
    norms[c] = dot(a[c], a[c]);
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
        const Turn turn(norms[p], norms[q], dot(a[p], a[q]));
        worst = fmaxf(worst, turn.excess);
        norms[p] = turn.longer;
        norms[q] = turn.shorter;
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const float about = fmaf(turn.half, a[q][i], a[p][i]);
          a[q][i] = fmaf(-turn.sine, about, a[q][i]);
          a[p][i] = fmaf(turn.half, a[q][i], about);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < K; ++c) norms[c] = dot(a[c], a[c]);
    if (worst <= noise) break;
  }
}

// Direction c, c > 0 before it being orthonormal, becomes what is left of the unit vector of the first k that sticks out most
// of them (twice Gram–Schmidt).
template <int K>
__device__ void complete(const WarpTile<K>& tile, int k, int c) {
  int best = 0;
  float most = -1;
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    float left = 1;
#pragma unroll 1
    for (int b = 0; b < c; ++b) left = fmaf(-tile.direction(b, i), tile.direction(b, i), left);
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
      for (int i = 0; i < K; ++i) before[i] = tile.direction(b, i);
      const float along = dot(before, column);
#pragma unroll
      for (int i = 0; i < K; ++i) column[i] = fmaf(-along, before[i], column[i]);
    }
    const float inverse = exact_rsqrt(dot(column, column));
#pragma unroll
    for (int i = 0; i < K; ++i) column[i] *= inverse;
  }
#pragma unroll
  for (int i = 0; i < K; ++i) tile.direction(c, i) = column[i];
}

// Whether the largest |y| leaves room on both sides for what is summed and squared on the way.
__device__ __forceinline__ bool within(uint32_t largest, int low, int high) {
  const int power = static_cast<int>(largest >> 23) - 127;
  return power >= low && power < high;
}

// y, the Helmert reduction of the own position's x, and its mean, to `row`; the largest |y| as its bits. As centre in
// compress.cu: the first task's vector goes first, then the mean, then what the mean rounded off.
template <int K>
__device__ __forceinline__ uint32_t centre(const CompressThread& args, const WarpTile<K>& tile, int ranks,
                                           float (&y)[K][kRanks], float* row) {
  const int n = args.n;
  const float share = 1.0f / static_cast<float>(n);
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kRanks; j += 4) {
    float mean[4] = {};
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[c][j + e] = 0;
    }
    if (j < ranks) {
      float x[K + 1][4];
      tile.load(n, j, x);
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
          y[i - 1][j + e] = i < n ? x[i][e] + lift : 0.0f;
          largest = max(largest, magnitude_bits(y[i - 1][j + e]));
        }
      }
    }
    store_shared(row + j, mean[0], mean[1], mean[2], mean[3]);
  }
  return largest;
}

// The largest |value| of u is to be positive, as stored, the lowest index on ties.
__device__ __forceinline__ bool points_down(const float (&u)[kRanks], float factor, Dtype stored) {
  float high = u[0], low = u[0];
#pragma unroll
  for (int j = 1; j < kRanks; ++j) {
    high = fmaxf(high, u[j]);
    low = fminf(low, u[j]);
  }
  high = as_stored(stored, high * factor);
  low = as_stored(stored, low * factor);
  bool down = -low > high;
  if (-low == high) {
    float peak = 0;
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      if (peak == 0 && fabsf(as_stored(stored, u[j] * factor)) == high) peak = u[j];
    }
    down = peak < 0;
  }
  return down;
}

template <int K>
__device__ __forceinline__ void compress_warp(const CompressThread& args, float* memory, int64_t first) {
  const int n = args.n, r = static_cast<int>(args.x.view.size[2]), p = static_cast<int>(args.coeff.size[1]);
  const int k = n - 1, lane = static_cast<int>(threadIdx.x % 32), ranks = (r + 3) / 4 * 4;
  const Dtype dtype = args.x.view.dtype;
  const int64_t left = args.x.view.size[1] - first;
  const int positions = left < 32 ? static_cast<int>(left) : 32;
  float* const row = memory + lane * kRowStride;
  const WarpTile<K> tile{memory + 32 * kRowStride, lane, args.x.positions_inside};
  with_dtype(dtype, [&](auto element) { load_warp<decltype(element)>(args, tile, first, positions); });
  __syncwarp();

  float y[K][kRanks];
  uint32_t largest;
  float down1 = 1, down2 = 1, spoil = 0;  // what was divided by, in two factors; NaN spoils all where an entry is not finite
  bool scaled = false;
#pragma unroll 1
  while (true) {
    largest = centre(args, tile, ranks, y, row);
    if (scaled || within(largest, -64, 64)) break;
    // Sums of so large values may overflow, differences of so small ones lose bits: once more, with x scaled.
    uint32_t largest_x = 0;
    tile.each(n, ranks, [&](float& value) { largest_x = max(largest_x, magnitude_bits(value)); });
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
    for (int j = 0; j < kRanks; ++j) row[j] = row[j] * down2 * down1 + spoil;
  }
  with_dtype(dtype, [&](auto element) { store_rows<decltype(element)>(args, memory, lane, first, positions, 0); });
  if (!within(largest, -2, 12)) {  // what tells the tasks apart may be much smaller than what they share
    const Scale centred = scale_of(largest);
    down1 *= centred.down2;
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) y[c][j] *= centred.up2;
    }
  }

  float tau[K], diagonal[K], core[K][K], norms[K];
  householder(y, tau, diagonal);
#pragma unroll
  for (int c = 0; c < K; ++c) {
#pragma unroll
    for (int i = 0; i < K; ++i) core[c][i] = i < c ? y[c][i] : i == c ? diagonal[c] : 0.0f;
  }
  jacobi(core, norms);

  // To shared memory, by falling norm. All lanes have read their x, which lay across.
  __syncwarp();
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
    for (int i = 0; i < K; ++i) tile.direction(place, i) = core[c][i] * inverse;
    tile.direction(K, place) = norms[c];
  }
#pragma unroll 1
  for (int c = live; c < p && c < k; ++c) complete(tile, k, c);

  float* const energies = tile.memory + (K + 1) * K * 32;
  float energy = 3e38f;
#pragma unroll 1
  for (int c = 0; c < p || c < k; ++c) {
    float w[K], along[K], square = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) w[i] = c < k ? tile.direction(c, i) : 0.0f;
#pragma unroll
    for (int i = 0; i < K; ++i) {  // (Rᵀw)_i = (Yᵀu)_i: the columns' own norms carry what all rotations rounded
      along[i] = diagonal[i] * w[i];
#pragma unroll
      for (int j = 0; j < i; ++j) along[i] = fmaf(y[i][j], w[j], along[i]);
      square = fmaf(along[i], along[i], square);
      sum += along[i];
    }
    if (c < k) {
      energy = fminf(energy, c < live ? square : tile.direction(K, c));  // equal ones may differ by a rounding
      energies[lane * (k | 1) + c] = energy * down1 * down2 * down1 * down2 + spoil;
    }
    if (c >= p) continue;

    float u[kRanks];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) u[j] = j < K ? w[j < K ? j : 0] : 0.0f;
    if (c >= k) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) u[j] = j == c ? 1.0f : 0.0f;
    }
    // Qu, and a Newton step towards norm 1.
#pragma unroll
    for (int j = K - 1; j >= 0; --j) {
      const float step = tau[j] * dot(y[j], u, j);
#pragma unroll
      for (int i = j; i < kRanks; ++i) u[i] = fmaf(-step, y[j][i], u[i]);
    }
    float factor = fmaf(-0.5f, dot(u, u), 1.5f);
    if (points_down(u, factor, dtype)) factor = -factor;
#pragma unroll
    for (int j = 0; j < kRanks; ++j) u[j] = fmaf(u[j], factor, spoil);  // + 0: no −0
#pragma unroll
    for (int j = 0; j < kRanks; j += 4) store_shared(row + j, u[j], u[j + 1], u[j + 2], u[j + 3]);
    with_dtype(dtype, [&](auto element) { store_rows<decltype(element)>(args, memory, lane, first, positions, c + 1); });

    // Σ y_i = √n x_0 and y_i = x_i + x_0 / (√n − 1).
    const float head = args.share * sum, lift = args.spread * head, down = c < live ? copysignf(down2, factor) : 0.0f;
    if (lane < positions) {
      with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        Element* at = reinterpret_cast<Element*>(args.coeff.data) + c * args.coeff.stride[1] + first + lane;
        *at = Storage<Element>::narrow(fmaf(head * down1, down, spoil));
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (i >= k) break;
          at += args.coeff.stride[0];
          *at = Storage<Element>::narrow(fmaf((along[i] - lift) * down1, down, spoil));
        }
      });
    }
  }

  __syncwarp();
  float* const to = reinterpret_cast<float*>(args.energy.data) + first * k;
  const float per_position = 1.0f / static_cast<float>(k);
  for (int index = lane; index < positions * k; index += 32) {
    const int position = quotient(index, per_position);
    to[index] = energies[position * (k | 1) + index - position * k];
  }
}

// Warps each take 32 positions.
constexpr int kWarps = 2;

template <int K>
constexpr int kWarpFloats = 32 * kRowStride + WarpTile<K>::kFloats;

template <int K>
__global__ void __launch_bounds__(32 * kWarps) compress_thread(const __grid_constant__ CompressThread args) {
  extern __shared__ float4 shared_memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * 32;
  if (first >= args.x.view.size[1]) return;
  compress_warp<K>(args, reinterpret_cast<float*>(shared_memory) + warp * kWarpFloats<K>, first);
}

// The most columns n − 1: registers do not hold 8.
constexpr int kThreadColumns = 7;

template <int K>
void launch_thread(const Queue& queue, const CompressThread& args) {
  const Grid grid{blocks(args.x.view.size[1], 32 * kWarps), 32 * kWarps, sizeof(float) * kWarps * kWarpFloats<K>};
  queue.launch(grid, compress_thread<K>, args);
}

// n − 1 columns, in room for the next of 4, 6 and 7.
inline void launch_thread(const Queue& queue, const CompressThread& args) {
  const int k = args.n - 1;
  const auto launch = k <= 4 ? launch_thread<4> : k <= 6 ? launch_thread<6> : launch_thread<7>;
  launch(queue, args);
}

}  // namespace rmm
