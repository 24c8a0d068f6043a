"""The `rmm-kernels` command: merge adapters, restore one, look into a merge, verify it against the originals; and others."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from . import backends, build_info
from ._files import check_target
from ._version import __version__
from .adapters import load_adapters
from .delta import finite
from .merge import DEFAULT_COMPONENTS, MergedAdapters, merge
from .storage import DTYPES

if TYPE_CHECKING:
    from rich.table import Table

    from .bench import Row

# What a command raises for bad input or a full disk, and nothing else.
_EXPECTED = (ValueError, OSError)

# What ends a command as Ctrl-C does: `kill`, and a terminal that goes away (not on Windows).
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1 where `verify` found a difference; 2 for an error, told on one line of stderr."""
    options = _parser().parse_args(arguments)
    # So that nothing half written is left behind. A signal that is ignored stays so, as SIGHUP is under nohup.
    heeded = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in heeded}
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _EXPECTED as error:
        print(f"rmm-kernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rmm-kernels: interrupted", file=sys.stderr)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rmm-kernels: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rmm-kernels", description="Many LoRA adapters on one shared basis.")
    parser.add_argument("--version", action="version", version=f"rmm-kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("merge", help="merge PEFT LoRA directories into one")
    command.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a directory with adapter_model.safetensors")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="where to write; must not exist, or be empty")
    command.add_argument(
        "-p",
        "--components",
        type=int,
        default=DEFAULT_COMPONENTS,
        metavar="P",
        help=f"directions kept besides the mean, 0 to min(r, n - 1); default {DEFAULT_COMPONENTS}",
    )
    command.add_argument("--clamp", action="store_true", help="where P is too large for a module, use the most it allows")
    command.add_argument("--dtype", choices=DTYPES, help="to store in; default: the adapters' own")
    command.add_argument("--compare", action="store_true", help="also show truncated and quantised adapters; takes longer")
    _add_names(command)
    _add_json(command)
    command.set_defaults(run=_merge)

    command = commands.add_parser("restore", help="write one task back as a PEFT directory")
    command.add_argument("directory", metavar="DIR", help="a merged directory")
    command.add_argument("task", metavar="TASK")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="where to write; must not exist, or be empty")
    command.set_defaults(run=_restore)

    command = commands.add_parser("inspect", help="show tasks, storage and errors of a merged directory")
    command.add_argument("directory", metavar="DIR", help="a merged directory")
    _add_json(command)
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "verify", help="compare a merged directory with the original adapters; exit code 1 if they differ"
    )
    command.add_argument("directory", metavar="DIR", help="a merged directory")
    command.add_argument("adapters", nargs="+", metavar="ADAPTER", help="the originals of some or all tasks, in any order")
    _add_names(command)
    _add_json(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("extract", help="make a LoRA adapter from a base model and its full fine-tune (PT-SVD)")
    command.add_argument(
        "base", metavar="BASE", help="a .safetensors file, or a directory with model.safetensors or its shards"
    )
    command.add_argument("finetuned", metavar="FINETUNED", help="likewise, with the same tensors")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="where to write; must not exist, or be empty")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("-r", "--rank", type=int, metavar="R", help="of every layer")
    size.add_argument("--energy", type=float, metavar="E", help="each layer's rank captures this share of its ‖ΔW‖²")
    size.add_argument("--max-bytes", type=int, metavar="N", help="of all factors; ranks go where they lower the error most")
    command.add_argument("--include", metavar="REGEX", help="only modules whose path matches; default: all but embeddings")
    command.add_argument("--dtype", choices=DTYPES, help="of the factors; default: the checkpoints' own")
    command.add_argument("--base-model", metavar="NAME", help="what adapter_config.json calls the base model; default: BASE")
    _add_json(command)
    command.set_defaults(run=_extract)

    command = commands.add_parser("lore", help="merge LoRA adapters, or checkpoints, into one (LoRE-Merging)")
    command.add_argument("models", nargs="+", metavar="MODEL", help="all PEFT directories, or all safetensors checkpoints")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="where to write; must not exist, or be empty")
    command.add_argument("--mu", type=float, default=0.01, help="weight of the nuclear norm; default 0.01")
    command.add_argument("--prox", choices=("fixed", "squared"), default="fixed", help="of the norm, or of its square")
    command.add_argument("--iterations", type=int, default=20, metavar="N", help="at most; default 20")
    command.add_argument("--scale", type=float, default=1.0, metavar="λ", help="of the low-rank parts; default 1")
    command.add_argument("--finish", choices=("average", "ties"), default="average", help="how low-rank parts are merged")
    command.add_argument("--density", type=float, default=0.2, metavar="D", help="share of entries TIES keeps; default 0.2")
    command.add_argument("-r", "--rank", type=int, metavar="R", help="of a merged adapter, at most")
    _add_names(command)
    _add_json(command)
    command.set_defaults(run=_lore)

    command = commands.add_parser(
        "bench", help="time every op beside plain torch, in some seconds; exit code 1 if one is wrong"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, …; default cpu")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the inputs; default float32")
    command.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: torch's own choice")
    _add_json(command)
    command.set_defaults(run=_bench)

    command = commands.add_parser("backends", help="show which implementation serves each op")
    _add_json(command)
    command.set_defaults(run=_backends)
    return parser


