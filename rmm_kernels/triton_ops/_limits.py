"""What the Jacobi kernels take: decided without Triton, so that the public functions can ask."""

from __future__ import annotations

# Of one matrix: the shorter side, and the tile that holds it, both sides rounded up to a power of two.
LARGEST_K = 64
LARGEST_TILE = 16384


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`, 1 at least."""
    return 1 << max(size - 1, 0).bit_length()


def compress_tile(n: int, r: int) -> tuple[int, int]:
    """Lines and length of the tile that holds what n tasks' vectors of r ranks come down to.

    The compiler spreads one or two very long lines badly over the threads: those get four.
    """
    lines, length = power_of_two(min(r, n - 1)), power_of_two(max(r, n - 1))
    return max(lines, 4) if length > 512 else lines, length


def compress_fits(n: int, r: int, components: int) -> bool:
    """Whether the compress kernel takes n tasks' vectors of r ranks."""
    lines, length = compress_tile(n, r)
    return min(r, n - 1) <= LARGEST_K and max(lines * length, power_of_two(components) * power_of_two(r)) <= LARGEST_TILE


def truncated_svd_fits(m: int, k: int) -> bool:
    """Whether the truncated_svd kernel takes matrices of m by k."""
    return min(m, k) <= LARGEST_K and power_of_two(m) * power_of_two(k) <= LARGEST_TILE
