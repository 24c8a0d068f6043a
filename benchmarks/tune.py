"""Measure launch parameters of the Triton forward on this GPU and write a table: `python -m benchmarks.tune -o FILE`.

The table holds rows as `rmm_kernels.triton_ops.lora.TABLE` does; `lora.use(lora.load(FILE))` puts it before that.
`--dry-run` compiles nothing and needs no GPU: it lists what would be tried.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import triton

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


def problems(ranks: list[int], components: list[int], widths: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(tokens, r, p, width), the smallest first, as the table's rows must stand."""
    return ((t, r, p, d) for r, p, d, t in product(sorted(ranks), sorted(components), sorted(widths), BUCKETS))


def seconds(op: str, config: Config, tokens: int, r: int, p: int, width: int, n: int = 256) -> float:
    """Median of a CUDA graph's replays on this GPU; half of the tokens in runs of one task."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    ids = torch.arange(tokens, device="cuda") % n
    ids[: tokens // 2] = 0
    basis, coeff = randn(p + 1, r, width), randn(n, p, width)
    if op == "shrink":
        x = randn(tokens, width)

        def call() -> object:
            return lora_shrink.lora_shrink(x, basis, coeff, ids, config)

    else:
        y, u = randn(tokens, width), torch.randn(tokens, r, device="cuda")
        scaling = torch.ones(n, device="cuda")

        def call() -> object:
            return lora_expand.lora_expand_(y, u, basis.mT.contiguous(), coeff, ids, scaling, config)

    return float(triton.testing.do_bench_cudagraph(call, return_mode="median")) * 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="the table's file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--components", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[4096])
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried on an sm_80, and run nothing")
    arguments = parser.parse_args()
    if not arguments.dry_run and (arguments.output is None or not torch.cuda.is_available()):
        print("no GPU: nothing can be tuned here" if arguments.output else "-o FILE is needed", file=sys.stderr)
        return 1
    arch = "sm_80" if arguments.dry_run else lora.arch(torch.device("cuda"))
    rows = []
    for (tokens, r, p, width), op in product(
        problems(arguments.ranks, arguments.components, arguments.widths), ("shrink", "expand")
    ):
        tried = candidates(op, arch, r, p, tokens, width)
        if arguments.dry_run:
            print(f"{op} T={tokens} r={r} p={p} d={width}: {len(tried)} candidates, shipped {tried[0]}")
            continue
        best = min(tried, key=lambda config: seconds(op, config, tokens, r, p, width))
        rows.append(Row(op, 2, best, arch, r, p, tokens, width))
        print(f"{op} T={tokens} r={r} p={p} d={width}: {best}")
    if rows:
        lora.save(rows, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
