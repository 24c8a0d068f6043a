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
  float spread;  // 1 / (√n − 1)
};

constexpr int kRanks = 16;      // of a column in registers; what is beyond r is 0
constexpr int kRowStride = 20;  // floats from one position's row of ranks to the next: 16-byte accesses then meet all banks

// Where a warp keeps x, ranks filled up to a multiple of 4. Positions side by side if they are so in memory, and a thread reads
// its own 4 bytes; else a position's values side by side, an odd number of 16-byte units apart, and a thread reads 16 bytes.
struct WarpTile {
  float* memory;
  int lane, ranks, position_stride, value_stride;

  __device__ void load(int i, int j, float (&values)[4]) const {
    const float* const at = memory + lane * position_stride + (i * ranks + j) * value_stride;
    if (value_stride == 1) {
      const float4 four = *reinterpret_cast<const float4*>(at);
      values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) values[e] = at[e * 32];
    }
  }

  __device__ void store(int i, int j, const float (&values)[4]) const {
    float* const at = memory + lane * position_stride + (i * ranks + j) * value_stride;
    if (value_stride == 1) {
      store_shared(at, values[0], values[1], values[2], values[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) at[e * 32] = values[e];
    }
  }
};

// Floats of one position's x where ranks are innermost: a multiple of 4, an odd one.
__host__ __device__ constexpr int position_floats(int n, int ranks) { return n * ranks % 8 == 4 ? n * ranks : n * ranks + 4; }

// x of up to 32 positions from `first` on; what is beyond them, and beyond r, is 0.
template <class T>
__device__ __forceinline__ void load_warp(const CompressThread& args, const WarpTile& tile, int64_t first, int positions) {
  constexpr int kWidth = kVector<T>;
  const View& view = args.x.view;
  const int r = static_cast<int>(view.size[2]), lane = tile.lane, ranks = tile.ranks;
  const T* const from = reinterpret_cast<const T*>(view.data) + first * view.stride[1];
  if (args.x.positions_inside) {
    constexpr int kChunks = 32 / kWidth;
    for (int index = lane; index < args.n * ranks * kChunks; index += 32) {
      const int row = index / kChunks, position = index % kChunks * kWidth;
      const int i = quotient(row, 1.0f / static_cast<float>(ranks)), j = row - i * ranks;
      const T* const at = from + i * view.stride[0] + j * view.stride[2];
      float values[kWidth];
      if (args.x.aligned && position + kWidth <= positions && j < r) {
        load_vector(at + position, values);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          values[e] = position + e < positions && j < r ? Storage<T>::widen(at[(position + e) * view.stride[1]]) : 0.0f;
        }
      }
#pragma unroll
      for (int e = 0; e < kWidth; e += 4) {
        store_shared(tile.memory + row * 32 + position + e, values[e], values[e + 1], values[e + 2], values[e + 3]);
      }
    }
  } else {
    const int chunks = (ranks + kWidth - 1) / kWidth;
    const float per_chunk = 1.0f / static_cast<float>(chunks);
    for (int i = 0; i < args.n; ++i) {
      for (int index = lane; index < 32 * chunks; index += 32) {  // eight positions side by side, which meet all banks
        const int eight = index / 8, block = quotient(eight, per_chunk);
        const int position = block * 8 + index % 8, j = (eight - block * chunks) * kWidth;
        const T* const at = from + i * view.stride[0] + position * view.stride[1] + j * view.stride[2];
        float values[kWidth];
        if (args.x.aligned && position < positions && j + kWidth <= r) {
          load_vector(at, values);
        } else {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            values[e] = position < positions && j + e < r ? Storage<T>::widen(at[e * view.stride[2]]) : 0.0f;
          }
        }
#pragma unroll
        for (int e = 0; e < kWidth; e += 4) {
          if (j + e < ranks) {
            store_shared(tile.memory + position * tile.position_stride + i * ranks + j + e, values[e], values[e + 1],
                         values[e + 2], values[e + 3]);
          }
        }
      }
    }
  }
}

