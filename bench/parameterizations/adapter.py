"""Bottleneck adapters, which peft lacks: behind sub-layers or beside MLPs."""

from torch import Tensor, nn

from bench.errors import BenchError
from bench.parameterization_settings import Adapter, ParallelAdapter
from bench.parameterizations.places import blocks_of


class Bottleneck(nn.Module):
    """up(activation(down(x))); the zero start of `up` makes it zero."""

    def __init__(self, width: int, bottleneck: int, activation: nn.Module):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.activation = activation
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`."""
        output: Tensor = self.up(self.activation(self.down(tokens)))
        return output


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`."""
        output: Tensor = tokens + self.inner(tokens)
        return output


class Parallel(nn.Module):
    """main(x) + scale * side(x)."""

    def __init__(self, main: nn.Module, side: nn.Module, scale: float):
        super().__init__()
        self.main = main
        self.side = side
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`."""
        output: Tensor = self.main(tokens) + self.scale * self.side(tokens)
        return output


def _blocks_with_width(network: nn.Module) -> list[tuple[nn.Module, int]]:
    """Every block with the width of its tokens, for blocks whose channels come last."""
    found = []
    for _, block in blocks_of(network):
        inputs = [m.in_features for m in block.mlp.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
        if inputs:
            found.append((block, inputs[0]))
    return found


def insert_adapters(network: nn.Module, settings: Adapter) -> None:
    """Put one adapter behind attention and one behind the MLP of every block (Houlsby 2019).

    They stand in front of `drop_path1` and `drop_path2`, which all transformer blocks of timm
    have, so behind layer scale and before the skip connection.

    Raises:
        BenchError: the blocks are of another kind.
    """
    blocks = _blocks_with_width(network)
    places = ("drop_path1", "drop_path2")
    if not blocks or not all(hasattr(block, place) for block, _ in blocks for place in places):
        raise BenchError(
            f"parameterization.kind = {settings.kind} needs transformer blocks, which "
            f"{type(network).__name__} lacks: take a ViT or Swin as backbone.timm, or kind: lora"
        )
    for block, width in blocks:
        for place in places:
            adapter = Residual(Bottleneck(width, settings.bottleneck, nn.GELU()))
            setattr(block, place, nn.Sequential(adapter, getattr(block, place)))


def insert_parallel_adapters(network: nn.Module, settings: ParallelAdapter) -> None:
    """Put one scaled adapter beside the MLP of every block (AdaptFormer, Chen 2022).

    It reads the MLP's normalised input and goes through layer scale with the MLP's output, where
    AdaptFormer reads the tokens before normalisation: timm's blocks offer no other place.

    Raises:
        BenchError: the MLPs are convolutions.
    """
    blocks = _blocks_with_width(network)
    if not blocks:
        raise BenchError(
            f"parameterization.kind = {settings.kind} needs MLPs of linear layers, which "
            f"{type(network).__name__} lacks: choose another backbone.timm, or kind: lora"
        )
    for block, width in blocks:
        side = Bottleneck(width, settings.bottleneck, nn.ReLU())
        nn.init.kaiming_uniform_(side.down.weight, a=5**0.5)
        nn.init.zeros_(side.down.bias)
        block.mlp = Parallel(block.mlp, side, settings.scale)  # type: ignore[arg-type]
