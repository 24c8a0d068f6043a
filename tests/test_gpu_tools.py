"""What prepares a GPU run, without one: gpu.sh, the byte model's tables, tune.py, and launch parameters of one's own."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement

pytest.importorskip("triton")
import triton_runs
from lora_inputs import FEW_SHAPES, problem
from ops import assert_same_bits, one_thread  # noqa: F401
from test_lora_forward import check

from benchmarks import gpu, tune
from rmm_kernels.triton_ops import lora, lora_forward
from rmm_kernels.triton_ops.lora import Config, Row

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def link_packages(folder: Path, *names: str) -> None:
    """In `folder`, links to the installed distributions of these names and to all that they require."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = folder / part
            if not link.is_symlink():
                link.symlink_to(distribution.locate_file(part))
        required = map(Requirement, distribution.requires or ())
        waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_gpu_script_needs_little(tmp_path: Path) -> None:
    """From the sources, nothing compiled, with torch, triton, numpy and pytest alone: the rehearsal, and a few tests."""
    packages, sources, python = tmp_path / "packages", tmp_path / "sources", tmp_path / "python"
    packages.mkdir()
    link_packages(packages, "torch", "triton", "numpy", "pytest")
    for folder in ("rmm_kernels", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "data", "results", "__pycache__")
        shutil.copytree(ROOT / folder, sources / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", sources)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    here = {"cwd": sources, "PYTHON": str(python), "PYTHONPATH": str(packages)}
    done = run(str(python), "-c", "import safetensors", **here)
    assert "No module named 'safetensors'" in done.stderr
    done = run("bash", "benchmarks/gpu.sh", "--dry-run", **here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was timed" in done.stdout
    tests = [f"tests/test_{op}.py" for op in ("project", "lora_forward")]
    done = run(str(python), "-m", "pytest", "-q", *tests, "-k", "opcheck and float32", **here)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_gpu_script_needs_a_gpu() -> None:
    done = run("bash", "benchmarks/gpu.sh")
    assert done.returncode != 0
    assert "no CUDA GPU here" in done.stderr.splitlines()[-1]


def test_model_prints_its_tables() -> None:
    done = run(sys.executable, "-m", "benchmarks.gpu_model", "--gpu", "B200")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not a measurement") + done.stdout.count("not a\nmeasurement") == 2
    assert all(name in done.stdout for name in ("A100", "H100", "H200", "B200", "n=1000", "**0."))


def installed(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, object]) -> None:
    """Modules by name, "__" for a dot, with these members; and the packages that they are in."""
    for name, members in modules.items():
        parts = name.split("__")
        for depth in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        module = ModuleType(parts[-1])
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, ".".join(parts), module)


def check_peer(make: gpu.Peer) -> None:
    for tokens, n in ((5, 3), (300, 4)):
        arguments = gpu.forward_inputs(tokens, n, 16, "cpu", width=64)
        gpu.peer(make, arguments, gpu.restored(arguments))()


