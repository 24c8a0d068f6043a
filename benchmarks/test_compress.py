"""compress against batched torch.linalg.svd and against Gram + torch.linalg.eigh, all with the same outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

import rmm_kernels

from . import peers, workloads
from .timing import rounds, stopwatch
from .workloads import EIGH, OURS, CompressInputs

WORKLOADS = workloads.COMPRESS
CONTENDERS = {OURS: lambda inputs: lambda: rmm_kernels.compress(inputs.x, inputs.components), **peers.COMPRESS}

# (excess error, ‖UᵀU − I‖) allowed: fp32's own for all but the Gram matrix, which halves the digits
ALLOWED = {EIGH: (1e-5, 1e-3)}
FP32 = (1e-6, 5e-6)
CHECKED = 512  # positions compared with fp64


def _check(inputs: CompressInputs, contender: str, call: Callable[[], peers.Compressed]) -> float:
    """Shapes, layout, orthonormal bases, and an error that exceeds the best possible by at most the allowed part of ‖X − μ‖."""
    x, p = inputs.x, inputs.components
    n, positions, r = x.shape
    (basis, coeff, energy), seconds = stopwatch(call)
    assert basis.shape == (p + 1, positions, r)
    assert coeff.shape == (n, p, positions)
    assert energy.shape == (positions, min(r, n - 1))
    assert (basis.stride(1) < basis.stride(2)) == (x.stride(1) < x.stride(2))

    wide = x[:, -CHECKED:].double().permute(1, 2, 0)  # [S, r, n]
    mean, u = basis[0, -CHECKED:].double()[..., None], basis[1:, -CHECKED:].double().permute(1, 2, 0)
    restored = mean + u @ coeff[..., -CHECKED:].double().permute(2, 1, 0)
    centred = wide - wide.mean(-1, keepdim=True)
    sigma = torch.linalg.svdvals(centred)
    norm = sigma.square().sum(-1).sqrt()
    error, best = (wide - restored).flatten(1).norm(dim=1), sigma[:, p:].square().sum(-1).sqrt()
    excess, skew = ALLOWED.get(contender, FP32)
    assert ((error - best) / norm).max() <= excess
    assert (u.mT @ u - torch.eye(p)).abs().max() <= skew
    return seconds


def test_compress(benchmark, prepared, workload, turn, contender):
    call, seconds = prepared.call(workload, contender, CONTENDERS[contender], _check)
    benchmark.pedantic(call, **rounds(seconds))
