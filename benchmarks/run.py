"""Run the benchmarks and report every workload beside its peers: `python -m benchmarks.run` from the repository root.

Writes benchmarks/results/<machine>.json and prints its table; `--show FILE` prints the table of a stored one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import rmm_kernels

from . import peers, workloads
from .workloads import OURS, Target, Workload

HERE = Path(__file__).resolve().parent
FORMAT = 1
Turns = dict[int, list[float]]  # turn → seconds of every round


# ---------------------------------------------------------------- run


def run_pytest(arguments: list[str], report: Path) -> int:
    """Run the benchmarks in a process of their own; returns pytest's exit status."""
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", f"--benchmark-json={report}"]
    return subprocess.run([*command, "--benchmark-columns=median,iqr,rounds", *arguments], cwd=HERE.parent).returncode


def machine(info: dict[str, Any]) -> dict[str, Any]:
    cpu = info["cpu"]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu.get("flags", ())]
    return {
        "cpu": cpu.get("brand_raw") or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "instruction_sets": flags,
        "l2_bytes": cpu.get("l2_cache_size"),
        "l3_bytes": cpu.get("l3_cache_size"),
    }


def slug(about: dict[str, Any]) -> str:
    words = re.sub(r"\((r|tm)\)|@.*", "", about["cpu"].lower())
    return "-".join(re.findall(r"[a-z0-9]+", f"{words} {about['cores']} cores"))


# ---------------------------------------------------------------- summarise


@dataclass
class Found:
    """What pytest-benchmark's report holds of one workload."""

    times: dict[str, Turns] = field(default_factory=lambda: defaultdict(dict))  # by contender
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by contender: what a merge wrote
    others: list[float] = field(default_factory=list)  # share of a core that other processes used, by test


def read(report: dict[str, Any]) -> dict[str, Found]:
    """By workload; one whose own test failed has no times of ours."""
    found: dict[str, Found] = defaultdict(Found)
    for entry in report["benchmarks"]:
        extra = entry["extra_info"]
        workload, contender = found[extra["workload"]], extra["contender"]
        workload.times[contender][extra["turn"]] = entry["stats"]["data"]
        workload.others.append(extra["others"])
        if "output" in extra:
            workload.outputs[contender] = extra["output"]
    return found


def seconds(turns: Turns) -> dict[str, Any]:
    data = [value for turn in turns.values() for value in turn]
    low, _, high = quantiles(data, n=4, method="inclusive") if len(data) > 1 else (data[0],) * 3
    return {"median": median(data), "min": min(data), "iqr": high - low, "rounds": len(data)}


def compared(ours: Turns, peer: Turns) -> dict[str, Any]:
    """How many times our time the peer takes: by the medians of all turns, within each turn, and by the fastest rounds."""
    mine, theirs = seconds(ours), seconds(peer)
    within = [median(peer[turn]) / median(ours[turn]) for turn in ours if turn in peer]
    return {
        "times": theirs,
        "ratio": theirs["median"] / mine["median"],
        "ratio_within_turns": [min(within), max(within)],
        "ratio_of_minima": theirs["min"] / mine["min"],
    }


