"""Methods against each other on the same test images."""

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from bench.errors import BenchError
from bench.statistics import CONFIDENCE, accuracy_interval

PAIR = ["sigma", "seed", "radius", "method_a", "method_b"]


def paired_difference_interval(
    only_a: ArrayLike, only_b: ArrayLike, n: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval of the difference of two proportions on the same images, elementwise.

    The two discordant cells have Clopper-Pearson intervals, which MOVER joins at the correlation
    that cells of a multinomial have (Zou, Huang & Zhang 2009). Either end then errs about as often
    as asked or less, also at the small errors that many comparisons leave each, where Wald's
    interval and its adjustments err several times as often if a cell is all but empty.

    Args:
        only_a: images that a alone gets right.
        only_b: images that b alone gets right.
        n: images.
        confidence: coverage aimed at.
    """
    n = np.asarray(n, dtype=float)
    a, b = np.asarray(only_a, dtype=float) / n, np.asarray(only_b, dtype=float) / n
    (low_a, high_a), (low_b, high_b) = (
        accuracy_interval(cell, n, confidence) for cell in (only_a, only_b)
    )
    others = np.maximum((1 - a) * (1 - b), np.finfo(float).tiny)
    shared = 2 * np.sqrt(a * b / others)

    def joined(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.sqrt(first**2 + second**2 + shared * first * second))

    low, high = a - b - joined(a - low_a, high_b - b), a - b + joined(high_a - a, b - low_b)
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def paired_tests(logs: dict[str, pd.DataFrame], radii: list[float]) -> pd.DataFrame:
    """McNemar's exact test of certified accuracy for every pair of methods at each radius.

    Args:
        logs: certification logs of one sigma and seed by method, of the same images.
        radii: l2, in [0, 1] pixels.

    Returns:
        `radius, method_a, method_b, n_images, only_a, only_b, difference` (a - b) with its 95 %
        interval `low, high`, `p_value` of no difference, and `p_holm`, corrected over all
        pairs of the radius.

    Raises:
        BenchError: two logs hold different images.
    """
    frames = {method: log.set_index("idx").sort_index() for method, log in logs.items()}
    tables = [_at_radius(frames, radius) for radius in radii]
    return pd.concat(tables, ignore_index=True)


def _at_radius(frames: dict[str, pd.DataFrame], radius: float) -> pd.DataFrame:
    right = {
        method: (frame["correct"] == 1) & (frame["radius"] >= radius)
        for method, frame in frames.items()
    }
    rows = []
    for a, b in combinations(right, 2):
        if not right[a].index.equals(right[b].index):
            raise BenchError(f"{a} and {b} were certified on different images: certify one again")
        only_a, only_b = int((right[a] & ~right[b]).sum()), int((right[b] & ~right[a]).sum())
        rows.append({"method_a": a, "method_b": b, "only_a": only_a, "only_b": only_b})
    table = pd.DataFrame(rows, columns=["method_a", "method_b", "only_a", "only_b"])
    n = len(next(iter(right.values())))
    low, high = paired_difference_interval(table["only_a"], table["only_b"], n)
    p_values = [mcnemar(*pair) for pair in zip(table["only_a"], table["only_b"], strict=True)]
    return pd.DataFrame(
        {
            "radius": radius,
            **table[["method_a", "method_b"]],
            "n_images": n,
            **table[["only_a", "only_b"]],
            "difference": (table["only_a"] - table["only_b"]) / n,
            "low": low,
            "high": high,
            "p_value": p_values,
            "p_holm": holm(p_values),
        }
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test."""
    discordant = only_a + only_b
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down correction: the k-th smallest of m is multiplied by m - k + 1.

    statsmodels has it too, at the price of five more packages.
    """
    values = np.asarray(p_values, dtype=float)
    order = values.argsort(kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected
