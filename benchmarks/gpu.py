"""The forward and compress on this GPU beside their peers: what benchmarks/gpu.sh runs after the tests.

Times are medians of CUDA-graph replays, the L2 cache overwritten before each. A peer that a graph can't hold (it waits for the
GPU) is timed by events instead, and the table says so. Before it is timed, every result is compared with the reference's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

import rmm_kernels
from rmm_kernels import reference

RESULTS = Path(__file__).resolve().parent / "results"
REPLAYS = 30
FORWARD = [(1, 64), (8, 64), (64, 64), (64, 1000), (256, 8), (256, 1000), (4096, 8)]  # tokens, tasks
COMPRESS = [(16, 8), (16, 20), (32, 8), (64, 8), (16, 64)]  # r, n
WIDTH, COMPONENTS, POSITIONS = 4096, 4, 100_000


Call = Callable[[], Any]


def forward_inputs(tokens: int, n: int, r: int, device: str, width: int = WIDTH) -> tuple[Tensor, ...]:
    """Arguments of lora_forward_, bf16; many tokens in order of their tasks, few in none."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, over: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) / over).to(device, torch.bfloat16)

    p = COMPONENTS
    ids = torch.randint(0, n, (tokens,), generator=generator)
    return (
        randn(tokens, width),
        randn(tokens, width),
        randn(p + 1, r, width, over=((p + 1) * width) ** 0.5),
        randn(n, p, width),
        randn(p + 1, width, r, over=((p + 1) * r) ** 0.5),
        randn(n, p, width),
        (ids.sort().values if tokens > 256 else ids).to(device),
        (torch.rand(n, generator=generator) + 0.5).to(device),
    )


