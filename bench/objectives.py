"""What training minimises on noisy images: one function per objective."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# (classifier, clean images (B, C, H, W), labels (B,), sigma, noise source) -> scalar loss
Objective = Callable[[nn.Module, Tensor, Tensor, float, Generator], Tensor]


def add_noise(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """`images` plus fresh N(0, sigma^2) noise in [0, 1]-pixel units, never clamped."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images + sigma * noise


def cross_entropy(
    classifier: nn.Module, images: Tensor, labels: Tensor, sigma: float, generator: Generator
) -> Tensor:
    """Cross-entropy on Gaussian-noised images (Cohen 2019; PEFTSmoothing eq. 4)."""
    return F.cross_entropy(classifier(add_noise(images, sigma, generator)), labels)


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy}
