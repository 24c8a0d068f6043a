"""The paper's tables on real tasks: accuracy, storage and error of ΔW of every way to keep n adapters.

    python -m benchmarks.quality --adapters ../shared/adapters

For LoRA adapters (rank 16, eight tasks; rank 64, four) and PT-SVD factors of full fine-tunes (rank 16, 32, 64): the individual
adapters; average, task arithmetic, TIES and DARE by PEFT's functions, on the factors separately and on dense ΔW; LoRE; RMM with
p = 0 … n − 1; every adapter truncated to the rank that costs as much as p = 1, 2, 3; int8 and int4 adapters. Each row adds its
ΔW to the encoder's weights, a task at a time, and runs that task's test samples with the task's own head, in fp32.

Then what a reader of the paper tries first: one model merged with itself, two models, error against the size of the basis, and
storage against the number of tasks. Rows that the output file holds already are not run again: it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import rmm_kernels
from rmm_kernels.adapters import LoraFactors, load_adapter, save_adapter
from rmm_kernels.compare import quantise, truncate
from rmm_kernels.methods import Settings, lore_adapters

from .accuracy import Evaluation

HERE = Path(__file__).resolve().parent
SAMPLES = {"lora_r16": 256, "pt_svd_r16": 256, "lora_r64": 256, "pt_svd_r32": 128, "pt_svd_r64": 128}  # by kind, of each task
WHOLE = 128  # the highest rank of the fine-tunes' deltas that the data holds
VALUE_BYTES = 2  # everything is counted in fp16
SCALE_BYTES = 4  # one fp32 scale for each row of a quantised factor

Factors = dict[str, LoraFactors]
Deltas = dict[str, Tensor]  # by module, [out, in]


@dataclass(frozen=True)
class Way:
    """One way to keep the adapters: what it stores, and the ΔW it gives each task."""

    name: str
    group: str
    storage: float
    """bytes against all adapters' in fp16"""
    deltas: Callable[[int], Deltas]


# ---------------------------------------------------------------- adapters