// basis[c] of up to 32 positions, a thread's own being `row`. rows: shared memory for 32 of them.
template <class T>
__device__ __forceinline__ void store_row(const CompressThread& args, float* rows, int lane, int64_t first, int positions,
                                          int c, const float (&row)[kRanks]) {
  constexpr int kWidth = kVector<T>;
  const View& view = args.basis.view;
  const int r = static_cast<int>(view.size[2]);
  T* const to = reinterpret_cast<T*>(view.data) + c * view.stride[0] + first * view.stride[1];
  if (args.basis.positions_inside) {
    if (lane < positions) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (j < r) to[lane * view.stride[1] + j * view.stride[2]] = Storage<T>::narrow(row[j]);
      }
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kRanks; j += 4) {
    store_shared(rows + lane * kRowStride + j, row[j], row[j + 1], row[j + 2], row[j + 3]);
  }
  __syncwarp();
  const int chunks = (r + kWidth - 1) / kWidth;
  const float per_chunk = 1.0f / static_cast<float>(chunks);
  for (int index = lane; index < 32 * chunks; index += 32) {
    const int eight = index / 8, block = quotient(eight, per_chunk);
    const int position = block * 8 + index % 8, j = (eight - block * chunks) * kWidth;
    if (position >= positions) continue;
    float values[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(rows + position * kRowStride + j + e);
      values[e] = four.x, values[e + 1] = four.y, values[e + 2] = four.z, values[e + 3] = four.w;
    }
    T* const at = to + position * view.stride[1] + j * view.stride[2];
    if (args.basis.aligned && j + kWidth <= r) {
      store_vector(at, values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (j + e < r) at[e * view.stride[2]] = Storage<T>::narrow(values[e]);
      }
    }
  }
}

template <int N>
__device__ __forceinline__ float dot(const float (&a)[N], const float (&b)[N], int from = 0) {
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < from) continue;
    if ((i - from) % 2 == 0) {
      even = fmaf(a[i], b[i], even);
    } else {
      odd = fmaf(a[i], b[i], odd);
    }
  }
  return even + odd;
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

template <int K>
__device__ __forceinline__ void jacobi(float (&a)[K][K], float (&norms)[K]) {
  float floor = 0;
  for (int sweep = 0;; ++sweep) {
    float total = 0;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      norms[c] = dot(a[c], a[c]);
      total += norms[c];
    }
    if (sweep == kMaxSweeps) break;
    if (sweep == 0) floor = negligible(total);
    bool swept = false;
#pragma unroll
    for (int round = 0; round < K; ++round) {
      float products[K / 2 + 1];
      bool needed[K / 2 + 1];
      bool some = false;
#pragma unroll
      for (int pair = 0; pair < meetings(K, round); ++pair) {
        const int p = column_of(K, meeting(K, round, pair).left), q = column_of(K, meeting(K, round, pair).right);
        products[pair] = dot(a[p], a[q]);
        needed[pair] = needs_turn(norms[p], norms[q], products[pair], floor);
        some = some || needed[pair];
      }
      if (!some) continue;
      swept = true;
#pragma unroll
      for (int pair = 0; pair < meetings(K, round); ++pair) {
        const int p = column_of(K, meeting(K, round, pair).left), q = column_of(K, meeting(K, round, pair).right);
        float pp = norms[p], qq = norms[q], cosine, sine;
        find_turn(pp, qq, products[pair], cosine, sine);
        cosine = needed[pair] ? cosine : 1.0f;
        sine = needed[pair] ? sine : 0.0f;
        norms[p] = needed[pair] ? pp : norms[p];
        norms[q] = needed[pair] ? qq : norms[q];
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const float pi = a[p][i], qi = a[q][i];
          a[p][i] = fmaf(cosine, pi, sine * qi);
          a[q][i] = fmaf(cosine, qi, -sine * pi);
        }
      }
    }
    if (!swept) break;
  }
  for (bool sorted = false; !sorted;) {  // mostly it is
    sorted = true;
#pragma unroll
    for (int c = 0; c + 1 < K; ++c) {
      if (norms[c + 1] > norms[c]) {
        sorted = false;
        const float upper = norms[c];
        norms[c] = norms[c + 1];
        norms[c + 1] = upper;
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const float left = a[c][i];
          a[c][i] = a[c + 1][i];
          a[c + 1][i] = left;
        }
      }
    }
  }
}

// Column c, c > 0 columns before it being orthonormal, becomes what is left of the unit vector that sticks out most of them.
template <int K>
__device__ __forceinline__ void complete(float (&a)[K][K], int k, int c) {
  int best = 0;
  float most = -1;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float left = 1;
#pragma unroll
    for (int b = 0; b < K; ++b) {
      if (b < c) left = fmaf(-a[b][i], a[b][i], left);
    }
    if (i < k && left > most + 1e-3f) {  // by a margin, so that rounding does not decide
      most = left;
      best = i;
    }
  }
#pragma unroll
  for (int i = 0; i < K; ++i) a[c][i] = i == best ? 1.0f : 0.0f;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int b = 0; b < K; ++b) {
      if (b < c) {
        const float along = dot(a[b], a[c]);
#pragma unroll
        for (int i = 0; i < K; ++i) a[c][i] = fmaf(-along, a[b][i], a[c][i]);
      }
    }
    const float inverse = exact_rsqrt(dot(a[c], a[c]));
