"""PEFT LoRA directories in and out: adapter_config.json, adapter_model.safetensors and whatever lies beside them."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._files import new_directory, open_tensors, write_json, write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

# Left by a trainer to resume from; no part of the adapter.
TRAINER_STATE = re.compile(
    r"optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|training_args\.bin"
)

# With these the update of a module is not scaling · lora_B @ lora_A of one linear layer.
_REFUSED = {
    "target_parameters": "LoRA on bare parameters, such as fused experts",
    "use_qalora": "QA-LoRA pools the input of lora_A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "kasa_config": "KaSA puts a diagonal between the factors",
    "monteclora_config": "MonteCLoRA samples around the factors",
    "arrow_config": "Arrow routes between adapters",
}

_REQUEST = 1 << 17  # bytes: of a larger request Linux may read no more than this ahead

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterError(ValueError):
    """What is wrong with an adapter, on one line that names the path or task and, where there is one, the module."""


@dataclass(frozen=True)
class LoraFactors:
    """One module of one adapter: ΔW = scaling · lora_b @ lora_a."""

    lora_a: Tensor
    """[r, in]"""
    lora_b: Tensor
    """[out, r]"""
    scaling: float
    """alpha / r, or alpha / √r with use_rslora"""
    magnitude: Tensor | None = None
    """DoRA's vector [out], carried only"""


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of one safetensors file, by name, read when asked for. `keys` maps names to the file's own keys."""

    def __init__(self, path: Path, keys: Mapping[str, str]) -> None:
        self._path = path
        self._keys = dict(keys)

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        with open_tensors(self._path) as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Entry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """bytes from the start of the file"""
    end: int


class _Weights:
    """adapter_model.safetensors: tensors as views of the mapped file, or read into the caller's memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_tensors(path):  # refuses a corrupt header, and one that does not fit the file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self.entries: dict[str, _Entry] = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            self.entries[key] = _Entry(key, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, 8 + size + end)

    @functools.cached_property
    def _mapped(self) -> Any:
        return open_tensors(self.path)

    def tensor(self, entry: _Entry) -> Tensor:
        tensor: Tensor = self._mapped.get_tensor(entry.key)
        return tensor

    def read(self, file: io.FileIO, entry: _Entry, target: memoryview) -> None:
        """Read a tensor's bytes from `file`, which is this one opened. No page of it is mapped."""
        file.seek(entry.begin)
        while target:
            count = file.readinto(target)
            if not count:
                raise AdapterError(f"{self.path} ends within {entry.key}")
            target = target[count:]


