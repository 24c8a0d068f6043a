"""What prepares a GPU run, without one: gpu.sh, the byte model's tables, tune.py, and launch parameters of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
import triton_runs
from lora_inputs import FEW_SHAPES, problem
from ops import assert_same_bits, one_thread  # noqa: F401
from test_lora_forward import check

import rmm_kernels
from benchmarks import gpu, tune
from rmm_kernels.triton_ops import lora, lora_forward
from rmm_kernels.triton_ops.lora import Config, Row

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_gpu_script_rehearses() -> None:
    done = run("bash", "benchmarks/gpu.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nothing was timed" in done.stdout


def test_gpu_script_needs_a_gpu() -> None:
    done = run("bash", "benchmarks/gpu.sh")
    assert done.returncode != 0
    assert "no CUDA GPU here" in done.stderr.splitlines()[-1]


def test_model_prints_its_tables() -> None:
    done = run(sys.executable, "-m", "benchmarks.gpu_model", "--gpu", "B200")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not a measurement") + done.stdout.count("not a\nmeasurement") == 2
    assert all(name in done.stdout for name in ("A100", "H100", "H200", "B200", "n=1000", "**0."))


def test_sglang_kernels_get_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of SGLang, the same in plain torch: segment by segment, in the form that its kernels read."""

    @dataclass
    class LoRABatchInfo:
        bs: int
        seg_lens: torch.Tensor
        seg_indptr: torch.Tensor
        weight_indices: torch.Tensor
        scalings: torch.Tensor
        max_len: int
        lora_ranks: torch.Tensor
        permutation: torch.Tensor | None
        has_active_lora: bool = False

    def segments(info: LoRABatchInfo) -> Iterator[tuple[slice, int]]:
        for i in range(info.bs):
            begin, length, task = (int(v[i]) for v in (info.seg_indptr, info.seg_lens, info.weight_indices))
            assert 0 < length <= info.max_len
            yield slice(begin, begin + length), task

    def shrink(x: torch.Tensor, lora_a: torch.Tensor, info: LoRABatchInfo) -> torch.Tensor:
        u = x.new_empty(len(x), lora_a.shape[1])
        for rows, task in segments(info):
            u[rows] = x[rows] @ lora_a[task].T
        return u

    def expand(u: torch.Tensor, lora_b: torch.Tensor, info: LoRABatchInfo, y: torch.Tensor) -> torch.Tensor:
        for rows, task in segments(info):
            y[rows] += u[rows] @ lora_b[task].T * info.scalings[task].to(y.dtype)
        return y

    ops_module, utils = ModuleType("sglang.srt.lora.triton_ops"), ModuleType("sglang.srt.lora.utils")
    ops_module.sgemm_lora_a_fwd, ops_module.sgemm_lora_b_fwd, utils.LoRABatchInfo = shrink, expand, LoRABatchInfo
    for module in (ops_module, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("sglang", "sglang.srt", "sglang.srt.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for tokens, n in ((5, 3), (300, 4)):
        arguments = gpu.forward_inputs(tokens, n, 16, "cpu", width=64)
        y = arguments[0].clone()
        gpu.sglang((y, *arguments[1:]), gpu.restored(arguments))()
        rmm_kernels.lora_forward_(*arguments)
        assert (y.float() - arguments[0].float()).norm() <= 2e-2 * arguments[0].float().norm()


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
