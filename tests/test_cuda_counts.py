"""What CUDA compress executes and moves, per matrix, and its predicted time (benchmarks/cuda_counts.py), within bounds."""

from __future__ import annotations

import pytest
import simulator
import torch

from benchmarks import cuda_counts
from benchmarks.cuda_counts import Case

pytestmark = pytest.mark.skipif(not simulator.ops(), reason="nvcc is not on PATH")

# Most thread-instructions a matrix: what was counted, and a little.
INSTRUCTIONS = {
    (16, 8): 13_000,
    (8, 8): 11_500,
    (16, 20): 260_000,
    (32, 8): 26_000,
    (64, 8): 56_000,
    (32, 20): 920_000,
    (64, 34): 3_900_000,
    (16, 130): 600_000,
    (32, 130): 3_100_000,
    (16, 1024): 3_200_000,
    (32, 128): 2_800_000,
    (72, 80): 41_000_000,
}


@pytest.mark.parametrize("case", cuda_counts.CASES, ids=str)
def test_counts(case: Case) -> None:
    found = cuda_counts.count(case)
    print(found)
    assert found.threads <= INSTRUCTIONS[case.r, case.n]
    assert found.wavefronts <= 1.2
    assert set(found.coalescing) - {"copies"} == {"x", "basis", "coeff", "energy"}
    assert min(found.coalescing.values()) >= 0.9
    passes = 3 if case.n >= 4 * case.r else 1  # over x, where its tasks come in chunks
    copied = 0 if "copies" not in found.coalescing else 2 if case.inside else 0.3  # written and read: all, or coefficients
    assert found.moved <= 1.05 * (passes + copied) * case.floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_copies(dtype: torch.dtype) -> None:
    """Of x, basis and coefficients: 16 bytes a lane and whole sectors on both sides, no bank conflicts."""
    simulator.load()
    x = torch.randn(80, 16, 80).to(dtype).mT.contiguous().mT
    with simulator.settings(statistics=True, check=False) as launches:
        torch.ops.rmm_kernels.compress.cuda(x, 4)
    turns = [run for run in launches if "turn_kernel" in run["kernel"]]
    assert len(turns) == 3
    for run in turns:
        accesses = [row for row in run["per_instruction"] if row["sectors"]]
        assert {row["class"].split()[0] for row in accesses} == {"load", "store"}
        assert all(row["bytes"] == 16 * row["thread"] and row["ideal_sectors"] >= 0.9 * row["sectors"] for row in accesses)
        assert run["shared"]["wavefronts"] <= 1.1 * run["shared"]["ideal_wavefronts"]


def _randn(*shape: int, dtype: torch.dtype, inside: bool = False) -> torch.Tensor:
    """[., S, r] with positions innermost in memory where `inside`."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.mT.contiguous().mT if inside else x


@pytest.mark.parametrize("inside", [False, True], ids=["ranks", "positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["gram", "project", "reconstruct"])
def test_the_other_ops_move_whole_sectors(op: str, dtype: torch.dtype, inside: bool) -> None:
    """Every tensor coalesced and once (but the basis, which `reconstruct` finds in the L1 cache), no bank conflicts."""
    simulator.load()
    n, positions, r, p = 8, 256, 16, 4
    x = _randn(n, positions, r, dtype=dtype, inside=inside)
    basis, coeff = _randn(p + 1, positions, r, dtype=dtype, inside=inside), _randn(n, p, positions, dtype=dtype)
    given = {
        "gram": (_randn(positions, r, n, dtype=dtype, inside=inside), True),
        "project": (x, basis),
        "reconstruct": (basis, coeff, torch.arange(n)),
    }[op]
    with simulator.settings(statistics=True, check=False) as launches:
        result = getattr(torch.ops.rmm_kernels, op).cuda(*given)
    (run,) = launches
    rows = [row for row in run["regions"] if row["sectors"] >= 16]
    assert all(row["ideal_sectors"] >= 0.9 * row["sectors"] for row in rows), rows
    assert run["shared"]["wavefronts"] <= 1.2 * run["shared"]["ideal_wavefronts"]
    floor = sum(tensor.nbytes for tensor in (*given, result) if isinstance(tensor, torch.Tensor))
    if op != "reconstruct":
        assert cuda_counts.SECTOR * sum(row["sectors"] for row in rows) <= 1.05 * floor


@pytest.mark.parametrize("inside", [False, True], ids=["ranks", "positions"])
def test_predicted_time_of_16_by_8(inside: bool) -> None:
    """A prediction for an H100, not a measurement: at most three times what moving the bytes would take."""
    assert cuda_counts.count(Case(16, 8, inside=inside)).floors <= 3
