"""lora_forward_ and lora_forward: shrink, then expand, which adds up what shrink's programs left.

Where that sum would be read too often, by every tile of y, it is made once by a kernel of its own in between.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import lora_expand, lora_shrink
from ._launch import require
from .lora import Config

# Bytes of spans' sums that expand's programs may read, from the L2 cache, rather than that a third kernel is launched: what an
# A100's L2 gives in about as long as a launch inside a CUDA graph takes.
READ_AGAIN = 4 << 20


def lora_forward_(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
    shrink: Config | None = None,
    expand: Config | None = None,
) -> None:
    """See `rmm_kernels.lora_forward_`. `shrink` and `expand` replace the table's launch parameters."""
    lora_shrink.check(x, basis_a, coeff_a, task_ids)
    lora_expand.check(y, basis_b, coeff_b, task_ids, scaling)
    require(
        x.dtype == y.dtype and basis_a.shape[1] == basis_b.shape[2] and coeff_a.shape[0] == coeff_b.shape[0],
        "basis_a and basis_b of one rank, coeff_a and coeff_b of as many tasks, x and y of one dtype",
    )
    if y.numel() == 0:
        return
    shrink = shrink or lora_shrink.configure(x, basis_a)
    expand = expand or lora_expand.configure(y, basis_b)
    partial = lora_shrink.shrink(x, basis_a, coeff_a, task_ids, shrink, zero=False)
    if adds_first(partial.shape, y.shape[1], expand):
        partial = lora_shrink.add(partial, task_ids, coeff_a.shape[0], zero=False)[None]
    lora_expand.expand(y, partial, basis_b, coeff_b, task_ids, scaling, expand)


def adds_first(partial: tuple[int, ...], width: int, expand: Config) -> bool:
    """Whether the sums [splits, T, r] are added by a kernel of their own."""
    splits, tokens, r = partial
    return splits > 1 and 4 * splits * tokens * r * triton.cdiv(width, expand.block_d) > READ_AGAIN


def lora_forward(
    y: Tensor,
    x: Tensor,
    basis_a: Tensor,
    coeff_a: Tensor,
    basis_b: Tensor,
    coeff_b: Tensor,
    task_ids: Tensor,
    scaling: Tensor,
) -> Tensor:
    """As `lora_forward_`, into a copy of y."""
    out = y.clone(memory_format=torch.contiguous_format)
    lora_forward_(out, x, basis_a, coeff_a, basis_b, coeff_b, task_ids, scaling)
    return out
