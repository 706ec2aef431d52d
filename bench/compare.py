"""Do two result folders agree within their intervals?

The two are taken as independent. Runs on the same images and noise differ by less than that, so
that between them a small loss passes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.csv_files import read_csv
from bench.errors import BenchError
from bench.statistics import accuracy_interval, independent_difference_interval

POINT = ["method", "sigma", "seed"]
CURVE = ["radius", "value", "low", "high", "n_images"]


def find_table(folder: Path, name: str) -> Path | None:
    """Where a result folder, or its folder of tables, has a table."""
    places = (folder / "tables" / name, folder / name)
    return next((path for path in places if path.exists()), None)


def read_table(
    folder: Path, name: str, numbers: Sequence[str] = (), words: Sequence[str] = ()
) -> pd.DataFrame:
    """A table of a result folder, by method, sigma and seed.

    Raises:
        BenchError: it has none of that name, or it lacks a column.
    """
    if (path := find_table(folder, name)) is None:
        raise BenchError(f"{folder} has no tables/{name}: name a result folder, e.g. results/quick")
    return read_csv(path, ["method", *words], ["sigma", "seed", *numbers])


def _joined(a: Path, b: Path, name: str, keys: list[str], numbers: list[str]) -> pd.DataFrame:
    left, right = (read_table(folder, name, numbers) for folder in (a, b))
    return left.merge(right, on=keys, how="outer", suffixes=("_a", "_b"))


def compare_results(a: Path, b: Path) -> pd.DataFrame:
    """Compare certified accuracy per method, sigma, seed and radius, and trained parameters.

    Values agree when their difference is within the joint 95 % half width, the root of the
    summed squares of the halves that face each other. A curve that ends earlier counts as 0
    beyond its end; a method, sigma or seed that one side lacks is a disagreement.

    Raises:
        BenchError: a folder holds no tables, or the radii are not the same.
    """
    curves = _joined(a, b, "certified_accuracy.csv", [*POINT, "radius"], CURVE)
    both = {
        side: set(
            curves.loc[curves[f"value_{side}"].notna(), POINT].itertuples(index=False, name=None)
        )
        for side in "ab"
    }
    points = [tuple(row) for row in curves[POINT].itertuples(index=False, name=None)]
    present = np.array([point in both["a"] and point in both["b"] for point in points])
    filled = _end_at_zero(_end_at_zero(curves, "a"), "b")
    table = filled[[*POINT, "radius"]].assign(
        quantity="certified_accuracy",
        a=filled["value_a"],
        b=filled["value_b"],
        difference=filled["value_a"] - filled["value_b"],
        joint_half_width=joint_half_width(
            *(filled[[f"value_{side}", f"low_{side}", f"high_{side}"]] for side in "ab")
        ),
    )
    within = table["difference"].abs() <= table["joint_half_width"] + 1e-12
    table["agrees"] = present & within
    return pd.concat([table, _compare_parameters(a, b)], ignore_index=True)


def joint_half_width(a: pd.DataFrame, b: pd.DataFrame) -> NDArray[np.float64]:
    """Half width of the interval of a - b, as Newcombe (1998, method 10) joins two intervals.

    Args:
        a: columns value, low and high, in this order whatever their names.
        b: likewise, row by row.

    Returns:
        The root of the summed squares of the halves that face each other.
    """
    left, right = a.to_numpy().T, b.to_numpy().T
    low, high = independent_difference_interval(left, right)
    difference = left[0] - right[0]
    return np.where(difference > 0, difference - low, high - difference)


def _end_at_zero(curves: pd.DataFrame, side: str) -> pd.DataFrame:
    """Give one side 0 successes, with the interval of that, where its curve has ended."""
    ended = curves[f"value_{side}"].isna()
    groups = curves.groupby(POINT)
    images = groups[f"n_images_{side}"].transform("max")
    _, high = accuracy_interval(np.zeros(len(curves)), images.to_numpy())
    last = curves["radius"].where(~ended).groupby([curves[key] for key in POINT]).transform("max")
    if (ended & (curves["radius"] < last)).any():
        raise BenchError("the two results use different radii: set the same radius_step in both")
    filled = curves.fillna({f"value_{side}": 0.0, f"low_{side}": 0.0})
    return filled.assign(**{f"high_{side}": filled[f"high_{side}"].fillna(pd.Series(high))})


def _compare_parameters(a: Path, b: Path) -> pd.DataFrame:
    cost = _joined(a, b, "cost.csv", POINT, ["trainable_parameters"])
    left, right = cost["trainable_parameters_a"], cost["trainable_parameters_b"]
    return cost[POINT].assign(
        quantity="trainable_parameters",
        a=left,
        b=right,
        difference=left - right,
        joint_half_width=0.0,
        agrees=(left == right) | (left.isna() & right.isna()),
    )


def agree(comparison: pd.DataFrame) -> bool:
    """Whether no comparison disagrees."""
    return bool(comparison["agrees"].all())
