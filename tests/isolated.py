"""What abi_check.py and sanitize.py share: building the package outside the checkout and testing that build."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OP_TESTS = sorted(
    str(path)
    for op in ("compress", "error_grams", "gram", "library", "lora_*", "project", "reconstruct", "truncated_svd")
    for path in (ROOT / "tests").glob(f"test_{op}.py")
)


def copy_sources(to: Path) -> Path:
    """The files a build reads, without anything built before."""
    for name in ("csrc", "rmm_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> None:
    """Runs it with its output on ours; raises CalledProcessError."""
    subprocess.run([str(part) for part in command], cwd=cwd, env={**os.environ, **(env or {})}, check=True)


def passes(python: Path, package: Path, where: Path, *arguments: str, env: dict[str, str], timeout: float) -> bool:
    """pytest in `python` on the package that lies in the folder `package`, and on no other."""
    env = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **env}
    found = f"import pathlib, rmm_kernels as m; assert pathlib.Path(m.__file__).is_relative_to({str(package)!r}), m.__file__"
    run(python, "-c", found, cwd=where, env=env)
    command = [str(python), "-m", "pytest", "-q", "-r", "f", *arguments]
    return subprocess.run(command, cwd=where, env=env, timeout=timeout).returncode == 0
