"""Stored results as Markdown, and where the READMEs hold them.

    python -m benchmarks.report [RESULT]              writes the READMEs' tables and pictures from a stored result
    python -m benchmarks.report --check               exits with 1 where they are not what it renders to

What lies between a README's markers is written here alone; the marker names the result it came from.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .guard import RESULTS

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 2  # of a stored result
OURS = "rmm_kernels"
_BLOCK = re.compile(r"(<!-- from (?P<path>\S+), by python -m benchmarks\.report -->\n).*?(<!-- end -->)", re.S)
Row = dict[str, Any]
Result = dict[str, Any]


def _time(value: float) -> str:
    return f"{value * 1e6:.1f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def _ratio(value: float) -> str:
    """Two digits, cut rather than rounded: what misses an aim never reads as if it met it."""
    digits = 2 if value < 1 else 1 if value < 10 else 0
    return f"{math.floor(value * 10**digits + 1e-9) / 10**digits:.{digits}f}".removeprefix("0" if value < 1 else "")


def _table(heads: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """`heads` separated by |, the first and those that end in < to the left."""
    names = heads.split("|")
    yield "| " + " | ".join(name.rstrip("<") for name in names) + " |"
    yield "|" + "|".join("---" if i == 0 or name.endswith("<") else "--:" for i, name in enumerate(names)) + "|"
    for cells in rows:
        yield "| " + " | ".join(cells) + " |"
    yield ""


def load(path: Path) -> Result:
    """A stored result.

    Raises:
        ValueError: it is of another format.
    """
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {result.get('format')!r}; this reads {FORMAT}: measure again")
    return result


# ---------------------------------------------------------------- what was measured on


def about(result: Result) -> str:
    machine, build = result["machine"], result["build"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {build['instruction_set']}; {result['date'][:10]}, revision "
        f"{result['revision']}; `{result['command']}`, {result['seconds']} s; {versions}"
    )


def ceilings(result: Result) -> str:
    return "; ".join(
        f"{name} {value / 1e9:.1f} {'GFLOP' if name.startswith('gemm') else 'GB'}/s"
        for name, value in result["ceilings"].items()
    )


def bound(row: Row, result: Result) -> str:
    """What the roofline says bounds a row: memory left of its ridge, arithmetic right of it."""
    ends = f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    ridge = result["ceilings"][f"gemm{ends}"] / result["ceilings"][f"copy{ends}"]
    return "arithmetic" if row["flops"] / row["bytes"] > ridge else "memory"


# ---------------------------------------------------------------- tables


def _own(result: Result) -> Iterator[str]:
    def cells(row: Row) -> list[str]:
        return [
            row["workload"],
            str(row["threads"]),
            _time(row["ours"]["median"]),
            f"{row['bytes_per_s'] / 1e9:.2f}",
            f"{row['of_copy']:.0%}",
            f"{row['flops_per_s'] / 1e9:.1f}",
            f"{row['of_gemm']:.0%}",
            bound(row, result),
            f"{row['others']['median']:.0%}",
        ]

    return _table("workload|threads|median|GB/s|of copy|GFLOP/s|of GEMM|bound by<|others", map(cells, result["rows"]))


def _verdict(row: Row, peer: str) -> tuple[str, str]:
    """(target, met or missed) where `peer` is the fastest of a target's peers."""
    for target in row["targets"]:
        if target.get("fastest") == peer:
            return f"≥ {_ratio(target['ratio'])}", "met" if target["met"] else "**missed**"
    return "", ""


def _against(result: Result) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for row in result["rows"]:
            for name, peer in row["peers"].items():
                low, high = min(peer["ratio_by_turn"]), max(peer["ratio_by_turn"])
                yield [
                    row["workload"],
                    name,
                    _time(peer["times"]["median"]),
                    _ratio(peer["ratio"]),
                    f"{_ratio(low)} – {_ratio(high)}",
                    _ratio(peer["ratio_of_minima"]),
                    *_verdict(row, name),
                ]
            for target in row["targets"]:
                if target["met"] is None:
                    names = " or ".join(target["peers"])
                    yield [row["workload"], names, "not timed", "", "", "", f"≥ {_ratio(target['ratio'])}", ""]

    return _table("workload|peer<|its median|× our time|by turn|of the minima|target|<", rows())


