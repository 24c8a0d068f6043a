"""PT-SVD's and LoRE's speed and accuracy beside plain torch; OSRM's memory, and its subspaces beside fp64.

    python -m benchmarks.methods pt_svd --adapters ../shared/adapters
    python -m benchmarks.methods lore --adapters ../shared/adapters          (4 minutes; with --check, 7)
    python -m benchmarks.methods osrm --adapters ../shared/adapters

Every run replaces its rows in the output file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rmm_kernels import load_adapter
from rmm_kernels.methods import Settings, covariances, lore_adapters
from rmm_kernels.methods import osrm as initialise
from rmm_kernels.methods.pt_svd import low_rank

from . import osrm as experiment
from .timing import stopwatch

HERE = Path(__file__).resolve().parent


def with_spectrum(m: int, k: int, sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, min(m, k), generator=generator)).Q for size in (m, k))
    return (u * sigma) @ v.mT


def spectra(size: int) -> dict[str, Tensor]:
    index = torch.arange(size).float()
    clusters = (2.0 ** -(index // 8)).clamp(min=1e-4) * (1 - 1e-4 * (index % 8))
    return {"i^-0.25": (index + 1) ** -0.25, "i^-1": 1 / (index + 1), "clustered": clusters}


def deltas(adapters: Path) -> Iterator[tuple[str, Tensor]]:
    """The two full fine-tunes' changes: every layer of a shape, [layers, out, in]."""
    for task in ("desc_pair", "wordnet_supersense"):
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for delta in load_file(adapters / "tasks" / task / "full_delta.safetensors").values():
            by_shape.setdefault(tuple(delta.shape), []).append(delta.float())
        for (m, k), layers in by_shape.items():
            yield f"{task}, {len(layers)} x {m} x {k}", torch.stack(layers)


