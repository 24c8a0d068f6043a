// From a matrix Y [r, columns] in shared memory to its leading left singular vectors, by a team: QR of Y or of Yᵀ, whichever is
// tall, one-sided Jacobi on R or Rᵀ, and the chosen columns made orthonormal and taken back through Q.
#pragma once

#include <algorithm>

#include "team.cuh"

namespace rmm {

// Sizes, and where a team keeps what, in floats from the start of its memory.
struct Directions {
  int r, columns, k, p;                   // k = min(r, columns); p vectors are wanted, up to r
  int rows;                               // of y as it is factored: r where Y is tall, else columns
  int y, y_stride, core, core_stride;     // [k][rows], [k slots][k]
  int u, u_stride;                        // [p][r], the result
  int tau, diagonal, norms, kept, order;  // [k] each; kept is 1 where σ is not negligible, else 0
  int room;                               // [max(k, what the kernel wants)]
  int end;
  bool tall;  // R is Y's; else Yᵀ's
  float deficient = kDeficient;
};

// Lanes that finish a vector together: there may be few vectors.
__host__ __device__ constexpr int finishing_group(int lanes) { return lanes / 4; }

inline Directions directions_at(int64_t start, int64_t r, int64_t columns, int64_t p, int64_t room, int64_t core_room = 0) {
  Directions d{};
  const int64_t k = r < columns ? r : columns, rows = r < columns ? columns : r;
  const int group = team_group(k);
  int64_t next = start;
  const auto take = [&next](int64_t count) {
    const int64_t at = next;
    next += count;
    return static_cast<int>(at < 0x7fffffff ? at : 0x7fffffff);
  };
  d.r = static_cast<int>(r), d.columns = static_cast<int>(columns), d.k = static_cast<int>(k), d.p = static_cast<int>(p);
  d.rows = static_cast<int>(rows);
  d.tall = r >= columns;
  d.y_stride = static_cast<int>(column_stride(rows, group)), d.core_stride = static_cast<int>(column_stride(k, group));
  d.u_stride = static_cast<int>(column_stride(r, finishing_group(team_lanes(k))));
  d.y = take(k * column_stride(rows, group));
  d.core = take(std::max(k * column_stride(k, group), core_room));
  d.u = take(p * column_stride(r, finishing_group(team_lanes(k))));
  d.tau = take(k), d.diagonal = take(k), d.norms = take(k), d.kept = take(k), d.order = take(k);
  d.room = take(k < room ? room : k);
  d.end = take(0);
  return d;
}

// Where Yᵀ has more rows than are kept: of its QR only R is there. Room for as much where the core goes, as long as there is
// none.
inline Directions triangle_at(int64_t r, int64_t p, int64_t core_room) {
  Directions d = directions_at(0, r, r, p, 0, core_room);
  d.tall = false;
  return d;
}

// What makes a position's values finite and of normal size, the same in all its lanes. `live` is false where all tasks are
// equal, or one is not finite: there all values count as 0.
struct Streamed {
  Scale scale;
  bool live, finite;

  // x − (high + low), scaled.
  __device__ __forceinline__ float centred(float x, float high, float low) const {
    return live ? (x * scale.up1 * scale.up2 - high) - low : 0.0f;
  }
};

// kept[c], c in falling order: whether a column's norm is not negligible, so not below the fraction `deficient` of the largest.
template <class T>
__device__ void keep(const T& team, int k, const float* norms, const int* order, float deficient, float* kept) {
  for (int c = team.lane; c < k; c += T::kGroup * T::kGroups) {
    const float norm = norms[order[c]], first = norms[order[0]];
    kept[c] = norm > deficient * deficient * first && norm > kTiny ? 1.0f : 0.0f;
  }
  team.sync();
}

// The first p of k orthogonal columns of `rows` entries, in falling order, as orthonormal columns u of r entries: 0 beyond
// `rows`, completed where one is negligible or there are fewer; unit vectors beyond `rows`. room: for `rows` values.
template <class T>
__device__ void choose(const T& team, const float* core, int core_stride, int rows, int k, const float* norms, const int* order,
                       const float* kept, int p, int r, float* u, int u_stride, float* room) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  const int live = p < rows ? p : rows;
  for (int c = 0; c < live; ++c) {
    float* const vector = u + c * u_stride;
    if (c < k && kept[c] > 0) {
      const float* const column = core + order[c] * core_stride;
      const float inverse = exact_rsqrt(norms[order[c]]);
      for (int i = team.lane; i < rows; i += kLanes) vector[i] = column[i] * inverse;
      team.sync();
      if (c > 0) orthonormalise(team, u, u_stride, rows, c, room);
    } else {
      complete(team, u, u_stride, rows, c, room);
    }
  }
  for (int index = team.lane; index < p * r; index += kLanes) {
    const int c = index / r, i = index % r;
    if (c >= live || i >= rows) u[c * u_stride + i] = c >= live && i == c ? 1.0f : 0.0f;
  }
  team.sync();
}

