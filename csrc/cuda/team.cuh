// A matrix per team of lanes, or of a block's threads, in shared memory and registers: Householder QR, one-sided Jacobi,
// orthonormal columns. As csrc/cpu/jacobi.h.
//
// Columns are `stride` floats apart, see column_stride. Every function is called by all lanes of a team together; what they
// pass on to each other lies in shared memory between two sync().
#pragma once

#include "jacobi.cuh"
#include "tile.cuh"

namespace rmm {

// Lanes of a warp for k columns, up to 64, and in a group of them, one group for each pair of columns.
__host__ __device__ constexpr int team_lanes(int64_t k) { return k <= 16 ? 8 : 32; }
__host__ __device__ constexpr int team_group(int64_t k) { return k > 16 && k <= 32 ? 2 : 1; }

// Floats from one column of `rows` to the next, so that a team's groups at different columns meet different banks: an odd
// multiple of their size.
inline int64_t column_stride(int64_t rows, int group) { return (((rows + group - 1) / group) | 1) * group; }

template <int Lanes, int Group>
struct Team {
  static constexpr int kGroup = Group;
  static constexpr int kGroups = Lanes / Group;

  const int thread, lane, group, in_group;
  const unsigned team_mask, group_mask;

  __device__ explicit Team(int thread)
      : thread(thread),
        lane(thread % Lanes),
        group(lane / Group),
        in_group(lane % Group),
        team_mask(mask(Lanes < 32 ? Lanes : 32, thread)),
        group_mask(mask(Group, thread)) {}

  __device__ static unsigned mask(int size, int thread) {
    return size == 32 ? 0xffffffffu : ((1u << size) - 1) << (thread % 32 / size * size);
  }

  __device__ void sync() const {
    if constexpr (Lanes > 32) {
      __syncthreads();
    } else {
      __syncwarp(team_mask);
    }
  }
  __device__ void sync_group() const {
    if constexpr (kGroup > 1) __syncwarp(group_mask);
  }
  __device__ bool any(bool mine) const {
    if constexpr (Lanes > 32) {
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

  // Over all lanes, of at most a warp; the same in all.
  __device__ float sum(float value) const {
    static_assert(Lanes <= 32);
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) value += __shfl_xor_sync(team_mask, value, step);
    return value;
  }

  // Over a team's groups, of at most a warp; the same in all.
  __device__ float sum_of_groups(float value) const {
    static_assert(Lanes <= 32);
#pragma unroll
    for (int step = kGroup; step < kGroup * kGroups; step *= 2) value += __shfl_xor_sync(team_mask, value, step);
    return value;
  }

  __device__ uint32_t largest(uint32_t value) const {
    static_assert(Lanes <= 32);
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) {
      const uint32_t other = __shfl_xor_sync(team_mask, value, step);
      value = value > other ? value : other;
    }
    return value;
  }

