// compress in registers (compress_thread.cuh): 32 positions on their way between memory and the lanes that share them, as many
// warps as a position has lanes, through shared memory, 16 bytes a thread.
#pragma once

#include "tile.cuh"

namespace rmm {

struct CompressThread {
  Plane x, basis;      // [n, S, r], [p+1, S, r]
  View coeff, energy;  // [n, p, S], [S, K]
  int n;
  float spread, share;  // 1 / (√n − 1), 1 / √n
};

constexpr int kRanks = 16;      // of a column in a lane's registers; what is beyond r is 0
constexpr int kRowStride = 20;  // a lane's part of the floats from one position's row of ranks to the next

// A lane's share of its position: of each 4 · Lanes ranks, four. Sums and the like over a position's lanes are the same in all
// of them.
template <int Lanes>
class Share {
 public:
  __device__ __forceinline__ explicit Share(int thread)
      : part_(thread % Lanes), mask_(((1u << Lanes) - 1) << (thread % 32 / Lanes * Lanes)) {}

  __device__ __forceinline__ int part() const { return Lanes == 1 ? 0 : part_; }
  __device__ __forceinline__ int rank(int t) const { return 4 * (t / 4 * Lanes + part()) + t % 4; }

  template <class T, class Join>
  __device__ __forceinline__ T joined(T value, const Join& join) const {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) value = join(value, __shfl_xor_sync(mask_, value, step));
    return value;
  }
  __device__ __forceinline__ float sum(float value) const {
    return joined(value, [](float a, float b) { return a + b; });
  }
  template <class T>
  __device__ __forceinline__ T most(T value) const {
    return joined(value, [](T a, T b) { return max(a, b); });
  }
  template <class T>
  __device__ __forceinline__ T least(T value) const {
    return joined(value, [](T a, T b) { return min(a, b); });
  }
  __device__ __forceinline__ float of(int part, float value) const {
    return Lanes == 1 ? value : __shfl_sync(mask_, value, part, Lanes);
  }
  __device__ __forceinline__ void sync() const {
    if constexpr (Lanes > 1) __syncwarp(mask_);
  }

 private:
  int part_;
  unsigned mask_;
};

// The threads that share 32 positions, in order.
template <int Lanes>
__device__ __forceinline__ void sync_positions() {
  if constexpr (Lanes == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Where 32 positions' values of a rank lie side by side, for a lane to read its own 4 bytes: not in order, so that what the
// lanes of one position read meets different banks.
template <int Lanes>
__device__ __forceinline__ int across(int position, int part) {
  return Lanes == 1 ? position : position ^ (32 / Lanes * part);
}

// Rows of ranks of 32 positions: values of one rank side by side if positions are so in memory, else a position's, 16-byte
// accesses then meeting all banks.
template <int Lanes>
struct Rows {
  static constexpr int kStride = Lanes * kRowStride;
  static constexpr int kFloats = 32 * kStride;

  float* memory;
  int position;
  bool flat;

  __device__ __forceinline__ float& at(const Share<Lanes>& share, int t) const {
    return memory[flat ? share.rank(t) * 32 + across<Lanes>(position, share.part()) : position * kStride + share.rank(t)];
  }
  __device__ __forceinline__ void put(const Share<Lanes>& share, int t, float a, float b, float c, float d) const {
    if (flat) {
      float* const to = &at(share, t);
      to[0] = a, to[32] = b, to[64] = c, to[96] = d;
    } else {
      store_shared(&at(share, t), a, b, c, d);
    }
  }
};

// Where x is kept while it is brought in, K + 1 tasks of its ranks, as rows are: a lane reads its own 4 bytes, or 16 bytes.
// Later a lane's own column of the same memory holds its rows of the directions that were found, [K][kRows], and their norms.
template <int K, int Lanes>
struct Tile {
  static constexpr int kThreads = 32 * Lanes;
  static constexpr int kAllRanks = kRanks * Lanes;
  static constexpr int kPositionStride = Lanes * ((K + 1) * kRanks + 4);
  static constexpr int kFloats = 32 * kPositionStride;
  static constexpr int kRows = Lanes == 1 ? K : 4;  // of the first K ranks, in each lane
  static constexpr int kEnergies = K * (kRows + 1) * kThreads;

  float* memory;
  int thread;
  Share<Lanes> share;
  bool flat;  // positions side by side

  __device__ __forceinline__ float4* at(int i, int t) const {
    return reinterpret_cast<float4*>(memory + thread / Lanes * kPositionStride + i * kAllRanks + share.rank(t));
  }
  __device__ __forceinline__ float* flat_at(int i, int t) const {
    return memory + (i * kAllRanks + share.rank(t)) * 32 + across<Lanes>(thread / Lanes, share.part());
  }
  // Entry t of the own rows of direction c; entry i of all of it.
  __device__ __forceinline__ float& direction(int c, int t) const { return memory[(c * kRows + t) * kThreads + thread]; }
  __device__ __forceinline__ float& any_direction(int c, int i) const {
    return memory[(c * kRows + i % kRows) * kThreads + thread / Lanes * Lanes + i / kRows];
  }
  __device__ __forceinline__ float& norm(int c) const { return memory[(K * kRows + c) * kThreads + thread]; }

  // x of the own position at the own ranks t … t + 3 of the first n tasks, 0 for the others.
  __device__ __forceinline__ void load(int n, int t, float (&x)[K + 1][4]) const {
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
        for (int e = 0; e < 4; ++e) x[i][e] = *flat_at(i, t + e);
      }
    } else {
#pragma unroll
      for (int i = 0; i <= K; ++i) {
        if (i >= n) break;
        const float4 four = *at(i, t);
        x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
      }
    }
  }

  template <class Change>
  __device__ void each(int n, int ranks, const Change& change) const {
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
#pragma unroll 1
      for (int t = 0; t < kRanks && share.rank(t) < ranks; ++t) {
        change(flat ? *flat_at(i, t) : *(reinterpret_cast<float*>(at(i, t / 4 * 4)) + t % 4));
      }
    }
  }
};

