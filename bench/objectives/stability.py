"""Stability training (Li 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.objectives.noise import Batch


def stability(classifier: nn.Module, batch: Batch, *, weight: float) -> Tensor:
    """CE(F(x), y) + weight * H(F(x), F(x + noise)), H the cross-entropy of two predictions."""
    clean = classifier(batch.images)
    noisy = classifier(batch.images + batch.noise(1)[0])
    stable = F.cross_entropy(noisy, clean.softmax(-1))
    return F.cross_entropy(clean, batch.labels) + weight * stable
