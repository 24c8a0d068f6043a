"""The benchmarks' own figures: what is shown is what is stored, what is wrong is withheld, what became slower is found."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rmm_kernels import load_adapters

ROOT = Path(__file__).parents[1]

pytest.importorskip("psutil")
from benchmarks import guard, models, report, run, scaling, workloads  # noqa: E402


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not a worker of pytest-xdist
    return subprocess.run(command, cwd=ROOT, env={**ours, **environment}, capture_output=True, text=True, timeout=600)


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize("readme", report.RENDERED, ids=lambda path: str(path.relative_to(ROOT)))
def test_readme_shows_what_is_stored(readme: Path) -> None:
    assert report.rendered(readme) == readme.read_text(encoding="utf-8"), "python -m benchmarks.report RESULT writes it anew"


def test_a_changed_figure_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    changed = tmp_path / "README.md"
    changed.write_text(readme.read_text(encoding="utf-8").replace("| met |", "| exceeded |", 1), encoding="utf-8")
    monkeypatch.setitem(report.RENDERED, changed, report.speed)
    assert report.rendered(changed) == readme.read_text(encoding="utf-8") != changed.read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", report.RENDERED, ids=lambda path: str(path.relative_to(ROOT)))
def test_stored_result_says_what_it_is_of(readme: Path) -> None:
    stored = report.load(report.source(readme))
    assert {"date", "command", "revision", "machine", "versions", "build", "ceilings"} <= set(stored)
    assert len(stored["rows"]) > 20 and all(row["ours"]["median"] > 0 for row in stored["rows"])


def test_another_format_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="is of format 1; this reads 2: measure again"):
        report.load(old)


def test_machines_of_a_name_are_told_apart() -> None:
    about = {"cpu": "AMD EPYC", "cores": 2, "instruction_sets": ["avx2"]}
    assert run.slug(about) == "amd-epyc-avx2-2-cores"
    assert run.slug({**about, "instruction_sets": ["avx2", "avx512f"]}) == "amd-epyc-avx512f-2-cores"
    assert run.slug({**about, "cpu": "Intel(R) Xeon(R) CPU @ 2.00GHz", "instruction_sets": []}) == "intel-xeon-cpu-2-cores"


# ---------------------------------------------------------------- what is withheld

BROKEN = """
import rmm_kernels
whole = rmm_kernels.compress

def compress(x, components):
    basis, coeff, energy = whole(x, components)
    return basis, 1.001 * coeff, energy

