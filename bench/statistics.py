"""Estimates over test images, with intervals."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

CONFIDENCE = 0.95


def accuracy_interval(
    successes: ArrayLike, n: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two-sided Clopper-Pearson interval of a proportion, elementwise."""
    k, n = np.asarray(successes, dtype=float), np.asarray(n, dtype=float)
    tail = (1 - confidence) / 2
    # scipy gives nan where a shape parameter is 0; the bound is exact there.
    low = np.where(k > 0, beta.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
    high = np.where(k < n, beta.isf(tail, k + 1, np.maximum(n - k, 1)), 1.0)
    return low, high


def certified_accuracy(log: pd.DataFrame, radii: ArrayLike) -> pd.DataFrame:
    """Share of images that are answered correctly with radius >= r, for each r of `radii`.

    Radii are l2 in [0, 1] pixels. At r = 0 abstentions still count as wrong.
    """
    grid = np.asarray(radii, dtype=float)
    reached = log["correct"].to_numpy()[:, None] * (log["radius"].to_numpy()[:, None] >= grid)
    successes = reached.sum(axis=0)
    low, high = accuracy_interval(successes, len(log))
    values = {"radius": grid, "value": successes / len(log), "low": low, "high": high}
    return pd.DataFrame({**values, "n_images": len(log)})


def average_certified_radius(log: pd.DataFrame) -> float:
    """Mean over images of the certified radius, 0 where the answer is wrong or none."""
    return float((log["radius"] * log["correct"]).mean())
