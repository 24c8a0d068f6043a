"""What shrink and expand share: whose tokens a tile holds, and launch parameters.

A tile of tokens takes one of two forms. In the general one every token scales by its own task's coefficients and the tile
takes p + 1 products with the shared basis. A tile whose tokens are all of one task may instead rebuild that task's factor
on chip, from p + 1 reads that it makes in any case, and take one product: (p + 1)× fewer operations, and the coefficients
are read once and not once a token. Ids are known on the device only, so the device decides, tile by tile, and the grid stays
the same. From shapes alone follows whether a kernel holds both forms (`Config.adaptive`): up to 64 tokens the products cost
nothing beside the reads, which are the same, and the general form alone takes fewer registers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def tasks_of(ids, ids_t, t, tokens, n):
    """Of rows t of the batch: which have a task, the task (0 where none), and the lowest and highest task among them.

    Without any task, lowest is n and highest −1. An id outside 0 … n − 1 is no task.
    """
    task = tl.load(ids + t * ids_t, mask=t < tokens, other=-1).to(tl.int64)
    active = (task >= 0) & (task < n)
    lowest = tl.min(tl.where(active, task, n), 0)
    highest = tl.max(tl.where(active, task, -1), 0)
    return active, tl.where(active, task, 0), lowest, highest


@dataclass(frozen=True)
class Config:
    """Launch parameters of shrink or expand.

    Attributes:
        block_t, block_d, block_r: tokens, positions and ranks of a tile; powers of two from 16.
        programs: shrink splits the positions until about this many programs run; expand has no use for it.
        num_warps, num_stages: as Triton means them; a loop keeps num_stages − 1 tiles in flight.
        adaptive: a tile of one task rebuilds its factor.
    """

    block_t: int
    block_d: int
    block_r: int
    programs: int = 128
    num_warps: int = 4
    num_stages: int = 3
    adaptive: bool = False


@dataclass(frozen=True)
class Row:
    """The launch parameters of `op` for what it covers; block_r is an upper bound, the rank's own power of two else.

    Attributes:
        arch: as `arch` gives it; "" is any.
        itemsize: bytes of a value of x or y.
        r, p, tokens, width: the largest that the row covers.
    """

    op: str
    itemsize: int
    config: Config
    arch: str = ""
    r: int = 1 << 30
    p: int = 1 << 30
    tokens: int = 1 << 30
    width: int = 1 << 30


# The first row that covers a call gives its parameters. Chosen by the byte model and the compiled kernels' registers, not yet
# by measurement: benchmarks/tune.py measures.
TABLE: tuple[Row, ...] = (
    Row("shrink", 2, Config(16, 64, 128), arch="sm_120", tokens=16),
    Row("shrink", 2, Config(16, 128, 128, num_stages=2), arch="gfx942", tokens=16),
    Row("shrink", 2, Config(16, 64, 128, num_stages=4), tokens=16),
    Row("shrink", 2, Config(32, 64, 128, num_stages=4), tokens=32),
    Row("shrink", 2, Config(64, 64, 64), tokens=64, r=32),
    Row("shrink", 2, Config(64, 64, 64, num_warps=8), tokens=64),
    Row("shrink", 2, Config(64, 64, 64, adaptive=True), tokens=2047, r=32),
    Row("shrink", 2, Config(64, 64, 64, num_warps=8, adaptive=True), tokens=2047),
    Row("shrink", 2, Config(128, 32, 64, num_warps=8, adaptive=True)),
    Row("shrink", 4, Config(16, 32, 64, num_stages=4), tokens=16),
    Row("shrink", 4, Config(32, 32, 64, num_stages=2), tokens=64, p=0),
    Row("shrink", 4, Config(32, 32, 64), tokens=64),
    Row("shrink", 4, Config(64, 32, 16, num_stages=2, adaptive=True), r=16, p=8),
    Row("shrink", 4, Config(32, 32, 64, num_stages=2, adaptive=True), p=8),
    Row("shrink", 4, Config(32, 32, 64)),
    Row("expand", 2, Config(16, 64, 128, num_stages=4), tokens=16),
    Row("expand", 2, Config(32, 64, 128, num_stages=4), tokens=32),
    Row("expand", 2, Config(64, 32, 64), tokens=64),
    Row("expand", 2, Config(64, 64, 64, adaptive=True), tokens=2047, r=32),
    Row("expand", 2, Config(128, 64, 64, num_warps=8, adaptive=True), r=32),
    Row("expand", 2, Config(64, 64, 64, num_warps=8, adaptive=True), r=64),
    Row("expand", 2, Config(64, 32, 64), arch="gfx942"),
    Row("expand", 2, Config(64, 32, 64, num_warps=8)),
    Row("expand", 4, Config(16, 32, 64), tokens=16),
    Row("expand", 4, Config(64, 16, 64), tokens=64),
    Row("expand", 4, Config(64, 32, 32, num_stages=2, adaptive=True), r=32, p=8),
    Row("expand", 4, Config(64, 16, 64, num_stages=2, adaptive=True), r=64, p=8),
    Row("expand", 4, Config(64, 16, 64, num_stages=2), arch="gfx942"),
    Row("expand", 4, Config(64, 16, 64, num_warps=8, num_stages=2)),
)

# Shared memory a program may have, in bytes, by arch; of what is not listed, the least.
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_103": 232448}
SHARED |= {"sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
LEAST_SHARED = 65536

_table = TABLE


def arch(device: torch.device) -> str:
    """The device's architecture, as "sm_90" or "gfx942"; "sm_80" stands for a simulated one."""
    return (
        _arch(device.index if device.index is not None else torch.cuda.current_device()) if device.type == "cuda" else "sm_80"
    )