class Adapter:
    """One PEFT LoRA adapter on disk. Only its headers are read at first; tensors are memory mapped.

    Factors keep their orientation whatever fan_in_fan_out says, which is about the base weight alone.

    Attributes:
        name: the task's name.
        path: the directory.
        config: adapter_config.json as it stands.
        base_model: what the config calls the base model, None where it does not say.
        modules: paths of the adapted modules in the base model, such as "encoder.layer.0.attention.self.query", sorted.
        extras: the other tensors of adapter_model.safetensors by key (modules_to_save, biases, DoRA vectors, LoRA on
            embeddings and convolutions), read when asked for. They are carried through a merge unchanged.
        files: the files beside the adapter by name, such as head.safetensors. They are carried unchanged. This is every
            regular file directly in the directory but the adapter's own, hidden files, and what a trainer leaves to resume
            from (optimizer.pt, trainer_state.json and the like).
        skipped: names of what else lies in the directory, subdirectories too: not carried.
        beyond_factors: what this adapter does to the model besides ΔW = scaling · lora_B @ lora_A, one phrase each. All of
            it survives merge and restore; a forward from basis and coefficients alone lacks it.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.name = name
        self.path = Path(path)
        self.config = _read_config(self.path)
        base = self.config.get("base_model_name_or_path")
        self.base_model: str | None = str(base) if base else None
        self._weights = _open_weights(self.path)
        self._entries, extras = self._sort_keys()
        self.modules = tuple(sorted(self._entries))
        self.extras: Mapping[str, Tensor] = StoredTensors(self._weights.path, extras)
        self._scaling = {module: self._check(module) for module in self.modules}
        self.files, self.skipped = _beside(self.path)
        self.beyond_factors = beyond_factors(self.config, extras)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the base weight."""
        a, b = self._find(module)
        return b.shape[0], a.shape[1]

    def rank(self, module: str) -> int:
        return self._find(module)[0].shape[0]

    def scaling(self, module: str) -> float:
        self._find(module)
        return self._scaling[module]

    def dtype(self, module: str) -> torch.dtype:
        return _DTYPES[self._find(module)[0].dtype]

    def factor_bytes(self, module: str) -> int:
        return sum(entry.end - entry.begin for entry in self._find(module))

    def factors(self, module: str) -> LoraFactors:
        """The module's factors, as views of the mapped file."""
        return LoraFactors(
            self.factor(module, "A"), self.factor(module, "B"), self.scaling(module), self.extras.get(magnitude_key(module))
        )

    def factor(self, module: str, side: str) -> Tensor:
        """lora_A or lora_B of the module, as a view of the mapped file."""
        return self._weights.tensor(self._find(module)["AB".index(side)])

    def open(self) -> io.FileIO:
        """adapter_model.safetensors, for `read_factor`."""
        return io.FileIO(self._weights.path)

    def read_factor(self, file: io.FileIO, module: str, side: str, target: memoryview) -> None:
        """Read the bytes of lora_A or lora_B into `target`, which is as long as they are."""
        self._weights.read(file, self._find(module)["AB".index(side)], target)

    def expect(self, file: io.FileIO, module: str) -> None:
        """Have the system read the module's factors into its page cache, where it can, without waiting for it."""
        if hasattr(os, "posix_fadvise"):
            first, last = sorted((entry.begin, entry.end) for entry in self._find(module))
            for start, end in [(first[0], last[1])] if first[1] == last[0] else [first, last]:
                for begin in range(start, end, _REQUEST):
                    size = min(_REQUEST, end - begin)
                    os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_WILLNEED)

    def __contains__(self, module: object) -> bool:
        return module in self._entries

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {str(self.path)!r}, {len(self.modules)} modules)"

    def _find(self, module: str) -> tuple[_Entry, _Entry]:
        """Where its lora_A and lora_B lie."""
        try:
            return self._entries[module]
        except KeyError:
            raise AdapterError(f"adapter {self.name!r} has no module {module!r}") from None

    def _sort_keys(self) -> tuple[dict[str, tuple[_Entry, _Entry]], dict[str, str]]:
        """The file's tensors as {module: (lora_A, lora_B)} and {name of an extra: its key}."""
        sides: dict[str, dict[str, _Entry]] = {}
        extras: dict[str, str] = {}
        names: set[str] = set()
        for key, entry in self._weights.entries.items():
            match = _FACTOR.fullmatch(key) or _MAGNITUDE.fullmatch(key)
            if match is None:
                extras[key] = key
                continue
            module, adapter = match["module"], match["adapter"]
            if not module.startswith(PREFIX):
                raise AdapterError(f"{self._weights.path}: key {key!r} does not begin with {PREFIX!r}, as PEFT's do")
            module = module.removeprefix(PREFIX)
            if adapter:
                names.add(adapter)
            side = match["side"] if match.re is _FACTOR else None
            if side is None:
                extras[magnitude_key(module)] = key
            elif len(entry.shape) > 2:
                extras[factor_key(module, side)] = key
            elif sides.setdefault(module, {}).setdefault(side, entry) is not entry:
                raise AdapterError(f"{self._weights.path}: module {module!r} has two lora_{side}")
        if len(names) > 1:
            raise AdapterError(f"{self._weights.path} holds several adapters ({', '.join(sorted(names))}); split it first")
        for module, found in sides.items():
            if len(found) == 1:
                present, missing = ("A", "B") if "A" in found else ("B", "A")
                raise AdapterError(f"{self._weights.path}: module {module!r} has lora_{present} but no lora_{missing}")
        if not sides:
            raise AdapterError(f"{self._weights.path} holds no lora_A and lora_B of a linear layer")
        return {module: (found["A"], found["B"]) for module, found in sides.items()}, extras

    def _check(self, module: str) -> float:
        """Its scaling, if its two tensors are matrices of one supported dtype and of the rank the config gives."""
        a, b = self._find(module)
        try:
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
                raise AdapterError(
                    f"module {module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
                    "they must be [r, in] and [out, r], all at least 1"
                )
            if a.dtype != b.dtype or a.dtype not in _DTYPES:
                raise AdapterError(
                    f"module {module!r} has lora_A in {a.dtype} and lora_B in {b.dtype}; "
                    f"both must be the same one of {', '.join(_DTYPES)}"
                )
            rank, scaling = lora_rank_and_scaling(self.config, module)
            if rank != a.shape[0]:
                raise AdapterError(f"module {module!r} has rank {a.shape[0]} in {WEIGHTS}, but {CONFIG} says {rank}")
        except AdapterError as error:
            raise AdapterError(f"adapter {self.path}: {error}") from None
        return scaling


