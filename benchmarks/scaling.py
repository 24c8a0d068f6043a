"""How time grows with positions, tasks, rank, tokens and threads, beside how the work grows.

The slope is that of log time over log size, by least squares; the expected one that of the roofline's time at the same
sizes: the longer of bytes by the copy's rate and arithmetic by the product's; a merge's that of its bytes, since the disk is
to bound it. Between threads it is −1.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import rmm_kernels

from . import models, workloads
from .timing import stopwatch, threads
from .workloads import MergeInputs, Workload

SECONDS = 0.4  # that one size may take, of which it has three rounds at least


@dataclass(frozen=True)
class Series:
    """One workload at several sizes along an axis."""

    op: str
    axis: str
    of: str
    """what stays as it is"""
    sizes: tuple[int, ...]
    workload: Callable[[int], Workload]


def _forward(tokens: int = 64, active: int = 64, r: int = 16, threads: int = 1) -> Workload:
    return workloads.forward(*workloads.O_PROJ, tokens, max(active, 64), active, r=r, threads=threads)


_BLOCKS = 4  # of RoBERTa-base, where tasks vary

SERIES = (
    Series("compress", "positions", "16x8", (2_000, 8_000, 32_000, 128_000), lambda s: workloads.compress(16, 8, positions=s)),
    Series("compress", "tasks", "r = 16", (4, 8, 16, 32, 64), lambda n: workloads.compress(16, n, positions=4_000, p=3)),
    Series("compress", "rank", "n = 8", (8, 16, 32, 64, 128), lambda r: workloads.compress(r, 8, positions=4_000)),
    Series("compress", "threads", "16x8", (1, 2), lambda t: workloads.compress(16, 8, positions=32_000, threads=t)),
    Series("lora_forward_", "tokens", "a task each, r = 16", (1, 4, 16, 64, 256), lambda t: _forward(t, t)),
    Series("lora_forward_", "tasks", "T = 64, r = 16", (1, 4, 16, 64), lambda a: _forward(64, a)),
    Series("lora_forward_", "rank", "T = 64 of 64 tasks", (8, 16, 32, 64, 128), lambda r: _forward(64, 64, r)),
    Series("lora_forward_", "threads", "T = 256 of 64, r = 64", (1, 2), lambda t: _forward(256, 64, 64, threads=t)),
    Series("merge", "positions", "8 of r = 16", (2, 4, 8, 12), lambda b: workloads.merge_of(models.ROBERTA, 8, b)),
    Series("merge", "tasks", "r = 16", (4, 8, 16, 32), lambda n: workloads.merge_of(models.ROBERTA, n, _BLOCKS)),
)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of log value over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _call(workload: Workload, scratch: Path) -> Callable[[], object]:
    made = workload.make()
    if workload.op == "compress":
        return lambda: rmm_kernels.compress(made.x, made.components)
    if workload.op == "lora_forward_":
        return lambda: rmm_kernels.lora_forward_(*made.arguments())
    assert isinstance(made, MergeInputs) and made.model is not None
    paths = models.write_adapters(scratch / "adapters", made.model, made.blocks, made.n, made.rank, made.dtype)
    outputs = iter(range(1_000_000))
    return lambda: rmm_kernels.merge(paths, made.components, output=scratch / str(next(outputs)))


def _seconds(workload: Workload) -> float:
    with tempfile.TemporaryDirectory(prefix="rmm-benchmark-") as scratch, threads(workload.threads), torch.inference_mode():
        call = _call(workload, Path(scratch))
        call()
        times = [stopwatch(call)[1]]
        while len(times) < 3 or (sum(times) < SECONDS and len(times) < 500):
            times.append(stopwatch(call)[1])
    return median(times)


def measure(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """One entry for each series."""
    for series in SERIES:
        made = [series.workload(size) for size in series.sizes]
        seconds = [_seconds(workload) for workload in made]
        sizes = [workload.shapes["positions"] for workload in made] if series.axis == "positions" else list(series.sizes)
        floors = [_floor(workload, ceilings) for workload in made]
        yield {
            "op": series.op,
            "axis": series.axis,
            "of": series.of,
            "sizes": sizes,
            "seconds": seconds,
            "slope": slope(sizes, seconds),
            "expected": -1.0 if series.axis == "threads" else slope(sizes, floors),
        }


def _floor(workload: Workload, ceilings: dict[str, float]) -> float:
    if workload.op == "merge":
        return workload.bytes
    count = f"{workload.threads} thread{'s' if workload.threads > 1 else ''}"
    return max(workload.bytes / ceilings[f"copy, {count}"], workload.flops / ceilings[f"gemm, {count}"])
