"""Real models' linear layers, by their published configs: what workloads and synthetic adapters are shaped like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Model:
    """A transformer whose every block has the same linear layers."""

    name: str
    blocks: int
    linears: dict[str, tuple[int, int]]
    """(out, in) by name within a block"""

    @property
    def positions(self) -> int:
        """Positions of an adapter on all linear layers: a row of every lora_B, a column of every lora_A."""
        return self.blocks * sum(out + wide for out, wide in self.linears.values())

    def modules(self, blocks: int) -> Iterator[tuple[str, tuple[int, int]]]:
        for block in range(blocks):
            for name, shape in self.linears.items():
                yield f"model.layers.{block}.{name}", shape


def _gated(name: str, blocks: int, hidden: int, kv: int, wide: int, parallel: int = 1) -> Model:
    """Llama's and Qwen's block; with tensor parallelism over `parallel` ranks what one of them holds: the first layers of a
    pair are cut along their outputs, the second along their inputs."""
    inner, kv, wide = hidden // parallel, kv // parallel, wide // parallel
    return Model(
        name,
        blocks,
        {
            "self_attn.q_proj": (inner, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, inner),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        },
    )


ROBERTA = Model(
    "RoBERTa-base",
    12,
    {
        **{f"attention.{name}": (768, 768) for name in ("query", "key", "value", "output")},
        "intermediate": (3072, 768),
        "output": (768, 3072),
    },
)
LLAMA_8B = _gated("Llama-3-8B", 32, 4096, 1024, 14336)
QWEN_7B = _gated("Qwen2.5-7B", 28, 3584, 512, 18944)
LLAMA_70B = _gated("Llama-3-70B TP-8", 80, 8192, 1024, 28672, parallel=8)

_POOL = 1 << 24  # random values that all factors are cut from, each at a place of its own


def write_adapters(directory: Path, model: Model, blocks: int, count: int, rank: int, dtype: torch.dtype) -> list[Path]:
    """Synthetic PEFT adapters on the first `blocks` blocks of `model`: normal values, seeded. Returns their directories.

    Values repeat after 16 Mi, which no position sees: its vectors lie at unrelated places.
    """
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = torch.Generator().manual_seed(1)
    shapes = dict(model.modules(blocks))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in model.linears}),
    }
    paths = []
    for index in range(count):
        state = {}
        for module, (out, wide) in shapes.items():
            for side, shape in (("A", (rank, wide)), ("B", (out, rank))):
                size = shape[0] * shape[1]
                start = int(torch.randint(_POOL - size, (), generator=places))
                state[f"base_model.model.{module}.lora_{side}.weight"] = pool[start : start + size].view(shape)
        path = directory / f"task{index}"
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file({key: value.clone() for key, value in state.items()}, path / "adapter_model.safetensors")
        paths.append(path)
    return paths