def judged(target: Target, against: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`target` against the fastest of its peers, or met: None where one of them was not timed."""
    if any(peer not in against for peer in target.peers):
        return {"peers": target.peers, "ratio": target.ratio, "met": None}
    fastest = min(target.peers, key=lambda peer: against[peer]["ratio"])
    return {
        "peers": target.peers,
        "fastest": fastest,
        "ratio": target.ratio,
        "met": against[fastest]["ratio"] >= target.ratio,
    }


def row(workload: Workload, found: Found, ceilings: dict[str, float]) -> dict[str, Any]:
    ours = seconds(found.times[OURS])
    against = {name: compared(found.times[OURS], turns) for name, turns in found.times.items() if name != OURS}
    for name, output in found.outputs.items():
        (ours if name == OURS else against[name]["times"])["output"] = output
    bytes_per_s, flops_per_s = workload.bytes / ours["median"], workload.flops / ours["median"]
    plural = "s" if workload.threads > 1 else ""
    return {
        "op": workload.op,
        "workload": workload.name,
        "shapes": workload.shapes,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "threads": workload.threads,
        "bytes": workload.bytes,
        "flops": workload.flops,
        "ours": ours,
        "others": {"median": median(found.others), "max": max(found.others)},
        "bytes_per_s": bytes_per_s,
        "flops_per_s": flops_per_s,
        "of_copy": bytes_per_s / ceilings[f"copy, {workload.threads} thread{plural}"],
        "of_gemm": flops_per_s / ceilings[f"gemm, {workload.threads} thread{plural}"],
        "peers": against,
        "targets": [judged(target, against) for target in workload.targets],
    }


def summarise(report: dict[str, Any], turns: int) -> dict[str, Any]:
    """The stored result."""
    found = read(report)
    ceilings = {
        workload.name: (workload.flops or workload.bytes) / seconds(found[workload.name].times["torch"])["median"]
        for workload in workloads.CEILINGS
    }
    timed = [*workloads.COMPRESS, *workloads.FORWARD, *workloads.MERGE]
    rows = [row(workload, found[workload.name], ceilings) for workload in timed if OURS in found[workload.name].times]
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.run",
        "machine": machine(report["machine_info"]),
        "turns": turns,
        "python": platform.python_version(),
        "versions": {"rmm_kernels": rmm_kernels.__version__, **peers.versions()},
        "build": rmm_kernels.build_info(),
        "backend": {op: winners["cpu"] for op, winners in rmm_kernels.backends().items()},
        "ceilings": ceilings,
        "rows": rows,
    }


# ---------------------------------------------------------------- print


def _time(value: float) -> str:
    return f"{value * 1e6:.1f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def _verdict(entry: dict[str, Any], peer: str) -> tuple[str, str]:
    """(target, met or missed) where `peer` is the fastest of a target's peers."""
    for target in entry["targets"]:
        if target.get("fastest") == peer:
            return f"≥ {target['ratio']:.2g}", "met" if target["met"] else "**missed**"
    return "", ""


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown: what it was measured on, our own figures, the ratios beside their targets."""
    about, ceilings = result["machine"], result["ceilings"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}; "
        f"build {json.dumps(result['build'])}",
        "",
        "Ceilings: "
        + "; ".join(f"{name} {value / 1e9:.1f} {'GB' if 'copy' in name else 'GFLOP'}/s" for name, value in ceilings.items()),
        "",
        "| workload | threads | median | GB/s | of copy | GFLOP/s | of GEMM | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        lines.append(
            f"| {entry['workload']} | {entry['threads']} | {_time(entry['ours']['median'])} "
            f"| {entry['bytes_per_s'] / 1e9:.2f} | {entry['of_copy']:.0%} "
            f"| {entry['flops_per_s'] / 1e9:.2f} | {entry['of_gemm']:.0%} | {entry['others']['median']:.0%} |"
        )
    lines += [
        "",
        "| workload | peer | its median | × our time | within turns | of the minima | target | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        for name, peer in entry["peers"].items():
            low, high = peer["ratio_within_turns"]
            lines.append(
                f"| {entry['workload']} | {name} | {_time(peer['times']['median'])} | {peer['ratio']:.2f} "
                f"| {low:.2f} – {high:.2f} | {peer['ratio_of_minima']:.2f} | {' | '.join(_verdict(entry, name))} |"
            )
        for target in entry["targets"]:
            if target["met"] is None:
                names = " or ".join(target["peers"])
                lines.append(f"| {entry['workload']} | {names} | not timed | | | | ≥ {target['ratio']:.2g} | |")
    written = [
        f"| {name} | {side['output']['error']:.4f} | {side['output']['bytes'] / 1e6:.2f} |"
        for entry in result["rows"]
        for name, side in ((OURS, entry["ours"]), *((name, peer["times"]) for name, peer in entry["peers"].items()))
        if "output" in side
    ]
    if written:
        lines += ["", "| merge | relative error of ΔW | MB written |", "|---|---|---|", *written]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="how often every group of contenders is timed (default 3)")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait, in all, for a quiet machine (120)")
    parser.add_argument("--output", type=Path, help="the result's file (default: benchmarks/results/<machine>.json)")
    parser.add_argument("--only", metavar="EXPR", help="pytest's -k; the result is stored only with --output")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a stored result and run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(json.loads(arguments.show.read_text())))
        return 0

    unbuilt = sorted(op for op, entry in rmm_kernels.backends().items() if entry["cpu"] != "cpu")
    if unbuilt:
        where = Path(rmm_kernels.__file__).parent
        print(f"no CPU kernel for {', '.join(unbuilt)} in {where}; build them there: pip install -e .", file=sys.stderr)
        return 2

    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        select = ["-k", f"ceiling or ({arguments.only})"] if arguments.only else []
        status = run_pytest([f"--turns={arguments.turns}", f"--patience={arguments.patience}", *select], report)
        if not report.exists():
            return status
        result = summarise(json.loads(report.read_text()), arguments.turns)
    output = arguments.output
    if output is None and not arguments.only:
        output = HERE / "results" / f"{slug(result['machine'])}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{tables(result)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