#pragma unroll
    for (int i = 0; i < K; ++i) a[c][i] *= inverse;
  }
}

template <int K>
__device__ __forceinline__ void compress_warp(const CompressThread& args, float* memory, int64_t first) {
  const int n = args.n, r = static_cast<int>(args.x.view.size[2]), p = static_cast<int>(args.coeff.size[1]);
  const int k = n - 1, lane = static_cast<int>(threadIdx.x % 32), ranks = (r + 3) / 4 * 4;
  const Dtype dtype = args.x.view.dtype;
  const int64_t left = args.x.view.size[1] - first;
  const int positions = left < 32 ? static_cast<int>(left) : 32;
  const bool flat = args.x.positions_inside;
  const WarpTile tile{memory + 32 * kRowStride, lane, ranks, flat ? 1 : position_floats(n, ranks), flat ? 32 : 1};
  with_dtype(dtype, [&](auto element) { load_warp<decltype(element)>(args, tile, first, positions); });
  __syncwarp();

  uint32_t largest = 0;
#pragma unroll 2
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < ranks; j += 4) {
      float values[4];
      tile.load(i, j, values);
#pragma unroll
      for (int e = 0; e < 4; ++e) largest = max(largest, magnitude_bits(values[e]));
    }
  }
  const bool finite = is_finite(largest);
  const float spoil = finite ? 0.0f : __int_as_float(0x7fffffff);  // NaN in what is not finite spoils all of it
  const Scale scale = scale_of(finite ? largest : 0);

  // As centre in compress.cu: first task, mean, and what the mean rounded off.
  float y[K][kRanks], mean[kRanks];
  const float share = 1.0f / static_cast<float>(n);
  largest = 0;
#pragma unroll
  for (int j = 0; j < kRanks; j += 4) {
    float x[K + 1][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) mean[j + e] = 0;
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[c][j + e] = 0;
    }
    if (j >= ranks) continue;
#pragma unroll
    for (int i = 0; i <= K; ++i) {
      if (i < n && finite) {
        tile.load(i, j, x[i]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][e] = 0;
      }
    }
    if (scale.up1 != 1.0f) {
#pragma unroll
      for (int i = 0; i <= K; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][e] *= scale.up1;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float offset = x[0][e] * scale.up2;
      float sum = 0;
#pragma unroll
      for (int i = 1; i <= K; ++i) {
        x[i][e] = i < n ? fmaf(x[i][e], scale.up2, -offset) : 0.0f;  // the product is exact
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
      mean[j + e] = (offset + (about + rest)) * scale.down2 * scale.down1 + spoil;
      x[0][e] = -about - rest;
#pragma unroll
      for (int i = 1; i <= K; ++i) {
        x[i][e] -= rest;
        y[i - 1][j + e] = i < n ? fmaf(args.spread, x[0][e], x[i][e]) : 0.0f;
        largest = max(largest, magnitude_bits(y[i - 1][j + e]));
      }
    }
#pragma unroll
    for (int i = 0; i <= K; ++i) {
      if (i < n) tile.store(i, j, x[i]);
    }
  }
  with_dtype(dtype, [&](auto element) { store_row<decltype(element)>(args, memory, lane, first, positions, 0, mean); });
  const Scale centred = scale_of(largest);
#pragma unroll
  for (int c = 0; c < K; ++c) {
#pragma unroll
    for (int j = 0; j < kRanks; ++j) y[c][j] *= centred.up2;
  }
  if (centred.up1 != 1.0f) {
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) y[c][j] *= centred.up1;
    }
  }

  float tau[K], diagonal[K], core[K][K], norms[K], energy[K];
  householder(y, tau, diagonal);
#pragma unroll
  for (int c = 0; c < K; ++c) {
#pragma unroll
    for (int i = 0; i < K; ++i) core[c][i] = i < c ? y[c][i] : i == c ? diagonal[c] : 0.0f;
  }
  jacobi(core, norms);
  // energy[c] = ‖Yᵀu‖² with u along the core's column c; the columns' own norms carry what all rotations rounded.
#pragma unroll
  for (int c = 0; c < K; ++c) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      float along = diagonal[i] * core[c][i];
#pragma unroll
      for (int j = 0; j < i; ++j) along = fmaf(y[i][j], core[c][j], along);  // (Rᵀu)_i
      square = fmaf(along, along, square);
    }
    const bool live = norms[c] > kDeficient * kDeficient * norms[0] && norms[c] > kTiny;
    energy[c] = (live ? square / norms[c] : norms[c]) * centred.down2 * centred.down2 * centred.down1 * centred.down1;
  }

  uint32_t kept = 0;  // bit c: σ_c is not negligible