def load_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Open a PEFT LoRA directory.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors.
        name: the task's name; the directory's own unless given.

    Raises:
        AdapterError: something is missing, corrupt or not supported, or config and tensors disagree.
    """
    return Adapter(path, os.path.basename(os.path.abspath(path)) if name is None else name)


def load_adapters(adapters: Iterable[str | Path | Adapter], names: Sequence[str] | None = None) -> list[Adapter]:
    """Open several adapters, each under a name of its own.

    Args:
        adapters: directories, or adapters already opened, which keep their names.
        names: one for each adapter. Unless given, a directory's name, or its parent's where several share it.

    Raises:
        AdapterError: as `load_adapter`; or two adapters have the same name, or there are not as many names as adapters.
    """
    given = list(adapters)
    if names is not None:
        if len(names) != len(given):
            raise AdapterError(f"names holds {len(names)} names for {len(given)} adapters; give one for each")
        chosen = list(names)
    else:
        chosen = _default_names(given)
    for name in chosen:
        if not name or not name.isprintable():
            raise AdapterError(f"task name {name!r} must be printable and not empty")
    taken: dict[str, str | Path | Adapter] = {}
    for adapter, name in zip(given, chosen, strict=True):
        if name in taken:
            raise AdapterError(f"two adapters have the task name {name!r}: {taken[name]} and {adapter}; give names")
        taken[name] = adapter
    return [
        adapter if isinstance(adapter, Adapter) and adapter.name == name else Adapter(_path(adapter), name)
        for adapter, name in zip(given, chosen, strict=True)
    ]


def save_adapter(
    directory: str | Path,
    config: Mapping[str, Any],
    factors: Mapping[str, LoraFactors],
    extras: Mapping[str, Tensor] | None = None,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` loads; all of it or nothing.

    Args:
        directory: absent, or an empty directory.
        config: what adapter_config.json is to hold; it says every module's rank and scaling.
        factors: by module path in the base model.
        extras: further tensors of adapter_model.safetensors, by key.
        files: further files, by name, to be copied.

    Raises:
        AdapterError: a module's rank or scaling is not what `config` says.
        OSError: the directory exists and is not empty, or can't be written.
    """
    tensors = dict(extras or {})
    for module, factor in factors.items():
        rank, scaling = lora_rank_and_scaling(config, module)
        if factor.lora_a.shape[0] != rank or not math.isclose(factor.scaling, scaling, rel_tol=1e-6):
            raise AdapterError(
                f"module {module!r} has rank {factor.lora_a.shape[0]} and scaling {factor.scaling:g}, "
                f"but config says {rank} and {scaling:g}"
            )
        tensors[factor_key(module, "A")] = factor.lora_a.contiguous()
        tensors[factor_key(module, "B")] = factor.lora_b.contiguous()
        if factor.magnitude is not None:
            tensors[magnitude_key(module)] = factor.magnitude
    with new_directory(directory) as staging:
        write_json(staging / CONFIG, config, indent=2)
        write_tensors(staging / WEIGHTS, tensors)
        copy_files(files or {}, staging)


