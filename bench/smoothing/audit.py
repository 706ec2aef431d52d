"""What is wrong with a certification log, ours or anyone's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import chisquare

from bench.errors import BenchError
from bench.smoothing.bounds import radius_cap
from bench.smoothing.log import read_log

TABLE_STEP = 0.25
ROUND_SIZE = 1000
UNBALANCED = 0.001


@dataclass(frozen=True)
class Finding:
    """One complaint; an error means that the log's certified accuracy cannot be trusted."""

    severity: Literal["error", "warning"]
    text: str


def audit(path: Path, sigma: float, alpha: float, n: int) -> list[Finding]:
    """Findings about the log at `path`, made with noise `sigma`, `alpha` and at most `n` draws.

    Radii are compared with the cap sigma * Phi^-1(alpha^(1/n)) of n equal votes, up to the
    rounding of the printed digits.
    """
    try:
        log = read_log(path)
    except BenchError as error:
        return [Finding("error", str(error))]
    texts = pd.read_csv(path, sep="\t", dtype=str)
    radius = log["radius"].to_numpy(float)
    rounding = _rounding(texts["radius"], radius)
    found = [
        _above_cap(radius, rounding, radius_cap(n, alpha, sigma)),
        _missing_images(np.sort(log["idx"].to_numpy(int)), path.with_suffix(".json").exists()),
        _crossing(radius, rounding),
        _labels(log),
        _recorded(texts, log),
        _order(log),
    ]
    return sorted((f for f in found if f), key=lambda f: f.severity)


def _rounding(texts: "pd.Series[str]", radius: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Half of the last printed digit, from the most significant digits that the log shows."""
    mantissa = texts.str.lower().str.split("e").str[0].str.replace(".", "").str.strip("-+0 ")
    digits = int(mantissa.str.len().max() or 1)
    scale = np.floor(np.log10(np.maximum(radius, 1e-12)))
    return np.asarray(np.where(radius > 0, 0.5 * 10.0 ** (scale - digits + 1), 0.0))


def _above_cap(
    radius: np.ndarray[Any, Any], rounding: np.ndarray[Any, Any], cap: float
) -> Finding | None:
    above = int((radius - rounding > cap * (1 + 1e-12)).sum())
    if not above:
        return None
    return Finding(
        "error",
        f"{above} radii exceed {cap:.4f}, the most that so many equal votes can certify at this "
        f"alpha (largest: {radius.max():g}): alpha or the number of draws is not what is claimed",
    )


def _missing_images(idx: np.ndarray[Any, Any], own: bool) -> Finding | None:
    """Gaps in a regular stride, and an end before a round number of images."""
    if len(idx) < 2:
        return None
    stride = int(np.median(np.diff(idx)))
    expected = (idx[-1] - idx[0]) // stride + 1
    if expected > len(idx):
        return Finding("error", f"{expected - len(idx)} images are missing at stride {stride}")
    if own or (idx[-1] + stride) % ROUND_SIZE == 0:
        return None
    return Finding(
        "error",
        f"{len(idx)} images at stride {stride} end at index {idx[-1]}; test sets end at a "
        f"multiple of {ROUND_SIZE}, so the log was cut short",
    )


def _crossing(radius: np.ndarray[Any, Any], rounding: np.ndarray[Any, Any]) -> Finding | None:
    nearest = np.round(radius / TABLE_STEP) * TABLE_STEP
    # Exact grid radii (decide) print exactly; rounding is visible only in short digits.
    doubtful = (
        (radius > 0) & (radius >= nearest) & (radius - rounding < nearest) & (rounding > 1e-6)
    )
    if not doubtful.any():
        return None
    return Finding(
        "warning",
        f"{int(doubtful.sum())} printed radii may have been rounded up to a multiple of "
        f"{TABLE_STEP}, where tables count them",
    )


def _labels(log: pd.DataFrame) -> Finding | None:
    counts = log["label"].value_counts()
    if counts.mean() < 5 or len(counts) < 2:
        return None
    chance = float(chisquare(counts).pvalue)
    if chance >= UNBALANCED:
        return None
    return Finding("warning", f"classes are unbalanced in this subset (p = {chance:.1e})")


def _recorded(texts: pd.DataFrame, log: pd.DataFrame) -> Finding | None:
    if "correct" not in texts.columns:
        return None
    truth = texts["correct"].str.strip().str.lower().map({"true": "1", "false": "0"})
    recorded = pd.to_numeric(truth.fillna(texts["correct"]), errors="coerce")
    wrong = int((recorded.to_numpy() != log["correct"].to_numpy()).sum())
    if not wrong:
        return None
    return Finding(
        "warning", f"the column correct disagrees with predict == label in {wrong} rows; recomputed"
    )


def _order(log: pd.DataFrame) -> Finding | None:
    if log["idx"].is_monotonic_increasing:
        return None
    return Finding("warning", "rows are not in the order of the images")