def _sides(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """(contender, its times) of a row: we and our peers."""
    yield OURS, row["ours"]
    for name, peer in row["peers"].items():
        yield name, peer["times"]


PHASES = ("read", "stack", "compress", "errors", "write", "flush", "other")


def _merges(result: Result) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for row in result["rows"]:
            for name, side in _sides(row):
                if row["op"] != "merge" or "output" not in side:
                    continue
                output, median = side["output"], side["median"]
                phases = output["phases"]
                yield [
                    row["workload"],
                    name,
                    _time(median),
                    f"{row['shapes']['positions'] / median / 1e6:.2f}",
                    f"{row['bytes'] / median / 1e9:.2f}",
                    f"{output['peak_bytes'] / 1e9:.2f}",
                    *(f"{phases[phase]:.2f}" if phase in phases else "" for phase in PHASES),
                    f"{output['error']:.4f}",
                    f"{output['bytes'] / 1e6:.1f}",
                ]

    heads = "merge|by<|median|Mpositions/s|GB/s|peak GB|" + "|".join(f"{phase}, s" for phase in PHASES)
    return _table(f"{heads}|error of ΔW|MB written", rows())


def _scaling(result: Result) -> Iterator[str]:
    def cells(series: Row) -> list[str]:
        times = ", ".join(f"{size}: {_time(value)}" for size, value in zip(series["sizes"], series["seconds"], strict=True))
        return [series["op"], series["axis"], series["of"], times, f"{series['slope']:.2f}", f"{series['expected']:.2f}"]

    return _table("op|over<|at<|times<|slope|expected", map(cells, result.get("scaling", ())))


def _counts(result: Result) -> Iterator[str]:
    counted = result.get("instructions")
    if counted is None:
        return iter(())
    heads = f"instructions, {counted['instruction_set']}, compiler {counted['compiler']}|1 thread"
    return _table(heads, ((name, f"{count:,}") for name, count in counted["counts"].items()))


def tables(result: Result) -> str:
    """All of a result."""
    withheld = result.get("withheld", ())
    lines = [about(result) + ".", "", f"Ceilings: {ceilings(result)}.", "", *_own(result), *_against(result), *_merges(result)]
    lines += [*_scaling(result), *_counts(result)]
    if withheld:
        lines += [f"Withheld, for their checks failed: {'; '.join(withheld)}.", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------- the main README


def _row(result: Result, *words: str) -> Row | None:
    """The first row whose name has all of `words`."""
    return next((row for row in result["rows"] if all(word in row["workload"] for word in words)), None)


def _aims(result: Result) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for row in result["rows"]:
            for target in row["targets"]:
                name = target.get("fastest", " or ".join(target["peers"]))
                ratio = _ratio(row["peers"][name]["ratio"]) if target["met"] is not None else "not timed"
                verdict = "" if target["met"] is None else "met" if target["met"] else "**missed**"
                yield [row["workload"], str(row["threads"]), name, ratio, _ratio(target["ratio"]), verdict]

    return _table("|threads|fastest peer<|×|aim|<", rows())


def _bounds(result: Result) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for words in (
            ("compress 16x8, rank",),
            ("compress 64x64",),
            ("truncated_svd, 20000",),
            ("gram",),
            ("project",),
            ("reconstruct",),
            ("error_grams",),
            ("forward T=64, 64 of 64", "r=16", "Llama-3-8B"),
            ("forward T=256",),
        ):
            row = _row(result, *words)
            if row is not None:
                floor = f"{1 / row['of_copy']:.1f}"
                yield [row["workload"], str(row["threads"]), bound(row, result), floor, f"{row['of_gemm']:.0%}"]

    return _table("|threads|bound by<|× the copy's time|of GEMM", rows())


def _whole(result: Result) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for row in result["rows"]:
            if row["op"] == "merge" and "output" in row["ours"]:
                output, median = row["ours"]["output"], row["ours"]["median"]
                phases = output["phases"]
                disk = sum(phases.get(phase, 0) for phase in ("read", "write", "flush"))
                others = "; ".join(f"{name} {_ratio(peer['ratio'])}" for name, peer in row["peers"].items())
                yield [
                    row["workload"],
                    _time(median),
                    f"{row['shapes']['positions'] / median / 1e6:.2f}",
                    _time(phases["compress"]),
                    f"{disk / median:.0%}",
                    f"{output['peak_bytes'] / 1e9:.2f}",
                    others,
                ]

    heads = "|time|10⁶ positions/s|compress|disk's share|peak GB"
    return _table(f"{heads}|× our time<", rows())


def speed(result: Result) -> str:
    """The main README's section."""
    lines = [
        f"{about(result)}. Ceilings: {ceilings(result)}.",
        "",
        "Times of the fastest named peer by ours, beside what was aimed at:",
        "",
        *_aims(result),
        "Where it stands against the machine: a row's time by that of copying its bytes, and its share of a large GEMM's rate:",
        "",
        *_bounds(result),
        "Merges from disk to disk; cold ones read from the disk and flush to it; peak of the process's memory, torch included:",
        "",
        *_whole(result),
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- files

# By file: what stands between its markers.
RENDERED: dict[Path, Callable[[Result], str]] = {ROOT / "README.md": speed, ROOT / "benchmarks" / "README.md": tables}


def _block(readme: Path) -> re.Match[str]:
    found = _BLOCK.search(readme.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{readme} has no block marked <!-- from RESULT, by python -m benchmarks.report -->")
    return found


def source(readme: Path) -> Path:
    """The stored result that the marker of `readme` names."""
    return ROOT / _block(readme)["path"]


def rendered(readme: Path, result: Path | None = None) -> str:
    """`readme` with its block written anew from `result`, or from the one that its marker names."""
    found = _block(readme)
    path = source(readme) if result is None else result
    marker = f"<!-- from {path.relative_to(ROOT)}, by python -m benchmarks.report -->\n"
    return found.string[: found.start()] + marker + RENDERED[readme](load(path)) + found[3] + found.string[found.end() :]


def publish(result: Path) -> None:
    """Write both READMEs' blocks and the pictures from a stored result."""
    from . import plots

    for readme in RENDERED:
        readme.write_text(rendered(readme, result), encoding="utf-8")
    plots.draw(load(result), RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", metavar="RESULT", help="of benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.check:
        stale = [str(readme) for readme in RENDERED if rendered(readme) != readme.read_text(encoding="utf-8")]
        print("\n".join(f"{readme} is not what its result renders to" for readme in stale))
        return 1 if stale else 0
    if options.result is None:
        parser.error("give a stored result, or --check")
    publish(options.result.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
