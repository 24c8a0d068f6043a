"""The command: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeAdapter, contents, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmm_kernels import MergedAdapters, backends, cli, load_adapter


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> Result:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def merged(run: Any, cut_adapters: list[Path], tmp_path: Path) -> Path:
    assert run("merge", *cut_adapters, "-o", tmp_path / "merged").code == 0
    return tmp_path / "merged"


def row(text: str, beginning: str) -> list[str]:
    """The words of the one line that begins so."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(beginning))
    return line.split()


def test_merge_prints_storage_and_error(run: Any, cut_adapters: list[Path], tmp_path: Path) -> None:
    result = run("merge", *cut_adapters, "-o", tmp_path / "out", "--components", 3)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("8 tasks on sentence-transformers/all-MiniLM-L6-v2, float32, p = 3\n")
    merged = MergedAdapters.load(tmp_path / "out")
    assert row(result.out, "total") == ["total", "8", "3", "1,769,472", "1,216,512", "0.6875", f"{merged.error:.3g}"]
    module = "encoder.layer.0.intermediate.dense"
    expected = [
        module,
        "1536",
        "×",
        "384",
        "8",
        "16",
        "3",
        "983,040",
        "675,840",
        "0.6875",
        f"{merged.modules[module].error:.3g}",
    ]
    assert row(result.out, module) == expected
    assert row(result.out, "newsgroups") == ["newsgroups", "3", f"{merged.task_error('newsgroups'):.3g}", "head.safetensors"]
    assert "truncated" not in result.out


def test_default_components(merged: Path) -> None:
    assert MergedAdapters.load(merged).components == 3


def test_merge_json(run: Any, cut_adapters: list[Path], tmp_path: Path) -> None:
    result = run("merge", *cut_adapters, "-o", tmp_path / "out", "-p", 7, "--json", "--compare")
    assert (result.code, result.err) == (0, "")
    assert result.json == MergedAdapters.load(tmp_path / "out").report()
    assert result.json["total"]["ratio"] == (7 * (16 + 8) + 16) / (16 * 8)
    assert result.json["total"]["error"] <= 1e-5
    assert [entry["name"] for entry in result.json["comparison"]] == ["truncated to rank 16", "int8", "int4"]


def test_compare(run: Any, cut_adapters: list[Path], tmp_path: Path) -> None:
    result = run("merge", *cut_adapters, "-o", tmp_path / "out", "--compare")
    merged = MergedAdapters.load(tmp_path / "out")
    names = ["merged, p = 3", "truncated to rank 11", "int8", "int4"]
    rows = [row(result.out, name) for name in names]
    assert [cells[-1] for cells in rows] == [f"{error:.3g}" for error in (merged.error, *(o.error for o in merged.comparison))]
    assert rows[0][-3:-1] == ["1,216,512", "0.6875"]