@functools.cache
def _arch(device: int) -> str:
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def precision(device: torch.device) -> str:
    """How fp32 operands of a product are multiplied, as tl.dot's input_precision says it.

    AMD's matrix cores multiply fp32. NVIDIA's do not, and operands of multiply-adds Triton lays out so that eight lanes want
    the same bank of shared memory. There each is split into two values of TF32, and three of the four products are taken: what
    is left out is 2⁻²² of the product at most. Tensor cores cut their sums off, which would tell in a long one: but a tile's
    starts from 0, and is added to the others' in fp32 (tests/test_triton_overloads.py).
    """
    return "tf32x3" if arch(device).startswith("sm_") else "ieee"


def use(rows: Iterable[Row] | None) -> None:
    """From now on, look up `rows` before the shipped table; None goes back to that alone."""
    global _table
    _table = (*(rows or ()), *TABLE)


def save(rows: Iterable[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def load(path: Path) -> tuple[Row, ...]:
    """The rows of a file that `save` (or benchmarks/tune.py) wrote."""
    return tuple(Row(**{**row, "config": Config(**row["config"])}) for row in json.loads(path.read_text()))


def _power_of_two(value: int) -> int:
    return max(16, triton.next_power_of_2(value))


def shared_bytes(op: str, config: Config, p: int, itemsize: int) -> int:
    """An upper bound of the shared memory of a kernel: the tiles in flight, and one of operands or results."""
    t, d, r = config.block_t, config.block_d, config.block_r
    flight = max(1, config.num_stages - 1) + 1  # Hopper keeps one more than the others
    if op == "shrink":
        tiles = 2 * t * d + r * d
        if config.adaptive:
            tiles = max(tiles, t * d + (p + 1) * r * d)
        return flight * tiles * itemsize + max((t + r) * d * itemsize, 4 * t * r)
    return (flight * (r * d + t * d) + t * r + r * d) * itemsize + 4 * t * d


def _find(op: str, arch: str, r: int, p: int, tokens: int, width: int, itemsize: int) -> Row:
    """The first row of the table that covers the call."""
    return next(
        row
        for row in _table
        if (row.op, row.itemsize) == (op, itemsize)
        and row.arch in ("", arch)
        and r <= row.r
        and p <= row.p
        and tokens <= row.tokens
        and width <= row.width
    )


def configure(op: str, arch: str, r: int, p: int, tokens: int, width: int, itemsize: int) -> Config:
    """Launch parameters from the table, made to fit: tiles no wider than the problem, and within the arch's shared memory.

    Where it is short, a kernel gives up stages, then positions, then the second form, then ranks.
    """
    row = _find(op, arch, r, p, tokens, width, itemsize)
    config = replace(
        row.config,
        block_r=min(row.config.block_r, _power_of_two(r)),
        block_d=min(row.config.block_d, _power_of_two(width)),
    )
    while shared_bytes(op, config, p, itemsize) > SHARED.get(arch, LEAST_SHARED):
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_d > 16:
            config = replace(config, block_d=config.block_d // 2)
        elif config.adaptive:
            config = replace(config, adaptive=False, block_d=row.config.block_d)
        else:
            config = replace(config, block_r=config.block_r // 2)
    return config
