"""Triton kernels, one file per op, and their registration with the op library.

Nothing here imports Triton (a quarter of a second) until an op is first called: what is registered is a function that
imports the op's file then. A file that does not import raises there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLDEST = (3, 4)

# The file that holds each op's launcher, a function of the op's name and signature.
FILES: dict[str, str] = {name: name for name in ("gram", "truncated_svd", "project", "compress", "reconstruct")}
FILES |= {"lora_shrink": "lora_shrink", "lora_expand_": "lora_expand", "lora_forward_": "lora_forward"}
FILES |= {"lora_forward": "lora_forward"}


def absent() -> str | None:
    """Why these kernels can't run in this process, or None where they can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed; the package `triton` (3.4 or newer) brings it"
    # Read, not imported; and not asked of the installer, since Triton comes under several distributions' names.
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)['\"]", Path(spec.origin).read_text(encoding="utf-8"))
    if found is None:
        return f"Triton's version isn't stated in {spec.origin}; 3.4 or newer is needed"
    if (int(found[2]), int(found[3])) < OLDEST:
        return f"Triton {found[1]} is too old; 3.4 or newer is needed"
    return None


def register(register_kernel: Callable[[str, str, Callable[..., Any]], None]) -> None:
    """Give every op that has a file here its kernel."""
    for op, file in FILES.items():
        register_kernel(op, "triton", functools.partial(_call, op, file))


def _call(op: str, file: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(f"{__name__}.{file}"), op)(*args, **kwargs)
