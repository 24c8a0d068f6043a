"""CUDA kernels in the simulator: every mapping under permuted schedules, and that planted bugs are caught."""

from __future__ import annotations

import pytest
import simulator
import torch
from ops import assert_same_bits, randn

pytestmark = pytest.mark.skipif(not simulator.ops(), reason="nvcc is not on PATH")

# (n, S, r, p) of each mapping of compress: a thread, 2 and 4 lanes, 8 lanes (tall, wide), a warp with 2 or 1 lanes a column;
# tasks in chunks by 8 lanes, by a warp with one column a lane or two; a block, tall and wide.
COMPRESS = [
    (8, 70, 16, 4),
    (8, 70, 32, 4),
    (8, 37, 64, 4),
    (5, 33, 37, 6),
    (9, 40, 12, 12),
    (9, 9, 64, 4),
    (20, 19, 16, 4),
    (20, 3, 32, 25),
    (34, 9, 40, 5),
    (70, 18, 15, 4),
    (73, 9, 18, 3),
    (137, 5, 34, 3),
    (67, 2, 70, 3),
    (70, 2, 66, 4),
]
SVD = [(19, 16, 8, 4), (5, 8, 20, 8), (3, 24, 20, 20), (2, 36, 40, 6), (2, 70, 66, 3), (2, 66, 70, 3)]
LARGE = ["compress-67x70", "compress-70x66-positions-inside", "truncated_svd-70x66", "truncated_svd-66x70"]


def cases() -> dict[str, tuple[str, tuple[object, ...]]]:
    given: dict[str, tuple[str, tuple[object, ...]]] = {}
    for n, positions, r, p in COMPRESS:
        x = randn(n, positions, r, seed=n)
        given[f"compress-{n}x{r}"] = ("compress", (x, p))
        given[f"compress-{n}x{r}-positions-inside"] = ("compress", (x.mT.contiguous().mT, p))
    for batch, m, k, rank in SVD:
        given[f"truncated_svd-{m}x{k}"] = ("truncated_svd", (randn(batch, m, k, seed=m), rank))
    given["gram"] = ("gram", (randn(9, 20, 12, seed=1), True))
    basis, coeff = randn(4, 37, 16, seed=2), randn(5, 3, 37, seed=3)
    given["project"] = ("project", (randn(5, 37, 16, seed=4), basis))
    given["reconstruct"] = ("reconstruct", (basis, coeff, torch.tensor([4, 0, 2])))
    return given


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_schedules(name: str) -> None:
    """Bitwise the same result in whatever order blocks and warps run."""
    op, given = CASES[name]
    simulator.load()
    kernel = getattr(torch.ops.rmm_kernels, op).cuda

    def run(seed: int) -> tuple[torch.Tensor, ...]:
        with simulator.settings(seed=seed):
            result = kernel(*given)
        return (result,) if isinstance(result, torch.Tensor) else result

    expected = run(0)
    for seed in (1, 2, 3):
        assert_same_bits(run(seed), expected)


@pytest.mark.parametrize("name", LARGE)
def test_workspace(name: str) -> None:
    """A block whose shared memory does not hold all columns brings them in again; without room for the core, that is in global
    memory: the same bits."""
    op, given = CASES[name]
    simulated = simulator.load()
    kernel = getattr(torch.ops.rmm_kernels, op).cuda
    results, launches = [], []
    try:
        for kibibytes in (163, 32, 16):
            simulated.device(80, kibibytes * 1024)
            with simulator.settings(statistics=True) as runs:
                results.append(kernel(*given))
            launches.append({(run["kernel"], run["shared_bytes"]) for run in runs if "large" in run["kernel"]})
    finally:
        simulated.device(80, 163 * 1024)
    for result in results[1:]:
        assert_same_bits(result, results[0])
    whole, resident, outside = launches
    assert whole != resident and {name for name, _ in resident} != {name for name, _ in outside}


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("compress", "truncated_svd")) and "inside" not in name]
)
def test_info(name: str) -> None:
    """In every mapping: NaN in a matrix's energy (σ) says that it is not finite, and nothing else does, however large."""
    op, (x, count) = CASES[name]
    x = x.movedim(1, 0) if op == "compress" else x  # matrices first
    x = x.repeat(2, 1, 1)[: max(3, len(x))]
    x[0, -1, 0], x[-1, 0, -1] = torch.nan, -torch.inf
    x[1] *= 3e38 / x[1].abs().max()
    simulator.load()
    found = getattr(torch.ops.rmm_kernels, op).cuda(x.movedim(0, 1) if op == "compress" else x, count)
    flag = found[2 if op == "compress" else 1].isnan()
    assert flag[[0, -1]].all() and not flag[1:-1].any()


BUGS = {
    "missing barrier between threads of a block": (
        "gram.cu",
        "gram.cu",
        "    __syncthreads();\n    if (args.center)",
        "    if (args.center)",
        "gram",
        "data race|never written",
    ),
    "next chunk of tasks brought in while the last one is used": (
        "compress_streamed.cu",
        "tile.cuh",
        "    __syncthreads();  // the last chunk is used\n",
        "",
        "compress-73x18",
        "data race",
    ),
    "missing barrier between lanes of a warp": (
        "truncated_svd.cu",
        "team.cuh",
        "    order[rank] = c;\n  }\n  team.sync();",
        "    order[rank] = c;\n  }",
        "truncated_svd-24x20",
        "data race|never written",
    ),
    "next reflection made while the last one is applied": (
        "compress_large.cu",
        "large.cuh",
        "    __syncthreads();\n    if (c <= j",
        "    if (c <= j",
        "compress-70x66",
        "data race|never written",
    ),
    "missing barrier between rounds of rotations": (
        "compress_large.cu",
        "large.cuh",
        "turn.shorter;\n      }\n      team.sync();",
        "turn.shorter;\n      }",
        "compress-67x70",
        "data race|never written",
    ),
    "tile read before all of it is there": (
        "turn.cu",
        "turn.cu",
        "    __syncthreads();\n    with_dtype(to.dtype",
        "    with_dtype(to.dtype",
        "compress-70x66-positions-inside",
        "data race|never written",
    ),
    "column sent to the wrong group": (
        "truncated_svd.cu",
        "team.cuh",
        "(last ? 0 : group + 1) * T::kGroup",
        "(last ? 1 : group + 1) * T::kGroup",
        "truncated_svd-24x20",
        None,
    ),
    "tile one position too long": (
        "project.cu",
        "project.cu",
        "left < kPositions ? static_cast<int>(left) : kPositions;",
        "left < kPositions ? static_cast<int>(left) + 1 : kPositions;",
        "project",
        "out of bounds|outside",
    ),
    "mask that lets threads past the end through": (
        "reconstruct.cu",
        "reconstruct.cu",
        "if (index >= inner_size * args.out.size[args.outer]) return;",
        "if (index > inner_size * args.out.size[args.outer]) return;",
        "reconstruct",
        "out of bounds|outside",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs(bug: str) -> None:
    """By a check of the simulator; by a wrong result where no check is named."""
    file, source, old, new, name, message = BUGS[bug]
    op, given = CASES[name]
    simulator.load()
    kernel = getattr(torch.ops.rmm_kernels, op).cuda
    if message is None:
        expected = kernel(*given)
        with simulator.planted(file, source, old, new):
            assert not torch.allclose(kernel(*given)[1], expected[1], rtol=1e-3)
        return
    with simulator.planted(file, source, old, new), pytest.raises(RuntimeError, match=message):
        kernel(*given)
