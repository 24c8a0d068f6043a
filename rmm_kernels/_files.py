"""Writing: a directory that appears whole or not at all, and the files in it. And opening files of tensors.

safetensors is imported where a file is read or written, for who calls the ops alone need not have it.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
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
            raise FileExistsError(f"output directory {Path(target)} exists and is not empty")
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
        try:
            staging.mkdir()
        except OSError as error:
            raise OSError(error.errno, f"output {target} can't be created: {error.strerror}") from error
        yield staging
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def open_tensors(path: Path) -> Any:
    """safetensors' handle of a file, whose tensors are read when asked for: a context, or not.

    Raises:
        SafetensorError, OSError: it can't be read, or is no such file.
    """
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, with the permissions any other new file in its directory gets.

    Raises:
        OSError: it can't be written, for want of space say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file makes it readable by its owner alone


_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorStream:
    """A safetensors file written one tensor after another, so that no two need be in memory: a context.

    Args:
        path: the file.
        dtype: of all tensors: float32, float16 or bfloat16.
        shapes: of all tensors by key, in the order they are going to come in.
    """

    def __init__(self, path: Path, dtype: torch.dtype, shapes: Mapping[str, Sequence[int]]) -> None:
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._left = list(shapes.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        self._begin, self._size = 8 + len(text), 8 + len(text) + end
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._bytes(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: it does not have the shape or dtype that the header says.
            OSError: it can't be written, for want of space say.
        """
        key, shape = self._left.pop(0)
        if list(tensor.shape) != list(shape) or tensor.dtype != self._dtype:
            raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)}; expected {self._dtype} {list(shape)}")
        self._bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def mapped(self, path: Path) -> dict[str, Tensor]:
        """The tensors by key, once all are written: views of the file mapped into memory. To change one changes no file.

        Args:
            path: where the file lies now.
        """
        storage = torch.from_file(str(path), shared=False, size=self._size, dtype=torch.uint8).untyped_storage()
        tensors, end = {}, self._begin
        for key, shape in self._shapes.items():
            begin, end = end, end + math.prod(shape) * self._dtype.itemsize
            tensors[key] = torch.empty(0, dtype=self._dtype).set_(storage[begin:end]).view(list(shape))
        return tensors

    def _bytes(self, data: bytes | memoryview) -> None:
        with _named(self._path):
            while len(data):
                data = data[self._file.write(data) :]

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self._left[0][0]} was not written")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    with _named(path):
        path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The error of a write, for want of space say, names no file by itself; from here it does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
