"""Projected gradient ascent against a smoothed classifier, in l2."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.objectives.noise import log_smoothed, noisy_logits


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile: an attack must not move batch statistics or meet dropout."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def direction(gradient: Tensor) -> Tensor:
    """`(..., C, H, W)` scaled to l2 norm 1 per image; zero stays zero."""
    return F.normalize(gradient.flatten(-3), dim=-1).view_as(gradient)


def within(perturbation: Tensor, radius: float) -> Tensor:
    """`(..., C, H, W)` projected onto the l2 ball of `radius` per image."""
    norm = perturbation.flatten(-3).norm(dim=-1)[..., None, None, None]
    return perturbation * (radius / norm.clamp(min=radius)) if radius else 0 * perturbation


def as_pixels(moved: Tensor, images: Tensor) -> Tensor:
    """`(..., C, H, W)` in [0, 1], or as far outside as `images`, which a resize can overshoot."""
    return torch.clamp(moved, images.clamp(max=0), images.clamp(min=1))


def smoothed_gradient(
    classifier: nn.Module, images: Tensor, labels: Tensor, noise: Tensor
) -> Tensor:
    """Gradient at `images` of -log(1/M sum_i softmax(F(x + noise_i))_y) (Salman 2019)."""
    images = images.detach().requires_grad_()
    logits = noisy_logits(classifier, images + noise)
    # Summed, so that each image has the gradient of its own loss, whatever the batch size.
    loss = F.nll_loss(log_smoothed(logits), labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0]
