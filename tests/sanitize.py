"""Runs the CPU kernels' tests under the address and undefined-behaviour sanitizers.

    python tests/sanitize.py [pytest arguments]

Builds the package with RMM_SANITIZE=1 in a temporary folder and tests that build with GCC's sanitizer libraries preloaded.
Leaks are not looked for: the interpreter and torch leave memory behind on purpose.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import isolated

# What runs no kernel of ours, or runs it as other tests do, only slower.
SKIPPED = " and ".join(
    f"not {word}" for word in ("ptxsim", "interpreter", "reference", "compile", "opcheck", "large", "import", "without")
)


def library(name: str) -> str:
    """The path of one of the compiler's runtime libraries."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"g++ has no {name}: install its sanitizer libraries")
    return str(Path(path).resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=900, help="seconds the tests may take (default: %(default)s)")
    arguments, pytest_arguments = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as temporary:
        package = isolated.copy_sources(Path(temporary))
        environment = {"RMM_SANITIZE": "1"}
        isolated.run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=package, env=environment)
        passed = isolated.passes(
            Path(sys.executable),
            package,
            package,
            "--capture=sys",  # a report goes to the process's own stderr
            *(pytest_arguments or [*isolated.OP_TESTS, "-k", SKIPPED]),
            env={
                # libstdc++ too: without it the sanitizer finds no __cxa_throw to intercept when the interpreter starts.
                "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
                "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            },
            timeout=arguments.timeout,
        )
    sys.exit(not passed)


if __name__ == "__main__":
    main()