// Where a thread's part of positions whose values lie side by side is: 16 bytes, in the `step`-th turn. Eight lanes meet all
// banks; they bring as many neighbours of a position as it has lanes.
template <class T, int Lanes>
struct Part {
  static constexpr int kSteps = kRanks / kVector<T>;  // for 32 positions
  int position, rank;
  __device__ __forceinline__ Part(int thread, int step) {
    const int eight = step * 4 * Lanes + thread / 8;
    position = eight / kSteps * (8 / Lanes) + thread % 8 / Lanes;
    rank = (eight % kSteps * Lanes + thread % Lanes) * kVector<T>;
  }
};

// The same where positions are innermost: from `position` on at ranks `rank`, rank + kRows, …
template <class T, int Lanes>
struct FlatPart {
  static constexpr int kChunks = 32 / kVector<T>, kRows = 32 * Lanes / kChunks;
  int position, rank;
  __device__ __forceinline__ explicit FlatPart(int thread) : position(thread % kChunks * kVector<T>), rank(thread / kChunks) {}
  __device__ __forceinline__ int offset() const { return rank * 32 + across<Lanes>(position, rank / 4 % Lanes); }
};

// Whether a thread's second four of eight values go first, so that all eight lanes meet different banks.
template <int Lanes>
__device__ __forceinline__ bool second_first(bool flat, int thread) {
  return flat ? thread / 4 % 2 == 1 : Lanes > 1 && thread % 8 / Lanes % 2 == 1;
}

template <int N>
__device__ __forceinline__ void to_shared(float* to, const float (&values)[N], bool second) {
  if constexpr (N == 4) {
    store_shared(to, values[0], values[1], values[2], values[3]);
  } else {
    float half[4];
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      const bool upper = second != (turn == 1);
#pragma unroll
      for (int e = 0; e < 4; ++e) half[e] = upper ? values[e + 4] : values[e];
      store_shared(to + (upper ? 4 : 0), half[0], half[1], half[2], half[3]);
    }
  }
}

template <int N>
__device__ __forceinline__ void from_shared(const float* from, float (&values)[N], bool second) {
  float4 half[N / 4];
#pragma unroll
  for (int turn = 0; turn < N / 4; ++turn) {
    const bool upper = N > 4 && second != (turn == 1);
    half[turn] = *reinterpret_cast<const float4*>(from + (upper ? 4 : 0));
  }
#pragma unroll
  for (int turn = 0; turn < N / 4; ++turn) {
    const float4 four = N > 4 && second ? half[N / 4 - 1 - turn] : half[turn];
    values[4 * turn] = four.x, values[4 * turn + 1] = four.y, values[4 * turn + 2] = four.z, values[4 * turn + 3] = four.w;
  }
}