def test_vllm_kernels_get_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of vLLM 0.33, the same signatures in plain torch, task by task of what its metadata sorts."""

    class LoRAKernelMeta:
        @staticmethod
        def make(max_loras: int, max_num_tokens: int, device: object) -> LoRAKernelMeta:
            meta = LoRAKernelMeta()
            meta.room = max_loras, max_num_tokens
            return meta

        def prepare_tensors(self, token_lora_mapping: torch.Tensor) -> None:
            self.mapping = token_lora_mapping
            self.ids, self.counts = token_lora_mapping.unique(return_counts=True)
            assert int(self.ids.max()) < self.room[0] and len(token_lora_mapping) <= self.room[1]

        def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[torch.Tensor, ...]:
            assert token_nums == len(self.mapping)
            order = self.mapping.argsort(stable=True)
            starts = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
            none, active = torch.tensor([False]), torch.tensor([len(self.ids)])
            return self.mapping, order, self.counts, starts, self.ids, none, active

    def shrink(x: torch.Tensor, lora_a: list[torch.Tensor], u: torch.Tensor, *how: object) -> None:
        _, order, counts, starts, ids, _, _, scaling = how
        for task, count, start in zip(ids, counts, starts, strict=False):
            rows = order[start : start + count]
            u[0, rows] = (x[rows] @ lora_a[0][task].T).float() * scaling

    def expand(
        u: torch.Tensor, lora_b: list[torch.Tensor], y: torch.Tensor, *how: object, offset_start: int, add_inputs: bool
    ) -> None:
        _, order, counts, starts, ids, _, _ = how
        assert offset_start == 0 and add_inputs
        for task, count, start in zip(ids, counts, starts, strict=False):
            rows = order[start : start + count]
            y[rows] += u[0, rows].to(y.dtype) @ lora_b[0][task].T

    members = {"LoRAKernelMeta": LoRAKernelMeta, "lora_shrink": shrink, "lora_expand": expand}
    installed(monkeypatch, vllm__lora__ops__triton_ops=members)
    check_peer(gpu.vllm)


@dataclass
class LoRABatchInfo:
    """SGLang's, of its fields those without a default."""

    use_cuda_graph: bool
    bs: int
    num_segments: int
    seg_indptr: torch.Tensor
    weight_indices: torch.Tensor
    lora_ranks: torch.Tensor
    scalings: torch.Tensor
    max_len: int | None
    seg_lens: torch.Tensor | None
    permutation: torch.Tensor | None = None

    def segments(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The rows of each segment, and its task."""
        for i in range(self.num_segments):
            begin, end = self.seg_indptr[i : i + 2]
            assert 0 < end - begin <= self.max_len
            yield self.permutation[begin:end], int(self.weight_indices[i])


@pytest.mark.parametrize("version", ["old", "new"])
def test_sglang_kernels_get_what_they_expect(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """In place of SGLang 0.5.23, and of versions before it, the same signatures in plain torch, chunk by chunk."""

    def shrink(x: torch.Tensor, weights: torch.Tensor, batch_info: LoRABatchInfo, num_slices: int) -> torch.Tensor:
        assert num_slices == 1
        u = x.new_full((len(x), weights.shape[1]), torch.nan)
        for rows, task in batch_info.segments():
            u[rows] = x[rows] @ weights[task].T
        return u

    def expand(
        x: torch.Tensor,
        weights: torch.Tensor,
        batch_info: LoRABatchInfo,
        slice_offsets: torch.Tensor,
        max_slice_size: int,
        base_output: torch.Tensor,
    ) -> torch.Tensor:
        assert slice_offsets.tolist() == [0, max_slice_size] == [0, weights.shape[1]]
        for rows, task in batch_info.segments():
            base_output[rows] += x[rows] @ weights[task].T * batch_info.scalings[task].to(x.dtype)
        return base_output

    def newer(*args: object, slice_offsets_cpu: torch.Tensor) -> torch.Tensor:
        assert torch.equal(slice_offsets_cpu, args[3])
        return expand(*args)

    old = {"chunked_sgmv_lora_shrink_forward": shrink, "chunked_sgmv_lora_expand_forward": expand}
    new = {
        "sglang__kernels__ops__lora__dense__chunked_sgmv_shrink": old,
        "sglang__kernels__ops__lora__dense__chunked_sgmv_expand": {**old, "chunked_sgmv_lora_expand_forward": newer},
    }
    modules = new if version == "new" else {"sglang__srt__lora__triton_ops": old}
    installed(monkeypatch, **modules, sglang__srt__lora__utils={"LoRABatchInfo": LoRABatchInfo})
    check_peer(gpu.sglang)


def test_a_wrong_peer_is_not_timed() -> None:
    arguments = gpu.forward_inputs(5, 3, 16, "cpu", width=64)

    def unscaled(arguments: tuple[torch.Tensor, ...], factors: tuple[torch.Tensor, torch.Tensor]) -> gpu.Call:
        return gpu.gather_bmm((*arguments[:-1], torch.ones_like(arguments[-1])), factors)

    found = gpu.attempt(lambda: gpu.peer(unscaled, arguments, gpu.restored(arguments)))
    assert "the forward is wrong" in found["error"]


def test_tune() -> None:
    done = run(sys.executable, "-m", "benchmarks.tune", "--list", "--ranks", "16", "--components", "4")
    assert done.returncode == 0, done.stderr
    assert "expand T=8192 r=16 p=4 d=4096" in done.stdout
    assert run(sys.executable, "-m", "benchmarks.tune", "-o", os.devnull).returncode == 1


def test_tune_compiles_its_candidates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: a candidate that is fit, one that wants more shared memory than there is."""
    tried = [Config(16, 32, 16, num_stages=2), Config(128, 128, 16, num_stages=4)]
    monkeypatch.setattr(tune, "candidates", lambda *sizes: tried)
    monkeypatch.setitem(lora.SHARED, "sm_80", 65536)
    assert tune.rehearse("shrink", "sm_80", 16, 16, 2, 512) == 1
    fit, unfit = capsys.readouterr().out.splitlines()
    assert fit.startswith("ok") and "'spills': 0" in fit
    assert unfit.startswith("UNFIT") and "block_d=128" in unfit


def test_table_of_ones_own(tmp_path: Path) -> None:
    rows = [Row("shrink", 2, Config(32, 32, 16, programs=4), arch="sm_80", r=16, tokens=8)]
    lora.save(rows, tmp_path / "table.json")
    assert list(lora.load(tmp_path / "table.json")) == rows
    asked = ("shrink", "sm_80", 16, 4, 8, 512, 2)
    shipped = lora.configure(*asked)
    try:
        lora.use(lora.load(tmp_path / "table.json"))
        assert lora.configure(*asked) == rows[0].config != shipped
        assert lora.configure(*asked[:4], 9, *asked[5:]) == shipped
    finally:
        lora.use(None)
    assert lora.configure(*asked) == shipped


@pytest.mark.parametrize("arch", [*lora.SHARED, "sm_999"])
def test_parameters_fit(arch: str) -> None:
    """Within shared memory, for any rank and number of components."""
    for op in ("shrink", "expand"):
        for r in (1, 16, 17, 64, 100, 256):
            for p in (0, 4, 16):
                for tokens in (1, 64, 65, 65536):
                    for itemsize in (2, 4):
                        config = lora.configure(op, arch, r, p, tokens, 4096, itemsize)
                        assert lora.shared_bytes(op, config, p, itemsize) <= lora.SHARED.get(arch, lora.LEAST_SHARED)
                        assert min(config.block_t, config.block_d, config.block_r) >= 16


def test_config_is_passed() -> None:
    """Parameters given with a call replace the table's."""
    p = problem(FEW_SHAPES[2], torch.float16, seed=1)
    before, launched = p.to("cpu"), []

    def interpret(what: triton_runs.Launch) -> None:
        launched.append(what.constants)
        triton_runs.interpret(what)

    with triton_runs.running(interpret):
        lora_forward.lora_forward_(*p.forward, shrink=Config(16, 16, 16), expand=Config(32, 16, 32))
    check(before, p.y)
    assert [launched[i]["BLOCK_T"] for i in (0, -1)] == [16, 32]
