"""Run the benchmarks and report every workload beside its peers: `python -m benchmarks.run` from the repository root.

Writes benchmarks/results/<machine>.json, its pictures, and the tables of both READMEs from it. `--show FILE` prints the tables
of a stored result and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import rmm_kernels

from . import guard, instructions, peers, report, scaling, workloads
from .workloads import OURS, Target, Workload

HERE = Path(__file__).resolve().parent
FILES = ("test_ceilings.py", "test_compress.py", "test_ops.py", "test_forward.py", "test_merge.py")
Turns = dict[int, list[float]]  # turn → seconds of every round


# ---------------------------------------------------------------- run


def run_pytest(file: str, arguments: list[str], path: Path) -> int:
    """Run one file of benchmarks in a process of its own; returns pytest's exit status."""
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "--no-header", f"--benchmark-json={path}"]
    done = subprocess.run([*command, "--benchmark-columns=median,iqr,rounds", *arguments], cwd=HERE.parent)
    return 0 if done.returncode == 5 else done.returncode  # 5: nothing chosen


def run_all(arguments: list[str], only: str | None, quick: bool) -> tuple[dict[str, Any] | None, int]:
    """pytest-benchmark's reports of all files in one, and the worst exit status. What a file loses, the others keep."""
    merged: dict[str, Any] | None = None
    worst = 0
    for file in FILES:
        print(f"\n[{time.strftime('%H:%M:%S')}] {file}", flush=True)
        chosen = [f"({only})"] if only and file != "test_ceilings.py" else []
        chosen += ["not whole"] if quick and file == "test_merge.py" else []
        select = ["-k", " and ".join(chosen)] if chosen else []
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "report.json"
            worst = max(worst, run_pytest(file, [*arguments, *select], path))
            if not path.exists() or not path.stat().st_size:
                continue
            found = json.loads(path.read_text())
        if merged is None:
            merged = found
        else:
            merged["benchmarks"] += found["benchmarks"]
    return merged, worst


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
    """A file's name. CPUs of a name differ in what they can do: virtual machines hide which one it is."""
    words = re.sub(r"\((r|tm)\)|@.*", "", about["cpu"].lower())
    best = about["instruction_sets"][-1] if about["instruction_sets"] else ""
    return "-".join(re.findall(r"[a-z0-9_]+", f"{words} {best} {about['cores']} cores"))


def revision() -> str:
    """The commit that was measured, with "+" where the working tree differs from it in what is measured."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../rmm_kernels", "../csrc", "../setup.py", "*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------- summarise


@dataclass
class Found:
    """What pytest-benchmark's report holds of one workload."""

    times: dict[str, Turns] = field(default_factory=lambda: defaultdict(dict))  # by contender
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by contender: what a merge wrote
    others: list[float] = field(default_factory=list)  # share of a core that other processes used, by test


def read(measured: dict[str, Any]) -> dict[str, Found]:
    """By workload; one whose own test failed has no times of ours."""
    found: dict[str, Found] = defaultdict(Found)
    for entry in measured["benchmarks"]:
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
    return {
        "times": theirs,
        "ratio": theirs["median"] / mine["median"],
        "ratio_by_turn": [median(peer[turn]) / median(ours[turn]) for turn in ours if turn in peer],
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


def summarise(measured: dict[str, Any], command: str, turns: int) -> dict[str, Any]:
    """The stored result. A workload whose check failed is named among the withheld, and has no row."""
    found = read(measured)
    ceilings = {  # what the machine can do at best: by the fastest round
        workload.name: (workload.flops or workload.bytes) / seconds(found[workload.name].times["torch"])["min"]
        for workload in workloads.CEILINGS
    }
    timed = [workload for workload in workloads.ALL.values() if workload.op != "ceiling" and workload.name in found]
    return {
        "format": report.FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "revision": revision(),
        "machine": machine(measured["machine_info"]),
        "turns": turns,
        "python": platform.python_version(),
        "versions": {"rmm_kernels": rmm_kernels.__version__, **peers.versions()},
        "build": rmm_kernels.build_info(),
        "backend": {op: winners["cpu"] for op, winners in rmm_kernels.backends().items()},
        "ceilings": ceilings,
        "rows": [row(workload, found[workload.name], ceilings) for workload in timed if OURS in found[workload.name].times],
        "withheld": [workload.name for workload in timed if OURS not in found[workload.name].times],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=2, help="how often every group of contenders is timed (default 2)")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait, in all, for a quiet machine (60)")
    parser.add_argument("--quick", action="store_true", help="one turn, no waiting, no merge of a whole 7B model")
    parser.add_argument("--output", type=Path, help="the result's file; READMEs and pictures stay as they are")
    parser.add_argument("--only", metavar="EXPR", help="pytest's -k; the result is stored only with --output")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a stored result and run nothing")
    options = parser.parse_args()
    if options.show:
        print(report.tables(report.load(options.show)))
        return 0

    unbuilt = sorted(op for op, entry in rmm_kernels.backends().items() if entry["cpu"] != "cpu")
    if unbuilt:
        where = Path(rmm_kernels.__file__).parent
        print(f"no CPU kernel for {', '.join(unbuilt)} in {where}; build them there: pip install -e .", file=sys.stderr)
        return 2

    began = time.monotonic()
    turns, patience = (1, 0.0) if options.quick else (options.turns, options.patience / len(FILES))
    found, status = run_all([f"--turns={turns}", f"--patience={patience}"], options.only, options.quick)
    if found is None:
        return status
    command = shlex.join(("python", "-m", "benchmarks.run", *sys.argv[1:]))
    result = summarise(found, command, turns)
    if not options.only:
        result["scaling"] = []
        print(f"\n[{time.strftime('%H:%M:%S')}] scaling", flush=True)
        for series in scaling.measure(result["ceilings"]):
            result["scaling"].append(series)
            print(f"{series['op']} over {series['axis']}: slope {series['slope']:.2f}, expected {series['expected']:.2f}")
        print(f"\n[{time.strftime('%H:%M:%S')}] instruction counts", flush=True)
        if shutil.which("valgrind"):
            result["instructions"] = instructions.count()
        else:
            print("valgrind is not installed: none")
    result["seconds"] = round(time.monotonic() - began)

    stored = HERE / "results" / f"{slug(result['machine'])}.json"
    print(f"\n{report.tables(result)}\n")
    if stored.exists():
        print(
            "\n".join(guard.regressions(json.loads(stored.read_text()), result)) or f"no slower than {stored.name} beyond noise"
        )
    output = options.output or (None if options.only or options.quick else stored)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {output}")
    if output == stored:
        report.publish(stored)
    print(f"{result['seconds']} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
