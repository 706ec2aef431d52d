"""What a certificate means, fixed before the first draw."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.errors import BenchError
from bench.smoothing.bounds import radius_cap
from bench.smoothing.noise import BLOCK

Mode = Literal["decide", "cohen", "radius", "predict"]
Candidate = Literal["pilot", "label"]


@dataclass(frozen=True)
class Protocol:
    """Noise level, mode, draws, error probability and noise stream of a certification.

    Args:
        sigma: standard deviation of the noise in [0, 1] pixels.
        mode: `decide` tests a grid of radii with as few draws as it needs; `cohen` draws `n`
            for every image (Cohen 2019, CERTIFY); `radius` draws what a pilot says is needed
            to come within `tolerance` of what `n` draws would certify (Chen 2022, pilot
            discarded); `predict` answers without a radius (Cohen 2019, PREDICT).
        n0: pilot draws, which choose the candidate class (of `pilot`) and, in `radius`, how many
            draws follow; they are never counted as evidence.
        n: most estimation draws per image.
        alpha: probability that a certificate is wrong, per image or over `family_size` images.
        radii: `decide` tests these, increasing, in [0, 1]-pixel l2.
        horizon: draws up to which `decide` plans looks; a finished run can be continued to it.
        reserve: share of alpha that `decide` keeps for the look at `reserve_at` (None: `n`).
        futility: `decide` gives an image up when the next radius has less chance than this.
        tolerance: of `radius`, in units of sigma.
        candidate: class that is certified: the pilot's choice, or the true label (valid for
            certified accuracy alone, since the pilot's draws are saved by knowing the answer).
        family_size: images that share alpha; 1 means alpha for each image.
        seed: of the noise; never that of a training.
        data: name of the data set, part of the noise's key.
        batch_size: noisy images per forward pass, a multiple of 32.

    Raises:
        ValueError: a value cannot work.
    """

    sigma: float
    mode: Mode = "decide"
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    radii: tuple[float, ...] = ()
    horizon: int = 1_000_000
    reserve: float = 0.3
    reserve_at: int | None = None
    futility: float = 0.042
    tolerance: float = 0.01
    candidate: Candidate = "pilot"
    family_size: int = 1
    seed: int = 0
    data: str = "images"
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if self.batch_size % BLOCK:
            raise ValueError(f"batch_size must be a multiple of {BLOCK}, got {self.batch_size}")
        if not (self.sigma > 0 and 0 < self.alpha < 0.5 and self.n > 0 and self.n0 > 0):
            raise ValueError(f"sigma, alpha, n or n0 out of range in {self}")
        if self.reserve_at is not None and self.reserve_at < 1:
            raise ValueError(f"reserve_at counts draws, got {self.reserve_at}")
        if self.family_size < 1 or self.family_size != int(self.family_size):
            raise ValueError(f"family_size counts images, got {self.family_size}")
        if not (0 <= self.reserve < 1 and 0 <= self.futility < 1 and self.tolerance > 0):
            raise ValueError(f"reserve, futility or tolerance out of range in {self}")
        if self.radii and not (self.radii[0] >= 0 and (np.diff(self.radii) > 0).all()):
            raise ValueError(f"radii must increase from 0 or more, got {self.radii}")
        if self.mode == "decide" and not self.radii:
            raise ValueError("mode decide tests a grid of radii: give `radii`, see radius_grid")
        if self.mode == "decide" and self.n > self.horizon:
            raise ValueError(f"n = {self.n} exceeds the planned horizon of {self.horizon} draws")

    @property
    def alpha_per_image(self) -> float:
        """Error probability of one image's certificate (Bonferroni over the family)."""
        return self.alpha / self.family_size


MOST_RADII = 10_000


def radius_grid(step: float, largest: float) -> tuple[float, ...]:
    """Multiples of `step` from 0 to `largest`; products, so 0.15 is one float everywhere.

    Raises:
        BenchError: they are too many for tables.
    """
    count = int(np.floor(largest / step * (1 + 1e-12)))
    if count > MOST_RADII:
        least = largest / MOST_RADII
        raise BenchError(f"radius step {step} makes {count} radii: take at least {least:.2g}")
    return tuple(float(radius) for radius in np.round(np.arange(count + 1) * step, 10))


def reachable_radii(step: float, sigma: float, n: int, alpha: float) -> tuple[float, ...]:
    """All multiples of `step` that n equal votes could certify."""
    return radius_grid(step, radius_cap(n, alpha, sigma))
