"""The forward and compress on this GPU beside their peers: what benchmarks/gpu.sh runs after the tests.

Times are medians of CUDA-graph replays, the L2 cache overwritten before each. A peer that a graph can't hold (it waits for the
GPU) is timed by events instead, and the table says so. Before it is timed, every result is compared with the reference's.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
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


def accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that `function` has: other projects' versions add and drop some."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def vllm(arguments: tuple[Tensor, ...], factors: tuple[Tensor, Tensor]) -> Call:
    """vLLM's kernels as its punica wrapper calls them (0.33), the tasks' scaling in lora_b, where its loader puts it."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    y, x, *_, ids, scaling = arguments
    lora_a, lora_b = factors
    lora_b = lora_b * scaling[:, None, None].to(lora_b.dtype)
    meta = LoRAKernelMeta.make(len(lora_a), len(x), device=x.device)
    meta.prepare_tensors(ids.int())
    u = torch.zeros(1, len(x), lora_a.shape[1], dtype=torch.float32, device=x.device)
    how = meta.meta_args(**accepted(meta.meta_args, token_nums=len(x), specialize_active_lora=True))

    def call() -> None:
        lora_shrink(x, [lora_a], u, *how, 1.0)
        lora_expand(u, [lora_b], y, *how, offset_start=0, add_inputs=True)

    return call


def sglang_kernel(file: str, name: str) -> Any:
    """From where the installed version keeps it: 0.5.23 in a module each, older ones all together."""
    try:
        module = importlib.import_module(f"sglang.kernels.ops.lora.dense.{file}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sglang"):
            raise
        module = importlib.import_module("sglang.srt.lora.triton_ops")
    return getattr(module, name)


def sglang(arguments: tuple[Tensor, ...], factors: tuple[Tensor, Tensor]) -> Call:
    """SGLang's default backend (csgmv, 0.5.23): tokens sorted by task, which is not timed, and cut into its chunks of 16."""
    from sglang.srt.lora.utils import LoRABatchInfo

    shrink = sglang_kernel("chunked_sgmv_shrink", "chunked_sgmv_lora_shrink_forward")
    expand = sglang_kernel("chunked_sgmv_expand", "chunked_sgmv_lora_expand_forward")
    y, x, *_, ids, scaling = arguments
    lora_a, lora_b = factors
    chunk, out = 16, lora_b.shape[1]
    order = ids.argsort(stable=True)
    tasks, lengths = ids[order].unique_consecutive(return_counts=True)
    chunks = (lengths + chunk - 1) // chunk
    first = chunks.cumsum(0) - chunks  # of each task
    within = torch.arange(int(chunks.sum()), device=x.device) - first.repeat_interleave(chunks)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(chunks) + chunk * within
    info = LoRABatchInfo(
        **accepted(
            LoRABatchInfo,
            use_cuda_graph=True,
            bs=len(begins),
            num_segments=len(begins),
            seg_indptr=torch.cat([begins, begins.new_tensor([len(x)])]).int(),
            weight_indices=tasks.repeat_interleave(chunks).int(),
            lora_ranks=torch.full((len(lora_a),), lora_a.shape[1], dtype=torch.int32, device=x.device),
            scalings=scaling,
            max_len=chunk,
            seg_lens=None,
            permutation=order.int(),
        )
    )
    offsets = torch.tensor([0, out], dtype=torch.int32)
    more = accepted(expand, slice_offsets_cpu=offsets)
    offsets = offsets.to(x.device)

    def call() -> None:
        expand(shrink(x, lora_a, info, 1), lora_b, info, offsets, out, y, **more)

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
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def check_forward(call: Callable[[tuple[Tensor, ...]], Any], arguments: tuple[Tensor, ...]) -> None:
    """What `call` adds to y is close to what the reference adds in fp32."""
    y, *rest = arguments
    y, expected = y.clone(), y.float()
    reference.lora_forward_(expected, *(value.float() if value.is_floating_point() else value for value in rest))
    call((y, *rest))
    error, size = float((y.float() - expected).norm()), float((expected - arguments[0].float()).norm())
    assert error <= 2e-2 * size, f"the forward is wrong by {error / size:.2g} of what it adds: not timed"


Peer = Callable[[tuple[Tensor, ...], tuple[Tensor, Tensor]], Call]


def peer(make: Peer, arguments: tuple[Tensor, ...], factors: tuple[Tensor, Tensor]) -> Call:
    """The peer's forward, checked."""
    check_forward(lambda own: make(own, factors)(), arguments)
    return make(arguments, factors)


def check_compress(x: Tensor) -> None:
    """Restores x as well as the best basis does."""
    basis, coeff, energy = rmm_kernels.compress(x, COMPONENTS)
    error = (x - reference.reconstruct(basis, coeff, torch.arange(len(x), device=x.device))).square().sum((0, 2))
    best = energy[:, COMPONENTS:].sum(1)
    assert (error <= best * 1.01 + 1e-9 * energy.sum(1)).all(), "compress is wrong: nothing is timed"


PEERS: dict[str, Peer] = {"gather + bmm": gather_bmm, "vllm": vllm, "sglang": sglang}


def measure() -> dict[str, Any]:
    rows = []
    for r in (16, 64):
        for tokens, n in FORWARD:
            arguments = forward_inputs(tokens, n, r, "cuda")
            check_forward(lambda own: rmm_kernels.lora_forward_(*own), arguments)
            factors = restored(arguments)
            row = {"op": "lora_forward_", "shape": f"T={tokens} n={n} r={r} p={COMPONENTS} d={WIDTH} bf16"}
            row["ours"] = cold(lambda a=arguments: rmm_kernels.lora_forward_(*a))
            for name, make in PEERS.items():
                if make is gather_bmm or importlib.util.find_spec(name):
                    row[name] = attempt(lambda make=make, a=arguments, f=factors: peer(make, a, f))
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
        check_forward(lambda own: rmm_kernels.lora_forward_(*own), arguments)
        peer(gather_bmm, arguments, restored(arguments))()
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
