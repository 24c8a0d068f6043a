"""Make tests/data: three modules of two layers out of every real rank-16 adapter, bit for bit, and its head.

python tests/make_data.py ../shared/adapters tests/data
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

# Square and oblong ones, from two layers: as many as keep eight tasks below 2 MB in fp32.
MODULES = (
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.1.attention.self.value",
)


def cut(source: Path, target: Path) -> None:
    """Write what is kept of the adapter directory `source` to `target`."""
    target.mkdir(parents=True)
    with safe_open(source / "adapter_model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if any(f".{module}.lora_" in key for module in MODULES)]  # noqa: SIM118
        kept = {key: file.get_tensor(key) for key in keys}
    save_file(kept, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_model.safetensors").chmod(0o644)
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"] = list(MODULES)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(source / "head.safetensors", target / "head.safetensors")


def main() -> None:
    source, target = (Path(argument) for argument in sys.argv[1:])
    for task in sorted((source / "tasks").iterdir()):
        cut(task / "lora_r16", target / task.name)


if __name__ == "__main__":
    main()