def adapters_of(kind: str, root: Path, scratch: Path) -> list[Path]:
    """The PEFT directories of a kind, each in a directory of its task's name, sorted by task."""
    if not kind.startswith("pt_svd_r"):
        return sorted(root.glob(f"tasks/*/{kind}"))
    rank = int(kind.removeprefix("pt_svd_r"))
    found = []
    for source in sorted(root.glob("tasks/*/delta_svd_r128.safetensors")):
        directory = scratch / source.parent.name / kind
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            tensors = load_file(source)
            modules = sorted(key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A"))
            factors = {
                name: LoraFactors(tensors[f"{name}.lora_A"][:rank].float(), tensors[f"{name}.lora_B"][:, :rank].float(), 1.0)
                for name in modules
            }
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
            head = {"head.safetensors": source.parent / "full_head.safetensors"}
            save_adapter(directory, config, factors, files=head)
        found.append(directory)
    return found


def read(path: Path) -> Factors:
    adapter = load_adapter(path)
    found = {}
    for module in adapter.modules:
        factors = adapter.factors(module)
        found[module] = LoraFactors(factors.lora_a.float(), factors.lora_b.float(), factors.scaling)
    return found


def whole(paths: list[Path], root: Path) -> list[Factors]:
    """The fine-tunes' deltas behind PT-SVD adapters, at the highest rank that the data holds."""
    return [read(path) for path in adapters_of(f"pt_svd_r{WHOLE}", root, paths[0].parent.parent)]


def dense(factors: Factors) -> Deltas:
    return {name: f.scaling * (f.lora_b.float() @ f.lora_a.float()) for name, f in factors.items()}


def square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def values(factors: Factors) -> int:
    return sum(f.lora_a.numel() + f.lora_b.numel() for f in factors.values())


# ---------------------------------------------------------------- ways


def ways(kind: str, paths: list[Path], root: Path, done: set[str]) -> Iterator[Way]:
    """All of them; merges that are `done` may be left out."""
    tasks = [read(path) for path in paths]
    n, all_values = len(tasks), sum(values(task) for task in tasks)
    rank = next(iter(tasks[0].values())).lora_a.shape[0]
    yield Way("individual adapters", "individual", 1.0, lambda task: dense(tasks[task]))
    yield Way("no adapter", "none", 0.0, lambda task: {name: torch.zeros_like(d) for name, d in dense(tasks[task]).items()})
    for components in range(n):
        if f"RMM p = {components}" in done:
            continue
        merged = rmm_kernels.merge(paths, components, names=[path.parent.name for path in paths])
        names = merged.tasks
        yield Way(
            f"RMM p = {components}", "RMM", merged.ratio, lambda task, m=merged, names=names: dense(m.restore(names[task]))
        )
    yield from baselines(tasks, all_values)
    if kind == "pt_svd_r16":
        yield from arithmetic(whole(paths, root), all_values)
    for components in (1, 2, 3):
        if components < n:
            kept = int(rank * (components * (rank + n) + rank) / (rank * n))
            if kept >= rank:
                continue
            yield Way(f"truncated to rank {kept}", "truncated", kept / rank, lambda task, k=kept: dense(cut(tasks[task], k)))
    for bits in (8, 4):
        size = sum(
            f.lora_a.numel() * bits / 8 + f.lora_b.numel() * bits / 8 + SCALE_BYTES * (len(f.lora_a) + len(f.lora_b))
            for task in tasks
            for f in task.values()
        )
        storage = size / (VALUE_BYTES * all_values)
        yield Way(f"int{bits} adapters", "quantised", storage, lambda task, b=bits: dense(rounded(tasks[task], b)))
        size = sum(2 * SCALE_BYTES * len(f.lora_a) for task in tasks for f in task.values())
        storage = bits / 8 / VALUE_BYTES + size / (VALUE_BYTES * all_values)
        yield Way(
            f"int{bits}, balanced, by component", "quantised", storage, lambda task, b=bits: dense(balanced(tasks[task], b))
        )
    shapes = [(f.lora_b.shape[0], f.lora_a.shape[1]) for f in tasks[0].values()]
    storage = sum(min(n * rank, *shape) * sum(shape) for shape in shapes) / all_values
    for prox in ("fixed", "squared"):
        yield Way(
            f"LoRE, {prox} prox",
            "LoRE",
            storage,
            _same_for_all(
                lambda p=prox: dense(lore_adapters(paths, Settings(prox=p), names=[path.parent.name for path in paths]).factors)
            ),
        )


def cut(factors: Factors, rank: int) -> Factors:
    found = {}
    for name, f in factors.items():
        a, b = truncate(f.lora_a[None], f.lora_b[None], rank)
        found[name] = LoraFactors(a[0], b[0], f.scaling)
    return found


def rounded(factors: Factors, bits: int) -> Factors:
    return {name: LoraFactors(quantise(f.lora_a, bits), quantise(f.lora_b, bits), f.scaling) for name, f in factors.items()}


def balanced(factors: Factors, bits: int) -> Factors:
    """√Σ on both sides, then one scale for each rank component: a row of lora_a, a column of lora_b."""
    found = {}
    for name, f in factors.items():
        a, b = truncate(f.lora_a[None], f.lora_b[None], len(f.lora_a))
        found[name] = LoraFactors(quantise(a[0], bits), quantise(b[0].mT, bits).mT, f.scaling)
    return found


def arithmetic(tasks: list[Factors], all_values: int) -> Iterator[Way]:
    """Task arithmetic on the deltas that PT-SVD cut."""
    size = sum(f.lora_a.shape[1] * f.lora_b.shape[0] for f in tasks[0].values())
    for weight in (1 / len(tasks), 0.3, 0.5):

        def total(weight: float = weight) -> Deltas:
            found = dense(tasks[0])
            for task in tasks[1:]:
                for name, delta in dense(task).items():
                    found[name] += delta
            return {name: weight * delta for name, delta in found.items()}

        name = "average" if weight == 1 / len(tasks) else f"task arithmetic {weight}"
        yield Way(f"{name}, ΔW of rank {WHOLE}", "merged", size / all_values, _same_for_all(total))


def baselines(tasks: list[Factors], all_values: int) -> Iterator[Way]:
    """PEFT's own merging functions: one result for all tasks."""
    from peft.utils.merge_utils import dare_linear, task_arithmetic, ties

    n = len(tasks)
    mean, ones = torch.full((n,), 1 / n), torch.ones(n)
    methods: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "average": lambda tensors: task_arithmetic(tensors, mean),
        "task arithmetic 0.3": lambda tensors: task_arithmetic(tensors, 0.3 * ones),
        "task arithmetic 0.5": lambda tensors: task_arithmetic(tensors, 0.5 * ones),
        "TIES 20 %": lambda tensors: ties(tensors, ones, density=0.2),
        "DARE 50 %, average": lambda tensors: dare_linear(tensors, mean, density=0.5),
    }
    for name, method in methods.items():

        def on_factors(method: Callable[[list[Tensor]], Tensor] = method) -> Deltas:
            torch.manual_seed(0)
            merged = {}
            for module, first in tasks[0].items():
                a = method([task[module].lora_a for task in tasks])
                b = method([task[module].lora_b for task in tasks])
                merged[module] = first.scaling * (b @ a)
            return merged

        def on_deltas(method: Callable[[list[Tensor]], Tensor] = method) -> Deltas:
            torch.manual_seed(0)
            return {
                module: method([task[module].scaling * (task[module].lora_b @ task[module].lora_a) for task in tasks])
                for module in tasks[0]
            }

        if name != "task arithmetic 0.5":  # on both factors at n = 8 it is 16 times the averages' product
            yield Way(f"{name}, factors", "merged", 1 / n, _same_for_all(on_factors))
        size = sum(f.lora_a.shape[1] * f.lora_b.shape[0] for f in tasks[0].values())
        yield Way(f"{name}, dense ΔW", "merged", size / all_values, _same_for_all(on_deltas))


