"""Deep visual prompt tuning (Jia et al. 2022), which peft lacks for timm models."""

import math

import torch
from torch import Tensor, nn


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


def insert_prompts(vit: nn.Module, count: int) -> nn.Module:
    """Give every block of a timm ViT its own `count` prompts, left out of pooling."""
    prefix = int(vit.num_prefix_tokens)  # type: ignore[arg-type]
    width = int(vit.embed_dim)  # type: ignore[arg-type]
    patch_values = vit.patch_embed.proj.weight[0].numel()  # type: ignore[union-attr, operator, index]
    blocks: nn.Sequential = vit.blocks  # type: ignore[assignment]
    for index, block in enumerate(blocks):
        prompts = Prompts(count, width, prefix, patch_values, replace=index > 0)
        blocks[index] = nn.Sequential(prompts, block)
    vit.num_prefix_tokens = prefix + count  # type: ignore[assignment]
    return vit
