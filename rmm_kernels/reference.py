"""Every op in plain torch, for any float dtype: what the kernels are tested against, and what runs where none exists.

Sums are kept in fp32, in fp64 for fp64; decompositions are done in fp64 for every dtype, since LAPACK's fp32 ones miss the
bounds they are held to. Results repeat from run to run, but LAPACK's and BLAS's bits depend on the number of threads.
Arguments are as in `rmm_kernels.ops`, which documents them and has checked them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def deficiency(dtype: torch.dtype) -> float:
    """Singular values at or below this fraction of the largest count as zero."""
    return 1e-14 if dtype == torch.float64 else 1e-6


def power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent, exactly, in two steps so that 2^exponent itself need not be representable."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    one = torch.ones_like(half, dtype=x.dtype)
    return x * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale each matrix of x [B, m, k] by a power of two to max |x| in [0.5, 1): (scaled, exponent, finite), in fp64.

    exponent and finite are [B, 1, 1]. A matrix with NaN or Inf is replaced by zeros and flagged.
    """
    finite = x.isfinite().flatten(1).all(1).reshape(-1, 1, 1)
    x = torch.where(finite, x, torch.zeros((), dtype=x.dtype, device=x.device)).double().contiguous()
    largest = x.abs().flatten(1).amax(1) if x[0:1].numel() else x.new_zeros(x.shape[0])
    exponent = torch.frexp(largest).exponent.reshape(-1, 1, 1)
    return power_of_two(x, -exponent), exponent, finite


def positive_peak(u: Tensor) -> Tensor:
    """±1 in fp64 per column of u [B, m, k]: the sign of its largest |component|, the lowest index on ties.

    Rounding makes ties: give u as it is returned.
    """
    if u.shape[-2] == 0 or u.shape[-1] == 0:
        return u.new_ones(u.shape[0], 1, u.shape[-1], dtype=torch.float64)
    largest = u.abs().amax(-2, keepdim=True)
    first = (u.abs() == largest).int().argmax(-2, keepdim=True)
    return torch.where(u.gather(-2, first) < 0, -1.0, 1.0).double()


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean column, x minus it) of x [B, m, k], k ≥ 1.

    The first column goes first, exactly where all columns share an offset, which so costs no accuracy; equal columns
    become exactly zero.
    """
    first = x[..., :1]
    shifted = x - first
    mean = shifted.mean(-1, keepdim=True)
    return first + mean, shifted - mean


def gram(x: Tensor, center: bool = False) -> Tensor:
    work = x.to(accumulator(x.dtype))
    if center and x.shape[-1]:
        _, work = _centre(work)
    product = work.mT @ work
    return product.triu() + product.triu(1).mT  # BLAS need not round both halves alike


def truncated_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    scaled, exponent, finite = _normalise(x)
    u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    sign = positive_peak(u.to(x.dtype))
    u = torch.where(finite, u * sign, torch.nan)
    vh = torch.where(finite, vh * sign.mT, torch.nan)
    s = torch.where(finite[:, 0], power_of_two(s, exponent[:, 0]), torch.nan)
    return u.to(x.dtype).contiguous(), s.to(accumulator(x.dtype)).contiguous(), vh.to(x.dtype).contiguous()


def project(x: Tensor, basis: Tensor) -> Tensor:
    work = accumulator(x.dtype)
    centred = x.to(work) - basis[0].to(work)  # [n, S, r]
    return torch.einsum("nsr,psr->nps", centred, basis[1:].to(work)).to(x.dtype).contiguous()


def like_layout(x: Tensor, count: int) -> Tensor:
    """An empty [count, S, r] in the memory layout of x [n, S, r]: positions innermost where they are in x."""
    _, positions, rank = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(count, rank, positions).mT
    return x.new_empty(count, positions, rank)


def compress(x: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    n, positions, r = x.shape
    k = min(r, n - 1)
    scaled, exponent, finite = _normalise(x.permute(1, 2, 0))  # [S, r, n]
    mean, centred = _centre(scaled)
    u, s, _ = torch.linalg.svd(centred, full_matrices=r > n)  # all of U; with n > r not all of V, n × n
    u, s = u[..., :components], s[..., :k]
    u = u * positive_peak(u.to(x.dtype))
    kept = torch.zeros(positions, components, 1, dtype=torch.bool, device=x.device)
    kept[:, : min(k, components), 0] = s[:, :components] > deficiency(x.dtype) * s[:, :1]
    coeff = torch.where(kept, u.mT @ centred, 0.0)  # [S, p, n]

    basis = like_layout(x, components + 1)
    basis[0] = torch.where(finite, power_of_two(mean, exponent), torch.nan)[..., 0]
    basis[1:] = torch.where(finite, u, torch.nan).permute(2, 0, 1)
    coeff = torch.where(finite, power_of_two(coeff, exponent), torch.nan).permute(2, 1, 0).to(x.dtype)
    energy = torch.where(finite[:, 0], power_of_two(s, exponent[:, 0]).square(), torch.nan)
    return basis, coeff.contiguous(), energy.to(accumulator(x.dtype)).contiguous()


def check_ids(task_ids: Tensor, n: int, lowest: int) -> None:
    """Refuse ids outside lowest … n−1. On a GPU that would need a host sync: there such an id does nothing."""
    if task_ids.device.type == "cpu" and task_ids.numel():
        low, high = int(task_ids.min()), int(task_ids.max())
        if low < lowest or high >= n:
            bad = low if low < lowest else high
            raise RuntimeError(f"task_ids holds {bad}; allowed are {lowest} to {n - 1}")


def reconstruct(basis: Tensor, coeff: Tensor, task_ids: Tensor) -> Tensor:
    check_ids(task_ids, coeff.shape[0], 0)
    work = accumulator(basis.dtype)
    chosen = coeff[task_ids.long()].to(work)  # [a, p, S]
    factors = basis[0].to(work).expand(len(task_ids), -1, -1)
    for k in range(coeff.shape[1]):
        factors = factors + chosen[:, k, :, None] * basis[k + 1].to(work)
    out = like_layout(basis, len(task_ids))
    out.copy_(factors)
    return out


def error_grams(x: Tensor, basis: Tensor, coeff: Tensor) -> Tensor:
    restored = reconstruct(basis, coeff, torch.arange(len(coeff), device=coeff.device))
    work = torch.promote_types(accumulator(x.dtype), accumulator(basis.dtype))
    error, restored = (x.to(work) - restored.to(work)).double(), restored.double()
    same = [half.triu() + half.triu(1).mT for half in (error.mT @ error, restored.mT @ restored)]  # as in gram
    return torch.stack([same[0], error.mT @ restored, same[1]])


def _rows(task_ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(which rows have a task [T], an id that may be used as an index for every row [T])."""
    check_ids(task_ids, n, -1)
    active = (task_ids >= 0) & (task_ids < n)
    return active, torch.where(active, task_ids, torch.zeros_like(task_ids)).long()


