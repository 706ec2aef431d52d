"""SPSA with gradient correction (Spall 1992; BlackVIP, Oh 2023), on a flat vector of weights."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from baselines.black_box.settings import BlackBoxSettings


def directions(size: int, generator: Generator) -> Tensor:
    """A random direction `(size,)`: each entry uniform on [-1, -1/2] and [1/2, 1]."""
    draws = torch.rand(2, size, generator=generator)
    return torch.where(draws[0] < 0.5, -1.0, 1.0) * (0.5 + 0.5 * draws[1])


def spsa_gradient(
    loss: Callable[[Tensor, int], float],
    weights: Tensor,
    c: float,
    averages: int,
    generator: Generator,
) -> Tensor:
    """Mean over `averages` of (L_i(w + c d_i) - L_i(w - c d_i)) / (2 c d_i), entry by entry.

    Args:
        loss: L_i(w), with i to tell which random numbers both evaluations must share.
        weights: `(D,)`.
        c: size of the perturbation.
        averages: number of directions d_i.
        generator: where the directions come from.
    """
    estimates = []
    for i in range(averages):
        d = directions(len(weights), generator)
        difference = loss(weights + c * d, i) - loss(weights - c * d, i)
        estimates.append(difference / (2 * c * d))
    return torch.stack(estimates).mean(0)


class GradientCorrection:
    """SPSA-GC as BlackVIP's code has it: m = g at first, then b m + g; the step is g + b m."""

    def __init__(self, settings: BlackBoxSettings, learning_rate: float) -> None:
        self.settings, self.learning_rate = settings, learning_rate
        self.momentum: Tensor | None = None

    def perturbation(self, step: int) -> float:
        """c_k at step k = 1, 2, ..."""
        return self.settings.c / float(step**self.settings.gamma)

    def rate(self, step: int) -> float:
        """a_k at step k = 1, 2, ..."""
        return self.learning_rate / float((step + self.settings.o) ** self.settings.alpha)

    def update(self, weights: Tensor, gradient: Tensor, step: int) -> Tensor:
        """Weights `(D,)` after step k = 1, 2, ..."""
        b = self.settings.momentum
        self.momentum = gradient if self.momentum is None else b * self.momentum + gradient
        return weights - self.rate(step) * (gradient + b * self.momentum)
