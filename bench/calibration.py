"""How near certified radii come to exact ones, and how often they exceed them.

For a linear classifier, sign(w.x + b), the smoothed classifier is the same one and its radius is
the distance to the hyperplane, |w.x + b| / ||w||.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.figures import STYLE, save_figure
from bench.files import atomic_write
from bench.smoothing import Protocol, certify, reachable_radii
from bench.statistics import accuracy_interval

Mode = Literal["decide", "cohen"]
SIGMA, STEP, SEED = 0.5, 0.05, 20_261_125
HORIZON = 100_000
# Exact radii in steps of the grid: up to 3.05 sigma, near the cap of 100,000 draws (3.8).
LEVELS = (2, 5, 10, 20, 30)
# Certified radii are multiples of the step: half-way between two, `decide` loses half a step at
# least; just below one, it is likeliest to certify too much.
PLACES = {"half-way": 0.5, "just below": -1e-6}
CERTIFICATES = 200


class HalfSpace(nn.Module):
    """Class 1 where the only pixel is positive."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `(B, 2)`."""
        score = pixels.flatten(1)
        return torch.cat([-score, score], dim=1)


def build_calibration(
    table: Path, figure: Path, draws: tuple[int, ...], alphas: tuple[float, ...]
) -> pd.DataFrame:
    """Write the study as CSV and draw it."""