rmm_kernels.compress = compress
"""


@pytest.mark.parametrize("broken", [False, True], ids=["right", "wrong"])
def test_a_row_of_a_wrong_op_is_withheld(tmp_path: Path, broken: bool) -> None:
    (tmp_path / "plugin.py").write_text(BROKEN if broken else "")
    found = tmp_path / "report.json"
    select = [
        "--turns=1",
        "-k",
        "8x8 and not 128x8 and not eigh and not thread",
        "-p",
        "plugin",
        f"--benchmark-json={found}",
        "-q",
    ]
    done = python("pytest", "benchmarks/test_compress.py", *select, PYTHONPATH=str(tmp_path))
    assert done.returncode == int(broken), done.stdout
    measured = json.loads(found.read_text())
    for ceiling in workloads.CEILINGS:
        extra = {"workload": ceiling.name, "contender": "torch", "turn": 0, "others": 0.0}
        measured["benchmarks"].append({"extra_info": extra, "stats": {"data": [1.0]}})
    result = run.summarise(measured, "", 1)
    name = "compress 8x8, rank innermost"
    assert result["withheld"] == ([name] if broken else [])
    assert [row["workload"] for row in result["rows"]] == ([] if broken else [name])
    assert (f"Withheld, for their checks failed: {name}." in report.tables({**result, "seconds": 1, "build": BUILD})) == broken
    if not broken:
        assert result["rows"][0]["peers"]["torch.linalg.svd"]["ratio_by_turn"] == [
            result["rows"][0]["peers"]["torch.linalg.svd"]["ratio"]
        ]


BUILD = {"instruction_set": "avx2", "compiler": "1"}

# ---------------------------------------------------------------- what became slower


def result(*ratios: float, count: int = 1000, compiler: str = "1", withheld: tuple[str, ...] = ()) -> dict[str, Any]:
    row = {"workload": "w", "peers": {"peer": {"ratio_by_turn": list(ratios)}}}
    counted = {"compiler": compiler, "instruction_set": "avx2", "counts": {"kernel": count}}
    return {"rows": [row], "withheld": list(withheld), "instructions": counted}


@pytest.mark.parametrize(
    "new, finds",
    [
        (result(10, 10.1, 9.9), None),
        (result(20, 20, 20), None),
        (result(6.7, 6.7, 6.7), None),  # within what runs of one build differ by
        (result(6.0, 6.1, 5.9), "w: 10.00 → 6.00 times peer, noise allows 34%"),
        (result(8.0, 12.0, 5.0), None),  # this machine is too noisy to say
        (result(10, 10, 10, count=1029), None),
        (result(10, 10, 10, count=1031), "kernel: 1,000 → 1,031 instructions, +3.1%"),
        (result(10, 10, 10, count=2000, compiler="2"), None),
        (result(10, 10, 10, withheld=("v",)), "v: withheld, for it fails its check"),
    ],
)
def test_regressions(new: dict[str, Any], finds: str | None) -> None:
    assert guard.regressions(result(10, 10, 10), new) == ([] if finds is None else [finds])


def test_noise_of_two_runs() -> None:
    def rows(*ratios: float) -> dict[str, Any]:
        return {"rows": [{"workload": str(i), "peers": {"peer": {"ratio_by_turn": [r, r]}}} for i, r in enumerate(ratios)]}

    same, falling = rows(*[8.0] * 21), rows(*(8 * 0.9**i for i in range(21)))
    assert guard.noise(same, falling) == pytest.approx((1 - 0.9**10, 1 - 0.9**19))
    assert guard.noise(rows(4, 4), rows(5, 5)) == guard.noise(rows(5, 5), rows(4, 4)) == pytest.approx((0.2, 0.2))


def test_tolerance_grows_with_noise() -> None:
    assert guard.tolerance([10, 10], [10, 10]) == guard.tolerance([10], [5]) == guard.FLOOR
    noisy = [8.0, 12.5]  # a standard error of 0.223 in the logarithm
    assert guard.tolerance(noisy, [10, 10]) == pytest.approx(1 - math.exp(-3 * math.log(12.5 / 8) / 2))
    assert guard.tolerance(noisy, [10, 10]) < guard.tolerance(noisy, noisy)


# ---------------------------------------------------------------- sizes, slopes, disk


def test_slope() -> None:
    assert scaling.slope([1, 2, 4], [5, 40, 320]) == pytest.approx(3)
    assert scaling.slope([1, 2], [4, 2]) == pytest.approx(-1)


def test_models_have_their_published_sizes() -> None:
    assert models.LLAMA_8B.positions == 2_621_440  # about the 2.5e6 that are said of a 7B model
    weights = {model.name: model.blocks * sum(a * b for a, b in model.linears.values()) for model in
               (models.ROBERTA, models.LLAMA_8B, models.QWEN_7B, models.LLAMA_70B)}  # fmt: skip
    assert weights["RoBERTa-base"] == pytest.approx(85e6, rel=0.01)
    assert weights["Llama-3-8B"] == pytest.approx(8.03e9 - 2 * 128256 * 4096, rel=0.01)
    assert weights["Qwen2.5-7B"] == pytest.approx(6.53e9, rel=0.01)
    assert 8 * weights["Llama-3-70B TP-8"] == pytest.approx(70.6e9 - 2 * 128256 * 8192, rel=0.01)


def test_every_workload_has_its_sizes() -> None:
    assert len(workloads.ALL) == len({id(workload) for workload in workloads.ALL.values()}) > 40
    for workload in workloads.ALL.values():
        assert workload.bytes > 0 and (workload.flops > 0 or workload.op in ("ceiling", "merge"))
    small = workloads.forward(models.ROBERTA, "output", 12, 8, 4, prefill=4)
    inputs = small.make()
    assert inputs.x.shape == (12, 3072) and inputs.y.shape == (12, 768)
    assert sorted(inputs.task_ids.unique(return_counts=True)[1].tolist()) == [2, 2, 2, 2, 4]


def test_synthetic_adapters(tmp_path: Path) -> None:
    paths = models.write_adapters(tmp_path, models.ROBERTA, 1, 3, 8, torch.bfloat16)
    opened = load_adapters(paths)
    assert [adapter.name for adapter in opened] == ["task0", "task1", "task2"]
    assert len(opened[0].modules) == 6 and opened[0].dtype(opened[0].modules[0]) == torch.bfloat16
    module = opened[0].modules[0]
    first, second = (adapter.factors(module).lora_a.float() for adapter in opened[:2])
    assert abs(float((first * second).mean())) < 0.05 and float(first.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("contender", ["rmm_kernels", "torch.linalg.svd script"])
def test_disk_to_disk(tmp_path: Path, cut_adapters: list[Path], contender: str) -> None:
    done = python("benchmarks.disk", contender, tmp_path / "out", *cut_adapters, "--cold", "--components=2")
    found = json.loads(done.stdout)
    assert (tmp_path / "out").is_dir() and found["peak_bytes"] > 1e7
    assert {"read", "stack", "compress", "write", "flush", "other"} <= set(found["phases"])
    assert min(found["seconds"]) > 0 and all(seconds >= 0 for seconds in found["phases"].values())
    if len(found["seconds"]) == 1:
        assert sum(found["phases"].values()) == pytest.approx(found["seconds"][0])


def test_ratios_are_cut() -> None:
    """So that what misses an aim by little does not read as if it met it."""
    shown = [report._ratio(value) for value in (3.98, 4.0, 0.999, 0.77, 9.99, 49.97, 50.0)]
    assert shown == ["3.9", "4.0", ".99", ".77", "9.9", "49", "50"]
