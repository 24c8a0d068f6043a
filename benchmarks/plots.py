"""Pictures of a stored result: the CPU's roofline with every op on it, ratios to peers; and a model's predictions for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from . import gpu_model

matplotlib.use("Agg")
from matplotlib import pyplot

_COLOURS = {
    "compress": "tab:blue",
    "lora_forward_": "tab:red",
    "lora_shrink": "tab:orange",
    "lora_expand_": "tab:pink",
    "gram": "tab:green",
    "truncated_svd": "tab:purple",
    "project": "tab:brown",
    "reconstruct": "tab:olive",
    "error_grams": "tab:cyan",
    "merge": "tab:gray",
}
_MARKERS = {1: "o", 2: "s"}


def roofline(result: dict[str, Any], path: Path) -> None:
    """Every row by its bytes and arithmetic, under the roofs of one thread and of two."""
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    ceilings = result["ceilings"]
    x = [2 ** (eighth / 8) for eighth in range(-3 * 8, 10 * 8 + 1)]
    for name, rate in ceilings.items():
        kind, ends = name.split(", ")
        if kind == "gemm":
            continue
        flat = ceilings[f"gemm, {ends}"]
        slanted = [min(flat, intensity * rate) / 1e9 for intensity in x]
        label = f"{kind} {rate / 1e9:.0f} GB/s, GEMM {flat / 1e9:.0f} GFLOP/s, {ends}"
        style, colour = ":" if ends == "1 thread" else "-", "black" if kind == "copy" else "silver"
        axes.plot(x, slanted, style, color=colour, label=label, zorder=1)
    named = set()
    for row in result["rows"]:
        if row["op"] == "merge":
            continue  # its disk's roof is another
        label = f"{row['op']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        axes.scatter(
            row["flops"] / row["bytes"],
            row["flops_per_s"] / 1e9,
            color=_COLOURS[row["op"]],
            marker=_MARKERS[row["threads"]],
            label=None if label in named else label,
            zorder=2,
        )
        named.add(label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("arithmetic by least traffic, FLOP/byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Roofline: {result['machine']['cpu']}, {result['machine']['cores']} cores, fp32", fontsize=10)
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    axes.grid(alpha=0.2)
    _save(figure, path)


def ratios(result: dict[str, Any], path: Path) -> None:
    """The time of every workload's fastest peer by ours; a line goes from the lowest to the highest turn."""
    bars = []
    for row in result["rows"]:
        if row["peers"]:
            name, peer = min(row["peers"].items(), key=lambda item: item[1]["ratio"])
            bars.append((f"{row['workload']}: {name}", row["op"], peer["ratio"], peer["ratio_by_turn"]))
    figure, axes = pyplot.subplots(figsize=(10, 0.17 * len(bars) + 1), layout="constrained")
    places = range(len(bars), 0, -1)
    axes.barh(places, [bar[2] for bar in bars], color=[_COLOURS[bar[1]] for bar in bars])
    for place, (_, _, _, turns) in zip(places, bars, strict=True):
        axes.plot([min(turns), max(turns)], [place, place], color="black", linewidth=1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(places), [bar[0] for bar in bars], fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel("fastest peer's time by ours; left of 1 the peer is faster")
    axes.set_ylim(0.3, len(bars) + 0.7)
    axes.set_title(f"{result['machine']['cpu']}, {result['machine']['cores']} cores, {result['date'][:10]}", fontsize=10)
    axes.grid(axis="x", alpha=0.2)
    _save(figure, path)


def predictions(path: Path) -> None:
    """What gpu_model.py predicts for the mixed forward. Nothing of it is measured, and the picture says so."""
    figure, (times, against) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for gpu in gpu_model.GPUS:
        batches = [gpu_model.decode(tokens, 1000, 16, 4) for tokens in gpu_model.TOKENS]
        times.plot(gpu_model.TOKENS, [1e6 * gpu_model.seconds(batch, gpu) for batch in batches], "--o", label=gpu.name)
        ratio = [gpu_model.sgmv(batch, gpu) / gpu_model.seconds(batch, gpu) for batch in batches]
        against.plot(gpu_model.TOKENS, ratio, "--o", label=gpu.name)
    times.set_ylabel("µs, predicted")
    times.set_title("lora_forward_, d = 4096, r = 16, p = 4, bf16, 1000 tasks", fontsize=9)
    against.axhline(1, color="black", linewidth=1)
    against.set_ylabel("predicted SGMV by predicted ours")
    against.set_title("against SGMV on restored adapters", fontsize=9)
    for axes in (times, against):
        axes.set_xscale("log", base=4)
        axes.set_xlabel("tokens")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.2)
        axes.text(
            0.5,
            0.5,
            "PREDICTION\nnot measured",
            transform=axes.transAxes,
            ha="center",
            va="center",
            size=22,
            color="red",
            alpha=0.25,
        )
    figure.suptitle("Predictions of benchmarks/gpu_model.py: nothing here was run on a GPU", color="tab:red", fontsize=11)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def draw(result: dict[str, Any], directory: Path) -> None:
    roofline(result, directory / "roofline.png")
    ratios(result, directory / "ratios.png")
    predictions(directory / "gpu-prediction.png")
