"""MemNet (Tai et al. 2017), the other denoiser of denoised smoothing."""

import torch
from torch import Tensor, nn


def unit(before: int, after: int, kernel: int = 3) -> nn.Sequential:
    """Batch normalisation, ReLU and a convolution that keeps the resolution."""
    convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), convolution)


class MemoryBlock(nn.Module):
    """Residual blocks in a row, and a gate that mixes them with all earlier memories."""

    def __init__(self, width: int, residual_blocks: int, memories: int):
        super().__init__()
        self.residuals = nn.ModuleList(
            nn.Sequential(unit(width, width), unit(width, width)) for _ in range(residual_blocks)
        )
        self.gate = unit((residual_blocks + memories) * width, width, kernel=1)

    def forward(self, memories: list[Tensor]) -> Tensor:
        """The next memory `(B, width, H, W)` from all earlier ones."""
        x, short = memories[-1], []
        for residual in self.residuals:
            x = x + residual(x)
            short.append(x)
        gated: Tensor = self.gate(torch.cat([*short, *memories], 1))
        return gated


class MemNet(nn.Module):
    """Predicts the clean image as the noisy one plus what memory blocks make of it.

    Salman et al. use 3 memory blocks of 6 residual blocks, width 64.
    """

    def __init__(self, channels: int, width: int, memory_blocks: int, residual_blocks: int):
        super().__init__()
        self.extract = unit(channels, width)
        self.memory = nn.ModuleList(
            MemoryBlock(width, residual_blocks, before + 1) for before in range(memory_blocks)
        )
        self.reconstruct = unit(width, channels)

    def forward(self, noisy: Tensor) -> Tensor:
        """Denoised pixels `(B, C, H, W)`, in float32 whatever the weights' type."""
        dtype = self.extract[-1].weight.dtype
        memories = [self.extract(noisy.to(dtype))]  # type: ignore[arg-type]
        for block in self.memory:
            memories.append(block(memories))
        change: Tensor = self.reconstruct(memories[-1])
        return noisy + change.float()

    def for_inference(self, precision: str) -> None:
        """Run the convolutions in `precision`; the addition stays in float32."""
        if precision == "bfloat16":
            self.bfloat16()
        self.to(memory_format=torch.channels_last)
