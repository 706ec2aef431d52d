"""SmoothMix (Jeong 2021): mix images with over-confident adversaries, labels with uniform ones."""

import torch
from torch import Tensor, nn

from bench.objectives.attack import as_pixels, direction, evaluating, smoothed_gradient, within
from bench.objectives.noise import Batch, cross_entropies, divergence, log_smoothed, noisy_logits


def smoothmix(
    classifier: nn.Module,
    batch: Batch,
    *,
    noises: int,
    steps: int,
    step_size: float,
    weight: float,
    one_step: bool,
    warmup: float,
) -> Tensor:
    """Mean of CE(F(x + noise_i), y) + weight * [G(x) right] * KL(y_mix || F(x_mix + noise_i)).

    x_mix = (1 - a) x + a x*, y_mix = (1 - a) G(x) + a / K, a ~ U[0, 1/2]; x* is `steps` unbounded
    ascent steps of `step_size` away, G the mean of F over the M noises. With `one_step` the first
    of these adversaries takes the place of x. The weight, and how far that one may lie, grow
    during `warmup`.
    """
    noise, ramp = batch.noise(noises), batch.ramp(warmup)
    first, last = _adversaries(classifier, batch, noise, steps, step_size)
    images = batch.images
    if one_step:
        images = images + within(first - images, ramp * step_size)
    logits = noisy_logits(classifier, images + noise)
    smoothed = log_smoothed(logits)
    share = torch.rand((len(images), 1), generator=batch.generator, device=images.device) / 2
    mixed = torch.lerp(images, last, share[..., None, None])
    target = torch.logaddexp((1 - share).log() + smoothed, (share / smoothed.shape[-1]).log())
    prediction = noisy_logits(classifier, mixed + noise).log_softmax(-1)
    right = smoothed.argmax(-1) == batch.labels
    apart = (right * divergence(target, prediction)).mean()
    return cross_entropies(logits, batch.labels).mean() + weight * ramp * apart


def _adversaries(
    classifier: nn.Module, batch: Batch, noise: Tensor, steps: int, step_size: float
) -> tuple[Tensor, Tensor]:
    """The images after the first and after the last ascent step, in [0, 1] pixels."""
    path = [batch.images]
    with evaluating(classifier):
        for _ in range(steps):
            gradient = smoothed_gradient(classifier, path[-1], batch.labels, noise)
            path.append(as_pixels(path[-1] + step_size * direction(gradient), batch.images))
    return path[1], path[-1]