def _same_for_all(make: Callable[[], Deltas]) -> Callable[[int], Deltas]:
    made: list[Deltas] = []

    def deltas(task: int) -> Deltas:
        if not made:
            made.append(make())
        return made[0]

    return deltas


# ---------------------------------------------------------------- evaluation


class Bench(Evaluation):
    """Runs a Way: its ΔW on top of the encoder's weights, a task at a time."""

    def run(self, way: Way, heads: list[dict[str, Tensor]], originals: list[Deltas]) -> dict[str, Any]:
        begin = time.perf_counter()
        accuracy, wrong = {}, 0.0
        for task, name in enumerate(self.tasks):
            deltas = way.deltas(task)
            wrong += sum(square(delta - originals[task][module]) for module, delta in deltas.items())
            accuracy[name] = self._accuracy(deltas, task, heads)
        total = sum(square(delta) for original in originals for delta in original.values())
        return {
            "name": way.name,
            "group": way.group,
            "storage": way.storage,
            "error": (wrong / total) ** 0.5,
            "accuracy": accuracy,
            "mean": sum(accuracy.values()) / len(accuracy),
            "dtype": "float32",
            "seconds": time.perf_counter() - begin,
        }

    def _accuracy(self, deltas: Deltas, task: int, heads: list[dict[str, Tensor]]) -> float:
        weights = {module: self.model.get_submodule(module).weight.data for module in deltas}
        kept = {module: weight.clone() for module, weight in weights.items()}
        for module, weight in weights.items():
            weight += deltas[module]
        try:
            correct = [self._correct(self.model, batch, heads) for batch in self.samples.of(task).batches(self.batch)]
        finally:
            for module, weight in weights.items():
                weight.copy_(kept[module])
        return float(torch.cat(correct).mean())