  // a · b over `from` ≤ i < rows, shared out in a group; the same in all its threads.
  __device__ float dot(const float* a, const float* b, int from, int rows) const {
    float even = 0, odd = 0;
    int left = rows - from - in_group;
    a += from + in_group;
    b += from + in_group;
#pragma unroll 2
    for (; left > kGroup; left -= 2 * kGroup, a += 2 * kGroup, b += 2 * kGroup) {
      even = fmaf(a[0], b[0], even);
      odd = fmaf(a[kGroup], b[kGroup], odd);
    }
    if (left > 0) even = fmaf(a[0], b[0], even);
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
#pragma unroll 4
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
#pragma unroll 4
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
// norms. The columns are in registers, two of up to Rows · kGroup entries in each group's, and so up to 2 · kGroups of them. Of
// the odd-even order the places stay and the columns move: neighbours trade places when they meet, in even rounds those of one
// group, in odd ones a group's right one and the next group's left one, which comes over for it. After a sweep the order is
// turned round, and so is, for the next one, who is to be the longer.
template <int Rows, class T>
__device__ __forceinline__ void jacobi(const T& team, float* core, int k, int stride, float* norms) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const int pairs = (k + 1) / 2, group = team.group;
  const bool idle = group >= pairs, last = group == pairs - 1;
  const int next = idle ? team.lane : (last ? 0 : group + 1) * T::kGroup + team.in_group;
  const int before = idle ? team.lane : (group == 0 ? pairs - 1 : group - 1) * T::kGroup + team.in_group;
  float a[Rows], b[Rows];
#pragma unroll
  for (int t = 0; t < Rows; ++t) {
    const int i = team.in_group + t * T::kGroup;
    a[t] = i < k && 2 * group < k ? core[2 * group * stride + i] : 0.0f;
    b[t] = i < k && 2 * group + 1 < k ? core[(2 * group + 1) * stride + i] : 0.0f;
  }
  const auto dot = [&](const float (&x)[Rows], const float (&y)[Rows]) {
    float even = 0, odd = 0;
#pragma unroll
    for (int t = 0; t < Rows; t += 2) {
      even = fmaf(x[t], y[t], even);
      odd = fmaf(x[t + 1], y[t + 1], odd);
    }
    return team.group_sum(even + odd);
  };
  float aa = dot(a, a), bb = dot(b, b);
  const float total = team.sum_of_groups(aa + bb), noise = kNoise * total * total;
  bool rising = false;  // the longer one of a pair goes right; else left
#pragma unroll 1
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    rising = !rising;
    float worst = 0;
#pragma unroll 1
    for (int round = 0; round < pairs; ++round) {
      {
        const Turn turn(rising ? aa : bb, rising ? bb : aa, dot(a, b));
        const float sine = rising ? turn.sine : -turn.sine, half = rising ? turn.half : -turn.half;
        worst = fmaxf(worst, turn.excess);
#pragma unroll
        for (int t = 0; t < Rows; ++t) {
          const float about = fmaf(half, b[t], a[t]);
          b[t] = fmaf(-sine, about, b[t]);
          a[t] = fmaf(half, b[t], about);
        }
        aa = rising ? turn.longer : turn.shorter;  // a is the right one now
        bb = rising ? turn.shorter : turn.longer;
      }
#pragma unroll
      for (int t = 0; t < Rows; ++t) b[t] = __shfl_sync(team.team_mask, b[t], next, kLanes);
      bb = __shfl_sync(team.team_mask, bb, next, kLanes);
      {
        // The last one has met the first one, which only passes through: they change places.
        const Turn turn(rising ? aa : bb, rising ? bb : aa, dot(a, b));
        const float cosine = last ? 0.0f : turn.cosine, sine = last ? 1.0f : rising ? turn.sine : -turn.sine;
        worst = fmaxf(worst, last ? 0.0f : turn.excess);
        const float a_before = aa;
        aa = last ? bb : rising ? turn.longer : turn.shorter;
        bb = last ? a_before : rising ? turn.shorter : turn.longer;
#pragma unroll
        for (int t = 0; t < Rows; ++t) {
          const float at = a[t];
          a[t] = fmaf(cosine, at, sine * b[t]);
          b[t] = fmaf(cosine, b[t], -sine * at);
        }
      }
#pragma unroll
      for (int t = 0; t < Rows; ++t) a[t] = __shfl_sync(team.team_mask, a[t], before, kLanes);
      aa = __shfl_sync(team.team_mask, aa, before, kLanes);
    }
    aa = dot(a, a);
    bb = dot(b, b);
    if (!team.any(worst > noise)) break;
  }
  // The longest first; where k is odd, a column of zeros is beyond.
  const int places = 2 * pairs, of_a = rising ? places - 1 - 2 * group : 2 * group, of_b = rising ? of_a - 1 : of_a + 1;
#pragma unroll
  for (int t = 0; t < Rows; ++t) {
    const int i = team.in_group + t * T::kGroup;
    if (i < k && !idle && of_a < k) core[of_a * stride + i] = a[t];
    if (i < k && !idle && of_b < k) core[of_b * stride + i] = b[t];
  }
  if (team.in_group == 0 && !idle && of_a < k) norms[of_a] = aa;
  if (team.in_group == 0 && !idle && of_b < k) norms[of_b] = bb;
  team.sync();
}

template <class T>
__device__ void orthogonalise(const T& team, float* core, int k, int stride, float* norms) {
  if constexpr (T::kGroups == 8) {
    k <= 8 ? jacobi<8>(team, core, k, stride, norms) : jacobi<16>(team, core, k, stride, norms);
  } else if constexpr (T::kGroups == 16) {
    k <= 24 ? jacobi<12>(team, core, k, stride, norms) : jacobi<16>(team, core, k, stride, norms);
  } else {
    k <= 40   ? jacobi<40>(team, core, k, stride, norms)
    : k <= 52 ? jacobi<52>(team, core, k, stride, norms)
              : jacobi<64>(team, core, k, stride, norms);
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

// Column `before` of `basis`, of norm 1 or 0, is made orthonormal to the ones before it; where nothing is left of it,
// completed. Columns come in falling order of what they were before they had norm 1, so that the large ones stay as they are.
template <class T>
__device__ void orthonormalise(const T& team, float* basis, int stride, int rows, int before, float* room) {
  float* const column = basis + before * stride;
  for (int pass = 0; pass < 2; ++pass) {
    subtract(team, basis, stride, rows, before, column, room);
    const float square = team.dot(column, column, 0, rows), inverse = exact_rsqrt(square);
    team.sync();
    if (!(square > 1e4f * kEpsilon * kEpsilon)) return complete(team, basis, stride, rows, before, room);
    for (int i = team.lane; i < rows; i += T::kGroup * T::kGroups) column[i] *= inverse;
    team.sync();
    if (square > 0.5f) return;  // what was taken out left no error worth a second time
  }
}

}  // namespace rmm
