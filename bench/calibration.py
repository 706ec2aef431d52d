"""How near certified radii come to exact ones, and how often they exceed them.

Where class 1 is a half-space, its smoothed radius is the distance to the border, whatever the
dimension: one pixel is enough, and every draw is a coin of known bias.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from bench.figures import STYLE, save_figure
from bench.files import atomic_write
from bench.smoothing import Protocol, certify, reachable_radii
from bench.smoothing.bounds import radius_cap
from bench.smoothing.protocol import Mode
from bench.statistics import accuracy_interval

MODES: tuple[Mode, ...] = ("decide", "cohen")
DRAWS = (100, 1000, 10_000, 100_000)
SIGMA, STEP, SEED = 0.5, 0.05, 20_261_125
# Exact radii, in steps: up to 3 sigma, where 100,000 equal votes certify 3.8.
LEVELS = (2, 10, 20, 30)
# `decide` certifies multiples of the step. Half-way between two it must lose half a step; just
# below one it is likeliest to claim too much, and an excess over a large alpha shows soonest.
PLACES = {"half-way": (0.5, 0.001), "just below": (-0.001, 0.05)}
CERTIFICATES = 100
BATCH = 32_768


class HalfSpace(nn.Module):
    """Class 1 where the pixel is positive."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `(B, 2)` of images `(B, 1, 1, 1)`."""
        score = pixels.flatten(1)
        return torch.cat([-score, score], dim=1)


def build_calibration(
    table: Path,
    figure: Path,
    draws: Sequence[int] = DRAWS,
    certificates: int = CERTIFICATES,
) -> pd.DataFrame:
    """Write certified beside exact radii, by mode, n and exact radius, as CSV, SVG and PNG.

    `ratio` is the mean of certified over exact radii, abstentions being 0; `exceeding` the share
    of certificates above the exact radius, with its 95 % interval, which alpha allows.

    Args:
        table: the CSV.
        figure: path of the figure, without its ending.
        draws: n of each certificate.
        certificates: how many for each row of the table.
    """
    cases = product(MODES, PLACES, draws, LEVELS)
    study = pd.DataFrame([_row(*case, certificates) for case in cases])
    with atomic_write(table) as temporary:
        study.to_csv(temporary, index=False)
    with mpl.rc_context(STYLE):
        panels, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        _draw_ratio(axes[0], study)
        _draw_exceeding(axes[1], study)
        save_figure(panels, figure)
    return study


def _row(mode: Mode, place: str, n: int, level: int, certificates: int) -> dict[str, Any]:
    offset, alpha = PLACES[place]
    pixel = torch.tensor((level + offset) * STEP, dtype=torch.float32)
    protocol = Protocol(
        sigma=SIGMA,
        mode=mode,
        n=n,
        alpha=alpha,
        radii=reachable_radii(STEP, SIGMA, n, alpha),
        horizon=n,
        seed=SEED,
        # The key of the noise: every row has draws of its own.
        data=f"{mode}/{place}/{n}/{level}",
        batch_size=BATCH,
    )
    images, ids = pixel.expand(certificates, 1, 1, 1), list(range(certificates))
    found = [*certify(HalfSpace().eval(), images, [1] * certificates, ids, protocol, 2)]
    radii = np.array([certificate.radius for certificate in found])
    # Any radius of the other class is too much.
    wrong = np.array([certificate.predict == 0 for certificate in found])
    exceeding = int(((radii > pixel.item()) | wrong).sum())
    low, high = accuracy_interval(exceeding, certificates)
    return {
        "mode": mode,
        "alpha": alpha,
        "n": n,
        "place": place,
        "exact": pixel.item(),
        "ratio": (radii * ~wrong).mean() / pixel.item(),
        "exceeding": exceeding / certificates,
        "low": float(low),
        "high": float(high),
        "certificates": certificates,
        "samples": np.mean([certificate.samples for certificate in found]),
    }


def _draw_ratio(axis: Axes, study: pd.DataFrame) -> None:
    """Certified over exact radius against n, half-way between two radii of the grid."""
    part = study[study["place"] == "half-way"]
    sigmas = (part["exact"] / SIGMA).map("{:.2f} σ".format)
    sns.lineplot(
        part.assign(**{"exact radius": sigmas}),
        x="n",
        y="ratio",
        hue="exact radius",
        style="mode",
        palette="viridis",
        ax=axis,
    )
    axis.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    axis.set(xscale="log", ylim=(0, 1.05), ylabel="certified / exact radius")
    axis.set_title(f"alpha = {part['alpha'].iloc[0]:g}", fontsize=11)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def _draw_exceeding(axis: Axes, study: pd.DataFrame) -> None:
    """Share of certificates above the exact radius, over the radii that n draws can reach."""
    part = study[study["place"] == "just below"]
    alpha = part["alpha"].iloc[0]
    part = part[[row["exact"] < radius_cap(row["n"], alpha, SIGMA) for _, row in part.iterrows()]]
    part = part.assign(hits=part["exceeding"] * part["certificates"])
    sums = part.groupby(["mode", "n"], as_index=False)[["hits", "certificates"]].sum()
    low, high = accuracy_interval(sums["hits"].round(), sums["certificates"])
    sums = sums.assign(share=sums["hits"] / sums["certificates"], low=low, high=high)
    for place, mode in enumerate(MODES):
        own = sums[sums["mode"] == mode]
        error = [own["share"] - own["low"], own["high"] - own["share"]]
        # Side by side, or one would hide the other.
        axis.errorbar(own["n"] * (0.93 + 0.14 * place), own["share"], error, fmt="o", label=mode)
    axis.axhline(alpha, color="0.4", linewidth=0.8, label="alpha", zorder=0)
    axis.set(xscale="log", xlabel="n", ylabel="share of certificates above the exact radius")
    axis.set_ylim(0, 2.5 * alpha)
    axis.set_title(f"alpha = {alpha:g}", fontsize=11)
    axis.legend(fontsize=8)
