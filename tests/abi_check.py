"""Shows that one build serves two versions of torch: built against either, tested under the other.

    python tests/abi_check.py --other-python VENV/bin/python [pytest arguments]

The other interpreter must be of the same Python version, with another torch, pytest and expecttest; to build there,
setuptools, wheel and pybind11 as well. No network is used. The last lines say what was built where and ran where.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import isolated

SKIPPED = "not ptxsim and not interpreter and not compile and not large"  # neither depends on the ABI, and both take long


def torch_version(python: Path) -> str:
    done = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python} has no usable torch: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def build(python: Path, where: Path) -> Path:
    """A folder that holds the package as `python` installs it from a wheel of its own making."""
    sources, wheels, package = where / "sources", where / "wheels", where / "package"
    sources.mkdir()
    isolated.copy_sources(sources)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q")
    offline = ("--no-deps", "--no-index")
    isolated.run(*pip, "wheel", ".", "--no-build-isolation", *offline, "-w", wheels, cwd=sources)
    (wheel,) = wheels.glob("*.whl")
    isolated.run(*pip, "install", *offline, "--target", package, wheel, cwd=where)
    if not list((package / "rmm_kernels").glob("_C.*")):
        sys.exit(f"{wheel.name} has no compiled part")
    return package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other-python", type=Path, required=True, help="interpreter with another torch")
    parser.add_argument(
        "--timeout", type=float, default=900, help="seconds one run of the tests may take (default: %(default)s)"
    )
    arguments, pytest_arguments = parser.parse_known_args()

    this, other = Path(sys.executable), arguments.other_python.absolute()
    versions = {python: torch_version(python) for python in (this, other)}
    results = {}
    for builder, runner in ((this, other), (other, this)):
        with tempfile.TemporaryDirectory() as temporary:
            where = Path(temporary)
            package = build(builder, where)
            tests = pytest_arguments or [*isolated.OP_TESTS, "-k", SKIPPED]
            passed = isolated.passes(runner, package, where, *tests, env={}, timeout=arguments.timeout)
        verdict = "passes" if passed else "FAILS"
        results[f"built against torch {versions[builder]}, {verdict} under torch {versions[runner]}"] = passed
    print(*results, sep="\n")
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
