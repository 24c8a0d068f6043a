"""Measure launch parameters of the Triton forward on this GPU and write a table: `python -m benchmarks.tune -o FILE`.

The table holds rows as `rmm_kernels.triton_ops.lora.TABLE` does; `lora.use(lora.load(FILE))` puts it before that.
`--dry-run` needs no GPU: it compiles every candidate for `--arch` and says which spill or take too much shared memory,
as none should that is to be timed; `--list` only counts the candidates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import triton

from benchmarks import aot
from rmm_kernels.triton_ops import lora, lora_expand, lora_shrink
from rmm_kernels.triton_ops.lora import Config, Row

BUCKETS = (1, 4, 16, 32, 64, 256, 1024, 2047, 8192)


def candidates(op: str, arch: str, r: int, p: int, tokens: int, width: int) -> list[Config]:
    """The shipped parameters first, and their neighbours that fit the arch's shared memory."""
    shipped = lora.configure(op, arch, r, p, tokens, width, 2)
    programs = (64, 128, 256) if op == "shrink" else (shipped.programs,)
    found = [shipped]
    for block_t, block_d, warps, stages, count in product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), programs):
        config = replace(shipped, block_t=block_t, block_d=block_d, num_warps=warps, num_stages=stages, programs=count)
        fits = lora.shared_bytes(op, config, p, 2) <= lora.SHARED.get(arch, lora.LEAST_SHARED)
        if fits and block_t <= max(16, 2 * tokens) and config not in found:
            found.append(config)
    return found


def problems(
    ranks: list[int], components: list[int], widths: list[int], tokens: Sequence[int] = BUCKETS
) -> Iterator[tuple[int, int, int, int]]:
    """(tokens, r, p, width), the smallest first, as the table's rows must stand."""
    return ((t, r, p, d) for r, p, d, t in product(sorted(ranks), sorted(components), sorted(widths), sorted(tokens)))


def call_of(
    op: str, config: Config, tokens: int, r: int, p: int, width: int, device: str, n: int = 256
) -> Callable[[], object]:
    """The kernel on bf16 tensors of these sizes; half of the tokens in runs of one task. On the CPU nothing is filled in."""

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        made = torch.empty(*shape, device=device, dtype=dtype)
        return made if device == "cpu" else made.normal_()

    ids = torch.arange(tokens, device=device) % n
    ids[: tokens // 2] = 0
    basis, coeff = randn(p + 1, r, width), randn(n, p, width)
    if op == "shrink":
        x = randn(tokens, width)
        return lambda: lora_shrink.lora_shrink(x, basis, coeff, ids, config)
    y, u, scaling = randn(tokens, width), randn(tokens, r, dtype=torch.float32), torch.ones(n, device=device)
    basis = basis.mT.contiguous()
    return lambda: lora_expand.lora_expand_(y, u, basis, coeff, ids, scaling, config)


def seconds(op: str, config: Config, tokens: int, r: int, p: int, width: int) -> float:
    """Median of a CUDA graph's replays on this GPU."""
    call = call_of(op, config, tokens, r, p, width, "cuda")
    return float(triton.testing.do_bench_cudagraph(call, return_mode="median")) * 1e-3


def compiled(op: str, config: Config, arch: str, tokens: int, r: int, p: int, width: int) -> dict[str, int]:
    """Registers, spills and shared memory of the candidate's kernel, compiled for `arch`."""
    what = aot.launches(call_of(op, config, tokens, r, p, width, "cpu"), arch)[0]  # after shrink come the sums
    return aot.resources(aot.compiled(what, arch))


def rehearse(op: str, arch: str, tokens: int, r: int, p: int, width: int) -> int:
    """Compiles every candidate of a problem and prints a row for each; returns how many are not fit to be timed."""
    unfit = 0
    for config in candidates(op, arch, r, p, tokens, width):
        found = compiled(op, config, arch, tokens, r, p, width)
        fits = found["spills"] == 0 and found["shared"] <= lora.SHARED.get(arch, lora.LEAST_SHARED)
        unfit += not fits
        print(f"{'ok   ' if fits else 'UNFIT'} {found} {config}")
    return unfit


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="the table's file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--components", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=BUCKETS)
    parser.add_argument("--arch", default="sm_80", help="what --dry-run compiles for: sm_80, sm_90, gfx942, … (sm_80)")
    parser.add_argument("--dry-run", action="store_true", help="compile every candidate, without a GPU, and run nothing")
    parser.add_argument("--list", action="store_true", help="count the candidates, and compile nothing")
    arguments = parser.parse_args()
    without_gpu = arguments.dry_run or arguments.list
    if not without_gpu and (arguments.output is None or not torch.cuda.is_available()):
        print("no GPU: nothing can be tuned here" if arguments.output else "-o FILE is needed", file=sys.stderr)
        return 1
    arch = arguments.arch if without_gpu else lora.arch(torch.device("cuda"))
    rows = []
    unfit = 0
    every = problems(arguments.ranks, arguments.components, arguments.widths, arguments.tokens)
    for (tokens, r, p, width), op in product(every, ("shrink", "expand")):
        tried = candidates(op, arch, r, p, tokens, width)
        if without_gpu:
            print(f"{op} T={tokens} r={r} p={p} d={width} {arch}: {len(tried)} candidates, shipped {tried[0]}")
            if arguments.dry_run:
                unfit += rehearse(op, arch, tokens, r, p, width)
            continue
        best = min(tried, key=lambda config: seconds(op, config, tokens, r, p, width))
        rows.append(Row(op, 2, best, arch, r, p, tokens, width))
        print(f"{op} T={tokens} r={r} p={p} d={width}: {best}")
    if arguments.dry_run:
        print(f"{unfit} unfit candidates")
    if rows:
        lora.save(rows, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
