"""Votes on noisy copies: a round of fixed-shape batches, one transfer each way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.smoothing.noise import BLOCK, key_tensor, noise_key, standard_normal


@dataclass(frozen=True)
class Item:
    """Draws `first` to `stop` - 1 of one noise block of one image, counted in `row`."""

    row: int
    position: int
    key: int
    first: int
    stop: int


def items_of(
    row: int, position: int, stream: tuple[int, str, int, str], start: int, stop: int
) -> list[Item]:
    """The blocks that hold draws `start` to `stop` - 1 of a stream (seed, data, image, domain)."""
    return [
        Item(
            row,
            position,
            noise_key(*stream, block),
            max(0, start - block * BLOCK),
            min(BLOCK, stop - block * BLOCK),
        )
        for block in range(start // BLOCK, -(-stop // BLOCK))
    ]


def vote(logits: Tensor, classes: int) -> Tensor:
    """Predicted classes `(B,)`; non-finite logits vote for the extra class `classes`.

    Raises:
        ValueError: there are not `classes` logits per image; others would count elsewhere.
    """
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(f"logits are {tuple(logits.shape)}, expected {classes} per image")
    finite = torch.isfinite(logits).all(dim=1)
    return torch.where(finite, logits.float().argmax(dim=1), classes)


@torch.inference_mode()
def count_votes(
    classifier: nn.Module,
    images: Tensor,
    items: Sequence[Item],
    sigma: float,
    batch_size: int,
    classes: int,
) -> NDArray[np.int64]:
    """Votes `(rows, classes + 1)` of the draws in `items` on clean `images` `(N, C, H, W)`.

    Noise is added in float32 in pixel space and never clamped. Every batch has one shape, the
    last one padded, so that the network's rounding does not change with the amount of work.
    """
    per_batch = batch_size // BLOCK
    padding = [Item(0, items[-1].position, 0, 0, 0)] * (-len(items) % per_batch)
    work = [*items, *padding]
    device, rows = images.device, 1 + max(item.row for item in items)
    keys = key_tensor([item.key for item in work], device)
    table = torch.tensor([[i.row, i.position, i.first, i.stop] for i in work]).to(device)
    offsets = torch.arange(BLOCK, device=device)
    counts = torch.zeros(rows * (classes + 1), dtype=torch.int64, device=device)
    for start in range(0, len(work), per_batch):
        row, position, first, stop = table[start : start + per_batch].T[:, :, None]
        noisy = standard_normal(keys[start : start + per_batch], images.shape[1:]).mul_(sigma)
        noisy += images[position.expand(-1, BLOCK).flatten()]
        votes = vote(classifier(noisy), classes).view(-1, BLOCK)
        # At 224 pixels a batch is half a gigabyte, and the next one is made before this one goes.
        del noisy
        wanted = (offsets >= first) & (offsets < stop)
        counts.scatter_add_(
            0, (row * (classes + 1) + votes).flatten(), wanted.flatten().to(torch.int64)
        )
    return np.asarray(counts.view(rows, classes + 1).cpu().numpy())


@torch.inference_mode()
def clean_votes(
    classifier: nn.Module, images: Tensor, batch_size: int, classes: int
) -> NDArray[np.int64]:
    """Predicted classes of clean `images` `(N, C, H, W)`, in batches of the same fixed shape."""
    votes = []
    for batch in images.split(batch_size):
        padding = images[-1:].expand(batch_size - len(batch), *images.shape[1:])
        votes.append(vote(classifier(torch.cat([batch, padding])), classes))
    return np.asarray(torch.cat(votes)[: len(images)].cpu().numpy())
