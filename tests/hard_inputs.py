"""Inputs that a batched tiny SVD gets wrong easily, and an fp64 oracle that says how well it did.

A batch is X [S, r, n] in fp64, one matrix of n task vectors per position, before it is rounded to the dtype under test.
Every case takes (S, r, n, p) and a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from ops import norm
from torch import Tensor


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthonormal(batch: int, rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(_randn(batch, rows, columns, seed=seed)).Q


def with_spectrum(sigma: Tensor, positions: int, r: int, n: int, seed: int) -> Tensor:
    """X whose centred part has the singular values sigma [K], K = min(r, n − 1), around a random mean of the same size."""
    k = min(r, n - 1)
    ones = torch.ones(n, 1, dtype=torch.float64)
    helmert = torch.linalg.qr(torch.cat([ones, torch.eye(n, n - 1, dtype=torch.float64)], 1)).Q[:, 1:]  # [n, n−1], ⊥ 1
    right = helmert @ _orthonormal(positions, n - 1, k, seed + 1)
    centred = (_orthonormal(positions, r, k, seed) * sigma[:k]) @ right.mT
    return centred + 0.1 * _randn(positions, r, 1, seed=seed + 2)


def _geometric(ratio: float) -> Callable[[int, int], Tensor]:
    return lambda k, p: ratio ** -torch.linspace(0, 1, max(k, 1), dtype=torch.float64)


def _dominant(k: int, p: int) -> Tensor:
    sigma = 1e-4 * torch.linspace(1, 0.5, max(k, 1), dtype=torch.float64)
    sigma[0] = 1
    return sigma


def _clusters(k: int, p: int) -> Tensor:
    """Groups of three, the groups apart by a factor of 3, the values within one by 1e-6."""
    index = torch.arange(max(k, 1), dtype=torch.float64)
    return 3 ** -torch.floor(index / 3).clamp(max=8) * (1 - 1e-6 * (index % 3))


def _tie_at_p(k: int, p: int) -> Tensor:
    sigma = torch.linspace(1, 0.1, max(k, 1), dtype=torch.float64)
    if 0 < p < k:
        sigma[p] = sigma[p - 1]
    return sigma


def _first(count: Callable[[int], int]) -> Callable[[int, int], Tensor]:
    return lambda k, p: (torch.arange(max(k, 1)) < count(p)).double() * torch.linspace(1, 0.2, max(k, 1)).double()


SPECTRA: dict[str, Callable[[int, int], Tensor]] = {
    "geometric_1e3": _geometric(1e3),
    "geometric_1e6": _geometric(1e6),
    "dominant": _dominant,
    "clusters": _clusters,
    "tie_at_p": _tie_at_p,
    "orthogonal": lambda k, p: torch.ones(max(k, 1), dtype=torch.float64),
    "rank_1": _first(lambda p: 1),
    "rank_p-1": _first(lambda p: p - 1),
}


def _duplicate(x: Tensor) -> Tensor:
    """Each task's vector twice."""
    return x[..., torch.arange(x.shape[-1]) // 2]


def _opposite(x: Tensor) -> Tensor:
    """Each task's vector followed by its negative; the mean is zero, or small."""
    n = x.shape[-1]
    return x[..., torch.arange(n) // 2] * (-1.0) ** torch.arange(n)


def _zero_columns(x: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[-1]) % 3 == 0)


def _zero_rows(x: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[-2]) % 2 == 0)[:, None]


def _graded(size: int) -> Tensor:
    return 1e-6 ** torch.linspace(0, 1, max(size, 2), dtype=torch.float64)[:size]


def _one_ulp(x: Tensor) -> Tensor:
    """All tasks equal but for a step of fp32's last place in a few entries."""
    return x[..., :1].float().double() * (1 + 2.0**-22 * (x > 1))


SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda x: x,
    "zero": torch.zeros_like,
    "equal": lambda x: x[..., :1].expand_as(x).clone(),
    "duplicate": _duplicate,
    "opposite": _opposite,
    "zero_columns": _zero_columns,
    "zero_rows": _zero_rows,
    "one_task": lambda x: x * (torch.arange(x.shape[-1]) == x.shape[-1] - 1),
    "integers": lambda x: x.round(),
    "signs": torch.sign,
    "one_ulp": _one_ulp,
    "offset_1e3": lambda x: x + 1e3,
    "offset_1e4": lambda x: x - 1e4,
    "offset_1e5": lambda x: x + 1e5 * (-1.0) ** torch.arange(x.shape[-2])[:, None],
    "graded_rows": lambda x: x * _graded(x.shape[-2])[:, None],
    "graded_columns": lambda x: x * _graded(x.shape[-1]),
    "outlier": lambda x: x * (1 + 1e4 * (torch.arange(x.shape[-1]) == 0)),
}

