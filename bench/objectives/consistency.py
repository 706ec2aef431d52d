"""Consistency regularisation (Jeong & Shin 2020)."""

from torch import Tensor, nn

from bench.objectives.noise import Batch, cross_entropies, divergence, log_smoothed, noisy_logits


def consistency(
    classifier: nn.Module, batch: Batch, *, noises: int, weight: float, entropy_weight: float
) -> Tensor:
    """Mean of CE(F(x + noise_i), y) + weight * KL(G || F(x + noise_i)), + entropy_weight * H(G).

    G is the mean of F(x + noise_i) over the M noises, and gradients flow through it.
    """
    logits = noisy_logits(classifier, batch.images + batch.noise(noises))
    smoothed = log_smoothed(logits)
    apart = divergence(smoothed, logits.log_softmax(-1)).mean()
    entropy = -(smoothed.exp() * smoothed).sum(-1).mean()
    classification = cross_entropies(logits, batch.labels).mean()
    return classification + weight * apart + entropy_weight * entropy
