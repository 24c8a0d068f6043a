// A matrix per team of threads, in shared memory: Householder QR, one-sided Jacobi, orthonormal columns. As csrc/cpu/jacobi.h.
//
// Columns are `stride` floats apart, an odd number, so that threads at different columns meet different banks. Every function
// is called by all threads of a team together; what they pass on to each other lies in shared memory between two sync().
#pragma once

#include "jacobi.cuh"
#include "tile.cuh"

namespace rmm {

// Lanes: 8 for up to 16 columns, 32 for up to 32, 256 (a block) for up to 64. Half as many groups as columns, one per pair.
template <int Lanes>
struct Team {
  static constexpr int kGroup = Lanes == 8 ? 1 : Lanes == 32 ? 2 : 8;
  static constexpr int kGroups = Lanes / kGroup;
  static constexpr bool kBlock = Lanes > 32;

  const int lane, group, in_group;
  const unsigned team_mask, group_mask;
  float* const scratch;  // of the block, for sums over it: 8 floats

  __device__ explicit Team(int thread, float* scratch)
      : lane(thread % Lanes),
        group(lane / kGroup),
        in_group(lane % kGroup),
        team_mask(kBlock ? 0xffffffffu : mask(Lanes < 32 ? Lanes : 32, thread)),
        group_mask(mask(kGroup, thread)),
        scratch(scratch) {}

  __device__ static unsigned mask(int size, int thread) {
    return size == 32 ? 0xffffffffu : ((1u << size) - 1) << (thread % 32 / size * size);
  }

  __device__ void sync() const {
    if constexpr (kBlock) {
      __syncthreads();
    } else {
      __syncwarp(team_mask);
    }
  }

  __device__ void sync_group() const {
    if constexpr (kGroup > 1) __syncwarp(group_mask);
  }

  __device__ bool any(bool mine) const {
    if constexpr (kBlock) {
      return __syncthreads_or(mine);
    } else {
      return __any_sync(team_mask, mine);
    }
  }

  __device__ float group_sum(float value) const {
#pragma unroll
    for (int step = 1; step < kGroup; step *= 2) value += __shfl_xor_sync(group_mask, value, step);
    return value;
  }

  __device__ uint32_t largest(uint32_t value) const {
#pragma unroll
    for (int step = 1; step < (Lanes < 32 ? Lanes : 32); step *= 2) {
      const uint32_t other = __shfl_xor_sync(team_mask, value, step);
      value = value > other ? value : other;
    }
    if constexpr (kBlock) {
      if (lane % 32 == 0) scratch[lane / 32] = __uint_as_float(value);
      __syncthreads();
      for (int warp = 0; warp < Lanes / 32; ++warp) {
        const uint32_t other = __float_as_uint(scratch[warp]);
        value = value > other ? value : other;
      }
      __syncthreads();
    }
    return value;
  }