def test_merge_options(run: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one, two = make_adapter("one"), make_adapter("two")
    result = run("merge", one, two, "-o", tmp_path / "out", "--clamp", "--dtype", "bfloat16", "--names", "x", "y")
    assert (result.code, result.err) == (0, "")
    merged = MergedAdapters.load(tmp_path / "out")
    assert (merged.tasks, merged.dtype, merged.modules["layers.0.q"].components) == (("x", "y"), torch.bfloat16, 1)
    result = run("verify", tmp_path / "out", two, one, "--names", "y", "x")
    assert result.code == 0, result.out


def test_merge_says_what_is_not_carried(run: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    path = make_adapter("one", files={"optimizer.pt": b"", "head.bin": b""})
    result = run("merge", path, "-o", tmp_path / "out", "-p", 0)
    assert (result.code, result.err) == (0, f"rmm-kernels: not carried from {path}: optimizer.pt\n")


def test_restore(run: Any, merged: Path, cut_adapters: list[Path], tmp_path: Path) -> None:
    result = run("restore", merged, "newsgroups", "-o", tmp_path / "back")
    assert (result.code, result.err) == (0, "")
    back = load_adapter(tmp_path / "back")
    original = next(load_adapter(path) for path in cut_adapters if path.name == "newsgroups")
    assert back.config == original.config and back.modules == original.modules
    assert (back.path / "head.safetensors").read_bytes() == (original.path / "head.safetensors").read_bytes()


def test_inspect(run: Any, merged: Path) -> None:
    result = run("inspect", merged)
    assert (result.code, result.err) == (0, "")
    assert row(result.out, "total")[-2] == "0.6875"
    result = run("inspect", merged, "--json")
    assert result.json == MergedAdapters.load(merged).report()


def test_verify(run: Any, merged: Path, cut_adapters: list[Path]) -> None:
    result = run("verify", merged, *cut_adapters)
    assert (result.code, result.err) == (0, "") and result.out.endswith("as the manifest says\n")
    result = run("verify", merged, *cut_adapters[:3], "--json")
    assert result.code == 0 and result.json["differences"] == []
    assert list(result.json["errors"]) == [path.name for path in cut_adapters[:3]]


def test_verify_of_other_adapters(run: Any, merged: Path, cut_adapters: list[Path]) -> None:
    names = [path.name for path in cut_adapters[:2]]
    result = run("verify", merged, *cut_adapters[:2], "--names", *reversed(names))
    assert result.code == 1
    assert f"task '{names[0]}', module 'encoder.layer.0.attention.self.query': ΔW has norm" in result.out
    assert f"task '{names[0]}': file 'head.safetensors' is not the adapter's" in result.out
    assert result.out.splitlines()[-1] == "8 differences"
    result = run("verify", merged, *cut_adapters[:2], "--json", "--names", *reversed(names))
    assert result.code == 1 and len(result.json["differences"]) == 8


def test_backends(run: Any) -> None:
    result = run("backends")
    assert (result.code, result.err) == (0, "")
    report = backends()
    for op, entry in report.items():
        assert row(result.out, f"{op} ")[1] == entry["cpu"]
    result = run("backends", "--json")
    assert result.json["ops"] == report


def test_names_are_printed_as_they_are(run: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Not taken for rich's markup."""
    result = run("merge", make_adapter("one"), "-o", tmp_path / "out", "-p", 0, "--names", "[red]:smile:[/red]")
    assert (result.code, result.err) == (0, "") and "[red]:smile:[/red]" in result.out


# ---------------------------------------------------------------- failures


def fails(result: Result, message: str) -> None:
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("rmm-kernels: error: ") and result.err.count("\n") == 1
    assert message in result.err


def test_errors_are_one_line(
    run: Any, merged: Path, cut_adapters: list[Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    one, out = cut_adapters[0], tmp_path / "out"
    fails(run(), "the following arguments are required: COMMAND")
    fails(run("nonsense"), "invalid choice: 'nonsense'")
    fails(run("merge", one), "the following arguments are required: -o/--output")
    fails(run("merge", one, "-o", out, "--components", "many"), "argument -p/--components: invalid int value: 'many'")
    fails(run("merge", one, "-o", out, "--dtype", "int3"), "argument --dtype: invalid choice: 'int3'")
    fails(run("merge", tmp_path / "no", "-o", out), f"adapter {tmp_path / 'no'} does not exist")
    fails(run("merge", *cut_adapters, "-o", out, "-p", 8), "components is 8; allowed are 0 to 7")
    fails(run("merge", *cut_adapters, "-o", out, "-p", -1), "components is -1; it must be at least 0")
    fails(run("merge", one, one, "-o", out), "two adapters have the task name")
    fails(run("merge", one, "-o", merged), f"output directory {merged} exists and is not empty")
    fails(run("merge", one, "-o", tmp_path / "no" / "out", "-p", 0), "can't be created")
    fails(
        run("restore", merged, "nothing", "-o", out), "there is no task 'nothing'; the tasks are bible_section, code_language"
    )
    fails(run("restore", merged, "newsgroups", "-o", merged), "exists and is not empty")
    fails(run("restore", tmp_path, "newsgroups", "-o", out), "is not a merged directory")
    fails(run("inspect", tmp_path), "is not a merged directory")
    fails(run("merge", one, "-o", ""), "output directory . exists and is not empty")
    fails(run("verify", merged, tmp_path), "like no task")
    fails(run("verify", merged, tmp_path / "newsgroups"), f"adapter {tmp_path / 'newsgroups'} does not exist")
    fails(run("verify", merged, one, "--names", "x"), "there is no task 'x'")
    assert contents(tmp_path) == before and not out.exists()


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Changes an adapter's tensors."""

    def spoil(path: Path) -> None:
        state = load_file(path / "adapter_model.safetensors")
        save_file(change({key: value.clone() for key, value in state.items()}), path / "adapter_model.safetensors")

    return spoil


def configured(**entries: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **entries}))

    return spoil


def directory_instead(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return spoil


QUERY = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "code_language does not exist"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "code_language has no adapter_config.json"),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "config that is none": (directory_instead("adapter_config.json"), "adapter_config.json can't be read: Is a directory"),
    "broken config": (lambda path: (path / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
    "cut weights": (
        lambda path: os.truncate(path / "adapter_model.safetensors", 20000),
        "code_language/adapter_model.safetensors can't be read",
    ),
    "other base model": (configured(base_model_name_or_path="other"), "are for different base models: 'sentence-transformers/"),
    "rank 0": (configured(r=0), "gives module 'encoder.layer.0.attention.self.query' rank 0; it must be an integer of at le"),
    "other shape": (
        rewritten(lambda state: {**state, QUERY: state[QUERY][:, 1:].contiguous()}),
        "disagree about the shape [out, in] of module 'encoder.layer.0.attention.self.query': [384, 384] and [384, 383]",
    ),
    "other dtype": (
        rewritten(lambda state: {key: value.half() for key, value in state.items()}),
        "adapter 'code_language' float16 in 'encoder.layer.0.attention.self.query'; give dtype",
    ),
    "integers": (
        rewritten(lambda state: {key: value.to(torch.int8) for key, value in state.items()}),
        "code_language: module 'encoder.layer.0.attention.self.query' has lora_A in I8",
    ),
    "NaN": (
        rewritten(lambda state: {**state, QUERY: torch.where(state[QUERY] == state[QUERY].max(), torch.nan, state[QUERY])}),
        "task 'code_language': module 'encoder.layer.0.attention.self.query' holds NaN or Inf in lora_A",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_merge_of_a_spoilt_adapter(run: Any, cut_adapters: list[Path], tmp_path: Path, case: str) -> None:
    """One line that names what is wrong; inputs as they were, and nothing beside them."""
    paths = [shutil.copytree(path, tmp_path / path.name) for path in cut_adapters[:3]]
    spoil, message = SPOILT[case]
    spoil(next(path for path in paths if path.name == "code_language"))
    before = contents(tmp_path)
    fails(run("merge", *paths, "-o", tmp_path / "out", "-p", 1), message)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_spoilt_merges(run: Any, merged: Path, cut_adapters: list[Path], tmp_path: Path) -> None:
    """Values of a kind that no merge writes, and a manifest that can't be read."""
    state = {key: value.clone() for key, value in load_file(merged / "factors.safetensors").items()}
    state["encoder.layer.0.attention.self.query.coeff_b"][2, 1, 7] = torch.nan
    save_file(state, merged / "factors.safetensors")
    broken = MergedAdapters.load(merged).tasks[2]
    message = f"task '{broken}': module 'encoder.layer.0.attention.self.query' is restored with NaN or Inf in lora_B"
    before = contents(tmp_path)
    fails(run("restore", merged, broken, "-o", tmp_path / "out"), message)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
    assert run("verify", merged, *cut_adapters).code == 1
    directory_instead("manifest.json")(merged)
    fails(run("inspect", merged), "manifest.json can't be read: Is a directory")


def test_existing_target_is_refused_before_the_work(
    run: Any, merged: Path, cut_adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "merge", lambda *arguments, **options: pytest.fail("merged for nothing"))
    fails(run("merge", *cut_adapters, "-o", merged), "exists and is not empty")


def test_full_disk(run: Any, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_adapter("one")
    before = contents(tmp_path)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    monkeypatch.setattr("rmm_kernels.storage.write_json", fail)
    fails(run("merge", path, "-o", tmp_path / "out", "-p", 0), "No space left on device")
    assert contents(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["adapters"]


@pytest.mark.skipif(sys.platform != "linux", reason="uses RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [1000, 100_000, 1_000_000])
def test_disk_that_fills_up(merged: Path, cut_adapters: list[Path], tmp_path: Path, limit: int) -> None:
    """A write that the system itself cuts short: the error names the file."""
    script = (
        "import resource, sys; from rmm_kernels import cli; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(cli.main(sys.argv[1:]))"
    )
    before = contents(tmp_path)
    commands: list[list[Any]] = [["merge", *cut_adapters]]
    if limit < 100_000:  # a restored adapter is small
        commands.append(["restore", merged, "newsgroups"])
    for command in commands:
        arguments = [sys.executable, "-c", script, *command, "-o", tmp_path / "out"]
        done = subprocess.run(arguments, cwd="/", capture_output=True, text=True, check=False)
        fails(Result(done.returncode, done.stdout, done.stderr), os.strerror(errno.EFBIG))
        assert f"{tmp_path}/.out." in done.stderr
    assert contents(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_nohup_is_heeded(run: Any, merged: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    seen = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "_show", lambda *arguments: seen.append(signal.getsignal(signal.SIGHUP)))
            assert run("inspect", merged).code == 0
        assert seen == [signal.SIG_IGN] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["rmm_kernels.delta.squares", "rmm_kernels.storage.write_json"])
def test_interrupts_leave_nothing(
    run: Any, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    path = make_adapter("one")
    before = contents(tmp_path)
    monkeypatch.setattr(where, lambda *arguments, **options: os.kill(os.getpid(), number))
    # A job in the background or under nohup has them ignored.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    inherited = {each: signal.signal(each, handler) for each, handler in defaults.items()}
    try:
        result = run("merge", path, "-o", tmp_path / "out", "-p", 0)
        left = {each: signal.getsignal(each) for each in defaults}
    finally:
        for each, handler in inherited.items():
            signal.signal(each, handler)
    assert (result.code, result.out, result.err) == (130, "", "rmm-kernels: interrupted\n")
    assert contents(tmp_path) == before and [entry.name for entry in tmp_path.iterdir()] == ["adapters"]
    assert left == defaults


# ---------------------------------------------------------------- as a process


def test_start_up_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    script = (
        "import sys; from rmm_kernels import cli; cli.main(['backends', '--json']); "
        "print([name for name in ('rich', 'transformers', 'peft', 'pandas') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_reader_that_stops(tmp_path: Path) -> None:
    """As in `rmm-kernels inspect DIR --json | head -1`."""
    paths = [write_adapter(tmp_path / f"task{i}", shapes={f"m{k}": (2, 2) for k in range(1000)}, rank=1) for i in range(2)]
    script = "import sys; from rmm_kernels import cli; sys.exit(cli.main(['merge', '-p', '1', '--json', '-o', *sys.argv[1:]]))"
    command = [sys.executable, "-c", script, tmp_path / "out", *paths]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


# ---------------------------------------------------------------- bench


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op but a few times; and any copy is large enough."""
    from rmm_kernels import bench

    monkeypatch.setattr(bench, "_seconds", lambda call, device, seconds: 1e-3 if call() is None else 2e-3)


@pytest.mark.usefixtures("quick_bench")
def test_bench(run: Any) -> None:
    result = run("bench")
    assert result.code == 0, result.err
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert set(backends()) <= set(rows)
    assert "wrong" not in result.out and "GB/s" in result.out
    before = torch.get_num_threads()
    report = json.loads(run("bench", "--json", "--dtype", "bfloat16", "--threads", "1").out)
    assert [row["op"] for row in report["rows"]] == list(backends())
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["of_copy"] > 0 for row in report["rows"])
    assert report["threads"] == 1 and torch.get_num_threads() == before


@pytest.mark.usefixtures("quick_bench")
def test_bench_does_not_time_a_wrong_op(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmm_kernels import reference

    right = reference.gram
    monkeypatch.setattr(reference, "gram", lambda x, center: 1.001 * right(x, center))
    report = json.loads(run("bench", "--json").out)
    assert [row["op"] for row in report["rows"] if row["seconds"] is None] == ["gram"]
    result = run("bench")
    assert result.code == 1 and row(result.out, "gram")[-4:] == ["wrong", "result:", "not", "timed"]


def test_bench_refuses(run: Any) -> None:
    fails(run("bench", "--device", "nowhere"), "device is 'nowhere', which torch can't use here")
    fails(run("bench", "--threads", "0"), "--threads is 0; it must be at least 1")
