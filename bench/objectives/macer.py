"""MACER (Zhai 2020): maximise the soft certified radius."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.objectives.noise import Batch, log_smoothed, noisy_logits


def macer(
    classifier: nn.Module,
    batch: Batch,
    *,
    noises: int,
    weight: float,
    margin: float,
    temperature: float,
    start: float,
) -> Tensor:
    """-log G(x)_y + weight * sigma/2 * max(margin - gap, 0) where the smoothed G_b is right.

    G averages softmax(z_i) and G_b softmax(temperature * z_i) over the M noises; the gap is
    Phi^-1(G_b(x)_y) - max_{k != y} Phi^-1(G_b(x)_k). The second term enters at progress `start`.
    """
    logits = noisy_logits(classifier, batch.images + batch.noise(noises))
    classification = F.nll_loss(log_smoothed(logits), batch.labels)
    if batch.progress < start:
        return classification
    top = log_smoothed(temperature * logits).exp().topk(2)
    correct = top.indices[:, 0] == batch.labels
    # At 0 and 1 the quantile is infinite; what is cut off lies far beyond the usual margin of 8.
    tiny = torch.finfo(torch.float32).eps
    best, second = torch.special.ndtri(top.values.clamp(tiny, 1 - tiny)).unbind(-1)
    shortfall = (margin - (best - second)).clamp(min=0)
    return classification + weight * batch.sigma / 2 * (correct * shortfall).mean()
