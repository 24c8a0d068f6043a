"""One contender's merge from disk to disk in a process of its own, as the benchmark of merges runs it.

    python -m benchmarks.disk CONTENDER OUT ADAPTER... [--components P] [--threads T] [--cold]

prints JSON: the seconds of every merge, their median phases, and the peak of the process's resident memory with all that it
imports. OUT holds the last merge. Imports are not timed, nor what they leave to the garbage collector; a merge of less than
WARMED seconds is timed from its second time on; without --cold the adapters are in the page cache and nobody syncs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import resource
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rmm_kernels import adapters, delta, storage

from . import peers
from .timing import rounds
from .workloads import OURS, SCRIPT, SCRIPT_1_THREAD

WARMED = 2.0

_SCRIPT = {
    "read": [(peers, "load_file")],  # maps the files: their pages are read by the stack
    "stack": [(torch, "stack")],
    "compress": [(peers, "compressed")],
    "write": [(peers, "save_file")],
}
# By contender and phase, what is timed; a phase within another is not counted twice.
PHASES: dict[str, dict[str, list[tuple[Any, str]]]] = {
    OURS: {
        "read": [(adapters.Adapter, "expect"), (adapters.Adapter, "read_factor")],
        "stack": [(adapters.FactorStack, "fill")],
        "compress": [(sys.modules["rmm_kernels.merge"], "compress")],
        "errors": [(delta, "restored_grams"), (delta, "squares")],
        "write": [(storage, "write_factor"), (storage, "write_rest")],
    },
    SCRIPT: _SCRIPT,
    SCRIPT_1_THREAD: _SCRIPT,
}


class Phases:
    """Seconds spent in each phase since the last `take`."""

    def __init__(self, functions: dict[str, list[tuple[Any, str]]]) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._within = [0.0]  # of the calls now running, the seconds that inner phases took
        for phase, places in functions.items():
            for owner, name in places:
                setattr(owner, name, self._timed(phase, getattr(owner, name)))

    def take(self, seconds: float) -> dict[str, float]:
        """The phases of a merge that took `seconds`; "other" is what none of them accounts for."""
        spent, self._spent = dict(self._spent), defaultdict(float)
        return {**spent, "other": seconds - sum(spent.values())} if spent else {}

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self._spent[phase] += seconds - self._within.pop()
                self._within[-1] += seconds

        return timed

    def add(self, phase: str, seconds: float) -> None:
        self._spent[phase] += seconds


def forget(directories: list[Path]) -> None:
    """Drop all files below from the page cache."""
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # a page that is not on the disk yet can't be dropped
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def run(options: argparse.Namespace) -> dict[str, Any]:
    paths = {path.parent.name if path.name == "lora_r16" else path.name: path for path in options.adapters}
    try:
        merger = peers.MERGE[options.contender](paths, options.components)
    except peers.Absent as reason:
        return {"absent": str(reason)}
    phases = Phases(PHASES.get(options.contender, {}))

    def once() -> tuple[float, dict[str, float]]:
        shutil.rmtree(options.out, ignore_errors=True)
        if options.cold:
            forget(options.adapters)
        start = time.perf_counter()
        merger.write(options.out)
        if options.cold:
            written = time.perf_counter()
            flush(options.out)
            phases.add("flush", time.perf_counter() - written)
        seconds = time.perf_counter() - start
        return seconds, phases.take(seconds)

    torch.set_num_threads(options.threads)
    gc.collect()
    gc.freeze()
    with torch.inference_mode():
        first = once()
        timed = [first] if options.cold or first[0] > WARMED else [once() for _ in range(rounds(first[0])["rounds"])]
    return {
        "seconds": [seconds for seconds, _ in timed],
        "phases": {phase: median(found[phase] for _, found in timed) for phase in timed[0][1]},
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__.split("\n")[0])
    parser.add_argument("contender", choices=peers.MERGE, metavar="CONTENDER", help=", ".join(peers.MERGE))
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER")
    parser.add_argument("--components", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cold", action="store_true", help="read from the disk and flush to it, not from and to the page cache"
    )
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