// R, above the diagonal in y and on it in `diagonal` (as householder leaves it), → u, or Qu where Y is tall; energy[c], c < k,
// falling with c, becomes ‖Yᵀu_c‖².
template <class T>
__device__ void directions_of_triangle(const T& team, const Directions& d, float* memory, float* energy, Dtype stored) {
  constexpr int kLanes = T::kGroup * T::kGroups;
  float *const y = memory + d.y, *const core = memory + d.core, *const u = memory + d.u, *const kept = memory + d.kept;
  float *const tau = memory + d.tau, *const diagonal = memory + d.diagonal, *const norms = memory + d.norms;
  int* const order = reinterpret_cast<int*>(memory + d.order);
  for (int index = team.lane; index < d.k * d.k; index += kLanes) {
    const int c = index / d.k, i = index % d.k, column = d.tall ? c : i, row = d.tall ? i : c;  // R[row, column]
    core[slot_of(d.k, c) * d.core_stride + i] = row < column    ? y[column * d.y_stride + row]
                                                : row == column ? diagonal[row]
                                                                : 0.0f;
  }
  team.sync();
  orthogonalise(team, core, d.k, d.core_stride, norms);
  sort(team, d.k, norms, order);
  keep(team, d.k, norms, order, d.deficient, kept);
  // The columns' own norms carry what all rotations rounded; so Yᵀu with u along a column, from R. A negligible column has
  // no direction of its own; its norm will do.
  for (int c = team.group; c < d.k; c += T::kGroups) {
    const float* const column = core + order[c] * d.core_stride;
    float square = 0;
    for (int i = team.in_group; i < d.k; i += T::kGroup) {
      float along = diagonal[i] * column[i];
      const float *of_r = d.tall ? y + i * d.y_stride : y + (i + 1) * d.y_stride + i, *of_u = d.tall ? column : column + i + 1;
      const int step = d.tall ? 1 : d.y_stride;
#pragma unroll 4
      for (int left = d.tall ? i : d.k - 1 - i; left > 0; --left) {  // (Rᵀu)_i, or (Ru)_i
        along = fmaf(*of_r, *of_u++, along);
        of_r += step;
      }
      square = fmaf(along, along, square);
    }
    square = team.group_sum(square);
    const float norm = norms[order[c]];
    if (team.in_group == 0) energy[c] = kept[c] > 0 ? square / norm : norm;
  }
  choose(team, core, d.core_stride, d.k, d.k, norms, order, kept, d.p, d.r, u, d.u_stride, memory + d.room);
  const Team<kLanes, finishing_group(kLanes)> finishing(team.thread);
  for (int c = finishing.group; c < d.p; c += finishing.kGroups) {
    finish_column(finishing, y, d.r, d.tall ? d.k : 0, d.y_stride, tau, u + c * d.u_stride, stored);
  }
  team.sync();
}

// y → u and energy. Leaves R and the Householder vectors in y.
template <class T>
__device__ void find_directions(const T& team, const Directions& d, float* memory, float* energy, Dtype stored) {
  householder(team, memory + d.y, d.rows, d.k, d.y_stride, memory + d.tau, memory + d.diagonal);
  directions_of_triangle(team, d, memory, energy, stored);
}

}  // namespace rmm
