"""Visual prompt tuning (Jia et al. 2022), which peft lacks for timm models."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.parameterization_settings import VptDeep, VptShallow


class Prompts(nn.Module):
    """`count` learned tokens behind the prefix tokens; later blocks replace the earlier ones."""

    def __init__(self, count: int, width: int, prefix: int, patch_values: int, replace: bool):
        super().__init__()
        self.prefix = prefix
        self.behind = prefix + (count if replace else 0)
        bound = math.sqrt(6 / (patch_values + width))  # Jia et al., their xavier-uniform start
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T', D)` with this block's prompts in place."""
        prompts = self.tokens.expand(len(tokens), -1, -1).to(tokens.dtype)
        return torch.cat([tokens[:, : self.prefix], prompts, tokens[:, self.behind :]], dim=1)


class Prompted(nn.Module):
    """A block with prompts in front; further arguments (rotary embeddings) go to the block."""

    def __init__(self, prompts: Prompts, block: nn.Module):
        super().__init__()
        self.prompts = prompts
        self.block = block

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(B, T, D)` to `(B, T', D)`."""
        output: Tensor = self.block(self.prompts(tokens), *args, **kwargs)
        return output


def insert_shallow_prompts(vit: nn.Module, settings: VptShallow) -> None:
    """Give the first block of a timm ViT its prompts, which stay through all blocks."""
    _insert_prompts(vit, settings.kind, settings.prompts, blocks=1)


def insert_deep_prompts(vit: nn.Module, settings: VptDeep) -> None:
    """Give every block of a timm ViT its own prompts."""
    _insert_prompts(vit, settings.kind, settings.prompts, blocks=None)


def _insert_prompts(vit: nn.Module, kind: str, count: int, blocks: int | None) -> None:
    """Put prompts in front of the first `blocks` blocks (None: all), left out of pooling."""
    plain = hasattr(vit, "num_prefix_tokens") and hasattr(vit, "blocks")
    # Tables of relative positions have one size, which prompts would change.
    if not plain or any("rel_pos" in n or "relative_pos" in n for n, _ in vit.named_parameters()):
        raise BenchError(
            f"parameterization.kind = {kind} needs a ViT whose blocks take any number of tokens; "
            f"{type(vit).__name__} is none: choose another backbone.timm, or kind: adapter"
        )
    prefix = int(vit.num_prefix_tokens)  # type: ignore[arg-type]
    width = int(vit.embed_dim)  # type: ignore[arg-type]
    patch_values = vit.patch_embed.proj.weight[0].numel()  # type: ignore[union-attr, operator, index]
    stack: nn.Sequential = vit.blocks  # type: ignore[assignment]
    for index, block in enumerate(list(stack)[:blocks]):
        prompts = Prompts(count, width, prefix, patch_values, replace=index > 0)
        stack[index] = Prompted(prompts, block)
    # Pooling and rotary attention leave prefix tokens out; prompts are such tokens from here on.
    for module in vit.modules():
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens = prefix + count  # type: ignore[assignment]
