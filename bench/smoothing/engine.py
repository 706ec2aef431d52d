"""CERTIFY (Cohen 2019, algorithm 1) over many images in one stream of fixed-shape batches."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.smoothing.bounds import certified_radius, p_a_lower
from bench.smoothing.noise import BLOCK, noise_key, standard_normal

ABSTAIN = -1


@dataclass(frozen=True)
class Protocol:
    """What a certificate means: noise level, draws, error probability and noise stream."""

    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int
    data: str
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size % BLOCK:
            raise ValueError(f"batch_size must be a multiple of {BLOCK}, got {self.batch_size}")


@dataclass(frozen=True)
class Certificate:
    """One image's certificate; `predict` -1 and radius 0 mean abstention."""

    idx: int
    label: int
    predict: int
    radius: float
    time: float
    samples: int
    n_a: int
    p_a_lower: float
    n_label: int
    clean_predict: int

    @property
    def correct(self) -> int:
        """1 where the smoothed classifier's answer is the label."""
        return int(self.predict == self.label)


def count_votes(
    classifier: nn.Module,
    images: Tensor,
    ids: list[int],
    draws: int,
    domain: str,
    protocol: Protocol,
    classes: int,
) -> Tensor:
    """Votes `(B, classes + 1)` of `draws` noisy copies of each image `(B, C, H, W)`.

    The last column counts non-finite logits, which vote for no class. Noise is added in
    float32 in pixel space and never clamped. Every batch has one shape, the last one padded,
    so that the network's rounding does not change with the number of images.
    """
    blocks = -(-draws // BLOCK)
    items = [(row, block) for row in range(len(ids)) for block in range(blocks)]
    per_batch = protocol.batch_size // BLOCK
    counts = torch.zeros(len(ids) * (classes + 1), dtype=torch.int64, device=images.device)
    offsets = torch.arange(BLOCK, device=images.device)
    for start in range(0, len(items), per_batch):
        batch = items[start : start + per_batch]
        padded = batch + [batch[-1]] * (per_batch - len(batch))
        keys = [noise_key(protocol.seed, protocol.data, ids[r], domain, b) for r, b in padded]
        noise = standard_normal(keys, images.shape[1:], images.device)
        rows = torch.tensor([r for r, _ in padded], device=images.device).repeat_interleave(BLOCK)
        votes = _vote(classifier(images[rows] + protocol.sigma * noise), classes)
        first = torch.tensor([b * BLOCK for _, b in padded], device=images.device)
        wanted = (first[:, None] + offsets).flatten() < draws
        wanted[len(batch) * BLOCK :] = False
        counts += torch.bincount((rows * (classes + 1) + votes)[wanted], minlength=len(counts))
    return counts.view(len(ids), classes + 1).cpu()


def _vote(logits: Tensor, classes: int) -> Tensor:
    finite = torch.isfinite(logits).all(dim=1)
    return torch.where(finite, logits.float().argmax(dim=1), classes)


@torch.inference_mode()
def certify(
    classifier: nn.Module,
    images: Tensor,
    labels: list[int],
    ids: list[int],
    protocol: Protocol,
    classes: int,
    pool: int = 32,
) -> Iterator[Certificate]:
    """Yield a certificate per image, `pool` images at a time.

    Args:
        classifier: maps `(B, C, H, W)` pixels in [0, 1] plus noise to `(B, classes)` logits.
        images: clean images `(N, C, H, W)` on the classifier's device.
        labels: true classes; they decide nothing but the `n_label` column.
        ids: indices in the test set; they key the noise.
        protocol: what the certificates mean.
        classes: number of classes.
        pool: images certified together; the results do not depend on it.
    """
    for start in range(0, len(ids), pool):
        part = slice(start, start + pool)
        yield from _certify_pool(
            classifier, images[part], labels[part], ids[part], protocol, classes
        )


def _certify_pool(
    classifier: nn.Module,
    images: Tensor,
    labels: list[int],
    ids: list[int],
    protocol: Protocol,
    classes: int,
) -> Iterator[Certificate]:
    begin = time.perf_counter()
    padding = protocol.batch_size - len(images)
    shape = images.shape[1:]
    padded = torch.cat([images, images[-1:].expand(padding, *shape)]) if padding > 0 else images
    clean = _vote(classifier(padded), classes).cpu()
    pilot = count_votes(classifier, images, ids, protocol.n0, "selection", protocol, classes)
    # A fresh domain: counts that chose the class must not also vouch for it.
    votes = count_votes(classifier, images, ids, protocol.n, "estimation", protocol, classes)
    seconds = (time.perf_counter() - begin) / len(ids)
    for row, (idx, label) in enumerate(zip(ids, labels, strict=True)):
        candidate = int(pilot[row, :classes].argmax())
        n_a = int(votes[row, candidate])
        lower = p_a_lower(n_a, protocol.n, protocol.alpha)
        radius = certified_radius(lower, protocol.sigma)
        yield Certificate(
            idx=idx,
            label=label,
            predict=ABSTAIN if radius is None else candidate,
            radius=radius or 0.0,
            time=seconds,
            samples=protocol.n0 + protocol.n,
            n_a=n_a,
            p_a_lower=lower,
            n_label=int(votes[row, label]),
            clean_predict=int(clean[row]),
        )