def evaluate(arguments: argparse.Namespace, result: dict[str, Any], scratch: Path) -> None:
    for kind in arguments.kinds:
        paths = adapters_of(kind, arguments.adapters, scratch)
        samples = arguments.samples or SAMPLES[kind]
        if result["samples"].setdefault(kind, samples) != samples:
            raise ValueError(f"{arguments.output} holds rows of {kind} with {result['samples'][kind]} samples, not {samples}")
        bench = Bench(paths, samples, arguments.batch, arguments.adapters / "tasks")
        heads = [load_file(path / "head.safetensors") for path in paths]
        originals = [dense(read(path)) for path in paths]
        rows = result["tables"].setdefault(kind, [])
        done = {row["name"] for row in rows}
        for way in ways(kind, paths, arguments.adapters, done):
            if way.name in done or not re.search(arguments.only, way.name):
                continue
            rows.append(bench.run(way, heads, originals))
            print(f"{kind}: {way.name}: {rows[-1]['mean']:.4f} in {rows[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
            store(arguments.output, result)


# ---------------------------------------------------------------- a reader's first experiments


def first_experiments(paths: list[Path], scratch: Path) -> dict[str, Any]:
    """Errors and bytes alone: merged with itself, two models, storage against the number of tasks."""
    names = [path.parent.name for path in paths]
    twice = [scratch / "self" / name for name in ("one", "two")]
    for copy in twice:
        shutil.copytree(paths[0], copy, dirs_exist_ok=True)
    one = rmm_kernels.merge(twice, 0)
    pairs = []
    for first, second in combinations(range(0, len(paths), 2), 2):
        chosen = {"names": [names[first], names[second]]}
        errors = [rmm_kernels.merge([paths[first], paths[second]], p, **chosen).error for p in (0, 1)]
        pairs.append({"tasks": chosen["names"], "error_p0": errors[0], "error_p1": errors[1]})
    rank = load_adapter(paths[0]).rank(load_adapter(paths[0]).modules[0])
    growth = []
    for n in range(2, len(paths) + 1, 2):
        for p in sorted({0, 1, 3, n - 1} & set(range(n))):
            merged = rmm_kernels.merge(paths[:n], p, names=names[:n])
            growth.append({"tasks": n, "components": p, "storage": merged.ratio, "error": merged.error})
    return {
        "self_merge": {"task": names[0], "components": 0, "error": one.error, "storage": one.ratio},
        "pairs": pairs,
        "growth": growth,
        "rank": rank,
        "break_even": {n: rank * (n - 1) / (rank + n) for n in (2, 4, 8, 16, 32, 64)},
    }


# ---------------------------------------------------------------- output


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for kind, rows in result["tables"].items():
        tasks = list(rows[0]["accuracy"])
        rounded = any(row["dtype"] == "bfloat16" for row in rows)
        lines += [
            f"### {kind}: {len(tasks)} tasks, {result['samples'][kind]} test samples each, in "
            + ("bf16 autocast (rows with ¹ in fp32)" if rounded else "fp32"),
            "",
            f"| | {' | '.join(tasks)} | mean | error of ΔW | storage |",
            "|---|" + "--:|" * (len(tasks) + 3),
        ]
        for row in sorted(rows, key=lambda row: list(COLOURS).index(row["group"])):
            cells = " | ".join(f"{row['accuracy'][task]:.3f}" for task in tasks)
            error = f"{row['error']:.3f}" if row["error"] == 0 or row["error"] >= 1e-3 else f"{row['error']:.0e}"
            mark = "¹" if rounded and row["dtype"] == "float32" else ""
            lines.append(f"| {row['name']}{mark} | {cells} | **{row['mean']:.3f}** | {error} | {row['storage']:.2f} |")
        lines += ["", *_equal_bytes(rows), ""]
    lines += _against_reference(result["tables"])
    first = result.get("first_experiments")
    if first:
        own = first["self_merge"]
        p0, p1 = ([pair[key] for pair in first["pairs"]] for key in ("error_p0", "error_p1"))
        lines += [
            "### A reader's first experiments (lora_r16)",
            "",
            f"- `{own['task']}` merged with itself, p = 0: error of ΔW {own['error']:.1e}, storage {own['storage']:.2f}.",
            f"- Two models, {len(p0)} pairs: error {min(p0):.3f} – {max(p0):.3f} at p = 0 (the mean for both), at most "
            f"{max(p1):.1e} at p = 1 (exact).",
            "- Break-even p (more components than this cost more than the adapters themselves): "
            + ", ".join(f"{p:.1f} for {n} tasks" for n, p in first["break_even"].items())
            + ".",
            "",
            "| tasks | p | storage | error of ΔW |",
            "|--:|--:|--:|--:|",
            *(
                f"| {row['tasks']} | {row['components']} | {row['storage']:.2f} | {row['error']:.3f} |"
                for row in first["growth"]
            ),
            "",
        ]
    return "\n".join(lines)


def _equal_bytes(rows: list[dict[str, Any]]) -> list[str]:
    """Where the paper's finding holds, and what does better at the same bytes."""
    n = len(rows[0]["accuracy"])
    merged = {row["name"]: row for row in rows if row["group"] == "RMM"}
    factors = [row for row in rows if row["group"] == "merged" and row["name"].endswith("factors")]
    if not factors:
        return []
    best = max(factors, key=lambda row: row["mean"])
    lines = [
        f"- RMM {'keeps' if merged[f'RMM p = {min(3, n - 1)}']['mean'] > best['mean'] else 'does not keep'} what merging the "
        f"factors loses: p = 1 {merged['RMM p = 1']['mean']:.3f}, p = {min(3, n - 1)} "
        f"{merged[f'RMM p = {min(3, n - 1)}']['mean']:.3f}; the best merge of the factors ({best['name'].split(',')[0]}) "
        f"{best['mean']:.3f}."
    ]
    for p in range(1, min(4, n)):
        row = merged[f"RMM p = {p}"]
        others = [
            other
            for other in rows
            if other["group"] in ("truncated", "quantised") and other["storage"] <= row["storage"] * 1.005
        ]
        if others:
            nearest = min(others, key=lambda other: other["error"])
            verdict = "nearer" if nearest["error"] < row["error"] else "no nearer"
            lines.append(
                f"- At the bytes of p = {p} ({row['storage']:.2f}): RMM error {row['error']:.3f}, accuracy {row['mean']:.3f}; "
                f"{verdict} to the adapters is {nearest['name']} ({nearest['storage']:.2f}): {nearest['error']:.3f}, "
                f"{nearest['mean']:.3f}."
            )
    return lines


# Figures that came with the adapters: mean accuracy and error of ΔW over eight tasks of 512 samples. Its sums of deltas are of
# the whole fine-tunes, and its quantised adapters are balanced.
REFERENCE: dict[str, dict[str, tuple[float, float | None]]] = {
    "lora_r16": {
        "individual adapters": (0.856, 0),
        "no adapter": (0.769, None),
        "RMM p = 0": (0.781, 0.944),
        "RMM p = 1": (0.833, 0.735),
        "RMM p = 2": (0.844, 0.579),
        "RMM p = 3": (0.848, 0.447),
        "RMM p = 4": (0.851, 0.332),
        "RMM p = 5": (0.853, 0.228),
        "RMM p = 6": (0.855, 0.132),
        "RMM p = 7": (0.856, 0),
        "average, dense ΔW": (0.789, None),
        "task arithmetic 0.3, dense ΔW": (0.810, None),
        "task arithmetic 0.5, dense ΔW": (0.815, None),
        "TIES 20 %, factors": (0.802, None),
        "truncated to rank 5": (0.850, 0.536),
        "truncated to rank 8": (0.854, 0.396),
        "truncated to rank 11": (0.855, 0.273),
        "int4, balanced, by component": (0.855, 0.197),
        "int8, balanced, by component": (0.855, 0.011),
    },
    "pt_svd_r16": {
        "individual adapters": (0.859, 0),
        "no adapter": (0.768, None),
        "RMM p = 0": (0.774, 0.990),
        "RMM p = 1": (0.814, 0.884),
        "RMM p = 2": (0.839, 0.748),
        "RMM p = 3": (0.843, 0.607),
        "RMM p = 4": (0.850, 0.466),
        "RMM p = 5": (0.853, 0.329),
        "RMM p = 6": (0.857, 0.194),
        "RMM p = 7": (0.858, 0),
        f"average, ΔW of rank {WHOLE}": (0.779, None),
        f"task arithmetic 0.3, ΔW of rank {WHOLE}": (0.708, None),
        f"task arithmetic 0.5, ΔW of rank {WHOLE}": (0.583, None),
        "TIES 20 %, factors": (0.759, None),
        "truncated to rank 5": (0.843, 0.639),
        "truncated to rank 8": (0.847, 0.504),
        "truncated to rank 11": (0.853, 0.374),
        "int4, balanced, by component": (0.859, 0.200),
        "int8, balanced, by component": (0.860, 0.011),
    },
}


def _against_reference(tables: dict[str, Any]) -> list[str]:
    lines = [
        "### Against the figures that came with the adapters",
        "",
        "| | | mean | reference | error of ΔW | reference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for kind, figures in REFERENCE.items():
        rows = {row["name"]: row for row in tables.get(kind, [])}
        for name, (mean, error) in figures.items():
            if name in rows:
                errors = f"{rows[name]['error']:.3f} | {error:.3f}" if error is not None else "| "
                lines.append(f"| {kind} | {name} | {rows[name]['mean']:.3f} | {mean:.3f} | {errors} |")
    return [*lines, ""] if len(lines) > 4 else []


COLOURS = {
    "individual": "black",
    "none": "grey",
    "RMM": "tab:blue",
    "merged": "tab:red",
    "LoRE": "tab:purple",
    "truncated": "tab:orange",
    "quantised": "tab:green",
}


def picture(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(result["tables"])
    figure, axes = plt.subplots(len(kinds) + 1, 2, figsize=(11, 2.9 * (len(kinds) + 1)), layout="constrained")
    for line, kind in zip(axes, kinds, strict=False):
        for axis, key, label in ((line[0], "mean", "mean accuracy"), (line[1], "error", "relative error of ΔW")):
            for group, colour in COLOURS.items():
                points = sorted((row["storage"], row[key]) for row in result["tables"][kind] if row["group"] == group)
                points = [point for point in points if point[0] <= 1.6]
                if points:
                    style = "o-" if group in ("RMM", "truncated", "quantised") else "o"
                    axis.plot(*zip(*points, strict=True), style, color=colour, label=group, markersize=4)
            axis.axvline(1, color="grey", linewidth=0.5)
            axis.set(xlabel="bytes against all adapters in fp16", ylabel=label, title=kind)
    axes[0][0].legend(fontsize=8)
    rank, tasks = 16, range(2, 65)
    left, right = axes[-1]
    for p in (1, 2, 3, 4, 7):
        counts = [n for n in tasks if p <= min(rank, n - 1)]
        left.plot(counts, [(p * (rank + n) + rank) / (rank * n) for n in counts], label=f"p = {p}")
    left.axhline(1, color="grey", linewidth=0.5)
    left.set(xlabel="tasks", ylabel="storage against the adapters", ylim=(0, 2), title=f"storage, rank {rank}")
    left.legend(fontsize=8)
    right.plot(tasks, [rank * (n - 1) / (rank + n) for n in tasks], color="black")
    right.set(xlabel="tasks", ylabel="p", title="break-even p: above it, merging costs more than it saves")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def store(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="directory that holds tasks/<task>/")
    parser.add_argument("--kinds", nargs="+", default=list(SAMPLES), choices=SAMPLES)
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument("--samples", type=int, help="test samples of each task (default 256; of pt_svd_r32 and r64 128)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quality.json", help="also .md and .png beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"samples": {}, "torch": torch.__version__, "tables": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        evaluate(arguments, result, Path(scratch))
        if "first_experiments" not in result:
            paths = adapters_of("lora_r16", arguments.adapters, Path(scratch))
            result["first_experiments"] = first_experiments(paths, Path(scratch))
            store(arguments.output, result)
    text = markdown(result)
    arguments.output.with_suffix(".md").write_text(text)
    picture(result, arguments.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
