"""What the CUDA compress kernels execute and move, counted in the simulator, and how long they should then take on an H100.

    python -m benchmarks.cuda_counts

Counts are exact for the sm_80 PTX; times are predictions, nothing is measured. As Markdown, for each size and memory layout:
PTX instructions per matrix as threads and as whole warps execute them (idle lanes count there), the worst coalescing of
any tensor (sectors that had to move by sectors that moved; "copies" are the workspaces together), shared-memory wavefronts by
the fewest possible, bytes moved by the fewest possible, and the predicted time of 2.5 million matrices.

The prediction: the longest of the bytes at the data sheet's bandwidth, the wavefronts at one a clock and multiprocessor, and
the warps' instructions at 65% of one a clock and scheduler, which is what two warps a scheduler with two to three independent
chains each can be hoped to reach. PTX is not machine code: moves cost nothing there, wide integer arithmetic more.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import simulator

import rmm_kernels  # noqa: F401

MATRICES = 2_500_000
MULTIPROCESSORS, SCHEDULERS, CLOCK, MEMORY = 132, 4, 1.755e9, 3.35e12  # H100 SXM
ISSUED = 0.65
SECTOR = 32


@dataclass(frozen=True)
class Case:
    """compress of `positions` matrices r × n with p components; `inside` where positions are innermost in memory."""

    r: int
    n: int
    p: int = 4
    positions: int = 64
    inside: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        layout = "positions" if self.inside else "ranks"
        return f"{self.r} × {self.n}, {str(self.dtype).removeprefix('torch.')}, {layout}"

    @property
    def floor(self) -> float:
        """Bytes of x, basis, coefficients and energy of a matrix."""
        k = min(self.r, self.n - 1)
        return self.dtype.itemsize * (self.n * self.r + (self.p + 1) * self.r + self.n * self.p) + 4 * k


# A thread, 8 lanes, 2 and 4 lanes in registers, a warp, whole columns in its lanes; tasks in chunks by 8 lanes and by a warp;
# the same from transposed copies, as fewer positions than fill a sector have room in a block; a block a position.
CASES = tuple(
    Case(r, n, positions=positions, inside=inside, dtype=dtype)
    for r, n, positions, dtype in (
        (16, 8, 64, torch.float32),
        (16, 8, 64, torch.bfloat16),
        (8, 8, 64, torch.float32),
        (16, 20, 32, torch.float32),
        (32, 8, 32, torch.float32),
        (64, 8, 32, torch.float32),
        (32, 20, 8, torch.float32),
        (64, 34, 8, torch.float32),
        (16, 130, 16, torch.float32),
        (32, 130, 8, torch.float32),
        (16, 1024, 16, torch.float32),
        (32, 128, 8, torch.float32),
        (64, 34, 16, torch.bfloat16),
        (72, 80, 8, torch.float32),
    )
    for inside in (False, True)
)


@dataclass(frozen=True)
class Counts:
    """Of all launches, per matrix; `coalescing` and `wavefronts` are ratios."""

    case: Case
    threads: float
    warps: float  # times 32
    coalescing: dict[str, float]  # by tensor
    wavefronts: float
    taken: float  # wavefronts
    moved: float

    @property
    def seconds(self) -> dict[str, float]:
        """Predicted for MATRICES on an H100, by what limits."""
        return {
            "bytes": MATRICES * self.moved / MEMORY,
            "issue": MATRICES * self.warps / 32 / (MULTIPROCESSORS * SCHEDULERS * CLOCK * ISSUED),
            "shared": MATRICES * self.taken / (MULTIPROCESSORS * CLOCK),
        }

    @property
    def floors(self) -> float:
        """The predicted time by that of moving the fewest bytes."""
        return max(self.seconds.values()) / (MATRICES * self.case.floor / MEMORY)


def count(case: Case) -> Counts:
    simulator.load()
    x = torch.randn(case.n, case.positions, case.r, generator=torch.Generator().manual_seed(case.n)).to(case.dtype)
    if case.inside:
        x = x.mT.contiguous().mT
    with simulator.settings(statistics=True, check=False) as launches:
        torch.ops.rmm_kernels.compress.cuda(x, case.p)
    tensors = ("x", "basis", "coeff", "energy")
    rows = [row for run in launches for row in run["regions"] if row["sectors"]]
    sectors, ideal = Counter[str](), Counter[str]()
    for row in rows:
        index = int(row["region"].split()[-1])
        name = tensors[index] if index < len(tensors) else "copies"
        sectors[name] += row["sectors"]
        ideal[name] += row["ideal_sectors"]
    wavefronts = sum(run["shared"]["wavefronts"] for run in launches)
    return Counts(
        case,
        sum(run["thread_instructions"] for run in launches) / case.positions,
        32 * sum(run["warp_instructions"] for run in launches) / case.positions,
        {name: ideal[name] / sectors[name] for name in sectors},
        wavefronts / max(1, sum(run["shared"]["ideal_wavefronts"] for run in launches)),
        wavefronts / case.positions,
        SECTOR * sectors.total() / case.positions,
    )


def table() -> Iterator[str]:
    yield f"CUDA `compress`, p = 4, counted in the simulator; ms for {MATRICES / 1e6} million on an H100 SXM **predicted,"
    yield "not measured**:"
    yield ""
    yield "| r × n, dtype, innermost | instructions a matrix | whole warps | coalescing | wavefronts | bytes | ms | by floor |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for case in CASES:
        found = count(case)
        tensor, worst = min(found.coalescing.items(), key=lambda item: item[1])
        limit, seconds = max(found.seconds.items(), key=lambda item: item[1])
        yield (
            f"| {case} | {found.threads:,.0f} | {found.warps:,.0f} | {worst:.2f} ({tensor}) | {found.wavefronts:.2f} | "
            f"{found.moved / case.floor:.2f} | {1e3 * seconds:.2f} ({limit}) | {found.floors:.1f} |"
        )


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.cuda_counts", description=__doc__.split("\n")[0]).parse_args()
    if not simulator.ops():
        sys.exit("nvcc is not on PATH: there are no CUDA kernels to count")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