class FactorStack:
    """A stack of one factor of many adapters: a context, inside which the next factor takes the last one's memory (freeing
    it would fragment the heap) and the adapters' files stay open, the first `_KEPT_OPEN` of them."""

    _KEPT_OPEN = 256  # descriptors; a process may often have no more than 1024

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._files: dict[Adapter, io.FileIO] = {}

    def __enter__(self) -> FactorStack:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def fill(self, adapters: Sequence[Adapter], module: str, side: str, rank: int, least: torch.dtype) -> Tensor:
        """lora_A as [n, rank, in] or lora_B as [n, out, rank], until the next call; lower ranks are padded with zeros.

        The dtype is one that holds `least` and each adapter's.
        """
        out, wide = adapters[0].shape(module)
        axis, shape = (0, (rank, wide)) if side == "A" else (1, (out, rank))
        dtypes = [adapter.dtype(module) for adapter in adapters]
        dtype = functools.reduce(torch.promote_types, set(dtypes), least)
        size = len(adapters) * math.prod(shape) * dtype.itemsize
        stack = self._reserve(size).view(dtype).view(len(adapters), *shape)
        rows = stack.view(len(adapters), -1).view(torch.uint8).numpy()
        for index, adapter in enumerate(adapters):
            true = adapter.rank(module)
            if true == rank and dtypes[index] == dtype:
                self._read(adapter, module, side, rows[index].data)
            else:
                own = torch.empty((*shape[:axis], true, *shape[axis + 1 :]), dtype=dtypes[index])
                self._read(adapter, module, side, own.view(-1).view(torch.uint8).numpy().data)
                stack[index].narrow(axis, 0, true).copy_(own)
                stack[index].narrow(axis, true, rank - true).zero_()
        return stack

    def expect(self, adapters: Sequence[Adapter], module: str) -> None:
        """Both factors of the module are going to be asked for: let the disk work while the processor does."""
        for adapter in adapters:
            file = self._file(adapter)
            if file is not None:
                adapter.expect(file, module)

    def _read(self, adapter: Adapter, module: str, side: str, target: memoryview) -> None:
        file = self._file(adapter)
        if file is not None:
            adapter.read_factor(file, module, side, target)
            return
        with adapter.open() as passing:
            adapter.read_factor(passing, module, side, target)

    def _file(self, adapter: Adapter) -> io.FileIO | None:
        """The adapter's file; None if too many are open."""
        file = self._files.get(adapter)
        if file is None and len(self._files) < self._KEPT_OPEN:
            file = self._files[adapter] = adapter.open()
        return file

    def _reserve(self, size: int) -> Tensor:
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


def copy_files(files: Mapping[str, Path], directory: Path) -> None:
    for name, source in files.items():
        shutil.copyfile(source, directory / name)


def factor_key(module: str, side: str) -> str:
    """PEFT's key of a module's lora_A or lora_B."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def magnitude_key(module: str) -> str:
    """PEFT's key of a module's DoRA vector."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def lora_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank `config` gives to `module`, by PEFT's rule: `r`, or the first entry of `rank_pattern` that matches."""
    rank = _by_pattern(config, "rank_pattern", "r", module)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{CONFIG} gives module {module!r} rank {rank!r}; it must be an integer of at least 1")
    return rank


