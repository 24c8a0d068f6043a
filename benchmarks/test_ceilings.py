"""What this machine can do at best: a large copy, one within the cache, and a large matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import workloads
from .timing import rounds, stopwatch

WORKLOADS = workloads.CEILINGS


def _ceiling(name: str) -> Callable[[], object]:
    if name != "gemm":
        moved = {"copy": workloads.COPY_BYTES, "cache copy": workloads.CACHE_BYTES}[name]
        source = torch.ones(moved // 8)  # read and written, 4 bytes each
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    size = workloads.GEMM_SIZE
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return lambda: torch.mm(a, b, out=c)


CONTENDERS = {"torch": _ceiling}


def test_ceiling(benchmark, prepared, workload, turn, contender):
    call, seconds = prepared.call(workload, contender, CONTENDERS[contender], lambda inputs, name, call: stopwatch(call)[1])
    benchmark.pedantic(call, **rounds(seconds))
