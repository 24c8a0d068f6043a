// Transposition of workspaces (turn.cu), for kernels that see too few neighbours of an axis to move whole sectors along it.
#pragma once

#include "launch.h"

namespace rmm {

// to[b, i, j] = from[b, i, j] for all [B, rows, columns] of both; read along j, written along i, so that each should be what
// is innermost there. Dtypes may differ.
void turn(const Queue& queue, const View& from, const View& to);

// The view with its axes in the order that is given, and that with positions `first` … `first + count` − 1 of an axis.
inline View permuted(const View& of, int a, int b, int c) {
  return {of.data, of.dtype, {of.size[a], of.size[b], of.size[c]}, {of.stride[a], of.stride[b], of.stride[c]}};
}
inline View narrowed(View of, int axis, int64_t first, int64_t count) {
  of.data += first * of.stride[axis] * element_size(of.dtype);
  of.size[axis] = count;
  return of;
}

}  // namespace rmm
