"""The CUDA kernels of the mixed-task forward in the simulator: schedules, planted bugs, memory traffic."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lora_inputs
import ops
import ptxsim
import pytest
import simulator
import torch
from lora_inputs import Problem, Shape, problem
from ops import assert_same_bits

pytestmark = pytest.mark.skipif(not simulator.ops(), reason="nvcc is not on PATH")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=ops.name)

# One of every form: few tokens, some, many of mixed tasks, many of one task; ranks up to 16 and beyond.
FORMS = {
    "few": Shape(5, 136, 136, 16, 3, 2),
    "few_wide": Shape(5, 136, 72, 40, 3, 2),
    "some": Shape(20, 136, 136, 12, 7, 3),
    "some_wide": Shape(20, 72, 136, 72, 7, 1),
    "mixed": Shape(70, 136, 72, 16, 9, 2),
    "one": Shape(70, 136, 72, 16, 1, 2),
    "one_wide": Shape(70, 72, 72, 72, 1, 2),
}


def make(form: str, dtype: torch.dtype) -> Problem:
    p = problem(FORMS[form], dtype, seed=90)
    return p.change(basis_b=p.basis_b.mT.contiguous().mT)


def forward(p: Problem, **settings: object) -> tuple[torch.Tensor, list[dict[str, object]]]:
    simulator.load()
    p = p.change(y=p.y.clone())
    with simulator.settings(**settings) as launches:
        torch.ops.rmm_kernels.lora_forward_.cuda(*p.forward)
    return p.y, launches


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_schedules(form: str, dtype: torch.dtype) -> None:
    """Right, and the same bits in whatever order blocks and warps run."""
    p = make(form, dtype)
    expected, _ = forward(p, seed=0)
    wide = p.in_dtype(torch.float64)
    rows = p.active
    exact = lora_inputs.masked_forward(wide.change(task_ids=wide.task_ids.clamp(min=0)))[rows]
    plain = lora_inputs.masked_forward(p.in_dtype(dtype).change(task_ids=p.task_ids.clamp(min=0).long()))[rows]
    lora_inputs.assert_rule("y", expected[rows], exact, plain, dtype)
    for seed in (1, 2, 3):
        assert_same_bits(forward(p, seed=seed)[0], expected)


@pytest.mark.parametrize("components", [0, 1, 16, 20])
def test_many_components(components: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, tasks in ((3, 2), (70, 1), (70, 3)):
            p = problem(Shape(tokens, 40, 40, 24, tasks, components), dtype, seed=91)
            y, _ = forward(p)
            exact, plain = (
                lora_inputs.masked_forward(q.change(task_ids=q.task_ids.clamp(min=0)))[p.active]
                for q in (p.in_dtype(torch.float64), p.in_dtype(dtype))
            )
            lora_inputs.assert_rule("y", y[p.active], exact, plain, dtype)


def test_u_beyond_the_range_of_fp16() -> None:
    """u is fp32: what it holds may exceed 65504 where y does not."""
    for tokens in (5, 70):
        p = problem(Shape(tokens, 8, 72, 72, 3, 2), torch.float16, seed=92)
        u = ops.randn(tokens, 72, seed=93) * 1e6
        p = p.change(basis_b=p.basis_b * 1e-4, task_ids=torch.arange(tokens) % 3)
        exact = p.y.double() + lora_inputs.expand(
            u.double(), p.basis_b.double(), p.coeff_b.double(), p.task_ids, p.scaling.double()
        )
        simulator.load()
        torch.ops.rmm_kernels.lora_expand_.cuda(*p.expand(u))
        ops.assert_within("y", (p.y.double() - exact).abs(), 2e-3 * (1 + exact.abs()))


@DTYPES
def test_tiles_without_a_task_cost_next_to_nothing(dtype: torch.dtype) -> None:
    p = make("mixed", dtype)
    _, busy = forward(p, statistics=True)
    _, idle = forward(p.change(task_ids=torch.full_like(p.task_ids, -1)), statistics=True)
    for some, none in zip(busy, idle, strict=True):
        assert none["grid"] == some["grid"], "the grid must depend on shapes only"
        warps = none["grid"][0] * none["grid"][1] * none["grid"][2] * none["block"][0] // 32
        assert none["warp_instructions"] <= 120 * warps
        assert none["global"]["store"]["sectors"] == 0


@DTYPES
@pytest.mark.parametrize("rank_inner", [False, True], ids=["out", "rank"])
def test_memory_traffic(dtype: torch.dtype, rank_inner: bool) -> None:
    """Whole sectors, packs of 16 bytes, no bank conflicts, and the bytes of algorithms.md section 3."""
    for tokens, r in ((8, 16), (16, 16), (8, 64)):
        shape = Shape(tokens, 512, 512, r, tokens, 4)
        p = problem(shape, dtype, seed=94)
        p = p.change(task_ids=torch.arange(tokens))
        if not rank_inner:
            p = p.change(basis_b=p.basis_b.mT.contiguous().mT)
        launches = [run for run in forward(p, statistics=True)[1] if "lora_sum" not in run["kernel"]]
        for run, passes in zip(launches, (1, 2), strict=True):  # over x, and over y
            memory, size = run["global"], dtype.itemsize
            assert run["widest_global_load"] == 16 and run["local"]["requests"] == 0
            for row in run["regions"]:
                assert row["ideal_sectors"] >= 0.9 * row["sectors"], row
            assert run["shared"]["wavefronts"] <= 1.2 * run["shared"]["ideal_wavefronts"]
            model = size * 512 * ((shape.p + 1) * r + shape.p * tokens + passes * tokens)
            moved = 32 * (memory["load"]["sectors"] + memory["store"]["sectors"])
            print(f"{tokens} tokens, rank {r}, {ops.name(dtype)}: {moved} bytes moved, model {model}: {moved / model:.2f}")
            assert moved <= 1.5 * model
            products = "m16n8k8 tf32" if size == 4 else f"m16n8k16 {'bf16' if dtype == torch.bfloat16 else 'f16'}"
            assert run["mma"].keys() == {products}


@pytest.fixture(scope="module")
def sm_90() -> dict[str, object]:
    return simulator.ptx(simulator.SOURCES, "lora_shrink.cu", "sm_90")


# Few tokens, some, many of mixed tasks, many of one task; one slice, no power of two, more than a cluster holds.
CLUSTERED = {
    "few": Shape(5, 1048, 40, 16, 3, 2),
    "wide": Shape(5, 712, 40, 40, 3, 1),
    "mixed": Shape(70, 1432, 40, 16, 9, 1),
    "one": Shape(40, 712, 40, 16, 1, 1),
    "alone": Shape(5, 40, 40, 16, 3, 1),
}


@DTYPES
@pytest.mark.parametrize("form", CLUSTERED)
def test_clusters(sm_90: dict[str, object], form: str, dtype: torch.dtype) -> None:
    """The slices that a cluster adds up through its blocks' shared memory give the bits that the workspace does."""
    p = problem(CLUSTERED[form], dtype, seed=95)
    expected, launches = forward(p, statistics=True)
    slices = launches[0]["grid"][1]
    with simulator.sm_90(sm_90):
        for seed in (0, 1):
            got, launches = forward(p, seed=seed, statistics=True)
            assert_same_bits(got, expected)
    peers = launches[0]["by_class"].get("load shared::cluster", {"thread": 0})["thread"]
    assert (peers > 0) == (slices > 1) == (form != "alone")


