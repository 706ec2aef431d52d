"""Random crops and flips of training images, as published trainings have them."""

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

MARGIN = 8  # a shift of up to an eighth of the side: the 4 of 32 pixels that CIFAR-10 is given


def crop_and_flip(images: Tensor, generator: Generator) -> Tensor:
    """Shift each of `(B, C, H, W)` at random, zeros beyond its edges; mirror half of them.

    `generator` is on the device of the images; each image has draws of its own.
    """
    batch, channels, height, width = images.shape
    margin = max(1, height // MARGIN)
    device = images.device

    def indices(high: int) -> Tensor:
        return torch.randint(high, (batch, 1), generator=generator, device=device)

    rows = indices(2 * margin + 1) + torch.arange(height, device=device)
    columns = indices(2 * margin + 1) + torch.arange(width, device=device)
    columns = torch.where(indices(2) == 1, columns.flip(1), columns)
    return pad(images, (margin,) * 4)[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
