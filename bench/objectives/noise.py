"""Noisy copies of a batch and what a classifier makes of them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Images `(B, C, H, W)` in [0, 1] and labels `(B,)`, with the noise to train under.

    `progress` is the share of all training steps up to and including this one.
    """

    images: Tensor
    labels: Tensor
    sigma: float
    generator: Generator
    progress: float = 1.0

    def noise(self, count: int) -> Tensor:
        """`count` fresh draws of N(0, sigma^2) per image, `(count, B, C, H, W)`."""
        shape = (count, *self.images.shape)
        return self.sigma * torch.randn(shape, generator=self.generator, device=self.images.device)

    def ramp(self, warmup: float) -> float:
        """Linear growth from 0 to 1 over the first `warmup` share of training."""
        return min(1.0, self.progress / warmup) if warmup else 1.0


def add_noise(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """`images` plus fresh N(0, sigma^2) noise in [0, 1]-pixel units, never clamped."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images + sigma * noise


def noisy_logits(classifier: nn.Module, noisy: Tensor) -> Tensor:
    """Logits `(M, B, K)` of M noisy copies `(M, B, C, H, W)`, in one forward pass."""
    logits: Tensor = classifier(noisy.flatten(0, 1))
    return logits.unflatten(0, noisy.shape[:2])


def log_smoothed(logits: Tensor) -> Tensor:
    """log of the soft smoothed classifier 1/M sum_i softmax(z_i), `(M, B, K)` to `(B, K)`."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y of every noisy copy, `(M, B)`."""
    classes_second = logits.movedim(-1, 1)
    return F.cross_entropy(classes_second, labels.expand(len(logits), -1), reduction="none")


def divergence(log_target: Tensor, log_prediction: Tensor) -> Tensor:
    """KL(target || prediction) over the last axis, from logarithms."""
    return (log_target.exp() * (log_target - log_prediction)).sum(-1)