def pt_svd(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Excess of ‖A − U S Vᵀ‖ over the optimum by ‖A‖, the worst of a batch, and times for the batch."""
    rank = arguments.rank
    matrices = dict(deltas(arguments.adapters)) if arguments.adapters else {}
    for m, k in arguments.sizes:
        for name, sigma in spectra(min(m, k)).items():
            matrices[f"{m} x {k}, {name}"] = with_spectrum(m, k, sigma)[None]
    rows = []
    print(f"| rank {rank} | excess | ms | torch.linalg.svd | × | torch.svd_lowrank(q=2k, niter=4) | our time by its |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, a in matrices.items():
        if not re.search(arguments.only, name):
            continue
        contenders: dict[str, Callable[[], Any]] = {
            "ours": lambda a=a: low_rank(a, rank),
            "svd_lowrank": lambda a=a: torch.svd_lowrank(a, q=2 * rank, niter=4),
            "svd_lowrank, one by one": lambda a=a: [torch.svd_lowrank(x, q=2 * rank, niter=4) for x in a],
        }
        u, s, vh = (part.double() for part in contenders["ours"]())
        torch.linalg.svd(a[0, :200, :200])
        _, full = stopwatch(lambda a=a: torch.linalg.svd(a, full_matrices=False))
        times: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(arguments.rounds):
            for contender, call in contenders.items():
                times[contender].append(stopwatch(call)[1])
        mine = median(times["ours"])
        theirs = min(median(times["svd_lowrank"]), median(times["svd_lowrank, one by one"]))
        wide = a.double()
        short = wide @ wide.mT if a.shape[1] <= a.shape[2] else wide.mT @ wide
        optimum = torch.linalg.eigvalsh(short)[:, :-rank].clamp(min=0).sum(1).sqrt()
        wrong = torch.linalg.matrix_norm(wide - (u * s[:, None]) @ vh)
        excess = float(((wrong - optimum) / torch.linalg.matrix_norm(wide)).max())
        rows.append({"matrix": name, "rank": rank, "excess": excess, "ms": mine * 1e3, "svd_ms": full * 1e3})
        rows[-1] |= {"svd_lowrank_ms": theirs * 1e3, "times_svd": full / mine, "by_svd_lowrank": mine / theirs}
        print(
            f"| {name} | {excess:.1e} | {mine * 1e3:.1f} | {full * 1e3:.0f} | {full / mine:.1f} "
            f"| {theirs * 1e3:.1f} | {mine / theirs:.2f} |",
            flush=True,
        )
    return rows


def plain_lore(theta: Tensor, mu: float, iterations: int) -> Tensor:
    """The published algorithm by full SVDs of dense ΔW [n, out, in], in theta's dtype."""
    delta, shared = torch.zeros_like(theta), theta.mean(0)
    for _ in range(iterations):
        shared = (theta - delta).mean(0)
        u, s, vh = torch.linalg.svd(theta - shared, full_matrices=False)
        delta = (u * (s - mu).clamp(min=0)[:, None]) @ vh
    return shared + delta.mean(0)


def lore(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every module of the rank-16 adapters: our time by that of full SVDs in fp32, or with --check the difference from fp64."""
    paths = sorted(arguments.adapters.glob("tasks/*/lora_r16"))
    adapters = [load_adapter(path, path.parent.name) for path in paths]
    settings = Settings(iterations=arguments.iterations, tolerance=0)
    dtype = torch.float64 if arguments.check else torch.float32
    modules = adapters[0].modules

    def dense() -> dict[str, Tensor]:
        found = {}
        for module in modules:
            factors = [adapter.factors(module) for adapter in adapters]
            theta = torch.stack([f.scaling * (f.lora_b.to(dtype) @ f.lora_a.to(dtype)) for f in factors])
            found[module] = plain_lore(theta, settings.mu, settings.iterations)
        return found

    lore_adapters(adapters, Settings(iterations=1))
    merged, ours = stopwatch(lambda: lore_adapters(adapters, settings))
    expected, theirs = stopwatch(dense)
    worst = 0.0
    for module, full in expected.items():
        factors = merged.factors[module]
        got = factors.scaling * (factors.lora_b.double() @ factors.lora_a.double())
        worst = max(worst, float((got - full).norm() / full.norm()))
    falls = all(b <= a * (1 + 1e-12) for a, b in pairwise(merged.objective))
    row = {"plain": str(dtype).removeprefix("torch."), "modules": len(modules), "tasks": len(paths)}
    row |= {"iterations": settings.iterations, "difference": worst, "falls": falls, "objective": merged.objective}
    print(f"{len(modules)} modules x {len(paths)} tasks, {settings.iterations} iterations, {torch.get_num_threads()} threads")
    print(f"relative difference from full SVDs of dense ΔW in {row['plain']} {worst:.1e}; the objective falls: {falls}")
    if not arguments.check:
        row |= {"seconds": ours, "svd_seconds": theirs}
        print(f"ours {ours:.2f} s, theirs {theirs:.1f} s, {theirs / ours:.1f} ×")
    return [row]


def osrm(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the hooks hold, and the process at its largest, after more and more samples."""
    layer = torch.nn.Linear(1024, 8)
    rows = []
    with covariances({"layer": layer}) as (found, _), torch.no_grad():
        for target in (1_000, 5_000, 25_000):
            generator = torch.Generator().manual_seed(target)
            begin = time.perf_counter()
            while found["layer"].count < target:
                layer(torch.randn(500, 1024, generator=generator))
            held = found["layer"].second.nbytes + found["layer"].first.nbytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append({"vectors": target, "held_bytes": held, "peak_mb": peak, "seconds": time.perf_counter() - begin})
            print(f"{target} vectors of 1024: held {held} bytes, the process at most {peak:.0f} MB")
    return rows + ([osrm_angles(arguments.adapters)] if arguments.adapters else [])


def osrm_angles(adapters: Path) -> dict[str, Any]:
    """The largest sine of a principal angle between OSRM's subspaces on MiniLM and those of fp64 eigh of all inputs, kept."""
    base, tokenizer = experiment.encoder()
    modules = {name: layer for name, layer in base.named_modules() if name.endswith(tuple(f".{t}" for t in experiment.TARGETS))}
    given = {}
    for path in sorted((adapters / "texts").glob("*.json")):
        texts = json.loads(path.read_text())["train"][: experiment.CALIBRATION]
        given[path.stem] = [inputs for inputs, _ in experiment.batches(texts, tokenizer, 50)]
    kept: dict[str, dict[str, list[Tensor]]] = {task: {name: [] for name in modules} for task in given}
    for task, batches in given.items():
        for inputs in batches:
            mask = inputs["attention_mask"].bool()

            def keep(layer: Any, args: Any, name: str, task: str = task, mask: Tensor = mask) -> None:
                kept[task][name].append(args[0][mask].double())

            handles = [layer.register_forward_pre_hook(partial(keep, name=name)) for name, layer in modules.items()]
            with torch.no_grad():
                base(**inputs)
            for handle in handles:
                handle.remove()
    found = initialise(base, given, experiment.TARGETS, experiment.RANK)
    worst, least = 0.0, math.inf
    for task in given:
        for name in modules:
            h = torch.cat([part for other in given if other != task for part in kept[other][name]])
            values, vectors = torch.linalg.eigh(h.mT @ h)
            a, low = found.lora_a[task][name].double(), vectors[:, : experiment.RANK]
            worst = max(worst, float(torch.linalg.matrix_norm(a - a @ low @ low.mT, 2)))
            least = min(least, float((values[experiment.RANK] - values[experiment.RANK - 1]) / values[-1]))
    subspaces = len(given) * len(modules)
    print(f"MiniLM, {subspaces} subspaces: sine of the largest angle {worst:.1e}, least gap {least:.1e} of the largest energy")
    return {"matrix": "MiniLM", "subspaces": subspaces, "largest_sine": worst, "least_gap": least}


def _size(text: str) -> Any:
    return tuple(int(part) for part in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pt_svd", "lore", "osrm"))
    parser.add_argument("--adapters", type=Path, help="directory that holds tasks/")
    parser.add_argument("--sizes", nargs="*", type=_size, default=[(1024, 2752)], metavar="MxK")
    parser.add_argument("--only", default="", metavar="REGEX", help="only matrices of PT-SVD whose name matches")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--check", action="store_true", help="compare LoRE with fp64, untimed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "methods.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {"pt_svd": pt_svd, "lore": lore, "osrm": osrm}
    rows = runs[arguments.what](arguments)
    for row in rows:
        row |= {"threads": arguments.threads, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    old = {_key(row): row for row in stored.get(arguments.what, [])}
    stored[arguments.what] = list({**old, **{_key(row): row for row in rows}}.values())
    arguments.output.write_text(json.dumps(stored, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("matrix", "rank", "threads", "vectors", "plain"))


if __name__ == "__main__":
    main()
