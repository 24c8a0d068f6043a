"""Whether a result is slower than a stored one of the same machine, by ratios to peers and by instructions, not by times.

    python -m benchmarks.guard NEW [STORED]           by default the stored result of the same machine
    python -m benchmarks.guard NEW STORED --noise     of two runs of one revision: by what part ratios differ

A ratio counts as fallen where it is below the stored one by more than the noise of both: the ratios of a workload's turns,
each of which times us and a peer side by side, are independent repeats, and the tolerance is three standard errors of their
difference in logarithms, at least FLOOR. Instruction counts have no noise to speak of: see instructions.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, quantiles, stdev
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# The turns of one run understate what differs from run to run: by so much or less, 95 of 100 ratios of two runs of the same
# kernels differed, 70 minutes apart on a virtual machine of 2 cores (half of them by 15 %). Without the merges, which the first
# of them timed in another way.
FLOOR = 0.34
INSTRUCTIONS = 0.03  # counts repeat to about 1e-4, those of a single token, which are small, to 2 %


def tolerance(stored: list[float], new: list[float]) -> float:
    """By what part a ratio may fall, from the ratios by turn of both results."""
    squares = [stdev(map(math.log, ratios)) ** 2 / len(ratios) for ratios in (stored, new) if len(ratios) > 1]
    return max(FLOOR, 1 - math.exp(-3 * math.sqrt(sum(squares))))


def both_ratios(stored: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str, list[float], list[float]]]:
    """Workload, peer, and the ratios by turn of both results, of what both measured."""
    before = {row["workload"]: row for row in stored["rows"]}
    for row in new["rows"]:
        for name, peer in row["peers"].items():
            old = before.get(row["workload"], {"peers": {}})["peers"].get(name)
            if old is not None and "ratio_by_turn" in old:
                yield row["workload"], name, old["ratio_by_turn"], peer["ratio_by_turn"]


def geometric(ratios: list[float]) -> float:
    return math.exp(mean(map(math.log, ratios)))


def noise(stored: dict[str, Any], new: dict[str, Any]) -> tuple[float, float]:
    """By what part the lower of two ratios lies below the other: the median, and what 95 of 100 keep to."""
    pairs = [sorted((geometric(old), geometric(ratios))) for _, _, old, ratios in both_ratios(stored, new)]
    parts = quantiles([1 - low / high for low, high in pairs], n=20, method="inclusive")
    return parts[9], parts[18]


def regressions(stored: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each ratio or count that became worse, and for each workload that is withheld now."""
    found = [f"{name}: withheld, for it fails its check" for name in new.get("withheld", ())]
    for workload, name, old, ratios in both_ratios(stored, new):
        most, expected, ratio = tolerance(old, ratios), geometric(old), geometric(ratios)
        if ratio < expected * (1 - most):
            found.append(f"{workload}: {expected:.2f} → {ratio:.2f} times {name}, noise allows {most:.0%}")
    return found + counted(stored.get("instructions"), new.get("instructions"))


def counted(stored: dict[str, Any] | None, new: dict[str, Any] | None) -> list[str]:
    """Kernels that execute more instructions. Those of another compiler or instruction set are not compared."""
    if stored is None or new is None or any(stored[key] != new[key] for key in ("compiler", "instruction_set")):
        return []
    both = [(name, stored["counts"][name], count) for name, count in new["counts"].items() if name in stored["counts"]]
    return [
        f"{name}: {before:,} → {count:,} instructions, {count / before - 1:+.1%}"
        for name, before, count in both
        if count > before * (1 + INSTRUCTIONS)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__.split("\n")[0])
    parser.add_argument("new", type=Path, metavar="NEW", help="a result that `benchmarks.run --output` wrote")
    parser.add_argument("stored", type=Path, nargs="?", metavar="STORED", help="the result to compare with")
    parser.add_argument("--noise", action="store_true", help="both are of one revision: print by what part ratios differ")
    options = parser.parse_args()
    if options.noise and not options.stored:
        parser.error("--noise needs STORED")
    new = json.loads(options.new.read_text())
    paths = [options.stored] if options.stored else sorted(RESULTS.glob("*.json"))
    for path in paths:
        stored = json.loads(path.read_text())
        if options.stored or stored.get("machine") == new["machine"]:
            if options.noise:
                print("half of the ratios differ by at most {:.0%}, 95 of 100 by {:.0%}".format(*noise(stored, new)))
                return 0
            found = regressions(stored, new)
            print("\n".join(found) if found else f"no slower than {path} beyond noise")
            return 1 if found else 0
    print(f"no stored result of this machine in {RESULTS}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
