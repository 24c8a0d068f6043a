"""What the Triton forward must move and compute, and from that how long it should take: predictions, nothing measured.

    python -m benchmarks.gpu_model

prints predicted times on A100, H100, H200 and B200, and the predicted ratio to SGMV on restored adapters, as Markdown.

A kernel's traffic is counted twice: what its programs request, tile by tile, which the L2 cache must deliver and which
tests compare with the simulator's counters; and what must come from memory, every tensor once. A kernel takes the longest of
both and of its arithmetic on tensor cores, plus a launch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from rmm_kernels.triton_ops import lora, lora_forward, lora_shrink
from rmm_kernels.triton_ops.lora import Config

ID = 8  # bytes of a task id
SUM = 4  # of a value of u


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 tensor throughput and memory bandwidth as the data sheets give them; L2 bandwidth as others have measured it,
    rounded; `launch` is a kernel inside a CUDA graph that does nothing, from the end of the one before."""

    name: str
    arch: str
    memory: float  # bytes per second
    l2: float
    flops: float
    launch: float = 1.5e-6


GPUS = (
    Gpu("A100 80GB SXM", "sm_80", 2.04e12, 4.5e12, 312e12),
    Gpu("H100 SXM", "sm_90", 3.35e12, 5.7e12, 989e12),
    Gpu("H200", "sm_90", 4.8e12, 5.7e12, 989e12),
    Gpu("B200", "sm_100", 8.0e12, 10e12, 2250e12),
)


@dataclass(frozen=True)
class Work:
    """Of one kernel: bytes its programs request, bytes from and to memory, tensor-core operations."""

    requested: int
    memory: int
    flops: int

    def seconds(self, gpu: Gpu) -> float:
        return gpu.launch + max(self.requested / gpu.l2, self.memory / gpu.memory, self.flops / gpu.flops)