  // a · b over `from` ≤ i < rows, shared out in a group; the same in all its threads.
  __device__ float dot(const float* a, const float* b, int from, int rows) const {
    float even = 0, odd = 0;
    int i = from + in_group;
    for (; i + kGroup < rows; i += 2 * kGroup) {
      even = fmaf(a[i], b[i], even);
      odd = fmaf(a[i + kGroup], b[i + kGroup], odd);
    }
    if (i < rows) even = fmaf(a[i], b[i], even);
    return group_sum(even + odd);
  }
};

// A = QR in place, [rows, k], rows ≥ k. Column j then holds R above its diagonal and the Householder vector from it on; R's
// diagonal goes to diagonal[j]; H_j = I − tau[j] v_j v_jᵀ. A column without norm gives H_j = I.
template <class T>
__device__ void householder(const T& team, float* a, int rows, int k, int stride, float* tau, float* diagonal) {
  for (int j = 0; j < k; ++j) {
    float* const v = a + j * stride;
    const float square = team.dot(v, v, j, rows);
    const bool live = square > kTiny;
    const float safe = live ? square : 1.0f, norm = safe * exact_rsqrt(safe), first = v[j];
    const float turn = live ? 2.0f / (safe + norm * (2.0f * fabsf(first) + norm)) : 0.0f;  // 2 / vᵀv
    const float head = first + copysignf(norm, first);
    for (int c = j + 1 + team.group; c < k; c += T::kGroups) {
      float* const column = a + c * stride;
      const float top = column[j];
      const float step = turn * fmaf(head, top, team.dot(v, column, j + 1, rows));
      for (int i = j + 1 + team.in_group; i < rows; i += T::kGroup) column[i] = fmaf(-step, v[i], column[i]);
      team.sync_group();  // all have read column[j]
      if (team.in_group == 0) column[j] = fmaf(-step, head, top);
    }
    team.sync();
    if (team.lane == 0) {
      v[j] = head;
      tau[j] = turn;
      diagonal[j] = live ? copysignf(norm, -first) : first;
    }
  }
  team.sync();
}

// column ← Q column, by the group that calls; of norm 1 then but for rounding, which a Newton step takes out. Then its sign:
// the entry of largest magnitude is positive, the lowest index on ties, as it will be stored.
template <class T>
__device__ void finish_column(const T& team, const float* a, int rows, int k, int stride, const float* tau, float* column,
                              Dtype stored) {
  for (int j = k - 1; j >= 0; --j) {
    const float* const v = a + j * stride;
    const float step = tau[j] * team.dot(v, column, j, rows);
    for (int i = j + team.in_group; i < rows; i += T::kGroup) column[i] = fmaf(-step, v[i], column[i]);
    team.sync_group();
  }
  float factor = fmaf(-0.5f, team.dot(column, column, 0, rows), 1.5f);
  float peak = 0;
  int where = 0x7fffffff;
  for (int i = team.in_group; i < rows; i += T::kGroup) {
    const float value = as_stored(stored, column[i] * factor);
    if (fabsf(value) > fabsf(peak)) {
      peak = value;
      where = i;
    }
  }
#pragma unroll
  for (int step = 1; step < T::kGroup; step *= 2) {
    const float other = __shfl_xor_sync(team.group_mask, peak, step);
    const int there = __shfl_xor_sync(team.group_mask, where, step);
    if (fabsf(other) > fabsf(peak) || (fabsf(other) == fabsf(peak) && there < where)) {
      peak = other;
      where = there;
    }
  }
  if (peak < 0) factor = -factor;
  for (int i = team.in_group; i < rows; i += T::kGroup) column[i] = column[i] * factor + 0.0f;  // + 0: no −0
  team.sync_group();
}

// One-sided Jacobi: rotates the k columns, in slots (jacobi.cuh), until they are orthogonal; norms[slot] are their squared
// norms.
template <class T>
__device__ void jacobi(const T& team, float* a, int k, int stride, float* norms) {
  float floor = 0;
  for (int sweep = 0;; ++sweep) {
    for (int c = team.group; c < k; c += T::kGroups) {
      const float square = team.dot(a + c * stride, a + c * stride, 0, k);
      if (team.in_group == 0) norms[c] = square;
    }
    team.sync();
    if (sweep == kMaxSweeps) break;
    if (sweep == 0) {
      float total = 0;
      for (int c = 0; c < k; ++c) total += norms[c];
      floor = negligible(total);
      team.sync();
    }
    bool swept = false;
    for (int round = 0; round < k; ++round) {
      for (int pair = team.group; pair < meetings(k, round); pair += T::kGroups) {
        const Slots at = meeting(k, round, pair);
        float *const p = a + at.left * stride, *const q = a + at.right * stride;
        const float pq = team.dot(p, q, 0, k);
        float pp = norms[at.left], qq = norms[at.right];
        team.sync_group();
        if (needs_turn(pp, qq, pq, floor)) {
          swept = true;
          float cosine, sine;
          find_turn(pp, qq, pq, cosine, sine);
          for (int i = team.in_group; i < k; i += T::kGroup) {
            const float pi = p[i], qi = q[i];
            p[i] = fmaf(cosine, pi, sine * qi);
            q[i] = fmaf(cosine, qi, -sine * pi);
          }
          if (team.in_group == 0) {
            norms[at.left] = pp;
            norms[at.right] = qq;
          }
        }
      }
      team.sync();
    }
    if (!team.any(swept)) break;
  }
}

// order[rank] = slot, by falling norm, the lower column first on ties.
template <class T>
__device__ void sort(const T& team, int k, const float* norms, int* order) {
  for (int c = team.lane; c < k; c += T::kGroup * T::kGroups) {
    const float mine = norms[c];
    int rank = 0;
    for (int b = 0; b < k; ++b) {
      const float other = norms[b];
      rank += other > mine || (other == mine && column_of(k, b) < column_of(k, c)) ? 1 : 0;
    }
    order[rank] = c;
  }
  team.sync();
}

// Takes out of `column` what it has of the `before` orthonormal columns in `basis`; along: room for `before` values.
template <class T>
__device__ void subtract(const T& team, const float* basis, int stride, int rows, int before, float* column, float* along) {
  for (int b = team.group; b < before; b += T::kGroups) {
    const float value = team.dot(basis + b * stride, column, 0, rows);
    if (team.in_group == 0) along[b] = value;
  }
  team.sync();
  for (int i = team.lane; i < rows; i += T::kGroup * T::kGroups) {
    float value = column[i];
    for (int b = 0; b < before; ++b) value = fmaf(-along[b], basis[b * stride + i], value);
    column[i] = value;
  }
  team.sync();
}

// Scales a column that has a norm to norm 1.
template <class T>
__device__ void normalise(const T& team, float* column, int rows) {
  const float inverse = exact_rsqrt(team.dot(column, column, 0, rows));
  team.sync();
  for (int i = team.lane; i < rows; i += T::kGroup * T::kGroups) column[i] *= inverse;
  team.sync();
}

// Column `before` of `basis` becomes what is left of the unit vector that sticks out most of the columns before it, those being
// orthonormal (twice Gram–Schmidt). room: for `rows` values.
template <class T>
__device__ void complete(const T& team, float* basis, int stride, int rows, int before, float* room) {
  float* const column = basis + before * stride;
  for (int i = team.lane; i < rows; i += T::kGroup * T::kGroups) {
    float left = 1;
    for (int b = 0; b < before; ++b) left = fmaf(-basis[b * stride + i], basis[b * stride + i], left);
    room[i] = left;
  }
  team.sync();
  int best = 0;
  float most = -1;
  for (int i = 0; i < rows; ++i) {
    if (room[i] > most + 1e-3f) {  // by a margin, so that rounding does not decide
      most = room[i];
      best = i;
    }
  }
  team.sync();
  for (int i = team.lane; i < rows; i += T::kGroup * T::kGroups) column[i] = i == best ? 1.0f : 0.0f;
  team.sync();
  for (int pass = 0; pass < 2; ++pass) {
    subtract(team, basis, stride, rows, before, column, room);
    normalise(team, column, rows);
  }
}

}  // namespace rmm