CLUSTER_BUGS = {
    "read before all have written": (
        "kWarp + lane] = of_warps(i);\n    meet();",
        "kWarp + lane] = of_warps(i);",
        "never written|data race",
    ),
    "left while others read": ("    meet();  // all have been read\n", "", "exits while|has exited"),
    "one block too many": ("s < args.cluster; ++s", "s <= args.cluster; ++s", "no block 2"),
}


@pytest.mark.parametrize("name", CLUSTER_BUGS)
def test_planted_bug_in_a_cluster_is_caught(name: str) -> None:
    old, new, message = CLUSTER_BUGS[name]
    p = problem(Shape(5, 168, 40, 16, 3, 1), torch.float32, seed=96)
    planted = simulator.planted("lora_shrink.cu", "lora_shrink.cu", old, new, "sm_90")
    with planted, simulator.sm_90({}), pytest.raises(RuntimeError, match=message):
        forward(p)


@pytest.fixture(scope="module")
def expand_sm_90() -> str:
    return simulator.ptx_text(simulator.SOURCES, "lora_expand.cu", "sm_90")


def test_dependent_launch(expand_sm_90: str) -> None:
    """The expand that may start before the shrink has ended waits before it reads u, and fetches its basis before that."""
    text = expand_sm_90
    p = make("some", torch.bfloat16)
    expected, _ = forward(p)
    with simulator.sm_90(simulator.kernels(text)):
        assert_same_bits(forward(p, seed=1)[0], expected)
    never = text.replace("griddepcontrol.wait;", "")
    with simulator.sm_90(simulator.kernels(never)), pytest.raises(RuntimeError, match="no griddepcontrol"):
        forward(p)