// x of up to 32 positions from `first` on; what is beyond them, and beyond r up to a multiple of 4, is 0.
template <class T, int K, int Lanes>
__device__ __forceinline__ void load_positions(const CompressThread& args, const Tile<K, Lanes>& tile, int64_t first,
                                               int positions) {
  constexpr int kWidth = kVector<T>, kAllRanks = Tile<K, Lanes>::kAllRanks;
  const View& view = args.x.view;
  const int r = static_cast<int>(view.size[2]), n = args.n, ranks = (r + 3) / 4 * 4;
  const T* const from = reinterpret_cast<const T*>(view.data) + first * view.stride[1];
  const bool second = second_first<Lanes>(args.x.positions_inside, tile.thread);
  const auto bring = [&](const T* at, float* to, int64_t step, int count) {
    float values[kWidth];
    if (args.x.aligned && count >= kWidth) {
      load_vector(at, values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) values[e] = e < count ? Storage<T>::widen(at[e * step]) : 0.0f;
    }
    to_shared(to, values, second);
  };
  if (args.x.positions_inside) {
    using Mine = FlatPart<T, Lanes>;
    const Mine part(tile.thread);
    const T* of_task = from + part.position * view.stride[1] + part.rank * view.stride[2];
    float* to = tile.memory + part.offset();
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < kAllRanks; j += Mine::kRows) {
        if (j + part.rank >= ranks) break;
        bring(of_task + j * view.stride[2], to + j * 32, view.stride[1], j + part.rank < r ? positions - part.position : 0);
      }
      of_task += view.stride[0];
      to += kAllRanks * 32;
    }
  } else {
#pragma unroll
    for (int step = 0; step < Part<T, Lanes>::kSteps; ++step) {
      const Part<T, Lanes> part(tile.thread, step);
      const int count = part.position < positions ? r - part.rank : 0;
      const T* of_task = from + part.position * view.stride[1] + part.rank * view.stride[2];
      float* to = tile.memory + part.position * Tile<K, Lanes>::kPositionStride + part.rank;
      if (part.rank >= ranks) continue;
#pragma unroll 4
      for (int i = 0; i < n; ++i) {
        bring(of_task, to, view.stride[2], count);
        of_task += view.stride[0];
        to += kAllRanks;
      }
    }
  }
}

// basis[c] of up to 32 positions, from rows.
template <class T, int Lanes>
__device__ __forceinline__ void store_rows(const CompressThread& args, const Rows<Lanes>& rows, int thread, int64_t first,
                                           int positions, int c) {
  constexpr int kWidth = kVector<T>;
  const View& view = args.basis.view;
  const int r = static_cast<int>(view.size[2]);
  T* const to = reinterpret_cast<T*>(view.data) + c * view.stride[0] + first * view.stride[1];
  const bool second = second_first<Lanes>(rows.flat, thread);
  const auto take = [&](const float* from, T* at, int64_t step, int count) {
    float values[kWidth];
    from_shared(from, values, second);
    if (args.basis.aligned && count >= kWidth) {
      store_vector(at, values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (e < count) at[e * step] = Storage<T>::narrow(values[e]);
      }
    }
  };
  sync_positions<Lanes>();
  if (rows.flat) {
    using Mine = FlatPart<T, Lanes>;
    const Mine part(thread);
#pragma unroll
    for (int j = 0; j < kRanks * Lanes; j += Mine::kRows) {
      if (part.position >= positions || j + part.rank >= r) break;
      take(rows.memory + part.offset() + j * 32, to + part.position * view.stride[1] + (j + part.rank) * view.stride[2],
           view.stride[1], positions - part.position);
    }
  } else {
#pragma unroll
    for (int step = 0; step < Part<T, Lanes>::kSteps; ++step) {
      const Part<T, Lanes> part(thread, step);
      if (part.position >= positions || part.rank >= r) continue;
      take(rows.memory + part.position * Rows<Lanes>::kStride + part.rank,
           to + part.position * view.stride[1] + part.rank * view.stride[2], view.stride[2], r - part.rank);
    }
  }
  sync_positions<Lanes>();
}

}  // namespace rmm