def lora_shrink(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> Tensor:
    work = accumulator(x.dtype)
    if coeff_a.shape[0] == 0:
        check_ids(task_ids, 0, -1)
        return x.new_zeros(x.shape[0], basis_a.shape[1], dtype=work)
    active, ids = _rows(task_ids, coeff_a.shape[0])
    wide = x.to(work)
    u = wide @ basis_a[0].to(work).mT
    for k in range(coeff_a.shape[1]):
        u = u + (coeff_a[ids, k].to(work) * wide) @ basis_a[k + 1].to(work).mT
    return torch.where(active[:, None], u, torch.zeros((), dtype=work, device=x.device)).contiguous()


def lora_expand_(y: Tensor, u: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor) -> None:
    work = accumulator(y.dtype)
    if coeff_b.shape[0] == 0:
        check_ids(task_ids, 0, -1)
        return
    active, ids = _rows(task_ids, coeff_b.shape[0])
    delta = u @ basis_b[0].to(work).mT
    for k in range(coeff_b.shape[1]):
        delta = delta + coeff_b[ids, k].to(work) * (u @ basis_b[k + 1].to(work).mT)
    updated = (y.to(work) + scaling[ids, None] * delta).to(y.dtype)
    y.copy_(torch.where(active[:, None], updated, y))


def lora_forward_(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> None:
    u = lora_shrink(x, basis_a, coeff_a, task_ids)
    lora_expand_(y, u, basis_b, coeff_b, task_ids, scaling)


def lora_forward(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    lora_forward_(out, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling)
    return out
