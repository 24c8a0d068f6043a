"""PT-SVD's and LoRE's speed beside plain torch, accuracy checked first.

python -m benchmarks.methods pt_svd --adapters ../shared/adapters
python -m benchmarks.methods lore --adapters ../shared/adapters
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rmm_kernels import load_adapter
from rmm_kernels.methods import Settings, lore_adapters
from rmm_kernels.methods.pt_svd import low_rank

from .timing import stopwatch


def with_spectrum(m: int, k: int, sigma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, min(m, k), generator=generator)).Q for size in (m, k))
    return (u * sigma) @ v.mT


def spectra(size: int) -> dict[str, Tensor]:
    index = torch.arange(size).float()
    clusters = (2.0 ** -(index // 8)).clamp(min=1e-4) * (1 - 1e-4 * (index % 8))
    return {"i^-0.25": (index + 1) ** -0.25, "i^-1": 1 / (index + 1), "clustered": clusters}


def pt_svd(arguments: argparse.Namespace) -> None:
    """One matrix at a time: excess of ‖A − U S Vᵀ‖ over the optimum by ‖A‖, and times."""
    rank = arguments.rank
    matrices: dict[str, Tensor] = {}
    for m, k in arguments.sizes:
        matrices.update({f"{m} x {k}, {name}": with_spectrum(m, k, sigma) for name, sigma in spectra(min(m, k)).items()})
    if arguments.adapters:
        for task in ("desc_pair", "wordnet_supersense"):
            deltas = load_file(arguments.adapters / "tasks" / task / "full_delta.safetensors")
            for module in ("encoder.layer.3.attention.self.query", "encoder.layer.3.intermediate.dense"):
                delta = deltas[f"{module}.weight"].float()
                matrices[f"{task}, {delta.shape[0]} x {delta.shape[1]}"] = delta
    print(f"| rank {rank} | excess | ms | torch.linalg.svd | × | torch.svd_lowrank(q=2k, niter=4) | our time by its |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, a in matrices.items():
        u, s, vh = (part[0].double() for part in low_rank(a[None], rank))
        values, full = stopwatch(lambda a=a: torch.linalg.svd(a, full_matrices=False).S)
        wide = a.double()
        short = wide @ wide.mT if a.shape[0] <= a.shape[1] else wide.mT @ wide
        del values
        optimum = float(torch.linalg.eigvalsh(short)[:-rank].clamp(min=0).sum().sqrt())
        excess = (float((wide - (u * s) @ vh).norm()) - optimum) / float(wide.norm())
        ours, peer = [], []
        for _ in range(arguments.rounds):
            ours.append(stopwatch(lambda a=a: low_rank(a[None], rank))[1])
            peer.append(stopwatch(lambda a=a: torch.svd_lowrank(a, q=2 * rank, niter=4))[1])
        mine, theirs = median(ours), median(peer)
        print(
            f"| {name} | {excess:.1e} | {mine * 1e3:.1f} | {full * 1e3:.0f} | {full / mine:.1f} "
            f"| {theirs * 1e3:.1f} | {mine / theirs:.2f} |",
            flush=True,
        )


def plain_lore(theta: Tensor, mu: float, iterations: int) -> Tensor:
    """The published algorithm by full SVDs of dense ΔW [n, out, in], in theta's dtype."""
    delta, shared = torch.zeros_like(theta), theta.mean(0)
    for _ in range(iterations):
        shared = (theta - delta).mean(0)
        u, s, vh = torch.linalg.svd(theta - shared, full_matrices=False)
        delta = (u * (s - mu).clamp(min=0)[:, None]) @ vh
    return shared + delta.mean(0)


def lore(arguments: argparse.Namespace) -> None:
    paths = sorted(arguments.adapters.glob("tasks/*/lora_r16"))
    names = [path.parent.name for path in paths]
    adapters = [load_adapter(path, name) for path, name in zip(paths, names, strict=True)]
    settings = Settings(iterations=arguments.iterations, tolerance=0)

    def dense(dtype: torch.dtype, modules: tuple[str, ...]) -> dict[str, Tensor]:
        found = {}
        for module in modules:
            factors = [adapter.factors(module) for adapter in adapters]
            theta = torch.stack([f.scaling * (f.lora_b.to(dtype) @ f.lora_a.to(dtype)) for f in factors])
            found[module] = plain_lore(theta, settings.mu, settings.iterations)
        return found

    modules = adapters[0].modules
    merged, ours = stopwatch(lambda: lore_adapters(adapters, settings))
    _, theirs = stopwatch(dense, torch.float32, modules)
    worst = 0.0
    for module, exact in dense(torch.float64, modules[:3]).items():
        factors = merged.factors[module]
        got = factors.scaling * (factors.lora_b.double() @ factors.lora_a.double())
        worst = max(worst, float((got - exact).norm() / exact.norm()))
    falls = all(b <= a * (1 + 1e-12) for a, b in zip(merged.objective, merged.objective[1:], strict=False))
    print(f"{len(modules)} modules x {len(paths)} tasks, {settings.iterations} iterations, {torch.get_num_threads()} threads")
    print(f"ours {ours:.2f} s, full SVDs in fp32 {theirs:.2f} s: {theirs / ours:.1f} times faster")
    print(
        f"relative difference from full SVDs in fp64, of 3 modules: {worst:.1e}; objective {merged.objective}, falls: {falls}"
    )


def _size(text: str) -> Any:
    return tuple(int(part) for part in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pt_svd", "lore"))
    parser.add_argument("--adapters", type=Path, help="directory that holds tasks/")
    parser.add_argument("--sizes", nargs="*", type=_size, default=[(1024, 2752)], metavar="MxK")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run: Callable[[argparse.Namespace], None] = pt_svd if arguments.what == "pt_svd" else lore
    run(arguments)


if __name__ == "__main__":
    main()
