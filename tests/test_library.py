"""The op library: schemas, overloads, which backend serves what, build info, loading of the compiled part."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ops
import pytest
import torch
from lora_inputs import Shape, problem

import rmm_kernels
from rmm_kernels import _library, triton_ops
from rmm_kernels.ops import _checks

FACTORS = "Tensor basis_a, Tensor coeff_a, Tensor basis_b, Tensor coeff_b, Tensor task_ids, Tensor scaling"

# What callers outside Python rely on.
SCHEMAS = {
    "gram": "(Tensor x, bool center=False) -> Tensor",
    "truncated_svd": "(Tensor x, int rank) -> (Tensor, Tensor, Tensor)",
    "project": "(Tensor x, Tensor basis) -> Tensor",
    "compress": "(Tensor x, int components) -> (Tensor, Tensor, Tensor)",
    "reconstruct": "(Tensor basis, Tensor coeff, Tensor task_ids) -> Tensor",
    "error_grams": "(Tensor x, Tensor basis, Tensor coeff) -> Tensor",
    "lora_shrink": "(Tensor x, Tensor basis_a, Tensor coeff_a, Tensor task_ids) -> Tensor",
    "lora_expand_": "(Tensor(a!) y, Tensor u, Tensor basis_b, Tensor coeff_b, Tensor task_ids, Tensor scaling) -> ()",
    "lora_forward_": f"(Tensor(a!) y, Tensor x, {FACTORS}) -> ()",
    "lora_forward": f"(Tensor y, Tensor x, {FACTORS}) -> Tensor",
}
EACH_OP = pytest.mark.parametrize("op", SCHEMAS)


def fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in another interpreter, on the package under test."""
    package = Path(rmm_kernels.__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, timeout=120)


def test_every_op_is_here() -> None:
    assert set(_library.SCHEMAS) == set(SCHEMAS)


@EACH_OP
def test_schema_of_every_overload(op: str) -> None:
    packet = getattr(torch.ops.rmm_kernels, op)
    assert set(packet.overloads()) == {"default", *_library.BACKENDS}
    for overload in packet.overloads():
        suffix = "" if overload == "default" else f".{overload}"
        assert str(getattr(packet, overload)._schema) == f"rmm_kernels::{op}{suffix}{SCHEMAS[op]}"


@EACH_OP
def test_public_function_takes_the_schema_s_arguments(op: str) -> None:
    function = getattr(rmm_kernels, op)
    assert op in rmm_kernels.__all__
    arguments = getattr(torch.ops.rmm_kernels, op).default._schema.arguments
    assert list(inspect.signature(function).parameters) == [argument.name for argument in arguments]
    assert inspect.getdoc(function)


@EACH_OP
def test_the_reference_is_always_there(op: str) -> None:
    assert _library.has_kernel(op, "reference")
    assert [run.backend for run in ops.overloads(op)].count("reference") == len(ops.devices())


@EACH_OP
def test_a_missing_kernel_says_so(op: str) -> None:
    """An overload without a kernel raises; it doesn't run something else."""
    missing = [backend for backend in _library.BACKENDS if not _library.has_kernel(op, backend)]
    for backend in missing:
        count = len(getattr(torch.ops.rmm_kernels, op).default._schema.arguments)
        with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
            getattr(getattr(torch.ops.rmm_kernels, op), backend)(*[torch.ones(1)] * count)


@EACH_OP
def test_backends_report(op: str) -> None:
    report = rmm_kernels.backends()
    assert set(report) == set(SCHEMAS)
    entry = report[op]
    assert set(entry) == {"cpu", "cuda", "available", "absent", "left_to_torch"}
    assert set(entry["left_to_torch"]) <= set(entry["available"]) and all(entry["left_to_torch"].values())
    assert entry["available"] == [backend for backend in _library.BACKENDS if _library.has_kernel(op, backend)]
    assert not set(entry["available"]) & set(entry["absent"])
    assert {"cpu", "cuda", "triton", "reference"} == {*entry["available"], *entry["absent"]}
    assert all(isinstance(reason, str) and reason for reason in entry["absent"].values())
    for device in ("cpu", "cuda"):
        assert entry[device] in entry["available"]
    assert entry["cpu"] == ("cpu" if "cpu" in entry["available"] else "reference")