@dataclass(frozen=True)
class Batch:
    """A batch of the mixed forward on one layer.

    Attributes:
        tokens, r, p, width_in, width_out, itemsize: sizes; `itemsize` is 2 for fp16 and bf16.
        active: tokens that have a task.
        tasks: distinct tasks among them.
        uniform: every tile of tokens holds one task only (and is rebuilt, where the kernel can).
    """

    tokens: int
    r: int
    p: int
    width_in: int
    width_out: int
    active: int
    tasks: int
    uniform: bool = False
    itemsize: int = 2

    def tiles(self, config: Config) -> int:
        return -(-self.tokens // config.block_t)

    def coefficients(self, config: Config, width: int) -> int:
        """Bytes of coefficients that one pass over the tokens requests."""
        rows = self.tiles(config) if self.uniform and config.adaptive else self.active
        return rows * self.p * width * self.itemsize

    def products(self, config: Config, width: int) -> int:
        """Tensor-core operations, of whole tiles."""
        times = 1 if self.uniform and config.adaptive else self.p + 1
        ranks = -(-self.r // config.block_r) * config.block_r
        return 2 * times * self.tiles(config) * config.block_t * ranks * width


def shrink(batch: Batch, config: Config) -> Work:
    """x [T, in] to the spans' sums [splits, T, r]."""
    splits = lora_shrink.splits(config, batch.tokens, batch.r, batch.width_in)
    passes = -(-batch.r // config.block_r)
    basis = (batch.p + 1) * batch.r * batch.width_in * batch.itemsize
    x = batch.active * batch.width_in * batch.itemsize
    sums = splits * batch.active * batch.r * SUM
    coefficients = batch.tasks * batch.p * batch.width_in * batch.itemsize
    return Work(
        requested=batch.tiles(config) * basis
        + passes * (x + batch.coefficients(config, batch.width_in) + splits * batch.tokens * ID)
        + sums,
        memory=basis + x + coefficients + batch.tokens * ID,
        flops=batch.products(config, batch.width_in),
    )


def add(batch: Batch, splits: int) -> Work:
    """The spans' sums [splits, T, r] to u [T, r], all of it in the L2 cache."""
    return Work((splits + 1) * batch.active * batch.r * SUM + batch.tokens * ID, 0, 0)


def expand(batch: Batch, config: Config, splits: int) -> Work:
    """y [T, out] += of u in `splits` spans."""
    columns = -(-batch.width_out // config.block_d)
    passes = -(-batch.r // config.block_r)
    basis = (batch.p + 1) * batch.r * batch.width_out * batch.itemsize
    y = 2 * batch.active * batch.width_out * batch.itemsize
    coefficients = batch.tasks * batch.p * batch.width_out * batch.itemsize
    return Work(
        requested=batch.tiles(config) * basis
        + y
        + passes * batch.coefficients(config, batch.width_out)
        + columns * (splits * batch.active * batch.r * SUM + batch.active * SUM + batch.tokens * ID),
        memory=basis + y + coefficients + batch.tokens * ID,
        flops=batch.products(config, batch.width_out),
    )


def configs(batch: Batch, arch: str) -> tuple[Config, Config]:
    sizes = (batch.r, batch.p, batch.tokens)
    return (
        lora.configure("shrink", arch, *sizes, batch.width_in, batch.itemsize),
        lora.configure("expand", arch, *sizes, batch.width_out, batch.itemsize),
    )


def kernels(batch: Batch, first: Config, second: Config) -> dict[str, Work]:
    """What lora_forward_ launches for `batch` with these parameters of shrink and of expand, by kernel."""
    splits = lora_shrink.splits(first, batch.tokens, batch.r, batch.width_in)
    if lora_forward.adds_first((splits, batch.tokens, batch.r), batch.width_out, second):
        return {"shrink": shrink(batch, first), "sum": add(batch, splits), "expand": expand(batch, second, 1)}
    return {"shrink": shrink(batch, first), "expand": expand(batch, second, splits)}


def seconds(batch: Batch, gpu: Gpu) -> float:
    return sum(work.seconds(gpu) for work in kernels(batch, *configs(batch, gpu.arch)).values())


def sgmv(batch: Batch, gpu: Gpu) -> float:
    """Two kernels on restored adapters, at their best: each active task's factors, x and y once; u in fp32 once each way.

    Tokens of one task together in tiles of 16 rows, as tensor cores take them; sorting them is not counted.
    """
    rows = 16 * max(batch.tasks, -(-batch.active // 16))

    def half(width: int, tokens: int) -> Work:
        moved = (batch.tasks * batch.r + tokens * batch.active) * width * batch.itemsize + batch.active * batch.r * SUM
        return Work(moved, moved, 2 * rows * batch.r * width)

    return half(batch.width_in, 1).seconds(gpu) + half(batch.width_out, 2).seconds(gpu)


TOKENS = (1, 4, 16, 64, 256)
TASKS = (1, 10, 100, 1000)
RANKS = (16, 64)
COMPONENTS = (2, 4, 8)


def decode(tokens: int, n: int, r: int, p: int, d: int = 4096) -> Batch:
    """Tokens spread over n tasks in no order: as many distinct ones as a uniform draw has on average."""
    return Batch(tokens, r, p, d, d, tokens, max(1, round(n * (1 - (1 - 1 / n) ** tokens))))


def times() -> Iterator[str]:
    yield "Predicted time of `lora_forward_`, µs, d = 4096, bf16, in a CUDA graph (a model, not a measurement):"
    yield ""
    yield "| T, distinct tasks | r | p | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    yield "|---|--:|--:|" + "--:|" * len(GPUS)
    for r, p in ((16, 4), (64, 4)):
        batches = {f"{t}, {decode(t, 1000, r, p).tasks}": decode(t, 1000, r, p) for t in TOKENS}
        batches["4096 in order, 8"] = Batch(4096, r, p, 4096, 4096, 4096, 8, uniform=True)
        for label, batch in batches.items():
            cells = " | ".join(f"{1e6 * seconds(batch, gpu):.1f}" for gpu in GPUS)
            yield f"| {label} | {r} | {p} | {cells} |"


def ratios(gpu: Gpu) -> Iterator[str]:
    yield f"Predicted time of SGMV on restored adapters by that of `lora_forward_`, {gpu.name}, d = 4096, bf16 (a model, not a"
    yield "measurement); **bold** where SGMV wins:"
    yield ""
    pairs = list(product(TOKENS, TASKS))
    yield "| r | p | " + " | ".join(f"T={t} n={n}" for t, n in pairs) + " |"
    yield "|--:|--:|" + "--:|" * len(pairs)
    for r, p in product(RANKS, COMPONENTS):
        found = [(sgmv(batch, gpu) / seconds(batch, gpu)) for batch in (decode(t, n, r, p) for t, n in pairs)]
        yield f"| {r} | {p} | " + " | ".join(f"{x:.2f}" if x >= 1 else f"**{x:.2f}**" for x in found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="H100 SXM", choices=[gpu.name for gpu in GPUS], help="for the ratios (H100 SXM)")
    gpu = next(gpu for gpu in GPUS if gpu.name == parser.parse_args().gpu)
    print("\n".join((*times(), "", *ratios(gpu))))


if __name__ == "__main__":
    main()
