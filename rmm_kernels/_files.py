"""Writing: a directory that appears whole or not at all, and the files in it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def check_target(target: str | Path) -> Path:
    """`target` as an absolute path, where `new_directory` may create it: absent or an empty directory.

    Raises:
        FileExistsError: it is a file, or a directory that holds something.
        FileNotFoundError: the directory it is to lie in does not exist.
    """
    path = Path(target).resolve()
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"output directory {target} exists and is not empty")
    elif path.exists():
        raise FileExistsError(f"output {target} exists and is not a directory")
    elif not path.parent.is_dir():
        raise FileNotFoundError(f"output {target} can't be created: {path.parent} is not a directory")
    return path


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A new directory beside `target`, renamed to it at the end and removed on any error or interrupt.

    Its files are not flushed to the disk: after a power cut they may be incomplete.
    """
    path = check_target(target)
    staging = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        staging.mkdir()
        yield staging
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, with the permissions any other new file in its directory gets.

    Raises:
        OSError: it can't be written, for want of space say.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file makes it readable by its owner alone


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