def test_expand_alone_is_not_dependent(expand_sm_90: str) -> None:
    """The kernel before it may be anybody's, and may write the basis."""
    ids = torch.arange(3)
    y, u, coeff, scaling = ops.randn(3, 37, seed=97), ops.randn(3, 16, seed=98), ops.randn(3, 2, 37, seed=99), torch.ones(3)
    simulator.load()
    with simulator.sm_90(simulator.kernels(expand_sm_90)):
        basis = torch.ops.rmm_kernels.reconstruct.cuda(ops.randn(3, 37, 16, seed=1), ops.randn(3, 2, 37, seed=2), ids)
        torch.ops.rmm_kernels.lora_expand_.cuda(y, u, basis, coeff, ids, scaling)


# What is taken out of a kernel, or changed in it, and the form that must show it.
BUGS = {
    "shrink_wait": ("lora_shrink", "wait_copies<kShrinkStages - 2>();", "", "few"),
    "shrink_barrier": ("lora_shrink", "__syncthreads();\n  float* const out", "float* const out", "few"),
    "shrink_second_barrier": ("lora_shrink", "__syncthreads();  // the rings are read", "", "mixed"),
    "shrink_mask": ("lora_shrink", "rank + 8 * i + g < args.ranks ? args.width : 0", "args.width", "some"),
    "shrink_tile": ("lora_shrink", "at >= last ||", "at > last ||", "few"),
    "expand_wait": ("lora_expand", "wait_copies<kStages - 2>();", "", "some"),
    "expand_warp_barrier": (
        "lora_expand",
        "wait_copies<kStages - 2>();\n    __syncwarp();",
        "wait_copies<kStages - 2>();",
        "rank",
    ),
    "expand_mask": ("lora_expand", "rank < args.ranks ? args.width : 0", "args.width", "some"),
    "expand_tile": ("lora_expand", "* args.tile;\n", "* args.tile + 1;\n", "some"),
}


@pytest.fixture(scope="module")
def with_bug(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The real host code, with a kernel's file compiled from a copy with a bug in it."""
    kernels = dict(simulator.load().kernels)

    def plant(name: str) -> Problem:
        file, old, new, form = BUGS[name]
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(simulator.SOURCES.parent / "common", folder / "common")
        shutil.copytree(simulator.SOURCES, folder / "cuda")
        source = folder / "cuda" / f"{file}.cu"
        text = source.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}.cu"
        source.write_text(text.replace(old, new))
        torch_headers = Path(torch.__file__).parent / "include"
        flags = [flag for flag in simulator.FLAGS if not flag.startswith("-gencode")]
        command = ["nvcc", *flags, "-arch=sm_80", "-ptx", "-isystem", torch_headers, source, "-o", folder / "bug.ptx"]
        subprocess.run(command, check=True, capture_output=True)
        module = ptxsim.Module((folder / "bug.ptx").read_text())
        simulator.load().kernels.update(dict.fromkeys(module.kernels, module))
        return problem(FORMS["some"], torch.bfloat16, seed=90) if form == "rank" else make(form, torch.bfloat16)

    yield plant
    simulator.load().kernels.update(kernels)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(with_bug: object, name: str) -> None:
    """By a check of the simulator, or by a wrong result."""
    good = dict(simulator.load().kernels)
    p = with_bug(name)  # type: ignore[operator]
    bad = dict(simulator.load().kernels)
    simulator.load().kernels.update(good)
    expected, _ = forward(p)
    simulator.load().kernels.update(bad)
    try:
        got, _ = forward(p, seed=1)
    except RuntimeError as error:
        print(f"{name}: {str(error).splitlines()[0][:300]}")
        assert "SimulationError" in str(error)
    else:
        print(f"{name}: wrong result")
        assert (ops.bits(got) != ops.bits(expected)).any()
    finally:
        simulator.load().kernels.update(good)