def lora_scaling(config: Mapping[str, Any], module: str) -> float:
    """What PEFT multiplies lora_B @ lora_A by: alpha / r, or alpha / √r with use_rslora."""
    return lora_rank_and_scaling(config, module)[1]


def lora_rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """`lora_rank` and `lora_scaling` at once: the pattern that gives the rank is looked for once."""
    rank = lora_rank(config, module)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", module)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{CONFIG} gives module {module!r} lora_alpha {alpha!r}; it must be a finite number")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """As `peft.utils.get_pattern_key`: a pattern is a regular expression for the end of the module's path."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise AdapterError(f"{CONFIG}: {patterns} holds {pattern!r}, not a regular expression: {error}") from error
    return config.get(default)


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        problem = "is a file; give the adapter's directory" if directory.exists() else "does not exist"
        raise AdapterError(f"adapter {directory} {problem}")
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"adapter {directory} has no {CONFIG}") from None
    except OSError as error:
        raise AdapterError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}; it must be an object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is of peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path} sets {key} ({meaning}), which is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"{path}: {key} must be an object, got {config[key]!r}")
    return config


def _open_weights(directory: Path) -> _Weights:
    from safetensors import SafetensorError

    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / PICKLED).exists():
            raise AdapterError(
                f"adapter {directory} has only {PICKLED}, a pickle, and loading a pickle executes code it contains; "
                "if you trust it, convert it: safetensors.torch.save_file("
                f"torch.load({PICKLED!r}, weights_only=True), {WEIGHTS!r})"
            )
        raise AdapterError(f"adapter {directory} has no {WEIGHTS}")
    try:
        return _Weights(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from error


def _beside(directory: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """(the files that are carried, names of what is not); see `Adapter`."""
    files: dict[str, Path] = {}
    skipped: list[str] = []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name in (CONFIG, WEIGHTS):
            continue
        if name == PICKLED or name.startswith(".") or TRAINER_STATE.fullmatch(name) or not path.is_file():
            skipped.append(name)
        else:
            files[name] = path
    return files, tuple(skipped)


def beyond_factors(config: Mapping[str, Any], extras: Iterable[str]) -> tuple[str, ...]:
    """What an adapter with these extras does to the model besides ΔW = scaling · lora_B @ lora_A, one phrase each."""
    return tuple(_beyond_factors(config, list(extras)))


def _beyond_factors(config: Mapping[str, Any], extras: Sequence[str]) -> Iterator[str]:
    if config.get("use_dora") or any(key.endswith(".lora_magnitude_vector") for key in extras):
        yield "DoRA (use_dora)"
    if config.get("lora_bias") or any(re.search(r"\.lora_B(\.[^.]+)?\.bias$", key) for key in extras):
        yield "a bias on lora_B (lora_bias)"
    if config.get("bias", "none") != "none":
        yield f"trained biases (bias={config['bias']!r})"
    if config.get("alora_invocation_tokens"):
        yield "activated LoRA (alora_invocation_tokens)"
    if config.get("trainable_token_indices"):
        yield "trained tokens (trainable_token_indices)"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        yield f"base weights that PEFT changes on loading (init_lora_weights={init!r})"
    if any(".lora_embedding_" in key for key in extras):
        yield "LoRA on embeddings"
    if any(_FACTOR.fullmatch(key) for key in extras):
        yield "LoRA on convolutions"


def _path(adapter: str | Path | Adapter) -> Path:
    return adapter.path if isinstance(adapter, Adapter) else Path(adapter)


def _default_names(adapters: Sequence[str | Path | Adapter]) -> list[str]:
    """A directory's name, or its parent's where several directories share it."""
    shared = Counter(os.path.basename(os.path.abspath(path)) for path in adapters if not isinstance(path, Adapter))
    names = []
    for adapter in adapters:
        if isinstance(adapter, Adapter):
            names.append(adapter.name)
        else:
            path = Path(os.path.abspath(adapter))
            names.append(path.parent.name if shared[path.name] > 1 else path.name)
    return names
