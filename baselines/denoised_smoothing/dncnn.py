"""DnCNN (Zhang et al. 2017), the denoiser of denoised smoothing."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


class DnCNN(nn.Module):
    """Predicts the noise with `depth` 3x3 convolutions of `width` channels and subtracts it.

    Salman et al. use depth 17 and width 64, or 128 in their wide one.
    """

    def __init__(self, channels: int, depth: int, width: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [inner, nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1, bias=False))

    def forward(self, noisy: Tensor) -> Tensor:
        """Denoised pixels `(B, C, H, W)`, in float32 whatever the weights' type."""
        dtype = self.layers[0].weight.dtype
        noise: Tensor = self.layers(noisy.to(dtype))  # type: ignore[arg-type]
        return noisy - noise.float()

    def for_inference(self, precision: str) -> None:
        """Put normalisations into the convolutions before them, and those in `precision`.

        The subtraction stays in float32. It must be in evaluation mode, with fixed normalisations.
        """
        layers: list[nn.Module] = []
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm2d):
                convolution = cast(nn.Conv2d, layers.pop())
                layers.append(fuse_conv_bn_eval(convolution, layer))
            else:
                layers.append(layer)
        self.layers = nn.Sequential(*layers).train(self.training)
        if precision == "bfloat16":
            self.layers.bfloat16()
        self.layers.to(memory_format=torch.channels_last)  # on CPUs twice as fast
