// Transposition of workspaces (turn.cu), for kernels that see too few neighbours of an axis to move whole sectors along it.
#pragma once

#include "launch.h"

namespace rmm {

// to[b, i, j] = from[b, i, j] for all [B, rows, columns] of both; read along j, written along i, so that each should be what
// is innermost there. Dtypes may differ.
void turn(const Queue& queue, const View& from, const View& to);

}  // namespace rmm