def restored(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Every task's own (lora_a [n, r, in], lora_b [n, out, r])."""
    _, _, basis_a, coeff_a, basis_b, coeff_b, _, _ = arguments
    every = torch.arange(len(coeff_a), device=coeff_a.device)
    lora_a = reference.reconstruct(basis_a.mT, coeff_a, every).mT.contiguous()
    return lora_a, reference.reconstruct(basis_b, coeff_b, every).contiguous()


def gather_bmm(arguments: tuple[Tensor, ...], factors: tuple[Tensor, Tensor]) -> Call:
    y, x, *_, ids, scaling = arguments
    lora_a, lora_b = factors

    def call() -> Tensor:
        u = torch.bmm(lora_a[ids], x[:, :, None])
        return y.add_(torch.bmm(lora_b[ids], u)[:, :, 0] * scaling[ids, None].to(y.dtype))

    return call


def vllm(arguments: tuple[Tensor, ...], factors: tuple[Tensor, Tensor]) -> Call:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    y, x, *_, ids, _ = arguments
    lora_a, lora_b = factors
    meta = LoRAKernelMeta.make(len(lora_a), len(x), device=x.device)
    meta.prepare_tensors(ids.int())
    u = torch.zeros(1, len(x), lora_a.shape[1], dtype=torch.float32, device=x.device)
    how = meta.meta_args(len(x), False)

    def call() -> None:
        lora_shrink(x, [lora_a], u, *how, 1.0)
        lora_expand(u, [lora_b], y, *how, offset_start=0, add_inputs=True)

    return call


def sglang(arguments: tuple[Tensor, ...], factors: tuple[Tensor, Tensor]) -> Call:
    """SGLang's segmented kernels; tokens that follow one another with one task are a segment, as a request's are there."""
    from sglang.srt.lora.triton_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd
    from sglang.srt.lora.utils import LoRABatchInfo

    y, x, *_, ids, scaling = arguments
    lora_a, lora_b = factors
    tasks, lengths = ids.unique_consecutive(return_counts=True)
    known = {
        "use_cuda_graph": True,
        "bs": len(tasks),
        "num_segments": len(tasks),
        "seg_lens": lengths.int(),
        "seg_indptr": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
        "weight_indices": tasks.int(),
        "max_len": int(lengths.max()),
        "lora_ranks": torch.full((len(lora_a),), lora_a.shape[1], dtype=torch.int32, device=x.device),
        "scalings": scaling,
        "permutation": None,
    }
    # Fields come and go with its versions; those without a default are all among these.
    info = LoRABatchInfo(**{field.name: known[field.name] for field in fields(LoRABatchInfo) if field.name in known})

    def call() -> Tensor:
        return sgemm_lora_b_fwd(sgemm_lora_a_fwd(x, lora_a, info), lora_b, info, y)

    return call


def compress_svd(x: Tensor) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        matrices = x.permute(1, 2, 0)
        mean = matrices.mean(-1, keepdim=True)
        u, s, vh = torch.linalg.svd(matrices - mean, full_matrices=False)
        return u[..., :COMPONENTS], s[:, :COMPONENTS, None] * vh[:, :COMPONENTS]

    return call


def cold(call: Call) -> dict[str, Any]:
    """Seconds of one call, the L2 cache cold; as a graph where it can be one."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    run, how = call, "events"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run, how = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
    taken = []
    for _ in range(REPLAYS):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) * 1e-3)
    return {"seconds": median(taken), "how": how}


def attempt(make: Callable[[], Call]) -> dict[str, Any]:
    """Another one's kernel, or why it was not timed."""
    try:
        return cold(make())
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def check_forward(arguments: tuple[Tensor, ...]) -> None:
    """Close to the reference in fp32."""
    y, *rest = (value.clone() for value in arguments)
    expected = y.float()
    reference.lora_forward_(expected, *(value.float() if value.is_floating_point() else value for value in rest))
    rmm_kernels.lora_forward_(y, *rest)
    assert (y.float() - expected).norm() <= 1e-2 * expected.norm(), "lora_forward_ is wrong: nothing is timed"


def check_compress(x: Tensor) -> None:
    """Restores x as well as the best basis does."""
    basis, coeff, energy = rmm_kernels.compress(x, COMPONENTS)
    error = (x - reference.reconstruct(basis, coeff, torch.arange(len(x), device=x.device))).square().sum((0, 2))
    best = energy[:, COMPONENTS:].sum(1)
    assert (error <= best * 1.01 + 1e-9 * energy.sum(1)).all(), "compress is wrong: nothing is timed"


def measure() -> dict[str, Any]:
    rows = []
    for r in (16, 64):
        for tokens, n in FORWARD:
            arguments = forward_inputs(tokens, n, r, "cuda")
            check_forward(arguments)
            factors = restored(arguments)
            row = {"op": "lora_forward_", "shape": f"T={tokens} n={n} r={r} p={COMPONENTS} d={WIDTH} bf16"}
            row["ours"] = cold(lambda a=arguments: rmm_kernels.lora_forward_(*a))
            row["gather + bmm"] = attempt(lambda a=arguments, f=factors: gather_bmm(a, f))
            for name, make in (("vllm", vllm), ("sglang", sglang)):
                if importlib.util.find_spec(name):
                    row[name] = attempt(lambda make=make, a=arguments, f=factors: make(a, f))
            rows.append(row)
    for r, n in COMPRESS:
        x = torch.randn(n, POSITIONS, r, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        check_compress(x)
        row = {"op": "compress", "shape": f"{POSITIONS} of {r}x{n} p={COMPONENTS} fp32"}
        row["ours"] = cold(lambda x=x: rmm_kernels.compress(x, COMPONENTS))
        row["torch.linalg.svd"] = attempt(lambda x=x: compress_svd(x))
        rows.append(row)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "backends": {op: found["cuda"] for op, found in rmm_kernels.backends().items()},
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}", ""]
    lines += ["| | ours, µs | peer | its, µs | × |", "|---|--:|---|--:|--:|"]
    for row in result["rows"]:
        mine = row["ours"]["seconds"]
        for name, found in row.items():
            if name in ("op", "shape", "ours"):
                continue
            cells = f"{name} | {found.get('error', '')} | |"
            if "seconds" in found:
                note = "" if found["how"] == "graph" else " (events)"
                cells = f"{name}{note} | {1e6 * found['seconds']:.1f} | {found['seconds'] / mine:.2f} |"
            lines.append(f"| {row['op']} {row['shape']} | {1e6 * mine:.1f} | {cells}")
    return "\n".join(lines)


def rehearse() -> None:
    """What `measure` does to inputs and results, small, on the CPU, with nothing timed."""
    for tokens, n in ((1, 4), (300, 2)):
        arguments = forward_inputs(tokens, n, 16, "cpu", width=64)
        check_forward(arguments)
        factors = restored(arguments)
        y = arguments[0].clone()
        gather_bmm((y, *arguments[1:]), factors)()
        rmm_kernels.lora_forward_(*arguments)
        assert (y.float() - arguments[0].float()).norm() <= 2e-2 * arguments[0].float().norm()
    x = torch.randn(8, 50, 16, generator=torch.Generator().manual_seed(0))
    check_compress(x)
    compress_svd(x)()
    timed = {"seconds": 0.0, "how": "graph"}
    row = {"op": "lora_forward_", "shape": "rehearsal", "ours": {**timed, "seconds": 1.0}, "peer": timed}
    table({"gpu": "none", "torch": torch.__version__, "triton": triton.__version__, "rows": [row]})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="say whether there is a GPU, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="everything but the GPU's part")
    arguments = parser.parse_args()
    if arguments.dry_run:
        rehearse()
        print("dry run: inputs, checks, peers and table are in order; nothing was timed")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to measure (--dry-run does everything else)", file=sys.stderr)
        return 1
    if arguments.check:
        return 0
    result = measure()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{'-'.join(re.findall(r'[a-z0-9]+', result['gpu'].lower()))}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
