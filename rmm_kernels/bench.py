"""A short benchmark that needs nothing but the package: every op beside its own reference, which is plain torch.

The whole one, with other peers, is `benchmarks/` of the repository. A time is only given where the op's result agrees with the
reference in fp64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import _library, reference
from .reference import accumulator

# n tasks, r rank, p components, d features: those of one layer of a 7B model with eight adapters.
_N, _R, _P, _D, _TOKENS = 8, 16, 3, 4096, 64

# What an op may differ from fp64 by, relative to the norm of the result: some roundings of the dtype it stores in.
_ALLOWED = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Row:
    """One op: which backend served it, seconds of a call (None where its result is wrong), how many times its time the
    reference takes, least bytes and what share of a large copy's rate they come to."""

    op: str
    shape: str
    backend: str
    seconds: float | None
    ratio: float | None
    bytes: int
    of_copy: float | None


@dataclass(frozen=True)
class _Case:
    op: str
    shape: str
    arguments: tuple[Any, ...]
    moved: int
    """values read and written"""
    judge: Callable[[Any], Tensor]
    """what of a result is unique, and so may be compared"""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 0.3) -> tuple[float, list[Row]]:
    """The rate of a large copy, bytes read and written per second, and a row for every op.

    Args:
        device: "cpu", "cuda" or another of torch's.
        dtype: float32, float16 or bfloat16.
        seconds: how long each op, and each reference, is repeated.

    Raises:
        ValueError: another dtype, or torch has no such device.
    """
    if dtype not in _ALLOWED:
        raise ValueError(f"dtype is {dtype}; allowed are {', '.join(str(allowed) for allowed in _ALLOWED)}")
    try:
        source = torch.ones(1 << 26, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device is {device!r}, which torch can't use here: {str(error).splitlines()[0]}") from error
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, seconds)
    return copied, [_row(case, device, dtype, seconds, copied) for case in _cases(device, dtype)]


def _cases(device: str, dtype: torch.dtype) -> list[_Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, basis, coeff = randn(_N, _D, _R), randn(_P + 1, _D, _R) / 4, randn(_N, _P, _D)
    small = randn(_D, _R, _N)
    tokens, y, ids = randn(_TOKENS, _D), randn(_TOKENS, _D), (torch.arange(_TOKENS) % _N).to(device)
    basis_a, basis_b = randn(_P + 1, _R, _D) / 64, (randn(_P + 1, _R, _D) / 4).mT
    u = randn(_TOKENS, _R).to(accumulator(dtype))
    scaling = torch.ones(_N, dtype=accumulator(dtype), device=device)
    layer = basis_a.numel() + coeff.numel()
    across = (tokens, basis_a, coeff, basis_b, coeff, ids, scaling)
    tasks, mixed = f"{_D} positions of {_R}x{_N}", f"{_TOKENS} tokens of {_N} tasks, d = {_D}, r = {_R}"
    stacked = x.numel() + basis.numel() + coeff.numel()
    return [
        _Case("gram", tasks, (small, True), small.numel() + _D * _N * _N, _same),
        _Case("truncated_svd", f"{tasks}, rank {_P}", (small, _P), small.numel() + _D * _P * (_R + _N + 1), _product),
        _Case("project", tasks, (x, basis), stacked, _same),
        _Case("compress", f"{tasks}, p = {_P}", (x, _P), stacked, _restored),
        _Case("reconstruct", tasks, (basis, coeff, torch.arange(_N, device=device)), stacked, _same),
        _Case("error_grams", f"{tasks}, p = {_P}", (x, basis, coeff), stacked, _same),
        _Case("lora_shrink", mixed, (tokens, basis_a, coeff, ids), tokens.numel() + layer, _same),
        _Case("lora_expand_", mixed, (y, u, basis_b, coeff, ids, scaling), 2 * y.numel() + layer, _same),
        _Case("lora_forward_", mixed, (y, *across), 3 * y.numel() + 2 * layer, _same),
        _Case("lora_forward", mixed, (y, *across), 3 * y.numel() + 2 * layer, _same),
    ]


def _same(result: Any) -> Tensor:
    return result


def _product(result: Any) -> Tensor:
    u, s, vh = (part.double() for part in result)
    return (u * s[:, None]) @ vh


def _restored(result: Any) -> Tensor:
    basis, coeff, _ = result
    return reference.reconstruct(basis.double(), coeff.double(), torch.arange(_N, device=coeff.device))


def _row(case: _Case, device: str, dtype: torch.dtype, seconds: float, copied: float) -> Row:
    handle = getattr(torch.ops.rmm_kernels, case.op)
    backend = _library.runs_on(case.op, case.arguments[0])
    moved = case.moved * dtype.itemsize
    if not _agrees(case, handle, dtype):
        return Row(case.op, case.shape, backend, None, None, moved, None)
    with torch.inference_mode():
        ours = _seconds(lambda: handle(*case.arguments), device, seconds)
        plain = _seconds(lambda: handle.reference(*case.arguments), device, seconds)
    return Row(case.op, case.shape, backend, ours, plain / ours, moved, moved / ours / copied)


def _agrees(case: _Case, handle: Any, dtype: torch.dtype) -> bool:
    """One call on copies gives what the reference gives in fp64."""
    given = [value.clone() if isinstance(value, Tensor) else value for value in case.arguments]
    wide = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in given]
    in_place = case.op.endswith("_")
    expected, result = getattr(reference, case.op)(*wide), handle(*given)
    expected, result = case.judge(wide[0] if in_place else expected), case.judge(given[0] if in_place else result)
    return bool((result.double() - expected).norm() <= _ALLOWED[dtype] * expected.norm())


def _seconds(call: Callable[[], object], device: str, least: float) -> float:
    """The median of calls, after a first one; on a GPU of batches of calls, each waited for."""
    repeats = 1 if torch.device(device).type == "cpu" else 20

    def wait() -> None:
        if repeats > 1:
            torch.accelerator.synchronize()

    call()
    wait()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < 1000):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        times.append(time.perf_counter() - start)
    return median(times) / repeats
