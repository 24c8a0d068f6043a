"""Model checkpoints in safetensors, one file or sharded: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import open_tensors, write_json, write_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 4 << 30
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, on one line that names it and, where there is one, the tensor."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model by name, memory mapped, read when asked for. Only headers are read at first.

    Attributes:
        path: what was given: a .safetensors file, or a directory with model.safetensors or model.safetensors.index.json.
        shapes, dtypes: of every tensor, by name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        for name, file in _files(self.path).items():
            self._files[name] = file
            view = file.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise CheckpointError(f"checkpoint {path}: {name} is {view.get_dtype()}; allowed are {', '.join(_DTYPES)}")
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = _DTYPES[view.get_dtype()]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def finite(self, name: str) -> Tensor:
        """The tensor; CheckpointError if it holds NaN or Inf."""
        tensor = self[name]
        if tensor.dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"checkpoint {self.path}: {name} holds NaN or Inf")
        return tensor


def check_alike(checkpoints: list[Checkpoint]) -> None:
    """All have the same tensors, of the same shapes and dtypes.

    Raises:
        CheckpointError: names one tensor that differs, and how.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for one, two in ((first, other), (other, first)):
            missing = sorted(set(one) - set(two))
            if missing:
                raise CheckpointError(f"checkpoint {two.path} lacks {missing[0]}, which {one.path} has")
        for name in first:
            for what, mine, theirs in (
                ("shape", list(first.shapes[name]), list(other.shapes[name])),
                ("dtype", first.dtypes[name], other.dtypes[name]),
            ):
                if mine != theirs:
                    raise CheckpointError(f"{name} has {what} {mine} in {first.path}, {theirs} in {other.path}")


def is_checkpoint(path: str | Path) -> bool:
    """Whether it looks like a model checkpoint, as opposed to a PEFT directory."""
    path = Path(path)
    return path.suffix == ".safetensors" or (path / WEIGHTS).exists() or (path / INDEX).exists()


def _files(path: Path) -> dict[str, Any]:
    """The open file of every tensor."""
    if path.is_dir() and (path / INDEX).is_file():
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = {name: str(shard) for name, shard in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX} is malformed: {type(error).__name__} {error}") from error
        opened = {}
        for shard in sorted(set(shards.values())):
            if not (path / shard).is_file():
                raise CheckpointError(f"checkpoint {path} lacks the shard {shard}, which {INDEX} lists")
            opened[shard] = _open(path / shard)
        for name, shard in shards.items():
            if name not in opened[shard].keys():  # noqa: SIM118
                raise CheckpointError(f"{path / shard} lacks {name}, which {INDEX} lists")
        return {name: opened[shard] for name, shard in shards.items()}
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        problem = f"has neither {WEIGHTS} nor {INDEX}" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {problem}")
    opened_file = _open(file)
    return dict.fromkeys(opened_file.keys(), opened_file)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError

    try:
        return open_tensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def write_checkpoint(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = _SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` (of one tensor at least) with their index.

    No more than one shard is held in memory.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        write_tensors(directory / f"{len(shards)}.tmp", held)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        index = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    for i, name in enumerate(names):
        (directory / f"{i}.tmp").rename(directory / name)