#pragma unroll
  for (int c = 0; c < K; ++c) {
    if (c >= p || c >= k) break;
    if (norms[c] > kDeficient * kDeficient * norms[0] && norms[c] > kTiny) {
      kept |= 1u << c;
      const float inverse = exact_rsqrt(norms[c]);
#pragma unroll
      for (int i = 0; i < K; ++i) core[c][i] *= inverse;
#pragma unroll
      for (int b = 0; b < c; ++b) {
        const float along = dot(core[b], core[c]);
#pragma unroll
        for (int i = 0; i < K; ++i) core[c][i] = fmaf(-along, core[b][i], core[c][i]);
      }
    } else {
      complete(core, k, c);
    }
  }

#pragma unroll 1
  for (int c = 0; c < p; ++c) {
    float u[kRanks];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) u[j] = j == c ? 1.0f : 0.0f;
#pragma unroll
    for (int b = 0; b < K; ++b) {
      if (b == c && b < k) {
#pragma unroll
        for (int j = 0; j < K; ++j) u[j] = core[b][j];
      }
    }
    // Q u, a Newton step towards norm 1, and the sign: the largest |component| as stored is positive, the lowest index on ties.
#pragma unroll
    for (int j = K - 1; j >= 0; --j) {
      const float step = tau[j] * dot(y[j], u, j);
#pragma unroll
      for (int i = j; i < kRanks; ++i) u[i] = fmaf(-step, y[j][i], u[i]);
    }
    float factor = fmaf(-0.5f, dot(u, u), 1.5f), peak = 0;
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      const float value = as_stored(dtype, u[j] * factor);
      peak = fabsf(value) > fabsf(peak) ? value : peak;
    }
    if (peak < 0) factor = -factor;
#pragma unroll
    for (int j = 0; j < kRanks; ++j) u[j] = u[j] * factor + 0.0f;  // + 0: no −0

    float square = 0;
    const bool live = kept >> c & 1;
    int64_t at = c * args.coeff.stride[1] + first + lane;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < kRanks; j += 4) {
        if (j < ranks) {
          float values[4];
          tile.load(i, j, values);
          even = fmaf(values[2], u[j + 2], fmaf(values[0], u[j], even));
          odd = fmaf(values[3], u[j + 3], fmaf(values[1], u[j + 1], odd));
        }
      }
      const float along = live ? even + odd : 0.0f;
      square = fmaf(along, along, square);
      if (lane < positions) store_as(dtype, args.coeff.data, at, along * scale.down2 * scale.down1 + spoil);
      at += args.coeff.stride[0];
    }
#pragma unroll
    for (int b = 0; b < K; ++b) energy[b] = b == c && live ? square : energy[b];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) u[j] += spoil;
    with_dtype(dtype, [&](auto element) { store_row<decltype(element)>(args, memory, lane, first, positions, c + 1, u); });
  }

  __syncwarp();
#pragma unroll
  for (int c = 0; c < K; ++c) {
    if (c > 0) energy[c] = fminf(energy[c], energy[c - 1]);  // equal ones may differ by a rounding
    if (c < k) memory[lane * k + c] = energy[c] * scale.down2 * scale.down2 * scale.down1 * scale.down1 + spoil;
  }
  __syncwarp();
  float* const energies = reinterpret_cast<float*>(args.energy.data) + first * k;
  for (int index = lane; index < positions * k; index += 32) energies[index] = memory[index];
}

// Warps each take 32 positions.
constexpr int kWarps = 2;

template <int K>
__global__ void __launch_bounds__(32 * kWarps) compress_thread(const __grid_constant__ CompressThread args) {
  extern __shared__ float4 shared_memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * 32;
  if (first >= args.x.view.size[1]) return;
  const int ranks = (static_cast<int>(args.x.view.size[2]) + 3) / 4 * 4;
  const int floats = 32 * (kRowStride + position_floats(args.n, ranks));
  compress_warp<K>(args, reinterpret_cast<float*>(shared_memory) + warp * floats, first);
}

// The most columns n − 1: registers do not hold 8.
constexpr int kThreadColumns = 7;

// n − 1 columns, in room for the next of 4, 6 and 7.
inline void launch_thread(const Queue& queue, const CompressThread& args) {
  const int ranks = (static_cast<int>(args.x.view.size[2]) + 3) / 4 * 4, k = args.n - 1;
  const Grid grid{blocks(args.x.view.size[1], 32 * kWarps), 32 * kWarps,
                  sizeof(float) * kWarps * 32 * (kRowStride + position_floats(args.n, ranks))};
  const auto kernel = k <= 4 ? compress_thread<4> : k <= 6 ? compress_thread<6> : compress_thread<7>;
  queue.launch(grid, kernel, args);
}

}  // namespace rmm
