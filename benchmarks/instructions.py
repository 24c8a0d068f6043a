"""Instructions that the CPU kernels execute, counted by callgrind: the same on a busy machine as on a quiet one.

    python -m benchmarks.instructions RESULT          counts, and compares with those of a stored result

Counted is what runs within an op, on one thread, after a first call. valgrind knows no AVX-512: the kernels choose AVX2
under it, and that is what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import guard

HERE = Path(__file__).resolve().parent


def kernels() -> dict[str, Callable[[], object]]:
    """A small call of every kernel, by op and shape."""
    import torch

    import rmm_kernels

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    calls: dict[str, Callable[[], object]] = {}
    for r, n in ((16, 8), (16, 20), (64, 8), (16, 64)):
        x = randn(n, 512, r)
        calls[f"compress 512 of {r}x{n}"] = lambda x=x: rmm_kernels.compress(x, 4)
    x = randn(8, 16, 512).mT
    calls["compress 512 of 16x8, positions innermost"] = lambda x=x: rmm_kernels.compress(x, 4)
    basis, coeff, _ = rmm_kernels.compress(x, 4)
    calls["project 512 of 16x8"] = lambda: rmm_kernels.project(x, basis)
    calls["reconstruct 512 of 16x8"] = lambda: rmm_kernels.reconstruct(basis, coeff, torch.arange(8))
    calls["error_grams 512 of 16x8"] = lambda: rmm_kernels.error_grams(x, basis, coeff)
    matrices = randn(512, 16, 8)
    calls["gram 512 of 16x8"] = lambda: rmm_kernels.gram(matrices, center=True)
    calls["truncated_svd 512 of 16x8"] = lambda: rmm_kernels.truncated_svd(matrices, 4)
    for tokens, n in ((1, 1), (64, 64), (256, 8)):
        ids = torch.arange(tokens) % n
        inputs, basis_a, coeff_a = randn(tokens, 512), randn(4, 16, 512), randn(n, 3, 512)
        y, u, basis_b, scaling = randn(tokens, 512), randn(tokens, 16), randn(4, 16, 512).mT, torch.ones(n)
        calls[f"lora_shrink T={tokens}, {n} tasks, d=512"] = lambda a=(inputs, basis_a, coeff_a, ids): rmm_kernels.lora_shrink(
            *a
        )
        calls[f"lora_expand_ T={tokens}, {n} tasks, d=512"] = lambda a=(y, u, basis_b, coeff_a, ids, scaling): (
            rmm_kernels.lora_expand_(*a)
        )
    return calls


def _control(*arguments: str) -> None:
    subprocess.run(["callgrind_control", *arguments, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def _counted() -> None:
    """Runs under callgrind: one dump for each kernel, named in its description."""
    import torch

    import rmm_kernels

    torch.set_num_threads(1)
    calls = kernels()
    for call in calls.values():
        call()
    _control("--instr=on")
    for name, call in calls.items():
        _control("--zero")
        call()
        _control(f"--dump={name}")
    print(json.dumps(rmm_kernels.build_info()))


def count() -> dict[str, Any]:
    """Counts by kernel, and what they depend on: build and torch."""
    import torch

    if shutil.which("valgrind") is None:
        raise FileNotFoundError("valgrind is not installed: its callgrind counts the instructions")
    ops = ("compress", "project", "reconstruct", "error_grams", "gram", "truncated_svd", "lora_shrink", "lora_expand")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "counts"
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--instr-atstart=no", "--collect-atstart=no"]
        valgrind += [f"--toggle-collect=rmm::{op}_op*" for op in ops]
        done = subprocess.run(
            [*valgrind, sys.executable, "-m", "benchmarks.instructions", "--counted"],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"callgrind failed:\n{done.stderr[-2000:]}")
        counts = {}
        for file in Path(scratch).glob("counts.*"):
            text = file.read_text()
            kernel, total = re.search(r"^desc: Trigger: dump (.*)", text, re.M), re.search(r"^summary: (\d+)", text, re.M)
            if kernel and total:
                counts[kernel[1]] = int(total[1])
    build = json.loads(done.stdout)
    return {
        "torch": torch.__version__,
        "compiler": build["compiler"],
        "instruction_set": build["instruction_set"],
        "counts": dict(sorted(counts.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", metavar="RESULT", help="of benchmarks/results")
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.counted:
        _counted()
        return 0
    now = count()
    for name, value in now["counts"].items():
        print(f"{value:>12,}  {name}")
    found = guard.counted(json.loads(options.result.read_text()).get("instructions"), now) if options.result else []
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