@EACH_OP
def test_the_default_overload_runs_the_winner(op: str) -> None:
    """The dispatcher agrees with the report: the kernel it finds for CPU tensors is the winner's."""
    has_own = torch._C._dispatch_has_kernel_for_dispatch_key(f"rmm_kernels::{op}", "CPU")
    assert has_own == (rmm_kernels.backends()[op]["cpu"] == "cpu")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rmm_kernels::{op}", "CompositeExplicitAutograd")


def without_triton(find: str) -> str:
    """Code that imports the package where `find`, an expression, is what looking for Triton finds."""
    return (
        "import importlib.util as u, types\n"
        "real = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: {find} if name == 'triton' else real(name, *rest)\n"
        "import rmm_kernels\n"
        "for op, entry in rmm_kernels.backends().items():\n"
        "    assert 'triton' not in entry['available'], op\n"
        "    print(entry['absent']['triton'])\n"
    )


def test_triton_is_not_installed() -> None:
    done = fresh_python(without_triton("None"))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"Triton is not installed; the package `triton` (3.4 or newer) brings it"}


def test_triton_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("__version__ = '3.3.1'\n")
    done = fresh_python(without_triton(f"types.SimpleNamespace(origin={str(tmp_path / '__init__.py')!r})"))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"Triton 3.3.1 is too old; 3.4 or newer is needed"}


@pytest.mark.skipif(not triton_ops.FILES or triton_ops.absent() is not None, reason="Triton is not here")
def test_triton_serves_cuda_tensors_unless_cuda_does() -> None:
    for op in triton_ops.FILES:
        entry = rmm_kernels.backends()[op]
        assert "triton" in entry["available"] and entry["cuda"] in ("cuda", "triton")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rmm_kernels::{op}", "CUDA")


