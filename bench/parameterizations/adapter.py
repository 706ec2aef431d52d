"""Sequential bottleneck adapters (Houlsby et al. 2019), which peft lacks."""

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))); the zero start of `up` makes it the identity."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`."""
        output: Tensor = tokens + self.up(nn.functional.gelu(self.down(tokens)))
        return output


def insert_adapters(vit: nn.Module, bottleneck: int) -> nn.Module:
    """Put one adapter behind attention and one behind the MLP of every block of a timm ViT."""
    width = int(vit.embed_dim)  # type: ignore[arg-type]
    for block in vit.blocks:  # type: ignore[union-attr]
        for place in ("ls1", "ls2"):
            behind = nn.Sequential(getattr(block, place), Bottleneck(width, bottleneck))
            setattr(block, place, behind)
    return vit