# max |x| of each matrix, by dtype: from deep among the subnormal numbers to as far up as coefficients still fit.
SCALES = {
    torch.float32: (1e-41, 1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 3e37),
    torch.float64: (1e-310, 1e-300, 1e-160, 1e160, 1e300, 1e306),
    torch.bfloat16: (1e-30, 1e30),
    torch.float16: (1e-2, 1e3),
}


def names(dtype: torch.dtype) -> list[str]:
    """Every case that makes sense in `dtype`: an offset of 1e5 is Inf in fp16."""
    shaped = [case for case in SHAPED if (case, dtype) != ("offset_1e5", torch.float16)]
    return [*shaped, *SPECTRA, *(f"scale_{scale:g}" for scale in SCALES[dtype])]


def generate(case: str, positions: int, r: int, n: int, p: int, seed: int = 0) -> Tensor:
    if case in SPECTRA:
        if n == 1:
            return 0.1 * _randn(positions, r, n, seed=seed)
        return with_spectrum(SPECTRA[case](min(r, n - 1), p), positions, r, n, seed)
    x = _randn(positions, r, n, seed=seed)
    if case in SHAPED:
        return SHAPED[case](x)
    return float(case.removeprefix("scale_")) * x / x.abs().amax((1, 2), keepdim=True)


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent in fp64, in two steps so that 2^exponent itself may be out of range."""
    half = exponent.div(2, rounding_mode="floor")
    one = torch.ones_like(half, dtype=torch.float64)
    return x.double() * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


@dataclass(frozen=True)
class Exact:
    """What `compress` approximates, in fp64, of x [n, S, r] exactly as stored.

    Each matrix is in units of 2^exponent, in which its max |x| is in [0.5, 1), so that squares don't overflow here.
    """

    exponent: Tensor  # [S]
    mean: Tensor  # [S, r]
    centred: Tensor  # [S, r, n]
    u: Tensor  # [S, r, r]: all left singular vectors
    sigma: Tensor  # [S, K]

    @property
    def size(self) -> Tensor:
        """‖Xc‖ [S]."""
        return norm(self.centred)

    def optimum(self, components: int) -> Tensor:
        """The least error of any `components` directions [S]."""
        return self.sigma[:, components:].norm(dim=-1)


def exact(x: Tensor) -> Exact:
    """Centred and decomposed in fp64, after subtracting the first task's vector so that an offset costs nothing."""
    wide = x.detach().cpu().double().permute(1, 2, 0)  # [S, r, n]
    exponent = torch.frexp(wide.abs().amax((1, 2))).exponent
    wide = times_power_of_two(wide, -exponent[:, None, None])
    first = wide[..., :1]
    shifted = wide - first
    centred = shifted - shifted.mean(-1, keepdim=True)
    mean = (first + shifted.mean(-1, keepdim=True))[..., 0]
    u, s, _ = torch.linalg.svd(centred, full_matrices=True)
    return Exact(exponent, mean, centred, u, s[:, : max(min(x.shape[2], x.shape[0] - 1), 0)])


@cache
def case(name: str, dtype: torch.dtype, positions: int, r: int, n: int, p: int) -> tuple[Tensor, Exact]:
    """x [n, S, r] in `dtype`, and what is exact for it. Shared by every backend: don't write to it."""
    x = generate(name, positions, r, n, p).to(dtype).permute(2, 0, 1).contiguous()
    return x, exact(x)


@dataclass(frozen=True)
class Measured:
    """How far one result of `compress` is from `Exact`; everything [S], in units of 2^exponent."""

    error: Tensor  # ‖Xc − U C‖
    excess: Tensor  # error − optimum
    orthogonality: Tensor  # ‖UᵀU − I‖
    coefficients: Tensor  # ‖C − Uᵀ Xc‖
    mean: Tensor  # max |mean − exact mean|


def measure(truth: Exact, basis: Tensor, coeff: Tensor) -> Measured:
    components = basis.shape[0] - 1
    u = basis[1:].cpu().double().permute(1, 2, 0)  # [S, r, p]
    c = times_power_of_two(coeff.cpu().permute(2, 1, 0), -truth.exponent[:, None, None])  # [S, p, n]
    mean = times_power_of_two(basis[0].cpu(), -truth.exponent[:, None])
    error = norm(truth.centred - u @ c)
    return Measured(
        error=error,
        excess=error - truth.optimum(components),
        orthogonality=norm(u.mT @ u - torch.eye(components, dtype=torch.float64)),
        coefficients=norm(c - u.mT @ truth.centred),
        mean=(mean - truth.mean).abs().amax(-1),
    )
