"""Cross-entropy on Gaussian-noised images (Cohen 2019)."""

from torch import Tensor, nn

from bench.objectives.noise import Batch, cross_entropies, noisy_logits


def cross_entropy(classifier: nn.Module, batch: Batch, *, noises: int) -> Tensor:
    """1/M sum_i CE(F(x + noise_i), y) (Cohen 2019 with M = 1; PEFTSmoothing eq. 4)."""
    logits = noisy_logits(classifier, batch.images + batch.noise(noises))
    return cross_entropies(logits, batch.labels).mean()
