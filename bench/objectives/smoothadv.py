"""SmoothAdv (Salman 2019): adversarial training of the smoothed classifier."""

from torch import Tensor, nn

from bench.objectives.attack import as_pixels, direction, evaluating, smoothed_gradient, within
from bench.objectives.noise import Batch, cross_entropies, noisy_logits


def smoothadv(
    classifier: nn.Module, batch: Batch, *, noises: int, radius: float, steps: int, warmup: float
) -> Tensor:
    """1/M sum_i CE(F(x* + noise_i), y), x* = argmax -log 1/M sum_i F(x' + noise_i)_y.

    The maximum over [0, 1] pixels with |x' - x| <= radius is sought by `steps` PGD steps of
    2 radius / steps; the same noise serves the attack and the loss. The radius grows during
    `warmup`.
    """
    noise = batch.noise(noises)
    radius = radius * batch.ramp(warmup)
    adversary = batch.images
    with evaluating(classifier):
        for _ in range(steps):
            gradient = smoothed_gradient(classifier, adversary, batch.labels, noise)
            moved = adversary + 2 * radius / steps * direction(gradient)
            moved = as_pixels(moved, batch.images)
            adversary = batch.images + within(moved - batch.images, radius)
    return cross_entropies(noisy_logits(classifier, adversary + noise), batch.labels).mean()
