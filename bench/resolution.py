"""Noise at the model's resolution: resized images, and what their radii are in native pixels."""

from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data import Data, ImageSplit

BICUBIC = "bicubic"
INTERPOLATIONS = (BICUBIC, "bilinear", "nearest")


def resize(pixels: Tensor, size: int) -> Tensor:
    """Images `(B, C, H, W)` as `(B, C, size, size)`; linear in the pixels, hence never clamped."""
    return _interpolate(pixels, (size, size), BICUBIC)


def _interpolate(pixels: Tensor, shape: tuple[int, int], interpolation: str) -> Tensor:
    smooth = interpolation != "nearest"
    return F.interpolate(pixels, shape, mode=interpolation, antialias=smooth)


def resize_matrix(side: int, size: int, interpolation: str = BICUBIC) -> Tensor:
    """The matrix `(size, side)`, float64, that resizing applies to every column of an image."""
    identity = torch.eye(side, dtype=torch.float64)[None, None]
    return _interpolate(identity, (size, side), interpolation)[0, 0]


def operator_norm(height: int, width: int, size: int, interpolation: str = BICUBIC) -> float:
    """Largest l2 norm that resizing `(height, width)` to `(size, size)` gives a unit image.

    Resizing is the Kronecker product of one matrix per axis, so its norm is that of theirs.
    """
    matrices = [resize_matrix(side, size, interpolation) for side in (height, width)]
    return float(torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices]).prod())


@dataclass(frozen=True)
class Resized:
    """Another split whose images are resized to `size`, to which noise is then added."""

    source: ImageSplit
    size: int

    @property
    def labels(self) -> Tensor:
        """Classes `(N,)`."""
        return self.source.labels

    def batch(self, positions: Tensor) -> Tensor:
        """Images `(B, C, size, size)` float32 at `positions`; overshoots of [0, 1] stay."""
        return resize(self.source.batch(positions), self.size)

    @property
    def operator_norm(self) -> float:
        """Of the resizing: a radius over it holds for the pixels of `source`."""
        height, width = self.source.batch(torch.tensor([0])).shape[2:]
        return operator_norm(height, width, self.size)


def resized(data: Data, size: int | None) -> Data:
    """`data` with every image resized to `size`; None leaves them as they are."""
    if size is None:
        return data
    return replace(
        data,
        shape=(data.shape[0], size, size),
        train=Resized(data.train, size),
        validation=Resized(data.validation, size),
        test=Resized(data.test, size),
    )


def resolution_table(native: int, size: int, sigma: float) -> pd.DataFrame:
    """What noise of `sigma` on images resized from side `native` to `size` is in native pixels.

    `native_radius_factor` turns radii into native ones; `averaged_sigma` is what is left of the
    noise in the mean over the block of (size / native)^2 pixels that one native pixel became.
    """
    norms = [operator_norm(native, native, size, kind) for kind in INTERPOLATIONS]
    table = pd.DataFrame({"interpolation": INTERPOLATIONS, "operator_norm": norms})
    factor = 1 / table["operator_norm"]
    return table.assign(native_radius_factor=factor, averaged_sigma=sigma * native / size)