def _add_names(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="the tasks' names, one for each adapter; default: the directory's name, or its parent's where several share it",
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _merge(options: argparse.Namespace) -> int:
    check_target(options.output)
    adapters = load_adapters(options.adapters, options.names)
    for adapter in adapters:
        if adapter.skipped:
            print(f"rmm-kernels: not carried from {adapter.path}: {', '.join(adapter.skipped)}", file=sys.stderr)
    merged = merge(
        adapters,
        options.components,
        dtype=DTYPES.get(options.dtype),
        clamp=options.clamp,
        compare=options.compare,
        progress=True,
        output=options.output,
    )
    _show(merged, options.json)
    return 0


def _restore(options: argparse.Namespace) -> int:
    merged = MergedAdapters.load(options.directory)
    merged.restore_to(options.task, options.output)
    print(f"{options.task}: {options.output}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _show(MergedAdapters.load(options.directory), options.json)
    return 0


def _verify(options: argparse.Namespace) -> int:
    merged = MergedAdapters.load(options.directory)
    found = merged.verify(options.adapters, options.names)
    if options.json:
        errors = {task: finite(error) for task, error in found.errors.items()}
        _print_json({"errors": errors, "differences": list(found.differences)})
    else:
        table = _table("task", "relative error of ΔW")
        for task, error in found.errors.items():
            table.add_row(task, _error(finite(error)))
        _print(table)
        for difference in found.differences:
            print(difference)
        print(f"{len(found.differences)} differences" if found.differences else "as the manifest says")
    return 1 if found.differences else 0


def _extract(options: argparse.Namespace) -> int:
    from .methods import extract

    check_target(options.output)
    found = extract(
        options.base,
        options.finetuned,
        rank=options.rank,
        energy=options.energy,
        max_bytes=options.max_bytes,
        include=options.include,
        dtype=DTYPES.get(options.dtype),
        base_model=options.base_model,
    )
    found.save(options.output)
    report = found.report()
    if options.json:
        _print_json(report)
        return 0
    table = _table("module", "out × in", "rank", "bytes", "error")
    for name, entry in report["by_module"].items():
        out, wide = entry["shape"]
        table.add_row(name, f"{out} × {wide}", str(entry["rank"]), f"{entry['bytes']:,}", _error(entry["error"]))
    table.add_section()
    table.add_row("total", "", "", f"{found.bytes:,}", _error(report["error"]))
    _print(table)
    print("error: relative Frobenius error of ΔW")
    if found.lost:
        print(f"changed, but not in the adapter: {', '.join(found.lost)}")
    return 0


def _lore(options: argparse.Namespace) -> int:
    from .checkpoints import is_checkpoint
    from .methods import Settings, lore_adapters, lore_checkpoints

    check_target(options.output)
    settings = Settings(options.mu, options.prox, options.iterations, options.scale, options.finish, options.density)
    if any(is_checkpoint(path) for path in options.models):
        if options.rank is not None:
            raise ValueError("--rank is for adapters; a merged checkpoint is dense")
        if options.names is not None:
            raise ValueError("--names is for adapters; an error tells checkpoints by their paths")
        objective = lore_checkpoints(options.models, options.output, settings)
    else:
        merged = lore_adapters(options.models, settings, names=options.names, rank=options.rank)
        merged.save(options.output)
        objective = merged.objective
    if options.json:
        _print_json({"objective": objective})
    else:
        table = _table("iteration", "objective")
        for iteration, value in enumerate(objective, 1):
            table.add_row(str(iteration), f"{value:.6g}")
        _print(table)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    import torch

    from . import bench

    before = torch.get_num_threads()
    threads = before if options.threads is None else options.threads
    if threads < 1:
        raise ValueError(f"--threads is {threads}; it must be at least 1")
    torch.set_num_threads(threads)
    try:
        copied, rows = bench.run(options.device, DTYPES[options.dtype])
    finally:
        torch.set_num_threads(before)
    if options.json:
        about = {"device": options.device, "threads": threads, "copy_bytes_per_s": copied, "torch": torch.__version__}
        _print_json({**about, "build": build_info(), "rows": [asdict(row) for row in rows]})
    else:
        _show_bench(rows, f"{options.device}, {options.dtype}, {threads} threads, torch {torch.__version__}", copied)
    return int(any(row.seconds is None for row in rows))


def _show_bench(rows: Sequence[Row], about: str, copied: float) -> None:
    table = _table("op", "shape", "on backend", "µs", "× plain torch", "GB/s", "of copy")
    for row in rows:
        figures = ("wrong result: not timed", "", "", "")
        if row.seconds is not None and row.ratio is not None and row.of_copy is not None:
            rate = row.bytes / row.seconds / 1e9
            figures = (f"{row.seconds * 1e6:.1f}", f"{row.ratio:.2f}", f"{rate:.2f}", f"{row.of_copy:.0%}")
        table.add_row(row.op, row.shape, row.backend, *figures)
    _print(table)
    print(f"{about}; a large copy: {copied / 1e9:.1f} GB/s")
    print("plain torch: the op's reference, on the same inputs; of copy: its least traffic by its time, by that of the copy")


def _backends(options: argparse.Namespace) -> int:
    report = backends()
    if options.json:
        _print_json({"ops": report, "build": build_info()})
        return 0
    devices = [key for key in next(iter(report.values())) if key not in ("available", "absent", "left_to_torch")]
    table = _table("op", *(f"on {device}" for device in devices), "left to torch")
    absent: dict[str, list[str]] = {}
    for op, entry in report.items():
        left = "; ".join(f"{backend}: {what}" for backend, what in entry["left_to_torch"].items())
        table.add_row(op, *(entry[device] for device in devices), left)
        for backend, reason in entry["absent"].items():
            absent.setdefault(f"{backend}: {reason}", []).append(op)
    _print(table)
    for reason, ops in absent.items():
        print(f"absent: {reason}" if len(ops) == len(report) else f"absent for {', '.join(ops)}: {reason}")
    for key, value in build_info().items():
        print(f"{key}: {value}")
    return 0


def _show(merged: MergedAdapters, as_json: bool) -> None:
    report = merged.report()
    if as_json:
        _print_json(report)
        return
    modules = _table("module", "out × in", "tasks", "rank", "p", "bytes", "merged", "ratio", "error")
    for name, entry in report["by_module"].items():
        out, wide = entry["shape"]
        modules.add_row(
            name, f"{out} × {wide}", str(entry["tasks"]), str(entry["rank"]), str(entry["components"]), *_cells(entry)
        )
    modules.add_section()
    modules.add_row("total", "", str(len(merged.tasks)), "", str(merged.components), *_cells(report["total"]))
    tasks = _table("task", "modules", "error", "carried unchanged")
    for task, entry in report["by_task"].items():
        extras = [f"{len(entry['extras'])} tensors"] if entry["extras"] else []
        carried = [*entry["files"], *extras, *entry["beyond_factors"]]
        tasks.add_row(task, str(entry["modules"]), _error(entry["error"]), ", ".join(carried))
    base = merged.base_model or "an unnamed base model"
    print(f"{len(merged.tasks)} tasks on {base}, {report['dtype']}, p = {merged.components}")
    _print(modules, tasks)
    if report["comparison"]:
        others = _table("stored as", "bytes", "ratio", "error")
        ours = {"name": f"merged, p = {merged.components}", "bytes": merged.merged_bytes, **report["total"]}
        for entry in [ours, *report["comparison"]]:
            others.add_row(entry["name"], f"{entry['bytes']:,}", f"{entry['ratio']:.4f}", _error(entry["error"]))
        _print(others)
    print("error: relative Frobenius error of ΔW")


def _cells(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    return f"{entry['raw_bytes']:,}", f"{entry['merged_bytes']:,}", f"{entry['ratio']:.4f}", _error(entry["error"])


def _error(error: float | None) -> str:
    return "∞" if error is None else f"{error:.3g}"


_TEXT = ("module", "task", "op", "shape", "left to torch", "stored as", "carried unchanged")  # columns of words, not numbers


def _table(*headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        text = heading in _TEXT or heading.startswith("on ")
        table.add_column(heading, justify="left" if text else "right")
    return table


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # nobody folds a file's lines
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    print(capture.get(), end="")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
