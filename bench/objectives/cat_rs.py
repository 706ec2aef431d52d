"""CAT-RS (Jeong 2023): confidence decides how many noises and how hard ones an image gets."""

import torch
from torch import Tensor, nn

from bench.objectives.attack import direction, evaluating, within
from bench.objectives.noise import Batch, cross_entropies, divergence, log_smoothed, noisy_logits


def cat_rs(
    classifier: nn.Module, batch: Batch, *, noises: int, radius: float, steps: int, weight: float
) -> Tensor:
    """The k least of CE(F(x + noise_i), y) / M, + weight * [k = M] max_i KL(G || F(x + noise*_i)).

    k ~ max(1, Binomial(M, p)), p the share of the M noises under which F is right; noise*_i is
    the worst noise within `radius` of noise_i. G, the mean of F over the M noises, is a constant
    here. The published code takes G from another classifier, trained on noise beforehand.
    """
    noise = batch.noise(noises)
    logits = noisy_logits(classifier, batch.images + noise)
    accuracy = (logits.argmax(-1) == batch.labels).float().mean(0)
    count = torch.full_like(accuracy, noises)
    kept = torch.binomial(count, accuracy, generator=batch.generator).clamp(min=1)
    ascending = cross_entropies(logits, batch.labels).sort(dim=0).values
    rank = torch.arange(noises, device=noise.device)[:, None]
    low = (ascending * (rank < kept)).sum(0) / noises
    target = log_smoothed(logits).detach()
    worst = _worst_noise(classifier, batch.images, noise, target, radius, steps)
    prediction = noisy_logits(classifier, batch.images + worst).log_softmax(-1)
    high = divergence(target, prediction).amax(0)
    return (low + weight * (kept == noises) * high).mean()


def _worst_noise(
    classifier: nn.Module,
    images: Tensor,
    noise: Tensor,
    target: Tensor,
    radius: float,
    steps: int,
) -> Tensor:
    """Ascend KL(target || F(x + noise_i)) near each `noise` `(M, B, C, H, W)`."""
    worst = noise
    with evaluating(classifier):
        for _ in range(steps):
            worst = worst.detach().requires_grad_()
            prediction = noisy_logits(classifier, images + worst).log_softmax(-1)
            gradient = torch.autograd.grad(divergence(target, prediction).sum(), worst)[0]
            moved = worst.detach() + 2 * radius / steps * direction(gradient)
            worst = _with_moments_of(noise, noise + within(moved - noise, radius))
    return worst


def _with_moments_of(noise: Tensor, moved: Tensor) -> Tensor:
    """`moved` with each draw's mean and deviation of `noise`: typical of N(0, sigma^2) again."""
    axes = (-3, -2, -1)
    deviation, mean = torch.std_mean(moved, axes, keepdim=True)
    wanted_deviation, wanted_mean = torch.std_mean(noise, axes, keepdim=True)
    return wanted_mean + (moved - mean) / deviation * wanted_deviation