def test_importing_does_not_import_triton() -> None:
    done = fresh_python("import sys, rmm_kernels\nprint('triton' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize("op", triton_ops.FILES)
def test_triton_kernels_refuse_cpu_tensors(op: str) -> None:
    if not _library.has_kernel(op, "triton"):
        pytest.skip("Triton is not here")
    given = {
        "gram": (torch.ones(4, 5, 6),),
        "truncated_svd": (torch.ones(4, 5, 6), 2),
        "project": (torch.ones(4, 5, 6), torch.ones(3, 5, 6)),
        "compress": (torch.ones(4, 5, 6), 2),
        "reconstruct": (torch.ones(3, 5, 6), torch.ones(4, 2, 5), IDS),
        "lora_shrink": (ones(4, 7), *SHRINK, IDS),
        "lora_expand_": (ones(4, 5), ones(4, 2), *EXPAND),
        "lora_forward_": (ones(4, 5), ones(4, 7), *SHRINK, *EXPAND),
        "lora_forward": (ones(4, 5), ones(4, 7), *SHRINK, *EXPAND),
    }
    with pytest.raises(RuntimeError, match="Triton kernels run on cuda tensors, got one on cpu"):
        getattr(torch.ops.rmm_kernels, op).triton(*given[op])


def test_float64_is_refused_by_name_where_triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What claims to be a tensor on a GPU is enough to see what is said, before any launch."""
    monkeypatch.setitem(_library._winner, "gram", {"cuda": "triton", "cpu": "cpu"})
    claim = SimpleNamespace(dtype=torch.float64, device=torch.device("cuda:0"))
    with pytest.raises(TypeError, match="x is float64 on cuda:0; Triton's kernels take float32, float16 and bfloat16"):
        _checks.gpu_dtype("gram", "x", claim)
    for other in (torch.float32, torch.float16, torch.bfloat16):
        _checks.gpu_dtype("gram", "x", SimpleNamespace(dtype=other, device=claim.device))
    _checks.gpu_dtype("gram", "x", torch.ones(1, dtype=torch.float64))
    monkeypatch.setitem(_library._winner, "gram", {"cuda": "cuda", "cpu": "cpu"})
    _checks.gpu_dtype("gram", "x", claim)  # the CUDA library hands it to the reference

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(_checks, "gpu_dtype", lambda op, name, value: asked.append((op, name)))
    rmm_kernels.gram(ones(4, 5, 6))
    rmm_kernels.truncated_svd(ones(4, 5, 6), 2)
    rmm_kernels.project(ones(4, 5, 6), ones(3, 5, 6))
    rmm_kernels.compress(ones(4, 5, 6), 2)
    rmm_kernels.reconstruct(ones(3, 5, 6), ones(4, 2, 5), IDS)
    rmm_kernels.lora_shrink(ones(4, 7), *SHRINK, IDS)
    rmm_kernels.lora_expand_(ones(4, 5), ones(4, 2), *EXPAND)
    ops_asked = ("gram", "truncated_svd", "project", "compress", "reconstruct", "lora_shrink", "lora_expand_")
    assert asked == list(zip(ops_asked, ("x", "x", "x", "x", "basis", "x", "y"), strict=True))


@pytest.mark.parametrize("function", [rmm_kernels.lora_forward_, rmm_kernels.lora_forward], ids=lambda f: f.__name__)
def test_float64_is_refused_by_the_forward_too(monkeypatch: pytest.MonkeyPatch, function: Callable[..., object]) -> None:
    """Which finds out quickly that all fits, in the usual case."""
    for op in ("lora_shrink", "lora_expand_"):
        monkeypatch.setitem(_library._winner, op, {"cpu": "triton"})
    given = (ones(4, 5), ones(4, 7), *SHRINK, *EXPAND)
    with pytest.raises(TypeError, match="x is float64 on cpu; Triton's kernels take float32, float16 and bfloat16"):
        function(*(value.double() if value.is_floating_point() else value for value in given))


def test_the_compiled_part_has_every_op() -> None:
    """All of it or none: a build that lost an op must not pass for a whole one."""
    found = {op for op in SCHEMAS if _library.has_kernel(op, "cpu")}
    assert found == (set(SCHEMAS) if _library._C is not None else set())


def test_build_info() -> None:
    info = rmm_kernels.build_info()
    if _library._C is None:
        assert info == {}
        return
    assert {"compiler", "torch_target", "instruction_set", "instruction_sets"} <= set(info)
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["torch_target"] == "2.10"
    info.clear()
    assert rmm_kernels.build_info(), "a copy is returned"


@pytest.mark.skipif(_library._C is None, reason="there is no compiled part")
def test_instruction_sets() -> None:
    """Any that the CPU has can be chosen, another is refused, and what was in use comes back."""
    best = rmm_kernels.build_info()["instruction_set"]
    for isa in rmm_kernels.build_info()["instruction_sets"]:
        with ops.instruction_set(isa):
            assert rmm_kernels.build_info()["instruction_set"] == isa
    assert rmm_kernels.build_info()["instruction_set"] == best
    with pytest.raises(ValueError, match="instruction set 'sse9' is not one this CPU has; allowed are baseline"):
        _library._C.use_instruction_set("sse9")
    assert rmm_kernels.build_info()["instruction_set"] == best


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


IDS = torch.zeros(4, dtype=torch.int64)
EXPAND = (ones(3, 5, 2), ones(6, 2, 5), IDS, ones(6))
SHRINK = (ones(3, 2, 7), ones(6, 2, 7))
MISUSES = [
    ("gram", (ones(4, 5), False)),
    ("gram", (IDS.reshape(1, 2, 2), False)),
    ("truncated_svd", (ones(4, 5), 1)),
    ("truncated_svd", (ones(4, 5, 6), 6)),
    ("truncated_svd", (ones(4, 5, 6), -1)),
    ("project", (ones(4, 5, 6), ones(3, 4, 6))),
    ("project", (ones(4, 5, 6), ones(3, 5, 7))),
    ("project", (ones(4, 5, 6), ones(0, 5, 6))),
    ("project", (ones(4, 5, 6), ones(3, 5, 6).half())),
    ("compress", (ones(5, 6), 1)),
    ("compress", (ones(0, 5, 6), 1)),
    ("compress", (ones(4, 5, 6), 7)),
    ("compress", (ones(4, 5, 6), -1)),
    ("reconstruct", (ones(3, 5, 6), ones(4, 3, 5), IDS)),
    ("reconstruct", (ones(3, 5, 6), ones(4, 2, 6), IDS)),
    ("reconstruct", (ones(3, 5, 6), ones(4, 2, 5).double(), IDS)),
    ("reconstruct", (ones(3, 5, 6), ones(4, 2, 5), IDS.reshape(2, 2))),
    ("reconstruct", (ones(3, 5, 6), ones(4, 2, 5), IDS.short())),
    ("error_grams", (ones(4, 5), ones(3, 5, 6), ones(4, 2, 5))),
    ("error_grams", (ones(4, 5, 6), ones(3, 5, 7), ones(4, 2, 5))),
    ("error_grams", (ones(4, 5, 6), ones(4, 5, 6), ones(4, 2, 5))),
    ("error_grams", (ones(4, 5, 6), ones(3, 5, 6), ones(3, 2, 5))),
    ("error_grams", (ones(4, 5, 6), ones(3, 5, 6), ones(4, 2, 6))),
    ("error_grams", (ones(4, 5, 6), ones(3, 5, 6).half(), ones(4, 2, 5))),
    ("error_grams", (ones(4, 5, 6), ones(3, 5, 6).double(), ones(4, 2, 5).double())),
    ("lora_shrink", (ones(4, 8), *SHRINK, IDS)),
    ("lora_shrink", (ones(3, 7), *SHRINK, IDS)),
    ("lora_shrink", (ones(4, 7).half(), *SHRINK, IDS)),
    ("lora_shrink", (ones(4, 7), SHRINK[0], ones(6, 3, 7), IDS)),
    ("lora_shrink", (ones(4, 7), SHRINK[0], ones(6, 2, 6), IDS)),
    ("lora_shrink", (ones(4, 7), *SHRINK, IDS.float())),
    ("lora_expand_", (ones(4, 6), ones(4, 2), *EXPAND)),
    ("lora_expand_", (ones(4, 5), ones(4, 3), *EXPAND)),
    ("lora_expand_", (ones(4, 5), ones(3, 2), *EXPAND)),
    ("lora_expand_", (ones(4, 5), ones(4, 2).half(), *EXPAND)),
    ("lora_expand_", (ones(4, 5), ones(4, 2), *EXPAND[:3], ones(5))),
    ("lora_expand_", (ones(4, 5), ones(4, 2), *EXPAND[:3], ones(6).double())),
    ("lora_expand_", (ones(4, 5), ones(4, 2), *EXPAND[:2], IDS[:3], ones(6))),
    ("lora_forward_", (ones(4, 5), ones(4, 8), *SHRINK, *EXPAND)),
    ("lora_forward_", (ones(4, 5), ones(3, 7), *SHRINK, *EXPAND)),
    ("lora_forward_", (ones(4, 5), ones(4, 7), ones(3, 3, 7), SHRINK[1], *EXPAND)),
    ("lora_forward_", (ones(4, 5), ones(4, 7), SHRINK[0], ones(5, 2, 7), *EXPAND)),
    ("lora_forward", (ones(4, 5), ones(4, 7), SHRINK[0], ones(5, 2, 7), *EXPAND)),
    ("lora_forward", (ones(4, 5).half(), ones(4, 7), *SHRINK, *EXPAND)),
]


@pytest.mark.parametrize("op, given", MISUSES, ids=[f"{op}-{i}" for i, (op, _) in enumerate(MISUSES)])
def test_overloads_refuse_what_they_cannot_read(op: str, given: tuple[object, ...]) -> None:
    """Called past the public function's checks, a kernel raises rather than read or write out of bounds."""
    for run in ops.overloads(op) + ops.triton_ways(op):
        if run.backend != "reference":
            with pytest.raises(RuntimeError):
                run(*(value.to(run.device) if isinstance(value, torch.Tensor) else value for value in given))


@pytest.mark.parametrize("device", ops.devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ops.name)
def test_autocast_changes_nothing(dtype: torch.dtype, device: str) -> None:
    """The ops keep to the dtypes they are given, in every overload."""
    p = problem(Shape(20, 33, 40, 16, 8, 3), dtype, seed=1).to(device)
    x = ops.randn(8, 20, 16, seed=2, dtype=dtype)
    basis, coeff, _ = (value.to(device) for value in rmm_kernels.compress(x, 3))
    x = x.to(device)
    u = torch.where(p.active[:, None], ops.randn(20, 16, seed=3, dtype=dtype, device=device), 0)
    given = {
        "gram": (x.mT, True),
        "truncated_svd": (x.mT, 3),
        "project": (x, basis),
        "compress": (x, 3),
        "reconstruct": (basis, coeff, torch.arange(8, device=device)),
        "error_grams": (x, basis, rmm_kernels.project(x, basis)),
        "lora_shrink": p.shrink,
        "lora_expand_": p.expand(u),
        "lora_forward_": p.forward,
        "lora_forward": p.forward,
    }

    def results(run: ops.Overload) -> tuple[torch.Tensor, ...]:
        arguments = [value.clone() if isinstance(value, torch.Tensor) else value for value in given[run.op]]
        result = run(*arguments)
        tensors = (result,) if isinstance(result, torch.Tensor) else result or ()
        return (*tensors, *(value for value in arguments if isinstance(value, torch.Tensor)))

    assert set(given) == set(SCHEMAS)
    for op in SCHEMAS:
        for run in ops.overloads(op):
            if run.device == device and dtype in run.dtypes:
                expected = results(run)
                with torch.autocast(device, dtype=torch.bfloat16):
                    ops.assert_same_bits(results(run), expected)


def test_import_is_silent() -> None:
    """No warning (a second registration of an op would be one), no output."""
    done = fresh_python("import warnings, torch; warnings.simplefilter('error'); import rmm_kernels; rmm_kernels.backends()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_part_that_was_not_built_is_none() -> None:
    assert _library._load_compiled("_no_such_part") is None


def test_a_part_that_does_not_load_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_broken.py").write_text("raise ImportError('undefined symbol: nothing')")
    monkeypatch.setattr(rmm_kernels, "__path__", [*rmm_kernels.__path__, str(tmp_path)])
    with pytest.raises(ImportError, match="undefined symbol: nothing"):
        _library._load_compiled("_broken")


def test_runs_without_the_compiled_part() -> None:
    """As where it was not built: the reference serves every op, and the report gives the reason."""
    done = fresh_python(
        "import importlib.util as u, torch\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'rmm_kernels._C' else find(name, *rest)\n"
        "import rmm_kernels\n"
        "assert rmm_kernels.build_info() == {}\n"
        "for op, entry in rmm_kernels.backends().items():\n"
        "    assert entry['cpu'] == 'reference' and entry['cuda'] in ('triton', 'reference'), op\n"
        "    assert 'cpu' not in entry['available'] and 'was not built' in entry['absent']['cpu'], op\n"
        "x = torch.randn(4, 5, 6)\n"
        "basis, coeff, _ = rmm_kernels.compress(x, 3)\n"
        "torch.testing.assert_close(rmm_kernels.reconstruct(basis, coeff, torch.arange(4)), x)\n"
    )
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert rmm_kernels.__version__.count(".") >= 1
    assert all(hasattr(rmm_kernels, name) for name in rmm_kernels.__all__)
